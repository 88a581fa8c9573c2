"""The bench commands: one tiny real run of each, the laws of their meters, and that what is wrong is never timed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from surm_seg import bench, metrics, structures
from surm_seg.bench import variants
from surm_seg.bench.cell import Cell
from surm_seg.bench.metrics import TOLERANCE, check
from surm_seg.bench.organs import ORGANS, label_maps
from surm_seg.bench.table import markdown
from surm_seg.errors import SurmError
from surm_seg.grid import Grid
from surm_seg.kernel import GradMethod
from surm_seg.structures.circulant import Circulant

WIDTH, TOKENS, ROUNDS = 32, 64, 2
FLOAT32 = 4  # bytes

BY_FFT = ("circulant", "skew_circulant", "toeplitz", "circulant_dropout", "fft_per_token", "peft_c3a")
"""Methods whose arithmetic is not in matrix products alone."""


def run(output: Path, *options: str, dtype: str = "float32") -> int:
    size = ["--width", str(WIDTH), "--tokens", str(TOKENS), "--dtype", dtype, "--rounds", str(ROUNDS)]
    return bench.main(["kernel", *size, "--threads", "1", "--output", str(output), *options])


def written(output: Path, benchmark: str = "kernel") -> dict[str, Any]:
    return json.loads((output / f"{benchmark}.json").read_text())


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bench")
    threads = torch.get_num_threads()
    assert run(folder) == 0
    assert torch.get_num_threads() == threads
    return written(folder)


def test_every_structure_and_method_is_measured_in_every_cell(results: dict[str, Any]) -> None:
    assert [cell["layout"] for cell in results["cells"]] == ["fused", "square"]
    for cell in results["cells"]:
        assert (cell["width"], cell["tokens"], cell["dtype"], cell["rounds"]) == (WIDTH, TOKENS, "float32", ROUNDS)
        methods = {variant["method"] for variant in cell["variants"]}
        assert methods >= {*structures.names(), *variants.PEFT, "circulant_dropout", "merged"}
        for variant in cell["variants"]:
            assert variant["refused"] is None, variant
            assert len(variant["wall_s"]) == len(variant["cpu_s"]) == ROUNDS
            assert min(variant["wall_s"]) > 0 and variant["peak_bytes"] > 0 and variant["wall_spread"] >= 0
    assert results["environment"]["threads"] == 1 and results["environment"]["processor"]
    assert results["environment"]["versions"]["peft"] and results["options"]["rounds"] == ROUNDS


def test_the_frozen_layer_is_one_and_holds_its_output_and_the_gradient_of_x(results: dict[str, Any]) -> None:
    for cell in results["cells"]:
        outputs = WIDTH * (3 if cell["layout"] == "fused" else 1)
        frozen = {v["label"]: v for v in cell["variants"] if v["method"] == "frozen"}
        for variant in frozen.values():
            ratios = [variant[name] for name in ("wall_ratio", "cpu_ratio", "peak_ratio", "floor")]
            assert ratios == [1, 1, 1, 1] and variant["wall_spread"] == 0 and variant["parameters"] == 0
        assert frozen["frozen nn.Linear"]["peak_bytes"] == FLOAT32 * TOKENS * (outputs + WIDTH)
        assert frozen["frozen nn.Linear, forward"]["peak_bytes"] == FLOAT32 * TOKENS * outputs


def test_parameters_are_those_of_the_slices(results: dict[str, Any]) -> None:
    for cell in results["cells"]:
        counts = {variant["label"]: variant["parameters"] for variant in cell["variants"]}
        parts, outputs = (2, 3 * WIDTH) if cell["layout"] == "fused" else (1, WIDTH)
        assert counts["circulant"] == parts * WIDTH and counts["low_rank rank=8"] == parts * 8 * 2 * WIDTH
        assert counts["PEFT LoRA r=8"] == 8 * (WIDTH + outputs)


def test_markdown_has_a_row_per_variant_and_the_date(results: dict[str, Any]) -> None:
    text = markdown(results)
    assert results["environment"]["time"][:10] in text
    for cell in results["cells"]:
        title = f"### {cell['layout']} {WIDTH} -> {WIDTH * (3 if cell['layout'] == 'fused' else 1)}, float32"
        section = text[text.index(title) :].split("###")[1]
        labels = [line.split("|")[1].strip() for line in section.splitlines() if line.startswith("|")]
        assert labels[2:] == [variant["label"] for variant in cell["variants"]]


def test_with_markdown_only_the_document_is_on_standard_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "--methods", "circulant", "merged", "--layout", "fused", "--markdown") == 0
    assert capsys.readouterr().out == markdown(written(tmp_path)) + "\n"


def test_small_deltas_vanish_in_a_bfloat16_weight(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--methods", "circulant", "low_rank", "peft_lora", "--layout", "square", dtype="bfloat16") == 0
    (cell,) = written(tmp_path)["cells"]
    lost = cell["rounding"]
    assert 0 < lost["0.001"] < lost["0.0001"] < lost["3e-05"] < 1
    assert f"{lost['0.0001']:.2f} at std 0.0001" in capsys.readouterr().out


def test_a_method_that_refuses_says_why_and_the_others_are_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "--methods", "peft_oft", "circulant", "--layout", "square", "--width", "36") == 0
    variants = {variant["method"]: variant for variant in written(tmp_path)["cells"][0]["variants"]}
    assert "oft_block_size" in variants["peft_oft"]["refused"] and variants["circulant"]["wall_ratio"] > 0
    assert f"PEFT OFT b=32 cannot be measured: {variants['peft_oft']['refused']}" in capsys.readouterr().out


def test_a_wrong_layer_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = Circulant.inverse
    monkeypatch.setattr(Circulant, "inverse", lambda self, spectrum: 1.01 * right(self, spectrum))
    assert run(tmp_path, "--methods", "circulant") == 1
    assert "error [bench-wrong]: circulant on fused" in capsys.readouterr().err
    assert not (tmp_path / "kernel.json").exists()


@pytest.mark.parametrize("layout", ["fused", "square"])
@pytest.mark.parametrize("grad", ["auto", "gemm"])
def test_formulas_of_matrix_products_are_what_torch_counts(layout: Any, grad: GradMethod) -> None:
    small, large = (Cell(layout, WIDTH, tokens, "float32") for tokens in (TOKENS, 2 * TOKENS))
    checked = 0
    for variant in variants.variants(small, [], [grad]):
        forced = grad == "gemm" and variant.method in structures.names()
        if variant.forward_only or (variant.method in BY_FFT and not forced):
            continue
        (few, formula), (many, _) = _counted(variant, small), _counted(variant, large)
        if formula is not None:
            assert (many - few) / TOKENS == small.frozen_flops + formula, variant.label
            checked += 1
    assert checked >= len(structures.names())


def _counted(variant: variants.Variant, cell: Cell) -> tuple[int, float | None]:
    """Operations in matrix products of one step, and the formula's per token."""
    linear = nn.Linear(cell.width, cell.out_features).requires_grad_(False)
    layer = variant.build(cell, linear)
    x = torch.randn(1, cell.tokens, cell.width, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        layer.module(x).sum().backward()
    return counter.get_total_flops(), layer.flops


def test_a_dry_run_lists_the_cells_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["kernel", "--quick", "--dry-run", "--output", str(tmp_path / "bench")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and "fused 768 -> 2304, 1024 tokens, float32" in lines[0]
    assert not (tmp_path / "bench").exists()


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ([], "usage: surm-seg bench NAME"),
        (["speed"], "kernel"),
        (["kernel", "--methods", "circulant", "best"], "error [bench-method]: --methods: best is unknown"),
        (["kernel", "--rounds", "0"], "error [bench-option]: --rounds must be 2 or more."),
        (["kernel", "--width", "768", "1"], "error [bench-option]: --width must be 2 or more."),
        (["metrics", "--organs", "9"], "error [bench-option]: --organs must be 1 to 8"),
        (["metrics", "--shape", "64", "64"], "error [bench-option]: --organs must be 1 to 8, --shape three numbers"),
        (["metrics", "--shape", "64", "64", "-64"], "error [bench-option]: --organs must be 1 to 8, --shape"),
        (["prepare", "--cases", "0"], "error [bench-option]: --shape must be three numbers; --cases"),
        (["prepare", "--shape", "8", "8", "8"], "error [bench-shape]: Organs vanish in [8, 8, 8] voxels"),
    ],
)
def test_usage_errors_exit_2(
    words: Sequence[str],
    shown: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert bench.main(words) == 2
    assert shown in capsys.readouterr().err


def test_a_type_error_in_a_list_exits_2() -> None:
    with pytest.raises(SystemExit) as stop:
        bench.main(["kernel", "--dtype", "float8"])
    assert stop.value.code == 2


@pytest.mark.parametrize("seed", [0, 1])
def test_generated_organs_are_all_there_and_predicted_imperfectly(seed: int) -> None:
    prediction, reference = label_maps(len(ORGANS), (64, 160, 160), seed)
    for value in range(1, len(ORGANS) + 1):
        assert 0.5 < metrics.dice(prediction == value, reference == value) < 1
    for labels, again in zip((prediction, reference), label_maps(len(ORGANS), (64, 160, 160), seed), strict=True):
        np.testing.assert_array_equal(labels, again)


MEASURED_METRICS = ["metrics", "--organs", "3", "--shape", "24", "40", "40", "--repeats", "2"]


def test_metrics_of_three_programs_agree_and_are_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([*MEASURED_METRICS, "--output", str(tmp_path)]) == 0
    rows = {row["label"]: row for row in written(tmp_path, "metrics")["rows"]}
    assert rows["surm-seg"]["ratio"] == 1
    for label, row in rows.items():
        assert len(row["wall_s"]) == len(row["cpu_s"]) == (2 if label.startswith("surm-seg") else 1)
        assert min(row["wall_s"]) > 0 and row["ratio"] > 0
    assert {*(f"MONAI {name}" for name in ("Dice", "HD95", "NSD")), "medpy hd95", "medpy dc"} <= set(rows)
    shown = capsys.readouterr().out
    assert "3 organs, 24x40x40 voxels; all values agree." in shown
    assert [line.split("|")[1].strip() for line in shown.splitlines() if line.startswith("|")][2:] == list(rows)


def test_metrics_that_differ_are_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(metrics, "border_voxels", lambda mask: mask)
    assert bench.main([*MEASURED_METRICS, "--output", str(tmp_path)]) == 1
    assert "error [bench-differs]: hd95" in capsys.readouterr().err
    assert not (tmp_path / "metrics.json").exists()


@pytest.mark.parametrize("metric", TOLERANCE)
def test_one_organ_beyond_the_tolerance_is_named(metric: str) -> None:
    ours = {metric: [0.5, 0.25, 0.75]}
    check({"surm-seg": ours, "other": {metric: [0.5, 0.25 + TOLERANCE[metric] / 2, 0.75]}})
    for wrong in (0.25 + 2 * TOLERANCE[metric], 0.25 - 2 * TOLERANCE[metric], float("nan")):
        with pytest.raises(SurmError, match=f"{metric} of the spleen is 0.25 by surm-seg and {wrong} by other"):
            check({"surm-seg": ours, "other": {metric: [0.5, wrong, 0.75]}})


MEASURED_PREPARE = ["prepare", "--cases", "2", "--shape", "24", "40", "40", "--repeats", "2", "--workers", "1"]


def test_prepared_arrays_agree_with_monais_and_are_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([*MEASURED_PREPARE, "--output", str(tmp_path)]) == 0
    rows = written(tmp_path, "prepare")["rows"]
    assert [row["label"] for row in rows] == ["surm-seg prepare", "surm-seg prepare, parallel", "MONAI"]
    assert all(len(row["wall_s"]) == 2 and min(row["wall_s"]) > 0 for row in rows)
    assert "2 volumes, 24x40x40 voxels" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["prepare.json"]


def test_arrays_that_differ_are_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Grid, "lps", lambda self, voxels: voxels.T)  # the flips are forgotten
    assert bench.main([*MEASURED_PREPARE, "--output", str(tmp_path)]) == 1
    assert "error [bench-differs]: image of case" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["metrics", "prepare"])
def test_a_dry_run_of_a_comparison_writes_nothing(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main([name, "--dry-run", "--output", str(tmp_path / "bench")]) == 0
    assert "x512x512 voxels" in capsys.readouterr().out and not (tmp_path / "bench").exists()
