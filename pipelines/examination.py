"""One case as the rules of `pipelines.plausibility` see it: its facts, and where its organs lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np

from surm_seg.cases import Case
from surm_seg.domain import Facts, facts_of_case
from surm_seg.errors import SurmError


@dataclass(frozen=True)
class Examined:
    """One case after its voxels were read.

    Args:
        name: as the terminal may show it.
        facts: None where it could not be read.
        voxels: by organ; None when unlabelled.
        centres: mean index (z, y, x) of every organ that is there.
        cut: organs that reach the first or the last slice.
        error: code and sentence of what stopped it.
    """

    name: str
    facts: Facts | None = None
    voxels: Mapping[str, int] | None = None
    centres: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)
    cut: tuple[str, ...] = ()
    error: str | None = None

    @property
    def present(self) -> list[str]:
        return [organ for organ, count in (self.voxels or {}).items() if count]

    def millilitres(self, organ: str) -> float | None:
        """Volume of an organ that is there as a whole; None otherwise, and where the spacing is unknown."""
        if organ not in self.present or organ in self.cut or self.facts is None or self.facts.spacing is None:
            return None
        return (self.voxels or {})[organ] * prod(self.facts.spacing) / 1000


def examine(case: Case, labels: Sequence[str], name: str | None = None) -> Examined:
    """Verify the digests of a prepared case and read its labels once; raises Corrupt. Costs one read of its arrays.

    Args:
        name: how to call it; default its id.
    """
    case.verify()
    facts, label = facts_of_case(case), case.label
    if label is None or case.histogram is None:
        return Examined(name or case.id, facts)
    sums = np.zeros((256, 3))
    for z, plane in enumerate(label):
        rows, columns = np.nonzero(plane)
        values = plane[rows, columns]
        weights = np.full(values.size, z), rows, columns
        sums += np.stack([np.bincount(values, weight, minlength=256) for weight in weights], axis=1)
    centres = {}
    for value, organ in enumerate(labels, 1):
        if count := case.histogram[organ]:
            z, y, x = (sums[value] / count).tolist()
            centres[organ] = (z, y, x)
    ends = {int(value) for value in np.union1d(label[0], label[-1])} - {0}
    return Examined(name or case.id, facts, case.histogram, centres, tuple(labels[value - 1] for value in sorted(ends)))


def attempt(name: str, work: Callable[[], Examined]) -> Examined:
    """What the work returns, or the case with what stopped it, so that one bad case never stops the others."""
    try:
        return work()
    except SurmError as error:
        return Examined(name, error=f"[{error.code}] {error}")
    except (OSError, MemoryError) as error:
        return Examined(name, error=f"[{type(error).__name__}] {error}; check the file, the disk and the memory")


def from_json(data: Mapping[str, Any]) -> Examined:
    """The case that `dataclasses.asdict` turned into plain values, also through a JSON file."""
    facts = data["facts"]
    if facts is not None:
        sizes = {name: facts[name] and tuple(facts[name]) for name in ("shape", "spacing")}
        facts = Facts(**{**facts, **sizes})
    centres = {organ: tuple(place) for organ, place in data["centres"].items()}
    return Examined(**{**data, "facts": facts, "centres": centres, "cut": tuple(data["cut"])})
