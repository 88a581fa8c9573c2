"""What is learnt, and which samples each training step sees: a function of the seed and the step alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler, default_collate

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

    def sampling_weights(self) -> np.ndarray | None:
        """Probability of each sample at each draw; None for one permutation after another."""
        return None

    @abstractmethod
    def sample(self, index: int, rng: np.random.Generator) -> Batch:
        """One training sample; every random choice comes from rng, so that any process gives the same one."""

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """Scalar loss of a collated batch on the model's device, under autocast where the precision asks for it."""

    @abstractmethod
    def validate(self) -> Record:
        """Measurements of the model in eval mode; `score` (higher is better) chooses the best checkpoint."""


class Samples(Dataset[Batch | SurmError]):
    """A task's samples by (index, position in the whole training); the position seeds the sample's random choices."""

    def __init__(self, task: Task, seed: int) -> None:
        self.task, self.seed = task, seed

    def __getitem__(self, key: tuple[int, int]) -> Batch | SurmError:
        index, position = key
        try:
            return self.task.sample(index, np.random.default_rng([self.seed, 1, position]))
        except SurmError as error:  # raised in the main process, where its type and sentence are kept
            return error


def collated(samples: list[Batch | SurmError]) -> Batch | SurmError:
    """Samples stacked to a batch, or the first error among them."""
    return next((sample for sample in samples if isinstance(sample, SurmError)), None) or default_collate(samples)


class Order(Sampler[list[tuple[int, int]]]):
    """Which samples each step sees: a function of the seed and the step alone, so that resuming needs no state."""

    def __init__(self, task: Task, size: int, seed: int, start: int, stop: int) -> None:
        self.samples, self.weights = len(task), task.sampling_weights()
        self.size, self.seed, self.steps = size, seed, range(start, stop)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in self.steps:
            positions = range(step * self.size, (step + 1) * self.size)
            if self.weights is not None:
                drawn = np.random.default_rng([self.seed, 0, step]).choice(self.samples, self.size, p=self.weights)
                yield list(zip(drawn.tolist(), positions, strict=True))
            else:
                yield [(int(self._permutation(p // self.samples)[p % self.samples]), p) for p in positions]

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, 0, epoch]).permutation(self.samples)
