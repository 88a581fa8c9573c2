"""The loss against MONAI's, which the recipes are defined by, and the law that lets a batch be spread out."""

import pytest
import torch
from monai.losses.dice import DiceCELoss

from pipelines.loss import DiceCE


def drawn(classes: int, batch: int = 3, absent: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(classes)
    logits = 3 * torch.randn(batch, classes, 7, 5, generator=random, dtype=torch.float64)
    labels = torch.randint(0, classes, (batch, 1, 7, 5), generator=random).double()
    if absent is not None:
        labels[labels == absent] = 0
    return logits.requires_grad_(), labels


@pytest.mark.parametrize("weight", [0.0, 0.5, 0.8, 1.0])
@pytest.mark.parametrize(("classes", "absent"), [(2, None), (9, None), (9, 4)])
def test_it_is_monais_to_sixteen_digits_with_its_gradient(weight: float, classes: int, absent: int | None) -> None:
    """MONAI's own to_onehot_y counts voxels in float32, so that only labels made one-hot before show 16 digits."""
    logits, labels = drawn(classes, absent=absent)
    options = {"include_background": True, "softmax": True, "squared_pred": True, "batch": True}
    options |= {"smooth_nr": 1e-5, "smooth_dr": 1e-5, "lambda_dice": weight, "lambda_ce": 1 - weight}
    one_hot = torch.nn.functional.one_hot(labels[:, 0].long(), classes).movedim(3, 1).double()
    theirs = DiceCELoss(**options)(logits, one_hot)
    (expected,) = torch.autograd.grad(theirs, logits)
    ours = DiceCE(weight)(logits, labels)
    (found,) = torch.autograd.grad(ours, logits)
    torch.testing.assert_close(ours, theirs, rtol=1e-15, atol=2e-16)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-17)
    torch.testing.assert_close(DiceCELoss(**options, to_onehot_y=True)(logits, labels), ours, rtol=5e-8, atol=0)


def test_the_sums_of_parts_add_up_and_the_losses_of_parts_do_not() -> None:
    logits, labels = drawn(9, batch=6)
    loss = DiceCE(0.5)
    parts = [slice(0, 1), slice(1, 4), slice(4, 6)]
    total = torch.stack([loss.sums(logits[part], labels[part]) for part in parts]).sum(0)
    torch.testing.assert_close(loss.loss_of(total), loss(logits, labels), rtol=1e-14, atol=0)
    mean = torch.stack([loss(logits[part], labels[part]) * (part.stop - part.start) / 6 for part in parts]).sum()
    assert abs(float((mean - loss(logits, labels)).detach())) > 1e-3


def test_single_precision_loses_little() -> None:
    logits, labels = drawn(5)
    exact, single = DiceCE(0.5)(logits, labels), DiceCE(0.5)(logits.float(), labels.float())
    assert float((exact - single).detach().abs()) < 1e-6
