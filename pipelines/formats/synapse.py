"""Synapse multi-organ (BTCV "beyond the cranial vault"): `img/img0001.nii.gz`, `label/label0001.nii.gz`.

The 30 public cases carry the 18/12 split that TransUNet introduced and SAMed uses; a few of the 18 become validation.
"""

from __future__ import annotations

import random
from pathlib import Path

from pipelines.formats import LabelFile, Options, Source, SourceCase, label_map, require_pairs, volumes
from surm_seg.errors import BadInput

NAME = "synapse"
LAYOUT = "img/img0001.nii.gz with label/label0001.nii.gz"

# Raw label values of the challenge.
CLASSES = {
    1: "spleen",
    2: "right_kidney",
    3: "left_kidney",
    4: "gallbladder",
    5: "oesophagus",
    6: "liver",
    7: "stomach",
    8: "aorta",
    9: "inferior_vena_cava",
    10: "portal_and_splenic_vein",
    11: "pancreas",
    12: "right_adrenal_gland",
    13: "left_adrenal_gland",
}
BENCHMARK = frozenset((*range(1, 11), *range(21, 41)))
TEST = frozenset((1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38))
VAL_CASES = 3  # of the 18, drawn by seed: every choice is made on them


def detect(source: Path, options: Options) -> bool:
    return (source / "img").is_dir() and (source / "label").is_dir()


def read(source: Path, options: Options) -> Source:
    """Cases `case0001`, ...; the benchmark split when every id belongs to the benchmark."""
    pairs = numbered(source)
    raw = label_map(options.labels or "synapse", CLASSES, source)
    splits: dict[int, str] = {}
    if BENCHMARK.issuperset(pairs):
        train = sorted(set(pairs) - TEST)
        val = random.Random(options.seed).sample(train, min(VAL_CASES, len(train) // 4))
        splits = {n: "test" if n in TEST else "val" if n in val else "train" for n in pairs}
    cases = tuple(
        SourceCase(f"case{n:04d}", image, (LabelFile(label, raw),), splits.get(n))
        for n, (image, label) in pairs.items()
    )
    held_out = frozenset(f"case{n:04d}" for n in TEST) if splits else frozenset()
    return Source(NAME, raw.names, cases, public=True, benchmark_test=held_out)


def numbered(source: Path) -> dict[int, tuple[Path, Path]]:
    """Image and label map by case number; raises BadInput for other names and incomplete pairs."""
    found: dict[str, dict[str, Path]] = {}
    for kind in ("img", "label"):
        found[kind] = {name.removeprefix(kind): path for name, path in volumes(source / kind).items()}
        wrong = [path.name for number, path in found[kind].items() if not (number.isascii() and number.isdigit())]
        if wrong:
            raise BadInput(
                "layout", f"{source / kind} holds {wrong[0]}, expected {kind}0001.nii.gz; rename or remove it."
            )
    require_pairs([*found["img"]], [*found["label"]], source)
    return {int(number): (image, found["label"][number]) for number, image in sorted(found["img"].items())}
