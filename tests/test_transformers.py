"""Adapters by role in the models of transformers, and in Meta's image encoder, which nobody has to describe first."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from surm_seg import SurmConfig
from surm_seg.backbones import sam
from surm_seg.errors import BadConfig, BadInput

D, LAYERS = 32, 2
SIZE = {"hidden_size": D, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
MLP = {**SIZE, "intermediate_size": 64}
PIXELS = {"image_size": 32, "patch_size": 16}
WORDS = {**MLP, "vocab_size": 50}
FAMILIES: dict[str, Callable[[], Any]] = {
    "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**MLP, **PIXELS)),
    "clip": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**MLP, **PIXELS)),
    "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SIZE, **PIXELS, mlp_ratio=2)),
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**WORDS)),
    "roberta": lambda: transformers.RobertaModel(transformers.RobertaConfig(**WORDS)),
    "llama": lambda: transformers.LlamaModel(transformers.LlamaConfig(**WORDS)),
}
FORMS: dict[str, dict[str, Any]] = {
    "delta": {"parts": ["q", "v"]},
    "adapter": {"form": "adapter", "parts": ["out", "mlp_out"]},
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """A second thread would only wait for models this small, and for long where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def build(family: str) -> Any:
    torch.manual_seed(0)
    return FAMILIES[family]().eval()


def answer(model: nn.Module, family: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if family in ("vit", "clip", "dinov2"):
        return model(torch.randn(2, 3, 32, 32, generator=generator)).last_hidden_state
    return model(torch.randint(2, 50, (2, 7), generator=generator)).last_hidden_state


def train(model: nn.Module, forward: Callable[[], Tensor]) -> None:
    target = torch.randn(forward().shape, generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (forward() - target).square().sum().backward()
        optimizer.step()


def sites(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


@pytest.mark.parametrize("form", FORMS)
def test_roles_find_their_modules_and_train_save_load_and_merge(family: str, form: str, tmp_path: Path) -> None:
    base = build(family)
    untouched, expected = copy.deepcopy(base), answer(base, family)
    model: Any = peft.get_peft_model(base, SurmConfig(**FORMS[form]))
    per_site = D if form == "delta" else 2 * D
    assert model.get_nb_trainable_parameters()[0] == LAYERS * 2 * per_site
    assert torch.equal(answer(model, family), expected)
    train(model, lambda: answer(model, family))
    assert len(sites(model)) == LAYERS * 2
    moved = [p.detach().norm() for name, p in model.named_parameters() if "surm_" in name]
    assert all(norm > 1e-4 for norm in moved)
    frozen = {name.replace(".base_layer", ""): p for name, p in base.named_parameters() if "surm_" not in name}
    assert all(torch.equal(frozen[name], p) for name, p in untouched.named_parameters())
    keys = [m for name, m in base.named_modules() if name.endswith(("k_proj", "key"))]
    assert len(keys) == LAYERS and all(type(m) is nn.Linear for m in keys)

    model.save_pretrained(str(tmp_path))
    again: Any = peft.PeftModel.from_pretrained(copy.deepcopy(untouched), str(tmp_path))
    trained = answer(model, family)
    assert torch.equal(answer(again, family), trained) and not torch.allclose(trained, expected, atol=1e-4)
    if form == "delta":
        plain = model.merge_and_unload()
        torch.testing.assert_close(answer(plain, family), trained, rtol=1e-4, atol=1e-5)
    else:
        with pytest.raises(BadConfig, match=r"module .*(o_proj|out_proj|dense|fc2|down_proj) cannot be merged"):
            model.merge_and_unload()
        plain = model.unload()
        assert torch.equal(answer(plain, family), expected)
    assert set(plain.state_dict()) == set(untouched.state_dict()) and not sites(plain)


def test_berts_two_output_layers_are_told_apart() -> None:
    names = {}
    for role in ("out", "mlp_in", "mlp_out"):
        model = peft.get_peft_model(build("bert"), SurmConfig(parts=[role]))
        names[role] = [name.removeprefix("base_model.model.encoder.layer.") for name in sites(model)]
    assert names == {
        "out": ["0.attention.output.dense", "1.attention.output.dense"],
        "mlp_in": ["0.intermediate.dense", "1.intermediate.dense"],
        "mlp_out": ["0.output.dense", "1.output.dense"],
    }


def test_a_role_that_a_model_does_not_have_is_named() -> None:
    config = transformers.GPT2Config(n_embd=D, n_layer=1, n_head=2, vocab_size=50)
    with pytest.raises(BadConfig, match="No Linear of GPT2Model is named like q or v"):
        peft.get_peft_model(transformers.GPT2Model(config), SurmConfig(parts=["q", "v"]))
    with pytest.raises(BadConfig, match=r"no role \['x'\]; choose among q, k, v, out, mlp_in, mlp_out"):
        peft.get_peft_model(build("vit"), SurmConfig(parts=["q", "x"]))


def test_the_asked_configuration_stays_usable_for_another_model() -> None:
    config = SurmConfig(parts=["q", "v"])
    for family in ("bert", "llama"):
        assert len(sites(peft.get_peft_model(build(family), config))) == LAYERS * 2
    assert config.target_modules is None and config.slices == {}


def test_a_second_adapter_finds_the_roles_under_the_first(family: str) -> None:
    model = peft.get_peft_model(build(family), SurmConfig(parts=["q", "v"]), "first")
    model.add_adapter("second", SurmConfig(parts=["q", "mlp_in"], structure="toeplitz"))
    held = {name.rsplit(".", 1)[1]: sorted(layer.surm_generators) for name, layer in sites(model).items()}
    assert held.pop("query" if "query" in held else "q_proj") == ["first", "second"]
    assert held.pop("value" if "value" in held else "v_proj") == ["first"]
    assert set(map(tuple, held.values())) == {("second",)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["vit", "bert", "llama"])
def test_transformers_own_adapter_methods(name: str, form: str, tmp_path: Path) -> None:
    model = build(name)
    untouched, expected = copy.deepcopy(model), answer(model, name)
    model.add_adapter(SurmConfig(**FORMS[form]), "mine")
    assert torch.equal(answer(model, name), expected)
    train(model, lambda: answer(model, name))
    trained = answer(model, name)
    model.save_pretrained(tmp_path)
    report = untouched.load_adapter(str(tmp_path), "loaded")
    assert not report.missing_keys and not report.unexpected_keys
    assert torch.equal(answer(untouched, name), trained)
    untouched.disable_adapters()
    assert torch.equal(answer(untouched, name), expected)
    untouched.enable_adapters()
    untouched.delete_adapter("loaded")
    assert torch.equal(answer(untouched, name), expected)


@pytest.mark.parametrize("way", ["peft", "peft, as a second adapter", "transformers"])
@pytest.mark.parametrize("damage", ["nan", "infinity", "shape"])
def test_a_damaged_adapter_is_refused_naming_the_module(way: str, damage: str, tmp_path: Path) -> None:
    peft.get_peft_model(build("bert"), SurmConfig(parts=["q"])).save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    key = next(name for name in state if "layer.1" in name)
    state[key] = torch.zeros(1, 1, D - 1) if damage == "shape" else torch.full((1, 1, D), float(damage))
    save_file(state, file, {"format": "pt"})
    model = build("bert")
    if way == "peft, as a second adapter":
        model = peft.get_peft_model(model, SurmConfig(parts=["q"]), "first")
        expected = answer(model, "bert")
    # transformers compares shapes itself and says so in a table.
    wanted = RuntimeError if (way, damage) == ("transformers", "shape") else BadInput
    place = r"q_c of module encoder\.layer\.1\.attention\.self\.query"
    with pytest.raises(wanted, match="mismatched_sizes" if wanted is RuntimeError else place) as caught:
        if way == "peft":
            peft.PeftModel.from_pretrained(model, str(tmp_path))
        else:
            model.load_adapter(str(tmp_path), "second")
    if isinstance(caught.value, BadInput):
        assert caught.value.code == ("adapter-shape" if damage == "shape" else "adapter-not-finite")
    if way == "peft, as a second adapter":
        assert torch.equal(answer(model, "bert"), expected)


def test_metas_image_encoder_by_slices_of_qkv_and_by_adapters_after_its_blocks(tmp_path: Path) -> None:
    def encoder() -> nn.Module:
        torch.manual_seed(0)
        return sam.modeling.ImageEncoderViT(
            img_size=64, embed_dim=D, depth=LAYERS, num_heads=2, out_chans=16, window_size=2, global_attn_indexes=(1,)
        ).eval()

    pixels = torch.randn(1, 3, 64, 64)
    expected = encoder()(pixels)
    configs = {
        LAYERS * 2 * D: SurmConfig(parts=["q", "v"]),
        LAYERS * (D + D): SurmConfig(form="adapter", target_modules=r"blocks\.\d+", features=D),
    }
    for count, config in configs.items():
        model: Any = peft.get_peft_model(encoder(), config)
        assert model.get_nb_trainable_parameters()[0] == count
        assert torch.equal(model(pixels), expected)
        train(model, lambda model=model: model(pixels))
        assert all(p.detach().norm() > 1e-4 for name, p in model.named_parameters() if "surm_" in name)
        model.save_pretrained(str(tmp_path))
        again = peft.PeftModel.from_pretrained(encoder(), str(tmp_path))
        assert torch.equal(again(pixels), model(pixels))
        assert torch.equal(model.unload()(pixels), expected)
    with pytest.raises(BadConfig, match=r"Module blocks\.0 is a Block.*set SurmConfig\.features"):
        peft.get_peft_model(encoder(), SurmConfig(form="adapter", target_modules=r"blocks\.\d+"))
    with pytest.raises(BadConfig, match=r"Part q is a slice of module blocks\.0\.attn\.qkv"):
        peft.get_peft_model(encoder(), SurmConfig(form="adapter", parts=["q"]))


N = 768
PUBLISHED = {
    "circulant on q, k, v": (27_648, {"parts": ["q", "k", "v"]}),
    "circulant on q, v": (18_432, {"parts": ["q", "v"]}),
    "LoRA": (147_456, {"parts": ["q", "v"], "structure": "low_rank", "options": {"rank": 4}}),
    "circulant adapters": (24 * N + 24 * N, FORMS["adapter"]),
    "toeplitz adapters": (24 * (2 * N - 1) + 24 * N, {**FORMS["adapter"], "structure": "toeplitz"}),
    "Houlsby": (24 * (2 * 64 * N + 64 + N), {**FORMS["adapter"], "form": "bottleneck"}),
}


@pytest.mark.parametrize("method", PUBLISHED)
def test_parameter_counts_are_the_published_ones(method: str) -> None:
    count, config = PUBLISHED[method]
    with torch.device("meta"):
        base = transformers.BertModel(transformers.BertConfig())
    assert peft.get_peft_model(base, SurmConfig(**config)).get_nb_trainable_parameters()[0] == count
