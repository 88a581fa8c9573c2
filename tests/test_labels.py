"""Label tables: organs are matched by name, every value is accounted for, nothing is guessed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from surm_seg.errors import BadConfig, BadInput
from surm_seg.labels import SYNAPSE, LabelMap, label_table, label_tables, read_table

LABELS = LabelMap(("liver", "spleen"), {1: "spleen", 6: "liver", 9: None})


def test_values_become_positions_of_their_organs() -> None:
    raw = np.array([[0, 1], [6, 9]], np.int32)
    np.testing.assert_array_equal(LABELS.apply(raw, "x.nii"), np.array([[0, 2], [1, 0]], np.uint8))
    assert LABELS.apply(raw, "x.nii").dtype == np.uint8


@pytest.mark.parametrize("value", [2, 7, 250, -1, 10**6])
def test_a_value_outside_the_table_is_refused_with_the_file(value: int) -> None:
    with pytest.raises(BadInput, match=r"x\.nii") as refused:
        LABELS.apply(np.array([0, value]), "x.nii")
    assert refused.value.code == "unknown-label"


@given(st.permutations(range(1, 9)), st.sampled_from([np.uint8, np.int16, np.int32]))
def test_the_order_of_raw_values_does_not_matter(values: list[int], kind: type) -> None:
    table = LabelMap(SYNAPSE, dict(zip(values, SYNAPSE, strict=True)))
    raw = np.array([0, *values], kind)
    np.testing.assert_array_equal(table.apply(raw, "x"), np.arange(9))


def test_two_values_may_be_one_organ() -> None:
    table = LabelMap(("kidney",), {2: "kidney", 3: "kidney"})
    np.testing.assert_array_equal(table.apply(np.array([0, 2, 3]), "x"), [0, 1, 1])


@pytest.mark.parametrize("names", [(), ("a", "a"), tuple(f"organ{n}" for n in range(256))])
def test_a_table_has_1_to_255_different_organs(names: tuple[str, ...]) -> None:
    with pytest.raises(BadConfig):
        LabelMap(names, {})


def test_a_table_maps_only_to_its_own_organs() -> None:
    with pytest.raises(BadConfig, match="liver"):
        LabelMap(("spleen",), {1: "liver"})


def test_a_table_on_disk_names_values_or_the_sources_classes(tmp_path: Path) -> None:
    table = tmp_path / "table.yaml"
    table.write_text("6: liver\n1: spleen\n0: background\n9:\n")
    assert read_table(table) == LabelMap(("spleen", "liver"), {1: "spleen", 6: "liver", 9: None})
    table.write_text("renal_l: kidney\nrenal_r: kidney\n")
    with pytest.raises(BadConfig, match="whole numbers"):
        read_table(table)
    classes = {3: "renal_l", 2: "renal_r", 5: "heart"}
    assert read_table(table, classes) == LabelMap(("kidney",), {2: "kidney", 3: "kidney", 5: None})
    with pytest.raises(BadConfig, match="renal_r"):
        read_table(table, {3: "renal_l"})


def test_other_makes_all_that_is_not_listed_background(tmp_path: Path) -> None:
    path = tmp_path / "table.yaml"
    path.write_text("6: liver\n2:\nother:\n")
    table = read_table(path)
    assert table == LabelMap(("liver",), {2: None, 6: "liver"}, others=True)
    raw = np.array([0, 2, 6, 7, 104, 10**9], np.int32)  # far beyond the table, which must not become as long
    np.testing.assert_array_equal(table.apply(raw, "x"), [0, 0, 1, 0, 0, 0])
    with pytest.raises(BadInput, match="negative"):
        table.apply(np.array([-1, 6]), "x")
    path.write_text("6: liver\nother: spleen\n")
    with pytest.raises(BadConfig, match="whole numbers"):
        read_table(path)


def test_tables_of_two_sides_share_one_order_of_organs(tmp_path: Path) -> None:
    for name, text in {"a": "1: liver\n2: spleen\n", "b": "7: spleen\n9: liver\n", "c": "1: liver\n"}.items():
        (tmp_path / name).write_text(text)
    ours, theirs = label_tables(label_table(str(tmp_path / "a")), label_table(str(tmp_path / "b")))
    np.testing.assert_array_equal(ours.apply(np.array([1, 2]), "x"), theirs.apply(np.array([9, 7]), "x"))
    with pytest.raises(BadConfig, match="spleen"):
        label_tables(label_table(str(tmp_path / "a")), label_table(str(tmp_path / "c")))


@pytest.mark.parametrize(
    "text", ["- liver\n", "liver: 1\n", "1: [liver]\n", "true: liver\n", "-1: liver\n", "1:\n", "other:\n", "{", ""]
)
def test_what_is_no_table_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "table.yaml").write_text(text)
    with pytest.raises(BadConfig) as refused:
        read_table(tmp_path / "table.yaml")
    assert refused.value.code == "label-table"
