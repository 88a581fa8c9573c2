"""SAM's image encoder with the package's modules and names, computed without its waste.

Equal to `segment_anything`'s encoder (arXiv 2304.02643, relative positions of arXiv 2112.01526) up to rounding, but:

- No padded token goes through qkv, the projection or the MLP. The package pads windows *after* the norm, so a padded
  token has zero input and one and the same key and value, qkv(0), and attends as a key. All padded keys of a window
  together act as one key, whose logit is the log of the sum over their exponentials; the relative positions of a
  rectangle of keys are a sum over rows plus a sum over columns, so that sum costs no loop over the keys.
- No N x N tensor of positions: queries and keys are made longer, (q, q Rh, q Rw) against (k, row, column), with rows
  and columns coded one-hot, and one product gives the logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import one_hot
from torch.utils.checkpoint import checkpoint

GROUP_BYTES = 4 << 20
"""Of attention weights made at a time: what stays in a processor's cache and is not asked of the system anew."""


@dataclass(frozen=True)
class Windows:
    """Equal windows side by side, cut out of the token grid.

    Args:
        top: first row of the first window.
        left: first column.
        down: windows under each other.
        across: windows side by side.
        height: rows of a window that exist; those up to `size` are padding.
        width: columns of a window that exist.
        size: (rows, columns) that attention sees.
    """

    top: int
    left: int
    down: int
    across: int
    height: int
    width: int
    size: tuple[int, int]

    @property
    def padded(self) -> bool:
        return (self.height, self.width) != self.size

    def cut(self, tokens: Float[Tensor, "batch rows columns ..."]) -> Float[Tensor, "windows height width ..."]:
        """(batch, rows, columns, ...) -> (batch x down x across, height, width, ...)."""
        rows = slice(self.top, self.top + self.down * self.height)
        columns = slice(self.left, self.left + self.across * self.width)
        grid = tokens[:, rows, columns].unflatten(2, (self.across, self.width)).unflatten(1, (self.down, self.height))
        return grid.transpose(2, 3).flatten(0, 2)

    def joined(self, windows: Float[Tensor, "windows tokens c"]) -> Float[Tensor, "batch rows columns c"]:
        """The inverse of `cut`, of the part that these windows cover; tokens row by row."""
        grid = windows.unflatten(1, (self.height, self.width)).unflatten(0, (-1, self.down, self.across))
        return grid.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def windows_of(rows: int, columns: int, size: int) -> list[list[Windows]]:
    """A grid of tokens as bands of windows: whole ones, and at the far edges what is left; size 0 is one window."""
    if not size:
        return [[Windows(0, 0, 1, 1, rows, columns, (rows, columns))]]

    def spans(length: int) -> Iterator[tuple[int, int, int]]:
        whole, rest = divmod(length, size)
        if whole:
            yield 0, whole, size
        if rest:
            yield whole * size, 1, rest

    return [
        [Windows(top, left, down, across, height, width, (size, size)) for left, across, width in spans(columns)]
        for top, down, height in spans(rows)
    ]


def attend(
    q: Float[Tensor, "windows heads n c"],
    k: Float[Tensor, "windows heads m c"],
    v: Float[Tensor, "windows heads m d"],
) -> Float[Tensor, "windows heads n d"]:
    """softmax(q k^T) v, the scale already in q; the n x m weights of all heads are never kept.

    On a CPU by groups of heads, which took less time than torch's fused attention, twice in bfloat16; elsewhere fused.
    """
    return _Attention.apply(q, k, v) if q.device.type == "cpu" else fused(q, k, v)


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attend` by torch's kernels, which want channels in equal multiples of 8."""
    channels = -(-max(q.shape[-1], v.shape[-1]) // 8) * 8
    query, key, value = (nn.functional.pad(x, (0, channels - x.shape[-1])) for x in (q, k, v))
    return nn.functional.scaled_dot_product_attention(query, key, value, scale=1.0)[..., : v.shape[-1]]


class _Attention(torch.autograd.Function):
    """Saves q, k and v alone: making the weights again costs less than keeping them."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return torch.cat([_weights(q[:, some], k[:, some]) @ v[:, some] for some in _groups(q, k)], 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v = ctx.saved_tensors
        grad_q, grad_k, grad_v = (torch.empty_like(x) for x in (q, k, v))
        for some in _groups(q, k):
            weights = _weights(q[:, some], k[:, some])
            from_output = grad[:, some] @ v[:, some].mT
            logits = torch.ops.aten._softmax_backward_data(from_output, weights, -1, q.dtype)
            grad_q[:, some] = logits @ k[:, some]
            grad_k[:, some] = logits.mT @ q[:, some]
            grad_v[:, some] = weights.mT @ grad[:, some]
        return grad_q, grad_k, grad_v


def _weights(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1, dtype=q.dtype)


def _groups(q: Tensor, k: Tensor) -> list[slice]:
    """Heads in groups whose weights take up to GROUP_BYTES."""
    heads = q.shape[1]
    size = max(1, GROUP_BYTES * heads // (q[..., 0].numel() * k.shape[2] * q.element_size()))
    return [slice(first, first + size) for first in range(0, heads, size)]


def _positions(
    q: Float[Tensor, "windows heads height width c"], table: Float[Tensor, "distances c"], axis: int, keys: int
) -> Float[Tensor, "windows heads height width keys"]:
    """q R: for every query, the term of each row (axis 2) or column (axis 3) of keys."""
    queries = torch.arange(q.shape[axis], device=q.device)
    distance = queries[:, None] - torch.arange(keys, device=q.device) + keys - 1
    own = table[distance].to(q.dtype)  # (queries, keys, c)
    by_query = q.movedim(axis, 0)
    return (by_query.flatten(1, 3) @ own.mT).unflatten(1, by_query.shape[1:4]).movedim(0, axis)


def window_attention(
    qkv: Float[Tensor, "batch rows columns 3 heads c"],
    padding: Float[Tensor, "3 heads c"],
    windows: Windows,
    tables: tuple[Tensor, Tensor],
) -> Float[Tensor, "batch r w dim"]:
    """Attention inside each of some equal windows: heads side by side, on the part of the grid that they cover.

    Args:
        padding: query, key and value of a padded token.
        tables: relative positions of rows and of columns, (2 size - 1, c).
    """
    q, k, v = windows.cut(qkv).permute(3, 0, 4, 1, 2, 5)  # (windows, heads, height, width, c) each
    (height, width), (rows, columns) = q.shape[2:4], windows.size
    down = _positions(q, tables[0], 2, rows)
    along = _positions(q, tables[1], 3, columns)
    scaled = q * q.shape[-1] ** -0.5
    queries = [scaled, down[..., :height], along[..., :width]]
    place = torch.arange(height * width, device=q.device)
    places = torch.cat([one_hot(place // width, height), one_hot(place % width, width)], 1).to(q.dtype)
    k, v = k.flatten(2, 3), v.flatten(2, 3)
    keys = torch.cat([k, places.expand(*k.shape[:2], -1, -1)], -1)
    if windows.padded:
        queries.append(_padding_logit(down, along, height, width).to(q.dtype))
        keys = nn.functional.pad(keys, (0, 1))
        lone = nn.functional.pad(padding[1], (0, height + width))
        lone = torch.cat([lone, lone.new_ones(len(lone), 1)], -1)  # (heads, c'): the one key for all padded ones
        keys = torch.cat([keys, lone[None, :, None].expand(keys.shape[0], -1, 1, -1)], 2)
        v = torch.cat([v, padding[2][None, :, None].expand(v.shape[0], -1, 1, -1)], 2)
    found = attend(torch.cat(queries, -1).flatten(2, 3), keys, v)
    return windows.joined(found.transpose(1, 2).flatten(2, 3))


def _padding_logit(
    down: Float[Tensor, "windows heads h w rows"],
    along: Float[Tensor, "windows heads h w columns"],
    height: int,
    width: int,
) -> Float[Tensor, "windows heads h w 1"]:
    """Log of the summed exponentials of the position terms of all padded keys."""
    down, along = down.float(), along.float()
    corner = _log_sum(down[..., :height]) + _log_sum(along[..., width:])  # existing rows, padded columns
    below = _log_sum(down[..., height:]) + _log_sum(along)
    return torch.logaddexp(corner, below)


def _log_sum(terms: Tensor) -> Tensor:
    """Of no terms, a logit too small to count (minus infinity has no gradient)."""
    return terms.logsumexp(-1, keepdim=True) if terms.shape[-1] else terms.new_full((*terms.shape[:-1], 1), -1e4)


def encoded(
    encoder: Any, pixels: Float[Tensor, "batch 3 height width"], *, checkpointing: bool = False
) -> Float[Tensor, "batch c h w"]:
    """What the package's `ImageEncoderViT` computes, of its own modules.

    Args:
        checkpointing: keep only each block's input for backward and compute the rest again: less memory, a third more
            time.
    """
    x = encoder.patch_embed(pixels)
    if encoder.pos_embed is not None:
        x = x + encoder.pos_embed
    for block in encoder.blocks:
        if checkpointing and torch.is_grad_enabled():
            x = checkpoint(block_forward, block, x, use_reentrant=False)
        else:
            x = block_forward(block, x)
    return encoder.neck(x.permute(0, 3, 1, 2))


def block_forward(block: Any, x: Float[Tensor, "batch rows columns dim"]) -> Float[Tensor, "batch rows columns dim"]:
    """What the package's `Block` computes, of its own modules."""
    attention = block.attn
    batch, rows, columns, dim = x.shape
    normed = block.norm1(x).flatten(0, 2)
    qkv = attention.qkv(torch.cat([normed, normed.new_zeros(1, dim)]))  # the last row: what padding becomes
    qkv = qkv.unflatten(1, (3, attention.num_heads, -1))
    padding, tokens = qkv[-1], qkv[:-1].unflatten(0, (batch, rows, columns))
    tables = (attention.rel_pos_h, attention.rel_pos_w)
    bands = windows_of(rows, columns, block.window_size)
    parts = [torch.cat([window_attention(tokens, padding, w, tables) for w in band], 2) for band in bands]
    x = x + attention.proj(torch.cat(parts, 1))
    return x + block.mlp(block.norm2(x))
