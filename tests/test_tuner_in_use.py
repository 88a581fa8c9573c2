"""What happens to adapted models in other people's code: casts, hooks, empty batches, several adapters, odd names."""

import math
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import surm_seg.structures as family
from surm_seg import SurmConfig
from surm_seg.errors import BadConfig


def adapted(net: nn.Module, **config: Any) -> Any:
    """Every Linear of the net adapted, with values that are not zero."""
    model: Any = peft.get_peft_model(net, SurmConfig(**{"target_modules": ["0", "2"], **config}))  # pyright: ignore
    filled(model)
    return model


def filled(model: Any) -> None:
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "surm_generators" in name:
                value.normal_(std=0.1)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", family.names())
def test_a_model_cast_to_bfloat16_with_its_adapter_still_trains(name: str) -> None:
    options = {"rank": 2} if name == "low_rank" else {"blocks": 2, "rank": 2} if name == "monarch" else {}
    model = adapted(net(), structure=name, options=options).bfloat16()
    model(X.bfloat16()).square().sum().backward()
    grads = [p.grad for n, p in model.named_parameters() if "surm_generators" in n]
    assert grads and all(g.dtype == torch.bfloat16 and g.isfinite().all() and g.norm() > 0 for g in grads)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("shape", [(8,), (0, 8), (2, 0, 8), (2, 3, 8)])
@pytest.mark.parametrize("name", family.names())
def test_any_batch_shape_goes_through(name: str, shape: tuple[int, ...], dropout: float) -> None:
    options = {"rank": 2} if name in ("low_rank", "monarch") else {}
    model = adapted(net(), structure=name, options=options, dropout=dropout)
    x = torch.randn(shape, requires_grad=True)
    y = model(x)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == shape


def test_what_the_frozen_module_does_besides_multiplying_is_kept() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    frozen = nn.Sequential(Doubled(8, 8), nn.Tanh(), nn.Linear(8, 8))
    seen: list[Tensor] = []
    frozen[2].register_forward_hook(lambda module, inputs, output: seen.append(output))
    expected = frozen(X)
    model: Any = peft.get_peft_model(frozen, SurmConfig(target_modules=["0", "2"]))  # pyright: ignore
    torch.testing.assert_close(model(X), expected)
    assert len(seen) == 2


def test_evaluating_in_inference_mode_leaves_training_possible() -> None:
    for name in ("circulant", "skew_circulant", "toeplitz"):
        model = adapted(net().bfloat16(), structure=name)
        with torch.no_grad():
            for n, p in model.named_parameters():
                if "surm_generators" in n:
                    p.mul_(1e-3)
        with torch.inference_mode():
            model(X.bfloat16())
        model(X.bfloat16()).square().sum().backward()


def test_unmerging_follows_a_cast() -> None:
    model = adapted(net())
    before = model.base_model.model[0].base_layer.weight.clone()
    model.merge_adapter()
    model.double()
    model.unmerge_adapter()
    assert torch.equal(model.base_model.model[0].base_layer.weight, before.double())
    assert model(X.double()).dtype == torch.float64


def test_one_adapters_dropout_is_not_anothers() -> None:
    model = adapted(net(), target_modules=["0"])
    model.add_adapter("noisy", SurmConfig(target_modules=["0"], dropout=0.9))
    model.base_model.set_adapter(["default", "noisy"])
    layer = model.base_model.model[0]
    quiet = layer(X)  # the second adapter's values are still zero, so that dropping its inputs changes nothing
    assert all(torch.allclose(layer(X), quiet) for _ in range(5))
    filled(model)
    assert not torch.allclose(layer(X), layer(X))


@pytest.mark.parametrize("unload", [False, True])
def test_a_safe_merge_checks_every_layer_before_it_writes_one(unload: bool) -> None:
    model = adapted(net())
    weights = [model.base_model.model[i].base_layer.weight.clone() for i in (0, 2)]
    with torch.no_grad():
        model.base_model.model[2].surm_generators["default"].all_c[0, 0, 0] = math.nan
    with pytest.raises(BadConfig, match="module 2 holds values that are not finite; nothing was merged"):
        model.merge_and_unload(safe_merge=True) if unload else model.merge_adapter(safe_merge=True)
    for i, weight in zip((0, 2), weights, strict=True):
        assert torch.equal(model.base_model.model[i].base_layer.weight, weight)


def test_layers_that_share_a_weight_are_not_merged() -> None:
    tied = net()
    tied[2].weight = tied[0].weight
    model = adapted(tied)
    with pytest.raises(BadConfig, match="0 and 2 share one weight"):
        model.merge_adapter()


def test_a_refused_configuration_leaves_what_is_trainable_trainable() -> None:
    frozen = net()
    with pytest.raises(BadConfig, match="matches no adapted module"):
        peft.get_peft_model(frozen, SurmConfig(target_modules=["0"], overrides={"nothing": {}}))  # pyright: ignore
    assert all(p.requires_grad for p in frozen.parameters()) and type(frozen[0]) is nn.Linear


def test_torchs_encoder_layer_is_refused_while_it_would_skip_its_linears() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.raises(BadConfig, match="set_fastpath_enabled"):
        peft.get_peft_model(layer, SurmConfig(target_modules=["linear1"]))  # pyright: ignore


@pytest.mark.parametrize("name", ["a.b", "keys", "values", "type"])
def test_names_that_modules_cannot_hold_are_refused(name: str) -> None:
    with pytest.raises(BadConfig, match="cannot be called"):
        peft.get_peft_model(net(), SurmConfig(target_modules=["0"]), adapter_name=name)  # pyright: ignore


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(structure="low_rank", options={"rank": 9}), r"Module 0, part all: low_rank rank 9"),
        (dict(options={"block": 4.0}), "block 4.0 is not a whole number"),
        (dict(structure="kronecker", options={"factors": [4]}), r"factors \[4\]"),
        (dict(slices={"[": {"q": [0, 4]}}), "no regular expression"),
        (dict(slices={"0": {"q": [4]}}), "not \\[first, end\\)"),
        (dict(slices={"0": {"a.b": [0, 4]}}), "under a plain name"),
        (dict(parts=[]), "parts is empty"),
        (dict(scale=math.nan), "scale nan"),
    ],
)
def test_mistakes_are_named(config: dict, message: str) -> None:
    with pytest.raises(BadConfig, match=message):
        peft.get_peft_model(net(), SurmConfig(**{"target_modules": ["0"], **config}))  # pyright: ignore
