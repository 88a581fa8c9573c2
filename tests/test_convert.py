"""The convert command, as users meet it: adapters that PEFT saved go in, adapters that PEFT loads come out."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import scipy.linalg
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import RobertaConfig, RobertaForSequenceClassification

from surm_seg import convert
from surm_seg.errors import BadConfig
from surm_seg.structures.toeplitz import Toeplitz

Tensors = dict[str, Tensor]

TOKENS = torch.arange(3, 19).reshape(2, 8)
LAYER = "roberta.encoder.layer.0.attention.self.query"
KEY = f"base_model.model.{LAYER}"
QUERY_AND_VALUE = [f"roberta.encoder.layer.{n}.attention.self.{name}" for n in (0, 1) for name in ("query", "value")]


@pytest.fixture(scope="module")
def roberta() -> nn.Module:
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=40)
    return RobertaForSequenceClassification(RobertaConfig(**sizes, num_labels=3)).eval()


def save_lora(base: nn.Module, folder: Path, **config: Any) -> Tensor:
    """Save a LoRA with random factors, and a head of its own; returns the merged model's logits."""
    torch.manual_seed(1)
    settings = dict(task_type="SEQ_CLS", r=4, lora_alpha=6, target_modules=["query", "value"], init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**(settings | config)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(str(folder))
    return logits(model.merge_and_unload())


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def loaded(base: nn.Module, folder: Path) -> nn.Module:
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()


def run(adapter: Path, family: str, *options: str) -> int:
    return convert.main([str(adapter), "--to", family, "--device", "cpu", *options])


def rows(out: str) -> dict[str, list[str]]:
    """The printed table: module, `parameters` or `mean` -> cells."""
    return {
        cells[0]: cells[1:] for line in out.splitlines() if re.search(r"  \S*\d$", line) and (cells := line.split())
    }


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"query": 2}, "alpha_pattern": {r"1\.attention\.self\.value": 32}},
        {"rank_pattern": {"layer.0.*query": 3}, "use_rslora": True},
        {"target_modules": r".*layer\.1.*\.(key|value)"},
        {"layers_to_transform": [1], "exclude_modules": ["value"]},
        {"target_modules": "all-linear", "exclude_modules": ["key"]},
        {"target_modules": ["intermediate.dense", "layer.0.output.dense"]},
    ],
)
def test_low_rank_with_room_enough_is_the_lora(
    roberta: nn.Module, tmp_path: Path, config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    expected = save_lora(roberta, tmp_path / "lora", **config)
    assert run(tmp_path / "lora", "low_rank", "--budget", "1000000") == 0
    model = loaded(roberta, tmp_path / "lora-low_rank")
    assert (expected - logits(roberta)).abs().max() > 0.01
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    adapted = {name.partition(".surm_generators")[0] for name in model.state_dict() if "surm_generators" in name}
    assert adapted == {f"base_model.model.{module}" for module in convert.read_lora(tmp_path / "lora").factors}
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=0, atol=1e-5)
    out = capsys.readouterr().out
    assert "low_rank keeps 100 % of the deltas' energy." in out and "bad fit" not in out
    assert "import surm_seg" in out and f"from_pretrained(model, '{tmp_path / 'lora-low_rank'}')" in out


def test_the_default_budget_is_the_loras_own(
    roberta: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = save_lora(roberta, tmp_path / "lora")
    assert run(tmp_path / "lora", "low_rank", "--output", str(tmp_path / "new" / "adapter")) == 0
    torch.testing.assert_close(logits(loaded(roberta, tmp_path / "new" / "adapter")), expected, rtol=0, atol=1e-5)
    assert rows(capsys.readouterr().out)["parameters"] == [str(4 * 4 * 32)]
    assert json.loads((tmp_path / "new" / "adapter" / "adapter_config.json").read_text())["options"] == {"rank": 4}


def test_what_was_trained_beside_and_the_names_are_carried(roberta: nn.Module, tmp_path: Path) -> None:
    settings = dict(target_modules=r".*\.(query|key|value)", exclude_modules=r".*\.key", revision="main")
    save_lora(roberta, tmp_path / "lora", **settings)
    rewritten(base_model_name_or_path="roberta-base")(tmp_path / "lora")
    before = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    before = {key: value.bfloat16() if "classifier" in key else value for key, value in before.items()}
    save_file(before, tmp_path / "lora" / "adapter_model.safetensors")
    assert run(tmp_path / "lora", "circulant") == 0
    after = load_file(tmp_path / "lora-circulant" / "adapter_model.safetensors")
    head = {key: value for key, value in before.items() if "lora_" not in key}
    assert len(head) == 4 and all(torch.equal(after[key], value) for key, value in head.items())
    assert all(after[key].dtype == (torch.bfloat16 if key in head else torch.float32) for key in after)
    config = json.loads((tmp_path / "lora-circulant" / "adapter_config.json").read_text())
    assert config["peft_type"] == "SURM" and config["structure"] == "circulant" and config["task_type"] == "SEQ_CLS"
    assert settings.items() <= config.items() and config["modules_to_save"] == ["classifier", "score"]
    assert config["base_model_name_or_path"] == "roberta-base"


def change(folder: Path, new: Callable[[Tensors], Tensors | None], file: str = "adapter_model.safetensors") -> None:
    tensors = load_file(folder / file)
    save_file(new(tensors) or tensors, folder / file)


def test_a_constant_delta_is_toeplitz(roberta: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_lora(roberta, tmp_path / "lora", target_modules=["query", "intermediate.dense"])
    change(
        tmp_path / "lora", lambda t: {k: torch.full_like(v, 0.1 * len(v)) if "lora_" in k else v for k, v in t.items()}
    )
    expected = logits(peft.PeftModel.from_pretrained(copy.deepcopy(roberta), str(tmp_path / "lora")))
    assert run(tmp_path / "lora", "toeplitz") == 0
    torch.testing.assert_close(logits(loaded(roberta, tmp_path / "lora-toeplitz")), expected, rtol=0, atol=1e-5)
    assert rows(capsys.readouterr().out)["mean"] == ["0.0000"]


def deltas(folder: Path, scaling: float) -> dict[str, np.ndarray]:
    tensors = {key: value.double().numpy() for key, value in load_file(folder / "adapter_model.safetensors").items()}
    return {
        module: scaling
        * tensors[f"base_model.model.{module}.lora_B.weight"]
        @ tensors[f"base_model.model.{module}.lora_A.weight"]
        for module in QUERY_AND_VALUE
    }


def nearest(family: str, M: np.ndarray) -> np.ndarray:
    """Independent projections: rank 1, Toeplitz, and circulant blocks of 8, at 32 parameters for 16 x 16."""
    n = len(M)
    if family == "low_rank":
        u, s, vt = np.linalg.svd(M)
        return s[0] * np.outer(u[:, 0], vt[0])
    if family == "toeplitz":
        mean = {k: np.diagonal(M, k).mean() for k in range(1 - n, n)}
        return scipy.linalg.toeplitz([mean[-k] for k in range(n)], [mean[k] for k in range(n)])
    if n > 8:
        halves = (slice(0, 8), slice(8, 16))
        return np.block([[nearest(family, M[i, j]) for j in halves] for i in halves])
    return scipy.linalg.circulant([np.mean([M[(j + k) % n, j] for j in range(n)]) for k in range(n)])


def test_the_printed_errors_are_those_of_an_independent_projection(
    roberta: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_lora(roberta, tmp_path / "lora")
    assert run(tmp_path / "lora", "circulant,toeplitz,low_rank", "--budget", str(4 * 32)) == 0
    out = capsys.readouterr().out
    table, families = rows(out), ("circulant", "toeplitz", "low_rank")
    assert table["parameters"] == [str(4 * 32), str(4 * 31), str(4 * 32)]
    of = deltas(tmp_path / "lora", 6 / 4)
    for column, family in enumerate(families):
        lost = {module: np.linalg.norm(M - nearest(family, M)) for module, M in of.items()}
        expected = {module: lost[module] / np.linalg.norm(M) for module, M in of.items()}
        assert {m: float(table[m][column]) for m in of} == pytest.approx(expected, abs=6e-5)
        mean = np.mean(list(expected.values()))
        assert float(table["mean"][column]) == pytest.approx(mean, abs=6e-5)
        kept = 100 * (1 - sum(d**2 for d in lost.values()) / sum(np.linalg.norm(M) ** 2 for M in of.values()))
        assert f"{family} is a bad fit for this adapter: it keeps {kept:.3g} % of the deltas' energy; train" in out
    assert "Nothing was written" in out and [path.name for path in tmp_path.iterdir()] == ["lora"]


def test_a_larger_budget_never_makes_low_rank_worse(
    roberta: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_lora(roberta, tmp_path / "lora", target_modules=["query", "output.dense"])
    errors = []
    for budget in range(250, 1100, 50):
        assert run(tmp_path / "lora", "low_rank", "--budget", str(budget), "--dry-run") == 0
        table = rows(capsys.readouterr().out)
        assert int(table["parameters"][0].replace(",", "")) <= budget
        errors.append([float(table[module][0]) for module in table if module.startswith("roberta.")])
    assert len(errors[0]) == 6 and (np.diff(errors, axis=0) <= 0).all() and errors[0] > errors[-1]
    assert not (tmp_path / "lora-low_rank").exists()


class Net(nn.Module):
    """Two layers of one name but another size, one name being the other's ending."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"mix": nn.Linear(12, 20)})
        self.mix = nn.Linear(20, 9)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(torch.tanh(self.inner["mix"](x)))


@pytest.mark.parametrize("family", ["circulant", "skew_circulant", "toeplitz", "low_rank"])
def test_layers_of_different_sizes_have_options_of_their_own(tmp_path: Path, family: str) -> None:
    torch.manual_seed(0)
    net, x = Net(), torch.randn(5, 12)
    lora = peft.LoraConfig(target_modules=["mix"], r=2, init_lora_weights=False)
    peft.get_peft_model(copy.deepcopy(net), lora).save_pretrained(str(tmp_path / "lora"))
    assert run(tmp_path / "lora", family, "--budget", "150") == 0
    read, expected = convert.read_lora(tmp_path / "lora"), copy.deepcopy(net)
    for module, factors in read.factors.items():
        structure = convert.within(family, *factors.out_in, 150 * sum(factors.out_in) // 61)
        member = structure.dense(structure.project(factors.delta()))
        expected.get_parameter(f"{module}.weight").data += member.float()
    torch.testing.assert_close(loaded(net, tmp_path / f"lora-{family}")(x), expected(x), rtol=0, atol=1e-5)


def test_a_family_without_a_member_is_left_out(
    roberta: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_lora(roberta, tmp_path / "lora")
    assert run(tmp_path / "lora", "circulant,low_rank", "--budget", str(4 * 16)) == 0
    out = capsys.readouterr().out
    assert re.search(r"low_rank is left out: .* 32 parameters, .* budget of 16, at layer roberta.*--budget\.", out)
    assert len(rows(out)["mean"]) == 1

    def refuse(*_: object) -> None:
        raise BadConfig("structure-project", "It has no projection.")

    monkeypatch.setattr(Toeplitz, "project", refuse)
    assert run(tmp_path / "lora", "[circulant, toeplitz]") == 0
    assert "toeplitz is left out: It has no projection." in capsys.readouterr().out
    assert run(tmp_path / "lora", "toeplitz") == 2
    assert "error [convert-fit]: toeplitz is left out" in capsys.readouterr().err
    assert not (tmp_path / "lora-toeplitz").exists()


def test_an_output_is_written_whole_or_not_at_all_and_never_over_another(
    roberta: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_lora(roberta, tmp_path / "lora")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").touch()
    for taken in (tmp_path / "full", tmp_path / "full" / "note"):
        assert run(tmp_path / "lora", "circulant", "--output", str(taken)) == 2
        assert "error [convert-output]" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(convert, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        assert run(tmp_path / "lora", "circulant", "--output", str(tmp_path / "empty")) == 3
    assert "No space left on device" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full", "lora"]
    assert not any((tmp_path / "empty").iterdir())
    assert run(tmp_path / "lora", "circulant", "--output", str(tmp_path / "empty")) == 0
    loaded(roberta, tmp_path / "empty")


def as_microsoft(folder: Path, path: Path) -> None:
    """A PEFT folder as microsoft/LoRA would have saved it."""
    tensors = load_file(folder / "adapter_model.safetensors")
    torch.save({re.sub(r"^base_model\.model\.|(?<=lora_[AB])\.weight$", "", k): v for k, v in tensors.items()}, path)


def test_a_state_dict_of_microsoft_lora_needs_its_alpha(
    roberta: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = save_lora(roberta, tmp_path / "lora")
    as_microsoft(tmp_path / "lora", tmp_path / "ms.bin")
    assert run(tmp_path / "ms.bin", "low_rank") == 2
    err = capsys.readouterr().err
    assert "error [convert-alpha]" in err and "--alpha" in err and "16" in err
    assert run(tmp_path / "ms.bin", "low_rank", "--alpha", "6") == 0
    torch.testing.assert_close(logits(loaded(roberta, tmp_path / "ms-low_rank")), expected, rtol=0, atol=1e-5)
    config = json.loads((tmp_path / "ms-low_rank" / "adapter_config.json").read_text())
    assert config["target_modules"] == QUERY_AND_VALUE and config["modules_to_save"] == ["classifier"]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads that wait for each other in 24 decompositions take minutes where the cores are busy with other tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_the_published_mnli_adapter(shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = shared_data / "roberta-base-lora-mnli" / "roberta_base_lora_mnli.bin"
    if not path.is_file():
        pytest.skip(f"no published adapter here: {path}")
    for family in ("toeplitz", "low_rank"):
        assert run(path, family, "--alpha", "16", "--output", str(tmp_path / family)) == 0
        table = rows(capsys.readouterr().out)
        assert sum(module.startswith("roberta.encoder.layer.") for module in table) == 24
        assert float(table["mean"][0]) == pytest.approx({"toeplitz": 0.9987, "low_rank": 0}[family], abs=1e-4)
    base = RobertaForSequenceClassification(RobertaConfig(num_labels=3, vocab_size=40)).eval()
    before = base.roberta.encoder.layer[7].attention.self.value.weight.clone()
    model = peft.PeftModel.from_pretrained(base, str(tmp_path / "low_rank"))
    model.load_adapter(str(tmp_path / "toeplitz"), "toeplitz")
    saved = torch.load(path, map_location="cpu", weights_only=True)
    name = "roberta.encoder.layer.7.attention.self.value"
    merged = model.merge_and_unload(adapter_names=["default"])
    change = merged.get_submodule(name).weight - before
    torch.testing.assert_close(change, 2 * saved[f"{name}.lora_B"] @ saved[f"{name}.lora_A"], rtol=0, atol=1e-6)
    assert torch.equal(merged.classifier.out_proj.weight, saved["classifier.out_proj.weight"])


def rewritten(**values: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage


def with_tensors(new: Callable[[Tensors], Tensors]) -> Callable[[Path], None]:
    return lambda folder: change(folder, lambda tensors: tensors | new(tensors))


def truncated(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / name
        if path.suffix == ".bin":
            torch.save(load_file(folder / "adapter_model.safetensors"), path)
            (folder / "adapter_model.safetensors").unlink()
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return damage


WEIGHTS = "adapter_model.safetensors"
A, B = f"{KEY}.lora_A.weight", f"{KEY}.lora_B.weight"
DAMAGES = {
    "no config": ("lora-missing", "adapter_config.json", lambda folder: os.unlink(folder / "adapter_config.json")),
    "no weights": ("lora-missing", "adapter_model", lambda folder: os.unlink(folder / WEIGHTS)),
    "broken config": ("lora-config", "adapter_config.json", truncated("adapter_config.json")),
    "a list": ("lora-config", "adapter_config.json", lambda folder: (folder / "adapter_config.json").write_text("[]")),
    "another method": ("lora-not-plain", "IA3", rewritten(peft_type="IA3")),
    "dora": ("lora-not-plain", "use_dora", rewritten(use_dora=True)),
    "transposed": ("lora-not-plain", "fan_in_fan_out", rewritten(fan_in_fan_out=True)),
    "biases": ("lora-not-plain", "bias='all'", rewritten(bias="all")),
    "another start": ("lora-not-plain", "init_lora_weights='pissa'", rewritten(init_lora_weights="pissa")),
    "token rows": ("lora-not-plain", "trainable_token_indices", rewritten(trainable_token_indices=[1])),
    "another rank": ("lora-rank", LAYER, rewritten(r=8)),
    "NaN": ("lora-not-finite", LAYER, with_tensors(lambda t: {B: t[B] * torch.nan})),
    "infinite": ("lora-not-finite", LAYER, with_tensors(lambda t: {A: t[A] / 0})),
    "mismatch": ("lora-shape", LAYER, with_tensors(lambda t: {B: t[B][:, 1:].clone()})),
    "one factor": ("lora-shape", LAYER, lambda f: change(f, lambda t: {k: v for k, v in t.items() if k != B})),
    "convolution": ("lora-not-plain", LAYER, with_tensors(lambda t: {A: t[A][..., None, None].clone()})),
    "embedding": ("lora-not-plain", "lora_embedding_A", with_tensors(lambda t: {f"{KEY}.lora_embedding_A": t[A] + 1})),
    "magnitude": ("lora-not-plain", "magnitude", with_tensors(lambda t: {f"{KEY}.lora_magnitude_vector": t[A][0] + 1})),
    "no layers": (
        "lora-empty",
        WEIGHTS,
        lambda f: change(f, lambda t: {k: v for k, v in t.items() if "lora" not in k}),
    ),
    "untrained": ("lora-untrained", "lora", with_tensors(lambda t: {k: 0 * v for k, v in t.items() if "lora_B" in k})),
    "cut": ("lora-unreadable", WEIGHTS, truncated(WEIGHTS)),
    "cut pickle": ("lora-unreadable", "adapter_model.bin", truncated("adapter_model.bin")),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_bad_input_is_one_sentence_that_names_file_and_layer(
    roberta: nn.Module, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, shown, damage = DAMAGES[name]
    save_lora(roberta, tmp_path / "lora")
    damage(tmp_path / "lora")
    capsys.readouterr()
    assert run(tmp_path / "lora", "circulant") == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error [{code}]: ") and shown in line and str(tmp_path / "lora") in line
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (None, "lora-missing"),
        (b"", "lora-unreadable"),
        (b"no pickle at all", "lora-unreadable"),
        ([torch.ones(2)], "lora-unreadable"),
        ({"state_dict": {"a": torch.ones(2)}}, "lora-unreadable"),
        ({"a.weight": torch.ones(2, 2)}, "lora-empty"),
        ({f"{LAYER}.lora_A": torch.ones(2, 4), f"{LAYER}.lora_B": torch.ones(4, 2), f"{LAYER}.bias": torch.ones(4)},
         "lora-not-plain"),
        ({A: torch.ones(2, 4), B: torch.ones(4, 2)}, "lora-not-plain"),
    ],
)  # fmt: skip
def test_files_that_are_no_state_dict_of_a_lora(
    tmp_path: Path, content: Any, code: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "lora.bin"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    assert run(path, "circulant", "--alpha", "16") == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error [{code}]: ") and str(path) in line
    assert not list(tmp_path.glob("*circulant*"))


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ([], "convert-family"),
        (["--to", "circular"], "convert-family"),
        (["--to", "circulant", "--budget", "0"], "convert-budget"),
        (["--to", "circulant", "--budget", "63"], "convert-fit"),
        (["--to", "circulant", "--alpha", "16"], "convert-alpha"),
    ],
)
def test_options_that_cannot_work(
    roberta: nn.Module, tmp_path: Path, options: list[str], code: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save_lora(roberta, tmp_path / "lora")
    assert convert.main([str(tmp_path / "lora"), *options]) == 2
    assert f"error [{code}]" in capsys.readouterr().err
    assert convert.main(["--to", "circulant"]) == 2
    assert "error [missing-option]" in capsys.readouterr().err
