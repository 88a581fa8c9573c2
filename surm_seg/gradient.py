"""Loss and gradient of a batch that is spread over processes and micro-batches, as if it had been one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from surm_seg.distributed import Ranks
from surm_seg.task import Batch, Task


class OutOfMemory(Exception):
    """A part of the batch did not fit into memory, here or on another process."""


class BatchGradient:
    """Computes a batch's loss and leaves its gradient in the parameters, on every process alike.

    A loss may be no mean of its samples (Dice over a batch is none). It is computed from the task's sums s, which do
    add over parts, and with L = loss_of(s) the chain rule takes every part by itself: dL/dw = dL/ds · Σ ds_part/dw. One
    part costs one forward pass. With more, s is summed first without gradients: one more forward pass, and memory for
    the activations of one part only.

    Random numbers of the model (dropout) are a function of seed, step, process and part; none has to be saved.

    Args:
        amp: compute in bfloat16 autocast.
    """

    def __init__(
        self, task: Task, trained: Sequence[nn.Parameter], ranks: Ranks, place: torch.device, amp: bool, seed: int
    ) -> None:
        self.task, self.trained, self.ranks = task, trained, ranks
        self.place, self.amp, self.seed = place, amp, seed
        self.draws = False
        """The model has drawn random numbers: another number of processes or parts would draw others."""

    def __call__(self, batch: Batch, step: int, parts: int) -> float:
        """Loss of the batch at a step, in so many parts; where it is not finite there is no gradient.

        Raises:
            OutOfMemory: on every process, when one has met it.
        """
        for parameter in self.trained:
            parameter.grad = None
        pieces = _split(batch, parts)
        with self._all_in_memory(), torch.set_grad_enabled(len(pieces) == 1):
            sums = [self._sums(piece, step, part) for part, piece in enumerate(pieces)]
        total = self.ranks.sum(torch.stack([s.detach() for s in sums]).sum(0)).requires_grad_()
        loss = self.task.loss_of(total)
        value = float(loss.detach())
        if math.isfinite(value):
            (slope,) = torch.autograd.grad(loss, total)
            with self._all_in_memory():
                for part, piece in enumerate(pieces):
                    (sums[0] if len(pieces) == 1 else self._sums(piece, step, part)).backward(slope)
            self.ranks.sum_gradients(self.trained)
        return value

    def _sums(self, piece: Batch, step: int, part: int) -> Tensor:
        state = np.random.SeedSequence([self.seed, 2, step, self.ranks.index, part]).generate_state(1, np.uint64)
        self._seed(int(state[0] >> 1))
        before = self._random_state()
        moved = {name: value.to(self.place) for name, value in piece.items()}
        with torch.autocast(self.place.type, torch.bfloat16, enabled=self.amp):
            sums = self.task.sums(moved)
        self.draws = self.draws or not torch.equal(before, self._random_state())
        return sums

    def _seed(self, number: int) -> None:
        """What torch.manual_seed does, without a queue of seeds and stack traces for devices that are not there."""
        torch.default_generator.manual_seed(number)
        if self.place.type == "cuda":
            torch.cuda.manual_seed_all(number)

    def _random_state(self) -> Tensor:
        states = [torch.get_rng_state()]
        if self.place.type == "cuda":
            states.append(torch.cuda.get_rng_state(self.place))
        return torch.cat(states)

    @contextmanager
    def _all_in_memory(self) -> Iterator[None]:
        short = False
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            short = True
        if self.ranks.any(short):
            raise OutOfMemory


def _split(batch: Batch, parts: int) -> list[Batch]:
    """Micro-batches along the first axis, even to one sample."""
    if parts == 1:
        return [batch]
    samples = len(next(iter(batch.values())))
    columns = {name: value.tensor_split(min(parts, samples)) for name, value in batch.items()}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _is_out_of_memory(error: Exception) -> bool:
    """CUDA's own error; on the CPU torch has none, only a RuntimeError of its allocator."""
    said = str(error)
    allocator = "DefaultCPUAllocator" in said or "not enough memory" in said
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or allocator
