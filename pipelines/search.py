"""Which structure where, without training: project the gradient on every family, and spend a budget where it pays most.

With a delta D that starts at 0, a small step changes the loss by <G, D>, G being the gradient of the loss with respect
to the weight. All families are cones: of their members of one length, the nearest to -G lowers the loss most, and a
step along it, as long as that member M is, by |M|^2. That is what the family captures of |G|^2. The squares are those
of the loss itself, so that places compare with each other as they are; nothing is normalised.

This says what a first step along the gradient could do. It knows nothing of the steps after it, of Adam's own scale for
each generator, or of products such as low_rank, whose first step moves one factor only.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from surm_seg import structures
from surm_seg.distributed import ALONE
from surm_seg.errors import BadConfig, SurmError
from surm_seg.gradient import BatchGradient
from surm_seg.layers import SurmLinear
from surm_seg.surm_config import NOTHING
from surm_seg.task import Batch, Task

STEP = 1.5
"""Of a family's members, each has at least so many times the parameters of the one before it."""


@dataclass(frozen=True)
class Place:
    """Where a delta can go: a Linear, or a slice of a fused one.

    Args:
        part: role, or "all" for a whole module without one.
        gradient: mean of the loss's over the batches, float64, with respect to the weight of this place.
    """

    module: str
    part: str
    gradient: Float[Tensor, "out in"]

    @property
    def size(self) -> tuple[int, int]:
        out_features, in_features = self.gradient.shape
        return out_features, in_features

    @property
    def energy(self) -> float:
        """|G|^2."""
        return float(self.gradient.square().sum())

    @property
    def pattern(self) -> str:
        """What `SurmConfig.overrides` calls this place and no other."""
        return rf"^{re.escape(self.module)}\.{re.escape(self.part)}"


@dataclass(frozen=True)
class Member:
    """A structure that a place can be given.

    Args:
        captured: |M|^2 of its nearest member M to the gradient, of the place's `energy`.
    """

    structure: str
    options: Mapping[str, Any]
    parameters: int
    captured: float

    @property
    def entry(self) -> dict[str, Any]:
        """What `SurmConfig.overrides` says of it."""
        return {"structure": self.structure, "options": dict(self.options)}


def places(task: Task) -> list[Place]:
    """The places that the task's deltas have now, whose own structures do not matter, with gradients of 0.

    Raises:
        BadConfig: there is none.
    """
    found = [
        Place(layer.module_name, site.part, torch.zeros(site.stop - site.start, layer.base_layer.in_features))
        for layer, site in _sites(task)
    ]
    if not found:
        sentence = "No Linear of the task's model has a structured delta; choose --roles that it has."
        raise BadConfig("search-places", sentence)
    return found


def with_gradients(task: Task, batches: Iterable[Batch], *, seed: int, device: str) -> list[Place]:
    """`places`, with the mean gradient over the batches, of the model as it is before any training.

    The model computes in float32 and in eval mode, without its deltas. Memory: a gradient and a float64 sum for each
    weight that has deltas.

    Raises:
        SurmError: a loss is not finite.
    """
    places(task)  # for what it refuses
    model: Any = task.model.to(device).eval()
    weights = {id(layer): layer.base_layer.weight for layer, _ in _sites(task)}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for weight in weights.values():
        weight.requires_grad_()
    sums = {number: torch.zeros_like(weight, dtype=torch.float64) for number, weight in weights.items()}
    gradient = BatchGradient(task, list(weights.values()), ALONE, torch.device(device), False, seed)
    step = 0
    with model.disable_adapter():
        for weight in weights.values():
            weight.requires_grad_()
        for step, batch in enumerate(batches, 1):
            if not math.isfinite(loss := gradient(batch, step, 1)):
                raise SurmError("loss-not-finite", f"The loss of batch {step} is {loss}; look at its data.")
            for number, weight in weights.items():
                if weight.grad is not None:  # a layer that this batch did not call
                    sums[number] += weight.grad
    return [
        Place(layer.module_name, site.part, (sums[id(layer)][site.start : site.stop] / step).cpu())
        for layer, site in _sites(task)
    ]


def _sites(task: Task) -> Iterator[tuple[SurmLinear, Any]]:
    for layer in task.model.modules():
        if isinstance(layer, SurmLinear):
            for site, _, _ in layer.placed():
                yield layer, site


def members(place: Place, families: Sequence[str], budget: int) -> list[Member]:
    """What each family captures at a place, with at most `budget` parameters; its members grow by `STEP`."""
    return [member(place, structure) for family in families for structure in thinned(family, *place.size, budget)]


def member(place: Place, structure: structures.Structure) -> Member:
    """What a structure captures at a place."""
    nearest = structure.dense(structure.project(place.gradient))
    lost = float((place.gradient - nearest).square().sum())
    return Member(structure.name, structure.options, structure.parameters, max(0.0, place.energy - lost))


def thinned(family: str, out_features: int, in_features: int, budget: int) -> Iterator[structures.Structure]:
    """Of a family's ladder, members that grow by `STEP`, within the budget."""
    least = 0
    for options in structures.ladder(family, out_features, in_features):
        structure = structures.make(family, out_features, in_features, **options)
        if structure.parameters > budget:
            return
        if structure.parameters >= least:
            least = STEP * structure.parameters
            yield structure


def least(place: Place, families: Sequence[str]) -> int:
    """The fewest parameters that any member has at a place."""
    smallest = (next(structures.ladder(family, *place.size)) for family in families)
    return min(
        structures.make(family, *place.size, **options).parameters
        for family, options in zip(families, smallest, strict=True)
    )


def allotted(choices: Sequence[Sequence[Member]], budget: int) -> list[Member | None]:
    """A member for every place, None for nothing, which together have at most `budget` parameters.

    Greedy: again and again the exchange, at any place, that captures most for each parameter more and is within the
    budget. For concave choices that is the optimum up to the last exchange.
    """
    chosen: list[Member | None] = [None] * len(choices)
    left = budget
    while True:
        best, rate = None, 0.0
        for n, members in enumerate(choices):
            now = chosen[n]
            parameters, captured = (now.parameters, now.captured) if now else (0, 0.0)
            for member in members:
                more, gain = member.parameters - parameters, member.captured - captured
                if gain > 0 and more <= left:
                    this = gain / more if more > 0 else math.inf
                    if this > rate:
                        best, rate = (n, member, more), this
        if best is None:
            return chosen
        n, chosen[n], more = best
        left -= more


def uniform(choices: Sequence[Sequence[Member]], family: str, budget: int) -> list[Member] | None:
    """The largest member of a family that every place can be given within the budget; None where there is none."""
    by_options = [{json.dumps(m.options): m for m in members if m.structure == family} for members in choices]
    common = [[own[key] for own in by_options] for key in by_options[0] if all(key in own for own in by_options)]
    fitting = [alike for alike in common if sum(member.parameters for member in alike) <= budget]
    return max(fitting, key=lambda alike: sum(member.parameters for member in alike), default=None)


def overrides(found: Sequence[Place], chosen: Sequence[Member | None]) -> dict[str, dict[str, Any]]:
    """`SurmConfig.overrides` that gives every place its member, and nothing where it has none."""
    return {
        place.pattern: {"structure": NOTHING} if member is None else member.entry
        for place, member in zip(found, chosen, strict=True)
    }
