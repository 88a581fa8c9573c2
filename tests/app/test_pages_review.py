"""A review from opening to taking away: corrections, versions, scores, and what is shown where there are none."""

import csv
import json
import secrets
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from clinic import visit

from app import screen, serving
from app.figures import organs_of, slices_of
from app.opened import Opened, open_case
from app.viewer import Scene, events
from app.workspace import Study, Workspace
from surm_seg.errors import BadInput
from surm_seg.metrics import RECOMMENDED
from surm_seg.scored import score_case
from surm_seg.volume import read_labels


@pytest.fixture
def opened(clinic: Workspace) -> Opened:
    return reopened(clinic)


def reopened(clinic: Workspace) -> Opened:
    """The first scored case, as a session that has just begun opens it."""
    (run,) = clinic.runs()
    key = min(clinic.scores(run, clinic.studies()))
    return open_case("session", clinic, next(study for study in clinic.studies() if study.key == key), run)


def stroke(opened: Opened, z: int, labels: np.ndarray) -> events.Edit:
    """What the browser sends of a slice that is drawn on what is on the screen."""
    scene = opened.scene(prompts=False)
    layer = scene.layers["prediction"].version
    return events.Edit(z, labels, np.array(opened.labels[z]), scene.version, layer, secrets.token_hex(16))


def draw(opened: Opened, z: int, labels: np.ndarray) -> None:
    """A stroke, as the browser tells of it."""
    opened.edited(stroke(opened, z, labels))


def blank(scene: Scene) -> set[int]:
    """Slices without a Dice in the strip."""
    return {slice.z for slice in scene.slices if slice.dice is None}


def dice_of(opened: Opened) -> dict[str, float | None]:
    return {organ: score.dice for organ, score in opened.scored.items()}


def test_a_correction_is_a_version_beside_the_prediction_scored_at_once(clinic: Workspace, opened: Opened) -> None:
    prediction, reference = np.array(opened.labels), opened.reference
    assert reference is not None and opened.correction is None
    z = int(np.abs(prediction.astype(int) - reference).reshape(len(reference), -1).astype(bool).sum(1).argmax())
    draw(opened, z, np.array(reference[z]))
    expected = prediction.copy()
    expected[z] = reference[z]
    assert np.array_equal(opened.labels, expected) and opened.version == "version 1"
    rows = score_case(expected, reference, opened.run.labels, opened.spacing, opened.study.name).rows
    assert dice_of(opened) == {row.score.organ: row.score.dice for row in rows if row.score.protocol == RECOMMENDED}
    scene = opened.scene(prompts=False)
    assert {slice.z: slice.error_mm2 for slice in scene.slices}[z] == 0
    base = clinic.voxels(opened.study, opened.run)
    assert base is not None and np.array_equal(base, prediction)


def test_a_closed_tab_loses_nothing_and_undo_reaches_back(clinic: Workspace, opened: Opened) -> None:
    before, z = np.array(opened.labels), len(opened.labels) // 2
    draw(opened, z, np.full_like(before[z], 5))
    again = reopened(clinic)
    assert again.version == "version 1" and (again.labels[z] == 5).all()
    again.undo()
    assert np.array_equal(again.labels, before)
    again.redo()
    assert (again.labels[z] == 5).all()
    again.begin_anew()
    assert again.version == "version 2" and np.array_equal(again.labels, before)


def test_of_two_pages_none_undoes_what_it_has_not_seen_and_both_come_to_show_the_same(
    clinic: Workspace, opened: Opened
) -> None:
    """The browser sends whole slices: one drawn on an older picture would take the other page's strokes back."""
    other, z = reopened(clinic), len(opened.labels) // 2
    mine, theirs = np.array(opened.labels[z]), np.array(opened.labels[z])
    mine[:20], theirs[-20:] = 5, 2
    late, before = stroke(other, z, theirs), other.changes
    draw(opened, z, mine)
    for sent in (late, replace(late, before=theirs, labels=mine, id="a")):  # the second was drawn on the first
        with pytest.raises(BadInput, match="changed meanwhile"):
            other.edited(sent)
    assert np.array_equal(opened.labels[z], mine)
    other.scene(prompts=False)
    other.score()
    opened.score()
    scene = other.scene(prompts=False)
    assert other.changes > before and scene.slices == opened.scene(prompts=False).slices
    assert (scene.layers["prediction"].name, dice_of(other)) == ("version 1", dice_of(opened))
    assert np.array_equal(other.counts, opened.counts)
    draw(other, z, np.where(theirs == 2, 2, mine).astype(np.uint8))
    with pytest.raises(BadInput, match="changed meanwhile"):
        opened.undo()
    opened.scene(prompts=False)
    opened.undo()
    assert np.array_equal(opened.labels[z], mine)
    draw(opened, z + 1, np.full_like(mine, 5))  # the other page has not seen this, and draws elsewhere
    other.edited(replace(late, z=z - 1, before=np.array(other.labels[z - 1])))
    shown = other.changes
    assert other.scene(prompts=False).layers["prediction"].version > shown
    assert (opened.labels[z + 1] == 5).all() and np.array_equal(opened.labels[z - 1], theirs)
    other.score()
    opened.scene(prompts=False)
    opened.score()
    assert dice_of(other) == dice_of(opened) and np.array_equal(other.counts, opened.counts)


def test_runs_are_compared_as_they_are_whatever_was_corrected(clinic: Workspace, opened: Opened) -> None:
    before, scores = np.array(opened.labels), dice_of(opened)
    assert opened.reference is not None
    z = int(np.count_nonzero(opened.reference, axis=(1, 2)).argmax())
    draw(opened, z, np.array(opened.reference[z]))
    raw = open_case("session", clinic, opened.study, opened.run, corrected=False)
    assert np.array_equal(raw.labels, before) and dice_of(raw) == scores != dice_of(opened)


def test_a_damaged_version_does_not_lock_its_case(clinic: Workspace, opened: Opened) -> None:
    draw(opened, 0, np.full(opened.labels.shape[1:], 5, np.uint8))
    folder, key = opened.folder, opened.study.key
    opened.correction = None  # its page is closed
    (folder / "v001" / "about.json").write_text("{")
    app = visit("review", case=key)
    assert "v001" in app.error[0].value and "correction" in app.error[0].value
    assert any("a stroke begins version 2" in caption.value for caption in app.caption)
    again = open_case("session", clinic, opened.study, opened.run, corrected=False)
    draw(again, 0, np.full(opened.labels.shape[1:], 5, np.uint8))
    assert again.version == "version 2" and not visit("review", case=key).error


def test_every_version_can_be_shown_gone_on_with_and_taken_away(clinic: Workspace, opened: Opened) -> None:
    """A stroke on the prediction begins the next one; whatever is not on the screen keeps every byte."""
    prediction, z = np.array(opened.labels), len(opened.labels) // 2
    draw(opened, z, np.full_like(prediction[z], 5))
    first, scores = np.array(opened.labels), dice_of(opened)
    opened.begin_anew()
    draw(opened, z, np.full_like(prediction[z], 2))
    kept = (opened.folder / "v002" / "journal.jsonl").read_bytes()
    opened.show(1)
    assert np.array_equal(opened.labels, first) and dice_of(opened) == scores
    draw(opened, z + 1, np.full_like(prediction[z], 5))
    first[z + 1] = 5
    written = read_labels(opened.take_away()[f"{opened.study.name}.nii.gz"]).lps()
    assert np.array_equal(written, first)
    opened.show(0)
    assert opened.version == "prediction" and np.array_equal(opened.labels, prediction)
    draw(opened, z, np.full_like(prediction[z], 3))
    assert opened.version == "version 3" and (opened.folder / "v002" / "journal.jsonl").read_bytes() == kept
    opened.show(1)
    assert np.array_equal(opened.labels, first)


def test_the_chosen_version_stays_chosen_on_the_way_to_another_page(clinic: Workspace, opened: Opened) -> None:
    draw(opened, 0, np.full(opened.labels.shape[1:], 5, np.uint8))
    opened.begin_anew()
    app = visit("review", case=opened.study.key)
    menu = app.selectbox(key=f"version {opened.study.key} {opened.run.identity}")
    assert menu.value == 2 and menu.options == ["Version 2", "Version 1", "The prediction, uncorrected"]
    menu.set_value(1).run()
    app.switch_page("cases.py").run()
    app.switch_page("review.py").run()
    assert not app.exception and any("**Version 1**, 1 slice" in caption.value for caption in app.caption)


def test_a_stroke_that_was_drawn_before_an_undo_changes_nothing(opened: Opened) -> None:
    """It shows what was taken back: the browser draws it between the press of the button and the answer."""
    before, z = np.array(opened.labels), len(opened.labels) // 2
    drawn = before[z].copy()
    drawn[:20] = 5
    draw(opened, z, drawn)
    drawn = drawn.copy()
    drawn[-20:] = 5
    late, elsewhere = stroke(opened, z, drawn), stroke(opened, z + 1, drawn)
    opened.undo()
    on_the_screen = opened.changes
    with pytest.raises(BadInput, match="changed meanwhile"):
        opened.edited(late)
    assert np.array_equal(opened.labels, before) and opened.changes > on_the_screen
    on_the_screen = opened.changes
    opened.edited(elsewhere)  # of a slice that is as it was, but the browser is fetching labels without it
    assert np.array_equal(opened.labels[z + 1], drawn) and opened.changes > on_the_screen
    draw(opened, z, drawn)
    assert np.array_equal(opened.labels[z], drawn)


def test_strokes_of_before_a_restart_go_to_the_version_they_were_drawn_for(clinic: Workspace, opened: Opened) -> None:
    """Whichever the case is opened with now; and what the server had kept before it died is not made again."""
    z, plane = len(opened.labels) // 2, opened.labels.shape[1:]
    five, two = np.full(plane, 5, np.uint8), np.full(plane, 2, np.uint8)
    prediction = np.array(opened.labels)
    draw(opened, z, five)
    kept = stroke(opened, z + 1, five)
    opened.edited(kept)
    lost = stroke(opened, z + 2, five)
    opened.show(0)
    begun = stroke(opened, z, two)
    following = replace(stroke(opened, z, five), before=two)
    again = reopened(clinic)
    assert again.version == "version 1"
    again.edited(begun)
    again.edited(following)
    assert again.version == "version 2" and (again.labels[z] == 5).all()
    assert np.array_equal(np.delete(again.labels, z, 0), np.delete(prediction, z, 0))
    last = reopened(clinic)
    assert last.version == "version 2"
    last.edited(kept)
    last.edited(lost)
    assert last.version == "version 1" and (last.labels[z : z + 3] == 5).all()
    assert last.correction is not None and last.correction.revision == 3
    with pytest.raises(BadInput, match="changed meanwhile"):
        last.edited(replace(lost, version=9, id="a"))


def test_a_stroke_is_kept_before_the_case_is_scored(clinic: Workspace, opened: Opened) -> None:
    """Scores follow: those of other organs and slices are there meanwhile, of what was edited none."""
    scores: Any = opened.scores
    assert not opened.ready
    z = len(opened.labels) // 2
    with scores._scoring:  # another thread is at it
        drawing = threading.Thread(target=draw, args=(opened, z, np.full_like(opened.labels[z], 5)))
        drawing.start()
        drawing.join(60)
        assert not drawing.is_alive()
    assert (clinic.review(opened.study, opened.run) / "v001" / "journal.jsonl").stat().st_size and not opened.ready
    opened.score()
    scene = opened.scene(prompts=False)
    before, unscored = {organ.value: organ.dice for organ in scene.organs}, blank(scene)
    one = np.array(opened.labels[z])
    one[0, 0] = 2
    draw(opened, z, one)
    scene = opened.scene(prompts=False)
    told = {organ.value: organ.dice for organ in scene.organs}
    assert told == before | {2: None, 5: None} and not opened.ready
    assert z not in unscored and blank(scene) == unscored | {z}
    opened.score()
    assert opened.reference is not None
    rows = score_case(opened.labels, opened.reference, opened.run.labels, opened.spacing, opened.study.name).rows
    assert dice_of(opened) == {row.score.organ: row.score.dice for row in rows if row.score.protocol == RECOMMENDED}


def test_lists_tell_the_newest_version_s_dice_and_never_an_old_one(clinic: Workspace, opened: Opened) -> None:
    study, run, z = opened.study, opened.run, len(opened.labels) // 2

    def listed(study: Study) -> tuple[float | None, int]:
        score = clinic.scores(run, [study], corrected=True)[study.key]
        return score.dice, score.version

    prediction = listed(study)
    for step in (lambda: draw(opened, z, np.full_like(opened.labels[z], 5)), opened.undo, opened.redo):
        step()
        opened.score()
        dice = [value for value in dice_of(opened).values() if value is not None]
        assert listed(study) == (pytest.approx(np.mean(dice)), 1)
    assert listed(study) != prediction and clinic.scores(run, [study])[study.key].version == 0
    assert any(study.name in line and line.endswith("v1") for line in visit("review").radio[0].options)
    other = replace(study, case=replace(study.case, label_sha256="0" * 64))
    assert listed(other) == (None, 1)
    assert opened.correction is not None
    opened.correction.apply(0, np.full_like(opened.labels[0], 5))  # nobody has scored it
    assert listed(study) == (None, 1)
    opened.scene(prompts=False)
    assert not opened.ready and listed(study) == (None, 1)
    opened.score()
    assert listed(study)[0] is not None
    opened.begin_anew()
    opened.score()
    assert listed(study) == (pytest.approx(prediction[0]), 2)


def test_a_session_keeps_few_cases_open_and_serves_no_others() -> None:
    session, shown = screen.Session(), serving.Shown(np.zeros((1, 2, 2), np.int16), {})
    tokens = [session.kept((str(n),), lambda owner: serving.publish(owner, shown)) for n in range(screen.MOST_OPENED)]
    assert session.kept(("0",), lambda owner: "made again") == tokens[0]
    session.kept(("one more",), lambda owner: serving.publish(owner, shown))
    assert session.kept(("1",), lambda owner: "made again") == "made again"
    with pytest.raises(KeyError):
        serving.replace(tokens[1], "prediction", np.zeros((1, 2, 2), np.uint8))
    serving.replace(tokens[0], "prediction", np.zeros((1, 2, 2), np.uint8))
    session.close()
    with pytest.raises(KeyError):
        serving.replace(tokens[0], "prediction", np.zeros((1, 2, 2), np.uint8))


def test_volumes_follow_the_edit(opened: Opened) -> None:
    z, spacing = 0, opened.spacing
    assert spacing is not None
    draw(opened, z, np.full(opened.labels.shape[1:], 5, np.uint8))
    liver = next(organ for organ in opened.scene(prompts=False).organs if organ.value == 5)
    assert liver.ml == pytest.approx(np.count_nonzero(opened.labels == 5) * np.prod(spacing) / 1000)


def test_without_a_reference_there_is_no_score(clinic: Workspace, opened: Opened) -> None:
    organs = organs_of(opened.run.labels, opened.counts.sum(0), opened.spacing, {})
    assert all(organ.dice is None and organ.hd95 is None and organ.ml is not None for organ in organs)
    assert slices_of(None, opened.run.labels) == []


def test_nothing_is_in_mm_or_ml_where_the_spacing_is_unknown(opened: Opened) -> None:
    assert all(organ.ml is None for organ in organs_of(opened.run.labels, opened.counts.sum(0), None, {}))


def test_an_organ_that_neither_side_has_is_not_defined(opened: Opened) -> None:
    """Empty against empty is neither 1 nor 0, on the screen as in the tables."""
    assert opened.reference is not None
    cleared = np.where(opened.labels == 4, 0, opened.labels).astype(np.uint8)
    reference = np.where(opened.reference == 4, 0, opened.reference).astype(np.uint8)
    rows = score_case(cleared, reference, opened.run.labels, opened.spacing, "x").rows
    scored = {row.score.organ: row.score for row in rows if row.score.protocol == RECOMMENDED}
    gallbladder = organs_of(opened.run.labels, opened.counts.sum(0), opened.spacing, scored)[3]
    assert (gallbladder.dice, gallbladder.hd95, gallbladder.flag) == (None, None, "")


def test_what_is_taken_away_reads_back_on_the_grid_of_the_input(opened: Opened) -> None:
    draw(opened, 3, np.full(opened.labels.shape[1:], 2, np.uint8))
    files = opened.take_away()
    name = f"{opened.study.name}.nii.gz"
    volume = read_labels(files[name])
    assert volume.grid.matches(opened.study.case.grid) and np.array_equal(volume.lps(), opened.labels)
    record = json.loads(files["review.json"].read_text())
    assert record["origin"]["labels"] == "version 1" and "radiological" in record["convention"]
    with files["volumes.csv"].open() as table:
        assert [row["organ"] for row in csv.DictReader(table)] == list(opened.run.labels)
    assert "Research use only" in files["report.html"].read_text()


def test_a_label_map_of_another_shape_is_a_sentence(clinic: Workspace, opened: Opened) -> None:
    np.save(clinic.review(opened.study, opened.run) / "prediction.npy", np.zeros((3, 4, 5), np.uint8))
    app = visit("review", case=opened.study.key)
    assert "grids-differ" in app.error[0].value
    with pytest.raises(BadInput):
        reopened(clinic)
