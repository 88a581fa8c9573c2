"""One backbone in memory for many adapters and for prompts: what the viewer asks is answered without loading twice.

A run's model is what `load_run` makes of it. Every tensor that another loaded model holds with the same values, which
is the frozen backbone, is then held once, so that a run costs what its adapter changed, and changing over to a run that
has been loaded before is a look-up. Nothing is written into a model that another session may be using.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import numpy as np
import torch
import yaml
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from pipelines.inference import Trained, load_run
from pipelines.pretrain import IMAGE_SIZE
from pipelines.transforms import BATCH, WINDOW, Input, enlarged_logits
from surm_seg import backbones
from surm_seg.backbones import weights as weight_files
from surm_seg.backbones.sam import SIZES, Sam, load_weights
from surm_seg.errors import BadConfig, BadInput
from surm_seg.volume import file_digest

MOST_RUN_BYTES = 2 * 2**30
"""Of the loaded runs together, the shared backbone counted once; the longest unused goes first."""

MOST_EMBEDDING_BYTES = 256 * 2**20
"""Of the embeddings of slices: 900 of sam_tiny's, 64 of SAM's."""

MASKS = 4
"""Mask tokens of a promptable SAM; the first is the one that is trained to answer every prompt."""

META_SIZE = 1024
"""Side in pixels at which Meta trained SAM's prompts."""

NO_POINT = -1
"""Label of a point that SAM reads as padding."""


class Resident:
    """A backbone that stays loaded, the adapters trained on it, and its answers to prompts.

    Calls from several threads are safe; models are loaded one at a time, and slices encoded one at a time. Once a
    prompt has been answered, no other waits for a run to be loaded.

    Args:
        backbone: its name.
        weights: as a run's configuration has them: auto, a file, or random.
        device: where the models are.

    Raises:
        BadConfig: there is no backbone of this name.
        BadInput: its weights are not there.
    """

    def __init__(self, backbone: str = "sam_tiny", weights: str = "auto", device: str = "cpu") -> None:
        self.backbone, self.device = backbones.make(backbone), device
        self._file = self.backbone.weights_file(weights)
        self._digest = None if self._file is None else file_digest(self._file)
        self._runs: OrderedDict[tuple[str, str], Trained] = OrderedDict()
        self._embeddings: OrderedDict[str, Tensor] = OrderedDict()
        self._asked: Sam | None = None
        self._loading, self._encoding = Lock(), Lock()

    @classmethod
    def of(cls, run: Path, device: str = "cpu") -> Resident:
        """The backbone that a run was trained on, the run not loaded yet; raises BadInput for what is no run."""
        try:
            stored = yaml.safe_load((run / "config.yaml").read_text())
            return cls(stored["backbone"], stored["weights"], device)
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
            raise BadInput("no-run", f"{run} is not a run folder with a readable config.yaml; choose a run.") from error

    @property
    def prompts(self) -> bool:
        """Whether this backbone answers prompts: SAM does, once it is trained."""
        return self.backbone.name in SIZES and self._file is not None

    def use(self, run: Path) -> Trained:
        """The model of a run, its outputs equal to those of `load_run` bit for bit.

        Cost: the first time, that of `load_run`; then a look-up, as long as the run is trained no further.

        Raises:
            BadInput: the run is not finished, or was trained on another backbone.
            Corrupt: its files are damaged.
        """
        facts = _facts(run)
        base = facts.get("base_sha256")
        with self._loading:
            if None not in (base, self._digest) and base != self._digest:
                sentence = f"{run.name} was trained on another backbone than {self.backbone.name} with these weights"
                raise BadInput("other-backbone", f"{sentence}; choose runs of one backbone to look at side by side.")
            key = str(run.resolve()), json.dumps(facts.get("adapter_sha256"))
            if key not in self._runs:
                trained = load_run(run, self.device)
                self._share(trained.model)
                self._runs[key] = trained
                self._digest = self._digest or trained.facts["base_sha256"]  # random weights: those of the first run
            self._runs.move_to_end(key)
            while len(self._runs) > 1 and self._bytes_of_runs() > MOST_RUN_BYTES:
                self._runs.popitem(last=False)
            return self._runs[key]

    def segment(
        self,
        run: Path,
        volume: Int[np.ndarray, "z y x"],
        progress: Callable[[float], object] = lambda share: None,
        *,
        tta: Literal["none", "flip"] = "none",
        keep_largest: bool = False,
    ) -> UInt8[np.ndarray, "z y x"]:
        """Label of every voxel of a volume in HU: `use(run)(volume)`, and `progress` is told how it goes.

        Args:
            progress: called after every few slices with the share that is done, 0..1; what it raises ends the work.
        """
        trained, passes = self.use(run), -(-volume.shape[0] // BATCH) * (2 if tta == "flip" else 1)
        return replace(trained, model=_Watched(trained.model, passes, progress))(volume, tta, keep_largest)

    def prompt(
        self,
        volume: Int[np.ndarray, "z y x"],
        z: int,
        points: Sequence[Sequence[int]] = (),
        box: Sequence[int] | None = None,
    ) -> Bool[np.ndarray, "y x"]:
        """What is pointed at in axial slice z of a volume in HU, by the frozen backbone without any adapter.

        Cost: one pass through the encoder for the first prompt on a slice, which is recognised by its voxels; after
        that only the mask decoder, some milliseconds.

        Args:
            points: (x, y, 1) for a voxel that belongs to it, (x, y, 0) for one that does not.
            box: (x0, y0, x1, y1), two opposite corners of a box around it, both included.

        Raises:
            BadConfig: the backbone does not answer prompts, or nothing, or a voxel outside the slice, is pointed at.
        """
        rows, columns = volume.shape[1:]
        corners = [] if box is None else [box[:2], box[2:]]
        marks = [(x, y) for x, y, *_ in (*points, *corners)]
        if not marks or not 0 <= z < len(volume) or not all(0 <= x < columns and 0 <= y < rows for x, y in marks):
            raise BadConfig("prompt-place", "A prompt needs a box or points, all of them inside the slice.")
        model, input = self._promptable()
        scale = input.image_size / max(rows, columns)
        question = _question(points, box, scale, self.device)
        with self._encoding, torch.inference_mode():
            embedding = self._embedding(model, input, volume, z)
            logits = model.decode(embedding, **question)[:, :1]
            return (enlarged_logits(logits, rows, columns)[0, 0] > 0).cpu().numpy()

    def _promptable(self) -> tuple[Sam, Input]:
        """The frozen backbone with the mask tokens it was trained with, and what it was trained to see."""
        if not self.prompts or self._file is None:
            raise BadConfig("no-prompts", f"{self.backbone.name} with these weights answers no prompts; use sam_tiny.")
        own = self.backbone.name == "sam_tiny"
        size, channels = (IMAGE_SIZE, "neighbours") if own else (META_SIZE, "repeat")
        if self._asked is None:
            with self._loading:
                if self._asked is None:
                    model = Sam(SIZES[self.backbone.name], size, masks=MASKS)
                    load_weights(model, weight_files.load(self._file), self.backbone.name, str(self._file))
                    model = model.to(self.device).eval()
                    self._share(model)
                    self._asked = model
        return self._asked, Input(size, WINDOW, channels, self.backbone.pixel_mean, self.backbone.pixel_std)

    def _embedding(self, model: Sam, input: Input, volume: np.ndarray, z: int) -> Float[Tensor, "1 c h w"]:
        """The encoder's answer to a slice, kept under the digest of its voxels and of those below and above."""
        around = volume[np.clip(np.arange(z - 1, z + 2), 0, len(volume) - 1)]
        key = f"{around.shape} {hashlib.sha256(np.ascontiguousarray(around).data).hexdigest()}"
        if key not in self._embeddings:
            seen = torch.from_numpy(input.slices(volume, z))[None]
            self._embeddings[key] = model.image_encoder(input.pixels(seen.to(self.device)))
        self._embeddings.move_to_end(key)
        while len(self._embeddings) > 1 and _bytes(self._embeddings.values()) > MOST_EMBEDDING_BYTES:
            self._embeddings.popitem(last=False)
        return self._embeddings[key]

    def _share(self, model: nn.Module) -> None:
        """Let the model hold other loaded models' tensors in the place of its own where name and values are equal."""
        others = [dict(other.named_parameters()) for other in self._models()]
        for name, parameter in model.named_parameters():
            same = (other[name] for other in others if name in other and _equal(other[name], parameter))
            parameter.data = next(same, parameter).data

    def _models(self) -> list[nn.Module]:
        return [trained.model for trained in self._runs.values()] + ([] if self._asked is None else [self._asked])

    def _bytes_of_runs(self) -> int:
        return _bytes(parameter for trained in self._runs.values() for parameter in trained.model.parameters())


class _Watched(nn.Module):
    """A model that says after each of its passes which share of them is done."""

    def __init__(self, model: nn.Module, passes: int, progress: Callable[[float], object]) -> None:
        super().__init__()
        self.model, self.passes, self.progress, self.done = model, passes, progress, 0

    def forward(self, pixels: Tensor) -> Tensor:
        answer = self.model(pixels)
        self.done += 1
        self.progress(self.done / self.passes)
        return answer


def _question(points: Sequence[Sequence[int]], box: Sequence[int] | None, scale: float, device: str) -> dict[str, Any]:
    """Voxels of a slice as `Sam.decode` takes them, in the places and in the number that training used.

    Args:
        scale: pixels of the backbone's input per voxel.
    """
    question: dict[str, Any] = {}
    if points:
        marks = [[*point] for point in points]
        marks += [[0, 0, NO_POINT]] if len(marks) == 1 else []  # training always showed two, the second maybe padding
        stated = torch.tensor(marks, dtype=torch.float32, device=device)[None]
        question["points"] = ((stated[..., :2] + 0.5) * scale, stated[..., 2])
    if box is not None:
        (x0, x1), (y0, y1) = sorted(box[::2]), sorted(box[1::2])
        question["boxes"] = torch.tensor([[x0, y0, x1 + 1, y1 + 1]], dtype=torch.float32, device=device) * scale
    return question


def _facts(run: Path) -> Mapping[str, Any]:
    """run.json; {} where it cannot be read, which `load_run` has the words for."""
    try:
        return dict(json.loads((run / "run.json").read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Memory of all of them together; what several share counts once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
