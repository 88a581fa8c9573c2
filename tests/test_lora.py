"""What the convert command reads: microsoft's files as well as PEFT's, and each that is no plain LoRA is refused."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from saved_lora import (
    LAYER,
    QUERY_AND_VALUE,
    WEIGHTS,
    Tensors,
    change,
    loaded,
    logits,
    rewritten,
    run,
    save_lora,
    small_roberta,
)

KEY = f"base_model.model.{LAYER}"


def as_microsoft(folder: Path, path: Path) -> None:
    """A PEFT folder as microsoft/LoRA would have saved it."""
    tensors = load_file(folder / WEIGHTS)
    torch.save({re.sub(r"^base_model\.model\.|(?<=lora_[AB])\.weight$", "", k): v for k, v in tensors.items()}, path)


def test_a_state_dict_of_microsoft_lora_needs_its_alpha(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    roberta = small_roberta()
    expected = save_lora(roberta, tmp_path / "lora")
    as_microsoft(tmp_path / "lora", tmp_path / "ms.bin")
    assert run(tmp_path / "ms.bin", "low_rank") == 2
    err = capsys.readouterr().err
    assert "error [convert-alpha]" in err and "--alpha" in err and "16" in err
    assert run(tmp_path / "ms.bin", "low_rank", "--alpha", "6") == 0
    torch.testing.assert_close(logits(loaded(roberta, tmp_path / "ms-low_rank")), expected, rtol=0, atol=1e-5)
    config = json.loads((tmp_path / "ms-low_rank" / "adapter_config.json").read_text())
    assert config["target_modules"] == QUERY_AND_VALUE and config["modules_to_save"] == ["classifier"]


def with_tensors(new: Callable[[Tensors], Tensors]) -> Callable[[Path], None]:
    return lambda folder: change(folder, lambda tensors: tensors | new(tensors))


def truncated(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / name
        if path.suffix == ".bin":
            torch.save(load_file(folder / WEIGHTS), path)
            (folder / WEIGHTS).unlink()
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return damage


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
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, shown, damage = DAMAGES[name]
    save_lora(small_roberta(), tmp_path / "lora")
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
