"""A checkpoint is complete or not there, and never silently wrong."""

from pathlib import Path

import pytest
import torch

from surm_seg.checkpoint import checkpoints, load_checkpoint, save_checkpoint, set_damaged_aside, sweep
from surm_seg.errors import BadInput, Corrupt

FILES = {"model": {"w": torch.arange(6.0).reshape(2, 3)}, "empty": {}}


def test_round_trip(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 7, FILES, {"best": 0.5})
    files, state = load_checkpoint(path)
    assert torch.equal(files["model"]["w"], FILES["model"]["w"]) and files["empty"] == {}
    assert state["step"] == 7 and state["best"] == 0.5
    assert checkpoints(tmp_path) == [path]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 7, FILES, {"run": 1})
    assert load_checkpoint(save_checkpoint(tmp_path, 7, FILES, {"run": 2}))[1]["run"] == 2


@pytest.mark.parametrize("name", ["model.safetensors", "state.json"])
def test_a_flipped_byte_is_found(tmp_path: Path, name: str) -> None:
    path = save_checkpoint(tmp_path, 1, FILES, {"best_score": 0.5}) / name
    content = path.read_bytes()
    for position in range(len(content)):
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        with pytest.raises(Corrupt):
            load_checkpoint(path.parent)


def test_a_partial_one_is_never_chosen(tmp_path: Path) -> None:
    kept = [save_checkpoint(tmp_path, step, FILES, {}) for step in (1, 2, 3)]
    (tmp_path / ".step-00000004.99.new.part").mkdir()
    assert checkpoints(tmp_path) == kept
    sweep(tmp_path, keep=2)
    assert checkpoints(tmp_path) == kept[1:]
    (kept[2] / "model.safetensors").unlink()
    with pytest.raises(Corrupt, match="delete it and resume again"):
        load_checkpoint(kept[2])


def test_damaged_ones_are_set_aside_down_to_the_newest_sound_one(tmp_path: Path) -> None:
    one, two, three = (save_checkpoint(tmp_path, step, FILES, {}) for step in (1, 2, 3))
    assert set_damaged_aside(tmp_path) == []
    for path in (two, three):
        (path / "state.json").write_text("{}")
    assert set_damaged_aside(tmp_path) == [tmp_path / f"damaged-{path.name}" for path in (three, two)]
    assert checkpoints(tmp_path) == [one]
    (one / "state.json").unlink()
    with pytest.raises(Corrupt, match=r"No checkpoint in .* is whole \(step-00000001\)"):
        set_damaged_aside(tmp_path)
    assert checkpoints(tmp_path) == [one]


def test_a_folder_that_cannot_be_written_keeps_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BadInput, match="cannot be written"):
        save_checkpoint(tmp_path / "file", 1, FILES, {})
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_folder_that_has_vanished_is_not_made_anew(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="No such file"):
        save_checkpoint(tmp_path / "run" / "checkpoints", 1, FILES, {})
    assert not (tmp_path / "run").exists()
