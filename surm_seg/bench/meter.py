"""Clocks and memory of one step, on a CPU or a GPU, and where they were read."""

from __future__ import annotations

import gc
import os
import platform
import random
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from surm_seg.errors import SurmError
from surm_seg.provenance import provenance

Step = Callable[[], object]
"""What is measured. It returns all that should stay alive, and so be counted, until it has ended."""

KNOWN_BYTES = 1 << 20

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler announces every start and stop on standard error


@dataclass
class Times:
    """Seconds of each round, in order: by the clock, and of processor time over all threads."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def interleaved(steps: Mapping[str, Step], device: str, rounds: int, seed: int) -> dict[str, Times]:
    """Times of all steps, each once per round and in a new order, so that a slow moment hits them alike."""
    order, times = list(steps), {name: Times() for name in steps}
    shuffle = random.Random(seed).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            wall, cpu = _timed(steps[name], device)
            times[name].wall.append(wall)
            times[name].cpu.append(cpu)
    return times


def peak_bytes(step: Step, device: str) -> int:
    """The most memory that torch held during a step beyond what it held before."""
    return _peak_on_gpu(step, device) if device.startswith("cuda") else _peak_on_cpu(step)


def check_meter(device: str) -> None:
    """Raises SurmError where `peak_bytes` does not see a known allocation."""
    measured = peak_bytes(lambda: torch.empty(KNOWN_BYTES, dtype=torch.uint8, device=device), device)
    if measured != KNOWN_BYTES:
        raise SurmError(
            "memory-meter",
            f"Memory cannot be measured with torch {torch.__version__}: {KNOWN_BYTES} bytes read as {measured}.",
        )


def environment(device: str) -> dict[str, Any]:
    """Where and how figures were taken, for the record beside them."""
    return {
        **provenance(),
        "processor": torch.cuda.get_device_name(device) if device.startswith("cuda") else _processor(),
        "threads": torch.get_num_threads(),
        "device": device,
        "command": shlex.join(sys.argv),
    }


def matrix_rate(device: str, dtype: torch.dtype, rounds: int = 9) -> float:
    """GFLOP/s of the matrix product that a ViT-B's MLP makes of 1024 tokens, the best of some rounds.

    The roof above every model here that is made of such products.
    """
    tokens, channels, hidden = 1024, 768, 3072
    x, weight = (torch.randn(rows, channels, device=device).to(dtype) for rows in (tokens, hidden))
    fastest = min(_timed(lambda: nn.functional.linear(x, weight), device)[0] for _ in range(rounds))
    return 2 * tokens * channels * hidden / fastest / 1e9


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """torch computes with this many threads, one per processor by default, until the block ends."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or os.cpu_count() or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def no_collection() -> Iterator[None]:
    """Python's garbage is collected now and not again in the block: neither its time nor its memory is a step's."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _timed(step: Step, device: str) -> tuple[float, float]:
    """Seconds by the clock (on a GPU its own) and of processor time."""
    if not device.startswith("cuda"):
        wall, cpu = time.perf_counter(), time.process_time()
        step()
        return time.perf_counter() - wall, time.process_time() - cpu
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        cpu = time.process_time()
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000, time.process_time() - cpu


def _peak_on_cpu(step: Step) -> int:
    """The highest running sum over torch's own record of allocations and releases."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = step()
    del kept
    recorded: Any = profiler.profiler.kineto_results if profiler.profiler else None
    changes = sorted((e for e in recorded.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    return max(accumulate(e.nbytes() for e in changes), default=0)


def _peak_on_gpu(step: Step, device: str) -> int:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    kept = step()
    torch.cuda.synchronize(device)
    del kept
    return torch.cuda.max_memory_allocated(device) - before


def _processor() -> str:
    """The processor's product name where the system tells it (Linux), else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
