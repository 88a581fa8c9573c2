"""Structured deltas and adapters as a tuner of Hugging Face PEFT, which injects, saves, switches and merges.

    model = peft.get_peft_model(model, SurmConfig(structure="circulant", parts=["q", "v"]))

Importing this module registers the tuner, so import `surm_seg` before `PeftModel.from_pretrained` as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn

from surm_seg import roles
from surm_seg.adapters import FORMS
from surm_seg.errors import BadConfig
from surm_seg.layers import SurmLayer
from surm_seg.roles import WHOLE
from surm_seg.surm_config import NOTHING, SurmConfig, SurmType, names_place

__all__ = ["WHOLE", "PeftModel", "SurmConfig", "SurmModel", "SurmType", "adapt", "merged"]


class SurmModel(BaseTuner):
    """Puts a SurmLayer in the place of every targeted module."""

    prefix = "surm_"
    tuner_layer_cls = SurmLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's injection, which leaves the model as it was where the configuration does not fit."""
        asked: Any = self.peft_config[adapter_name]
        if "." in adapter_name or hasattr(nn.ModuleDict, adapter_name):
            raise BadConfig("adapter-name", f"An adapter cannot be called {adapter_name!r}; choose another name.")
        flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        config = self.peft_config[adapter_name] = _resolved(asked, model)
        self._places: list[tuple[str, str]] = []
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            self._check_overrides(config)
        except Exception as error:
            self._withdraw(adapter_name)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
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
        if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
            raise BadConfig(
                "adapter-target",
                f"Module {current_key} is not called in eval mode, torch.nn.TransformerEncoderLayer reads its weights; "
                "call torch.backends.mha.set_fastpath_enabled(False) first.",
            )
        placed = peft_config.sites(current_key, base)
        self._places += [(current_key, site.part) for site in placed]
        sites = [site for site in placed if site.structure != NOTHING]
        if not sites:
            return
        values = (p for module in (base, self.model) for p in module.parameters() if p.is_floating_point())
        layer = target if type(target) is form else form(base, current_key)
        layer.add_adapter(adapter_name, sites, next(values, torch.empty(())))
        if layer is not target:
            layer.set_adapter(self.active_adapters)
            self._replace_module(parent, target_name, layer, target)

    def _check_overrides(self, config: SurmConfig) -> None:
        places = self._places
        for key in config.overrides:
            if not any(names_place(key, *place) for place in places):
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

    def _check_merge(self, adapters: list[str] | None, safe: bool) -> None:
        """Raise BadConfig before anything is merged, where not all can be."""
        owners: dict[int, str] = {}
        for layer in self._layers():
            layer.refuse_merging(adapters, safe)
            if layer.merges_into and layer.placed(adapters):
                parameter = getattr(layer.base_layer, layer.merges_into)
                other = owners.setdefault(id(parameter), layer.module_name)
                if other != layer.module_name:
                    raise BadConfig(
                        "adapter-merge",
                        f"Modules {other} and {layer.module_name} share one {layer.merges_into}, which cannot hold the "
                        "deltas of both; keep the adapted model as it is.",
                    )

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self._check_merge(adapter_names, safe_merge)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_merge(adapter_names, safe_merge)
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
