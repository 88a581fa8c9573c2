"""prepare as its user meets it: right voxels, one manifest at the end, nothing half-written, nothing done twice."""

from __future__ import annotations

import os
import resource
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from surm_seg import prepare as command
from surm_seg.cases import Dataset
from surm_seg.cli import Reporter
from surm_seg.errors import BadInput
from surm_seg.labels import SYNAPSE
from surm_seg.lock import held
from surm_seg.prepare import PrepareConfig, main, plan, prepare
from surm_seg.volume import read_image, read_labels

REPOSITORY = Path(__file__).resolve().parents[1]
SHAPE = (12, 10, 6)
Write = Callable[..., Path]


def voxels(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Image in HU and raw BTCV labels with every organ, axes (i, j, k)."""
    draw = np.random.default_rng(number)
    return draw.integers(-1000, 1000, SHAPE, np.int16), draw.integers(0, 14, SHAPE).astype(np.uint8)


@pytest.fixture
def btcv(tmp_path: Path, write_nifti: Write) -> Path:
    """Six small cases in BTCV layout, two of them test cases of the benchmark."""
    for number in (1, 5, 6, 7, 8, 9):
        image, label = voxels(number)
        write_nifti(tmp_path / "raw/img" / f"img{number:04d}.nii.gz", image)
        write_nifti(tmp_path / "raw/label" / f"label{number:04d}.nii.gz", label)
    return tmp_path / "raw"


def run(*arguments: object) -> int:
    return main([*map(str, arguments), "--workers", "1"])


def test_synapse_is_prepared_with_benchmark_labels(btcv: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(btcv, "--output", tmp_path / "out") == 0
    assert "3 train, 1 val, 2 test cases, 8 organs" in capsys.readouterr().out.splitlines()[-1]
    dataset = Dataset.open(tmp_path / "out")
    dataset.verify()
    assert (dataset.labels, dataset.format) == (SYNAPSE, "synapse")
    case = dataset.case("case0006")
    image, label = voxels(6)
    np.testing.assert_array_equal(case.grid.restore(np.asarray(case.image)), image)
    table = np.array([0, 1, 2, 3, 4, 0, 5, 6, 7, 0, 0, 8, 0, 0])
    assert case.label is not None
    np.testing.assert_array_equal(case.grid.restore(np.asarray(case.label)), table[label])
    assert stat.S_IMODE((tmp_path / "out/case_key.json").stat().st_mode) == 0o600


def test_the_number_of_workers_changes_nothing(btcv: Path, tmp_path: Path) -> None:
    digests = [
        prepare(
            PrepareConfig(source=str(btcv), output=tmp_path / f"w{n}", workers=n, quiet=True), Reporter(True)
        ).digest
        for n in (1, 2)
    ]
    assert digests[0] == digests[1]


def test_a_second_run_does_no_case_again(btcv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    assert run(btcv, "--output", out) == 0
    first = Dataset.open(out).digest
    read: list[str] = []

    def counted(path: Path, **_: object) -> object:
        read.append(Path(path).name)
        return read_image(path)

    monkeypatch.setattr(command, "read_image", counted)
    assert run(btcv, "--output", out) == 0
    assert (Dataset.open(out).digest, read) == (first, [])
    array = out / "cases/case0005/image.npy"
    array.write_bytes(array.read_bytes()[:-1] + b"\x7f")
    assert run(btcv, "--output", out) == 0
    assert read == ["img0005.nii.gz"] and Dataset.open(out).digest == first


def test_another_label_table_prepares_every_case_again(btcv: Path, tmp_path: Path) -> None:
    (tmp_path / "table.yaml").write_text("".join(f"{n}: {'liver' if n == 6 else ''}\n" for n in range(1, 14)))
    assert run(btcv, "--output", tmp_path / "out") == 0
    assert run(btcv, "--output", tmp_path / "out", "--labels", tmp_path / "table.yaml") == 0
    dataset = Dataset.open(tmp_path / "out")
    dataset.verify()
    assert dataset.labels == ("liver",)
    assert dataset.case("case0001").histogram == {"liver": int((voxels(1)[1] == 6).sum())}


def test_a_bad_case_stops_before_the_manifest_and_keeps_the_others(
    btcv: Path, tmp_path: Path, write_nifti: Write, capsys: pytest.CaptureFixture
) -> None:
    good = (btcv / "img/img0006.nii.gz").read_bytes()
    (btcv / "img/img0006.nii.gz").write_bytes(good[:-9])
    write_nifti(btcv / "label/label0009.nii.gz", np.full(SHAPE, 99, np.uint8))
    assert run(btcv, "--output", tmp_path / "out") == 3
    message = capsys.readouterr().err
    lines = message.splitlines()
    assert ["img0006.nii.gz" in line for line in lines].count(True) == 1 and "error [unknown-label]" in message
    assert "label0009.nii.gz" in message and "Traceback" not in message and len(lines) == 3
    assert lines[-1].startswith("error [cases-failed]: 2 of 6 cases could not be prepared;")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["cases"]
    kept = sorted(path.name for path in (tmp_path / "out/cases").iterdir())
    assert kept == ["case0001", "case0005", "case0007", "case0008"]
    (btcv / "img/img0006.nii.gz").write_bytes(good)
    write_nifti(btcv / "label/label0009.nii.gz", voxels(9)[1])
    assert run(btcv, "--output", tmp_path / "out") == 0
    assert len(Dataset.open(tmp_path / "out").cases) == 6


def test_preparing_again_with_bad_input_keeps_the_old_data_set(btcv: Path, tmp_path: Path, write_nifti: Write) -> None:
    out = tmp_path / "out"
    assert run(btcv, "--output", out) == 0
    old = Dataset.open(out)
    write_nifti(btcv / "img/img0005.nii.gz", voxels(50)[0])
    write_nifti(btcv / "label/label0009.nii.gz", np.full(SHAPE, 99, np.uint8))
    assert run(btcv, "--output", out) == 3
    assert Dataset.open(out).digest == old.digest
    old.verify()
    write_nifti(btcv / "label/label0009.nii.gz", voxels(90)[1])
    assert run(btcv, "--output", out) == 0
    new = Dataset.open(out)
    new.verify()
    case = new.case("case0005")
    np.testing.assert_array_equal(case.grid.restore(np.asarray(case.image)), voxels(50)[0])
    assert sorted(path.name for path in out.iterdir()) == ["case_key.json", "cases", "dataset.json", "sheet.png"]


def test_a_first_run_of_bad_cases_only_leaves_nothing(btcv: Path, tmp_path: Path) -> None:
    for image in (btcv / "img").iterdir():
        image.write_bytes(image.read_bytes()[:-9])
    assert run(btcv, "--output", tmp_path / "out") == 3
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", ["0", "-2"])
def test_workers_are_one_or_more(workers: str, btcv: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([str(btcv), "--output", str(tmp_path / "out"), "--workers", workers]) == 2
    assert "error [workers]" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_source_that_cannot_be_listed_is_bad_input(
    btcv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def refuse(_: Path) -> None:
        raise PermissionError(13, "Permission denied", "raw/img")

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert run(btcv, "--output", tmp_path / "out") == 3
    assert "raw/img cannot be read" in capsys.readouterr().err


def test_a_manifest_that_cannot_be_written_is_told_in_a_sentence(
    btcv: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "out/dataset.json").mkdir(parents=True)
    (tmp_path / "out/case_key.json").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "_check_output", lambda *_: None)
        assert run(btcv, "--output", tmp_path / "out") == 3
    assert "choose --output" in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["shape", "affine"])
def test_an_image_and_label_on_different_grids_are_both_named_and_nothing_is_written(
    fault: str, btcv: Path, tmp_path: Path, write_nifti: Write, capsys: pytest.CaptureFixture
) -> None:
    affine = np.diag([-2.0, -2.0, 2.0, 1.0])
    affine[2, 3] = 0.01 if fault == "affine" else 0
    write_nifti(btcv / "label/label0005.nii.gz", voxels(5)[1][..., : 6 if fault == "affine" else 5], affine)
    assert run(btcv, "--output", tmp_path / "out") == 3
    message = capsys.readouterr().err
    assert "img0005.nii.gz" in message and "label0005.nii.gz" in message
    assert not (tmp_path / "out").exists()


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    btcv: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert run(btcv, "--output", tmp_path / "out", "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "case0005" in printed and "6x10x12 voxels, 2x2x2 mm" in printed and "3 train, 1 val, 2 test" in printed
    assert sorted(tmp_path.rglob("*")) == before


def test_private_names_appear_in_the_key_only(tmp_path: Path, write_nifti: Write) -> None:
    for patient in ("Doe_Jane", "Roe_Rick"):
        image, label = voxels(len(patient))
        write_nifti(tmp_path / "raw/imagesTr" / f"{patient}_0000.nii.gz", image)
        write_nifti(tmp_path / "raw/labelsTr" / f"{patient}.nii.gz", (label > 6).astype(np.uint8))
    (tmp_path / "raw/dataset.json").write_text('{"labels": {"background": 0, "liver": 1}}')
    assert run(tmp_path / "raw", "--output", tmp_path / "out") == 0
    assert [case.id for case in Dataset.open(tmp_path / "out").cases] == ["case001", "case002"]
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file() and path.name != "case_key.json"]
    assert not any(b"Doe" in path.read_bytes() for path in written)
    assert "Doe_Jane" in (tmp_path / "out/case_key.json").read_text()
    assert run(tmp_path / "raw", "--output", tmp_path / "named", "--keep-names") == 0
    assert [case.id for case in Dataset.open(tmp_path / "named").cases] == ["Doe_Jane", "Roe_Rick"]


def test_organ_files_are_painted_into_one_label_map(tmp_path: Path, write_nifti: Write) -> None:
    subject = tmp_path / "raw/s0001"
    names = ("spleen", "kidney_right", "kidney_left", "gallbladder", "liver", "stomach", "aorta", "pancreas", "heart")
    write_nifti(subject / "ct.nii.gz", voxels(1)[0])
    for k, name in enumerate(names):
        mask = np.zeros(SHAPE, np.uint8)
        mask[k, 2, 3] = 1
        write_nifti(subject / "segmentations" / f"{name}.nii.gz", mask)
    assert run(tmp_path / "raw", "--output", tmp_path / "out") == 0
    (case,) = Dataset.open(tmp_path / "out").cases
    assert case.label is not None and case.histogram == dict.fromkeys(SYNAPSE, 1)
    np.testing.assert_array_equal(case.grid.restore(np.asarray(case.label))[:9, 2, 3], [1, 2, 3, 4, 5, 6, 7, 8, 0])


def test_the_source_and_foreign_data_are_never_written_over(btcv: Path, tmp_path: Path) -> None:
    assert run(btcv, "--output", btcv) == 2
    (tmp_path / "out").mkdir()
    (tmp_path / "out/dataset.json").write_text('{"labels": {"liver": 1}}')
    assert run(btcv, "--output", tmp_path / "out") == 2
    assert (tmp_path / "out/dataset.json").read_text() == '{"labels": {"liver": 1}}'


def test_an_output_that_cannot_be_written_is_told(btcv: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    assert run(btcv, "--output", tmp_path / "file/out") == 3
    assert "choose --output" in capsys.readouterr().err


def test_a_full_disk_is_told_before_anything_is_written(
    btcv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "BYTES_PER_VOXEL", 10**15)
    with pytest.raises(BadInput) as refused:
        prepare(PrepareConfig(source=str(btcv), output=tmp_path / "out"), Reporter(True))
    assert refused.value.code == "disk-full" and not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_leaves_no_half_case(btcv: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A limit on the size of files stands in for the full disk, which a test may not mount: both fail the write."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        status = run(btcv, "--output", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 3 and "free space" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run(btcv, "--output", tmp_path / "out") == 0


def test_two_runs_on_one_folder_do_not_mix(btcv: Path, tmp_path: Path) -> None:
    with held(tmp_path / "out", "prepared"), pytest.raises(BadInput, match=f"process {os.getpid()}"):
        prepare(PrepareConfig(source=str(btcv), output=tmp_path / "out", workers=1), Reporter(True))
    assert run(btcv, "--output", tmp_path / "out") == 0


SLOW = """
import sys, time
from surm_seg import prepare
real = prepare.read_image
def slow(path, **options):
    if path.name >= "img0006":
        print("started", flush=True)
        time.sleep(60)
    return real(path, **options)
prepare.read_image = slow
sys.exit(prepare.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_a_killed_run_leaves_no_manifest_and_is_resumed(
    number: signal.Signals, status: int, btcv: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = [sys.executable, "-c", SLOW, str(btcv), "--output", str(out), "--workers", "1"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any("started" in line for line in process.stdout)
        process.send_signal(number)
        process.communicate()
    assert process.returncode == status
    assert not (out / "dataset.json").exists()
    done = out / "cases/case0005/image.npy"
    before = done.stat().st_mtime_ns
    (out / "cases/.case0006.part").mkdir(exist_ok=True)  # what a kill between two writes leaves
    (out / "cases/.case0006.part/image.npy").write_bytes(b"half")
    assert run(btcv, "--output", out) == 0
    assert done.stat().st_mtime_ns == before
    assert not list((out / "cases").glob(".*"))
    Dataset.open(out).verify()


WAITING = """
import os, pathlib, sys, time
from functools import partial
from surm_seg import cli
from surm_seg.pool import run_all
def wait(folder):
    (pathlib.Path(folder) / str(os.getpid())).touch()
    time.sleep(600)
if __name__ == "__main__":
    run_all([partial(wait, sys.argv[1])] * 2, "waiting", 2, cli.Reporter(True))
"""


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    pids.mkdir()
    (tmp_path / "script.py").write_text(WAITING)
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen([sys.executable, str(tmp_path / "script.py"), str(pids)], env=environment) as process:
        workers = _eventually(lambda: [int(path.name) for path in pids.iterdir()], lambda found: len(found) == 2)
        process.kill()
    assert len(workers) == 2
    assert _eventually(lambda: [pid for pid in workers if _alive(pid)], lambda found: not found) == []


def _eventually(ask: Callable[[], list[int]], enough: Callable[[list[int]], bool]) -> list[int]:
    """Poll for up to a minute; the last answer."""
    for _ in range(600):
        if enough(answer := ask()):
            break
        time.sleep(0.1)
    return answer


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_real_case_keeps_its_organs(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "ct-case-a"
    file = "labels_total_v1_104class.nii.gz"
    assert run(folder, "--label", file, "--output", tmp_path / "no") == 3
    assert run(folder, "--label", file, "--classes", "v1", "--output", tmp_path / "v1") == 0
    (case,) = Dataset.open(tmp_path / "v1").cases
    raw = read_labels(folder / file).voxels
    expected = {
        organ: int((raw == value).sum()) for organ, value in zip(SYNAPSE, (1, 2, 3, 4, 5, 6, 7, 10), strict=True)
    }
    assert case.histogram == expected and min(expected.values()) > 0
    np.testing.assert_array_equal(case.grid.restore(np.asarray(case.image)), read_image(folder / "ct.nii.gz").voxels)
    assert run(folder, "--label", "labels_total_v2_fast_117class.nii.gz", "--output", tmp_path / "v2") == 0
    (other,) = Dataset.open(tmp_path / "v2").cases
    assert other.label is not None and case.label is not None
    # The same patient, labelled by a faster model: the liver must agree, or the class tables were mixed up.
    liver = [np.asarray(c.label) == SYNAPSE.index("liver") + 1 for c in (case, other)]
    assert 2 * (liver[0] & liver[1]).sum() > 0.9 * (liver[0].sum() + liver[1].sum())


def test_the_default_output_is_named_after_the_source(
    btcv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert plan(PrepareConfig(source="raw")).output == Path("data/raw")
    assert plan(PrepareConfig()).output == Path("data/phantom")
