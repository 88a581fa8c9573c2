"""Classification of pictures: `--task vision --name digits`, CIFAR, SUN397, DTD, STL-10, SVHN, VTAB-1k, or a folder.

Pictures are resized to the model's square without regard to their proportions, as VTAB does. What is chosen is chosen
on a validation set or on a share of the training set; scored is the test set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipelines import hub, image_files, tiny
from pipelines.image_files import Picture, Pictures
from pipelines.look import look_of, told_of_size
from pipelines.supervised import Base, Options, Splits, Supervised, over_seeds, refuse_data
from pipelines.tiny.vision import vision
from surm_seg.errors import BadConfig, BadInput
from surm_seg.task import Batch, Record

__all__ = ["RECIPES", "Config", "create", "over_seeds"]

_PUBLISHED: dict[str, Any] = {
    "model": "google/vit-base-patch16-224-in21k",
    "roles": ["q", "k", "v"],
    "batch_size": 64,
    "steps": 20_000,
    "warmup": 0,
    "schedule": "constant",
    "learning_rate": 5e-5,
    "weight_decay": 0.0,
    "validate_every": 1000,
    "checkpoint_every": 1000,
}
RECIPES: dict[str, dict[str, Any]] = {
    "default": {
        "batch_size": 32,
        "epochs": 10.0,
        "warmup_share": 0.06,
        "schedule": "linear",
        "learning_rate": 5e-3,
        "validate_every": 0,
        "workers": 0,
    },
    "published": _PUBLISHED,
    "published-svhn": _PUBLISHED | {"name": "svhn", "learning_rate": 5e-4},
}
"""Published: Adam for up to 20,000 steps, on q, k and v. The default is for the digits."""

DIGITS = "digits"
DIGITS_SIZES = {"train": 1000, "validation": 297, "test": 500}


@dataclass
class Config(Options):
    """A benchmark of pictures.

    Args:
        name: digits, cifar10, cifar100, sun397, dtd, stl10, svhn, vtab/TASK, or imagefolder for --data of your own.
        image_size: pixels of a side; 0 for the model's own. Positions of other sizes are interpolated.
    """

    name: str = DIGITS
    image_size: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size < 0:
            raise BadConfig("image-size", f"--image_size {self.image_size} must not be negative.")


@dataclass(frozen=True)
class Hub:
    """Where the hub has a data set, with splits train and test."""

    path: str
    image: str = "image"
    label: str = "label"
    name: str | None = None


@dataclass(frozen=True)
class Benchmark:
    """How a benchmark is read.

    Args:
        read: its folder.
        given: where to get its files.
        hub: the same elsewhere.
        flips: whether a picture means the same in a mirror.
    """

    read: Callable[[Path], Pictures]
    given: str
    hub: Hub | None = None
    flips: bool = False


FOLDERS = "folders train/CLASS and test/CLASS of pictures"

VTAB_CLASSES = {
    "caltech101": 102, "cifar": 100, "dtd": 47, "oxford_flowers102": 102, "oxford_iiit_pet": 37, "svhn": 10,
    "sun397": 397, "patch_camelyon": 2, "eurosat": 10, "resisc45": 45, "diabetic_retinopathy": 5, "clevr_count": 8,
    "clevr_dist": 6, "dmlab": 6, "kitti": 4, "dsprites_loc": 16, "dsprites_ori": 16, "smallnorb_azi": 18,
    "smallnorb_ele": 9,
}  # fmt: skip
"""Classes of the 19 tasks of VTAB-1k (arXiv 1910.04867), by the names of the usual archive."""


def _vtab(task: str, folder: Path) -> Pictures:
    """Lists in FOLDER/TASK or FOLDER, or folders of classes."""
    inside = folder / task if (folder / task).is_dir() else folder
    if (inside / image_files.VTAB_LISTS["train"]).exists():
        return image_files.lists(inside, VTAB_CLASSES[task])
    return image_files.class_folders(inside)


_CIFAR, _SVHN = "https://www.cs.toronto.edu/~kriz/cifar.html (for Python)", "http://ufldl.stanford.edu/housenumbers"

BENCHMARKS: dict[str, Benchmark] = {
    "cifar10": Benchmark(
        partial(image_files.cifar, fine=False), _CIFAR, Hub("uoft-cs/cifar10", image="img"), flips=True
    ),
    "cifar100": Benchmark(
        partial(image_files.cifar, fine=True), _CIFAR, Hub("uoft-cs/cifar100", "img", "fine_label"), flips=True
    ),
    "sun397": Benchmark(image_files.class_folders, f"any copy in {FOLDERS}", Hub("tanganke/sun397"), flips=True),
    "dtd": Benchmark(image_files.class_folders, f"any copy in {FOLDERS}", Hub("tanganke/dtd"), flips=True),
    "stl10": Benchmark(image_files.stl10, "https://cs.stanford.edu/~acoates/stl10", Hub("tanganke/stl10"), flips=True),
    "svhn": Benchmark(image_files.svhn, _SVHN, Hub("ufldl-stanford/svhn", name="cropped_digits")),
    "imagefolder": Benchmark(image_files.class_folders, f"{FOLDERS} of your own"),
    **{
        f"vtab/{task}": Benchmark(partial(_vtab, task), f"the archive of VTAB-1k (train800.txt, ...), or {FOLDERS}")
        for task in VTAB_CLASSES
    },
}


class Vision(Supervised[Picture]):
    """A picture, and which of some classes it shows."""

    metrics = ("accuracy", "balanced_accuracy")

    def __init__(self, config: Config, seed: int) -> None:
        found, self.flips = _read(config)
        self.classes = found.classes
        folder, model, base = _base(config, len(found.classes), seed)
        self.look = look_of(folder, model, config.image_size)
        self.told = told_of_size(model, config.model, self.look.size)
        splits = Splits(
            found.parts["train"], found.parts.get("validation", []), {"test": found.parts["test"]}, found.digest()
        )
        super().__init__(f"vision/{config.name}", config, seed, base, splits)

    def encode(self, example: Picture, rng: np.random.Generator | None) -> Batch:
        pixels = self.look.pixels(example.image())
        if self.flips and rng is not None and rng.random() < 0.5:
            pixels = pixels.flip(2)
        return {"pixel_values": pixels, "target": torch.tensor(example.label)}

    def inputs(self, batch: Batch) -> dict[str, Any]:
        return super().inputs(batch) | self.told

    def describe(self) -> str:
        said = super().describe()
        if self.look.assumed and self.options.model != tiny.NAME:
            return f"{said}; pictures with mean and SD 0.5, since the model has no preprocessor_config.json"
        return said

    def loss(self, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(self._logits(batch), batch["target"])

    def answers(self, batch: Batch) -> Tensor:
        return self._logits(batch).argmax(1)

    def _logits(self, batch: Batch) -> Tensor:
        return self.model(**self.inputs(batch)).logits.float()

    def scored(self, answers: np.ndarray, examples: Sequence[Picture]) -> Record:
        return measured(answers, np.array([example.label for example in examples]))

    def shown(self, answers: np.ndarray, examples: Sequence[Picture]) -> Iterator[tuple[str, str]]:
        for answer, example in zip(answers, examples, strict=True):
            yield self.classes[int(answer)], self.classes[example.label]


def measured(answers: np.ndarray, targets: np.ndarray) -> Record:
    """Accuracy, and its mean over the classes that occur."""
    from sklearn.metrics import accuracy_score, recall_score

    occurring = np.unique(targets)
    return {
        "accuracy": float(accuracy_score(targets, answers)),
        "balanced_accuracy": float(recall_score(targets, answers, labels=occurring, average="macro")),
    }


def _base(config: Config, classes: int, seed: int) -> tuple[str, nn.Module, Base]:
    """Where the model is, and the encoder with a new head: once, and as often as it is asked for."""
    folder = str(vision()) if config.model == tiny.NAME else config.model
    kind = "AutoModelForImageClassification"

    def build() -> nn.Module:
        return hub.with_new_head(kind, folder, num_labels=classes)[0]

    with torch.random.fork_rng(devices=[]):
        model, head = hub.with_new_head(kind, folder, num_labels=classes)
    return folder, model, Base(hub.fresh(build, seed), head, hub.digest(folder, model))


def _read(config: Config) -> tuple[Pictures, bool]:
    """The data set, and whether its pictures may be mirrored."""
    if config.name == DIGITS:
        refuse_data(config, DIGITS)
        return digits(), False
    if config.name not in BENCHMARKS:
        near = get_close_matches(config.name, [DIGITS, *BENCHMARKS], 3)
        meant = f"do you mean {' or '.join(near)}? There are" if near else "there are"
        raise BadConfig("benchmark", f"--name {config.name} is unknown; {meant} {', '.join([DIGITS, *BENCHMARKS])}.")
    kind = BENCHMARKS[config.name]
    if config.data:
        if not Path(config.data).is_dir():
            raise BadInput("data", f"--data {config.data} is no folder; for {config.name} give {kind.given}.")
        return kind.read(Path(config.data)), kind.flips
    if kind.hub is None:
        raise BadInput("data", f"--name {config.name} needs --data: {kind.given}.")
    return _from_hub(kind.hub), kind.flips


def digits() -> Pictures:
    """The 8 x 8 digits that scikit-learn brings (UCI, Alpaydin and Kaynak 1998), split once and for all."""
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    pixels = np.round(found.images * (255 / 16)).astype(np.uint8)
    everything = image_files.of_arrays(pixels, found.target, 10, "scikit-learn's digits")
    order = np.random.default_rng(0).permutation(len(everything))
    starts = np.cumsum([0, *DIGITS_SIZES.values()])
    parts = {
        name: [everything[i] for i in order[start : start + size]]
        for (name, size), start in zip(DIGITS_SIZES.items(), starts, strict=False)
    }
    return Pictures(parts, tuple(map(str, range(10))))


def _from_hub(where: Hub) -> Pictures:
    found: dict[str, Any] = {split: hub.rows(where.path, where.name, split) for split in ("train", "test")}
    classes = tuple(found["train"].features[where.label].names)
    parts = {
        split: image_files.from_hub(rows, where.image, where.label, rows._fingerprint) for split, rows in found.items()
    }
    return Pictures(parts, classes)


def create(config: Config, seed: int) -> Vision:
    """The task that `surm-seg train --task vision` runs."""
    return Vision(config, seed)
