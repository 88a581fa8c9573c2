"""Where q, k, v, out, mlp_in and mlp_out of a transformer live: names of Linear layers, and slices of fused ones."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from surm_seg.errors import BadConfig

Slices = dict[str, dict[str, list[int] | None]]
"""Regular expression of a module name -> part -> [first, end) of its output features, None for all of them."""

WHOLE = "all"
"""Name of the one part of a module that is not cut into slices."""

WHOLE_OUTPUT = (0.0, 1.0)


@dataclass(frozen=True)
class Part:
    """Where a role lives: modules whose name matches a regular expression, and the share of their outputs it owns.

    Args:
        modules: regular expression for the whole module name.
        share: (first, end) in fractions of the outputs, such as (0, 1/3) for q of a fused qkv.
    """

    modules: str
    share: tuple[float, float] = WHOLE_OUTPUT


ROLES = {
    role: Part(rf"(?:.*\.)?(?:{names})")
    for role, names in {
        "q": r"q_proj|query|q_lin",
        "k": r"k_proj|key|k_lin",
        "v": r"v_proj|value|v_lin",
        "out": r"o_proj|out_proj|out_lin|(?:cross)?attention\.output\.dense|attn\.proj",
        "mlp_in": r"fc1|lin1|gate_proj|up_proj|intermediate\.dense",
        "mlp_out": r"fc2|lin2|down_proj|\d+\.output\.dense",
    }.items()
}
"""What transformers calls them in ViT, DINOv2, CLIP, SAM, BERT, RoBERTa, DistilBERT and Llama. BERT's attention also
ends in `output.dense`; its MLP is told apart by the number of the layer before that."""

FUSED = {
    role: Part(r"(?:.*\.)?(?:qkv|c_attn)", (third / 3, (third + 1) / 3)) for third, role in enumerate(("q", "k", "v"))
}
"""The same in one projection, in -> 3 in, whose outputs are q, k and v one after the other."""


def check_pattern(pattern: str, code: str, field: str) -> None:
    """Raise BadConfig, with this code and naming this field of SurmConfig, for what is no regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise BadConfig(code, f"SurmConfig {field} {pattern!r} is no regular expression: {error}.") from error


def check(slices: Slices) -> None:
    """Raise BadConfig where `slices` is not what its type says."""
    for pattern, parts in slices.items():
        check_pattern(pattern, "adapter-slices", "slices:")
        for part, span in parts.items():
            whole = span is None or (len(span) == 2 and all(isinstance(edge, int) for edge in span))
            if not whole or not part.isidentifier():
                raise BadConfig(
                    "adapter-slices",
                    f"SurmConfig slices, part {part!r} of {pattern!r}: {span} is not [first, end) under a plain name.",
                )


def by_name(modules: Iterable[tuple[str, nn.Module]], roles: Sequence[str], owner: str) -> Slices:
    """`slices` of these roles in a model of transformers' names, fused or not.

    Raises:
        BadConfig: an unknown role, or one that matches no Linear.
    """
    unknown = [role for role in roles if role not in ROLES]
    if unknown:
        raise BadConfig("role", f"There is no role {unknown}; choose among {', '.join(ROLES)}, or give target_modules.")
    known = [
        (name, module)
        for name, module in modules
        if isinstance(module, nn.Linear)
        and (module.out_features == 3 * module.in_features or not re.fullmatch(FUSED["q"].modules, name))
    ]
    wanted = {role: [ROLES[role], FUSED[role]] if role in FUSED else [ROLES[role]] for role in roles}
    return slices(known, wanted, owner)


def slices(modules: Iterable[tuple[str, nn.Module]], wanted: Mapping[str, Sequence[Part]], owner: str) -> Slices:
    """Where the wanted roles are among the Linear modules of a model.

    Args:
        modules: name and module, as `named_modules` gives them.
        wanted: role -> where to look for it; everything found counts.
        owner: what the error calls the model.

    Raises:
        BadConfig: roles that match no Linear.
    """
    widths = {name: module.out_features for name, module in modules if isinstance(module, nn.Linear)}
    found: Slices = {}
    missing = set(wanted)
    for role, parts in wanted.items():
        for part in parts:
            names = [name for name in widths if re.fullmatch(part.modules, name)]
            if not names:
                continue
            missing.discard(role)
            if part.share == WHOLE_OUTPUT:
                found.setdefault(part.modules, {})[role] = None
                continue
            for width in {widths[name]: None for name in names}:
                same = [name for name in names if widths[name] == width]
                pattern = part.modules if len(same) == len(names) else "|".join(map(re.escape, same))
                found.setdefault(pattern, {})[role] = [round(edge * width) for edge in part.share]
    if missing:
        patterns = {role: [part.modules for part in wanted[role]] for role in wanted if role in missing}
        raise BadConfig(
            "role", f"No Linear of {owner} is named like {' or '.join(patterns)}; the patterns are {patterns}."
        )
    return found


def spans(
    name: str, module: nn.Module, width: int, slices: Slices, parts: Sequence[str] | None
) -> dict[str, tuple[int, int]]:
    """Part -> [start, stop) of a module's outputs.

    Args:
        width: number of its outputs.
        parts: which of them; None means every one that `slices` knows of, and otherwise the whole module.

    Raises:
        BadConfig: a part that is not known, or outside the outputs.
    """
    known = next((entry for pattern, entry in slices.items() if re.fullmatch(pattern, name)), {})
    wanted = list(known) if parts is None else parts
    if not wanted:
        return {WHOLE: (0, width)}
    if not known and isinstance(module, nn.Linear) and width == 3 * module.in_features:
        third = module.in_features
        known = {part: [i * third, (i + 1) * third] for i, part in enumerate("qkv")}
    missing = [part for part in wanted if part not in known]
    if missing:
        size = f" ({module.in_features} -> {width})" if isinstance(module, nn.Linear) else ""
        raise BadConfig(
            "adapter-parts",
            f"Module {name}{size} has no known part {missing}; name its output slices in SurmConfig.slices, or leave "
            "parts out to adapt the whole layer.",
        )
    found = {part: (0, width) if (span := known[part]) is None else (span[0], span[1]) for part in wanted}
    for part, (start, stop) in found.items():
        if not 0 <= start < stop <= width:
            raise BadConfig(
                "adapter-parts", f"Part {part} of module {name}: [{start}, {stop}) is outside its {width} outputs."
            )
    return found
