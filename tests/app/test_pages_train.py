"""The pages that start trainings: the demo and Train, with real jobs."""

import json
import shutil
from pathlib import Path

from clinic import at, visit
from pages import menu, press, until
from streamlit.testing.v1 import AppTest

from app import jobs
from app.workspace import Workspace
from surm_seg import backbones, structures


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


def chosen(app: AppTest, folder: str) -> AppTest:
    """The page Train once this folder has been named."""
    next(field for field in app.text_input if field.label == "Folder").set_value(folder)
    app.run()
    assert not app.exception
    return app


def test_a_folder_is_prepared_from_the_page(clinic: Workspace, tmp_path: Path) -> None:
    """Its layout is found by itself; the data set is there to be trained on, and nothing else was touched."""
    source = tmp_path / "Ward 7"
    shutil.copytree("data/phantom/source", source)
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    app = chosen(visit("train"), str(source))
    assert any("4 organs" in said.value or "8 organs" in said.value for said in app.caption)
    press(app, "Prepare")
    (job,) = jobs.jobs(Path("jobs"))
    assert job.kind == "prepare" and "Cancel" in [button.label for button in visit("train").button]
    until(lambda: job.state != "running")
    assert job.state == "finished", job.log_tail()
    assert "Ward-7" in [dataset.folder.name for dataset in clinic.datasets()[0]]
    assert any(option.startswith("Ward-7  ") for option in menu(visit("train"), "Data").options)
    assert {path: path.read_bytes() for path in source.rglob("*") if path.is_file()} == before


def test_a_folder_that_is_no_data_set_is_a_sentence_before_anything_starts(clinic: Workspace, tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.docx").write_bytes(b"PK")
    for folder, code in ((str(tmp_path / "letters"), "format"), (str(tmp_path / "nowhere"), "source")):
        (error,) = chosen(visit("train"), folder).error
        assert f"`{code}`" in error.value and str(tmp_path) not in error.value
    assert not jobs.jobs(Path("jobs")) and "Start training" in [button.label for button in visit("train").button]


def test_a_case_that_cannot_be_prepared_is_told_without_its_name_in_the_log(clinic: Workspace, tmp_path: Path) -> None:
    """The command's sentence names the file, which may be called after a patient."""
    source = tmp_path / "Doe_Jane"
    for kind in ("imagesTr", "labelsTr"):
        (source / kind).mkdir(parents=True)
    volume = next(Path("data/phantom/source/img").iterdir()).read_bytes()
    (source / "dataset.json").write_text(
        json.dumps({"labels": {"background": 0, "liver": 1}, "file_ending": ".nii.gz"})
    )
    (source / "imagesTr" / "Smith_John_0000.nii.gz").write_bytes(volume)
    (source / "labelsTr" / "Smith_John.nii.gz").write_bytes(volume[:-5000])
    press(chosen(visit("train"), str(source)), "Prepare")
    (job,) = jobs.jobs(Path("jobs"))
    until(lambda: job.state != "running")
    assert job.state == "failed"
    log = (job.folder / "log").read_text()
    assert "of the source" in log and not any(name in log for name in ("Smith", "John", "Doe", "Jane"))
    assert any("of the source" in error.value for error in visit("train").error)
    assert not [*Path("data").glob("Doe*/dataset.json")]


def test_a_run_s_name_cannot_leave_its_folder(clinic: Workspace) -> None:
    app = visit("train")
    next(field for field in app.text_input if field.label == "Name of the run").set_value("../../elsewhere")
    app.run()
    assert "run-name" in app.error[0].value and "Start training" not in [button.label for button in app.button]
