"""Label tables: what each label value means, and how a source's values become ours.

A prepared data set numbers its organs 1..n in the order of its `names`; 0 is background. Published Synapse tables print
organs in other orders, so organs are matched by name everywhere and never by position.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

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


def read_table(path: Path, classes: Mapping[int, str] | None = None) -> LabelMap:
    """The label table of a YAML file: `value: organ` in each line, an empty organ is background. Raises BadConfig.

    Args:
        classes: the source's own class name by raw value; the file may then name classes instead of values.
    """
    try:
        table = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        sentence = f"{path} cannot be read as a label table; write one line `value: organ` per label."
        raise BadConfig("label-table", sentence) from error
    if not isinstance(table, dict) or not all(organ is None or isinstance(organ, str) for organ in table.values()):
        raise BadConfig("label-table", f"{path} is no label table; write one line `value: organ` per label.")
    if all(type(value) is int and value >= 0 for value in table):
        raw = {value: table[value] or None for value in sorted(table) if value != 0}
    elif classes is not None and all(isinstance(name, str) for name in table):
        unknown = sorted(set(table) - set(classes.values()))
        if unknown:
            raise BadConfig("label-table", f"{path} names classes that the source does not have: {unknown[:5]}.")
        raw = {value: table.get(name) or None for value, name in sorted(classes.items())}
    else:
        raise BadConfig("label-table", f"{path} must list whole numbers from 0 up, or the source's own class names.")
    return LabelMap(tuple(dict.fromkeys(organ for organ in raw.values() if organ)), raw)
