"""The readers of pictures, what goes into the model, and whole runs of `surm-seg train --task vision`."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pipelines_small
import pytest
import scipy.io
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPProcessor

from pipelines import image_files, vision
from pipelines.image_files import Picture
from pipelines.supervised import PREDICTED_AT_ONCE
from pipelines.tiny.text import tokenizer
from pipelines.vision import BENCHMARKS, VTAB_CLASSES, Config
from surm_seg import train
from surm_seg.errors import BadConfig, BadInput

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(pipelines_small.vit(tmp_path_factory.mktemp("vit")))


def seen(picture: Picture) -> np.ndarray:
    return np.asarray(picture.image())


def painted(path: Path, shade: int = 0, mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (20, 12), shade if mode in ("L", "I;16") else (shade, 0, 255)).save(path)
    return path


def folders(folder: Path, parts: tuple[str, ...] = ("train", "val", "test")) -> Path:
    for part in parts:
        for label, name in enumerate(("cats", "dogs")):
            for number in range(4):
                painted(folder / part / name / f"{number}.png", 100 * label + number)
    return folder


def test_digits_are_split_once_and_for_all() -> None:
    parts = vision.digits().parts
    assert {name: len(part) for name, part in parts.items()} == vision.DIGITS_SIZES
    assert sum(vision.DIGITS_SIZES.values()) == 1797
    assert vision.digits().digest() == vision.digits().digest()
    marks = {name: {(one.mark, one.label) for one in part} for name, part in parts.items()}
    assert not marks["test"] & marks["train"] and not marks["validation"] & marks["train"]
    assert seen(parts["train"][0]).max() == 255


def test_cifar_10(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = RNG.integers(0, 256, (6, 4, 32, 32, 3), dtype=np.uint8)
    for batch, name in enumerate([f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]):
        data = pixels[batch].transpose(0, 3, 1, 2).reshape(4, -1)
        (folder / name).write_bytes(pickle.dumps({b"data": data, b"labels": [0, 1, 9, batch]}, protocol=2))
    found = BENCHMARKS["cifar10"].read(tmp_path).parts
    assert [len(found[part]) for part in ("train", "test")] == [20, 4]
    for picture, wanted in zip(found["train"], pixels[:5].reshape(20, 32, 32, 3), strict=True):
        np.testing.assert_array_equal(seen(picture), wanted)
    assert [picture.label for picture in found["test"]] == [0, 1, 9, 5]


def cifar_100(folder: Path, **train: Any) -> Path:
    batch = {b"data": np.zeros((3, 3072), np.uint8), b"coarse_labels": [1, 1, 1], b"fine_labels": [3, 99, 0]}
    for name, values in (("train", {**batch, **{k.encode(): v for k, v in train.items()}}), ("test", batch)):
        (folder / name).write_bytes(pickle.dumps(values, protocol=2))
    return folder


def test_cifar_100_has_fine_labels(tmp_path: Path) -> None:
    found = BENCHMARKS["cifar100"].read(cifar_100(tmp_path))
    assert [picture.label for picture in found.parts["train"]] == [3, 99, 0] and len(found.classes) == 100


class Attack:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch attacked",)


@pytest.mark.parametrize(
    ("train", "sentence"),
    [
        ({"fine_labels": [3, 100, 0]}, "label 100 is none of 100 classes"),
        ({"fine_labels": [3, 0]}, "holds 3 pictures and 2 labels"),
        ({"fine_labels": Attack()}, "posix.system, which no array needs"),
        ({"data": np.zeros((3, 30), np.uint8)}, "is no batch of CIFAR"),
    ],
)
def test_damaged_and_hostile_batches(
    train: dict[str, Any], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput) as error:
        BENCHMARKS["cifar100"].read(cifar_100(tmp_path, **train))
    assert sentence in str(error.value)
    assert not (tmp_path / "attacked").exists()


def test_svhn(tmp_path: Path) -> None:
    pixels = RNG.integers(0, 256, (32, 32, 3, 5), dtype=np.uint8)
    for part in ("train", "test"):
        scipy.io.savemat(tmp_path / f"{part}_32x32.mat", {"X": pixels, "y": np.array([[1], [10], [9], [2], [3]])})
    found = BENCHMARKS["svhn"].read(tmp_path).parts["test"]
    assert [picture.label for picture in found] == [1, 0, 9, 2, 3]
    np.testing.assert_array_equal(seen(found[4]), pixels[..., 4])


def test_stl_10(tmp_path: Path) -> None:
    pixels = RNG.integers(0, 256, (3, 96, 96, 3), dtype=np.uint8)  # row, column
    for part in ("train", "test"):
        pixels.transpose(0, 3, 2, 1).tofile(tmp_path / f"{part}_X.bin")
        np.array([1, 10, 5], np.uint8).tofile(tmp_path / f"{part}_y.bin")
    found = BENCHMARKS["stl10"].read(tmp_path).parts["train"]
    assert [picture.label for picture in found] == [0, 9, 4]
    for picture, wanted in zip(found, pixels, strict=True):
        np.testing.assert_array_equal(seen(picture), wanted)


def test_folders_of_classes(tmp_path: Path) -> None:
    (folders(tmp_path) / "train" / "cats" / ".thumb.png").write_text("no picture")
    found = BENCHMARKS["imagefolder"].read(tmp_path)
    assert found.classes == ("cats", "dogs") and set(found.parts) == {"train", "validation", "test"}
    assert [one.label for one in found.parts["train"]] == [0] * 4 + [1] * 4
    assert seen(found.parts["test"][5]).tolist() == np.full((12, 20, 3), (101, 0, 255)).tolist()


def test_a_missing_validation_set_is_held_back(model: str, tmp_path: Path) -> None:
    data = str(folders(tmp_path, ("train", "test")))
    task = vision.create(Config(name="imagefolder", data=data, model=model, validation_share=0.25), 0)
    assert len(task.splits.validation) == 2 and len(task.splits.train) == 6


def test_vtab(tmp_path: Path) -> None:
    assert len(VTAB_CLASSES) == 19
    kitti = tmp_path / "kitti"
    for list_name, label in (("train800", 0), ("val200", 1), ("test", 3)):
        painted(kitti / "images" / f"{list_name}.png", 7)
        (kitti / f"{list_name}.txt").write_text(f"images/{list_name}.png {label}\n")
    found = BENCHMARKS["vtab/kitti"].read(tmp_path)
    assert {part: [one.label for one in pictures] for part, pictures in found.parts.items()} == {
        "train": [0], "validation": [1], "test": [3],
    }  # fmt: skip
    (kitti / "test.txt").write_text("images/test.png 4\n")
    with pytest.raises(BadInput, match=r"test\.txt, line 1: '4' is no number of 4 classes"):
        BENCHMARKS["vtab/kitti"].read(tmp_path)
    (kitti / "test.txt").write_text("images/other.png 3\n")
    with pytest.raises(BadInput, match=r"there is no .*other\.png"):
        BENCHMARKS["vtab/kitti"].read(kitti)


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    folders(tmp_path)
    painted(tmp_path / "test" / "birds" / "0.png")
    with pytest.raises(BadInput, match="differ in the classes birds"):
        image_files.class_folders(tmp_path)
    with pytest.raises(BadInput, match="no folder test"):
        image_files.class_folders(folders(tmp_path / "other", ("train",)))
    (tmp_path / "bad" / "train" / "cats").mkdir(parents=True)
    (tmp_path / "bad" / "test" / "cats").mkdir(parents=True)
    with pytest.raises(BadInput, match="cats holds no picture"):
        image_files.class_folders(tmp_path / "bad")


def test_pictures_that_cannot_be_read(tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(painted(tmp_path / "whole.png").read_bytes()[:60])
    with pytest.raises(BadInput, match=r"broken\.png is no readable picture"):
        image_files.opened(broken)
    with pytest.raises(BadInput, match=r"deep\.png has pixels of mode I;16"):
        image_files.opened(painted(tmp_path / "deep.png", 3000, "I;16"))
    assert image_files.opened(painted(tmp_path / "grey.png", 9, "L")).getpixel((0, 0)) == (9, 9, 9)


def test_names_and_files_that_are_not_there(model: str, tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="do you mean cifar10 or"):
        vision.create(Config(name="cifar-10", model=model), 0)
    with pytest.raises(BadConfig, match="is not read with --name digits, whose examples are generated"):
        vision.create(Config(data=str(tmp_path), model=model), 0)
    with pytest.raises(BadInput, match="data_batch_1 is missing; get it from https://www"):
        vision.create(Config(name="cifar10", data=str(tmp_path), model=model), 0)
    with pytest.raises(BadInput, match="needs --data: the archive of VTAB-1k"):
        vision.create(Config(name="vtab/dmlab", model=model), 0)
    with pytest.raises(BadInput, match="is no folder"):
        vision.create(Config(name="dtd", data=str(tmp_path / "nowhere"), model=model), 0)


def test_a_model_gets_pictures_as_its_preprocessing_says(model: str, tmp_path: Path) -> None:
    for kind in ("clip", "dinov2"):
        folder = str(getattr(pipelines_small, kind)(tmp_path / kind))
        task = vision.create(Config(model=folder), 0)
        batch = task.collate([task.sample(i, np.random.default_rng(0)) for i in range(3)])
        assert batch["pixel_values"].shape == (3, 3, 16, 16)
        assert task.answers(batch).shape == (3,)
        assert task.base.head == ("classifier",)
        if kind == "dinov2":
            white = task.look.pixels(Image.new("L", (8, 8), 255))
            torch.testing.assert_close(white, torch.full((3, 16, 16), 0.9 / 0.2))
    plain = vision.create(Config(model=model), 0)
    torch.testing.assert_close(plain.look.pixels(Image.new("L", (8, 8), 255)), torch.ones(3, 16, 16))


def test_a_model_saved_with_its_processor_has_the_same_look(tmp_path: Path) -> None:
    alone, together = pipelines_small.clip(tmp_path / "alone"), pipelines_small.clip(tmp_path / "together")
    (together / "preprocessor_config.json").unlink()
    CLIPProcessor(CLIPImageProcessor.from_pretrained(alone), tokenizer()).save_pretrained(together)
    assert not (together / "preprocessor_config.json").exists()
    looks = [vision.create(Config(model=str(folder)), 0).look for folder in (alone, together)]
    assert looks[0] == looks[1] and looks[0].mean != (0.5, 0.5, 0.5)


def test_what_is_assumed_of_a_model_is_said(model: str, tmp_path: Path) -> None:
    assert "mean and SD 0.5, since" in vision.create(Config(model=model), 0).describe()
    known = str(pipelines_small.dinov2(tmp_path))
    assert "SD 0.5" not in vision.create(Config(model=known), 0).describe()


@pytest.mark.parametrize("kind", ["vit", "clip", "dinov2"])
def test_pictures_of_another_size_than_the_models(kind: str, tmp_path: Path) -> None:
    folder = str(getattr(pipelines_small, kind)(tmp_path))
    own, other = (vision.create(Config(model=folder, image_size=size), 0) for size in (0, 24))
    for task, size in ((own, 16), (other, 24)):
        batch = task.collate([task.sample(i, np.random.default_rng(0)) for i in range(3)])
        assert batch["pixel_values"].shape == (3, 3, size, size)
        assert task.loss(batch).isfinite() and task.memory_needed(2, "cpu") > 0
    with pytest.raises(BadConfig, match=r"takes no pictures of 4 x 4 pixels .* give another --image_size"):
        vision.create(Config(model=folder, image_size=4), 0)


def test_only_what_means_the_same_is_mirrored(model: str, tmp_path: Path) -> None:
    cifar = vision.create(Config(name="cifar100", data=str(cifar_100(tmp_path)), model=model, validation_share=0.4), 0)
    digits = vision.create(Config(model=model), 0)
    ramp = Image.fromarray(np.tile(np.arange(32, dtype=np.uint8) * 8, (32, 1)))
    example = Picture(lambda: ramp, 0, "")
    for task, mirrored in ((cifar, True), (digits, False)):
        straight = task.encode(example, None)["pixel_values"]
        drawn = [task.encode(example, np.random.default_rng(seed))["pixel_values"] for seed in range(12)]
        assert any(torch.equal(one, straight.flip(2)) for one in drawn) == mirrored
        assert any(torch.equal(one, straight) for one in drawn)


class Counting(vision.Vision):
    """Answers logits, and keeps how many pictures were encoded before they were answered, at most."""

    waiting = most = 0

    def encode(self, example: Picture, rng: np.random.Generator | None) -> dict[str, torch.Tensor]:
        self.waiting += 1
        self.most = max(self.most, self.waiting)
        return super().encode(example, rng)

    def answers(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        self.waiting = 0
        return self._logits(batch)


@torch.inference_mode()
def test_a_test_set_is_never_in_memory_at_once(model: str) -> None:
    task = Counting(Config(model=model), 0)
    task.model.eval()
    examples = task.splits.tests["test"]
    found = task.answered(examples)
    assert 0 < task.most <= PREDICTED_AT_ONCE < len(examples)
    alone = [task.answers(task.collate([task.encode(one, None)]))[0].numpy() for one in examples[:100]]
    np.testing.assert_allclose(found[:100], alone, atol=1e-6)
    assert np.ptp(alone, axis=0).min() > 1e-5


def test_metrics_of_random_answers() -> None:
    found, true = RNG.integers(0, 5, 200), RNG.integers(0, 4, 200)
    record = vision.measured(found, true)
    assert record["accuracy"] == pytest.approx((found == true).mean())
    recalls = [(found[true == label] == label).mean() for label in range(4)]
    assert record["balanced_accuracy"] == pytest.approx(np.mean(recalls))


def test_a_run(model: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    few = ("--steps", "3", "--epochs", "0", "--batch_size", "4", "--quiet")
    assert train.main(["--task", "vision", "--model", model, "--output", str(run), *few]) == 0
    summary = json.loads((run / "scores" / "summary.json").read_text())
    assert summary["n"] == {"test": 500} and summary["score"] == "accuracy"
    assert len((run / "scores" / "predictions.csv").read_text().splitlines()) == 501
