"""The pictures of the documentation, drawn from what a run wrote: `python docs/pictures.py RUN CASE OUTPUT`.

Axial slices, radiological display (the patient's right on the left side), soft-tissue window; prediction filled,
reference outlined. The slices are spread evenly over those with most organs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import yaml

from surm_seg.cases import Dataset
from surm_seg.volume import read_labels

matplotlib.use("Agg")
import matplotlib.pyplot as plt

WINDOW = (-125, 275)
COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#ffffff")
"""Okabe and Ito's colour-blind-safe palette, with white for black."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("case")
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    dataset = Dataset.open(yaml.safe_load((options.run / "config.yaml").read_text())["data"])
    case = dataset.case(options.case)
    found = read_labels(options.run / "predictions" / f"{case.id}.nii.gz").lps()
    assert case.label is not None, "the picture compares with a reference"
    organs = np.array([len(np.unique(plane)) for plane in case.label])
    rich = np.flatnonzero(organs >= organs.max() - 3)
    slices = rich[np.linspace(len(rich) - 1, 0, 5).round().astype(int)[1:4]]
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.4), facecolor="black")
    for axis, z in zip(axes, slices, strict=True):
        draw(axis, case.image[z], found[z], case.label[z], len(dataset.labels), case.spacing)
    handles = [plt.Line2D([], [], color=c, lw=6) for c in COLOURS[: len(dataset.labels)]]
    names = [name.replace("_", " ") for name in dataset.labels]
    figure.legend(handles, names, ncols=8, loc="lower center", frameon=False, labelcolor="white", fontsize=9)
    figure.subplots_adjust(0.005, 0.08, 0.995, 0.99, 0.01)
    figure.savefig(options.output, dpi=100, facecolor="black")


def draw(
    axis: plt.Axes, image: np.ndarray, found: np.ndarray, true: np.ndarray, organs: int, spacing: tuple[float, ...]
) -> None:
    """One slice (y, x) with its masks, in millimetres."""
    height, width = image.shape[0] * spacing[1], image.shape[1] * spacing[2]
    extent = (0.0, width, height, 0.0)
    axis.imshow(image, cmap="gray", vmin=WINDOW[0], vmax=WINDOW[1], extent=extent)
    rows = (np.arange(image.shape[0]) + 0.5) * spacing[1]
    columns = (np.arange(image.shape[1]) + 0.5) * spacing[2]
    for organ, colour in enumerate(COLOURS[:organs], 1):
        filled = np.zeros((*found.shape, 4))
        filled[found == organ] = matplotlib.colors.to_rgba(colour, 0.45)
        axis.imshow(filled, extent=extent, interpolation="nearest")
        if (true == organ).any():
            axis.contour(columns, rows, true == organ, levels=[0.5], colors=[colour], linewidths=1.2)
    axis.text(0.02, 0.5, "R", color="white", transform=axis.transAxes, va="center")
    axis.text(0.98, 0.5, "L", color="white", transform=axis.transAxes, va="center", ha="right")
    axis.axis("off")


if __name__ == "__main__":
    main()
