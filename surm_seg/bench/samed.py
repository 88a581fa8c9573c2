"""The reference of `bench step`: the package's own SAM modules, fine-tuned as SAMed (arXiv 2304.13785) describes.

LoRA of rank 4 on q and v of every block, each as two more linear layers beside the fused projection; the rest of the
image encoder frozen; prompt encoder, asked without a prompt, and mask decoder, with one mask per class, trained whole.
"""

from __future__ import annotations

import math
from functools import partial

from jaxtyping import Float, Int
from torch import Tensor, nn

from surm_seg.backbones.sam import PATCH, Sam, SamSize, modeling

RANK = 4
DICE_WEIGHT = 0.8
SMOOTH = 1e-5


class LoraQkv(nn.Module):
    """qkv(x) with B_q A_q x added to q and B_v A_v x to v; B is 0 at first."""

    def __init__(self, qkv: nn.Linear) -> None:
        super().__init__()
        width = qkv.in_features
        self.qkv = qkv
        self.a_q, self.a_v = (nn.Linear(width, RANK, bias=False) for _ in "qv")
        self.b_q, self.b_v = (nn.Linear(RANK, width, bias=False) for _ in "qv")
        for down, up in ((self.a_q, self.b_q), (self.a_v, self.b_v)):
            nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
            nn.init.zeros_(up.weight)

    def forward(self, x: Float[Tensor, "... width"]) -> Float[Tensor, "... width3"]:
        width, result = x.shape[-1], self.qkv(x)
        result[..., :width] += self.b_q(self.a_q(x))
        result[..., -width:] += self.b_v(self.a_v(x))
        return result


class Samed(nn.Module):
    """Weights have Meta's names until `with_lora`."""

    def __init__(self, size: SamSize, image_size: int, masks: int) -> None:
        super().__init__()
        ours = Sam(size, image_size, masks)
        self.image_encoder = modeling.ImageEncoderViT(
            image_size,
            PATCH,
            embed_dim=size.width,
            out_chans=size.prompt_width,
            depth=size.depth,
            num_heads=size.heads,
            global_attn_indexes=size.global_blocks,
            window_size=size.window,
            use_rel_pos=True,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
        )
        self.prompt_encoder = ours.prompt_encoder
        self.mask_decoder = modeling.MaskDecoder(
            transformer_dim=size.prompt_width,
            transformer=ours.mask_decoder.transformer,
            num_multimask_outputs=masks - 1,
            iou_head_hidden_dim=size.prompt_width,
        )

    def with_lora(self) -> Samed:
        """Freeze the image encoder and put LoRA on its projections; returns the model itself."""
        self.image_encoder.requires_grad_(False)
        for block in self.image_encoder.blocks:
            block.attn.qkv = LoraQkv(block.attn.qkv)
        return self

    def forward(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch masks h4 w4"]:
        sparse, dense = self.prompt_encoder(points=None, boxes=None, masks=None)
        places = self.prompt_encoder.get_dense_pe()
        masks, _ = self.mask_decoder.predict_masks(self.image_encoder(pixels), places, sparse, dense)
        return masks


def samed_loss(logits: Float[Tensor, "batch classes h w"], labels: Int[Tensor, "batch h w"]) -> Float[Tensor, ""]:
    """0.2 cross-entropy + 0.8 Dice, the Dice of every class taken over the whole batch with squared sizes."""
    shares = logits.softmax(1)
    truth = nn.functional.one_hot(labels, logits.shape[1]).movedim(-1, 1).to(shares.dtype)
    overlap, sizes = (terms.sum((0, 2, 3)) for terms in (shares * truth, shares**2 + truth**2))
    dice = 1 - (2 * overlap + SMOOTH) / (sizes + SMOOTH)
    return (1 - DICE_WEIGHT) * nn.functional.cross_entropy(logits, labels) + DICE_WEIGHT * dice.mean()
