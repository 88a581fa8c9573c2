"""A checkpoint is complete or not there, and never silently wrong."""

from pathlib import Path

import pytest
import torch

from surm_seg.checkpoint import checkpoints, load_checkpoint, save_checkpoint, sweep
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
    path = save_checkpoint(tmp_path, 1, FILES, {}) / name
    content = bytearray(path.read_bytes())
    content[0 if name == "state.json" else -1] ^= 1
    path.write_bytes(content)
    with pytest.raises(Corrupt):
        load_checkpoint(path.parent)


def test_a_partial_one_is_never_chosen_and_is_swept(tmp_path: Path) -> None:
    kept = [save_checkpoint(tmp_path, step, FILES, {}) for step in (1, 2, 3)]
    (tmp_path / ".step-00000004.99.part").mkdir()
    assert checkpoints(tmp_path) == kept
    sweep(tmp_path, keep=2)
    assert sorted(tmp_path.iterdir()) == kept[1:]
    (kept[2] / "model.safetensors").unlink()
    with pytest.raises(Corrupt, match="delete it and resume again"):
        load_checkpoint(kept[2])


def test_a_folder_that_cannot_be_written_keeps_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BadInput, match="cannot be written"):
        save_checkpoint(tmp_path / "file", 1, FILES, {})
    assert (tmp_path / "file").read_text() == "in the way"
