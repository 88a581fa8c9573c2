"""Any folder: images and label maps named by two globs, and a label table."""

from __future__ import annotations

import re
from pathlib import Path

from pipelines.formats import LabelFile, Options, Source, SourceCase, label_map, require_pairs
from surm_seg.errors import BadConfig, BadInput
from surm_seg.volume import bare_name, stem

NAME = "folder"
LAYOUT = "--image 'ct/*.nii.gz' --label 'seg/*.nii.gz' --labels table.yaml"


def detect(source: Path, options: Options) -> bool:
    return source.is_dir() and "*" in (options.image or "") and "*" in (options.label or "")


def read(source: Path, options: Options) -> Source:
    """Pairs by what the `*` matched, or else by equal names without img/label/case and _0000/_gt/_seg."""
    if not options.image or not options.label or not options.labels:
        raise BadConfig("folder", f"Format folder needs three options: {LAYOUT}.")
    raw = label_map(options.labels, None, source)
    images, labels = _matched(source, options.image), _matched(source, options.label)
    if images.keys() != labels.keys():
        images, labels = _bare(images), _bare(labels)
    require_pairs([*images], [*labels], source)
    cases = tuple(SourceCase(name, images[name], (LabelFile(labels[name], raw),)) for name in sorted(images))
    return Source(NAME, raw.names, cases)


def _matched(source: Path, pattern: str) -> dict[str, Path]:
    """Files by the text that the stars stand for."""
    if Path(pattern).is_absolute() or ".." in Path(pattern).parts or "**" in pattern:
        raise BadConfig(
            "glob", f"{pattern!r} must be a pattern inside SOURCE, with * for the changing part of the name."
        )
    expression = re.compile("([^/]*)".join(map(re.escape, pattern.split("*"))))
    found: dict[str, Path] = {}
    for path in sorted(source.glob(pattern)):
        match = expression.fullmatch(path.relative_to(source).as_posix())
        if match is None or path.name.startswith("."):
            continue
        name = "_".join(match.groups()) or stem(path)
        if name in found:
            raise BadInput("ambiguous", f"{path} and {found[name]} are both called {name}; use a narrower pattern.")
        found[name] = path
    return found


def _bare(files: dict[str, Path]) -> dict[str, Path]:
    """The same files by their names without known prefixes and suffixes."""
    found: dict[str, Path] = {}
    for path in files.values():
        name = bare_name(path)
        if name in found:
            raise BadInput("ambiguous", f"{path} and {found[name]} would both be {name}; rename one.")
        found[name] = path
    return found
