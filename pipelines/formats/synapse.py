"""Synapse multi-organ (BTCV "beyond the cranial vault"): `img/img0001.nii.gz`, `label/label0001.nii.gz`.

The 30 public cases carry the 18/12 split that TransUNet introduced and SAMed uses; a few of the 18 become validation.
"""

from __future__ import annotations

import random
from pathlib import Path

from pipelines.formats import LabelFile, Options, Source, SourceCase, label_map, require_pairs, volumes
from surm_seg.errors import BadInput
from surm_seg.volume import stem

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
MAX_PUBLIC_DIGITS = 4
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
        SourceCase(_name(n), image, (LabelFile(label, raw),), splits.get(n)) for n, (image, label) in pairs.items()
    )
    held_out = frozenset(map(_name, TEST)) if splits else frozenset()
    public = all(_is_public(n, image) for n, (image, _) in pairs.items())
    return Source(NAME, raw.names, cases, public, benchmark_test=held_out)


def numbered(source: Path) -> dict[int, tuple[Path, Path]]:
    """Image and label map by case number; raises BadInput for other names, doubles and incomplete pairs."""
    found: dict[str, dict[int, Path]] = {"img": {}, "label": {}}
    for kind, files in found.items():
        for name, path in volumes(source / kind).items():
            digits = name.removeprefix(kind)
            if not (digits.isascii() and digits.isdigit()):
                expected = f"{kind}0001.nii.gz"
                raise BadInput("layout", f"{source / kind} holds {path.name}, not {expected}; rename or remove it.")
            number = int(digits)
            if number in files:
                raise BadInput("ambiguous", f"{path} and {files[number].name} are both number {number}; remove one.")
            files[number] = path
    images, labels = ({_name(number): path for number, path in found[kind].items()} for kind in found)
    require_pairs([*images], [*labels], source)
    return {number: (image, found["label"][number]) for number, image in sorted(found["img"].items())}


def _name(number: int) -> str:
    return f"case{number:04d}"


def _is_public(number: int, image: Path) -> bool:
    """Whether the number names a volume of a data set; a longer one may be a patient's."""
    return number in BENCHMARK or len(stem(image).removeprefix("img")) <= MAX_PUBLIC_DIGITS
