"""Structured deltas as a tuner of Hugging Face PEFT, which does injection, saving, switching and merging.

    model = peft.get_peft_model(model, SurmConfig(structure="circulant", target_modules=["qkv"], parts=["q", "v"]))

Importing this module registers the tuner, so import `surm_seg` before `PeftModel.from_pretrained` as well.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from surm_seg.errors import BadConfig
from surm_seg.kernel import Delta, add_deltas, structured_linear
from surm_seg.structures import Structure, make

WHOLE = "all"
"""Name of the one part of a layer that is not cut into slices."""


class SurmType(enum.StrEnum):
    SURM = "SURM"


@dataclass
class SurmConfig(PeftConfig):
    """Which structure goes where. Saved as adapter_config.json; sufficient to load the adapter.

    Args:
        structure: a name of `surm_seg.structures.names()`.
        options: that structure's options.
        form: "delta", a parallel LoRA-style update of a Linear's weight.
        target_modules: names (endings) of the Linear modules, or one regular expression; None takes PEFT's default
            for the transformers model.
        parts: which parts of a fused projection get a delta, such as ["q", "v"]. None takes every part of a module's
            entry in `slices`, and the whole layer where it has none.
        slices: regular expression of a module name -> part -> [first, end) of its output features. A Linear with
            out = 3 * in and no entry here is cut into thirds q, k, v.
        scale: factor of every delta.
        dropout: probability of dropping an input of the delta branch while training; the frozen branch sees none.
        modules_to_save: modules trained whole and saved with the adapter.
        exclude_modules: names or a regular expression of modules to leave alone.
    """

    structure: str = "circulant"
    options: dict[str, Any] = field(default_factory=dict)
    form: str = "delta"
    target_modules: list[str] | str | None = None
    parts: list[str] | None = None
    slices: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    scale: float = 1.0
    dropout: float = 0.0
    modules_to_save: list[str] | None = None
    exclude_modules: list[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SurmType.SURM  # pyright: ignore[reportAttributeAccessIssue]
        self.target_parameters = None
        if isinstance(self.target_modules, set):
            self.target_modules = sorted(self.target_modules)
        if self.form != "delta":
            raise BadConfig("adapter-form", f"SurmConfig form {self.form!r} is unknown; use 'delta'.")
        if self.scale == 0:
            raise BadConfig("adapter-scale", "SurmConfig scale 0 would switch the delta off for ever.")
        if not 0 <= self.dropout < 1:
            raise BadConfig("adapter-dropout", f"SurmConfig dropout {self.dropout} is not in [0, 1).")


class SurmLinear(nn.Module, BaseTunerLayer):
    """A frozen nn.Linear with structured deltas on slices of its output; several active adapters add up."""

    adapter_layer_names = ("surm_generators",)
    other_param_names = ("surm_placement",)

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.surm_generators = nn.ModuleDict()
        self.surm_placement: dict[str, _Placement] = {}
        self.merged_adapters: list[str] = []
        self._unmerged_weight: Tensor | None = None

    def add_adapter(self, adapter: str, config: SurmConfig, module_name: str) -> None:
        """Create the generators of an adapter; raises BadConfig naming the module where parts do not fit."""
        base = self.base_layer
        spans = _spans(config, module_name, base)
        structures = {
            part: make(config.structure, stop - start, base.in_features, **config.options)
            for part, (start, stop) in spans.items()
        }
        weight = base.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.surm_placement[adapter] = _Placement(spans, structures, config.scale, config.dropout)
        self.surm_generators[adapter] = nn.ParameterDict(
            {
                f"{part}_{name}": nn.Parameter(value.to(weight.device, dtype))
                for part, structure in structures.items()
                for name, value in structure.init().items()
            }
        )

    def deltas(self, adapters: Sequence[str] | None = None) -> list[Delta]:
        """The deltas of these adapters, of the active ones by default."""
        return [
            delta
            for adapter in (self.active_adapters if adapters is None else adapters)
            if adapter in self.surm_placement
            for delta in self.surm_placement[adapter].deltas(self.surm_generators[adapter])
        ]

    def forward(self, x: Tensor) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        deltas = [] if self.disable_adapters or self.merged else self.deltas()
        if not deltas:
            return self.base_layer(x)
        dropout = max(self.surm_placement[a].dropout for a in self.active_adapters if a in self.surm_placement)
        if self.training and dropout > 0:
            return self._two_branches(x, nn.functional.dropout(x, dropout), deltas)
        return structured_linear(x, self.base_layer.weight, self.base_layer.bias, deltas)

    def _two_branches(self, x: Tensor, dropped: Tensor, deltas: list[Delta]) -> Tensor:
        """W x + b beside the deltas of the dropped input: dropout cannot be folded into one product."""
        y = self.base_layer(x)
        for delta in deltas:
            update = delta.scale * delta.structure.matvec(delta.generators, dropped.to(y.dtype))
            before, after = delta.start, self.base_layer.out_features - delta.stop
            y = y + nn.functional.pad(update, (before, after)).to(y.dtype)
        return y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write weight + deltas into the frozen layer; the original is kept, so that unmerging restores every bit."""
        adapters = [a for a in check_adapters_to_merge(self, adapter_names) or [] if a in self.surm_placement]
        if not adapters:
            return
        weight = self.base_layer.weight
        with torch.no_grad():
            merged = add_deltas(weight, self.deltas(adapters)).to(weight.dtype)
        if safe_merge and not torch.isfinite(merged).all():
            raise BadConfig(
                "adapter-not-finite", f"Adapters {adapters} hold values that are not finite; nothing was merged."
            )
        if self._unmerged_weight is None:
            self._unmerged_weight = weight.detach().clone()
        weight.data = merged
        self.merged_adapters += adapters

    def unmerge(self) -> None:
        if self._unmerged_weight is not None:
            self.base_layer.weight.data = self._unmerged_weight
            self._unmerged_weight = None
        self.merged_adapters = []


@dataclass(frozen=True)
class _Placement:
    """Where one adapter's structures sit on the outputs of one layer."""

    spans: dict[str, tuple[int, int]]
    structures: dict[str, Structure]
    scale: float
    dropout: float

    def deltas(self, generators: nn.Module) -> list[Delta]:
        return [
            Delta(
                structure,
                {n: getattr(generators, f"{part}_{n}") for n in structure.generators},
                self.scale,
                *self.spans[part],
            )
            for part, structure in self.structures.items()
        ]


def _spans(config: SurmConfig, module_name: str, layer: nn.Linear) -> dict[str, tuple[int, int]]:
    """Part -> [start, stop) of the layer's outputs that the config asks for."""
    known: dict[str, list[int]] = next(
        (s for pattern, s in config.slices.items() if re.fullmatch(pattern, module_name)), {}
    )
    parts = list(known) if config.parts is None else config.parts
    if not parts:
        return {WHOLE: (0, layer.out_features)}
    if not known and layer.out_features == 3 * layer.in_features:
        known = {part: [i * layer.in_features, (i + 1) * layer.in_features] for i, part in enumerate("qkv")}
    missing = [part for part in parts if part not in known]
    if missing:
        raise BadConfig(
            "adapter-parts",
            f"Module {module_name} ({layer.in_features} -> {layer.out_features}) has no known part {missing}; "
            "name its output slices in SurmConfig.slices, or leave parts out to adapt the whole layer.",
        )
    spans = {part: (known[part][0], known[part][1]) for part in parts}
    for part, (start, stop) in spans.items():
        if not 0 <= start < stop <= layer.out_features:
            raise BadConfig(
                "adapter-parts",
                f"Part {part} of module {module_name}: [{start}, {stop}) is outside its {layer.out_features} outputs.",
            )
    return spans


class SurmModel(BaseTuner):
    """Puts SurmLinear in the place of every targeted nn.Linear."""

    prefix = "surm_"
    tuner_layer_cls = SurmLinear
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _create_and_replace(
        self,
        peft_config: SurmConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        if isinstance(target, SurmLinear):
            target.add_adapter(adapter_name, peft_config, current_key)
            return
        if not isinstance(target, nn.Linear):
            raise BadConfig(
                "adapter-target", f"Module {current_key} is a {type(target).__name__}; a delta needs a torch.nn.Linear."
            )
        layer = SurmLinear(target)
        layer.add_adapter(adapter_name, peft_config, current_key)
        layer.set_adapter(self.active_adapters)
        self._replace_module(parent, target_name, layer, target)

    @contextmanager
    def _enable_peft_forward_hooks(self, *_: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT calls this with the arguments of forward; adapters per sample would be ignored without a word."""
        if kwargs.get("adapter_names") is not None:
            raise BadConfig("adapter-names", "Adapters per sample (adapter_names) are not supported; use set_adapter.")
        yield

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's version reads `weight` of what it replaces, which a whole module of modules_to_save may not have.
        if isinstance(child, AuxiliaryTrainingWrapper):
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)


def adapt(model: nn.Module, config: SurmConfig) -> PeftModel:
    """The model with a new adapter, ready to train; everything else is frozen."""
    adapted = get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
    assert isinstance(adapted, PeftModel)
    return adapted


def merged(model: nn.Module, adapter: Path) -> nn.Module:
    """The model with a saved adapter merged into its weights; no adapter layer is left."""
    return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()  # pyright: ignore[reportCallIssue]


PEFT_TYPE_TO_CONFIG_MAPPING[SurmType.SURM] = SurmConfig  # pyright: ignore[reportArgumentType]
PEFT_TYPE_TO_TUNER_MAPPING[SurmType.SURM] = SurmModel  # pyright: ignore[reportArgumentType]
PEFT_TYPE_TO_PREFIX_MAPPING[SurmType.SURM] = SurmModel.prefix  # pyright: ignore[reportArgumentType]
