"""Cases on a cluster of two nodes, one of them killed in the middle: each case once, and as one machine would do it."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from test_predict import run as run  # the fixture: a small trained run, its data beside it

from pipelines.phantom import patient
from surm_seg import cluster, evaluate, predict, prepare
from surm_seg.cases import Dataset
from surm_seg.cluster import Options, engine_of
from surm_seg.errors import BadInput
from surm_seg.pool import Outcome, here

NODE = {"num_cpus": 1, "object_store_memory": 2**27, "include_dashboard": False, "node_ip_address": "127.0.0.1"}


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A Ray cluster of one node, on loopback."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="ray-") as scratch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_TMPDIR", scratch)
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # or Ray would look for an address of the machine
        cluster_utils = importlib.import_module("ray.cluster_utils")
        made = cluster_utils.Cluster(initialize_head=True, head_node_args=NODE)
        yield made
        made.shutdown()


def on(nodes: Any) -> list[str]:
    return ["--engine", "ray", "--ray-address", nodes.address, "--quiet"]


def contents(folder: Path, pattern: str = "**/*") -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob(pattern) if path.is_file()}


def kill_at_work(nodes: Any, node: Any, output: Path) -> None:
    """Kill a node while its worker is in a task and another task has been finished."""
    (raylet,) = node.all_processes["raylet"]
    worker = {"name": "ray::attempt", "ppid": raylet.process.pid}
    while not list(output.glob("*.nii.gz")) or not any(p.info == worker for p in psutil.process_iter([*worker])):
        time.sleep(0.02)
    nodes.remove_node(node, allow_graceful=False)


def test_predict_outlives_a_node(nodes: Any, run: Path, tmp_path: Path, write_nifti: Callable[..., Path]) -> None:
    for n in range(6):
        write_nifti(tmp_path / "in" / f"x{n}.nii.gz", patient(90).image[:, :, n:])
    (tmp_path / "in" / "bad.nii.gz").write_bytes(b"not a volume")
    words = ["--run", str(run), "--input", str(tmp_path / "in"), "--output"]
    assert predict.main([*words, str(tmp_path / "here"), "--device", "cpu", "--quiet"]) == 5
    killer = threading.Thread(target=kill_at_work, args=(nodes, nodes.add_node(**NODE), tmp_path / "there"))
    killer.start()
    assert predict.main([*words, str(tmp_path / "there"), "--device", "cpu", *on(nodes)]) == 5
    killer.join()
    assert len(nodes.worker_nodes) == 0
    assert contents(tmp_path / "there", "*.nii.gz") == contents(tmp_path / "here", "*.nii.gz")
    assert len(list((tmp_path / "there").iterdir())) == 6 + 1
    here_, there = (json.loads((tmp_path / name / "manifest.json").read_text())["cases"] for name in ("here", "there"))
    assert sum(case["retries"] for case in here_) == 0 < sum(case["retries"] for case in there)
    assert [case | {"retries": 0, "seconds": 0} for case in there] == [case | {"seconds": 0} for case in here_]
    assert "error" in there[0] and len(there) == 7


def test_prepare_makes_the_same_data_set(nodes: Any, run: Path, tmp_path: Path) -> None:
    assert prepare.main(["phantom", "--cases", "4", "--output", str(tmp_path / "there"), *on(nodes)]) == 0
    assert Dataset.open(tmp_path / "there").digest == Dataset.open(run.parent / "data").digest
    names = sorted(path.name for path in (tmp_path / "there" / "cases").iterdir())
    assert names == sorted(path.name for path in (run.parent / "data" / "cases").iterdir())


def test_evaluate_gives_the_same_scores(
    nodes: Any, tmp_path: Path, write_nifti: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the paths on the command line are those of one folder, which the workers are not in."""
    for n in range(3):
        label = patient(91 + n).label[:, :, :12]
        write_nifti(tmp_path / "p" / f"case{n}.nii.gz", label % 9)
        write_nifti(tmp_path / "r" / f"case{n}.nii.gz", label[::-1] % 9)
    (tmp_path / "p" / "case2.nii.gz").write_bytes(b"not a volume")
    monkeypatch.chdir(tmp_path)
    words = ["--prediction", "p", "--reference", "r", "--output"]
    assert evaluate.main([*words, "here", "--quiet"]) == 5
    assert evaluate.main([*words, "there", *on(nodes)]) == 5
    for pattern in ("*.csv", "summary.json", ".cases/*"):
        assert contents(tmp_path / "there", pattern) == contents(tmp_path / "here", pattern) != {}


def test_what_kills_every_worker_is_given_up(nodes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "MAX_RETRIES", 1)
    options = Options(engine="ray", ray_address=nodes.address)
    with engine_of(options, here, tmp_path) as engine:
        assert sorted(engine(abs, [-1, 2]), key=lambda outcome: outcome.number) == [Outcome(0, 1), Outcome(1, 2)]
        (outcome,) = engine(os._exit, [1])
        assert (outcome.retries, outcome.value) == (1, None)
        assert isinstance(outcome.error, BadInput) and outcome.error.code == "machine-lost"
        (missing,) = engine(os.stat, [str(tmp_path / "absent")])
        assert missing.error is not None and missing.retries == 0 and "absent" in str(missing.error)
        with pytest.raises(TypeError):
            list(engine(abs, ["a mistake of ours is raised"]))


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--ray_address", "127.0.0.1:1"], 2, "give --engine ray"),
        (["--engine", "ray", "--ray_address", "127.0.0.1:1"], 3, "No Ray cluster can be used at 127.0.0.1:1"),
    ],
)
def test_an_address_without_a_cluster_is_told(
    words: list[str],
    status: int,
    message: str,
    tmp_path: Path,
    write_nifti: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    label = str(write_nifti(tmp_path / "x.nii.gz", patient(92).label[:, :, :2] % 9))
    sides = ["--prediction", label, "--reference", label, "--output", str(tmp_path / "scores")]
    assert evaluate.main([*sides, *words]) == status
    assert message in capsys.readouterr().err and not (tmp_path / "scores").exists()


def test_without_ray_the_way_to_install_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert prepare.main(["phantom", "--output", str(tmp_path / "out"), "--engine", "ray"]) == 2
    assert "pip install 'surm-seg[cluster]'" in capsys.readouterr().err and not (tmp_path / "out").exists()


WAITING = """
import sys, time
from pathlib import Path
from surm_seg import cli, cluster, pool
def wait():
    with cluster.engine_of(cluster.Options(engine="ray"), pool.here, Path(sys.argv[1]), workers=1) as engine:
        print("started", flush=True)
        list(engine(time.sleep, [600, 600]))
sys.exit(cli.run(wait))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_takes_its_ray_along(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / ".x.nii.gz.1.part").touch()
    words = [sys.executable, "-c", WAITING, str(tmp_path)]
    environment = os.environ | {"TMPDIR": tempfile.mkdtemp(prefix="ray-")}
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None and process.stdout.readline() == "started\n"
        time.sleep(1)
        started = psutil.Process(process.pid).children(recursive=True)
        assert any(child.name() == "raylet" for child in started)
        process.send_signal(number)
        assert process.wait(60) == 130
    assert psutil.wait_procs(started, timeout=30)[1] == []
    assert not list(tmp_path.iterdir()) and not list(Path(environment["TMPDIR"]).iterdir())
    Path(environment["TMPDIR"]).rmdir()
