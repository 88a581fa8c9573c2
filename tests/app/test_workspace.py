"""The workspace: what is found on disk, and that what is damaged or unfinished hides nothing else."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from clinic import shared_workspace

from app import choice
from app.scores import Score, scores_in
from app.workspace import Study, Workspace, store, unlike
from surm_seg import predict
from surm_seg.volume import read_labels


@pytest.fixture
def clinic(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    shutil.copytree(shared_workspace(tmp_path_factory), tmp_path / "clinic")
    return Workspace(tmp_path / "clinic")


def study_of(clinic: Workspace, case: str) -> Study:
    return next(study for study in clinic.studies() if study.name == case)


def test_a_run_its_cases_and_their_scores_are_found(clinic: Workspace) -> None:
    (run,) = clinic.runs()
    scores = clinic.scores(run, clinic.studies())
    assert (run.name, run.problem, run.described) == ("demo", "", "circulant on sam_tiny")
    assert {study.key for study in clinic.studies()} == {f"phantom.case{n:04d}" for n in range(1, 5)}
    assert scores.keys() == {f"phantom.{case}" for case in run.facts["train_cases"]}
    for case in run.facts["train_cases"]:
        written = read_labels(run.folder / "predictions" / f"{case}.nii.gz").lps()
        assert np.array_equal(clinic.voxels(study_of(clinic, case), run), written)  # pyright: ignore[reportArgumentType]


def test_unfinished_and_damaged_runs_are_named_and_hide_nothing(clinic: Workspace) -> None:
    runs = clinic.folder / "runs"
    (runs / "empty").mkdir()
    shutil.copytree(runs / "demo", runs / "broken")
    (runs / "broken" / "run.json").write_text('{"task": "segm')
    shutil.copytree(runs / "demo", runs / "half")
    facts = json.loads((runs / "half" / "run.json").read_text())
    del facts["adapter_sha256"]
    (runs / "half" / "run.json").write_text(json.dumps(facts))
    found = {run.name: run.problem for run in clinic.runs()}
    assert found["demo"] == "" and next(iter(found)) == "demo"
    assert all(found[name] for name in ("empty", "broken", "half"))


def test_a_data_set_of_another_version_is_a_sentence(clinic: Workspace) -> None:
    shutil.copytree(clinic.folder / "data" / "phantom", clinic.folder / "data" / "old")
    manifest = clinic.folder / "data" / "old" / "dataset.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"schema": "surm-seg/dataset-0"}))
    datasets, broken = clinic.datasets()
    assert [dataset.folder.name for dataset in datasets] == ["phantom"]
    assert len(broken) == 1 and "dataset-schema" in broken[0]


def test_a_label_map_of_predict_is_found_by_its_content(clinic: Workspace) -> None:
    """Manifests name no file, and the case's source may be called anything."""
    (run,) = clinic.runs()
    case = next(study for study in clinic.studies() if study.case.split == "test")
    source = clinic.folder / "data" / "phantom" / "source" / "img" / f"{case.name.replace('case', 'img')}.nii.gz"
    shutil.copy(source, clinic.folder / "anything.nii.gz")
    words = ["--run", str(run.folder), "--input", str(clinic.folder / "anything.nii.gz"), "--device", "cpu", "--quiet"]
    assert clinic.prediction(case, run) is None
    assert predict.main([*words, "--output", str(clinic.folder / "predictions" / "mine")]) == 0
    assert clinic.prediction(case, run) == clinic.folder / "predictions" / "mine" / "anything.nii.gz"


def test_a_prediction_that_was_cut_is_made_again(clinic: Workspace) -> None:
    """From the run's own file where there is one; else the case counts as not segmented, and can be."""
    (run,) = clinic.runs()
    trained = study_of(clinic, run.facts["train_cases"][0])
    held_out = next(study for study in clinic.studies() if study.case.split == "test")
    before = np.array(clinic.voxels(trained, run))
    store(clinic.review(held_out, run), np.zeros(held_out.case.shape, np.uint8))
    for study in (trained, held_out):
        cut = clinic.review(study, run) / "prediction.npy"
        cut.write_bytes(cut.read_bytes()[:1000])
    assert np.array_equal(np.array(clinic.voxels(trained, run)), before)
    assert clinic.prediction(held_out, run) is None and clinic.voxels(held_out, run) is None


def test_what_was_predicted_belongs_to_the_weights_that_did(clinic: Workspace) -> None:
    """A run that is trained anew under its old name begins with clean sheets."""
    (run,) = clinic.runs()
    case = next(study for study in clinic.studies() if study.case.split == "test")
    store(clinic.review(case, run), np.ones(case.case.shape, np.uint8))
    assert clinic.prediction(case, run) is not None
    facts = json.loads((run.folder / "run.json").read_text())
    facts["adapter_sha256"]["adapter_model.safetensors"] = "0" * 64
    (run.folder / "run.json").write_text(json.dumps(facts))
    (again,) = clinic.runs()
    assert clinic.prediction(case, again) is None


def test_nothing_that_was_made_of_other_voxels_or_scored_by_another_reference_is_shown(clinic: Workspace) -> None:
    """A data set that is prepared anew may keep its name and its case ids, and an upload get another reference."""
    (run,) = clinic.runs()
    study = next(study for study in clinic.studies() if study.case.split == "test")
    store(clinic.review(study, run), np.zeros(study.case.shape, np.uint8))
    clinic.scored(study, run).mkdir()
    table = clinic.scored(study, run) / "cases.csv"
    table.write_text(f"case,organ,protocol,dice,hd95_mm,spacing\n{study.name},liver,recommended,0.5,,\n")
    assert clinic.prediction(study, run) and clinic.scores(run, [study])[study.key].dice == 0.5
    other = replace(study, case=replace(study.case, image_sha256="0" * 64))
    assert clinic.prediction(other, run) is None and clinic.scores(run, [other]) == {}
    for label in (None, "0" * 64):
        assert clinic.scores(run, [replace(study, case=replace(study.case, label_sha256=label))]) == {}


def test_pages_that_open_a_case_for_the_first_time_together_all_see_it_whole(clinic: Workspace) -> None:
    (run,) = clinic.runs()
    study = study_of(clinic, run.facts["train_cases"][0])
    written = read_labels(run.folder / "predictions" / f"{study.name}.nii.gz").lps()
    with ThreadPoolExecutor(8) as pages:
        found = [*pages.map(lambda _: np.array(clinic.voxels(study, run)), range(8))]
    assert all(np.array_equal(one, written) for one in found)


def test_worst_first_and_what_has_no_score_last(clinic: Workspace) -> None:
    studies = clinic.studies()
    scores = {studies[2].key: Score(0.2), studies[0].key: Score(0.9), studies[1].key: Score(None)}
    ordered = choice.worst_first(studies, scores)
    assert [study.key for study in ordered[:2]] == [studies[2].key, studies[0].key]
    assert {study.key for study in ordered[2:]} == {studies[1].key, studies[3].key}


def test_a_mean_leaves_out_what_is_not_defined(tmp_path: Path) -> None:
    """Both masks empty is not defined: neither 1 nor 0 enters the mean, and without any organ there is none."""
    table = tmp_path / "cases.csv"
    lines = ["case,organ,protocol,dice,hd95_mm,spacing", "a,liver,recommended,0.8,3,2x1x1", "a,spleen,recommended,,,"]
    table.write_text("\n".join([*lines, "a,liver,samed-2023,1,,", "b,liver,recommended,,,"]))
    scores = scores_in(table)
    assert scores["a"].dice == 0.8 and scores["a"].organs["spleen"]["dice"] is None
    assert scores["b"].dice is None
    assert scores_in(tmp_path / "absent.csv") == {}


def test_a_case_unlike_the_training_cases_is_told_so(clinic: Workspace) -> None:
    (run,) = clinic.runs()
    case = study_of(clinic, run.facts["train_cases"][0])
    assert unlike(case, run) == []
    facts = json.loads((run.folder / "run.json").read_text())
    facts["fingerprint"]["spacing_mm"]["z"] = [0.5, 0.6]
    (run.folder / "run.json").write_text(json.dumps(facts))
    assert any("apart" in sentence for sentence in unlike(case, clinic.runs()[0]))


def test_folders_of_label_maps_are_offered_but_not_the_app_s_own(clinic: Workspace) -> None:
    own = clinic.folder / "uploads" / "somebody"
    own.mkdir(parents=True)
    shutil.copy(next((clinic.folder / "runs" / "demo" / "predictions").iterdir()), own / "a.nii.gz")
    found = {str(folder) for folder in clinic.label_folders()}
    assert {"runs/demo/predictions", "data/phantom/source/label"} <= found
    assert not any(folder.startswith("uploads") for folder in found)
