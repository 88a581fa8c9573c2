"""Which files belong together: by name, never by guessing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

from surm_seg.errors import BadInput
from surm_seg.volume import bare_name, is_dicom, stem, volumes_in

MAX_PUBLIC_DIGITS = 4  # img0001 numbers a volume of a data set; longer numbers may be a patient's


@dataclass(frozen=True)
class Pair:
    """A case: its name in the scores, its two label maps, and the image to draw them on."""

    case: str
    prediction: Path
    reference: Path
    image: Path | None = None


def match(prediction: Path, reference: Path, *, keep_names: bool = False) -> tuple[list[Pair], list[str]]:
    """Files that belong together, by name, and a sentence about every file that has no counterpart or several.

    Names are compared without their ending, the prefixes img, label and case, and the suffixes _0000, _gt and _seg.
    Two single files are a pair whatever their names. A case is called after the prediction with `keep_names`, after its
    number in img0001, label0001 or case0001, which identifies nobody, and else case001, ... in the order of the names.
    """
    predictions, references = _volumes(prediction), _volumes(reference)
    if prediction.is_file() and reference.is_file():
        found, left_over = {bare_name(prediction): (prediction, reference)}, []
    else:
        found, left_over = {}, []
        for name in sorted({*predictions, *references}):
            ours, theirs = predictions.get(name, []), references.get(name, [])
            if len(ours) == len(theirs) == 1:
                found[name] = (ours[0], theirs[0])
            elif len(ours) > 1 or len(theirs) > 1:
                left_over.append(f"not scored, because their names are ambiguous: {_listed([*ours, *theirs])}")
            else:
                left_over.append(f"not scored, because there is no counterpart: {(*ours, *theirs)[0]}")
    public = {name: f"case{name}" for name, files in found.items() if _is_public(name, files)}
    free = (case for case in (f"case{n:03d}" for n in count(1)) if case not in public.values())
    pairs = []
    for name, (ours, theirs) in found.items():
        case = stem(ours) if keep_names else public[name] if name in public else next(free)
        pairs.append(Pair(case, ours, theirs))
    return pairs, left_over


def with_images(pairs: Sequence[Pair], image: Path) -> tuple[list[Pair], list[str]]:
    """The pairs with their images, matched alike, and a sentence about every case and image that stays alone."""
    if not image.exists():
        raise BadInput("no-volumes", f"There is no {image}; give an image, a DICOM series or a folder of them.")
    paths = volumes_in(image) if image.is_dir() else [image]
    if len(pairs) == len(paths) == 1:
        return [replace(pairs[0], image=paths[0])], []
    images, found, left_over = _by_name(paths), [], []
    for pair in pairs:
        own = images.pop(bare_name(pair.prediction), [])
        found.append(replace(pair, image=own[0] if len(own) == 1 else None))
        if len(own) != 1:
            reason = f"their names are ambiguous: {_listed(own)}" if own else f"there is none for {pair.prediction}"
            left_over.append(f"drawn without an image, because {reason}")
    return found, left_over + [f"not drawn, because it belongs to no case: {_listed(own)}" for own in images.values()]


def _is_public(name: str, files: Iterable[Path]) -> bool:
    """Whether a number is a data set's, as img0001 says; a bare one may be a patient's."""
    numbered = name.isascii() and name.isdigit() and len(name) <= MAX_PUBLIC_DIGITS
    return numbered and any(re.match("(img|label|case)", file.name, re.IGNORECASE) for file in files)


def _volumes(path: Path) -> Mapping[str, list[Path]]:
    """The label maps that a file or folder stands for, by the part of their name that identifies the case."""
    if not path.exists():
        raise BadInput("no-volumes", f"There is no {path}; give a label map or a folder of them.")
    if path.is_file():
        return _by_name([path])
    files = [file for file in volumes_in(path) if file.is_file()]
    return _by_name(files or sorted(file for file in path.glob("*.dcm") if is_dicom(file)))


def _by_name(paths: Iterable[Path]) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in paths:
        found.setdefault(bare_name(path), []).append(path)
    return found


def _listed(paths: Iterable[Path]) -> str:
    return ", ".join(map(str, paths))
