"""Low rank against the singular value decomposition and PEFT's own LoRA."""

import peft
import pytest
import torch
from torch import nn

from surm_seg.errors import BadConfig
from surm_seg.structures import make


@pytest.mark.parametrize("rslora", [False, True])
def test_equals_lora_as_peft_computes_it(rslora: bool) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=6, use_rslora=rslora, target_modules=["0"])
    layer = peft.get_peft_model(nn.Sequential(nn.Linear(10, 12)), config).base_model.model[0]  # pyright: ignore
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    nn.init.normal_(B)
    structure = make("low_rank", 12, 10, rank=4, alpha=6, rslora=rslora)
    torch.testing.assert_close(structure.dense({"A": A, "B": B}), layer.get_delta_weight("default"))


def test_projection_is_the_truncated_svd() -> None:
    matrix = torch.randn(9, 7, dtype=torch.float64)
    structure = make("low_rank", 9, 7, rank=2, alpha=3)
    _, S, _ = torch.linalg.svd(matrix)
    error = (matrix - structure.dense(structure.project(matrix))).norm()
    assert float(error) == pytest.approx(float(S[2:].norm()))


def test_the_count_of_the_papers() -> None:
    assert 24 * make("low_rank", 768, 768, rank=4).parameters == 147_456


@pytest.mark.parametrize("options", [{"rank": 0}, {"rank": 5}, {"rank": 2, "alpha": 0}])
def test_impossible_options_are_refused(options: dict) -> None:
    with pytest.raises(BadConfig):
        make("low_rank", 4, 8, **options)
