"""The README's own commands, run as a user would who copies them."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pipelines.phantom import patient

REPOSITORY = Path(__file__).resolve().parents[1]
QUICK = "--steps 4 --image_size 64 --batch_size 2 --workers 0 --precision float32 --validate_every 0"
LIVER, SPLEEN = 6, 1  # in the generated label maps


def commands(heading: str) -> str:
    """The first block of commands under a heading."""
    text = (REPOSITORY / "README.md").read_text()
    found = re.search(rf"^## {heading}\n.*?```sh\n(.*?)```", text, re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1]


def test_your_own_data_in_five_minutes(tmp_path: Path, write_nifti: Callable[..., Path]) -> None:
    """Four generated patients as pairs of files, with the label table of two lines; training shortened."""
    for folder, seeds in (("mine", range(60, 64)), ("new", range(64, 65))):
        for seed in seeds:
            made = patient(seed)
            labels = np.zeros_like(made.label)
            labels[made.label == LIVER], labels[made.label == SPLEEN] = 5, 3
            write_nifti(tmp_path / folder / "ct" / f"p{seed}.nii.gz", made.image, made.affine)
            write_nifti(tmp_path / folder / "seg" / f"p{seed}.nii.gz", labels, made.affine)
    script = commands("Your own data in five minutes").replace("FOLDER", "mine")
    script = script.replace("NEW_VOLUMES", "new/ct").replace("NEW_LABELS", "new/seg")
    script = script.replace("--output runs/mine\n", f"--output runs/mine {QUICK}\n")
    script = script.replace("surm-seg ", f"{Path(sys.executable).with_name('surm-seg')} ")
    assert QUICK in script
    done = subprocess.run(["bash", "-euc", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1 of 1 cases scored" in done.stdout
    assert (tmp_path / "data" / "mine" / "sheet.png").stat().st_size > 10_000
    assert (tmp_path / "scores" / "report.html").stat().st_size > 10_000
    assert {path.name for path in (tmp_path / "runs" / "mine" / "scores").iterdir()} >= {"report.html", "slices.csv"}
