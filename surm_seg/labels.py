"""Label tables: what each label value means, and how a source's values become ours.

A prepared data set numbers its organs 1..n in the order of its `names`; 0 is background. Published Synapse tables print
organs in other orders, so organs are matched by name everywhere and never by position.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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

OTHER = "other"
"""Key of a label table that stands for every value it does not list; always background."""


@dataclass(frozen=True)
class LabelMap:
    """How raw label values become the values of a prepared data set.

    Args:
        names: organs of the prepared data set; organ `names[k]` is stored as k + 1.
        raw: every value the source may hold except 0, with its organ; None for what becomes background.
        others: whether it may hold other values too, which become background, instead of being refused.
    """

    names: tuple[str, ...]
    raw: Mapping[int, str | None]
    others: bool = False

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
        flat = voxels.ravel(order="K")
        values = np.unique(flat[run_ends(flat)])
        unknown = [int(v) for v in values if v != 0 and int(v) not in self.raw]
        if unknown and not self.others:
            raise BadInput(
                "unknown-label",
                f"{source} holds label values {unknown[:8]} that the label table does not list; "
                "name them in the table (an empty name makes a value background, `other:` all that it does not list).",
            )
        if values.size and values[0] < 0:
            raise BadInput("unknown-label", f"{source} holds negative label values; labels are 0 and up.")
        table = np.zeros(max(self.raw, default=0) + 1, np.uint8)
        for value, organ in self.raw.items():
            if organ is not None:
                table[value] = self.names.index(organ) + 1
        beyond = values.size and values[-1] >= len(table)
        return table[np.where(voxels < len(table), voxels, 0) if beyond else voxels]


def run_ends(flat: np.ndarray) -> np.ndarray:
    """Where the runs of equal values in a 1D array end. Label maps are long runs: ask a run, not each of its voxels."""
    return np.append(np.flatnonzero(flat[1:] != flat[:-1]), [flat.size - 1] if flat.size else []).astype(np.intp)


def read_table(path: Path, classes: Mapping[int, str] | None = None) -> LabelMap:
    """The label table of a YAML file: `value: organ` in each line, an empty organ is background. Raises BadConfig.

    A line `other:` makes every value that is not listed background; without it such a value is an error.

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
    others = OTHER in table and not table[OTHER]
    if others:
        del table[OTHER]
    if all(type(value) is int and value >= 0 for value in table):
        raw = {value: table[value] or None for value in sorted(table) if value != 0}
    elif classes is not None and all(isinstance(name, str) for name in table):
        unknown = sorted(set(table) - set(classes.values()))
        if unknown:
            raise BadConfig("label-table", f"{path} names classes that the source does not have: {unknown[:5]}.")
        raw = {value: table.get(name) or None for value, name in sorted(classes.items())}
    else:
        raise BadConfig("label-table", f"{path} must list whole numbers from 0 up, or the source's own class names.")
    return LabelMap(tuple(dict.fromkeys(organ for organ in raw.values() if organ)), raw, others)


def label_table(name: str) -> LabelMap:
    """The table `synapse`, or that of a YAML file; raises BadConfig."""
    if name == "synapse":
        return numbered(SYNAPSE)
    return read_table(Path(name))


def numbered(organs: Sequence[str]) -> LabelMap:
    """The table of a label map that numbers these organs 1, 2, ..., as prepared data and predictions do."""
    return LabelMap(tuple(organs), dict(enumerate(organs, 1)))


def predicted_organs(prediction: Path) -> tuple[str, ...]:
    """What label maps that `predict` or a run wrote number 1, 2, ...; () for others.

    A run numbers organs in its own order, whatever values the label table of its data began with.
    """
    folder = prediction if prediction.is_dir() else prediction.parent
    for record in (folder / "manifest.json", folder.parent / "run.json"):
        try:
            return tuple(map(str, json.loads(record.read_text())["labels"]))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return ()


def label_tables(ours: LabelMap, theirs: LabelMap) -> tuple[LabelMap, LabelMap]:
    """The tables of two label maps to compare, with one order of organs; raises BadConfig where the organs differ."""
    apart = sorted(set(ours.names) ^ set(theirs.names))
    if apart:
        sentence = f"The label tables of both sides must name the same organs; only one of them has {apart[:5]}."
        raise BadConfig("label-table", sentence)
    return ours, replace(theirs, names=ours.names)
