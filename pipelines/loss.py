"""Cross-entropy and Dice of label maps, from sums that add up over any parts of a batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

SMOOTH = 1e-5
"""Added to numerator and denominator of every Dice, as in SAMed: a class that is nowhere and not predicted has 1."""


@dataclass(frozen=True)
class DiceCE:
    """`dice_weight` · (1 - mean Dice over classes) + (1 - `dice_weight`) · cross-entropy, of a whole batch.

    Dice is taken over the voxels of the whole batch, background included, of softmax probabilities, squared in the
    denominator (Milletari et al., arXiv 1606.04797, eq. for D). In one part it equals MONAI's DiceCELoss(to_onehot_y,
    softmax, squared_pred, batch=True).
    """

    dice_weight: float

    def __call__(
        self, logits: Float[Tensor, "batch classes height width"], labels: Shaped[Tensor, "batch 1 height width"]
    ) -> Float[Tensor, ""]:
        """Scalar loss of a batch that is there at once."""
        return self.loss_of(self.sums(logits, labels))

    def sums(
        self, logits: Float[Tensor, "batch classes height width"], labels: Shaped[Tensor, "batch 1 height width"]
    ) -> Float[Tensor, " sums"]:
        """Per class Σ p·t, Σ p² and Σ t, then the summed cross-entropy and the number of voxels."""
        wanted = labels.long()
        truth = wanted == torch.arange(logits.shape[1], device=logits.device)[:, None, None]
        chance, everywhere = logits.softmax(1), (0, 2, 3)
        entropy = nn.functional.cross_entropy(logits, wanted[:, 0], reduction="sum")
        return torch.cat([
            (chance * truth).sum(everywhere),
            chance.square().sum(everywhere),
            truth.sum(everywhere).to(logits.dtype),
            torch.stack([entropy, torch.full_like(entropy, labels.numel())]),
        ])  # fmt: skip

    def loss_of(self, sums: Float[Tensor, " sums"]) -> Float[Tensor, ""]:
        """The loss of the batch whose parts' sums add up to these."""
        overlap, predicted, present = sums[:-2].reshape(3, -1)
        dice = (2 * overlap + SMOOTH) / (predicted + present + SMOOTH)
        return self.dice_weight * (1 - dice).mean() + (1 - self.dice_weight) * sums[-2] / sums[-1]
