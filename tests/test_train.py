"""The main job as a user runs it: prepare, train, predict, evaluate, on small generated patients."""

import csv
import dataclasses
import json
import re
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import peft
import pytest
import torch
import yaml

from pipelines import segmentation
from pipelines.inference import load_run
from pipelines.phantom import UPPER_ABDOMEN, write
from surm_seg import evaluate, predict, prepare, train
from surm_seg.backbones.sam import TINY_WEIGHTS
from surm_seg.cases import Dataset
from surm_seg.engine import EngineConfig, fit
from surm_seg.metrics import score

SMALL_WORLD = dataclasses.replace(
    UPPER_ABDOMEN, grid=(48, 48), spacing_mm=(7.5, 8.5), slices=(10, 12), slice_mm=(12, 18)
)
FAST = ["--image_size", "64", "--batch_size", "4", "--precision", "float32", "--workers", "0", "--quiet"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    write(folder, range(500, 506), SMALL_WORLD)
    return folder


@pytest.fixture(scope="module")
def data(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    split = folder / "split.yaml"
    names = [f"case{i:04d}" for i in range(1, 7)]
    # Ids 1..10 are the benchmark's; a split that keeps its test cases out of training is allowed.
    split.write_text(yaml.safe_dump({"train": names[4:], "val": [], "test": names[:4]}))
    output = folder / "prepared"
    assert (
        prepare.main([str(source), "--output", str(output), "--format", "synapse", "--split", str(split), "--quiet"])
        == 0
    )
    return output


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    words = ["--data", str(data), "--output", str(folder), "--steps", "30", "--validate_on", "none", "--warmup", "5"]
    assert train.main([*words, *FAST]) == 0
    return folder


def test_the_run_folder_says_everything(run: Path, data: Path) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["structure"] == "circulant" and config["steps"] == 30 and config["image_size"] == 64
    facts = json.loads((run / "run.json").read_text())
    assert facts["data_sha256"] == Dataset.open(data).digest and facts["versions"]["torch"] == torch.__version__
    assert facts["parameters"]["encoder_adapter"] == 6 * 2 * 192
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 30
    assert {path.name for path in run.iterdir()} == {
        "config.yaml", "run.json", "metrics.jsonl", "tensorboard", "checkpoints", "adapter", "predictions", "scores"
    }  # fmt: skip
    card = (run / "adapter" / "README.md").read_text()
    assert "import surm_seg" in card and "2,304" in card and "Research use only" in card


def test_scores_are_in_the_schema(run: Path) -> None:
    with (run / "scores" / "cases.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["case"] for row in rows} == {f"case{i:04d}" for i in range(1, 5)}
    assert {row["run"] for row in rows} == {"run"} and {row["adapter"] for row in rows} == {"circulant"}
    summary = json.loads((run / "scores" / "summary.json").read_text())
    dice = [float(r["dice"]) for r in rows if r["protocol"] == "recommended" and r["organ"] == "liver"]
    assert summary["organs"]["liver"]["dice"]["mean"] == pytest.approx(np.mean(dice))


def test_only_deltas_and_decoder_move(data: Path, tmp_path: Path) -> None:
    config = segmentation.Config(data=str(data), image_size=64, validate_on="none")
    task = segmentation.create(config, seed=0)
    before = {name: p.detach().clone() for name, p in task.model.named_parameters()}
    fit(task, EngineConfig(steps=3, precision="float32", workers=0, warmup=1), tmp_path, seed=0, device="cpu")
    moved = {name for name, p in task.model.named_parameters() if not torch.equal(p, before[name])}
    deltas = {name for name in moved if "surm_generators" in name}
    assert len(deltas) == 12 and all("image_encoder" in name for name in deltas)
    assert moved - deltas and all(".modules_to_save." in name for name in moved - deltas)


def test_predict_on_the_nifti_and_evaluate_repeat_the_training_score(
    run: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    volumes = tmp_path / "volumes"
    volumes.mkdir()
    for case in range(1, 5):
        (volumes / f"img{case:04d}.nii.gz").write_bytes((source / "img" / f"img{case:04d}.nii.gz").read_bytes())
    output = tmp_path / "predicted"
    assert predict.main(["--run", str(run), "--input", str(volumes), "--output", str(output), "--device", "cpu"]) == 0
    assert "liver" in capsys.readouterr().out
    for case in range(1, 5):
        found, image = nib.load(output / f"img{case:04d}.nii.gz"), nib.load(volumes / f"img{case:04d}.nii.gz")  # pyright: ignore
        assert np.array_equal(found.affine, image.affine) and found.shape == image.shape  # pyright: ignore
        kept = (run / "predictions" / f"case{case:04d}.nii.gz").read_bytes()
        assert (output / f"img{case:04d}.nii.gz").read_bytes() == kept
    reference = tmp_path / "reference"
    _write_references(run, reference)
    words = [
        "--prediction",
        str(output),
        "--reference",
        str(reference),
        "--output",
        str(tmp_path / "scores"),
        "--quiet",
    ]
    assert evaluate.main(words) == 0
    ours, theirs = (json.loads((f / "summary.json").read_text()) for f in (run / "scores", tmp_path / "scores"))
    for organ, values in ours["organs"].items():
        assert theirs["organs"][organ]["dice"]["mean"] == pytest.approx(values["dice"]["mean"], abs=1e-6)
    manifest = json.loads((output / "manifest.json").read_text())
    assert len(manifest["cases"]) == 4 and manifest["cases"][0]["volumes_ml"]["liver"] >= 0
    assert str(volumes) not in json.dumps(manifest)


def _write_references(run: Path, folder: Path) -> None:
    from surm_seg.volume import write_labels

    dataset = Dataset.open(yaml.safe_load((run / "config.yaml").read_text())["data"])
    folder.mkdir()
    for case in dataset.split("test"):
        label = case.label
        assert label is not None
        write_labels(folder / f"label{case.id.removeprefix('case')}.nii.gz", case.grid.restore(label), case.grid)


def test_the_adapter_is_an_ordinary_peft_adapter(run: Path) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    options = segmentation.Config(data=config["data"], image_size=64, validate_on="none")
    backbone = segmentation.create(options, seed=0).backbone
    torch.manual_seed(0)
    base = backbone.build(8, 64, "auto")
    model = peft.PeftModel.from_pretrained(base, str(run / "adapter")).eval()
    pixels = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        logits = model(pixels)
        merged = model.merge_and_unload()(pixels)  # pyright: ignore
    torch.testing.assert_close(merged, logits, rtol=1e-4, atol=1e-4)


def test_resuming_a_finished_half_equals_the_whole(data: Path, tmp_path: Path) -> None:
    words = ["--data", str(data), "--validate_on", "none", "--steps", "6", "--checkpoint_every", "3", *FAST]
    assert train.main([*words, "--output", str(tmp_path / "whole")]) == 0
    assert train.main([*words, "--output", str(tmp_path / "parts")]) == 0
    newest = sorted((tmp_path / "parts" / "checkpoints").iterdir())[-1]
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()  # as if the process had died before step 6 was saved
    assert train.main([*words, "--output", str(tmp_path / "parts"), "--resume"]) == 0
    whole, parts = (f / "adapter" / "adapter_model.safetensors" for f in (tmp_path / "whole", tmp_path / "parts"))
    assert whole.read_bytes() == parts.read_bytes()


@pytest.mark.parametrize("backbone", ["vit", "sam_tiny"])
def test_a_small_model_beats_all_background(data: Path, tmp_path: Path, backbone: str) -> None:
    small = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
    vit = [f"--backbone_options={json.dumps(small)}", "--weights", "random"]
    words = ["--data", str(data), "--validate_on", "none", "--backbone", backbone, "--steps", "60", *FAST]
    assert train.main([*words, *(vit if backbone == "vit" else []), "--output", str(tmp_path / "run")]) == 0
    summary = json.loads((tmp_path / "run" / "scores" / "summary.json").read_text())
    assert summary["organs"]["liver"]["dice"]["mean"] > 0.1  # all background scores 0 on every organ


def test_the_best_checkpoint_by_validation_case_is_kept(source: Path, tmp_path: Path) -> None:
    """What the run delivers has the score of the best of its validations, whichever step that was."""
    split = tmp_path / "split.yaml"
    split.write_text(yaml.safe_dump({"train": ["case0005"], "val": ["case0006"], "test": ["case0001"]}))
    (tmp_path / "small").mkdir()
    for kind in ("img", "label"):
        (tmp_path / "small" / kind).mkdir()
        for case in (1, 5, 6):
            name = f"{kind}{case:04d}.nii.gz"
            (tmp_path / "small" / kind / name).write_bytes((source / kind / name).read_bytes())
    data = tmp_path / "data"
    assert prepare.main([str(tmp_path / "small"), "--output", str(data), "--split", str(split), "--quiet"]) == 0
    words = ["--data", str(data), "--steps", "12", "--validate_every", "4", "--warmup", "0", *FAST]
    assert (
        train.main([*words, "--output", str(tmp_path / "run"), "--schedule", "constant", "--learning_rate", "0.003"])
        == 0
    )
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    scores = {record["step"]: record["score"] for record in records if "score" in record}
    assert list(scores) == [4, 8, 12]
    state = json.loads(next((tmp_path / "run" / "checkpoints").glob("step-*12/state.json")).read_text())
    assert state["best_step"] == max(scores, key=scores.__getitem__)
    trained = load_run(tmp_path / "run", "cpu")
    case = Dataset.open(data).case("case0006")
    assert case.label is not None
    rows = score(trained(case.image), case.label, trained.labels, None)
    found = float(np.mean([row.dice for row in rows if row.dice is not None]))
    assert found == pytest.approx(max(scores.values()), abs=1e-3)


def test_balanced_sampling_shows_every_organ_equally_often_in_half_of_the_draws(data: Path) -> None:
    task = segmentation.create(segmentation.Config(data=str(data), image_size=64, validate_on="none"), seed=0)
    weights = task.sampling_weights()
    assert weights is not None and weights.sum() == pytest.approx(1) and weights.min() >= 0.5 / len(task) - 1e-12
    focused = weights - 0.5 / len(task)
    for organ in range(1, 9):
        shown = np.array([bool((case.label[z] == organ).any()) for case, z in task.index])  # pyright: ignore
        assert not shown.any() or focused[shown].sum() >= 0.5 / 8 - 1e-12
    task.config.balanced = False
    assert task.sampling_weights() is None


def test_the_loss_is_sameds(data: Path) -> None:
    """0.2 cross-entropy + 0.8 Dice over the batch, background included, squared denominators (SAMed, section 3.3)."""
    config = segmentation.Config(data=str(data), image_size=64, validate_on="none", dice_weight=0.8)
    task = segmentation.create(config, seed=0)
    logits, labels = torch.randn(3, 9, 8, 8, dtype=torch.float64), torch.randint(0, 9, (3, 1, 8, 8))
    chance, truth = logits.softmax(1), torch.nn.functional.one_hot(labels[:, 0], 9).permute(0, 3, 1, 2)
    overlap, total = (chance * truth).sum((0, 2, 3)), (chance**2 + truth**2).sum((0, 2, 3))
    dice = (1 - (2 * overlap + 1e-5) / (total + 1e-5)).mean()
    expected = 0.8 * dice + 0.2 * torch.nn.functional.cross_entropy(logits, labels[:, 0])
    torch.testing.assert_close(task.criterion(logits, labels), expected, rtol=1e-8, atol=0)


def test_the_samed_recipe_trains(data: Path, tmp_path: Path) -> None:
    words = ["--data", str(data), "--recipe", "samed", "--steps", "2", "--warmup", "1", "--slice_size", "32", *FAST]
    assert train.main([*words, "--output", str(tmp_path / "run")]) == 0
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["parameters"]["encoder_adapter"] == 6 * 2 * 4 * (192 + 192)


def test_a_run_is_repeated_from_its_own_record(run: Path, tmp_path: Path) -> None:
    words = ["--config", str(run / "config.yaml"), "--output", str(tmp_path / "again"), "--quiet"]
    assert train.main(words) == 0
    first, second = (f / "adapter" / "adapter_model.safetensors" for f in (run, tmp_path / "again"))
    assert first.read_bytes() == second.read_bytes()


def test_resume_refuses_other_data_and_starts_a_run_that_died_before_its_first_save(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    facts = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps({**facts, "data_sha256": "0" * 64}))
    words = ["--config", str(copy / "config.yaml"), "--output", str(copy), "--resume", "--quiet"]
    assert train.main(words) == 2
    assert "data_sha256" in capsys.readouterr().err
    (copy / "run.json").write_text(json.dumps(facts))
    shutil.rmtree(copy / "checkpoints")
    (copy / "metrics.jsonl").unlink()
    assert train.main(words) == 0
    same = [(f / "adapter" / "adapter_model.safetensors").read_bytes() for f in (run, copy)]
    assert same[0] == same[1]


def test_a_flipped_byte_in_a_prepared_array_is_found(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    image = copy / "cases" / "case0005" / "image.npy"
    content = bytearray(image.read_bytes())
    content[-1] ^= 1
    image.write_bytes(content)
    words = ["--data", str(copy), "--validate_on", "none", "--output", str(tmp_path / "run"), *FAST]
    assert train.main(words) == 3
    assert "image.npy of case case0005" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_no_name_of_the_users_files_reaches_a_run(source: Path, tmp_path: Path) -> None:
    """A name that occurs nowhere else is searched in everything that prepare, train and a crash wrote."""
    canary = "CANARY-7f3a"
    folder = tmp_path / canary
    for kind in ("ct", "seg"):
        (folder / kind).mkdir(parents=True)
        for case in (1, 2):
            btcv = {"ct": "img", "seg": "label"}[kind]
            original = source / btcv / f"{btcv}{case:04d}.nii.gz"
            (folder / kind / f"{canary}-{case}.nii.gz").write_bytes(original.read_bytes())
    table = tmp_path / "organs.yaml"
    table.write_text("6: liver\n" + "".join(f"{value}:\n" for value in range(1, 12) if value != 6))
    data = tmp_path / "data"
    layout = ["--format", "folder", "--image", "ct/*.nii.gz", "--label", "seg/*.nii.gz", "--labels", str(table)]
    assert prepare.main([str(folder), *layout, "--output", str(data), "--quiet"]) == 0
    words = ["--data", str(data), "--validate_on", "none", "--steps", "2", *FAST]
    assert train.main([*words, "--output", str(tmp_path / "run")]) == 0
    written = [path for root in (data, tmp_path / "run") for path in root.rglob("*") if path.is_file()]
    searched = [path for path in written if path.name != "case_key.json"]
    assert len(searched) > 10
    assert [path for path in searched if canary.encode() in path.read_bytes() or canary in path.name] == []


BAD = {
    "no data set": (["--data", "absent"], 3, "no prepared data set"),
    "patch": (["--image_size", "100"], 2, "not a multiple of 16"),
    "structure": (["--structure", "round"], 2, "no structure 'round'"),
    "options": (["--structure_options", '{"rank": 3}'], 2, "no option"),
    "override": (["--overrides", '{"mlp_in": {"structure": "toeplitz"}}'], 2, "override 'mlp_in' matches no adapted"),
    "role": (["--roles", "[q,z]"], 2, "no role 'z'"),
    "weights": (["--weights", "absent.pth"], 3, "no weights file absent.pth"),
    "backbone": (["--backbone", "resnet"], 2, "no backbone 'resnet'"),
    "validation": (["--validate_on", "val"], 3, "no validation case"),
    "device": (["--device", "cuda:7"], 4, "not here"),
    "task": (["--task", "juggling"], 2, "no module pipelines.juggling"),
    "recipe": (["--recipe", "cake"], 2, "--recipe cake is unknown"),
    "resume": (["--resume"], 2, "no run to resume"),
    "rate": (["--learning_rate", "-1"], 2, "must be positive"),
    "negative": (["--workers", "-1"], 2, "must not be negative"),
    "seed": (["--seed", "-1"], 2, "must not be negative"),
    "no role": (["--roles", "[]"], 2, "nothing would be adapted"),
    "other backbone": (["--backbone", "sam_vit_b", "--weights", str(TINY_WEIGHTS)], 3, "is a checkpoint of sam_tiny"),
    "config file": (["--config", "absent.yaml"], 2, "cannot be read as YAML"),
    "unwritable": (["--output", "/proc/run"], 3, "choose another --output"),
    "seeds": (["--seeds", "-1"], 2, "must not be negative"),
    "no seeds": (["--seeds", "2", "--resume"], 2, "no run to resume"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence_and_writes_nothing(
    name: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words, status, message = BAD[name]
    good = ["--data", str(data), "--output", "run", "--validate_on", "none", *FAST]
    assert train.main([*good, *words]) == status
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_dry_run_writes_nothing_and_says_the_plan(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [word for word in FAST if word != "--quiet"]
    assert train.main(["--data", str(data), "--validate_on", "none", "--dry-run", *words]) == 0
    shown = capsys.readouterr().out
    assert "2,304 encoder adapter" in shown and "nothing written" in shown
    assert train.main(["--dry-run", *words]) == 0  # the phantom is not there yet: the plan of preparing it
    assert "to be generated" in capsys.readouterr().out and list(tmp_path.iterdir()) == []


def test_a_run_is_never_overwritten_and_resumed_only_as_it_was(
    run: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    words = ["--data", str(data), "--output", str(run), "--validate_on", "none", "--warmup", "5", *FAST]
    assert train.main([*words, "--steps", "30"]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert train.main([*words, "--steps", "40", "--resume"]) == 2
    assert "steps: 30 -> 40" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == kept


def test_the_samed_recipe_is_the_published_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main(["--recipe", "samed", "--learning_rate", "0.001", "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["structure"] == "low_rank" and config["structure_options"] == {"rank": 4}
    assert (config["image_size"], config["slice_size"], config["batch_size"], config["steps"]) == (512, 224, 24, 14_880)
    assert config["learning_rate"] == 0.001 and config["dice_weight"] == 0.8


def test_a_terminal_shows_a_bar_and_a_pipe_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--task", "tasks.line", "--steps", "40", "--validate_every", "20", "--workers", "0"]
    assert train.main([*words, "--output", str(tmp_path / "piped")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("step ") for line in lines) == 20 and sum("validation" in line for line in lines) == 2
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then writes as to a terminal
    assert train.main([*words, "--output", str(tmp_path / "terminal")]) == 0
    shown = capsys.readouterr().out
    assert "\N{BOX DRAWINGS HEAVY HORIZONTAL}" in shown and "40/40" in shown and re.search(r"loss \d", shown)
    assert shown.count("validation") == 2 and shown.count("\nstep ") <= 2
