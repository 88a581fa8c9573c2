"""report.html: it holds every number it claims to, needs nothing else, and names nobody."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml

from surm_seg.errors import Corrupt
from surm_seg.report import Row, summarise
from surm_seg.report_page import Views, case_lines, drawn, page, write_report
from surm_seg.report_run import RunFacts, run_facts
from surm_seg.scored import Scored, score_case

LABELS = ["liver", "left_kidney"]
SPACING = (5.0, 1.0, 2.0)


class Page(HTMLParser):
    """Text, tags, and everything that a browser would fetch or run."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.styles = ""
        self.words = ""
        self.open = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.open = tag
        for name, value in attrs:
            assert not name.startswith("on"), f"a script in {name}"
            if name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href", "background"):
                self.links.append(value or "")
            if name == "style":
                self.styles += value or ""

    def handle_data(self, data: str) -> None:
        if self.open == "style":
            self.styles += data
        else:
            self.words += f" {data}"

    def handle_endtag(self, tag: str) -> None:
        self.open = ""

    @property
    def text(self) -> str:
        return " ".join(self.words.split())


def label_map(liver: int, kidney: int) -> np.ndarray:
    """Three slices with so many liver pixels in a row, and one with a row of so many kidney pixels."""
    labels = np.zeros((4, 12, 20), np.uint8)
    labels[:3, 2:6, :liver], labels[1, 8, :kidney] = 1, 2
    return labels


CASES = {
    "case001": (label_map(10, 6), label_map(10, 6)),
    "case002": (label_map(4, 0), label_map(10, 6)),  # the kidney is missed
    "case003": (label_map(9, 3), label_map(10, 0)),  # and here it is false
    "case004": (label_map(0, 0), label_map(0, 0)),
}


def scored(cases: Sequence[str] = tuple(CASES), spacing: Sequence[float] | None = SPACING, **options: list) -> Scored:
    return Scored.joined(score_case(*CASES[case], LABELS, spacing, case, **options) for case in cases)


def views(case: str) -> Views:
    image = np.random.default_rng(0).integers(-200, 300, (4, 12, 20)).astype(np.int16)
    return Views(image, *CASES[case], SPACING)


def shown(rows: Sequence[Row], **options: object) -> Page:
    return Page(page(summarise(rows), rows, {}, **options))


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """What training leaves: records with a user's paths in them."""
    folder = tmp_path / "demo"
    folder.mkdir()
    facts = {
        "task": "segmentation", "time": "2026-01-02T03:04:05+0000", "commit": "abc1234", "python": "3.11.9",
        "versions": {"surm-seg": "0.1.0", "torch": "2.13.0", "monai": None}, "system": "Linux", "machine": "x86_64",
        "data_format": "folder", "data_sha256": "d" * 64, "base_sha256": "b" * 64, "train_cases": ["case001"] * 7,
        "validation_cases": ["case002"], "parameters": {"encoder_adapter": 2304, "decoder": 899008, "model": 4058325},
        "adapter_sha256": {"adapter_model.safetensors": "a" * 64, "adapter_config.json": None},
    }  # fmt: skip
    config = {"data": "/home/doe/jane", "weights": "/home/doe/w.pth", "backbone": "sam_tiny", "structure": "circulant",
              "roles": ["q", "v"], "steps": 20, "seed": 3, "score_on": "test"}  # fmt: skip
    log = [{"step": n, "loss": 2.0 / n} | ({"score": n / 40} if n % 10 == 0 else {}) for n in range(1, 21)]
    (folder / "run.json").write_text(json.dumps(facts))
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    return folder


def test_the_report_needs_nothing_else(run_folder: Path, tmp_path: Path) -> None:
    done = scored()
    write_report(tmp_path, summarise(done.rows), done.rows, done.slices, views, run=run_facts(run_folder))
    html = (tmp_path / "report.html").read_text()
    found = Page(html)
    assert found.links and all(link.startswith(("data:", "#")) for link in found.links)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(found.tags)
    assert "@import" not in found.styles and all(
        u.startswith(("data:", "#")) for u in re.findall(r"url\(([^)]*)", found.styles)
    )
    assert "@page" in found.styles and "A4" in found.styles
    assert not re.search(r"https?://|/home/|\b[nN]a[nN]\b|\bNone\b|Undefined", found.text)
    assert "/home/doe" not in html and "w.pth" not in html


def test_pictures_are_png_of_the_worst_the_median_and_the_best_case() -> None:
    done = scored()
    found = drawn(case_lines(done.rows), done.slices, views)
    assert [heading.split(",")[0] for heading in found] == [
        "case002: the worst case", "case003: the median case", "case001: the best case",
    ]  # fmt: skip
    for pictures in found.values():
        assert [picture.title for picture in pictures] == ["worst slice", "median slice", "best slice"]
        for picture in pictures:
            head, _, data = picture.source.partition(",")
            assert head == "data:image/png;base64" and base64.b64decode(data).startswith(b"\x89PNG")
    assert drawn(case_lines(done.rows), done.slices, lambda case: None) == {}


def test_cases_stand_from_the_worst_to_the_best_and_undefined_at_the_end() -> None:
    lines = case_lines(scored().rows)
    assert [line.case for line in lines] == ["case002", "case003", "case001", "case004"]
    assert [line.dice for line in lines][2:] == [1.0, None]
    assert lines[0].worst is not None and lines[0].worst.score.organ == "left_kidney" and lines[3].worst is None


def test_both_protocols_stand_side_by_side_with_what_the_published_one_rewards() -> None:
    rows = scored().rows
    text, summary = shown(rows).text, summarise(rows)
    for protocol in ("recommended", "samed-2023"):
        dice = summary["protocols"][protocol]["overall"]["dice"]
        assert f"{dice['mean']:.3f} ± {dice['sd']:.3f}" in text
    assert "a missed organ the best HD95 (0) and a false organ the best Dice (1)" in text
    assert "Research use only" in text
    only = scored(protocols=["samed-2023"]).rows
    assert "recommended protocol" not in shown(only).text and "samed-2023" in shown(only).text
    assert "samed-2023" not in shown(scored(protocols=["recommended"]).rows).text


def test_missed_and_false_organs_are_listed() -> None:
    text = shown(scored().rows).text
    assert "1 organ missed, 1 organ found where the reference has none" in text
    missed, false = text.index("Missed organs"), text.index("False organs")
    assert re.search(r"case002 left kidney 0\.1", text[missed:false])
    assert re.search(r"case003 left kidney 0\.0", text[false:])
    assert "No organ was missed" in shown(scored(["case001"]).rows).text


def test_undefined_is_a_dash_with_its_reason() -> None:
    text = shown(scored(["case004"]).rows).text
    assert "both empty" in text and "–" in text and "nan" not in text.lower() and "No case has a defined Dice" in text
    unknown = shown(scored(spacing=None).rows).text
    assert "spacing unknown" in unknown and "voxel size unknown" in unknown
    assert "one case has no spread" in shown(scored(["case001"]).rows).text


def test_notes_are_text_and_not_markup() -> None:
    found = shown(scored().rows, notes=["case009 could not be scored (<script>)."])
    assert "case009 could not be scored (<script>)." in found.text and "script" not in found.tags


def test_a_run_shows_parameters_curves_and_hashes(run_folder: Path) -> None:
    found = shown(scored().rows, run=run_facts(run_folder))
    names = ("encoder", "circulant", "q, v", "abc1234", "torch 2.13.0", "Segmentation scores: demo", "training loss")
    for expected in (*names, "2,304", "899,008", "4,058,325", "0.057 %", "a" * 64, "d" * 64, "validation cases"):
        assert expected in found.text
    assert found.tags.count("svg") == 3 and found.tags.count("polyline") == 2
    assert "Scored on the training cases" not in found.text


def test_a_run_scored_on_its_training_cases_says_so(run_folder: Path) -> None:
    (run_folder / "config.yaml").write_text(yaml.safe_dump({"score_on": "train"}))
    assert "Scored on the training cases" in shown(scored().rows, run=run_facts(run_folder)).text


@pytest.mark.parametrize("name", ["run.json", "config.yaml", "metrics.jsonl"])
def test_damaged_records_of_a_run_are_named(run_folder: Path, name: str) -> None:
    (run_folder / name).write_text("{")
    with pytest.raises(Corrupt, match="demo"):
        run_facts(run_folder)


def test_facts_hold_no_option_that_could_name_a_file(run_folder: Path) -> None:
    facts: RunFacts = run_facts(run_folder)
    assert "doe" not in str(facts) and facts.loss[0] == (1, 2.0) and facts.score == [(10, 0.25), (20, 0.5)]
