"""One product with deltas equals the layer and its deltas done apart, forward and back."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

import surm_seg.structures as family
from surm_seg.kernel import Delta, GradMethod, structured_linear


def placed(name: str, out_features: int, in_features: int, start: int, dtype: torch.dtype = torch.float64) -> Delta:
    structure = family.make(name, out_features, in_features)
    values = {
        n: torch.randn(shape, dtype=dtype).mul_(0.1).requires_grad_() for n, shape in structure.generators.items()
    }
    return Delta(structure, values, 0.7, start, start + out_features)


def apart(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, deltas: list[Delta]) -> torch.Tensor:
    y = linear(x, weight, bias)
    for d in deltas:
        y[..., d.start : d.stop] += d.scale * linear(x, d.structure.dense(d.generators))
    return y


@pytest.mark.parametrize("method", ["auto", "fft", "gemm"])
@pytest.mark.parametrize("name", family.names())
def test_equals_the_sum_of_branches(name: str, method: GradMethod) -> None:
    """Two deltas on q, one on v: several adapters add, k is untouched."""
    weight, bias = torch.randn(48, 16, dtype=torch.float64), torch.randn(48, dtype=torch.float64)
    deltas = [placed(name, 16, 16, 0), placed(name, 16, 16, 0), placed("low_rank", 16, 16, 32)]
    leaves = [value for d in deltas for value in d.generators.values()]
    x = torch.randn(2, 300, 16, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, 300, 48, dtype=torch.float64)
    found, expected = structured_linear(x, weight, bias, deltas, method), apart(x, weight, bias, deltas)
    torch.testing.assert_close(found, expected)
    assert torch.equal(found[..., 16:32], linear(x, weight, bias)[..., 16:32])
    ours, theirs = (torch.autograd.grad(y, [x, *leaves], grad) for y in (found, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_weight_and_bias_get_gradients_where_they_ask() -> None:
    weight, bias = (
        torch.randn(8, 8, dtype=torch.float64, requires_grad=True),
        torch.randn(8, dtype=torch.float64, requires_grad=True),
    )
    deltas = [placed("circulant", 8, 8, 0)]
    x = torch.randn(5, 8, dtype=torch.float64)
    ours, theirs = (
        torch.autograd.grad(f(x, weight, bias, deltas).square().sum(), [weight, bias])
        for f in (structured_linear, apart)
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", family.names())
def test_under_autocast_with_backward_outside(name: str) -> None:
    weight, bias = torch.randn(16, 16), torch.randn(16)
    delta = placed(name, 16, 16, 0, torch.float32)
    x = torch.randn(64, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = structured_linear(x, weight, bias, [delta])
    assert y.dtype == torch.bfloat16
    leaves = [x, *delta.generators.values()]
    ours = torch.autograd.grad(y.float().sum(), leaves)
    theirs = torch.autograd.grad(apart(x, weight, bias, [delta]).sum(), leaves)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() <= 0.02 * b.norm()


def test_recomputed_by_gradient_checkpointing() -> None:
    weight, bias, delta = torch.randn(8, 8), torch.randn(8), placed("circulant", 8, 8, 0, torch.float32)
    x = torch.randn(5, 8, requires_grad=True)
    leaves = [x, delta.generators["c"]]

    def layer(x: torch.Tensor) -> torch.Tensor:
        return structured_linear(x, weight, bias, [delta])

    plain = torch.autograd.grad(layer(x).sum(), leaves)
    again = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).sum(), leaves)  # pyright: ignore
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("name", family.names())
def test_without_a_weight_the_deltas_are_all_there_is(name: str) -> None:
    bias, delta = torch.randn(16, dtype=torch.float64), placed(name, 16, 16, 0)
    x = torch.randn(5, 16, dtype=torch.float64)
    torch.testing.assert_close(
        structured_linear(x, None, bias, [delta]), apart(x, torch.zeros(16, 16, dtype=torch.float64), bias, [delta])
    )


def test_deltas_whose_rows_overlap_add_up() -> None:
    weight, bias = torch.randn(48, 16, dtype=torch.float64), torch.randn(48, dtype=torch.float64)
    deltas = [placed("circulant", 16, 16, 8), placed("low_rank", 48, 16, 0), placed("toeplitz", 16, 16, 32)]
    x = torch.randn(5, 16, dtype=torch.float64)
    torch.testing.assert_close(structured_linear(x, weight, bias, deltas), apart(x, weight, bias, deltas))


def test_a_weight_stored_in_bfloat16_is_rounded_once_after_the_sum() -> None:
    weight, delta = torch.randn(16, 16).bfloat16(), placed("circulant", 16, 16, 0, torch.float32)
    x = torch.eye(16, dtype=torch.bfloat16)
    expected = (weight.float() + 0.7 * delta.structure.dense(delta.generators)).bfloat16()
    assert torch.equal(structured_linear(x, weight, None, [delta]), expected.T)


COMPILED = """
import torch
import surm_seg.structures as family
from surm_seg.kernel import Delta, structured_linear
weight, bias, x = torch.randn(48, 16), torch.randn(48), torch.randn(7, 16, requires_grad=True)
for name in family.names():
    structure = family.make(name, 16, 16)
    g = [torch.randn(shape, requires_grad=True) for shape in structure.generators.values()]
    def layer(x, *g):
        named = dict(zip(structure.generators, g))
        return torch.tanh(structured_linear(x, weight, bias, [Delta(structure, named, 0.5, 16, 32)]))
    grads = []
    for function in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        y = function(x, *g)
        grads.append([y, *torch.autograd.grad(y.square().sum(), [x, *g])])
    for plain, compiled in zip(*grads):
        torch.testing.assert_close(compiled, plain)
"""


def test_compiles_into_one_graph_with_its_backward() -> None:
    """In a process of its own: compilation does not see through the shape checks of the tests."""
    subprocess.run([sys.executable, "-c", COMPILED], check=True)


IN_TWO_PROCESSES = """
import os, sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
import peft
from surm_seg import SurmConfig
dist.init_process_group("gloo")
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(8, 24), torch.nn.Tanh(), torch.nn.Linear(24, 3)).double()
model = peft.get_peft_model(net, SurmConfig(structure="circulant", target_modules=["0"], parts=["q", "v"]))
x = torch.randn(12, 8, dtype=torch.float64)
def gradients(model, x):
    model.zero_grad()
    model(x).square().mean().backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]
whole = gradients(model, x)
mine = gradients(DistributedDataParallel(model), x.chunk(2)[dist.get_rank()])
assert len(whole) == 2 and all(g.norm() > 0 for g in whole)
for a, b in zip(whole, mine):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
dist.destroy_process_group()
"""


def test_two_processes_under_ddp_have_the_gradients_of_one(tmp_path: Path) -> None:
    script = tmp_path / "ddp.py"
    script.write_text(IN_TWO_PROCESSES)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    subprocess.run([*launcher, "--nproc-per-node", "2", str(script)], check=True)
