"""The generated demonstration data set: the word `phantom` instead of a folder."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from pipelines import phantom
from pipelines.formats import LabelFile, Options, Source, SourceCase, label_map
from pipelines.formats.synapse import CLASSES
from surm_seg.errors import BadConfig
from surm_seg.volume import replacing

NAME = "phantom"
LAYOUT = "the word `phantom`, which generates patients"
SEED_STRIDE = 10_000
PRETRAINING_SEEDS = range(1_000_000, 2_000_000)  # patients that the embedded backbone was trained on: never data


def detect(source: Path, options: Options) -> bool:
    return source == Path("phantom")


def read(source: Path, options: Options) -> Source:
    """Patients in OUTPUT/source, in BTCV layout: the last quarter test, the two before them validation."""
    count = options.cases
    if not 1 <= count < SEED_STRIDE or options.seed < 0:
        raise BadConfig("cases", f"Phantoms need --cases 1 to {SEED_STRIDE - 1} and --seed 0 or more.")
    folder = options.output / "source"
    raw = label_map(options.labels or "synapse", CLASSES, folder)
    test = 0 if count < 2 else max(1, count // 4)
    val = 0 if count < 3 else min(2, max(1, count // 8))
    splits = ["train"] * (count - test - val) + ["val"] * val + ["test"] * test
    cases = []
    for n, split in enumerate(splits, 1):
        seed = patient_seed(options.seed, n)
        image, label = (folder / kind / f"{kind}{n:04d}.nii.gz" for kind in ("img", "label"))
        there = _seed_file(folder, n).exists() and _seed_file(folder, n).read_text() == str(seed)
        generate = None if there and image.exists() and label.exists() else partial(_generate, folder, n, seed)
        cases.append(SourceCase(f"case{n:04d}", image, (LabelFile(label, raw),), split, generate))
    return Source(NAME, raw.names, tuple(cases), public=True)


def patient_seed(seed: int, n: int) -> int:
    """Patient n of --seed S has seed 10,000 S + n, stepping over the seeds of pre-training."""
    start = SEED_STRIDE * seed
    return start + n + (len(PRETRAINING_SEEDS) if start >= PRETRAINING_SEEDS.start else 0)


def _generate(folder: Path, n: int, seed: int) -> None:
    """Write patient n, then its seed: files without their seed beside them are not trusted."""
    record = _seed_file(folder, n)
    record.parent.mkdir(parents=True, exist_ok=True)
    record.unlink(missing_ok=True)
    phantom.write(folder, [seed], first_id=n)
    with replacing(record) as file:
        file.write(str(seed).encode())


def _seed_file(folder: Path, n: int) -> Path:
    return folder / "seed" / f"seed{n:04d}.txt"
