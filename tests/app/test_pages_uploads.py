"""Volumes that a user brings: good ones, and every bad one of the list."""

import gzip
import threading
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import streamlit as st
from clinic import visit
from streamlit.testing.v1 import AppTest

from app import belongings
from app.workspace import Workspace

CANARY = "Canary^Patient-4711"


@pytest.fixture
def clinic(clinic: Workspace) -> Iterator[Workspace]:
    """As elsewhere; what was uploaded is gone when its session has ended."""
    yield clinic
    st.cache_resource.clear()  # ends the session of this test
    belongings.end()
    assert not [*Path("uploads").glob("*")]


def bring(name: str, content: bytes, app: AppTest | None = None) -> AppTest:
    """Upload a file on the page Cases and have it read."""
    app = app or visit()
    uploader = next(widget for widget in app.get("file_uploader") if "series" in widget.label)  # pyright: ignore
    uploader.set_value([(name, content, "application/octet-stream")])  # pyright: ignore[reportAttributeAccessIssue]
    app.run()
    next(button for button in app.button if button.label == "Read the volume").click()
    app.run()
    assert not app.exception
    return app


def nifti(shape: tuple[int, ...], **header: object) -> bytes:
    voxels = np.random.default_rng(0).integers(-200, 200, shape).astype(np.int16)
    image = nib.Nifti1Image(voxels, np.diag([-2.0, -2.0, 5.0, 1.0]))
    content = bytearray(image.to_bytes())
    stated = nib.Nifti1Header(bytes(content[:348]), check=False)
    for name, value in header.items():
        stated[name] = value
    content[:348] = stated.binaryblock
    return bytes(content)


def test_an_upload_is_listed_and_says_what_is_unlike_training(clinic: Workspace) -> None:
    app = bring(f"{CANARY}.nii", nifti((40, 30, 8)))
    assert not app.error
    assert any("Unlike the training cases" in warning.value for warning in app.warning)
    assert any(button.label == "Segment with demo" for button in app.button)
    names = [path.name for path in Path("uploads").rglob("*")]
    assert names and not any(CANARY in name for name in names)


def cases_of(app: AppTest) -> list[dict[str, object]]:
    """The uploads in the table of cases."""
    table = next(frame.value for frame in app.dataframe if "Case" in frame.value.columns)
    return [row for row in table.to_dict("records") if row["Case"].startswith("upload-")]


def test_an_upload_is_known_again_by_its_voxels(clinic: Workspace) -> None:
    """Of a volume that is brought twice one copy is kept; and brought another day, it has the name of before."""
    app = bring("a.nii", nifti((40, 30, 8)))
    (before,) = cases_of(bring("b.nii", nifti((40, 30, 8)), app))
    assert len([*Path("uploads").glob("*/upload-*")]) == 1
    st.cache_resource.clear()  # the session ends
    (after,) = cases_of(bring("c.nii", nifti((40, 30, 8))))
    assert before["Case"] == after["Case"]


def test_a_reference_that_comes_after_the_prediction_scores_it_for_as_long_as_it_is_there(clinic: Workspace) -> None:
    """The next session brings the volume without it: no reference, no score."""
    source = next(Path("data/phantom/source/img").iterdir())
    app = bring("a.nii.gz", source.read_bytes())
    next(button for button in app.button if button.label == "Segment with demo").click()
    app.run()
    for thread in threading.enumerate():
        if thread.name == "segmenting":
            thread.join(120)
    (before,) = cases_of(app.run())
    image = nib.load(source)
    drawn = np.zeros(image.shape, np.uint8)
    drawn[10:30, 10:30] = 1
    uploader = next(widget for widget in app.get("file_uploader") if "label map" in widget.label)  # pyright: ignore
    labels = nib.Nifti1Image(drawn, image.affine).to_bytes()
    uploader.set_value([("labels.nii", labels, "application/octet-stream")])  # pyright: ignore
    app.run()
    next(button for button in app.button if button.label == "Read the reference").click()
    (scored,) = cases_of(app.run())
    assert not app.error and (np.isnan(before["Dice"]), np.isnan(scored["Dice"])) == (True, False)
    st.cache_resource.clear()
    (again,) = cases_of(bring("a.nii.gz", source.read_bytes()))
    assert again["Case"] == scored["Case"] and np.isnan(again["Dice"])


def test_a_reference_that_does_not_fit_is_a_sentence_and_the_case_stays(clinic: Workspace) -> None:
    app = bring("a.nii", nifti((40, 30, 8)))
    (before,) = cases_of(app)
    for content in (nifti((40, 30, 9)), b"no volume"):
        uploader = next(widget for widget in app.get("file_uploader") if "label map" in widget.label)  # pyright: ignore
        uploader.set_value([(f"{CANARY}.nii", content, "application/octet-stream")])  # pyright: ignore
        app.run()
        next(button for button in app.button if button.label == "Read the reference").click()
        app.run()
        (error,) = app.error
        assert error.value.count("`") == 2 and CANARY not in error.value and str(Path.cwd()) not in error.value
    (after,) = cases_of(app)
    assert after["Case"] == before["Case"] and any(button.label == "Segment with demo" for button in app.button)


def test_two_uploads_of_one_name_are_two_cases(clinic: Workspace) -> None:
    app = bring("ct.nii", nifti((40, 30, 8)))
    app = bring("ct.nii", nifti((44, 30, 8)), app)
    assert not app.error and len([*Path("uploads").glob("*/upload-*")]) == 2


BAD: dict[str, bytes] = {
    "notes.docx": b"PK\x03\x04 no volume",
    "empty.nii": b"",
    "cut.nii": nifti((40, 30, 8))[:2000],
    "cut.nii.gz": gzip.compress(nifti((40, 30, 8)))[:-3000],
    "four.nii": nifti((10, 10, 5, 3)),
    "bomb.nii.gz": gzip.compress(nifti((1, 1, 1), dim=[3, 30000, 30000, 30000, 1, 1, 1, 1])),
    "colour.nii": nifti((40, 30, 8), datatype=128),
    "nowhere.nii": nifti((40, 30, 8), srow_x=[np.nan] * 4),
    "header.nii": nifti((40, 30, 8))[:352],
    "fake.nii.gz": b"this is no gzip",
    "IM0001": b"\0" * 128 + b"DICM" + b"broken",
}


@pytest.mark.parametrize("name", BAD)  # and not their bytes: gzip's hold the time, and tests are named by them
def test_a_bad_upload_is_one_sentence_and_the_rest_goes_on(clinic: Workspace, name: str) -> None:
    app = bring(name, BAD[name])
    (error,) = app.error
    assert error.value.count("`") == 2 and name not in error.value and str(Path.cwd()) not in error.value
    assert [frame for frame in app.dataframe if "Case" in frame.value.columns]
    assert not [*Path("uploads").glob("*/upload-*")]
