"""Structured deltas and adapters as a tuner of Hugging Face PEFT, which injects, saves, switches and merges.

    model = peft.get_peft_model(model, SurmConfig(structure="circulant", parts=["q", "v"]))

Importing this module registers the tuner, so import `surm_seg` before `PeftModel.from_pretrained` as well.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import CONFIG_NAME, TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn

from surm_seg import roles
from surm_seg.errors import BadConfig
from surm_seg.layers import FORMS, SurmLayer
from surm_seg.roles import WHOLE
from surm_seg.updates import Site

__all__ = ["WHOLE", "PeftModel", "SurmConfig", "SurmModel", "SurmType", "adapt", "merged"]


class SurmType(enum.StrEnum):
    SURM = "SURM"


@dataclass
class SurmConfig(PeftConfig):
    """Which structure goes where. Saved as adapter_config.json; sufficient to load the adapter.

    Args:
        structure: a name of `surm_seg.structures.names()`.
        options: that structure's options; those of form "bottleneck" are width=64.
        form: "delta", a parallel LoRA-style update of a Linear's weight; "adapter", X + GELU(S X) + b after any
            module's output X, with a square structure S; "bottleneck", the same with Houlsby's two small layers;
            "bias", a shift of a module's own bias. Adapters and bottlenecks stay beside the model, the others merge.
        target_modules: names (endings) of the modules, or one regular expression. None looks for `parts` by the names
            that transformers models give them (`surm_seg.roles`), and without parts takes PEFT's default.
        parts: with target_modules None, roles such as ["q", "v"] or ["out", "mlp_out"], where Houlsby's adapters
            stand. Otherwise which parts of a fused projection get a delta; None takes every part of a module's entry
            in `slices`, and the whole layer where it has none.
        slices: regular expression of a module name -> part -> [first, end) of its output features, None for all. A
            Linear with out = 3 * in and no entry here is cut into thirds q, k, v.
        overrides: a part, or a regular expression of a module's or MODULE.PART's name (of an ending, as in PEFT's
            patterns) -> {"structure", "options", "scale"} for that place, where the first match counts. A new
            structure starts from its default options, everything else that is not named stays.
        features: size of the last axis of what the modules return, for adapters and bottlenecks after modules that
            are neither Linear nor a layer norm.
        scale: factor of every delta, update or shift.
        dropout: probability of dropping an input of the trained branch while training; the frozen one sees none.
        modules_to_save: modules trained whole and saved with the adapter.
        exclude_modules: names or a regular expression of modules to leave alone.
    """

    structure: str = "circulant"
    options: dict[str, Any] = field(default_factory=dict)
    form: str = "delta"
    target_modules: list[str] | str | None = None
    parts: list[str] | None = None
    slices: roles.Slices = field(default_factory=dict)
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    features: int | None = None
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
        if self.form not in FORMS:
            raise BadConfig("adapter-form", f"SurmConfig form {self.form!r} is unknown; use one of {', '.join(FORMS)}.")
        if self.form == "bias" and (self.options or self.dropout):
            raise BadConfig("adapter-form", "SurmConfig form 'bias' takes neither options nor dropout; leave them out.")
        for key, entry in self.overrides.items():
            unknown = sorted(set(entry) - {"structure", "options", "scale"})
            if unknown:
                raise BadConfig(
                    "adapter-overrides",
                    f"SurmConfig override {key!r} sets {unknown}; it can set structure, options and scale.",
                )
            try:
                re.compile(key)
            except re.error as error:
                raise BadConfig(
                    "adapter-overrides", f"SurmConfig override {key!r} is no regular expression: {error}."
                ) from error
        if 0 in (self.scale, *(entry.get("scale", 1) for entry in self.overrides.values())):
            raise BadConfig("adapter-scale", "SurmConfig scale 0 would switch the delta off for ever.")
        if not 0 <= self.dropout < 1:
            raise BadConfig("adapter-dropout", f"SurmConfig dropout {self.dropout} is not in [0, 1).")

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """As PEFT does, but without sorting what is matched in order."""
        super().save_pretrained(str(save_directory), **kwargs)
        path = Path(save_directory) / CONFIG_NAME
        saved = json.loads(path.read_text())
        path.write_text(json.dumps({**saved, "slices": self.slices, "overrides": self.overrides}, indent=2))

    def sites(self, name: str, module: nn.Module) -> list[Site]:
        """What this configuration puts on a module; raises BadConfig naming the module where it does not fit."""
        form = FORMS[self.form]
        width = form.outputs(module, name, self.features)
        spans = roles.spans(name, module, width, self.slices, self.parts)
        sites = [self._site(name, part, *span) for part, span in spans.items()]
        for site in sites:
            if not form.sliceable and (site.start, site.stop) != (0, width):
                raise BadConfig(
                    "adapter-parts",
                    f"Part {site.part} is a slice of module {name}, but form {self.form!r} takes whole modules.",
                )
        return sites

    def _site(self, name: str, part: str, start: int, stop: int) -> Site:
        entry = next((e for key, e in self.overrides.items() if _names(key, name, part)), {})
        options = {} if "structure" in entry else self.options
        chosen = {"structure": self.structure, "options": options, "scale": self.scale, **entry}
        return Site(part, start, stop, **chosen, dropout=self.dropout)


def _names(key: str, module: str, part: str) -> bool:
    """Whether the key of an override means this part of this module."""
    return any(re.fullmatch(rf"(?:.*\.)?(?:{key})", name) for name in (module, f"{module}.{part}"))


class SurmModel(BaseTuner):
    """Puts a SurmLayer in the place of every targeted module."""

    prefix = "surm_"
    tuner_layer_cls = SurmLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's injection, which leaves the model as it was where the configuration does not fit."""
        asked: Any = self.peft_config[adapter_name]
        config = self.peft_config[adapter_name] = _resolved(asked, model)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            self._check_overrides(config, adapter_name)
        except Exception as error:
            self._withdraw(adapter_name)
            if isinstance(error, NoMatchingPeftModuleError):
                raise BadConfig(
                    "adapter-target",
                    f"No module of {type(model).__name__} is left to adapt by target_modules {config.target_modules!r}"
                    f"{f' without {config.exclude_modules!r}' if config.exclude_modules else ''}; compare "
                    "them with the names in model.named_modules().",
                ) from error
            raise

    def _prepare_adapter_config(self, peft_config: SurmConfig, model_config: dict[str, Any]) -> PeftConfig:
        if peft_config.target_modules is None and model_config.get("model_type") not in self.target_module_mapping:
            raise BadConfig(
                "adapter-target",
                "SurmConfig names neither target_modules nor parts, and PEFT has no default for this model; name one.",
            )
        return super()._prepare_adapter_config(peft_config, model_config)

    def _prepare_model(self, peft_config: SurmConfig, model: nn.Module) -> None:
        """Refuse targets inside an adapted module, which PEFT would skip without a word."""
        for name, _ in model.named_modules():
            outer, inside, _ = name.partition(".base_layer.")
            inner = name.replace(".base_layer", "")
            if inside and self._check_target_module_exists(peft_config, inner):
                raise BadConfig(
                    "adapter-nested",
                    f"Module {inner} lies inside {outer}, which an adapter already surrounds; add the adapter of the "
                    "inner module first.",
                )

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
        form = FORMS[peft_config.form]
        base = target.base_layer if isinstance(target, SurmLayer) else target
        if isinstance(target, SurmLayer) and target.surm_placement and type(target) is not form:
            raise BadConfig(
                "adapter-forms",
                f"Module {current_key} already has an adapter of another form than {peft_config.form!r}; give each "
                "form its own modules.",
            )
        if isinstance(parent, nn.MultiheadAttention):
            raise BadConfig(
                "adapter-target",
                f"Module {current_key} is never called, torch.nn.MultiheadAttention reads its weights; exclude it.",
            )
        sites = peft_config.sites(current_key, base)
        values = (p for module in (base, self.model) for p in module.parameters() if p.is_floating_point())
        layer = target if type(target) is form else form(base, current_key)
        layer.add_adapter(adapter_name, sites, next(values, torch.empty(())))
        if layer is not target:
            layer.set_adapter(self.active_adapters)
            self._replace_module(parent, target_name, layer, target)

    def _check_overrides(self, config: SurmConfig, adapter: str) -> None:
        places = [(layer.module_name, site.part) for layer in self._layers() for site, _, _ in layer.placed([adapter])]
        for key in config.overrides:
            if not any(_names(key, *place) for place in places):
                raise BadConfig(
                    "adapter-overrides",
                    f"SurmConfig override {key!r} matches no adapted module or part; there are "
                    f"{', '.join(sorted({part for _, part in places}))} in {places[0][0]} and {len(places) - 1} more.",
                )

    def _layers(self) -> list[SurmLayer]:
        return [module for module in self.model.modules() if isinstance(module, SurmLayer)]

    def _withdraw(self, adapter: str) -> None:
        """Take a half-injected adapter out again."""
        for name, layer in reversed(list(self.model.named_modules())):
            if isinstance(layer, SurmLayer) and adapter in layer.surm_placement:
                layer.delete_adapter(adapter)
                if not layer.surm_placement:
                    parent, _, child = name.rpartition(".")
                    setattr(self.model.get_submodule(parent), child, layer.base_layer)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        for layer in self._layers():
            layer.refuse_merging(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        for layer in self._layers() if merge else ():
            layer.refuse_merging(adapter_names)
        super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        while self._layers():  # PEFT does not look inside the layers it unloads
            super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        return self.model

    @contextmanager
    def _enable_peft_forward_hooks(self, *_: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT calls this with the arguments of forward; adapters per sample would be ignored without a word."""
        if kwargs.get("adapter_names") is not None:
            raise BadConfig("adapter-names", "Adapters per sample (adapter_names) are not supported; use set_adapter.")
        yield

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's version reads `weight` of what it replaces, which not every module has.
        setattr(parent.base_layer if isinstance(parent, SurmLayer) else parent, child_name, new_module)


def _resolved(config: SurmConfig, model: nn.Module) -> SurmConfig:
    """The configuration with roles written out as target_modules and slices, so that it loads without looking."""
    if config.target_modules is not None or config.parts is None:
        return config
    modules = ((n, m.base_layer if isinstance(m, SurmLayer) else m) for n, m in model.named_modules())
    slices = roles.by_name(modules, config.parts, type(model).__name__)
    return dataclasses.replace(
        config, target_modules="|".join(f"(?:{p})" for p in slices), parts=None, slices={**slices, **config.slices}
    )


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
