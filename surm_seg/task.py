"""What is learnt, and which samples each training step sees: a function of the seed and the step alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Sampler, default_collate

from surm_seg.distributed import Ranks
from surm_seg.errors import SurmError

Batch = dict[str, Tensor]
Record = dict[str, float]


class Task(ABC):
    """What is learnt: a model, samples, a loss, and a score to choose the best checkpoint by."""

    model: nn.Module
    """Parameters that require gradients are trained and saved; the others are the caller's to restore."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of training samples."""

    def name(self, index: int) -> str:
        """What an error message calls a sample."""
        return str(index)

    def sampling_weights(self) -> np.ndarray | None:
        """Probability of each sample at each draw; None for one permutation after another."""
        return None

    @abstractmethod
    def sample(self, index: int, rng: np.random.Generator) -> Batch:
        """One training sample; every random choice comes from rng, so that any process gives the same one."""

    def collate(self, samples: list[Batch]) -> Batch:
        """Samples as one batch: stacked; a task whose samples differ in size pads them here."""
        return default_collate(samples)

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """Scalar loss of a collated batch on the model's device, under autocast where the precision asks for it."""

    def sums(self, batch: Batch) -> Tensor:
        """What the loss is computed from, (k,): numbers that add up when parts of a batch are put together.

        Thus a batch may be spread over processes and micro-batches without changing its loss. As given here it suits
        losses that are a mean over samples; any other loss overrides it together with `loss_of`.
        """
        loss = self.loss(batch)
        samples = len(next(iter(batch.values())))
        return torch.stack([loss * samples, torch.full_like(loss, samples)])

    def loss_of(self, sums: Tensor) -> Tensor:
        """Scalar loss of the batch whose parts' sums add up to these."""
        return sums[0] / sums[1]

    @abstractmethod
    def validate(self) -> Record:
        """Measurements of the model in eval mode; `score` (higher is better) chooses the best checkpoint."""


def collated(task: Task, samples: list[Batch | SurmError]) -> Batch | SurmError:
    """A task's samples as a batch, or the first error among them."""
    whole = [sample for sample in samples if not isinstance(sample, SurmError)]
    if len(whole) < len(samples):
        return next(sample for sample in samples if isinstance(sample, SurmError))
    return task.collate(whole)


def step_memory(model: nn.Module, sample: Any, samples: int) -> int:
    """Bytes of a training step: weights, gradient and optimiser state, and what each sample saves for backward.

    Args:
        sample: arguments of the model for one sample, on its device: a tuple, or a dict of names.
        samples: computed at once.
    """
    saved = 0

    def count(value: Tensor) -> Tensor:
        nonlocal saved
        saved += value.numel() * value.element_size()
        return value

    with torch.autograd.graph.saved_tensors_hooks(count, lambda value: value):
        model(**sample) if isinstance(sample, Mapping) else model(*sample)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return weights + 3 * trained + samples * saved


class Order(Sampler[list[tuple[int, int]]]):
    """Which samples each step sees: a function of the seed and the step alone, so that resuming needs no state.

    Args:
        size: samples per step over all processes, of which each sees its own part.
    """

    def __init__(self, task: Task, size: int, seed: int, steps: range, ranks: Ranks) -> None:
        self.samples, self.weights = len(task), task.sampling_weights()
        self.size, self.seed, self.steps, self.ranks = size, seed, steps, ranks
        self._shuffled: tuple[int, np.ndarray] = (-1, np.empty(0))

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """For each step (index, position in the whole training) of its samples."""
        for step in self.steps:
            positions = range(step * self.size, (step + 1) * self.size)
            if self.weights is not None:
                drawn = np.random.default_rng([self.seed, 0, step]).choice(self.samples, self.size, p=self.weights)
                batch = list(zip(drawn.tolist(), positions, strict=True))
            else:
                batch = [(int(self._permutation(p // self.samples)[p % self.samples]), p) for p in positions]
            yield [batch[i] for i in self.ranks.part(self.size)]

    def _permutation(self, epoch: int) -> np.ndarray:
        """Made once for all of its samples, which follow one another."""
        if self._shuffled[0] != epoch:
            self._shuffled = epoch, np.random.default_rng([self.seed, 0, epoch]).permutation(self.samples)
        return self._shuffled[1]
