"""What goes where: the configuration of the tuner, saved beside every adapter."""

from __future__ import annotations

import enum
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft.config import PeftConfig
from peft.utils import CONFIG_NAME
from torch import nn

from surm_seg import roles
from surm_seg.adapters import FORMS
from surm_seg.errors import BadConfig
from surm_seg.updates import Site

NOTHING = "none"
"""In the place of a structure's name: this place gets none."""


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
            structure starts from its default options, everything else that is not named stays. The structure "none"
            leaves the place alone.
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
        roles.check(self.slices)
        if self.parts == []:
            raise BadConfig("adapter-parts", "SurmConfig parts is empty; leave it out to adapt whole layers.")
        for key, entry in self.overrides.items():
            unknown = sorted(set(entry) - {"structure", "options", "scale"})
            if unknown:
                raise BadConfig(
                    "adapter-overrides",
                    f"SurmConfig override {key!r} sets {unknown}; it can set structure, options and scale.",
                )
            if entry.get("structure") == NOTHING and len(entry) > 1:
                raise BadConfig(
                    "adapter-overrides", f"SurmConfig override {key!r} leaves its places alone; set nothing else there."
                )
            roles.check_pattern(key, "adapter-overrides", "override")
        for scale in (self.scale, *(entry.get("scale", 1) for entry in self.overrides.values())):
            if scale == 0 or not math.isfinite(scale):
                raise BadConfig("adapter-scale", f"SurmConfig scale {scale} would switch the delta off for ever.")
        if not 0 <= self.dropout < 1:
            raise BadConfig("adapter-dropout", f"SurmConfig dropout {self.dropout} is not in [0, 1).")

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """As PEFT does, but without sorting what is matched in order."""
        super().save_pretrained(str(save_directory), **kwargs)
        path = Path(save_directory) / CONFIG_NAME
        saved = json.loads(path.read_text())
        path.write_text(json.dumps({**saved, "slices": self.slices, "overrides": self.overrides}, indent=2))

    def sites(self, name: str, module: nn.Module) -> list[Site]:
        """What this configuration puts on a module, with `NOTHING` for a part that it leaves alone.

        Raises:
            BadConfig: naming the module, where it does not fit.
        """
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
        entry = next((e for key, e in self.overrides.items() if names_place(key, name, part)), {})
        options = {} if "structure" in entry else self.options
        chosen = {"structure": self.structure, "options": options, "scale": self.scale, **entry}
        return Site(part, start, stop, **chosen, dropout=self.dropout)


def names_place(key: str, module: str, part: str) -> bool:
    """Whether the key of an override means this part of this module."""
    return any(re.fullmatch(rf"(?:.*\.)?(?:{key})", name) for name in (module, f"{module}.{part}"))
