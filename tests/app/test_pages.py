"""The pages as a user meets them: a real workspace, a real run, real jobs; the slice component has its own tests."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from clinic import at, shared_workspace, visit
from streamlit.testing.v1 import AppTest

from app import jobs, segmenting
from app.workspace import Workspace
from pipelines.formats.synapse import CLASSES
from surm_seg import backbones, structures
from surm_seg.labels import SYNAPSE

PAGES = ("cases", "review", "compare", "train", "reports", "about")
PATIENCE = 120.0


@pytest.fixture
def clinic(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    shutil.copytree(shared_workspace(tmp_path_factory), tmp_path / "clinic")
    with at(tmp_path / "clinic"):
        yield Workspace()


def until(found: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not found():
        assert time.monotonic() < end, "it did not come to an end"
        time.sleep(0.1)


def press(app: AppTest, label: str) -> AppTest:
    next(button for button in app.button if button.label == label).click()
    app.run()
    assert not app.exception
    return app


def held_out(clinic: Workspace) -> str:
    return next(study.key for study in clinic.studies() if study.case.split == "test")


@pytest.mark.parametrize("page", PAGES)
def test_every_page_says_what_it_is_not_for(clinic: Workspace, page: str) -> None:
    app = visit(page)
    assert not app.error and any("Not a medical device" in html.body for html in app.get("html"))  # pyright: ignore


@pytest.mark.parametrize("page", PAGES)
def test_no_page_is_empty_without_a_workspace(tmp_path: Path, page: str) -> None:
    with at(tmp_path):
        app = visit(page)
        assert not app.error and (app.info or app.button)
        if page == "cases":
            assert "Make the demo" in [button.label for button in app.button]


def test_the_demo_is_a_job_that_can_be_stopped(tmp_path: Path) -> None:
    """Its first seconds: the page shows it, also after a reload, and stopping it leaves an offer again."""
    with at(tmp_path):
        press(visit(), "Make the demo")
        (job,) = jobs.jobs(Path("jobs"))
        assert job.kind == "train" and job.output == (tmp_path / "runs" / "demo").resolve()
        press(visit(), "Stop")
        until(lambda: job.state != "running")
        assert job.state == "cancelled"
        assert any(button.label.endswith("the demo") for button in visit().button)


def test_menus_know_every_structure_and_backbone_by_name(clinic: Workspace) -> None:
    menus = {menu.label: menu.options for menu in visit("train").selectbox}
    assert menus["Structure"] == list(structures.names()) and menus["Backbone"] == list(backbones.names())


def test_a_case_is_segmented_and_scored_from_its_page(clinic: Workspace) -> None:
    key, (run,) = held_out(clinic), clinic.runs()
    study = next(study for study in clinic.studies() if study.key == key)
    press(visit(case=key), "Segment with demo")
    work = segmenting.work_on(study, run)
    assert work is not None
    until(lambda: work.over)
    assert (work.state, work.share) == ("done", 1.0)
    found = clinic.voxels(study, run)
    assert found is not None and found.dtype == np.uint8 and found.shape == study.case.shape
    assert key in clinic.scores(run, [study])
    assert not visit("review", case=key).error and not visit("compare", case=key).error


def test_a_cancelled_segmentation_writes_nothing(clinic: Workspace) -> None:
    key, (run,) = held_out(clinic), clinic.runs()
    study = next(study for study in clinic.studies() if study.key == key)
    work = segmenting.begin(clinic, study, run)
    work.cancel()
    until(lambda: work.over)
    assert work.state == "cancelled" and clinic.prediction(study, run) is None
    assert any("cancelled" in info.value for info in visit(case=key).info)


def test_weights_of_another_backbone_are_refused_in_a_sentence(clinic: Workspace) -> None:
    key = held_out(clinic)
    record = clinic.runs()[0].folder / "run.json"
    facts = json.loads(record.read_text()) | {"base_sha256": "0" * 64}
    facts["adapter_sha256"]["adapter_model.safetensors"] = "1" * 64
    record.write_text(json.dumps(facts))
    (run,) = clinic.runs()
    study = next(study for study in clinic.studies() if study.key == key)
    work = segmenting.begin(clinic, study, run)
    until(lambda: work.over)
    (error,) = visit(case=key).error
    assert "other-backbone" in error.value and str(Path.cwd()) not in error.value


def test_a_run_that_is_being_written_is_listed_and_breaks_nothing(clinic: Workspace) -> None:
    Path("runs/fresh").mkdir()
    (Path("runs/fresh") / "config.yaml").write_text("steps: 100\n")
    for page in PAGES:
        assert not visit(page).error
    menus = {menu.label: menu.options for menu in visit("train").selectbox}
    assert "fresh" in menus["Run"]


def test_training_from_the_page_outlives_it_and_can_be_resumed(clinic: Workspace) -> None:
    """Start, reload, stop, resume, end: the numbers are those of the run's own records."""
    app = visit("train")
    values = {"Steps": 24, "Batch size": 2, "Learning rate": 1e-3}
    for widget in app.number_input:
        if widget.label in values:
            widget.set_value(values[widget.label])
    next(menu for menu in app.selectbox if menu.label == "Image size").set_value(128)
    next(box for box in app.checkbox).check()
    next(field for field in app.text_input if field.label == "Name of the run").set_value("mine")
    press(app.run(), "Start training")
    log = Path("runs/mine/metrics.jsonl")
    until(lambda: log.exists() and log.read_text().count("\n") > 3)
    again = visit("train", watched="mine")
    press(again, "Stop")
    job = jobs.jobs(Path("jobs"))[0]
    until(lambda: job.state != "running")
    assert job.state == "cancelled" and not Path("runs/mine/adapter").exists()
    press(visit("train", watched="mine"), "Resume")
    until(lambda: jobs.jobs(Path("jobs"))[0].state != "running")
    assert jobs.jobs(Path("jobs"))[0].state == "finished"
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(1, 25))
    assert "mine" in [run.name for run in clinic.runs() if not run.problem]


def test_an_estimate_counts_parameters_and_takes_nothing_for_granted(clinic: Workspace) -> None:
    app = visit("train")
    press(app, "Estimate")
    said = "\n".join(text.value for text in app.markdown)
    assert "2,304 in the encoder" in said and "GB for a step" in said and "by the" in said
    assert not Path("runs/circulant-1").exists()


def test_a_run_s_name_cannot_leave_its_folder(clinic: Workspace) -> None:
    app = visit("train")
    next(field for field in app.text_input if field.label == "Name of the run").set_value("../../elsewhere")
    app.run()
    assert "run-name" in app.error[0].value and "Start training" not in [button.label for button in app.button]


def test_a_folder_is_scored_and_its_report_offered(clinic: Workspace) -> None:
    table = {value: organ if organ in SYNAPSE else None for value, organ in CLASSES.items()}
    Path("organs.yaml").write_text(yaml.safe_dump(table))
    app = visit("reports")
    menus = {menu.label: menu for menu in app.selectbox}
    menus["References"].set_value("data/phantom/source/label")
    menus["Label values of the references"].set_value("organs.yaml")
    app.run()
    press(app, "Score")
    until(lambda: jobs.jobs(Path("jobs"))[0].state != "running")
    (made,) = Path("reports").iterdir()
    (run,) = clinic.runs()
    ours, theirs = (json.loads((folder / "summary.json").read_bytes()) for folder in (made, run.folder / "scores"))
    assert ours["overall"]["dice"]["mean"] == pytest.approx(theirs["overall"]["dice"]["mean"])
    assert f"evaluation {made.name}" in {menu.label: menu.options for menu in visit("reports").selectbox}["Scores of"]


def test_the_model_card_is_shown(clinic: Workspace) -> None:
    said = "\n".join(text.value for text in visit("about").markdown)
    assert "circulant adapter for sam_tiny" in said and "library_name" not in said
