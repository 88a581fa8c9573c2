"""Whether a volume is like the training cases: silent when it is, one sentence with both numbers when it is not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.phantom import patient
from surm_seg.domain import Facts, calibration, differences, facts_of
from surm_seg.fingerprint import over_cases
from surm_seg.volume import read_image

ADULT = Facts((120, 512, 512), (3.0, 0.8, 0.8), "LPS", {"min": -1024, "p1": -1024, "p99": 300, "max": 1500})


def trained_on(*cases: Facts) -> dict[str, Any]:
    """The fingerprint of a data set with these training cases, as it comes back from a file."""
    records = [
        {"shape": c.shape, "spacing": c.spacing, "hu": c.hu, "axcodes": c.orientation, "histogram": None} for c in cases
    ]
    return json.loads(json.dumps(over_cases(records)))


TRAINED = trained_on(
    replace(ADULT, shape=(100, 512, 512), spacing=(2.0, 0.7, 0.7)),
    replace(ADULT, hu={"min": -1024, "p1": -1010, "p99": 220, "max": 900}),
)


def hu(low: int, p1: int, p99: int, high: int) -> dict[str, int]:
    return {"min": low, "p1": p1, "p99": p99, "max": high}


@pytest.mark.parametrize(
    "facts",
    [
        ADULT,
        replace(ADULT, spacing=(3.5, 0.9, 0.9), modality="CT"),
        replace(ADULT, hu=hu(-3024, -3024, 450, 3071)),  # padding below air is no difference
        replace(ADULT, hu=hu(-125, -125, 275, 275)),  # nor is a window that holds what training looks at
        replace(ADULT, shape=(30, 512, 512)),
    ],
)
def test_what_fits_is_passed_over_in_silence(facts: Facts) -> None:
    assert differences(facts, TRAINED) == []


@pytest.mark.parametrize(
    ("facts", "sentence"),
    [
        (
            replace(ADULT, spacing=(5.0, 0.8, 0.8)),
            "slices are 5 mm apart; the training cases had 2 to 3 mm: expect thin organs to be missed",
        ),
        (replace(ADULT, spacing=(1.0, 0.8, 0.8)), "slices are 1 mm apart; the training cases had 2 to 3 mm: neighbour"),
        (
            replace(ADULT, spacing=(3.0, 1.6, 1.6), shape=(120, 256, 256)),
            "pixels are 1.6 mm wide; the training cases had 0.7 to 0.8 mm: expect small organs to be missed",
        ),
        (
            replace(ADULT, shape=(120, 256, 256)),
            "the picture is 205 mm wide; the training cases had 358 to 410 mm: organs look larger",
        ),
        (replace(ADULT, shape=(600, 512, 512)), "the scan is 1800 mm long; the training cases had 200 to 360 mm"),
        (replace(ADULT, orientation="PIL"), "stored as PIL, those of the training cases as LPS"),
        (replace(ADULT, modality="MR"), "modality is MR; the training cases were CT"),
        (replace(ADULT, hu=hu(0, 0, 1320, 3000)), "above 1320; of the training cases, below -1024 to -1010 and above"),
        (replace(ADULT, hu=hu(0, 0, 1320, 3000)), "subtract 1024"),
        (replace(ADULT, hu=hu(-2048, -2048, -720, 500)), "add 1024"),
        (replace(ADULT, hu=hu(0, 0, 251, 255)), "a picture of the CT"),
        (replace(ADULT, hu=hu(0, 0, 880, 4095)), "MR, or CT without calibration"),
        (replace(ADULT, hu=hu(-20, -20, 130, 130)), "cut off at -20 and 130"),
    ],
)
def test_each_difference_is_one_sentence_with_both_numbers(facts: Facts, sentence: str) -> None:
    (found,) = differences(facts, TRAINED)
    assert sentence in found


def test_the_same_difference_along_rows_and_columns_is_said_once() -> None:
    found = differences(replace(ADULT, spacing=(3.0, 2.0, 2.0)), TRAINED)
    assert [text.split(";")[0] for text in found] == ["pixels are 2 mm wide", "the picture is 1024 mm wide"]


def test_raw_values_are_like_those_of_training_on_a_window() -> None:
    """Beyond the window training saw nothing, so a raw volume is no different there; a shifted one is."""
    windowed = trained_on(replace(ADULT, hu=hu(-125, -125, 275, 275)))
    assert differences(replace(ADULT, hu=hu(-1024, -1024, 700, 3071)), windowed) == []
    assert "subtract 1024" in differences(replace(ADULT, hu=hu(0, 24, 1300, 3000)), windowed)[0]


def test_training_on_other_values_than_hu_accepts_them() -> None:
    odd = replace(ADULT, hu=hu(0, 0, 880, 4095))
    assert differences(odd, trained_on(odd)) == []


@pytest.mark.parametrize("fingerprint", [{}, {"cases": 0}, trained_on(), trained_on(replace(ADULT, spacing=None))])
def test_what_the_fingerprint_does_not_hold_is_not_judged(fingerprint: dict[str, Any]) -> None:
    strange = replace(ADULT, spacing=(30.0, 9.0, 9.0))
    assert differences(strange, fingerprint) == []


def test_an_unknown_spacing_is_not_judged() -> None:
    assert differences(replace(ADULT, spacing=None, shape=(900, 64, 64)), TRAINED) == []


def test_a_fingerprint_of_an_older_version_still_judges_what_it_holds() -> None:
    older = {name: value for name, value in TRAINED.items() if name not in ("scan_length_mm", "field_of_view_mm")}
    found = differences(replace(ADULT, shape=(600, 256, 256), spacing=(5.0, 0.8, 0.8)), older)
    assert [text.split(" mm")[0] for text in found] == ["slices are 5"]


def test_a_range_over_cases_leaves_out_those_of_unknown_spacing() -> None:
    found = trained_on(replace(ADULT, spacing=None), ADULT)
    assert found["spacing_mm"] == {"z": [3.0, 3.0], "y": [0.8, 0.8], "x": [0.8, 0.8]}
    assert trained_on(replace(ADULT, spacing=None))["field_of_view_mm"] == {"y": None, "x": None}


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        (hu(-1024, -1000, 300, 3071), None),
        (hu(-600, -130, 250, 900), None),  # cropped inside the body: fat, but no air
        (hu(-3, -2, 4, 9), "nearly flat"),
        (hu(0, 0, 240, 255), "8-bit picture"),
        (hu(0, 10, 800, 1900), "not HU"),
        (hu(-2000, -2000, 1250, 3000), "1024 too high?"),
        (hu(-3072, -2048, -700, 400), "1024 too low?"),
        (hu(-160, -160, 240, 240), "windowed"),
    ],
)
def test_values_that_cannot_be_hu_are_told_apart(values: dict[str, int], verdict: str | None) -> None:
    found = calibration(values)
    assert (found and found[0]) == verdict


def test_the_facts_of_a_file_are_those_of_its_radiological_view(tmp_path: Path, write_nifti: Any) -> None:
    made = patient(5)
    volume = read_image(write_nifti(tmp_path / "a.nii.gz", made.image, made.affine))
    facts = facts_of(volume)
    assert facts.shape == volume.lps().shape and facts.orientation == "".join(volume.grid.axcodes)
    assert facts.hu["p99"] == np.percentile(made.image, 99, method="inverted_cdf")
    assert differences(facts, trained_on(facts)) == [] and calibration(facts.hu) is None


def test_real_cts_are_hu(shared_data: Path) -> None:
    for path in (shared_data / "ct-case-a/ct.nii.gz", shared_data / "ct-case-b-dicom/dicom"):
        assert calibration(facts_of(read_image(path)).hu) is None
