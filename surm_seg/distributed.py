"""The processes of one run, as `torchrun` or `accelerate launch` starts them: who is first, and sums over all."""

from __future__ import annotations

import atexit
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from surm_seg.errors import BadConfig, SurmError

LONGEST_WAIT = timedelta(days=1)
"""The others wait while the first validates and predicts; a process that ends is noticed at once, by its connection."""

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Ranks:
    """This process's place among those that train one model together; alone, nothing here costs anything.

    Every method but `part` is called by all processes in the same order, and raises SurmError where one has ended.
    """

    index: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """The one that writes, validates and prints."""
        return self.index == 0

    def part(self, size: int) -> range:
        """This process's share of `size` things, contiguous and even to one."""
        return range(size * self.index // self.count, size * (self.index + 1) // self.count)

    def sum(self, value: Tensor) -> Tensor:
        """Sum of a few numbers over the processes, equal on all bit for bit; `value` where there is one."""
        if self.count == 1:
            return value
        with _all_reached():
            total = value.detach().to("cpu", copy=True)
            dist.all_reduce(total)
        return total.to(value.device)

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on any process."""
        return bool(self.sum(torch.tensor(float(flag))) > 0)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add up the gradients over the processes, in one buffer on their device."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.count == 1:
            return
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        with _all_reached():
            dist.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def told(self, ask: Callable[[], Answer]) -> Answer:
        """What the first process answers; the others wait for it."""
        answer = [ask() if self.first else None]
        if self.count > 1:
            with _all_reached():
                dist.broadcast_object_list(answer)
        return answer[0]  # pyright: ignore[reportReturnType]

    def wait(self) -> None:
        """Until every process has come this far."""
        self.any(False)


ALONE = Ranks()


def join(device: str) -> tuple[Ranks, str]:
    """Meet the other processes of this run, if a launcher started several; also the device that this one works on.

    Args:
        device: cpu, cuda or cuda:N as the user chose it.

    Raises:
        BadConfig: more processes than GPUs, or one GPU named for several processes.
    """
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count == 1 or "RANK" not in os.environ:
        return Ranks(), device
    index, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", 0))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", count))
    own = own_device(device, local, here, torch.cuda.device_count())
    if not dist.is_initialized():
        if here == count:
            loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
            for library in ("GLOO", "NCCL"):
                os.environ.setdefault(f"{library}_SOCKET_IFNAME", loopback)
        if own != "cpu":
            torch.cuda.set_device(own)
        dist.init_process_group("gloo" if own == "cpu" else "cpu:gloo,cuda:nccl", timeout=LONGEST_WAIT)
        atexit.register(dist.destroy_process_group)
    return Ranks(index, count), own


def own_device(device: str, local: int, here: int, gpus: int) -> str:
    """The device of the process numbered `local` of the `here` on this machine, which has so many GPUs."""
    if device == "cpu":
        return device
    if ":" in device:
        raise BadConfig(
            "one-gpu-for-several",
            f"--device {device} is one GPU for {here} processes; use --device cuda, or start one.",
        )
    if here > gpus:
        raise BadConfig(
            "more-processes-than-gpus",
            f"{here} processes were started on {gpus} GPUs; start at most {gpus}, or use --device cpu.",
        )
    return f"cuda:{local}"


@contextmanager
def _all_reached() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "DataLoader worker" in str(error):
            raise
        raise SurmError(
            "process-lost",
            "Another process of this run has ended; what it said, if anything, stands above. Checkpoints are intact: "
            "mend that, and go on with --resume.",
        ) from error
