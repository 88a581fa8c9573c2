"""The encoder without waste answers what the package's own answers, and learns what it learns."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from surm_seg import backbones
from surm_seg.backbones import sam_encoder
from surm_seg.backbones.sam import modeling
from surm_seg.backbones.sam_encoder import encoded, windows_of

SIZES = [  # side in pixels, window: without padding, with padded edges, with one padded window, with global blocks only
    (128, 4),
    (144, 4),
    (320, 14),
    (96, 14),
    (96, 0),
]


def stock(side: int, window: int, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The package's encoder with relative positions that are not zero."""
    torch.manual_seed(0)
    encoder = modeling.ImageEncoderViT(
        img_size=side, embed_dim=24, depth=2, num_heads=3, out_chans=8, norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True, window_size=window, global_attn_indexes=(1,),
    )  # fmt: skip
    for name, parameter in encoder.named_parameters():
        nn.init.normal_(parameter, std=0.5 if "rel_pos" in name or "bias" in name else 0.2)
    return encoder.to(dtype)


def learnt(encoder: nn.Module, output: Tensor) -> dict[str, Tensor]:
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    parameters = dict(encoder.named_parameters())
    return dict(zip(parameters, torch.autograd.grad((output * weights).sum(), list(parameters.values())), strict=True))


@pytest.mark.parametrize(("side", "window"), SIZES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_output_and_gradients_are_those_of_the_package(side: int, window: int, checkpointing: bool) -> None:
    encoder, pixels = stock(side, window), torch.randn(2, 3, side, side, dtype=torch.float64)
    theirs, ours = encoder(pixels), encoded(encoder, pixels, checkpointing=checkpointing)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)  # the log of padded keys is taken in float32
    expected, found = learnt(encoder, theirs), learnt(encoder, ours)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5 * float(expected[name].abs().max()), rtol=0)


def test_in_float32_they_differ_by_rounding_only() -> None:
    encoder, pixels = stock(320, 14, torch.float32), torch.randn(1, 3, 320, 320)
    assert (encoded(encoder, pixels) - encoder(pixels)).abs().max() < 1e-5


def test_strong_positions_of_padding_do_not_overflow() -> None:
    """All attention goes to padded keys here: the log of their sum must stay finite and right."""
    encoder, pixels = stock(96, 14), torch.randn(1, 3, 96, 96, dtype=torch.float64)
    with torch.no_grad():
        for block in encoder.blocks:  # pyright: ignore[reportGeneralTypeIssues]
            block.attn.rel_pos_h *= 200
            block.attn.rel_pos_w *= 200
        torch.testing.assert_close(encoded(encoder, pixels), encoder(pixels), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("rows", "columns", "size"), [(32, 32, 14), (24, 24, 8), (9, 30, 14), (5, 7, 0)])
def test_windows_cover_every_token_once_and_come_back_in_place(rows: int, columns: int, size: int) -> None:
    tokens = torch.arange(2.0 * rows * columns * 3).view(2, rows, columns, 3)
    bands = windows_of(rows, columns, size)
    parts = [torch.cat([w.joined(w.cut(tokens).flatten(1, 2)) for w in band], 2) for band in bands]
    assert torch.equal(torch.cat(parts, 1), tokens)


def test_the_backbone_uses_it_under_the_packages_names() -> None:
    model = backbones.make("sam_tiny", checkpointing=True).build(2, 128, "auto")
    pixels = torch.randn(1, 3, 128, 128)
    assert model.image_encoder.checkpointing
    package = modeling.ImageEncoderViT.forward(model.image_encoder, pixels)
    assert (model.image_encoder(pixels) - package).abs().max() < 1e-5 * package.abs().max()


@pytest.mark.parametrize("group_bytes", [1, 5_000, 1 << 20])
def test_heads_in_groups_and_torchs_fused_kernel_give_the_same_attention(
    group_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and all three gradients are those of softmax(q k^T) v, whatever fits into a group."""
    monkeypatch.setattr(sam_encoder, "GROUP_BYTES", group_bytes)
    torch.manual_seed(0)
    shapes = ((2, 3, 7, 11), (2, 3, 9, 11), (2, 3, 9, 6))  # 7 queries and 9 keys of 11 channels, values of 6

    def with_gradients(form: Callable[[Tensor, Tensor, Tensor], Tensor]) -> list[Tensor]:
        torch.manual_seed(1)
        inputs = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]
        output = form(*inputs)
        return [output, *torch.autograd.grad(output.square().sum(), inputs)]

    expected = with_gradients(lambda q, k, v: (q @ k.mT).softmax(-1) @ v)
    for form in (sam_encoder.attend, sam_encoder.fused):
        torch.testing.assert_close(with_gradients(form), expected)
