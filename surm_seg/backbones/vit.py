"""Vision transformers of the transformers library (ViT, DINOv2, CLIP) with a light upsampling head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2Model, ViTConfig, ViTModel
from transformers.models.auto.configuration_auto import AutoConfig

from surm_seg.backbones.base import Backbone, Decoder, Segmenter
from surm_seg.errors import BadConfig, BadInput
from surm_seg.roles import ROLES

FAMILIES: dict[str, tuple[Any, Any]] = {
    "vit": (ViTConfig, ViTModel),
    "dinov2": (Dinov2Config, Dinov2Model),
    "clip_vision_model": (CLIPVisionConfig, CLIPVisionModel),
}
"""model_type of a transformers configuration -> its configuration and encoder classes."""
HEAD_WIDTH = 128


class VitSegmenter(Segmenter):
    """Encoder tokens -> grid -> logits at four times the grid's resolution."""

    def __init__(self, encoder: nn.Module, width: int, patch: int, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.patch = patch
        self.head = nn.Sequential(
            nn.Conv2d(width, HEAD_WIDTH, 1),
            nn.GroupNorm(1, HEAD_WIDTH),
            nn.GELU(),
            nn.ConvTranspose2d(HEAD_WIDTH, HEAD_WIDTH // 2, 2, stride=2),
            nn.GELU(),
            nn.ConvTranspose2d(HEAD_WIDTH // 2, HEAD_WIDTH // 4, 2, stride=2),
            nn.GELU(),
            nn.Conv2d(HEAD_WIDTH // 4, classes + 1, 1),
        )

    def forward(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes h w"]:
        grid = (pixels.shape[2] // self.patch, pixels.shape[3] // self.patch)
        # DINOv2 always interpolates its positions and has no such argument.
        resize = {} if isinstance(self.encoder, Dinov2Model) else {"interpolate_pos_encoding": True}
        tokens = self.encoder(pixels, **resize).last_hidden_state[:, -grid[0] * grid[1] :]
        return self.head(tokens.mT.unflatten(2, grid))


class VitBackbone(Backbone):
    """`vit`: weights are a local folder in transformers' layout, or random with the options below.

    Decoder: the head is new and always trained whole, so only `full` exists.

    Args:
        family: vit, dinov2 or clip_vision_model, for random weights.
        **config: fields of that family's transformers configuration, such as hidden_size, for random weights.
    """

    names = ("vit",)
    pixel_mean = (0.485, 0.456, 0.406)
    pixel_std = (0.229, 0.224, 0.225)
    roles = ROLES

    def __init__(self, name: str, family: str = "vit", **config: Any) -> None:
        super().__init__(name)
        if family not in FAMILIES:
            raise BadConfig("backbone-option", f"vit has no family {family!r}; choose among {', '.join(FAMILIES)}.")
        unknown = sorted(set(config) - set(FAMILIES[family][0]().to_dict()))
        if unknown:
            raise BadConfig("backbone-option", f"The {family} configuration of transformers has no field {unknown}.")
        self.family, self.config = family, config
        self.patch = config.get("patch_size", 16)

    def build(self, classes: int, image_size: int, weights: str | Path) -> VitSegmenter:
        if str(weights) == "auto":
            raise BadConfig(
                "weights",
                "Backbone vit has no weights of its own: give --weights FOLDER (transformers layout) or random.",
            )
        if str(weights) == "random":
            self._check_size(image_size)
            config_type, model_type = FAMILIES[self.family]
            encoder = model_type(config_type(**{"image_size": image_size, "patch_size": self.patch, **self.config}))
        else:
            encoder = self._pretrained(Path(weights))
            self.patch = encoder.config.patch_size
            self._check_size(image_size)
        return VitSegmenter(encoder, encoder.config.hidden_size, self.patch, classes)

    def weights_file(self, weights: str | Path) -> Path | None:
        file = Path(weights) / "model.safetensors"
        return file if str(weights) not in ("auto", "random") and file.is_file() else None

    def _pretrained(self, folder: Path) -> Any:
        if not (folder / "config.json").is_file():
            raise BadInput(
                "weights-missing", f"{folder} has no config.json: give --weights a folder in transformers' layout."
            )
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        family = "clip_vision_model" if config.model_type == "clip" else config.model_type
        if family not in FAMILIES:
            raise BadInput("weights-other", f"{folder} holds a {family}; backbone vit reads {', '.join(FAMILIES)}.")
        model, report = FAMILIES[family][1].from_pretrained(folder, local_files_only=True, output_loading_info=True)
        if any("layer" in key for key in report["missing_keys"]):
            raise BadInput("weights-names", f"{folder} lacks weights such as {sorted(report['missing_keys'])[0]}.")
        return model.to(torch.float32)

    def trained_modules(self, model: nn.Module, decoder: Decoder) -> list[str]:
        if decoder != "full":
            raise BadConfig(
                "decoder", f"--decoder {decoder} is for SAM; backbone vit trains its whole head: --decoder full."
            )
        return ["head"]
