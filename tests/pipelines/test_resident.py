"""One backbone for many adapters and for prompts: equal to loading each run by itself, and loaded once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pipelines import resident as module
from pipelines.inference import Trained, load_run
from pipelines.phantom import patient
from pipelines.resident import Resident
from surm_seg import prepare, train
from surm_seg.errors import BadConfig, BadInput, Corrupt
from surm_seg.volume import Grid

WORDS = ["--image_size", "64", "--precision", "float32", "--workers", "0", "--batch_size", "2", "--quiet"]
WORDS += ["--validate_on", "none", "--score_on", "train", "--warmup", "0", "--learning_rate", "0.02", "--steps", "4"]


@pytest.fixture(scope="module")
def patients() -> tuple[np.ndarray, np.ndarray]:
    """HU and labels of a generated patient, 11 slices of 64 x 64 around the kidneys, axes (z, y, x)."""
    made = patient(77)
    grid = Grid.from_affine(made.image.shape, made.affine)
    image, labels = (grid.lps(voxels)[4:15, ::2, ::2] for voxels in (made.image, made.label))
    return np.ascontiguousarray(image), np.ascontiguousarray(labels)


@pytest.fixture(scope="module")
def volume(patients: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    return patients[0]


@pytest.fixture(scope="module")
def runs(
    patients: tuple[np.ndarray, np.ndarray], tmp_path_factory: pytest.TempPathFactory, write_nifti: Callable[..., Path]
) -> dict[str, Path]:
    """Two structures on the shipped backbone, one of them with another input size, and one on random weights."""
    folder = tmp_path_factory.mktemp("resident")
    for kind, voxels in zip(("img", "label"), patients, strict=True):
        write_nifti(folder / "source" / kind / f"{kind}0005.nii.gz", voxels[4:8].transpose(2, 1, 0))
    assert (
        prepare.main([str(folder / "source"), "--format", "synapse", "--output", str(folder / "data"), "--quiet"]) == 0
    )
    options = {
        "circulant": ["--structure", "circulant"],
        "kronecker": ["--structure", "kronecker", "--decoder", "frozen", "--image_size", "96"],
        "random": ["--weights", "random"],
    }
    for name, words in options.items():
        output = str(folder / name)
        assert train.main([*WORDS, "--data", str(folder / "data"), "--output", output, *words]) == 0
    return {name: folder / name for name in options}


def test_runs_answer_as_if_each_had_been_loaded_alone_in_whatever_order(
    runs: dict[str, Path], volume: np.ndarray
) -> None:
    resident = Resident.of(runs["circulant"])
    alone = {name: load_run(runs[name], "cpu") for name in ("circulant", "kronecker")}
    few = volume[3:6]
    expected = {name: trained(few) for name, trained in alone.items()}
    assert expected["circulant"].any() and not np.array_equal(expected["circulant"], expected["kronecker"])
    for name in ("circulant", "kronecker", "circulant", "kronecker"):
        assert np.array_equal(resident.use(runs[name])(few), expected[name])
        ours, theirs = resident.use(runs[name]).model.state_dict(), alone[name].model.state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs) and ours.keys() == theirs.keys()


def test_the_backbone_is_in_memory_once(runs: dict[str, Path], volume: np.ndarray) -> None:
    """Of the encoder's products a second run adds those that its adapter changed, and prompts share the others."""
    resident = Resident()
    first = resident.use(runs["circulant"])
    places = {p.data_ptr() for p in first.model.parameters()}
    second = resident.use(runs["kronecker"])
    own = {name for name, p in second.model.named_parameters() if p.data_ptr() not in places}
    kinds = {name.split(".")[-2] for name in own if name.startswith("image_encoder.blocks") and name.endswith("weight")}
    assert kinds == {"qkv"}
    resident.prompt(np.zeros((1, 64, 64), np.int16), 0, [(3, 3, 1)])
    asked, _ = resident._promptable()
    assert asked.image_encoder.blocks[0].mlp.lin1.weight.data_ptr() in places
    assert resident.use(runs["circulant"]) is first  # a change over is a look-up


def test_a_run_that_was_trained_on_is_loaded_again(runs: dict[str, Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs["circulant"], tmp_path / "run"))
    resident = Resident()
    before = resident.use(run)
    for name in ("adapter", "run.json", "config.yaml"):
        source, target = runs["kronecker"] / name, run / name
        if target.is_dir():
            shutil.rmtree(target)
            shutil.copytree(source, target)
        else:
            shutil.copy(source, target)
    assert resident.use(run) is not before and resident.use(run).input.image_size == 96


def test_what_cannot_be_used_is_a_sentence_and_the_others_stay(runs: dict[str, Path], tmp_path: Path) -> None:
    resident = Resident()
    resident.use(runs["circulant"])
    with pytest.raises(BadInput, match="random was trained on another backbone than sam_tiny"):
        resident.use(runs["random"])
    unfinished = Path(shutil.copytree(runs["circulant"], tmp_path / "unfinished"))
    facts = json.loads((unfinished / "run.json").read_text())
    del facts["adapter_sha256"]
    (unfinished / "run.json").write_text(json.dumps(facts))
    with pytest.raises(BadInput, match="no finished adapter"):
        resident.use(unfinished)
    damaged = Path(shutil.copytree(runs["circulant"], tmp_path / "damaged"))
    (damaged / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(Corrupt, match="has changed"):
        resident.use(damaged)
    for wrong in (tmp_path, tmp_path / "absent"):
        with pytest.raises(BadInput, match="is not a run folder"):
            resident.use(wrong)
        with pytest.raises(BadInput, match="is not a run folder"):
            Resident.of(wrong)
    assert isinstance(resident.use(runs["circulant"]), Trained)


def test_random_weights_are_one_backbone_and_answer_no_prompts(runs: dict[str, Path], volume: np.ndarray) -> None:
    resident = Resident.of(runs["random"])
    assert np.array_equal(resident.use(runs["random"])(volume[:2]), load_run(runs["random"], "cpu")(volume[:2]))
    with pytest.raises(BadInput, match="another backbone"):
        resident.use(runs["circulant"])
    assert not resident.prompts
    with pytest.raises(BadConfig, match="no prompts"):
        resident.prompt(volume, 0, [(3, 3, 1)])


def test_the_longest_unused_run_goes_when_memory_is_short(
    runs: dict[str, Path], volume: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    resident = Resident()
    monkeypatch.setattr(module, "MOST_RUN_BYTES", 1)
    first = resident.use(runs["circulant"])
    resident.use(runs["kronecker"])
    again = resident.use(runs["circulant"])
    assert again is not first and np.array_equal(again(volume[:2]), first(volume[:2]))


def test_progress_is_told_and_an_exception_ends_the_work(runs: dict[str, Path], volume: np.ndarray) -> None:
    resident, alone, told = Resident(), load_run(runs["circulant"], "cpu"), []
    found = resident.segment(runs["circulant"], volume[:9], told.append, keep_largest=True)
    assert told == [0.5, 1.0] and np.array_equal(found, alone(volume[:9], keep_largest=True))  # 8 slices at a time
    found = resident.segment(runs["circulant"], volume[4:6], told.append, tta="flip")
    assert told[2:] == [0.5, 1.0] and np.array_equal(found, alone(volume[4:6], tta="flip"))

    def cancel(share: float) -> None:
        told.append(share)
        raise InterruptedError

    with pytest.raises(InterruptedError):
        resident.segment(runs["circulant"], volume, cancel)
    assert told[4:] == [0.5]


@pytest.fixture(scope="module")
def asked() -> Resident:
    return Resident()


@pytest.fixture
def passes(asked: Resident) -> Iterator[list[int]]:
    """One entry for every pass of an image through the encoder that answers prompts."""
    made: list[int] = []

    def count(encoder: nn.Module, pixels: tuple[torch.Tensor], embedding: torch.Tensor) -> None:
        made.append(len(pixels[0]))

    model, _ = asked._promptable()
    hook = model.image_encoder.register_forward_hook(count)
    yield made
    hook.remove()


def test_the_second_prompt_on_a_slice_does_not_run_the_encoder(
    asked: Resident, passes: list[int], volume: np.ndarray
) -> None:
    first = asked.prompt(volume, 5, [(30, 30, 1)])
    assert (first.shape, first.dtype, passes) == (volume.shape[1:], np.bool_, [1])
    asked.prompt(volume, 5, box=(15, 15, 40, 45))
    assert np.array_equal(asked.prompt(volume.copy(), 5, [(30, 30, 1)]), first) and passes == [1]
    asked.prompt(volume, 6, [(30, 30, 1)])
    asked.prompt(volume, 5, [(30, 30, 1)])
    assert passes == [1, 1]
    other = volume.copy()
    other[4, 25:30, 25:30] += 90  # the slice below, which the encoder sees as well
    asked.prompt(other, 5, [(30, 30, 1)])
    assert passes == [1, 1, 1]


def test_few_embeddings_are_kept_when_memory_is_short(
    asked: Resident, passes: list[int], volume: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_EMBEDDING_BYTES", 2 * 4 * 128 * 24 * 24)
    for z in (0, 1, 2, 1, 2, 0):
        asked.prompt(volume, z, [(30, 30, 1)])
    assert len(passes) == 4  # 0, 1, 2, and 0 again


def test_prompts_find_what_they_point_at(asked: Resident, patients: tuple[np.ndarray, np.ndarray]) -> None:
    """On a patient that no training saw, and coarser than any: a box finds most of an organ, a point somewhat less."""
    rng, (image, labels) = np.random.default_rng(0), patients
    dice: dict[str, list[float]] = {"box": [], "point": []}
    for z in (2, 5, 8):
        for value in np.unique(labels[z])[1:]:
            wanted = labels[z] == value
            ys, xs = np.nonzero(wanted)
            if len(xs) < 20:
                continue
            spot = int(rng.integers(len(xs)))
            box = [int(number) for number in (xs.max(), ys.min(), xs.min(), ys.max())]  # any two opposite corners
            answers = {"box": asked.prompt(image, z, box=box)}
            answers["point"] = asked.prompt(image, z, [(int(xs[spot]), int(ys[spot]), 1)])
            for kind, found in answers.items():
                dice[kind].append(2 * np.count_nonzero(found & wanted) / (found.sum() + wanted.sum()))
    assert np.mean(dice["box"]) > 0.75 and np.mean(dice["point"]) > 0.5


@pytest.mark.parametrize(
    ("z", "points", "box"), [(0, [], None), (11, [(3, 3, 1)], None), (0, [(3, 999, 1)], None), (0, [], (-1, 0, 5, 5))]
)
def test_a_prompt_outside_the_slice_is_refused(
    asked: Resident, volume: np.ndarray, z: int, points: list[tuple[int, int, int]], box: tuple[int, ...] | None
) -> None:
    with pytest.raises(BadConfig, match="inside the slice"):
        asked.prompt(volume, z, points, box)
