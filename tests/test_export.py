"""Exports: another program computes what the run does, nothing in them tells a name, and there is never half of one."""

import gzip
import json
import resource
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from monai.bundle.scripts import create_workflow, verify_net_in_out
from torch import nn
from transformers import ViTConfig, ViTModel

from pipelines import bundle_parts, onnx_export
from pipelines.inference import load_run
from pipelines.phantom import patient
from surm_seg import export, predict, prepare, train
from surm_seg.errors import SurmError
from surm_seg.output_folder import appearing
from surm_seg.volume import read_image, read_labels

CANARY = "DoeJane"
REPOSITORY = Path(__file__).resolve().parents[1]
TINY = [
    "--image_size",
    "64",
    "--precision",
    "float32",
    "--workers",
    "0",
    "--batch_size",
    "2",
    "--steps",
    "3",
    "--quiet",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the runs `sam` and `vit`, the second on weights in a folder that is gone, and of another grid."""
    folder = tmp_path_factory.mktemp("export")
    assert prepare.main(["phantom", "--cases", "4", "--output", str(folder / CANARY), "--quiet"]) == 0
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    ViTModel(ViTConfig(**size, image_size=96)).save_pretrained(folder / f"{CANARY}-weights")
    words = ["--data", str(folder / CANARY), "--validate_on", "none", "--score_on", "train", "--quiet", *TINY]
    assert train.main([*words, "--output", str(folder / "sam")]) == 0
    words += ["--backbone", "vit", "--weights", str(folder / f"{CANARY}-weights")]
    assert train.main([*words, "--output", str(folder / "vit")]) == 0
    return folder


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def assert_anonymous(folder: Path, runs: Path) -> None:
    """No file tells where the run or the program lay, or what the data and the weights were called."""
    for name in files(folder):
        content = (folder / name).read_bytes()
        secrets = (CANARY, str(runs), str(REPOSITORY), "site-packages")
        assert not [secret for secret in secrets if secret.encode() in content]


@pytest.mark.parametrize("name", ["sam", "vit"])
def test_onnx_runtime_and_model_json_are_enough_to_predict(
    runs: Path, tmp_path: Path, name: str, write_nifti: Callable[..., Path]
) -> None:
    volume = write_nifti(tmp_path / "in" / "x.nii.gz", patient(79).image[:, :, 14:19])
    out = tmp_path / "onnx"
    assert export.main([str(runs / name), "--to", "onnx", "--output", str(out)]) == 0
    assert files(out) == {"model.onnx", "model.json"}
    assert_anonymous(out, runs)
    facts = json.loads((out / "model.json").read_text())
    session = onnxruntime.InferenceSession(out / "model.onnx")
    own, (low, high) = facts["input"], facts["input"]["window"]
    scaled = (read_image(volume).lps().astype(np.float32).clip(low, high) - low) / (high - low)
    around = np.pad(scaled, ((1, 1), (0, 0), (0, 0)), "edge")
    slices = torch.from_numpy(np.stack([around[:-2], around[1:-1], around[2:]], 1))
    resize = torch.nn.functional.interpolate
    pixels = resize(slices, (own["image_size"],) * 2, mode="bilinear", antialias=True)
    pixels = (pixels - torch.tensor(own["mean"])[:, None, None]) / torch.tensor(own["std"])[:, None, None]
    logits = torch.from_numpy(session.run(["logits"], {"pixels": pixels.numpy()})[0])
    assert tuple(logits.shape[1:]) == tuple(facts["tensors"]["logits"]["shape"][1:])
    found = resize(logits, scaled.shape[1:], mode="bilinear").argmax(1).numpy()
    words = ["--run", str(runs / name), "--input", str(volume), "--output", str(tmp_path / "out"), "--quiet"]
    assert predict.main(words) == 0
    assert (found != read_labels(tmp_path / "out" / "x.nii.gz").lps()).mean() < 1e-4
    assert facts["classes"][0] == "background" and len(facts["classes"]) == logits.shape[1]
    trained = load_run(runs / name, "cpu")
    for batch in (1, 2, 5):
        noise = torch.randn(batch, 3, 64, 64)
        with torch.inference_mode():
            ours = trained.model(noise)
        theirs = torch.from_numpy(session.run(None, {"pixels": noise.numpy()})[0])
        assert (ours - theirs).abs().max() < 1e-4 * (ours.max() - ours.min())


def test_monai_runs_the_bundle_and_writes_the_same_bytes(
    runs: Path, tmp_path: Path, write_nifti: Callable[..., Path]
) -> None:
    made, out = patient(80), tmp_path / "bundle"
    write_nifti(tmp_path / "in" / "a.nii.gz", made.image[:, :, 14:25], made.affine)
    write_nifti(
        tmp_path / "in" / "b.nii.gz", made.image[::-1, :100, 18:19].transpose(2, 0, 1), made.affine[:, [2, 0, 1, 3]]
    )
    write_nifti(tmp_path / "in" / "c.nii", made.image[:, :, 14:17] + np.float32(0.4), made.affine)
    assert export.main([str(runs / "sam"), "--to", "bundle", "--output", str(out)]) == 0
    words = ["--run", str(runs / "sam"), "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--quiet"]
    assert predict.main(words) == 0
    config, meta = (str(out / "configs" / f"{name}.json") for name in ("inference", "metadata"))
    verify_net_in_out("network_def", meta_file=meta, config_file=config, bundle_root=str(out), device="cpu")
    folders = {"bundle_root": str(out), "dataset_dir": str(tmp_path / "in"), "output_dir": str(tmp_path / "monai")}
    workflow = create_workflow(config_file=config, workflow_type="infer", **folders)
    assert workflow.check_properties() == []
    workflow.run()
    for name in ("a.nii.gz", "b.nii.gz"):
        assert (tmp_path / "monai" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert gzip.decompress((tmp_path / "monai" / "c.nii.gz").read_bytes()) == (tmp_path / "out" / "c.nii").read_bytes()
    (tmp_path / "in" / "a.nii.gz").write_bytes((tmp_path / "in" / "a.nii.gz").read_bytes()[:-9])
    with pytest.raises(RuntimeError):  # MONAI's own reader would accept it
        workflow.run()


def test_a_bundle_needs_neither_the_run_nor_the_weights_it_began_with(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "vit", tmp_path / "vit")
    trained = load_run(tmp_path / "vit", "cpu")
    assert export.main([str(tmp_path / "vit"), "--to", "bundle", "--quiet"]) == 0
    shutil.rmtree(tmp_path / "vit")
    out = tmp_path / "vit-bundle"
    assert files(out) == {
        *("configs/inference.json", "configs/metadata.json", "models/model.safetensors", "docs/README.md", "LICENSE")
    }
    assert_anonymous(out, runs)
    network = json.loads((out / "configs" / "inference.json").read_text())["network_def"]
    build = {key: network[key] for key in ("backbone", "options", "classes", "image_size")}
    noise = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        found = bundle_parts.network(str(out / "models" / "model.safetensors"), **build)(noise)
        assert torch.equal(found, trained.model(noise))


class Fickle(nn.Module):
    """A model that is another one while it is exported."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels * self.scale + (0.01 if torch.compiler.is_exporting() else 0.0)


def test_a_graph_that_computes_another_thing_is_not_kept(runs: Path, tmp_path: Path) -> None:
    trained = replace(load_run(runs / "vit", "cpu"), model=Fickle())
    with pytest.raises(SurmError, match="logits differ"), appearing(tmp_path / "out", "export") as folder:
        onnx_export.write(runs / "vit", trained, folder)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_writes_nothing(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    shutil.copytree(runs / "vit", tmp_path / "unfinished")
    facts = json.loads((runs / "vit" / "run.json").read_text())
    del facts["adapter_sha256"]
    (tmp_path / "unfinished" / "run.json").write_text(json.dumps(facts))
    run = str(runs / "vit")
    cases = [
        (["--to", "onnx"], 2, "Give a RUN"),
        ([run], 2, "--to names nothing; choose among onnx, bundle"),
        ([run, "--to", "tflite"], 2, "--to names tflite"),
        ([str(tmp_path), "--to", "onnx"], 3, "is not a run folder"),
        ([str(tmp_path / "unfinished"), "--to", "bundle"], 3, "has no finished adapter"),
        ([run, "--to", "onnx", "--output", str(tmp_path / "full")], 2, "is not an empty folder"),
        ([run, "--to", "bundle", "--output", str(tmp_path / "full" / "notes.txt")], 2, "is not an empty folder"),
        ([run, "--to", "bundle", "--output", str(tmp_path / "full" / "notes.txt" / "x")], 3, "cannot be written"),
    ]
    before = files(tmp_path)
    for words, status, message in cases:
        assert export.main(["--output", str(tmp_path / "out"), *words]) == status
        assert message in capsys.readouterr().err
    assert export.main([run, "--to", "onnx", "--output", str(tmp_path / "out"), "--dry-run"]) == 0
    assert files(tmp_path) == before and not (tmp_path / "out").exists()


def test_a_missing_package_is_named(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # what Python itself notes for a module that cannot be had
    monkeypatch.delitem(sys.modules, "pipelines.onnx_export")
    assert export.main([str(runs / "vit"), "--to", "onnx", "--output", str(tmp_path / "out")]) == 2
    assert "needs the package onnxruntime: pip install 'surm-seg[export]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["onnx", "bundle"])
def test_a_full_disk_leaves_nothing(runs: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The limit on a file's size stands for the disk, which a test may not fill."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        status = export.main([str(runs / "vit"), "--to", kind, "--output", str(tmp_path / "out")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 3 and "cannot be written (File too large)" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
