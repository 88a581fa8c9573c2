"""Likeness of models: alignment by its definition, weight changes of any method, and the study at toy size."""

import argparse
import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from pipelines_small import vit

from pipelines.studies import analysis, digits
from pipelines.studies.similarity import cosine, linear_cka, spectrum
from pipelines.studies.table import main
from surm_seg import methods
from surm_seg.structures import make

RNG = np.random.default_rng(0)
EXAMPLES = 40


def representation(features: int) -> torch.Tensor:
    """With directions of very unequal size, as representations have them."""
    return torch.from_numpy(RNG.standard_normal((EXAMPLES, features)) * np.logspace(0, -2, features) + 3)


def hsic(K: np.ndarray, L: np.ndarray) -> float:
    """Hilbert-Schmidt independence criterion of two Gram matrices (Gretton et al., 2005)."""
    n = len(K)
    H = np.eye(n) - np.ones((n, n)) / n
    return float(np.trace(K @ H @ L @ H)) / (n - 1) ** 2


def related(X: torch.Tensor) -> torch.Tensor:
    return torch.tanh(X @ torch.from_numpy(RNG.standard_normal((X.shape[1], 7)))) + 0.1 * representation(7)


def orthogonal(n: int) -> torch.Tensor:
    return torch.linalg.qr(torch.from_numpy(RNG.standard_normal((n, n)))).Q


def test_alignment_is_that_of_centred_gram_matrices() -> None:
    X = representation(5)
    Y = related(X)
    K, L = ((Z @ Z.T).numpy() for Z in (X, Y))
    expected = hsic(K, L) / (hsic(K, K) * hsic(L, L)) ** 0.5
    assert linear_cka(X, Y) == pytest.approx(expected) == pytest.approx(linear_cka(Y, X))
    assert 0.05 < expected < 0.95


def test_alignment_knows_no_turn_no_shift_and_no_scale_but_stretching() -> None:
    X = representation(6)
    Y = related(X)
    known = linear_cka(X, Y)
    assert linear_cka(X @ orthogonal(6), 5 * Y @ orthogonal(7) + 2) == pytest.approx(known)
    assert linear_cka(X, -3 * X @ orthogonal(6)) == pytest.approx(1)
    stretched = X @ torch.diag(torch.tensor([1e-2, 1, 1, 1, 1, 50.0], dtype=torch.float64))
    assert linear_cka(X, stretched) < 0.9 and abs(linear_cka(stretched, Y) - known) > 0.01
    assert linear_cka(X, torch.ones(EXAMPLES, 3, dtype=torch.float64)) == 0


def test_cosines() -> None:
    A = torch.from_numpy(RNG.standard_normal((4, 6)))
    B = torch.from_numpy(RNG.standard_normal((4, 6)))
    expected = np.dot(A.flatten(), B.flatten()) / np.linalg.norm(A) / np.linalg.norm(B)
    assert cosine(A, B) == pytest.approx(expected) and cosine(A, -2 * A) == pytest.approx(-1)
    assert cosine(A, 0 * B) == 0


def test_spectra_of_known_matrices() -> None:
    turn = spectrum(7 * orthogonal(20), (1, 5, 99))
    assert turn.effective_rank == pytest.approx(20) and turn.numerical_rank == 20 and not turn.singular
    assert turn.top == pytest.approx({1: 1 / 20, 5: 5 / 20, 99: 1})
    sizes = torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    low = spectrum(orthogonal(20)[:, :4] * sizes @ orthogonal(20)[:4])
    assert low.numerical_rank == 4 and low.singular and low.values[:5] == pytest.approx([1, 0.5, 0.25, 0.25, 0])
    # Of 1/2, 1/4, 1/8, 1/8 the entropy is 7/4 bits.
    assert low.effective_rank == pytest.approx(2**1.75) and low.top[1] == pytest.approx(16 / 22)


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> argparse.Namespace:
    return argparse.Namespace(model=str(vit(tmp_path_factory.mktemp("vit"))))


@pytest.mark.parametrize("method", ["full", "linear_probe", "lora", "low_rank", "monarch", "displacement", "c3a"])
def test_a_change_is_what_makes_the_frozen_model_the_trained_one(
    asked: argparse.Namespace, method: str, tmp_path: Path
) -> None:
    of = digits.task(asked, 0)
    before = of.base.build()
    model = methods.tuned(of.base.build(), method, roles=digits.ROLES, head=of.base.head)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    methods.save(model, tmp_path / "adapter")
    after = digits.merged(of, tmp_path)
    added = digits.changes(before, after)
    assert len(added) == 2 * 2 and all(delta.dtype == torch.float64 for delta in added.values())
    assert all(bool(delta.any()) == (method != "linear_probe") for delta in added.values())
    if method in ("lora", "low_rank"):
        assert {spectrum(delta).numerical_rank for delta in added.values()} == {8}
    if method != "full":  # which changes the rest of the model too
        rebuilt = of.base.build().double().eval()
        for name, delta in added.items():
            rebuilt.get_parameter(f"{name}.weight").data += delta
        for found, expected in zip(digits.hidden(of, rebuilt), digits.hidden(of, after), strict=True):
            torch.testing.assert_close(found, expected)
    pixels = torch.randn(2, 3, 16, 16)
    answers = (one(pixel_values=pixels.to(next(one.parameters()).dtype)).logits for one in (model.eval(), after))
    torch.testing.assert_close(*(one.double() for one in answers), atol=1e-4, rtol=1e-4)


def test_no_member_of_a_family_points_more_to_a_change_than_the_nearest() -> None:
    D = torch.from_numpy(RNG.standard_normal((12, 12)))
    for method, options in (("lora", {"r": 2}), ("circulant", {"block": 6}), ("monarch", {"blocks": 2, "rank": 2})):
        limit = cosine(analysis.nearest_members(method, options, {"q": D})["q"], D)
        family = make("low_rank", 12, 12, rank=2) if method == "lora" else make(method, 12, 12, **options)
        for seed in range(30):
            rng = torch.Generator().manual_seed(seed)
            drawn = {k: torch.randn(s, generator=rng, dtype=torch.float64) for k, s in family.generators.items()}
            assert cosine(family.dense(drawn), D) <= limit + 1e-12
        assert 0.2 < limit < 1
    assert analysis.nearest_members("bitfit", {}, {"q": D}) == {}


def test_the_study_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        *("--output", str(tmp_path / "out"), "--model", str(vit(tmp_path / "vit")), "--steps", "2", "--seeds", "2"),
        *("--learning_rates", "1e-2", "--budget", "128", "--methods", "low_rank,circulant"),
    ]
    assert main(analysis.parser(), analysis.study, words) == 0
    folder = tmp_path / "out" / "analysis"
    text, table = (folder / "table.md").read_text(), json.loads((folder / "table.json").read_text())
    assert capsys.readouterr().out.endswith(text)
    assert set(table["spectra"]) == {"full", "low_rank", "circulant"}
    assert set(table["compared"]) == {"low_rank", "circulant", analysis.FROZEN, analysis.ANOTHER}
    frozen = table["compared"][analysis.FROZEN]
    assert [one["moved"] for one in frozen] == pytest.approx([0, 0]) and {one["length"] for one in frozen} == {0}
    assert all(one["singular"] for run in table["spectra"]["low_rank"] for one in run)
    assert not any(one["singular"] for run in table["spectra"]["full"] for one in run)
    for name, seeds in table["compared"].items():
        pairs = 1 if name == analysis.ANOTHER else 2  # two seeds are one pair, not two alike
        assert len(seeds) == pairs and all(len(one["cka"]) == 3 and max(one["cka"]) <= 1 + 1e-9 for one in seeds)
    for name in ("low_rank", "circulant"):
        assert all(one["direction"] <= one["at_most"] + 1e-9 for one in table["compared"][name])
    picture = ElementTree.parse(folder / "picture.svg").getroot()
    assert len(list(picture.iter("{http://www.w3.org/2000/svg}polyline"))) == 4 + 3
