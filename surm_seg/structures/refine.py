"""Alternating least squares, for families whose nearest member has no closed form."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from surm_seg.structures.base import Generators, Structure

ROUNDS = 20
STEPS = 100  # of conjugate gradients in one least-squares problem
ENOUGH = 1e-3  # a turn that lowers the error by a smaller share is the last
SMALL = 1e-5  # and so, within a turn, is a step that lowers the squared error by a smaller share
EXACT = 1e-12  # relative error taken for none


def alternating_least_squares(
    structure: Structure, generators: Generators, matrix: Float[Tensor, "out in"], order: Sequence[str]
) -> Generators:
    """Generators no further from `matrix` in Frobenius norm than the given ones: a local optimum.

    The matrix must be linear in each generator for itself. Each is solved for in turn, by conjugate gradients on the
    normal equations; one step costs a `dense` and a `pullback`.

    Args:
        order: the generators' names, the first to be solved for first.
    """
    error = float((matrix - structure.dense(generators)).norm())
    exact = EXACT * float(matrix.norm())
    for turn in range(ROUNDS * len(order)):
        if error <= exact:
            break
        name = order[turn % len(order)]
        candidate = {**generators, name: _solve(structure, generators, name, matrix)}
        nearer = float((matrix - structure.dense(candidate)).norm())
        if turn >= len(order) and nearer >= error * (1 - ENOUGH):
            break
        if nearer < error:
            generators, error = candidate, nearer
    return generators


def _solve(structure: Structure, generators: Generators, name: str, matrix: Float[Tensor, "out in"]) -> Tensor:
    """The value of one generator that minimises |matrix - dense|, the others held."""

    def product(value: Tensor) -> Tensor:
        return structure.dense({**generators, name: value})

    def adjoint(difference: Tensor) -> Tensor:
        return structure.pullback(generators, difference)[name]

    value = generators[name].clone()
    residual = matrix - product(value)
    gradient = adjoint(residual)
    direction = gradient
    size = gradient.square().sum()
    smallest = (EXACT * adjoint(matrix).norm()) ** 2
    for _ in range(STEPS):
        if size <= smallest:
            break
        image = product(direction)
        step = size / image.square().sum()
        value += step * direction
        residual = residual - step * image
        if step * size <= SMALL * residual.square().sum():
            break
        gradient = adjoint(residual)
        previous, size = size, gradient.square().sum()
        direction = gradient + (size / previous) * direction
    return value
