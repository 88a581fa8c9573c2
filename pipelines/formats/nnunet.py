"""nnU-Net and Medical Segmentation Decathlon: imagesTr/, labelsTr/ and dataset.json.

imagesTs with labelsTs become the test split; test images whose labels are kept secret are left out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipelines.formats import LabelFile, Options, Source, SourceCase, label_map, require_pairs, volumes
from surm_seg.errors import BadInput
from surm_seg.labels import LabelMap

NAME = "nnunet"
LAYOUT = "imagesTr/, labelsTr/ and dataset.json"
CHANNEL = "_0000"  # nnU-Net numbers the channels of a case; CT has one


def detect(source: Path, options: Options) -> bool:
    return (source / "imagesTr").is_dir() and (source / "dataset.json").is_file()


def read(source: Path, options: Options) -> Source:
    """Labels from dataset.json in either style, unless --labels says otherwise; several channels are BadInput."""
    try:
        description: dict[str, Any] = json.loads((source / "dataset.json").read_text())
        known = _classes(description["labels"])
        channels = description.get("channel_names", description.get("modality", {"0": "CT"}))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(
            "layout", f"{source / 'dataset.json'} states no labels that can be used; see {LAYOUT}."
        ) from error
    if len(channels) != 1:
        raise BadInput(
            "channels", f"{source} has {len(channels)} channels per case; only single-channel CT can be used."
        )
    raw = label_map(options.labels, known, source) if options.labels else LabelMap(tuple(known.values()), known)
    cases = _cases(source, "Tr", raw)
    if (source / "labelsTs").is_dir():
        cases += _cases(source, "Ts", raw, split="test")
    return Source(NAME, raw.names, tuple(cases))


def _classes(labels: dict[str, Any]) -> dict[int, str]:
    """{value: name} without background; version 1 writes {"1": "liver"}, version 2 {"liver": 1}."""
    version_1 = all(key.isdigit() for key in labels)
    pairs = [(int(key), str(value)) if version_1 else (int(value), key) for key, value in labels.items()]
    if "ignore" in dict(pairs).values():
        raise ValueError("an ignore label is neither organ nor background")
    return {value: name for value, name in sorted(pairs) if value != 0}


def _cases(source: Path, part: str, raw: LabelMap, split: str | None = None) -> list[SourceCase]:
    images: dict[str, Path] = {}
    for name, path in volumes(source / f"images{part}").items():
        if name.endswith("_0001"):
            raise BadInput("channels", f"{path} is a second channel; only single-channel CT can be used.")
        images[name.removesuffix(CHANNEL)] = path
    labels = volumes(source / f"labels{part}")
    require_pairs([*images], [*labels], source)
    return [SourceCase(name, images[name], (LabelFile(labels[name], raw),), split) for name in sorted(images)]
