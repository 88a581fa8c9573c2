"""From a run folder and a volume to a label map: the one path that training, `predict` and the viewer share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from jaxtyping import Int, UInt8
from scipy.ndimage import find_objects
from skimage.measure import label
from torch import nn

from pipelines.recipes import Config, base_model, input_of
from pipelines.transforms import Input, predict_volume
from surm_seg import backbones
from surm_seg.errors import BadInput, Corrupt
from surm_seg.tuner import merged
from surm_seg.volume import file_digest, replacing


@dataclass(frozen=True)
class Trained:
    """A run's model, merged and ready, with what is needed to use it.

    Args:
        labels: organ names; label value = position + 1.
        precision: float32 or bfloat16, as it was trained and scored.
        facts: run.json.
        mirrored: the class that stands for each class where left and right are exchanged.
        knows_mirrors: whether it was trained on mirrored slices.
    """

    model: nn.Module
    input: Input
    labels: tuple[str, ...]
    precision: str
    facts: dict[str, Any]
    mirrored: tuple[int, ...] = ()
    knows_mirrors: bool = False

    @torch.inference_mode()
    def __call__(
        self, volume: Int[np.ndarray, "z y x"], tta: Literal["none", "flip"] = "none", keep_largest: bool = False
    ) -> UInt8[np.ndarray, "z y x"]:
        """Label of every voxel of a volume in HU, axes growing to Superior, Posterior, Left.

        Args:
            tta: flip averages the probabilities with those of the mirrored slices.
            keep_largest: of every organ, only the largest piece (26-connected).
        """
        device = next(self.model.parameters()).device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            found = predict_volume(self.model, volume, self.input, self.mirrored if tta == "flip" else None)
        return largest_pieces(found) if keep_largest else found


def largest_pieces(labels: UInt8[np.ndarray, "z y x"]) -> UInt8[np.ndarray, "z y x"]:
    """Every label's largest 26-connected piece; the rest becomes background."""
    result = np.zeros_like(labels)
    for value, box in enumerate(find_objects(labels), 1):
        if box is not None:
            pieces = np.asarray(label(labels[box] == value))
            largest = np.bincount(pieces.ravel())[1:].argmax() + 1
            result[box][pieces == largest] = value
    return result


def mirrored_classes(labels: Sequence[str], sides_keep: bool) -> tuple[int, ...]:
    """For each class, background first, the one that a model names where left and right are exchanged.

    Args:
        sides_keep: whether the model was trained on mirrored slices too, and so knows an organ by more than its side.
    """
    other = {"left": "right", "right": "left"}
    names = ["_".join(other.get(word, word) for word in organ.split("_")) for organ in labels]
    return (
        0,
        *((n if sides_keep or name not in labels else labels.index(name) + 1) for n, name in enumerate(names, 1)),
    )


def load_run(run: Path, device: str) -> Trained:
    """Rebuild a run's backbone, check that it is the one the run froze, and merge its adapter.

    Raises:
        BadInput: not a finished run folder, or its backbone's weights are gone or changed.
        Corrupt: its files are damaged.
    """
    try:
        facts = json.loads((run / "run.json").read_text())
        stored = yaml.safe_load((run / "config.yaml").read_text())
    except OSError as error:
        raise BadInput(
            "no-run", f"{run} is not a run folder (it has no {Path(error.filename).name}); give --run RUN."
        ) from error
    except (ValueError, yaml.YAMLError) as error:
        raise Corrupt("run-unreadable", f"The records of {run} are damaged: {error}.") from error
    if "adapter_sha256" not in facts:
        raise BadInput("no-adapter", f"{run} has no finished adapter; let its training end, or resume it.")
    config = Config.from_stored(stored)
    backbone = backbones.make(config.backbone, **config.backbone_options)
    labels = tuple(facts["labels"])
    base = base_model(config, backbone, len(labels), stored["seed"])
    if base_digest(base, backbone, config) != facts["base_sha256"]:
        raise BadInput("other-backbone", f"The weights {config.weights!r} are not those that {run} was trained on.")
    if facts["adapter_sha256"] != _adapter_digests(run):
        raise Corrupt("adapter-digest", f"{run / 'adapter'} has changed since it was written; restore it.")
    model = merged(base, run / "adapter")
    knows_mirrors = config.augment == "samed"
    return Trained(
        model.to(device).eval(),
        input_of(config, backbone),
        labels,
        stored["precision"],
        facts,
        mirrored_classes(labels, knows_mirrors),
        knows_mirrors,
    )


def base_digest(base: nn.Module, backbone: backbones.Backbone, config: Config) -> str:
    """SHA-256 that identifies a frozen model: of its weights file, or of its random weights."""
    file = backbone.weights_file(config.weights)
    if file is not None:
        return file_digest(file)
    digest = hashlib.sha256()
    for name, value in sorted(base.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def record_adapter(run: Path) -> None:
    """Add the digests of RUN/adapter to run.json: from now on the run can be used, and damage is found."""
    facts = json.loads((run / "run.json").read_text())
    with replacing(run / "run.json") as file:
        file.write(json.dumps({**facts, "adapter_sha256": _adapter_digests(run)}, indent=1).encode() + b"\n")


def _adapter_digests(run: Path) -> dict[str, str | None]:
    files = (run / "adapter" / name for name in ("adapter_config.json", "adapter_model.safetensors"))
    return {file.name: file_digest(file) if file.is_file() else None for file in files}
