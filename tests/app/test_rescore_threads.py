"""Pages and threads that draw on one version and score it at once: what is told is of the labels it is told of."""

from __future__ import annotations

import json
import random
import secrets
import sys
from collections.abc import Callable, Iterator
from threading import Event, Thread

import numpy as np
import pytest
from test_rescore import ORGANS, SHAPE, blobs

from app import rle
from app.corrections import journal_bytes, versions
from app.opened import Opened, open_case
from app.rescore import Scores
from app.scores import kept_score
from app.viewer.events import Edit
from app.workspace import Workspace
from surm_seg.errors import BadInput
from surm_seg.metrics import RECOMMENDED
from surm_seg.scored import Scored, score_case

STROKES = 12
"""Of each thread, in one turn."""

ENOUGH, MOST_TURNS = 3, 20
"""Scores of different labels that are seen on the disk, and turns in which they must have been."""


@pytest.fixture(autouse=True)
def eager_threads() -> Iterator[None]:
    """Threads take turns a thousand times as often as usual."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(before / 1000)
    yield
    sys.setswitchinterval(before)


def together(*bodies: Callable[[], None]) -> None:
    """Run each in a thread of its own; what one raises is raised here."""
    failed: list[BaseException] = []

    def run(body: Callable[[], None]) -> None:
        try:
            body()
        except BaseException as error:
            failed.append(error)

    threads = [Thread(target=run, args=(body,)) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


@pytest.mark.parametrize("seed", range(6))
def test_the_last_scores_are_those_of_the_last_labels(seed: int) -> None:
    """Each thread draws on its own slices; at the end nobody has anything left to say."""
    labels, reference, done = blobs(2), blobs(3), Event()
    scores = Scores(labels, reference, ORGANS, (2.5, 0.8, 0.7), "case1")

    def draw(first: int) -> Callable[[], None]:
        def body() -> None:
            rng = np.random.default_rng((seed, first))
            for number in range(STROKES):
                z, (y, x) = int(rng.choice(range(first, SHAPE[0], 2))), rng.integers(0, 16, 2)
                before = labels[z].copy()
                labels[z, y : y + 8, x : x + 8] = rng.integers(0, 5)
                moved = before != labels[z]
                scores.changed(z, {*np.union1d(before[moved], labels[z][moved]).tolist()} - {0})
                if number % 3 == 0:
                    assert scores.scored.rows

        return body

    def ask() -> None:
        while not done.is_set():
            settled = scores.settled
            assert {row.score.organ for row in settled.rows} <= {*ORGANS}
            assert scores.scored.rows

    asking = [Thread(target=ask) for _ in range(2)]
    for thread in asking:
        thread.start()
    together(draw(0), draw(1))
    done.set()
    for thread in asking:
        thread.join()
    assert scores.scored == score_case(labels, reference, ORGANS, (2.5, 0.8, 0.7), "case1") and scores.ready
    assert scores.settled == scores.scored
    np.testing.assert_allclose(scores.error_mm2, (labels != reference).sum((1, 2)) * 0.8 * 0.7)


def test_two_pages_that_draw_at_once_end_with_the_scores_of_all_strokes(clinic: Workspace) -> None:
    """And at no moment was there a score on the disk, for the lists, of other labels than those of its version."""
    pages = [opened(clinic), opened(clinic)]
    told: dict[int, float | None] = {}
    drawn, refused = [0], [0]

    def page(one: Opened, seed: int) -> Callable[[], None]:
        def body() -> None:
            rng = random.Random(seed)
            for _ in range(STROKES):
                scene = one.scene(prompts=False)
                z, y, x = (rng.randrange(length - 8) for length in scene.shape)
                before = np.array(one.labels[z])
                after = before.copy()
                after[y : y + 8, x : x + 8] = rng.randrange(6)
                layer = scene.layers["prediction"].version
                try:
                    one.edited(Edit(z, after, before, scene.version, layer, secrets.token_hex(16)))
                    drawn[0] += 1
                except BadInput as error:  # the other page was there first
                    assert error.code == "edit-stale"
                    refused[0] += 1
                if rng.random() < 0.5:
                    one.score()

        return body

    over = Event()

    def read() -> None:
        while not over.is_set():
            for folder in versions(pages[0].folder):
                size = journal_bytes(folder)
                score = kept_score(folder, pages[0].study.scored_against)
                if score.organs and journal_bytes(folder) == size:
                    told[size] = score.dice

    reading = Thread(target=read)
    reading.start()
    for turn in range(MOST_TURNS):
        together(*(page(one, 10 * turn + seed) for seed, one in enumerate([*pages, *pages])))
        if len(told) >= ENOUGH:
            break
    over.set()
    reading.join()
    one, (folder,) = pages[0], versions(pages[0].folder)
    states = replayed(one)
    for each in pages:
        each.scene(prompts=False)
        each.score()
        told[journal_bytes(folder)] = kept_score(folder, one.study.scored_against).dice
        assert each.scored == organs(scored(one, one.labels))
        np.testing.assert_array_equal(each.counts, pages[0].counts)
    assert np.array_equal(states[journal_bytes(folder)], one.labels) and drawn[0] > refused[0]
    assert len(told) >= ENOUGH, "no scores were seen while they drew"
    for size, dice in told.items():
        values = [score.dice for score in organs(scored(one, states[size])).values() if score.dice is not None]
        assert dice == pytest.approx(np.mean(values))


def opened(clinic: Workspace) -> Opened:
    (run,) = clinic.runs()
    key = min(clinic.scores(run, clinic.studies()))
    return open_case("session", clinic, next(study for study in clinic.studies() if study.key == key), run)


def scored(one: Opened, labels: np.ndarray) -> Scored:
    assert one.reference is not None
    return score_case(labels, one.reference, one.run.labels, one.spacing, one.study.name)


def organs(found: Scored) -> dict:
    return {row.score.organ: row.score for row in found.rows if row.score.protocol == RECOMMENDED}


def replayed(one: Opened) -> dict[int, np.ndarray]:
    """Bytes of the journal -> the labels when it had them."""
    labels, size = np.array(np.load(one.folder / "prediction.npy")), 0
    states, done, undone = {0: labels.copy()}, [], []
    for line in (one.folder / "v001" / "journal.jsonl").read_bytes().splitlines(keepends=True):
        content = json.loads(line.partition(b"} ")[2])
        if "edit" in content:
            done.append(content["edit"])
            undone.clear()
        else:  # a stroke that happened to take back what another had drawn
            source, target = (done, undone) if "undo" in content else (undone, done)
            target.append(source.pop())
        z, before, after = undone[-1] if "undo" in content else done[-1]
        labels[z] = rle.decode(before if "undo" in content else after, labels.shape[1:])
        size += len(line)
        states[size] = labels.copy()
    return states
