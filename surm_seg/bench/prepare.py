"""`surm-seg bench prepare`: CT volumes and labels into arrays, by `surm-seg prepare` and by MONAI's transforms."""

from __future__ import annotations

import gzip
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import nibabel as nib
import numpy as np
from scipy.ndimage import gaussian_filter

from surm_seg import cli
from surm_seg.bench.comparison import Method, markdown, measured, save
from surm_seg.bench.meter import environment, threads
from surm_seg.bench.organs import ORGANS, SPACING_MM, label_maps
from surm_seg.cases import Dataset
from surm_seg.errors import BadConfig, SurmError
from surm_seg.prepare import PrepareConfig, prepare

WINDOW_HU = (-175.0, 250.0)  # what MONAI's examples for abdominal CT map to 0..1
TOLERANCE = 1e-5  # MONAI scales in float32
AIR_HU, TISSUE_HU, CONTRAST_HU, NOISE_HU = -1000, 40, 12, 12
NOISE_SIGMA = (0.3, 0.7, 0.7)  # voxels along (z, y, x); reconstruction smooths noise in the plane

OURS, PARALLEL, MONAI = "surm-seg prepare", "surm-seg prepare, parallel", "MONAI"


@dataclass
class Config(cli.Common):
    """Measure prepare against MONAI's transforms on the same .nii.gz files; exit status 1 where the arrays differ.

    Args:
        output: folder for prepare.json and, while it runs, for the volumes; default `bench`.
        cases: how many volumes, each with a label map of eight organs.
        shape: voxels along (z, y, x).
        repeats: measurements of each row.
        workers: processes of the parallel row; one per processor by default.
        threads: of torch, which MONAI uses; one per processor by default.
    """

    cases: int = 4
    shape: list[int] = field(default_factory=lambda: [60, 512, 512])
    repeats: int = 5
    workers: int | None = None
    threads: int | None = None


def run(config: Config) -> int:
    """Generate the volumes, measure, compare the arrays, print the table."""
    workers = config.workers or os.cpu_count() or 1
    least = min(config.cases, config.repeats, workers, config.threads or 1, *config.shape)
    if least < 1 or len(config.shape) != 3:
        sentence = "--shape must be three numbers; --cases, --repeats, --workers and --threads must be 1 or more."
        raise BadConfig("bench-option", sentence)
    output, reporter = config.output or Path("bench"), cli.Reporter(config.quiet)
    size = "x".join(map(str, config.shape))
    if config.dry_run:
        reporter.say(f"would prepare {config.cases} volumes of {size} voxels with surm-seg and MONAI")
        return 0
    output.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=output) as folder, threads(config.threads), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MONAI warns of its own use of what it deprecates
        where = environment("cpu")
        source = Path(folder) / "source"
        megabytes = write_source(source, config) / 1e6
        rows = measured(_methods(source, workers), check, config.repeats, config.seed, reporter)
    results = {"benchmark": "prepare", "options": asdict(config), "environment": where, "rows": rows}
    save(results, output)
    reporter.say(f"{config.cases} volumes, {size} voxels, {megabytes:.1f} MB packed; all arrays agree.\n")
    reporter.say(markdown(results, ("numpy", "nibabel", "monai")))
    return 0


def write_source(folder: Path, config: Config) -> int:
    """Write img/img0001.nii.gz, label/label0001.nii.gz, ... and labels.yaml; returns the bytes of the packed files."""
    depth, height, width = config.shape
    affine = np.diag([*reversed(SPACING_MM), 1.0])  # RAS+: two axes must be flipped
    written = 0
    for number in range(config.cases):
        _, label = label_maps(len(ORGANS), (depth, height, width), config.seed + number)
        for kind, voxels in (("img", _scanned(label, config.seed + number)), ("label", label)):
            image = nib.Nifti1Image(voxels.T, affine)
            image.header.set_xyzt_units("mm")
            path = folder / kind / f"{kind}{number + 1:04d}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            written += path.write_bytes(gzip.compress(image.to_bytes(), compresslevel=6, mtime=0))
    (folder / "labels.yaml").write_text("".join(f"{value}: {organ}\n" for value, organ in enumerate(ORGANS, 1)))
    return written


def check(found: Mapping[str, Path]) -> None:
    """Compare what a round has written, then remove it; raises SurmError where an array differs."""
    for case in Dataset.open(found[OURS]).cases:
        image, label = case.image, case.label
        assert label is not None
        low, high = WINDOW_HU
        expected = {"image": np.clip((image - low) / (high - low), 0, 1), "label": label}
        for kind, ours in expected.items():
            # MONAI's axes are (channel, x, y, z).
            theirs = np.load(found[MONAI] / f"{case.id}_{kind}.npy")[0].T
            if theirs.shape != ours.shape or not np.abs(ours - theirs).max() <= TOLERANCE:
                sentence = f"{kind} of {case.id} is not the same by {OURS} and by {MONAI}"
                raise SurmError("bench-differs", f"{sentence}; find out which is wrong before timing either.")
        parallel = Dataset.open(found[PARALLEL]).case(case.id)
        if (parallel.image_sha256, parallel.label_sha256) != (case.image_sha256, case.label_sha256):
            raise SurmError("bench-differs", f"{case.id} is not the same by one process and by several; find out why.")
    for folder in found.values():
        shutil.rmtree(folder)


def _methods(source: Path, workers: int) -> list[Method]:
    what = "digests, HU int16 and labels uint8, synced to disk"
    return [
        Method(OURS, f"{what}; 1 process", partial(_by_ours, source, 1)),
        Method(PARALLEL, f"{what}; {workers} processes", partial(_by_ours, source, workers), processes=workers),
        Method(MONAI, "0..1 float32 and labels uint8; 1 process", _by_monai(source)),
    ]


def _scanned(label: np.ndarray, seed: int) -> np.ndarray:
    """HU of a noisy scan of these organs in a body, int16, axes (z, y, x)."""
    rng = np.random.default_rng(seed)
    y, x = np.meshgrid(*(np.linspace(-1, 1, side) for side in label.shape[1:]), indexing="ij", sparse=True)
    body = (y / 0.7) ** 2 + (x / 0.9) ** 2 < 1
    noise = gaussian_filter(rng.standard_normal(label.shape, dtype=np.float32), NOISE_SIGMA)
    hu = np.where(body, TISSUE_HU + CONTRAST_HU * label.astype(np.float32), AIR_HU) + noise * (NOISE_HU / noise.std())
    return np.rint(hu).astype(np.int16)


def _by_ours(source: Path, workers: int) -> Path:
    """The whole command, in this process."""
    folder = Path(mkdtemp(dir=source.parent))
    labels = str(source / "labels.yaml")
    options = PrepareConfig(source=str(source), format="synapse", labels=labels, output=folder, workers=workers)
    prepare(options, cli.Reporter(quiet=True))
    return folder


def _by_monai(source: Path) -> Callable[[], Path]:
    """What a script with MONAI's dictionary transforms does; its reader's and transforms' defaults."""
    from monai.transforms.compose import Compose
    from monai.transforms.intensity.dictionary import ScaleIntensityRanged
    from monai.transforms.io.dictionary import LoadImaged
    from monai.transforms.spatial.dictionary import Orientationd
    from monai.transforms.utility.dictionary import EnsureChannelFirstd

    keys = ["image", "label"]
    transforms = Compose([
        LoadImaged(keys),
        EnsureChannelFirstd(keys),
        Orientationd(keys, axcodes="LPS"),
        ScaleIntensityRanged(["image"], *WINDOW_HU, 0.0, 1.0, clip=True),
    ])  # fmt: skip

    def compute() -> Path:
        folder = Path(mkdtemp(dir=source.parent))
        for image in sorted((source / "img").iterdir()):
            number = image.name[3:7]
            done: Any = transforms({"image": image, "label": source / "label" / f"label{number}.nii.gz"})
            np.save(folder / f"case{number}_image.npy", done["image"].numpy())
            np.save(folder / f"case{number}_label.npy", done["label"].numpy().astype(np.uint8))
        return folder

    return compute
