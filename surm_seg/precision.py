"""In which number format to compute, and frozen weights kept in it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from surm_seg.volume import replacing

PRODUCTS = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
"""Layers that autocast computes in the lower precision, whatever they are stored in."""


def fast_precision(device: torch.device) -> Literal["float32", "bfloat16"]:
    """bfloat16 where this device multiplies it at least 1.5 times as fast as float32, measured in some 50 ms."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(1024, 1024, device=device, dtype=dtype)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            float((x @ x)[0, 0])
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    return "bfloat16" if seconds[torch.float32] > 1.5 * seconds[torch.bfloat16] else "float32"


def kept_precision(folder: Path, words: Sequence[str], measure: Callable[[], str]) -> str:
    """What a measurement said for runs with these options when it was first asked for in this folder.

    Runs in a folder are compared, and a second measurement could say otherwise; FOLDER/precision.json has the first.
    """
    path, key = folder / "precision.json", " ".join(words)
    known: dict[str, str] = json.loads(path.read_bytes()) if path.exists() else {}
    if key not in known:
        known[key] = measure()
        with replacing(path) as file:
            file.write(json.dumps(known).encode())
    return known[key]


def store_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep frozen weights in the precision that autocast would cast them to at every step; the results are the same.

    Weights under an adapter stay as they are: a delta is added to them before the cast. From here on the model runs
    under autocast only.
    """
    for name, module in model.named_modules():
        frozen = not any(parameter.requires_grad for parameter in module.parameters())
        if isinstance(module, PRODUCTS) and frozen and not name.endswith(".base_layer"):
            module.to(dtype)
