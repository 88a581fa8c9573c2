from __future__ import annotations

import base64

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from app.rle import decode, encode
from surm_seg.errors import BadInput

SLICES = arrays(np.uint8, array_shapes(min_dims=2, max_dims=2, max_side=12), elements=st.sampled_from([0, 1, 2, 255]))


@given(SLICES)
def test_a_slice_comes_back_as_it_was(labels: np.ndarray) -> None:
    np.testing.assert_array_equal(decode(encode(labels), (labels.shape[0], labels.shape[1])), labels)


def test_the_text_is_pairs_of_value_and_length() -> None:
    labels = np.array([[0, 0, 3], [3, 1, 1]], np.uint8)
    assert np.frombuffer(base64.b64decode(encode(labels)), "<u4").tolist() == [0, 2, 3, 2, 1, 2]


def test_an_organ_of_a_ct_slice_is_short() -> None:
    labels = np.zeros((512, 512), np.uint8)
    labels[100:400, 150:350] = 1
    assert len(encode(labels)) < 10_000


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.array([1, 5], "<u4"), "does not fill"),
        (np.array([1, 4_000_000_000], "<u4"), "does not fill"),
        (np.array([1, 4, 2, 3], "<u4"), "does not fill"),
        (np.array([300, 6], "<u4"), "above 255"),
        (np.array([1], "<u4"), "middle of a run"),
        (np.array([], "<u4"), "does not fill"),
    ],
)
def test_what_is_no_such_slice_is_refused_in_one_sentence(values: np.ndarray, reason: str) -> None:
    with pytest.raises(BadInput, match=reason) as refusal:
        decode(base64.b64encode(values.tobytes()).decode(), (2, 3))
    assert refusal.value.code == "slice-runs"


@pytest.mark.parametrize("text", ["no base64!", "AAAA=A", "é"])
def test_text_that_is_not_base64_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="not base64"):
        decode(text, (2, 3))
