"""What a family captures of a gradient, by dense arithmetic; how a budget is spent; where the gradients come from."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pipelines_small import bert
from torch import Tensor, nn

from pipelines import glue, search
from pipelines.search import Member, Place
from surm_seg import structures
from surm_seg.errors import BadConfig, SurmError
from surm_seg.task import Batch, Record, Task
from surm_seg.tuner import SurmConfig, adapt

NAMES = structures.names()
EXACT = ("circulant", "kronecker", "low_rank", "monarch", "skew_circulant", "toeplitz")
"""Families whose projection is the nearest member, each of whose members the next one holds. (Not displacement.)"""


def place(gradient: np.ndarray, name: str = "x") -> Place:
    return Place(name, "q", torch.from_numpy(np.ascontiguousarray(gradient)))


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("shape", [(12, 12), (24, 12), (7, 7)])
@pytest.mark.parametrize("family", NAMES)
def test_a_family_captures_some_of_a_gradient_and_larger_members_more(family: str, shape: tuple[int, int]) -> None:
    here = place(drawn(*shape))
    found = search.members(here, [family], 10**6)
    shares = [member.captured / here.energy for member in found]
    assert all(0 <= share <= 1 + 1e-9 for share in shares) and shares[0] > 0
    sizes = [member.parameters for member in found]
    assert all(1.5 * small <= large for small, large in itertools.pairwise(sizes))
    if family in EXACT:
        assert all(small <= large + 1e-9 for small, large in itertools.pairwise(shares))


def along_diagonals(G: np.ndarray) -> float:
    """|nearest circulant|^2: the squared sum of each wrapped diagonal over its length."""
    n = len(G)
    return sum(sum(G[(j + k) % n, j] for j in range(n)) ** 2 / n for k in range(n))


def along_open_diagonals(G: np.ndarray) -> float:
    rows, columns = G.shape
    diagonals = [np.diagonal(G, k) for k in range(-rows + 1, columns)]
    return sum(d.sum() ** 2 / len(d) for d in diagonals)


def largest(r: int) -> Callable[[np.ndarray], float]:
    return lambda G: float((np.linalg.svd(G, compute_uv=False)[:r] ** 2).sum())


def kronecker(G: np.ndarray) -> float:
    """By Van Loan's rearrangement of blocks into rows; 12 = 4 x 3 = 3 x 4."""
    rows = [G[3 * i : 3 * i + 3, 4 * j : 4 * j + 4].ravel() for i in range(4) for j in range(3)]
    return largest(1)(np.stack(rows))


@pytest.mark.parametrize(
    ("family", "options", "captured"),
    [
        ("circulant", {"block": 12}, along_diagonals),
        ("toeplitz", {}, along_open_diagonals),
        ("low_rank", {"rank": 1}, largest(1)),
        ("low_rank", {"rank": 4}, largest(4)),
        ("kronecker", {"rank": 1}, kronecker),
    ],
)
def test_what_is_captured_is_what_dense_arithmetic_says(
    family: str, options: dict[str, int], captured: Callable[[np.ndarray], float]
) -> None:
    G = drawn(12, 12)
    (member,) = [m for m in search.members(place(G), [family], 10**6) if dict(m.options) == options] or [
        search.member(place(G), structures.make(family, 12, 12, **options))
    ]
    assert member.captured == pytest.approx(captured(G))


@pytest.mark.parametrize(
    ("family", "gradient"),
    [
        ("circulant", scipy.linalg.circulant(drawn(12))),
        ("toeplitz", scipy.linalg.toeplitz(drawn(12), drawn(12, seed=1))),
        ("low_rank", np.outer(drawn(12), drawn(12, seed=1))),
        ("kronecker", np.kron(drawn(4, 3), drawn(3, 4, seed=1))),
    ],
)
def test_a_gradient_that_is_of_a_family_is_given_to_it(family: str, gradient: np.ndarray) -> None:
    """Beside others, of which none needs as few parameters for all of it."""
    found = [place(gradient, "planted"), place(drawn(12, 12) / 100, "noise")]
    budget = next(m.parameters for m in search.members(found[0], [family], 24) if m.captured > 0.99 * found[0].energy)
    chosen = search.allotted([search.members(one, NAMES, budget) for one in found], budget)
    assert chosen[0] and chosen[0].structure == family and chosen[0].captured == pytest.approx(found[0].energy)
    assert search.overrides(found, chosen)[r"^planted\.q"]["structure"] == family
    assert search.overrides(found, chosen)[r"^noise\.q"] == {"structure": "none"}


member = st.builds(
    lambda parameters, captured: Member("low_rank", {}, parameters, captured), st.integers(1, 30), st.floats(0, 10)
)
choices = st.lists(st.lists(member, max_size=4), min_size=1, max_size=3)


@settings(max_examples=200, deadline=None)
@given(choices, st.integers(0, 100))
def test_the_budget_is_kept_and_what_is_captured_is_near_the_most(choices: list[list[Member]], budget: int) -> None:
    chosen = [one for one in search.allotted(choices, budget) if one]
    assert sum(one.parameters for one in chosen) <= budget

    def worth(some: tuple[Member | None, ...]) -> float:
        given = [one for one in some if one]
        return sum(one.captured for one in given) if sum(one.parameters for one in given) <= budget else 0.0

    most = max(worth(some) for some in itertools.product(*([None, *members] for members in choices)))
    largest_one = max((one.captured for members in choices for one in members), default=0.0)
    assert most - largest_one <= sum(one.captured for one in chosen) + 1e-9 <= most + 2e-9


def test_a_budget_for_everything_captures_everything() -> None:
    found = [place(drawn(8, 8, seed=n), str(n)) for n in range(3)]
    ladders = [search.members(one, NAMES, 10**6) for one in found]
    chosen = search.allotted(ladders, 10**6)
    for one, given_ in zip(found, chosen, strict=True):
        assert given_ and given_.captured == pytest.approx(one.energy)


def test_uniform_is_one_member_everywhere() -> None:
    found = [place(drawn(8, 8), "a"), place(drawn(16, 8), "b")]
    ladders = [search.members(one, ["low_rank"], 1000) for one in found]
    alike = search.uniform(ladders, "low_rank", 100)
    assert alike and [one.options for one in alike] == [{"rank": 2}] * 2  # 2 * 40; rank 3 would have 120
    assert search.uniform(ladders, "low_rank", 39) is None


class Fused(Task):
    """A regression with a fused qkv; its gradient is known in closed form."""

    def __init__(self, bad: bool = False) -> None:
        torch.manual_seed(0)
        self.net = nn.ModuleDict({"qkv": nn.Linear(4, 12, bias=False)})
        self.bad = bad
        body = nn.Sequential(self.net["qkv"])
        self.model = adapt(body, SurmConfig(target_modules=r"0", parts=["q", "v"]))

    def __len__(self) -> int:
        return 100

    def sample(self, index: int, rng: np.random.Generator) -> Batch:
        return {"x": torch.zeros(4), "y": torch.zeros(12)}

    def loss(self, batch: Batch) -> Tensor:
        loss = (self.model(batch["x"]) - batch["y"]).square().sum(1).mean() / 2
        return loss * float("nan") if self.bad else loss

    def validate(self) -> Record:
        return {}


def batches() -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        yield {"x": torch.randn(5, 4, generator=generator), "y": torch.randn(5, 12, generator=generator)}


def test_gradients_are_means_over_the_batches_of_each_slice() -> None:
    task = Fused()
    weight = task.net["qkv"].weight.detach().clone()
    found = search.with_gradients(task, batches(), seed=0, device="cpu")
    assert [(one.part, one.size) for one in found] == [("q", (4, 4)), ("v", (4, 4))]
    expected = torch.stack([(b["x"] @ weight.T - b["y"]).T @ b["x"] / 5 for b in batches()]).mean(0).double()
    torch.testing.assert_close(found[0].gradient, expected[:4], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found[1].gradient, expected[8:], atol=1e-6, rtol=1e-5)


def test_a_loss_that_is_not_finite_is_told() -> None:
    with pytest.raises(SurmError, match="loss of batch 1 is nan"):
        search.with_gradients(Fused(bad=True), batches(), seed=0, device="cpu")


def test_gradients_of_a_transformer_are_those_of_full_fine_tuning(tmp_path: Path) -> None:
    model = str(bert(tmp_path / "model"))
    task = glue.create(glue.Config(model=model), 0)
    batch = task.collate([task.sample(n, np.random.default_rng(0)) for n in range(8)])
    found = search.with_gradients(task, [batch], seed=0, device="cpu")
    full = glue.create(glue.Config(model=model, method="full"), 0)
    full.model.eval()
    full.loss(batch).backward()
    weights = dict(full.model.named_parameters())
    assert len(found) == 4
    for one in found:
        torch.testing.assert_close(one.gradient.float(), weights[f"{one.module}.weight"].grad, atol=1e-8, rtol=1e-3)


def test_a_task_without_deltas_has_no_places(tmp_path: Path) -> None:
    task = glue.create(glue.Config(model=str(bert(tmp_path / "model")), method="full"), 0)
    with pytest.raises(BadConfig, match="No Linear of the task's model has a structured delta"):
        search.places(task)
