"""Label tables: what each label value means, and how a source's values become ours.

A prepared data set numbers its organs 1..n in the order of its `names`; 0 is background. Published Synapse tables print
organs in other orders, so organs are matched by name everywhere and never by position.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from surm_seg.errors import BadConfig, BadInput

SYNAPSE = (
    "spleen",
    "right_kidney",
    "left_kidney",
    "gallbladder",
    "liver",
    "stomach",
    "aorta",
    "pancreas",
)
"""The eight organs of the Synapse benchmark; label value = position + 1."""


@dataclass(frozen=True)
class LabelMap:
    """How raw label values become the values of a prepared data set.

    Args:
        names: organs of the prepared data set; organ `names[k]` is stored as k + 1.
        raw: every value the source may hold except 0, with its organ; None for what becomes background.
    """

    names: tuple[str, ...]
    raw: Mapping[int, str | None]

    def __post_init__(self) -> None:
        if len(set(self.names)) != len(self.names) or not 1 <= len(self.names) <= 255:
            raise BadConfig("label-table", f"A label table needs 1 to 255 different organ names; got {self.names}.")
        missing = set(self.raw.values()) - set(self.names) - {None}
        if missing:
            raise BadConfig(
                "label-table", f"The label table maps to organs it does not list: {sorted(map(str, missing))}."
            )

    def apply(self, voxels: np.ndarray, source: str) -> np.ndarray:
        """Raw integer labels of any shape -> uint8 of the same shape; raises BadInput for a value outside the table."""
        values = np.unique(voxels)
        unknown = [int(v) for v in values if v != 0 and int(v) not in self.raw]
        if unknown:
            raise BadInput(
                "unknown-label",
                f"{source} holds label values {unknown[:8]} that the label table does not list; "
                "name them in the table (an empty name makes a value background).",
            )
        if values.size and values[0] < 0:
            raise BadInput("unknown-label", f"{source} holds negative label values; labels are 0 and up.")
        table = np.zeros(int(values[-1]) + 1 if values.size else 1, np.uint8)
        for value in values:
            organ = self.raw.get(int(value))
            if organ is not None:
                table[value] = self.names.index(organ) + 1
        return table[voxels]
