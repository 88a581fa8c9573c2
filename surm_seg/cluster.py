"""Batches on many machines: an engine whose items are tasks of a Ray cluster.

All machines share a file system and have this package installed. An item whose machine is lost is worked on again.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from surm_seg import cli
from surm_seg.errors import BadConfig, BadInput
from surm_seg.lock import held, sweep
from surm_seg.pool import Engine, Outcome, attempt

MAX_RETRIES = 3  # of one item: after that many lost machines, it may be the item that brings them down
REACH_S = 10  # Ray itself would ask an address for minutes
PATIENCE_S = 300  # without any machine to work on; an autoscaler has started one by then
STORE_BYTES = 2**27  # Ray's own choice is a third of the memory; what is sent here are paths


@dataclass
class Options(cli.Common):
    """Where a command works on its cases.

    Args:
        engine: local is this machine; ray makes every case a task of a Ray cluster, whose machines share the file
            system and have this package.
        ray_address: HOST:PORT of a running cluster, or auto for the one this machine belongs to; default is to start
            Ray on this machine, for as long as the command runs.
    """

    engine: Literal["local", "ray"] = "local"
    ray_address: str | None = None

    def shared(self, path: Path) -> Path:
        """The path as tasks are given it: they may run in another folder of another machine."""
        return path.absolute() if self.engine == "ray" else path


@contextmanager
def engine_of(
    options: Options, local: Engine, *written: Path, workers: int | None = None, gpu: bool = False
) -> Iterator[Engine]:
    """The engine that the options name; what had to be started for it ends with the block.

    Args:
        local: the engine of this machine.
        written: folders the work writes to; what lost machines left there (`.*.part`) is removed at the end.
        workers: tasks at a time of a Ray that is started here; default is one per CPU.
        gpu: give each task a GPU, where the cluster has any.

    Raises:
        BadConfig: an address without --engine ray, or Ray is not installed.
        BadInput: no cluster answers at the address, or it has no machine left.
    """
    if options.engine == "local":
        if options.ray_address is not None:
            raise BadConfig("ray-address", "--ray_address names a Ray cluster; give --engine ray with it.")
        yield local
        return
    with ExitStack() as ending:
        for folder in written:
            ending.callback(sweep, folder)
        ending.enter_context(joined(options.ray_address, workers))
        yield partial(_spread, gpu)


@contextmanager
def joined(address: str | None, workers: int | None, otherwise: str = "use --engine local") -> Iterator[None]:
    """A part of the cluster at an address, or of a Ray that is started on this machine, for as long as the block runs.

    Args:
        workers: CPUs of a Ray that is started here; default is all.
        otherwise: what an error advises where Ray cannot be started.

    Raises:
        BadConfig: Ray is not installed.
        BadInput: no cluster answers at the address, or Ray cannot be started here.
    """
    with ExitStack() as ending:
        _connect(address, workers, otherwise, ending)
        yield


def _connect(address: str | None, workers: int | None, otherwise: str, ending: ExitStack) -> None:
    """Join the cluster at an address, or start Ray on this machine and nowhere else."""
    cli.offline()
    if address is None:
        # The only way to keep Ray's servers to loopback; it has no effect where Ray was imported before.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        scratch = ending.enter_context(_scratch())
        where: dict[str, Any] = {"num_cpus": workers, "include_dashboard": False, "object_store_memory": STORE_BYTES}
        where |= {"address": "local", "_temp_dir": scratch, "_node_ip_address": "127.0.0.1"}
    else:
        where = {"address": address}
    try:
        import ray
    except ModuleNotFoundError as error:
        sentence = f"This needs Ray, and the package {error.name} is missing: pip install 'surm-seg[cluster]'."
        raise BadConfig("cluster-extra", sentence) from error
    terminated = signal.getsignal(signal.SIGTERM)
    try:
        if address is not None:
            _reach(address)
        ray.init(**where, log_to_driver=False, logging_level=logging.ERROR)
        ending.callback(ray.shutdown)
    except (OSError, RuntimeError, ValueError) as error:  # nothing there, another version, not an address
        what, mend = f"No Ray cluster can be used at {address}", "check --ray_address"
        if address is None:
            what, mend = "Ray cannot be started on this machine", otherwise
        raise BadInput("ray-address", f"{what} ({str(error).split('. ')[0]}); {mend}.") from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, terminated)  # Ray takes it, and would exit with another status


@contextmanager
def _scratch() -> Iterator[str]:
    """A temporary folder for Ray's own files; those of commands that were killed are removed."""
    for lock in Path(tempfile.gettempdir()).glob("ray-*/.lock"):
        with suppress(BadInput, OSError), held(lock.parent, "used"):
            shutil.rmtree(lock.parent, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder, held(Path(folder), "used"):
        yield folder


def _reach(address: str) -> None:
    """Raises ConnectionError where no server of Ray's protocol answers."""
    import grpc

    if address == "auto" or os.environ.get("RAY_USE_TLS") == "1":  # known to be here; needs certificates
        return
    with grpc.insecure_channel(address.removeprefix("ray://")) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=REACH_S)
        except grpc.FutureTimeoutError as error:
            raise ConnectionError(f"no answer in {REACH_S} s") from error


def _spread(gpu: bool, work: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Outcome]:
    """An engine on the cluster that this process has joined. Retries are ours, not Ray's, which does not tell them."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    gpus = int(gpu and ray.cluster_resources().get("GPU", 0) >= 1)
    task, sent = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(attempt), ray.put(work)
    running = {task.remote(sent, number, item): Outcome(number) for number, item in enumerate(items)}
    while running:
        done, _ = ray.wait(list(running), timeout=PATIENCE_S)
        if not done and ray.cluster_resources().get("CPU", 0) < 1:
            sentence = f"The cluster has had no machine with a CPU for {PATIENCE_S} s; finished cases are kept."
            raise BadInput("ray-machines", f"{sentence} Start one, and repeat the command.")
        for ref in done:
            lost = running.pop(ref)
            try:
                outcome = replace(ray.get(ref), retries=lost.retries)
            except RayTaskError as error:
                raise cause(error) from error
            except RayError as error:  # its process, or the whole machine, is gone
                if lost.retries < MAX_RETRIES:
                    again = task.remote(sent, lost.number, items[lost.number])
                    running[again] = replace(lost, retries=lost.retries + 1)
                    continue
                sentence = f"its process was lost {MAX_RETRIES + 1} times ({type(error).__name__}); check the memory."
                outcome = replace(lost, error=BadInput("machine-lost", sentence))
            yield outcome


def cause(error: Any) -> Exception:
    """What is behind an error of Ray: what a task raised, or the error itself."""
    raised = getattr(error, "cause", error)
    if isinstance(raised, ImportError) or "failed to import" in str(error):
        return BadConfig("ray-package", "A machine of the cluster lacks this version of surm-seg; install it on all.")
    return raised
