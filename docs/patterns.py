"""The pattern of every structure, drawn by the code that computes it: `python docs/patterns.py docs/patterns.png`.

One random member of each registered family, square (16 x 16) and rectangular (16 x 24), with default options
(low rank with rank 2).
"""

from __future__ import annotations

import sys

import matplotlib
import torch

import surm_seg.structures as family

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SIZES = ((16, 16), (16, 24))


def main(output: str) -> None:
    torch.manual_seed(0)
    names = family.names()
    figure, axes = plt.subplots(
        len(SIZES), len(names), figsize=(2.1 * len(names), 4.2), layout="constrained", squeeze=False
    )
    for row, size in zip(axes, SIZES, strict=True):
        for axis, name in zip(row, names, strict=True):
            structure = family.make(name, *size, **({"rank": 2} if name == "low_rank" else {}))
            member = structure.dense({n: torch.randn(shape) for n, shape in structure.generators.items()})
            limit = float(member.abs().quantile(0.98))
            axis.imshow(member, cmap="RdBu", vmin=-limit, vmax=limit)
            axis.set_title(f"{name}\n{size[0]} × {size[1]}, {structure.parameters} parameters", fontsize=8)
            axis.set_axis_off()
    figure.savefig(output, dpi=110)


if __name__ == "__main__":
    main(sys.argv[1])
