"""`surm-seg train` with W x and the deltas' products computed apart in every adapted layer, for decision 3."""

import sys

import torch

from surm_seg.layers import SurmLinear
from surm_seg.train import main


def apart(self: SurmLinear, x: torch.Tensor) -> torch.Tensor:
    deltas = self.deltas() if self.acting() else []
    return self._apart(x, [x] * len(deltas), deltas)


if __name__ == "__main__":
    SurmLinear.forward = apart
    sys.exit(main())
