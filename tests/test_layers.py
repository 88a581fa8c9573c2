"""The forms of an adapter beside the delta: what they compute, how they live together, and what they refuse."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import surm_seg.structures as structures
from surm_seg import SurmConfig
from surm_seg.errors import BadConfig, BadInput

D = 12


class Pair(nn.Module):
    """A module without parameters that answers with a tuple, as attention does."""

    def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor, str]:
        return scale * torch.tanh(x), "beside"


class Block(nn.Module):
    """Modules of several kinds: a layer norm, a Linear, a tuple, and a convolution over (batch, channels, tokens)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.mix = nn.Linear(D, D)
        self.pair = Pair()
        self.conv = nn.Conv1d(D, D, 1)

    def forward(self, x: Tensor) -> Tensor:
        y, beside = self.pair(self.mix(self.norm(x)), scale=2.0)
        assert beside == "beside"
        return x + self.conv(y.mT).mT


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


X = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(1))
FORMS: dict[str, dict[str, Any]] = {
    "delta": {"target_modules": ["mix"]},
    "bias": {"form": "bias", "target_modules": ["norm", "mix", "conv"]},
    "adapter": {"form": "adapter", "target_modules": ["norm", "mix", "pair"], "features": D},
    "bottleneck": {"form": "bottleneck", "target_modules": ["mix", "pair"], "features": D, "options": {"width": 4}},
}
COUNTS = {"delta": 2 * D, "bias": 2 * 3 * D, "adapter": 6 * 2 * D, "bottleneck": 4 * (2 * 4 * D + 4 + D)}
AFTER = ("adapter", "bottleneck")


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def adapt(net: nn.Module, form: str, name: str = "default", **rest: Any) -> Any:
    return peft.get_peft_model(net, SurmConfig(**{**FORMS[form], **rest}), name)  # pyright: ignore


def randomise(model: nn.Module, adapter: str = "default") -> None:
    """Other values than those of the start, without a training that might not reach every one."""
    generator = torch.Generator().manual_seed(len(adapter))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if f".{adapter}." in name and "surm_" in name:
                value.normal_(std=0.3, generator=generator)


def inside(model: Any) -> Any:
    return model.base_model.model


@pytest.mark.parametrize("form", FORMS)
def test_an_untrained_adapter_changes_nothing_and_every_value_of_it_learns(net: Net, form: str) -> None:
    expected = net(X)
    model = adapt(net, form)
    assert torch.equal(model(X), expected)
    assert model.get_nb_trainable_parameters()[0] == COUNTS[form]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "surm_" in name}


@pytest.mark.parametrize("name", structures.names())
def test_the_structured_adapter_is_x_plus_gelu_of_s_x_plus_b(net: Net, name: str) -> None:
    model = adapt(net, "adapter", structure=name, scale=0.5)
    randomise(model)
    for layer, x in ((inside(model).blocks[0].mix, X), (inside(model).blocks[0].pair, X)):
        ((site, update, values),) = layer.placed()
        assert site.part == "all"
        y = layer.base_layer(x)
        first = y if isinstance(y, Tensor) else y[0]
        S = update.structure.dense({n: values[n] for n in update.structure.generators})
        expected = first + 0.5 * (nn.functional.gelu(first @ S.mT) + values["bias"])
        found = layer(x)
        torch.testing.assert_close(found if isinstance(y, Tensor) else found[0], expected, rtol=1e-4, atol=1e-5)
        assert isinstance(y, Tensor) or found[1:] == y[1:]


def test_the_bottleneck_is_houlsbys(net: Net) -> None:
    model = adapt(net, "bottleneck")
    randomise(model)
    layer = inside(model).blocks[1].mix
    _, _, values = layer.placed()[0]
    y = layer.base_layer(X)
    hidden = nn.functional.gelu(y @ values["down"].mT + values["down_bias"])
    torch.testing.assert_close(layer(X), y + hidden @ values["up"].mT + values["up_bias"])


@pytest.mark.parametrize("form", FORMS)
def test_several_adapters_add_switch_and_go(net: Net, form: str) -> None:
    model = adapt(net, form, "first")
    model.add_adapter("second", SurmConfig(**FORMS[form]))
    randomise(model, "first")
    randomise(model, "second")
    layer = inside(model).blocks[0].mix
    base = layer.base_layer(X)
    changes = {}
    for adapter in ("first", "second"):
        model.set_adapter(adapter)
        changes[adapter] = layer(X) - base
        assert changes[adapter].abs().max() > 1e-2
    model.base_model.set_adapter(["first", "second"])
    torch.testing.assert_close(layer(X) - base, changes["first"] + changes["second"], rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(layer(X), base)
    model.delete_adapter("second")
    torch.testing.assert_close(layer(X) - base, changes["first"])
    model.delete_adapter("first")
    assert torch.equal(layer(X), base)


@pytest.mark.parametrize("form", FORMS)
def test_unloading_gives_the_original_modules_back(net: Net, form: str) -> None:
    modules, expected = dict(net.named_modules()), net(X)
    model = adapt(net, form)
    randomise(model)
    assert not torch.equal(model(X), expected)
    plain = model.unload()
    found = dict(plain.named_modules())
    assert list(found) == list(modules) and all(found[name] is modules[name] for name in modules)
    assert torch.equal(plain(X), expected)


@pytest.mark.parametrize("form", AFTER)
def test_what_stands_after_a_module_is_not_merged(net: Net, form: str) -> None:
    model = adapt(net, form)
    randomise(model)
    before, expected = copy.deepcopy(model.state_dict()), model(X)
    for merge in (model.merge_adapter, model.merge_and_unload, inside(model).blocks[0].mix.merge):
        with pytest.raises(BadConfig, match=r"module blocks\.0\.\w+ cannot be merged") as caught:
            merge()
        assert caught.value.code == "adapter-merge"
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(model(X), expected)


def test_a_shifted_bias_merges_exactly_and_comes_back(net: Net) -> None:
    original = copy.deepcopy(net.state_dict())
    model = adapt(net, "bias")
    randomise(model)
    expected = model(X)
    model.merge_adapter(safe_merge=True)
    assert torch.equal(model(X), expected)
    assert not torch.equal(inside(model).blocks[0].conv.base_layer.bias, original["blocks.0.conv.bias"])
    model.unmerge_adapter()
    assert torch.equal(model(X), expected)
    frozen = {
        name.replace(".base_layer", ""): v for name, v in inside(model).state_dict().items() if "surm" not in name
    }
    assert all(torch.equal(frozen[name], value) for name, value in original.items())
    plain = model.merge_and_unload()
    assert type(plain.blocks[0].conv) is nn.Conv1d and torch.equal(plain(X), expected)


def test_forms_share_a_model_but_not_a_module(net: Net) -> None:
    model = adapt(net, "delta", "delta")
    model.add_adapter("shift", SurmConfig(form="bias", target_modules=["norm", "conv"]))
    model.add_adapter("after", SurmConfig(form="adapter", target_modules=["pair"], features=D))
    for adapter in ("delta", "shift", "after"):
        randomise(model, adapter)
    model.base_model.set_adapter(["delta", "shift", "after"])
    block = inside(model).blocks[0]
    types = [type(m).__name__ for m in (block.norm, block.mix, block.pair, block.conv)]
    assert types == ["SurmBias", "SurmLinear", "SurmAdapter", "SurmBias"]
    state, expected = copy.deepcopy(model.state_dict()), model(X)
    with pytest.raises(BadConfig, match=r"Module blocks\.0\.mix already has an adapter of another form than 'adapter'"):
        model.add_adapter("clash", SurmConfig(form="adapter", target_modules=["pair", "mix"], features=D))
    assert list(model.peft_config) == ["delta", "shift", "after"]
    assert list(model.state_dict()) == list(state) and torch.equal(model(X), expected)
    with pytest.raises(BadConfig, match="cannot be merged"):
        model.merge_adapter()
    model.merge_adapter(["delta", "shift"])
    model.unmerge_adapter()
    model.delete_adapter("delta")
    model.add_adapter("instead", SurmConfig(form="adapter", target_modules=["mix"]))
    assert type(block.mix).__name__ == "SurmAdapter"


def test_an_adapter_after_a_block_surrounds_the_deltas_inside_it(net: Net, tmp_path: Path) -> None:
    untouched, expected = copy.deepcopy(net), net(X)
    everywhere = SurmConfig(form="adapter", target_modules=r"blocks\.\d+(?:\.mix)?", features=D)
    model: Any = peft.get_peft_model(net, everywhere)  # pyright: ignore
    randomise(model)
    model.save_pretrained(str(tmp_path))
    again = peft.PeftModel.from_pretrained(copy.deepcopy(untouched), str(tmp_path))
    assert torch.equal(again(X), model(X))
    assert torch.equal(model.unload()(X), expected) and list(net.state_dict()) == list(untouched.state_dict())

    model = adapt(net, "delta", "inner")
    after = SurmConfig(form="adapter", target_modules=r"blocks\.\d+", features=D)
    model.add_adapter("outer", after)
    randomise(model, "inner")
    model.base_model.set_adapter(["inner", "outer"])
    assert not torch.equal(model(X), expected)
    assert torch.equal(model.unload()(X), expected) and list(net.state_dict()) == list(untouched.state_dict())

    model = peft.get_peft_model(net, after)  # pyright: ignore
    with pytest.raises(BadConfig, match=r"Module blocks\.0\.mix lies inside blocks\.0"):
        model.add_adapter("inner", SurmConfig(target_modules=["mix"]))


def test_saved_and_loaded_in_a_fresh_process_they_are_bit_equal(net: Net, tmp_path: Path) -> None:
    torch.save(net.state_dict(), tmp_path / "net.pt")
    for form in FORMS:
        model = adapt(copy.deepcopy(net), form)
        randomise(model)
        model.save_pretrained(str(tmp_path / form))
        torch.save(model(X), tmp_path / form / "expected.pt")
    code = f"""
import sys, torch; sys.path.insert(0, {str(Path(__file__).parent)!r})
import surm_seg, peft
from test_layers import FORMS, Net, X
for form in FORMS:
    net = Net(); net.load_state_dict(torch.load("net.pt"))
    assert torch.equal(peft.PeftModel.from_pretrained(net, form)(X), torch.load(form + "/expected.pt"))
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_bfloat16_model_keeps_float32_adapters_to_the_bit(net: Net, tmp_path: Path, low_cpu_mem_usage: bool) -> None:
    net = net.bfloat16()
    for form in FORMS:
        model = adapt(copy.deepcopy(net), form)
        randomise(model)
        model.save_pretrained(str(tmp_path / form))
        again = peft.PeftModel.from_pretrained(
            copy.deepcopy(net), str(tmp_path / form), low_cpu_mem_usage=low_cpu_mem_usage
        )
        values = {name: p for name, p in again.named_parameters() if "surm_" in name}
        assert all(p.dtype == torch.float32 for p in values.values())
        assert all(torch.equal(p, values[name]) for name, p in model.named_parameters() if name in values)
        x = X.bfloat16()
        assert torch.equal(again(x), model(x)) and model(x).dtype == torch.bfloat16


def test_dropout_acts_on_the_update_while_training(net: Net) -> None:
    model = adapt(net, "adapter", dropout=0.5)
    randomise(model)
    layer = inside(model).blocks[0].mix
    assert torch.equal(layer(X), layer(X))
    layer.train()
    assert not torch.equal(layer(X), layer(X))


def test_a_wrapped_module_shows_the_attributes_of_its_own(net: Net) -> None:
    block = inside(adapt(net, "adapter")).blocks[0]
    assert block.mix.in_features == D and block.norm.eps == 1e-5 and "in_features=12" in repr(block)
    with pytest.raises(AttributeError, match=r"Pair.*no_such_thing"):
        _ = block.pair.no_such_thing


class Dictionary(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"x": x}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"form": "adapter", "target_modules": ["conv"]}, r"blocks\.0\.conv is a Conv1d, .* set SurmConfig\.features"),
        ({"form": "bias", "target_modules": ["pair"]}, r"blocks\.0\.pair is a Pair without a bias"),
        ({"form": "bias", "target_modules": ["mix"], "dropout": 0.5}, "bias.* neither options nor dropout"),
        ({"form": "bottleneck", "target_modules": ["mix"], "options": {"rank": 2}}, "no option .'rank'"),
        ({"form": "bottleneck", "target_modules": ["mix"], "options": {"width": 0}}, "width 0"),
        ({"form": "adapter", "target_modules": ["mix"], "structure": "round"}, "no structure 'round'"),
        (
            {"form": "adapter", "target_modules": ["mix"], "slices": {".*": {"a": [0, 6]}}},
            "Part a is a slice of module",
        ),
        ({"target_modules": r"blocks\.0\.mix|blocks\.1\.norm"}, "blocks.1.norm is a LayerNorm"),
    ],
)
def test_what_cannot_work_is_named_and_leaves_the_model_alone(net: Net, config: dict[str, Any], message: str) -> None:
    modules = dict(net.named_modules())
    with pytest.raises(BadConfig, match=message):
        peft.get_peft_model(net, SurmConfig(**config))  # pyright: ignore
    found = dict(net.named_modules())
    assert list(found) == list(modules) and all(found[name] is modules[name] for name in modules)


def test_outputs_of_another_size_or_kind_are_named(net: Net) -> None:
    model = adapt(net, "adapter", target_modules=["pair"], features=D + 1)
    with pytest.raises(BadConfig, match=rf"Module blocks\.0\.pair returns \(2, 5, {D}\).*\(\.\.\., {D + 1}\)"):
        model(X)
    plain = nn.Sequential(Dictionary())
    model = adapt(plain, "adapter", target_modules=["0"])
    with pytest.raises(BadConfig, match="Module 0 returns dict"):
        model(X)


def test_the_projection_that_attention_reads_without_calling_is_refused() -> None:
    net = nn.Sequential(nn.MultiheadAttention(D, 2))
    with pytest.raises(BadConfig, match=r"Module 0\.out_proj is never called"):
        peft.get_peft_model(net, SurmConfig(target_modules=["out_proj"]))  # pyright: ignore


@pytest.mark.parametrize("form", FORMS)
def test_damaged_values_are_refused_before_they_are_loaded(net: Net, form: str) -> None:
    model = adapt(net, form)
    randomise(model)
    state = copy.deepcopy(model.state_dict())
    key = next(name for name in state if "surm_" in name and ".mix." in name)
    wrong = {"adapter-not-finite": torch.full_like(state[key], torch.nan), "adapter-shape": torch.zeros(1)}
    for code, value in wrong.items():
        with pytest.raises(BadInput, match=re.escape("of module blocks.0.mix")) as caught:
            model.load_state_dict({**state, key: value}, strict=False)
        assert caught.value.code == code
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    rest = {name: value for name, value in state.items() if name != key}
    assert model.load_state_dict(rest, strict=False).missing_keys == [key]
