"""The PEFT bridge: what PEFT users do with any adapter works with ours, to the bit where it can."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import surm_seg.structures as family
from surm_seg import SurmConfig
from surm_seg.errors import BadConfig
from surm_seg.kernel import lost_in_rounding
from surm_seg.layers import SurmLayer, SurmLinear


class Net(nn.Module):
    """A fused qkv, an unfused Linear and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.mix = nn.Linear(48, 20)
        self.norm = nn.LayerNorm(20)
        self.head = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(torch.tanh(self.mix(torch.tanh(self.qkv(x))))))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


X = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))


def on_q_and_v(structure: str = "circulant", **rest: Any) -> SurmConfig:
    return SurmConfig(structure=structure, target_modules=["qkv"], parts=["q", "v"], **rest)


def train(model: Any, steps: int = 5) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("name", family.names())
def test_an_untrained_adapter_changes_nothing_and_a_trained_one_only_its_parts(net: Net, name: str) -> None:
    before = copy.deepcopy(net.state_dict())
    expected = net(X)
    model = peft.get_peft_model(net, on_q_and_v(name))  # pyright: ignore
    torch.testing.assert_close(model(X), expected)
    train(model)
    layer = model.base_model.model.qkv
    assert all(float((delta.structure.dense(delta.generators)).detach().norm()) > 1e-4 for delta in layer.deltas())
    assert [(d.start, d.stop) for d in layer.deltas()] == [(0, 16), (32, 48)]
    assert torch.equal(layer.base_layer.weight, before["qkv.weight"])
    assert torch.equal(layer(X)[:, 16:32], layer.base_layer(X)[:, 16:32])


@pytest.mark.parametrize("name", family.names())
def test_the_parameter_count_is_the_formula(net: Net, name: str) -> None:
    model = peft.get_peft_model(net, on_q_and_v(name))  # pyright: ignore
    assert model.get_nb_trainable_parameters()[0] == 2 * family.make(name, 16, 16).parameters


def test_saved_and_loaded_in_a_fresh_process_it_is_bit_equal(net: Net, tmp_path: Path) -> None:
    torch.save(net.state_dict(), tmp_path / "net.pt")
    for name in family.names():
        plain = copy.deepcopy(net)
        model = peft.get_peft_model(plain, on_q_and_v(name, scale=0.5, modules_to_save=["head"]))  # pyright: ignore
        train(model)
        model.eval().save_pretrained(str(tmp_path / name))
        torch.save(model(X), tmp_path / f"{name}.pt")
    code = f"""
import sys, torch; sys.path.insert(0, {str(Path(__file__).parent)!r})
import surm_seg, peft
from test_tuner import Net, X
for name in {family.names()!r}:
    net = Net(); net.load_state_dict(torch.load("net.pt"))
    model = peft.PeftModel.from_pretrained(net, name).eval()
    assert torch.equal(model(X), torch.load(f"{{name}}.pt")), name
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


@pytest.mark.parametrize("name", family.names())
def test_merged_agrees_and_unmerged_restores_every_bit(net: Net, name: str) -> None:
    model = peft.get_peft_model(net, on_q_and_v(name))  # pyright: ignore
    train(model)
    layer = model.base_model.model.qkv
    weight, expected = layer.base_layer.weight.clone(), model(X)
    model.merge_adapter(safe_merge=True)  # pyright: ignore
    torch.testing.assert_close(model(X), expected, rtol=0, atol=1e-6)
    model.train().eval()
    assert not torch.equal(layer.base_layer.weight, weight)
    model.unmerge_adapter()  # pyright: ignore
    assert torch.equal(layer.base_layer.weight, weight) and torch.equal(model(X), expected)
    plain = model.merge_and_unload()  # pyright: ignore
    assert type(plain.qkv) is nn.Linear and set(plain.state_dict()) == set(Net().state_dict())
    torch.testing.assert_close(plain(X), expected, rtol=0, atol=1e-6)


def test_adapters_switch_and_active_ones_add(net: Net) -> None:
    model = peft.get_peft_model(net, on_q_and_v(), "first")  # pyright: ignore
    train(model)
    model.add_adapter("second", on_q_and_v("low_rank"))
    model.set_adapter("second")
    train(model)
    layer = model.base_model.model.qkv
    base = layer.base_layer(X)
    changes = {}
    for adapter in ("first", "second"):
        model.set_adapter(adapter)
        changes[adapter] = layer(X) - base
        assert float(changes[adapter].detach().norm()) > 1e-3
    model.base_model.set_adapter(["first", "second"])
    torch.testing.assert_close(layer(X) - base, changes["first"] + changes["second"])
    with model.disable_adapter():
        assert torch.equal(layer(X), base)
    model.delete_adapter("second")
    torch.testing.assert_close(layer(X) - base, changes["first"])


def test_dropout_acts_on_the_delta_while_training_and_the_frozen_branch_sees_none(net: Net) -> None:
    model = peft.get_peft_model(net, on_q_and_v(dropout=0.5))  # pyright: ignore
    train(model)
    layer = model.base_model.model.qkv
    noisy = torch.stack([layer(X) for _ in range(400)])
    assert torch.equal(noisy[0][:, 16:32], layer.base_layer(X)[:, 16:32])
    model.eval()
    assert not torch.equal(noisy[0], noisy[1])
    delta = (layer(X) - layer.base_layer(X)).abs().mean()
    assert (noisy.mean(0) - layer(X)).abs().mean() < 0.2 * delta


def test_slices_named_in_the_config_travel_with_the_adapter(net: Net, tmp_path: Path) -> None:
    slices = {"mix": {"front": [0, 8], "back": [12, 20]}}
    config = SurmConfig(structure="circulant", target_modules=["mix"], slices=slices)
    untouched = copy.deepcopy(net)
    model = peft.get_peft_model(net, config)  # pyright: ignore
    train(model)
    assert [(d.start, d.stop) for d in model.base_model.model.mix.deltas()] == [(0, 8), (12, 20)]
    model.save_pretrained(str(tmp_path))
    again = peft.PeftModel.from_pretrained(untouched, str(tmp_path))
    assert torch.equal(again(X), model(X))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(target_modules=["mix"], parts=["q"]), r"mix \(48 -> 20\) has no known part \['q'\]"),
        (dict(target_modules=["qkv"], parts=["x"]), "no known part"),
        (dict(target_modules=["mix"], slices={"mix": {"q": [0, 21]}}), "outside its 20 outputs"),
        (dict(target_modules=["norm"]), "norm is a LayerNorm"),
        (dict(target_modules=["qkv"], structure="round"), "no structure 'round'"),
        (dict(target_modules=["qkv"], form="sideways"), "form 'sideways'"),
        (dict(target_modules=["qkv"], dropout=1.0), "not in"),
        (dict(target_modules=["qkv"], scale=0.0), "switch the delta off"),
    ],
)
def test_what_cannot_work_is_named(net: Net, config: dict, message: str) -> None:
    with pytest.raises(BadConfig, match=message):
        peft.get_peft_model(net, SurmConfig(**config))  # pyright: ignore


def test_zero_matches_are_an_error(net: Net) -> None:
    for config, message in (
        (SurmConfig(target_modules=["nothing"]), r"No module of Net is left to adapt by target_modules \['nothing'\]"),
        (SurmConfig(target_modules=["qkv"], exclude_modules=["qkv"]), r"'qkv'\] without \['qkv'\]"),
        (SurmConfig(), "neither target_modules nor parts"),
        (SurmConfig(parts=["out"]), "No Linear of Net is named like out"),
    ):
        with pytest.raises(BadConfig, match=message):
            peft.get_peft_model(net, config)  # pyright: ignore


def test_a_merge_that_is_not_finite_changes_nothing(net: Net) -> None:
    model = peft.get_peft_model(net, on_q_and_v())  # pyright: ignore
    layer = model.base_model.model.qkv
    weight = layer.base_layer.weight.clone()
    with torch.no_grad():
        layer.surm_generators["default"].q_c[0, 0, 0] = float("nan")
    with pytest.raises(BadConfig, match="not finite"):
        model.merge_adapter(safe_merge=True)  # pyright: ignore
    assert torch.equal(layer.base_layer.weight, weight)


def test_pefts_registries_still_take_a_foreign_tuner() -> None:
    """Fails loudly when PEFT changes what the bridge stands on."""
    from peft import mapping

    from surm_seg.tuner import SurmModel, SurmType

    assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING["SURM"] is SurmConfig  # pyright: ignore
    assert mapping.PEFT_TYPE_TO_TUNER_MAPPING[SurmType.SURM] is SurmModel  # pyright: ignore
    assert SurmConfig.from_peft_type(peft_type="SURM").structure == "circulant"


def test_adapters_per_sample_are_refused_instead_of_ignored(net: Net) -> None:
    model = peft.get_peft_model(net, on_q_and_v())  # pyright: ignore
    with pytest.raises(BadConfig, match="adapter_names"):
        model(X, adapter_names=["default"] * len(X))


def placed(model: Any) -> dict[str, tuple[str, dict[str, Any], float]]:
    """MODULE.PART -> structure, options and scale of the delta there."""
    return {
        f"{name.removeprefix('base_model.model.')}.{site.part}": (site.structure, site.options, site.scale)
        for name, layer in model.named_modules()
        if isinstance(layer, SurmLayer)
        for site, _, _ in layer.placed()
    }


def test_the_first_override_that_matches_replaces_structure_options_and_scale(net: Net, tmp_path: Path) -> None:
    overrides = {
        "qkv.q": {"scale": 0.5},
        "k": {"structure": "low_rank", "options": {"rank": 2}},
        "(?:qkv|mix)": {"structure": "toeplitz"},
    }
    base = {"options": {"block": 4}, "scale": 2.0, "overrides": overrides}
    slices = {"qkv": {"q": [0, 16], "k": [16, 32], "v": [32, 48]}}
    untouched = copy.deepcopy(net)
    model = peft.get_peft_model(net, SurmConfig(target_modules=["qkv", "mix"], slices=slices, **base))  # pyright: ignore
    assert placed(model) == {
        "qkv.q": ("circulant", {"block": 4}, 0.5),
        "qkv.k": ("low_rank", {"rank": 2}, 2.0),
        "qkv.v": ("toeplitz", {}, 2.0),
        "mix.all": ("toeplitz", {}, 2.0),
    }
    train(model)
    model.save_pretrained(str(tmp_path))
    again = peft.PeftModel.from_pretrained(untouched, str(tmp_path))
    assert placed(again) == placed(model) and torch.equal(again(X), model(X))


def test_none_leaves_a_part_alone_and_a_module_where_it_is(net: Net, tmp_path: Path) -> None:
    overrides = {"v": {"structure": "none"}, "^mix": {"structure": "none"}}
    slices = {"qkv": {"q": [0, 16], "v": [32, 48]}}
    untouched, mix = copy.deepcopy(net), net.mix
    model = peft.get_peft_model(net, SurmConfig(target_modules=["qkv", "mix"], slices=slices, overrides=overrides))
    assert set(placed(model)) == {"qkv.q"} and net.mix is mix
    train(model)
    model.save_pretrained(str(tmp_path))
    again = peft.PeftModel.from_pretrained(copy.deepcopy(untouched), str(tmp_path))
    assert placed(again) == placed(model) and torch.equal(again(X), model(X))
    merged = model.merge_and_unload()
    changed = (merged.qkv.weight != untouched.qkv.weight).any(1)
    assert changed[:16].all() and not changed[16:].any() and torch.equal(merged.mix.weight, untouched.mix.weight)


def test_overrides_mean_whole_names_or_their_endings() -> None:
    net = nn.ModuleDict(
        {"first": nn.ModuleDict({"mix": nn.Linear(4, 4)}), "mix": nn.Linear(4, 4), "remix": nn.Linear(4, 4)}
    )
    for key, chosen in {"mix": {"mix", "first.mix"}, "^mix": {"mix"}, r"first\..*": {"first.mix"}}.items():
        config = SurmConfig(target_modules=r".*mix", overrides={key: {"scale": 3}})
        found = placed(peft.get_peft_model(copy.deepcopy(net), config))  # pyright: ignore
        assert {name.removesuffix(".all") for name, (_, _, scale) in found.items() if scale == 3} == chosen


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"v": {"structure": "toeplitz"}, "z": {"scale": 2}},
            "override 'z' matches no adapted module or part; .* q, v in",
        ),
        ({"v": {"strukture": "toeplitz"}}, r"override 'v' sets \['strukture'\]"),
        ({"v": {"scale": 0}}, "switch the delta off"),
        ({"(v": {"scale": 2}}, "is no regular expression"),
        ({"v": {"structure": "round"}}, "no structure 'round'"),
        ({"v": {"structure": "none", "scale": 2}}, "override 'v' leaves its places alone"),
        ({"v": {"structure": "none"}, "z": {"structure": "none"}}, "override 'z' matches no adapted module or part"),
        ({"v": {"options": {"rank": 2}}}, "circulant has no option"),
    ],
)
def test_overrides_that_cannot_work_are_named(net: Net, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(BadConfig, match=message):
        peft.get_peft_model(net, on_q_and_v(overrides=overrides))  # pyright: ignore
    assert type(net.qkv) is nn.Linear


def test_thirds_of_fused_projections_follow_the_width_of_each(tmp_path: Path) -> None:
    """As in hierarchical transformers, whose stages differ in width."""
    net = nn.Sequential(nn.ModuleDict({"qkv": nn.Linear(4, 12)}), nn.ModuleDict({"qkv": nn.Linear(6, 18)}))
    model: Any = peft.get_peft_model(net, SurmConfig(parts=["q", "v"]))  # pyright: ignore
    spans = [[(d.start, d.stop) for d in m.deltas()] for m in model.modules() if isinstance(m, SurmLinear)]
    assert spans == [[(0, 4), (8, 12)], [(0, 6), (12, 18)]]


def test_an_adapter_saved_before_parts_had_names_still_loads(net: Net, tmp_path: Path) -> None:
    """Its whole modules had no entry in slices, and their generators were called all_..."""
    saved = SurmConfig(target_modules="(?:qkv)|(?:mix)", slices={"qkv": {"q": [0, 16]}}).to_dict()
    for field in ("overrides", "features"):
        del saved[field]
    (tmp_path / "adapter_config.json").write_text(json.dumps(saved))
    values = {"qkv.surm_generators.q_c": torch.ones(1, 1, 16), "mix.surm_generators.all_c": torch.ones(1, 3, 20)}
    save_file({f"base_model.model.{k}": v for k, v in values.items()}, tmp_path / "adapter_model.safetensors")
    model = peft.PeftModel.from_pretrained(net, str(tmp_path))
    assert all((p == 1).all() for name, p in model.named_parameters() if "surm_" in name)


@pytest.mark.parametrize(("size", "apart"), [(1e-4, True), (1e-1, False)])
def test_a_weight_stored_in_bfloat16_does_not_swallow_small_deltas(size: float, apart: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 64, bias=False)
    nn.init.normal_(layer.weight, std=0.02)
    net = nn.Sequential(layer).bfloat16()
    x = torch.randn(200, 64).bfloat16()
    frozen = net(x).float()
    model = peft.get_peft_model(net, SurmConfig(structure="circulant", target_modules=["0"]))  # pyright: ignore
    adapted = model.base_model.model[0]
    assert torch.equal(model(x).float(), frozen)
    with torch.no_grad():
        adapted.surm_generators["default"].all_c.normal_(std=size)
    [delta] = adapted.deltas()
    exact = x.float() @ (layer.weight.float() + delta.structure.dense(delta.generators)).T
    lost = lost_in_rounding(layer.weight, [delta])
    assert (lost > 0.2) is apart
    y = adapted.base_layer(x) + delta.structure.matvec(delta.generators, x)
    assert torch.equal(model(x), y) is apart
    assert (model(x).float() - exact).norm() < 0.01 * exact.norm()
    if apart:
        with pytest.warns(UserWarning, match="Merging into 0 loses"):
            model.merge_adapter()  # pyright: ignore


def test_quantised_layers_are_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    net[0].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(BadConfig, match="0 is quantised"):
        peft.get_peft_model(net, SurmConfig(target_modules=["0"]))  # pyright: ignore
