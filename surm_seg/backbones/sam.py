"""SAM (arXiv 2304.02643) from the `segment-anything` package's own modules, at any input size and with a class head."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import types
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from surm_seg.backbones import weights as weight_files
from surm_seg.backbones.base import Backbone, Decoder, Segmenter
from surm_seg.backbones.sam_encoder import encoded
from surm_seg.errors import BadConfig, BadInput
from surm_seg.roles import Part


def _modeling() -> types.ModuleType:
    """`segment_anything.modeling` without the package's __init__, whose image predictor needs torchvision."""
    name = "segment_anything"
    if name in sys.modules:
        return importlib.import_module(f"{name}.modeling")
    spec = importlib.util.find_spec(name)
    if spec is None or spec.submodule_search_locations is None:
        raise BadConfig(
            "sam-package", "The package segment-anything is not installed: pip install segment-anything==1.0."
        )
    package = types.ModuleType(name)
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules[name] = package
    try:
        return importlib.import_module(f"{name}.modeling")
    finally:
        del sys.modules[name]  # a later import of the whole package stays possible


modeling = _modeling()


@dataclass(frozen=True)
class SamSize:
    """The numbers that tell SAM's members apart; `url` is where Meta publishes the weights, None for our own."""

    width: int
    depth: int
    heads: int
    global_blocks: tuple[int, ...]
    url: str | None
    prompt_width: int = 256
    decoder_mlp: int = 2048
    window: int = 14


_META = "https://dl.fbaipublicfiles.com/segment_anything/"
SIZES = {
    "sam_vit_b": SamSize(768, 12, 12, (2, 5, 8, 11), _META + "sam_vit_b_01ec64.pth"),
    "sam_vit_l": SamSize(1024, 24, 16, (5, 11, 17, 23), _META + "sam_vit_l_0b3195.pth"),
    "sam_vit_h": SamSize(1280, 32, 16, (7, 15, 23, 31), _META + "sam_vit_h_4b8939.pth"),
    "sam_tiny": SamSize(192, 6, 3, (2, 5), None, prompt_width=128, decoder_mlp=512, window=8),
}
TINY_WEIGHTS = Path(__file__).with_name("sam_tiny.safetensors")
PATCH = 16
CLASS_HEAD = (
    "mask_decoder.mask_tokens.",
    "mask_decoder.output_hypernetworks_mlps.",
    "mask_decoder.iou_prediction_head.",
)
"""Parts whose shape or meaning follows the number of masks: new for every task."""


class MaskDecoder(modeling.MaskDecoder):
    """The package's mask decoder, returning every mask of a batch of images in one pass."""

    def forward(
        self,
        embeddings: Float[Tensor, "batch width h w"],
        positions: Float[Tensor, "1 width h w"],
        sparse: Float[Tensor, "batch prompts width"],
        dense: Float[Tensor, "#batch width #h #w"],
    ) -> Float[Tensor, "batch masks h4 w4"]:
        """Mask logits at four times the embedding's resolution."""
        batch, _, height, width = embeddings.shape
        tokens = torch.cat([self.iou_token.weight, self.mask_tokens.weight]).expand(batch, -1, -1)
        tokens = torch.cat([tokens, sparse], 1)
        tokens, features = self.transformer(embeddings + dense, positions.expand(batch, -1, -1, -1), tokens)
        features = self.output_upscaling(features.mT.unflatten(2, (height, width)))
        heads = [mlp(tokens[:, 1 + i]) for i, mlp in enumerate(self.output_hypernetworks_mlps)]
        return torch.einsum("bmc,bchw->bmhw", torch.stack(heads, 1), features)


class ImageEncoder(modeling.ImageEncoderViT):
    """The package's image encoder, computed as in `sam_encoder`; `checkpointing` trades time for memory there."""

    checkpointing = False

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch c h w"]:
        return encoded(self, x, checkpointing=self.checkpointing)


class Sam(Segmenter):
    """Image encoder, prompt encoder and mask decoder under Meta's names; one mask token per class, background first.

    Without prompts it answers with the prompt encoder's no-mask embedding, as in automatic segmentation.
    """

    def __init__(self, size: SamSize, image_size: int, masks: int) -> None:
        super().__init__()
        grid = image_size // PATCH
        self.image_encoder = ImageEncoder(
            img_size=image_size,
            patch_size=PATCH,
            embed_dim=size.width,
            depth=size.depth,
            num_heads=size.heads,
            out_chans=size.prompt_width,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=size.window,
            global_attn_indexes=size.global_blocks,
        )
        self.prompt_encoder = modeling.PromptEncoder(
            embed_dim=size.prompt_width,
            image_embedding_size=(grid, grid),
            input_image_size=(image_size, image_size),
            mask_in_chans=16,
        )
        self.mask_decoder = MaskDecoder(
            transformer_dim=size.prompt_width,
            transformer=modeling.TwoWayTransformer(
                depth=2, embedding_dim=size.prompt_width, num_heads=8, mlp_dim=size.decoder_mlp
            ),
            num_multimask_outputs=masks - 1,
            iou_head_hidden_dim=size.prompt_width,
        )

    def forward(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes h w"]:
        return self.decode(self.image_encoder(pixels))

    def decode(
        self,
        embeddings: Float[Tensor, "batch width h w"],
        points: tuple[Float[Tensor, "batch n 2"], Tensor] | None = None,
        boxes: Float[Tensor, "batch 4"] | None = None,
    ) -> Float[Tensor, "batch masks h4 w4"]:
        """Mask logits for an embedding; points are (x, y) pixels with labels 1 or 0, boxes (x0, y0, x1, y1)."""
        sparse, _ = self.prompt_encoder(points=points, boxes=boxes, masks=None)
        dense = self.prompt_encoder.no_mask_embed.weight[:, :, None, None]
        sparse = sparse.expand(embeddings.shape[0], -1, -1)
        return self.mask_decoder(embeddings, self.prompt_encoder.get_dense_pe(), sparse, dense)


class SamBackbone(Backbone):
    """`sam_vit_b`, `sam_vit_l`, `sam_vit_h` with Meta's weights and `sam_tiny` with ours.

    Decoder: `full` trains the whole mask decoder; `structured` freezes its transformer and gives the transformer's q
    and v the same structure as the encoder's; `frozen` trains only what a new set of classes needs, the mask tokens and
    their heads. The no-mask embedding is trained unless frozen; the IoU head, point embeddings and mask down-scaler
    get no gradient in automatic segmentation and stay frozen.

    Args:
        checkpointing: compute each block of the encoder again in backward: less memory, a third more time.
    """

    names = tuple(SIZES)
    patch = PATCH
    pixel_mean = (123.675 / 255, 116.28 / 255, 103.53 / 255)
    pixel_std = (58.395 / 255, 57.12 / 255, 57.375 / 255)
    roles = {  # noqa: RUF012
        "q": Part(r"image_encoder\.blocks\.\d+\.attn\.qkv", (0, 1 / 3)),
        "k": Part(r"image_encoder\.blocks\.\d+\.attn\.qkv", (1 / 3, 2 / 3)),
        "v": Part(r"image_encoder\.blocks\.\d+\.attn\.qkv", (2 / 3, 1)),
        "out": Part(r"image_encoder\.blocks\.\d+\.attn\.proj"),
        "mlp_in": Part(r"image_encoder\.blocks\.\d+\.mlp\.lin1"),
        "mlp_out": Part(r"image_encoder\.blocks\.\d+\.mlp\.lin2"),
    }

    def __init__(self, name: str, checkpointing: bool = False) -> None:
        super().__init__(name)
        self.checkpointing = checkpointing

    def build(self, classes: int, image_size: int, weights: str | Path) -> Sam:
        self._check_size(image_size)
        model = Sam(SIZES[self.name], image_size, masks=classes + 1)
        model.image_encoder.checkpointing = self.checkpointing
        file = self.weights_file(weights)
        if file is not None:
            load_weights(model, weight_files.load(file), self.name, str(file), skip=CLASS_HEAD)
        return model

    def weights_file(self, weights: str | Path) -> Path | None:
        if str(weights) == "random":
            return None
        if str(weights) != "auto":
            return Path(weights)
        url = SIZES[self.name].url
        return weight_files.published(url) if url else TINY_WEIGHTS

    def trained_modules(self, model: nn.Module, decoder: Decoder) -> list[str]:
        pattern = re.compile(r"mask_decoder\.output_hypernetworks_mlps\.\d+")
        heads = [name for name, _ in model.named_modules() if pattern.fullmatch(name)]
        trained = ["mask_decoder.mask_tokens", *heads]
        if decoder != "frozen":
            trained += ["mask_decoder.iou_token", "mask_decoder.output_upscaling", "prompt_encoder.no_mask_embed"]
        return trained + (["mask_decoder.transformer"] if decoder == "full" else [])

    def decoder_targets(self, decoder: Decoder) -> Iterable[str]:
        return [r"mask_decoder\.transformer\..*\.(?:q_proj|v_proj)"] if decoder == "structured" else []


def load_weights(model: Sam, state: dict[str, Tensor], name: str, source: str, skip: tuple[str, ...] = ()) -> None:
    """Copy Meta-named weights into the model; position tables are resized to its grid.

    Args:
        skip: prefixes of names that keep their initial values.

    Raises:
        BadInput: MobileSAM's file, another member's, or missing or unexpected names.
    """
    _refuse_others(state, name, source)
    own = model.state_dict()
    wanted = {key for key in own if not key.startswith(skip)}
    missing, unexpected = sorted(wanted - set(state)), sorted(set(state) - set(own))
    unexpected = [key for key in unexpected if not key.startswith(skip) and not key.startswith("pixel_")]
    if missing or unexpected:
        raise BadInput(
            "weights-names",
            f"{source} is not a checkpoint of {name}: {len(missing)} names are missing {missing[:3]} and "
            f"{len(unexpected)} are unknown {unexpected[:3]}.",
        )
    for key in wanted:
        value = _resized(key, state[key].float(), own[key])
        if value.shape != own[key].shape:
            raise BadInput(
                "weights-shape",
                f"{source} is not a checkpoint of {name}: {key} is {tuple(value.shape)}, not {tuple(own[key].shape)}.",
            )
        own[key].copy_(value)


def _refuse_others(state: dict[str, Tensor], name: str, source: str) -> None:
    if any(key.startswith("image_encoder.patch_embed.seq.") for key in state):
        raise BadInput(
            "weights-mobilesam",
            f"{source} holds MobileSAM, whose TinyViT image encoder is not supported yet; give a checkpoint of {name}.",
        )
    patches = state.get("image_encoder.patch_embed.proj.weight")
    if patches is not None and patches.shape[0] != SIZES[name].width:
        found = next((n for n, size in SIZES.items() if size.width == patches.shape[0]), "another backbone")
        raise BadInput(
            "weights-other",
            f"{source} is a checkpoint of {found}, not of {name}; choose --backbone {found} or other weights.",
        )


def _resized(key: str, value: Tensor, own: Tensor) -> Tensor:
    """Absolute positions bilinearly over the grid (1, h, w, c), relative tables linearly over the distance (d, c)."""
    if value.shape == own.shape:
        return value
    if key.endswith("pos_embed"):
        resized = nn.functional.interpolate(value.permute(0, 3, 1, 2), own.shape[1:3], mode="bilinear")
        return resized.permute(0, 2, 3, 1)
    if ".rel_pos_" in key:
        return nn.functional.interpolate(value.T[None], own.shape[0], mode="linear")[0].T
    return value
