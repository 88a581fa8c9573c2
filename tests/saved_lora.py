"""A small model, the LoRAs that PEFT saves for it, and the command that reads them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import RobertaConfig, RobertaForSequenceClassification

from surm_seg import convert

Tensors = dict[str, Tensor]

TOKENS = torch.arange(3, 19).reshape(2, 8)
LAYER = "roberta.encoder.layer.0.attention.self.query"
QUERY_AND_VALUE = [f"roberta.encoder.layer.{n}.attention.self.{name}" for n in (0, 1) for name in ("query", "value")]
WEIGHTS = "adapter_model.safetensors"


def small_roberta() -> nn.Module:
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


def change(folder: Path, new: Callable[[Tensors], Tensors]) -> None:
    """Replace a saved LoRA's tensors by what `new` makes of them."""
    save_file(new(load_file(folder / WEIGHTS)), folder / WEIGHTS)


def rewritten(**values: Any) -> Callable[[Path], None]:
    """What sets these values in a saved LoRA's configuration."""

    def damage(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage
