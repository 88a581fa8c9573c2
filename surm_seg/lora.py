"""Trained LoRA adapters as files: PEFT's folders, and the state dicts of microsoft/LoRA."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import Tensor

from surm_seg.errors import BadConfig, BadInput

PREFIX = "base_model.model."
"""What PEFT puts before a module's name in its files."""

PEFT_FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
MICROSOFT_FACTOR = re.compile(r"(.+)\.lora_([AB])")

NOT_PLAIN = (
    "fan_in_fan_out", "bias", "lora_bias", "use_qalora", "target_parameters", "trainable_token_indices",
    "layer_replication", "megatron_config", "ensure_weight_tying",
)  # fmt: skip
"""Settings of peft.LoraConfig, beside its variants such as DoRA, that make more of a LoRA than W + scaling B A."""

PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the frozen weights alone; PiSSA, OLoRA and others change them on loading."""


CARRIED = (
    "base_model_name_or_path", "revision", "task_type", "auto_mapping", "target_modules", "exclude_modules",
    "modules_to_save",
)  # fmt: skip
"""Settings of peft.LoraConfig that mean the same in a SurmConfig."""


@dataclass(frozen=True)
class Factors:
    """What LoRA learnt about one layer."""

    A: Float[Tensor, "rank in"]
    B: Float[Tensor, "out rank"]
    scaling: float

    def delta(self, device: str = "cpu") -> Float[Tensor, "out in"]:
        """scaling B A in float64."""
        return self.scaling * (self.B.to(device, torch.float64) @ self.A.to(device, torch.float64))

    @property
    def out_in(self) -> tuple[int, int]:
        return self.B.shape[0], self.A.shape[1]

    @property
    def parameters(self) -> int:
        return self.A.numel() + self.B.numel()


@dataclass(frozen=True)
class Lora:
    """A trained LoRA: factors by module, tensors trained whole by name, and fields that its SurmConfig inherits."""

    factors: dict[str, Factors]
    whole: dict[str, Tensor]
    settings: dict[str, Any]


def read_lora(path: Path, alpha: float | None = None) -> Lora:
    """A PEFT folder, or a microsoft/LoRA file together with its alpha.

    Raises:
        BadInput: a file that is missing or damaged, or holds anything but a trained, plain LoRA of Linear layers.
        BadConfig: alpha missing for a microsoft/LoRA file, or given for a folder, whose configuration has it.
    """
    if not path.exists():
        raise BadInput("lora-missing", f"There is no {path}; give the folder of a PEFT LoRA, or a microsoft/LoRA file.")
    lora = _peft(path, alpha) if path.is_dir() else _microsoft(path, alpha)
    if not any(factors.scaling and factors.A.any() and factors.B.any() for factors in lora.factors.values()):
        raise BadInput("lora-untrained", f"Every delta of {path} is zero; give a LoRA that has been trained.")
    return lora


def _peft(folder: Path, alpha: float | None) -> Lora:
    if alpha is not None:
        raise BadConfig("convert-alpha", f"{folder / CONFIG_NAME} says alpha already; leave --alpha out.")
    config = _lora_config(folder)
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    if not weights.exists():
        weights = folder / WEIGHTS_NAME
    pairs, whole = _sorted(weights, PEFT_FACTOR, PREFIX)
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    factors = {}
    for module, (A, B) in pairs.items():
        rank = ranks.get(get_pattern_key(list(ranks), module), config.r)
        if rank != A.shape[0]:
            raise BadInput(
                "lora-rank",
                f"{weights}: layer {module} has rank {A.shape[0]}, but {CONFIG_NAME} says {rank}; "
                "give the configuration that it was trained with.",
            )
        numerator = alphas.get(get_pattern_key(list(alphas), module), config.lora_alpha)
        factors[module] = Factors(A, B, numerator / (math.sqrt(rank) if config.use_rslora else rank))
    settings = {name: getattr(config, name) for name in CARRIED}
    settings = {name: sorted(value) if isinstance(value, set) else value for name, value in settings.items()}
    named = config.target_modules and config.layers_to_transform is None  # SurmConfig cannot choose layers by number
    if not (named and all(check_target_module_exists(config, module) for module in factors)):
        settings["target_modules"] = list(factors)
    return Lora(factors, whole, settings)


def _lora_config(folder: Path) -> LoraConfig:
    """The configuration of a plain LoRA; raises BadInput for anything else."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise BadInput("lora-missing", f"{folder} has no {CONFIG_NAME}; give the folder that PEFT saved a LoRA into.")
    try:
        kind = json.loads(path.read_text())["peft_type"]
        if kind != "LORA":
            raise BadInput("lora-not-plain", f"{path} is of type {kind}; only a plain LoRA can be converted.")
        config = LoraConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(
            "lora-config", f"{path} is not PEFT's configuration of a LoRA ({type(error).__name__}); save it again."
        ) from error
    assert isinstance(config, LoraConfig)
    plain = LoraConfig()
    variants = [f.name for f in fields(LoraConfig) if f.metadata.get("is_lora_variant")]
    odd = [name for name in (*variants, *NOT_PLAIN) if getattr(config, name) != getattr(plain, name)]
    if config.init_lora_weights not in PLAIN_STARTS:
        odd.append("init_lora_weights")
    if odd:
        shown = ", ".join(f"{name}={getattr(config, name)!r}" for name in odd)
        raise BadInput("lora-not-plain", f"{path} sets {shown}; only a plain LoRA of Linear layers can be converted.")
    return config


def _microsoft(path: Path, alpha: float | None) -> Lora:
    if alpha is None or not math.isfinite(alpha) or alpha == 0:
        raise BadConfig(
            "convert-alpha",
            f"{path} does not say its scaling alpha / r; give the --alpha it was trained with "
            "(microsoft/LoRA's RoBERTa adapters: 16).",
        )
    pairs, whole = _sorted(path, MICROSOFT_FACTOR, "")
    factors = {module: Factors(A, B, alpha / A.shape[0]) for module, (A, B) in pairs.items()}
    beside = sorted({name.partition(".")[0] for name in whole})
    for top in beside:
        inside = next((module for module in factors if module.partition(".")[0] == top), None)
        if inside:
            name = next(name for name in whole if name.partition(".")[0] == top)
            raise BadInput(
                "lora-not-plain",
                f"{path}: {name} was trained beside layer {inside}; only modules apart from LoRA's can be.",
            )
    return Lora(factors, whole, {"target_modules": list(factors), "modules_to_save": beside or None})


def _sorted(
    path: Path, factor: re.Pattern[str], prefix: str
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Module -> (A, B), checked, and the tensors trained whole by name; raises BadInput."""
    halves: dict[str, dict[str, Tensor]] = {}
    whole = {}
    for name, value in _tensors(path).items():
        if match := factor.fullmatch(name):
            halves.setdefault(match[1], {})[match[2]] = value
        elif "lora_" in name or not name.startswith(prefix):
            raise BadInput(
                "lora-not-plain", f"{path}: {name} is no factor of a plain LoRA; only Linear layers can be converted."
            )
        else:
            whole[name.removeprefix(prefix)] = value
    if not halves:
        raise BadInput("lora-empty", f"{path} holds no LoRA layers; give the file that the LoRA was saved into.")
    pairs = {}
    for module in sorted(halves, key=_by_number):
        _check(path, module, halves[module])
        pairs[module] = halves[module]["A"], halves[module]["B"]
    return pairs, whole


def _by_number(module: str) -> list[tuple[int, str]]:
    """Sorts layer.2 before layer.10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in module.split(".")]


def _check(path: Path, module: str, half: Mapping[str, Tensor]) -> None:
    missing = {"A", "B"} - set(half)
    if missing:
        raise BadInput("lora-shape", f"{path}: layer {module} has no lora_{missing.pop()}; save the LoRA again.")
    A, B = tuple(half["A"].shape), tuple(half["B"].shape)
    if len(A) != 2 or len(B) != 2:
        raise BadInput(
            "lora-not-plain",
            f"{path}: layer {module} has factors of {A} and {B}, not of a Linear layer; only these can be converted.",
        )
    if A[0] != B[1] or 0 in A + B:
        raise BadInput(
            "lora-shape",
            f"{path}: layer {module} has lora_A of {A} and lora_B of {B}, which do not multiply; save it again.",
        )
    for side, value in half.items():
        if not value.isfinite().all():
            raise BadInput(
                "lora-not-finite",
                f"{path}: lora_{side} of layer {module} holds values that are not finite; go back to an earlier LoRA.",
            )


def _tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise BadInput("lora-missing", f"There is no {path}; save the LoRA's weights there, as save_pretrained does.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        raise BadInput(
            "lora-unreadable", f"{path} holds no complete weights ({type(error).__name__}); fetch the file again."
        ) from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise BadInput("lora-unreadable", f"{path} is not a state dict of tensors; save the LoRA's state dict itself.")
    return content
