"""The pages as a user meets them: a real workspace, a real run, real jobs; the slice component has its own tests."""

import json
from pathlib import Path

import numpy as np
import pytest
from clinic import at, visit
from pages import press, until

from app import segmenting
from app.workspace import Workspace

PAGES = ("cases", "review", "compare", "train", "reports", "about")
PATIENCE = 120.0


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


def test_a_worker_that_is_lost_is_a_sentence_and_can_be_started_again(
    clinic: Workspace, caplog: pytest.LogCaptureFixture
) -> None:
    """What it read was no option of a run: nothing that anybody foresaw. The log says no name."""
    key, (run,) = held_out(clinic), clinic.runs()
    study = next(study for study in clinic.studies() if study.key == key)
    options = run.folder / "config.yaml"
    sound = options.read_bytes()
    options.write_bytes(sound + b"\nimage_size: Canary^Patient\n")
    work = segmenting.begin(clinic, study, run)
    until(lambda: work.over)
    assert work.state == "failed" and clinic.prediction(study, run) is None
    (error,) = visit(case=key).error
    assert error.value.count("`") == 2 and "Canary" not in error.value + caplog.text
    options.write_bytes(sound)
    press(visit(case=key), "Segment with demo")
    again = segmenting.work_on(study, run)
    assert again is not None and again is not work
    until(lambda: again.over)
    assert again.state == "done" and not visit(case=key).error


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


def test_the_model_card_is_shown(clinic: Workspace) -> None:
    said = "\n".join(text.value for text in visit("about").markdown)
    assert "circulant adapter for sam_tiny" in said and "library_name" not in said
