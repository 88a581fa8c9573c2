"""Keeping frozen weights in the format they are computed in changes no result."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipelines.loss import DiceCE
from pipelines.recipes import Config, adapted, base_model
from surm_seg import backbones
from surm_seg.precision import kept_precision, store_frozen


@pytest.mark.parametrize("decoder", ["full", "structured", "frozen"])
def test_frozen_weights_kept_in_bfloat16_change_no_bit_of_loss_and_gradient(decoder: Any) -> None:
    config = Config(image_size=64, decoder=decoder)
    backbone = backbones.make("sam_tiny")
    model = adapted(base_model(config, backbone, 8, 0), backbone, config).train()
    random = torch.Generator().manual_seed(0)
    image = torch.randn(2, 3, 64, 64, generator=random)
    label = torch.randint(0, 9, (2, 1, 16, 16), generator=random)
    trained = [p for p in model.parameters() if p.requires_grad]

    def measured() -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            loss = DiceCE(0.5)(model(image).float(), label)
        return [loss.detach(), *torch.autograd.grad(loss, trained)]

    before = measured()
    bytes_before = sum(p.numel() * p.element_size() for p in model.parameters())
    store_frozen(model, torch.bfloat16)
    assert sum(p.numel() * p.element_size() for p in model.parameters()) < 0.9 * bytes_before
    assert all(torch.equal(a, b) for a, b in zip(before, measured(), strict=True))


def test_runs_that_are_compared_keep_the_precision_of_the_first(tmp_path: Path) -> None:
    said = iter(("bfloat16", "float32", "float32"))
    kept = [kept_precision(tmp_path, words, lambda: next(said)) for words in (["--name", "a"], ["--name", "a"], ["b"])]
    assert kept == ["bfloat16", "bfloat16", "float32"]
