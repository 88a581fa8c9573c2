"""What a segmentation run is configured by, and the recipes: named sets of defaults.

default   ours: full-resolution slices, three neighbours as channels, the checkpoint's own normalisation
samed     SAMed (arXiv 2304.13785) as its authors trained it, batch 24, for a comparison on their terms
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch

from pipelines.transforms import WINDOW, Input
from surm_seg import backbones
from surm_seg.errors import BadConfig
from surm_seg.tuner import PeftModel, adapt


@dataclass
class Config:
    """What to segment, with what.

    Args:
        data: a prepared data set, or phantom: the generated one, prepared on first use.
        backbone: sam_tiny, sam_vit_b, sam_vit_l, sam_vit_h or vit.
        backbone_options: the backbone's own options.
        weights: a file or folder, auto for the backbone's published weights, or random.
        image_size: side of the backbone's input in pixels, a multiple of its patch; logits have a quarter of it.
        decoder: what of the decoder is trained: full, structured or frozen.
        structure: the family of the encoder's deltas.
        structure_options: that family's options.
        overrides: role, or pattern of module names -> structure, options and scale that differ there.
        roles: where in every block of the encoder: q, k, v, out, mlp_in, mlp_out.
        scale: factor of the deltas.
        dropout: on the deltas' input while training.
        window: HU range mapped to [0, 1].
        channels: neighbours shows the slices below and above as well, repeat one slice three times.
        normalise: checkpoint uses the backbone's mean and standard deviation, unit leaves [0, 1].
        slice_size: resample slices to this side first (cubic); 0 keeps them at full resolution.
        augment: default, samed or none.
        loss_at: logits or image, the resolution the loss is taken at.
        dice_weight: share of the Dice loss, the rest is cross-entropy.
        balanced: half of the draws show every organ equally often, the other half all slices.
        validate_on: val chooses the best checkpoint on the validation cases; none trains on them and keeps the last.
        score_on: test or train, the cases predicted and scored at the end.
    """

    data: str = "phantom"
    backbone: str = "sam_tiny"
    backbone_options: dict[str, Any] = field(default_factory=dict)
    weights: str = "auto"
    image_size: int = 384
    decoder: backbones.Decoder = "full"
    structure: str = "circulant"
    structure_options: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    roles: tuple[str, ...] = ("q", "v")
    scale: float = 1.0
    dropout: float = 0.0
    window: tuple[float, float] = WINDOW
    channels: Literal["repeat", "neighbours"] = "neighbours"
    normalise: Literal["checkpoint", "unit"] = "checkpoint"
    slice_size: int = 0
    augment: Literal["none", "default", "samed"] = "default"
    loss_at: Literal["logits", "image"] = "logits"
    dice_weight: float = 0.5
    balanced: bool = True
    validate_on: Literal["val", "none"] = "val"
    score_on: Literal["test", "train"] = "test"

    @classmethod
    def from_stored(cls, values: dict[str, Any]) -> Config:
        """The configuration among the options of a run's config.yaml, where tuples are lists."""
        own: dict[str, Any] = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        own |= {name: tuple(value) for name, value in own.items() if isinstance(value, list)}
        return cls(**own)

    def __post_init__(self) -> None:
        if not self.window[0] < self.window[1]:
            raise BadConfig("window", f"--window {list(self.window)} must grow.")
        if not 0 <= self.dice_weight <= 1:
            raise BadConfig("dice-weight", f"--dice_weight {self.dice_weight} is not in [0, 1].")


RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "samed": {
        "image_size": 512,
        "slice_size": 224,
        "channels": "repeat",
        "normalise": "unit",
        "augment": "samed",
        "structure": "low_rank",
        "structure_options": {"rank": 4},
        "dice_weight": 0.8,
        "balanced": False,
        "validate_on": "none",
        "validate_every": 0,
        "batch_size": 24,
        "learning_rate": 5e-3,
        "weight_decay": 0.1,
        "warmup": 250,
        "schedule": "poly",
        # 93 batches in an epoch of Synapse's 2,211 slices; a schedule of 200 epochs, stopped after 160.
        "horizon": 200 * 93,
        "steps": 160 * 93,
        "clip": 0.0,
    },
}


def input_of(config: Config, backbone: backbones.Backbone) -> Input:
    """The input pipeline that a configuration asks for."""
    own = config.normalise == "checkpoint"
    return Input(
        image_size=config.image_size,
        window=(config.window[0], config.window[1]),
        channels=config.channels,
        mean=backbone.pixel_mean if own else (0.0, 0.0, 0.0),
        std=backbone.pixel_std if own else (1.0, 1.0, 1.0),
        slice_size=config.slice_size,
    )


def adapted(base: backbones.Segmenter, backbone: backbones.Backbone, config: Config) -> PeftModel:
    """The base with the configuration's deltas and trained decoder modules, ready to train."""
    adapter = backbone.surm_config(
        base,
        structure=config.structure,
        options=config.structure_options,
        roles=config.roles,
        decoder=config.decoder,
        overrides=config.overrides,
        scale=config.scale,
        dropout=config.dropout,
    )
    return adapt(base, adapter)


def base_model(config: Config, backbone: backbones.Backbone, classes: int, seed: int) -> backbones.Segmenter:
    """The frozen model before any adapter; the same configuration and seed give the same weights."""
    torch.manual_seed(seed)
    return backbone.build(classes, config.image_size, config.weights)
