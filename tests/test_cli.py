"""What every command promises: options from files and words, one-sentence errors, exit statuses."""

import importlib
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from surm_seg import cli
from surm_seg.errors import BadConfig, BadInput, Corrupt, NoDevice


@dataclass
class Example(cli.Common):
    """An example.

    Args:
        source: where from.
        kind: which.
        parts: some.
    """

    source: str = "phantom"
    kind: Literal["a", "b"] = "a"
    parts: tuple[str, ...] = ("q", "v")


@dataclass
class More:
    """More options.

    Args:
        rate: how fast.
    """

    rate: float = 0.5


def parsed(*words: str) -> Example:
    return cli.parse("prepare", Example, words, positional="source")


def test_words_dashes_flags_and_positionals() -> None:
    assert parsed("folder", "--dry-run", "--seed", "3") == Example(source="folder", dry_run=True, seed=3)
    assert parsed("--dry_run", "false", "--parts", "[q,k]") == Example(parts=("q", "k"))
    assert parsed("--quiet", "--kind=b") == Example(quiet=True, kind="b")


def test_a_config_file_is_overridden_by_options_and_overrides_defaults(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("kind: b\nseed: 5\nrate: 0.25\n")
    example, more = cli.parse("x", (Example, More), ["--config", str(path), "--seed", "6"], defaults={"rate": 0.75})
    assert (example.kind, example.seed, more.rate) == ("b", 6, 0.25)
    assert cli.parse("x", (Example, More), [], defaults={"rate": 0.75})[1].rate == 0.75


@pytest.mark.parametrize(
    "words", [["--kind", "c"], ["--seed", "many"], ["--unknown", "1"], ["--config", "absent.yaml"]]
)
def test_usage_errors_exit_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parsed(*words)
    assert stop.value.code == 2 and "Traceback" not in capsys.readouterr().err


def _raise(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "status", "shown"),
    [
        (BadConfig("c", "Mend the option."), 2, "error [c]: Mend the option.\n"),
        (BadInput("i", "Mend the file."), 3, "error [i]: Mend the file.\n"),
        (Corrupt("d", "Restore it."), 3, "error [d]: Restore it.\n"),
        (NoDevice("g", "Use the CPU."), 4, "error [g]: Use the CPU.\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (ZeroDivisionError("by zero"), 1, "error [unexpected]: ZeroDivisionError: by zero (--debug shows where)\n"),
    ],
)
def test_errors_become_a_status_and_a_sentence(
    error: BaseException, status: int, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(lambda: _raise(error)) == status
    assert capsys.readouterr().err == shown


def test_debug_shows_where() -> None:
    with pytest.raises(BadInput):
        cli.run(lambda: _raise(BadInput("i", "Mend it.")), debug=True)


@pytest.mark.parametrize("name", ["tpu", "cuda:x", "cuda:99", "cpu:1"])
def test_devices_that_are_not_here(name: str) -> None:
    with pytest.raises(NoDevice):
        cli.device_named(name)


def test_the_program_lists_its_commands_and_refuses_others() -> None:
    program = [sys.executable, "-c", "import sys; from surm_seg.cli import main; sys.exit(main())"]
    helped = subprocess.run([*program, "--help"], capture_output=True, text=True)
    assert helped.returncode == 0 and all(name in helped.stdout for name in cli.COMMANDS)
    assert subprocess.run([*program, "fly"], capture_output=True).returncode == 2


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help_and_prints_its_configuration(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    helped = subprocess.run([sys.executable, "-m", f"surm_seg.{command}", "--help"], capture_output=True, text=True)
    assert helped.returncode == 0 and "--dry_run" in helped.stdout and "--device" in helped.stdout
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"surm_seg.{command}").main(["--print_config"])
    assert ended.value.code == 0 and "seed: 0" in capsys.readouterr().out


def test_nothing_is_asked_of_the_hub() -> None:
    """Also where the hub's library was imported first, as importing surm_seg does."""
    code = """
import surm_seg, huggingface_hub.constants as hub
from surm_seg.cli import offline
offline()
assert hub.HF_HUB_OFFLINE is True
"""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    subprocess.run([sys.executable, "-c", code], check=True, env=clean)


def test_progress_is_plain_lines_when_piped_and_nothing_when_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(cli.Reporter().track("abc", "counting", 3)) == ["a", "b", "c"]
    assert capsys.readouterr().out == "counting: 3/3\n"
    quiet = cli.Reporter(quiet=True)
    quiet.say("hello")
    assert list(quiet.track("abc", "counting", 3)) == ["a", "b", "c"] and capsys.readouterr().out == ""


def test_work_goes_on_when_nobody_reads_any_more(tmp_path: Path) -> None:
    code = """
import pathlib, sys
from surm_seg import cli
def work():
    say = cli.Reporter().say
    for number in range(100_000):
        say(f"line {number}")
    pathlib.Path(sys.argv[1]).write_text("done")
sys.exit(cli.run(work))
"""
    result = tmp_path / "result"
    words = [sys.executable, "-c", code, str(result)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "line 0\n"
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() == 0
    assert result.read_text() == "done"
