"""The convert command, as users meet it: adapters that PEFT saved go in, adapters that PEFT loads come out."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import scipy.linalg
import torch
from safetensors.torch import load_file, save_file
from saved_lora import QUERY_AND_VALUE, WEIGHTS, change, loaded, logits, rewritten, run, save_lora, small_roberta
from torch import Tensor, nn
from transformers import RobertaConfig, RobertaForSequenceClassification

from surm_seg import convert
from surm_seg.errors import BadConfig
from surm_seg.structures.toeplitz import Toeplitz


@pytest.fixture(scope="module")
def roberta() -> nn.Module:
    return small_roberta()


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
    before = load_file(tmp_path / "lora" / WEIGHTS)
    before = {key: value.bfloat16() if "classifier" in key else value for key, value in before.items()}
    save_file(before, tmp_path / "lora" / WEIGHTS)
    assert run(tmp_path / "lora", "circulant") == 0
    after = load_file(tmp_path / "lora-circulant" / WEIGHTS)
    head = {key: value for key, value in before.items() if "lora_" not in key}
    assert len(head) == 4 and all(torch.equal(after[key], value) for key, value in head.items())
    assert all(after[key].dtype == (torch.bfloat16 if key in head else torch.float32) for key in after)
    config = json.loads((tmp_path / "lora-circulant" / "adapter_config.json").read_text())
    assert config["peft_type"] == "SURM" and config["structure"] == "circulant" and config["task_type"] == "SEQ_CLS"
    assert settings.items() <= config.items() and config["modules_to_save"] == ["classifier", "score"]
    assert config["base_model_name_or_path"] == "roberta-base"


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
    tensors = {key: value.double().numpy() for key, value in load_file(folder / WEIGHTS).items()}
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
