"""The methods of our own tuner: structures as deltas and as adapters, Houlsby's bottlenecks, and BitFit."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from surm_seg import structures
from surm_seg.errors import BadConfig
from surm_seg.peft_methods import Shapes, shapes
from surm_seg.tuner import SurmConfig

AFTER = ("out", "mlp_out")
"""Roles of the modules that Houlsby's adapters follow."""


@dataclass(frozen=True)
class Structured:
    """A method of our own tuner.

    Args:
        fields: of SurmConfig.
        ladder: shapes of the places -> options by rising number of parameters.
        places: roles that it always takes; None for those that are asked for.
    """

    fields: Mapping[str, Any]
    ladder: Callable[[Shapes], list[dict[str, Any]]]
    places: Sequence[str] | None = None

    def config(self, options: Mapping[str, Any]) -> SurmConfig:
        """The configuration without a place."""
        outer = {name: options[name] for name in ("scale", "dropout", "overrides") if name in options}
        inner = {name: value for name, value in options.items() if name not in outer}
        return SurmConfig(**self.fields, **outer, options=inner)

    def configured(
        self, model: nn.Module, roles: Sequence[str], head: Sequence[str], options: Mapping[str, Any]
    ) -> SurmConfig:
        """The configuration for a model."""
        return replace(self.config(options), parts=list(self.places or roles))

    def sizes(self, model: nn.Module, roles: Sequence[str], head: Sequence[str]) -> Shapes:
        """Shapes of the places in a model."""
        return shapes(model, self.places or roles, head)


def bitfit(model: nn.Module, **rest: Any) -> SurmConfig:
    """Train the bias of every Linear, norm and convolution of the model and nothing else (arXiv 2106.10199).

    Biases under other names, such as those of torch's own attention and recurrent layers, stay frozen.

    Args:
        **rest: further fields of SurmConfig, such as modules_to_save for a new head.

    Raises:
        BadConfig: a model without any bias.
    """
    inside = [name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    # A bias of a module that holds others is another name for one of theirs, as in BERT's prediction head.
    biased = [
        re.escape(name)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "bias", None), nn.Parameter)
        and next(module.children(), None) is None
        and not any(name.startswith(f"{outer}.") for outer in inside)
    ]
    if not biased:
        raise BadConfig("adapter-target", f"{type(model).__name__} has no bias to train; choose another method.")
    return SurmConfig(form="bias", target_modules="|".join(biased), **rest)


def _members(structure: str, sizes: Shapes) -> list[dict[str, Any]]:
    """The ladder of a structure, as far as it fits all of these sizes."""
    ladders = [list(structures.ladder(structure, *size)) for size in dict.fromkeys(sizes)]
    return [rung for rung in min(ladders, key=len) if all(rung in ladder for ladder in ladders)]


def _square_members(structure: str, sizes: Shapes) -> list[dict[str, Any]]:
    return _members(structure, [(out, out) for out, _ in sizes])


def _widths(sizes: Shapes) -> list[dict[str, Any]]:
    return [{"width": width} for width in range(1, min(out for out, _ in sizes) + 1)]


OURS = {
    "houlsby": Structured({"form": "bottleneck"}, _widths, AFTER),
    **{name: Structured({"structure": name}, partial(_members, name)) for name in structures.names()},
    **{
        f"{name}_adapter": Structured({"structure": name, "form": "adapter"}, partial(_square_members, name), AFTER)
        for name in structures.names()
    },
}
