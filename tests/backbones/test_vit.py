"""transformers' vision models behind the same contract."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from surm_seg import backbones
from surm_seg.backbones.vit import FAMILIES
from surm_seg.errors import BadConfig, BadInput

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
# DINOv2 states the width of its MLP as a ratio.
MLP = {"vit": {"intermediate_size": 64}, "clip_vision_model": {"intermediate_size": 64}, "dinov2": {"mlp_ratio": 2}}


@pytest.mark.parametrize("family", FAMILIES)
def test_random_models_of_every_family_take_deltas_and_give_logits(family: str) -> None:
    backbone = backbones.make("vit", family=family, **SMALL, **MLP[family])
    base = backbone.build(4, 64, "random")
    config = backbone.surm_config(base, structure="circulant", options={}, roles=("q", "v", "mlp_out"), decoder="full")
    model = peft.get_peft_model(base, config)  # pyright: ignore
    logits = model(torch.randn(2, 3, 64, 64))
    assert logits.shape == (2, 5, 16, 16)
    logits.square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    generators = [p for n, p in model.named_parameters() if "surm_" in n]
    assert sum(p.numel() for p in generators) == 2 * (32 + 32 + 64)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_folder_gives_the_same_encoder_at_another_size(family: str, tmp_path: Path) -> None:
    made: Any = backbones.make("vit", family=family, **SMALL, **MLP[family]).build(4, 64, "random")
    made.encoder.save_pretrained(tmp_path)
    again: Any = backbones.make("vit").build(4, 96, tmp_path)
    for name, value in made.encoder.state_dict().items():
        assert torch.equal(again.encoder.state_dict()[name], value)
    assert again(torch.randn(1, 3, 96, 96)).shape == (1, 5, 24, 24)


def test_what_cannot_work_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="no weights of its own"):
        backbones.make("vit").build(4, 64, "auto")
    with pytest.raises(BadConfig, match="no family 'resnet'"):
        backbones.make("vit", family="resnet")
    with pytest.raises(BadConfig, match=r"no field \['hidden_sise'\]"):
        backbones.make("vit", hidden_sise=64)
    with pytest.raises(BadConfig, match="not a multiple of 16"):
        backbones.make("vit", **SMALL).build(4, 70, "random")
    with pytest.raises(BadInput, match=r"no config\.json"):
        backbones.make("vit").build(4, 64, tmp_path)
    backbone = backbones.make("vit", **SMALL)
    base = backbone.build(4, 64, "random")
    with pytest.raises(BadConfig, match="--decoder full"):
        backbone.surm_config(base, structure="circulant", options={}, roles=("q",), decoder="frozen")
    with pytest.raises(BadConfig, match="no role 'x'"):
        backbone.surm_config(base, structure="circulant", options={}, roles=("x",), decoder="full")
    with pytest.raises(BadConfig, match="no backbone 'unet'"):
        backbones.make("unet")
