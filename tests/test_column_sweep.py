"""The column sweep against Optimal Brain Surgeon's own formula, solved anew for each column in float64."""

import numpy as np
import pytest
import torch

from sdcomp.column_sweep import descend, inverse_factor, sweep
from sdcomp.errors import UserError


def correlated(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    return torch.randn(rows, columns, generator=generator) @ mixing


class Rounding:
    """Rounds to multiples of a quarter, and remembers what it was shown."""

    def __init__(self) -> None:
        self.blocks = []

    def begin(self, block, cost, start):
        self.blocks.append((block.clone(), cost.clone(), start))

    def column(self, values, index):
        return (4 * values).round() / 4


def surgeon(weight: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """Hassibi & Stork 1993, equation 5, for each column in turn and the columns after it."""
    weight = weight.copy()
    for i in range(weight.shape[1]):
        inverse = np.linalg.inv(hessian[i:, i:])
        rounded = np.rint(4 * weight[:, i]) / 4
        weight[:, i:] -= np.outer((weight[:, i] - rounded) / inverse[0, 0], inverse[0])
        weight[:, i] = rounded
    return weight


@pytest.mark.parametrize("block", [1, 5, 16, 100])
def test_columns_take_up_errors_as_optimal_brain_surgeon_says(block):
    x, weight = correlated(200, 37), torch.randn(9, 37, generator=torch.Generator().manual_seed(1))
    moments = x.T @ x / len(x)
    hessian = moments.double() + 0.01 * moments.diagonal().mean().double() * torch.eye(37)
    made = sweep(weight, inverse_factor(moments), Rounding(), block=block)
    expected = surgeon(weight.double().numpy(), hessian.numpy())
    assert np.abs(made.numpy() - expected).max() < 1e-6
    nearest = (4 * weight).round() / 4
    lost = [((w - weight) @ moments @ (w - weight).T).trace() for w in (made, nearest)]
    assert lost[0] < 0.6 * lost[1]


@pytest.mark.parametrize("block", [4, 100])
def test_coordinate_descent_ends_where_no_single_change_helps(block):
    x, weight = correlated(200, 24), torch.randn(6, 24, generator=torch.Generator().manual_seed(3))
    moments = x.T @ x / len(x)
    damped = moments + 0.01 * moments.diagonal().mean() * torch.eye(24)

    def error(made: torch.Tensor) -> torch.Tensor:
        difference = (made - weight).double()
        return (difference @ damped.double() * difference).sum(1)

    first = sweep(weight, inverse_factor(moments), Rounding())
    made = descend(weight, first, moments, Rounding(), passes=50, block=block)
    assert torch.equal(made, (4 * made).round() / 4)
    assert (error(made) <= error(first) + 1e-9).all() and error(made).sum() < 0.97 * error(first).sum()
    for column in range(24):
        for step in (-0.25, 0.25):
            other = made.clone()
            other[:, column] += step
            assert (error(other) >= error(made) - 1e-6).all()
    assert torch.equal(descend(weight, first, moments, Rounding(), passes=0), first)


def test_the_cost_of_a_weight_is_what_the_output_loses_without_it():
    x, weight = correlated(300, 12), torch.randn(4, 12, generator=torch.Generator().manual_seed(2))
    moments = x.T @ x / len(x)

    class Keep(Rounding):
        def column(self, values, index):
            return values

    rule = Keep()
    assert torch.equal(sweep(weight, inverse_factor(moments, 1e-6), rule, block=4), weight)
    _, cost, start = rule.blocks[1]
    # Zero one weight, let least squares choose those behind it: the rest of the error is the cost.
    column = start + 2
    later = x[:, column + 1 :].double()
    for row in range(4):
        lost = x[:, column].double() * weight[row, column].double()
        fit = torch.linalg.lstsq(later, lost[:, None]).solution
        error = (lost - (later @ fit)[:, 0]).square().mean()
        assert cost[row, 2].item() == pytest.approx(error.item(), rel=1e-3)


def test_the_factor_is_that_of_the_damped_inverse():
    x = correlated(400, 30)
    moments = x.T @ x / len(x)
    before = moments.clone()
    factor = inverse_factor(moments, damping=0.1).double()
    damped = moments.double() + 0.1 * moments.diagonal().mean().double() * torch.eye(30)
    assert torch.equal(factor, factor.triu()) and torch.equal(moments, before)
    torch.testing.assert_close(factor.T @ factor @ damped, torch.eye(30).double(), atol=1e-4, rtol=0)


def test_inputs_that_are_always_zero_do_no_harm():
    x = correlated(100, 8)
    x[:, 3] = 0
    made = sweep(torch.randn(2, 8), inverse_factor(x.T @ x / 100, damping=0.0), Rounding())
    assert made.isfinite().all()


def test_moments_that_are_not_positive_definite_are_refused():
    with pytest.raises(UserError, match="not positive definite: gather them from more inputs"):
        inverse_factor(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
