"""What every command shares: options, configuration files, exit statuses, progress, and the `surm-seg` program.

Exit statuses: 0 ok, 1 failed, 2 usage, 3 bad data, 4 device, 5 some cases failed, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from surm_seg.errors import INTERRUPTED, BadConfig, BadInput, NoDevice, SurmError

SOME_CASES_FAILED = 5

COMMANDS = {
    "prepare": "turn CT volumes and labels into a prepared data set",
    "train": "fine-tune a backbone and score the held-out cases",
    "sweep": "compare methods of fine-tuning over learning rates and seeds",
    "search": "find which structure goes where, by gradients or by training",
    "reproduce": "a published benchmark, from its files to a table beside the published numbers",
    "evaluate": "score predicted label maps against references",
    "compare": "compare runs on the same cases, by paired tests",
    "doctor": "look at data or a run: is it what it should be?",
    "predict": "segment volumes with a trained run",
    "app": "look at cases, correct, compare and train in the browser",
    "convert": "turn a trained LoRA into structured deltas",
    "export": "write a run as ONNX or as a MONAI bundle",
    "bench": "measure speed and memory, as ratios side by side",
}

Item = TypeVar("Item")


@dataclass
class Common:
    """Options of every command.

    Args:
        output: where to write; each command names its default.
        device: auto, cpu, cuda or cuda:N.
        seed: every random choice follows from it.
        dry_run: check data, memory and plan; write nothing (weights may still be converted into the cache).
        quiet: print errors only.
        debug: show the traceback of an error.
    """

    output: Path | None = None
    device: str = "auto"
    seed: int = 0
    dry_run: bool = False
    quiet: bool = False
    debug: bool = False


class _Console(Console):
    """Whose reader may leave, as `head` does: the work goes on without saying more."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Reporter:
    """Lines and progress on standard output: bars on a terminal, plain lines when piped, nothing when quiet."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = _Console(quiet=quiet, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def track(self, items: Iterable[Item], title: str, total: int) -> Iterator[Item]:
        """Yield the items while showing how many of `total` are done."""
        if self.console.is_terminal and not self.console.quiet:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            with Progress(*columns, console=self.console) as bar:
                yield from bar.track(items, total=total, description=title)
            return
        last = time.monotonic()
        for done, item in enumerate(items, 1):
            yield item
            if done == total or time.monotonic() - last > 5:
                last = time.monotonic()
                self.say(f"{title}: {done}/{total}")


def offline() -> None:
    """No hub access and no usage statistics from any library, also where it was imported before us."""
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", "TRANSFORMERS_OFFLINE"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("STREAMLIT_BROWSER_GATHER_USAGE_STATS", "false")
    constants = sys.modules.get("huggingface_hub.constants")
    if constants is not None:
        constants.HF_HUB_OFFLINE = os.environ["HF_HUB_OFFLINE"] == "1"  # pyright: ignore[reportAttributeAccessIssue]


def device_named(name: str) -> str:
    """The torch device string for an option value; raises NoDevice where it is absent."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind == "cpu" and not index:
        return name
    if kind != "cuda" or (index and not index.isdigit()):
        raise NoDevice("device", f"--device {name} is unknown; choose auto, cpu, cuda or cuda:N.")
    count = torch.cuda.device_count()
    if int(index or 0) >= count:
        raise NoDevice("device", f"--device {name} is not here ({count} CUDA devices found); use --device auto.")
    return name


def check_memory(needed: int, device: str) -> int:
    """0 where `needed` bytes are free on the device; raises NoDevice where they are not."""
    import psutil
    import torch

    free = torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else psutil.virtual_memory().available
    if needed > free:
        raise NoDevice(
            "memory",
            f"A training step needs about {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free on {device}; "
            "lower --batch_size or --image_size.",
        )
    return 0


def check_space(output: Path, needed: int) -> None:
    """Raise BadInput where fewer than `needed` bytes are free on the disk of a folder, which need not exist yet."""
    place = output.absolute()
    free = shutil.disk_usage(next(folder for folder in (place, *place.parents) if folder.exists())).free
    if needed > free:
        sentence = f"{output} needs {needed / 1e9:.3g} GB and {free / 1e9:.3g} GB are free; choose another --output."
        raise BadInput("disk-full", sentence)


def _normalised(arguments: Sequence[str], flags: set[str]) -> list[str]:
    """Dashes and underscores mean the same in option names, and a flag needs no value: --dry-run = --dry_run=true."""
    result: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            name = "--" + name[2:].replace("-", "_")
            if not equals and name[2:] in flags:
                value = rest.pop(0) if rest and rest[0] in ("true", "false") else "true"
                equals = "="
            word = name + equals + value
        result.append(word)
    return result


def parse(
    command: str,
    config: type | tuple[type, ...],
    arguments: Sequence[str] | None,
    *,
    positional: str | None = None,
    defaults: dict[str, Any] | None = None,
) -> Any:
    """Command line and --config file -> an instance of the dataclass `config`, or one of each of several.

    Args:
        config: their fields become options side by side.
        positional: field that is also the first bare word of the command line.
        defaults: replace the dataclass's own defaults; the file and the options override them.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = ArgumentParser(prog=f"surm-seg {command}", description=COMMANDS.get(command, ""))
    parser.add_argument("--config", action="config", help="YAML file with any of the options below")
    configs = config if isinstance(config, tuple) else (config,)
    flags = {field.name for part in configs for field in fields(part) if field.type in (bool, "bool")}
    words = _normalised(arguments, flags)
    if positional:
        default = next(f.default for part in configs for f in fields(part) if f.name == positional)
        parser.add_argument(positional, type=str, nargs="?", default=default)
    for part in configs:
        parser.add_class_arguments(part, None, skip={positional} if positional else None)
    if defaults:
        parser.set_defaults(defaults)
    parsed: Namespace = parser.parse_args(words)
    built = tuple(part(**{f.name: parsed[f.name] for f in fields(part) if f.name in parsed}) for part in configs)
    return built if isinstance(config, tuple) else built[0]


def around_train(command: str) -> argparse.ArgumentParser:
    """The parser of a command that trains, whose other options are those of `surm-seg train`."""
    return argparse.ArgumentParser(
        prog=f"surm-seg {command}", description=COMMANDS[command],
        epilog="All other options, such as --device, go to surm-seg train.",
        allow_abbrev=False,
    )  # fmt: skip


def own_and_train(
    parser: argparse.ArgumentParser, arguments: Sequence[str], kept: Collection[str]
) -> tuple[argparse.Namespace, list[str]]:
    """A command's own options, and the words that go to `train`.

    Args:
        parser: of `around_train`.
        kept: options of `train` that the command sets itself; raises BadConfig where one is given.
    """
    own, words = parser.parse_known_args(arguments)
    for word in words:
        if word.startswith("--") and word.partition("=")[0][2:].replace("-", "_") in kept:
            command = parser.prog.rpartition(" ")[2]
            raise BadConfig(f"{command}-option", f"{word} is what {parser.prog} sets itself; leave it out.")
    return own, words


def run(body: Callable[[], int | None], *, debug: bool = False) -> int:
    """Call a command's body and turn what it raises into an exit status and one sentence on standard error."""
    try:
        with _sigterm_interrupts():
            return body() or 0
    except SurmError as error:
        if debug:
            raise
        print(f"error [{error.code}]: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        if debug:
            raise
        print(
            f"error [file]: {error.filename or 'a file'}: {error.strerror or error}; check the path.", file=sys.stderr
        )
        return BadInput.exit_status
    except Exception as error:
        if debug:
            raise
        if type(error).__name__ == "OutOfMemoryError":
            print(f"error [memory]: {error}; lower --batch_size or --image_size.".splitlines()[0], file=sys.stderr)
            return NoDevice.exit_status
        print(f"error [unexpected]: {type(error).__name__}: {error} (--debug shows where)", file=sys.stderr)
        return 1


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM acts as Ctrl-C; outside the main thread signals belong to somebody else."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main() -> int:
    """The `surm-seg` program: `surm-seg COMMAND ...` is `python -m surm_seg.COMMAND ...`."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] not in COMMANDS:
        wanted_help = bool(arguments) and arguments[0] in ("-h", "--help")
        lines = ["usage: surm-seg COMMAND [options]", ""]
        lines += [f"  {name:<10} {text}" for name, text in COMMANDS.items()]
        lines += ["", "surm-seg COMMAND --help lists a command's options."]
        print("\n".join(lines), file=sys.stdout if wanted_help else sys.stderr)
        return 0 if wanted_help else 2
    return importlib.import_module(f"surm_seg.{arguments[0]}").main(arguments[1:])
