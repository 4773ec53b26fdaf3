"""Second-order pruning against exact least squares, amounts of layers, and N:M patterns."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from sdcomp.budgets import divide
from sdcomp.errors import UserError
from sdcomp.moments import input_columns
from sdcomp.pruning import (
    Calibration,
    Curve,
    allocate,
    calibrate,
    count_zeros,
    n_m_budgets,
    prune_n_m,
    prune_unstructured,
)
from sdcomp.pruning import unstructured as unstructured
from sdcomp.pruning.second_order import prune_layer, share, sweep_errors


def correlated(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns // 4, columns, generator=generator) / columns**0.5
    noise = torch.randn(rows, columns, generator=generator)
    return torch.randn(rows, columns // 4, generator=generator) @ mix + 0.1 * noise + 0.5


def slow_sparsegpt(weight, rows, amount):
    """Columns from left to right; for each, all weights behind it refit by exact least squares.

    One block of columns: the mask is chosen at the start, by OBS's cost with the weights before it fixed.
    """
    weight, columns = weight.double().clone(), weight.shape[1]
    h = rows.double().T @ rows.double() / len(rows)
    h = h + 0.01 * h.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    costs = torch.stack([weight[:, j] ** 2 / h[j:, j:].inverse()[0, 0] for j in range(columns)], dim=1)
    mask = torch.zeros(weight.numel(), dtype=torch.bool)
    mask[costs.flatten().argsort()[: round(amount * weight.numel())]] = True
    mask = mask.view(weight.shape)
    for j in range(columns):
        for row, zero in zip(weight, mask[:, j], strict=True):
            if zero:
                # min_d (d, -w_j) H (d, -w_j)^T over the weights behind j.
                rest = slice(j + 1, columns)
                row[rest] += torch.linalg.solve(h[rest, rest], h[rest, j]) * row[j].clone()
                row[j] = 0
    return weight


@pytest.mark.parametrize("kind", ["linear", "convolution"])
@pytest.mark.parametrize("amount", [0.3, 0.5, 0.8])
def test_pruning_and_correction_are_least_squares_column_by_column(kind, amount):
    torch.manual_seed(0)
    if kind == "linear":
        layer, x = nn.Linear(24, 10), correlated(500, 24)
    else:
        layer, x = nn.Conv2d(3, 10, 3, padding=1), correlated(4 * 3 * 64, 8).view(4, 3, 64, 8)[:, :, :24]
    calibration = calibrate(layer, lambda: layer(x), gradients=False, rows=10**6)
    pruned = copy.deepcopy(layer)
    prune_layer(pruned, calibration.moments[""], share(amount), passes=0)
    rows = torch.cat(list(input_columns(layer, x)))
    expected = slow_sparsegpt(layer.weight.detach().flatten(1), rows, amount)
    torch.testing.assert_close(pruned.weight.flatten(1).double(), expected, rtol=1e-2, atol=2e-4)
    assert int((pruned.weight == 0).sum()) == round(amount * layer.weight.numel())
    assert torch.equal(pruned.bias, layer.bias)


def test_the_correction_halves_the_error_of_plain_zeros():
    torch.manual_seed(0)
    layer, x = nn.Linear(200, 40), correlated(3000, 200)
    run = Calibration({"": x.T @ x / len(x)})

    @torch.no_grad()
    def error(pruned):
        return float((pruned(x) - layer(x)).square().mean())

    wanda = error(prune_unstructured(layer, 0.6, importance="wanda", calibration=run))
    second = prune_unstructured(layer, 0.6, importance="second_order", calibration=run)
    assert error(second) < 0.5 * wanda
    assert int((second.weight == 0).sum()) == round(0.6 * 8000)  # over several blocks of columns
    # Descent improves what the sweep alone makes, with the same zeros.
    swept = copy.deepcopy(layer)
    prune_layer(swept, run.moments[""], share(0.6), passes=0)
    assert error(second) < 0.6 * error(swept)
    assert torch.equal(second.weight == 0, swept.weight == 0)
    (errors,) = sweep_errors(layer, run.moments[""], [share(0.6)])
    assert float(errors.mean()) == pytest.approx(error(swept), rel=1e-3)


def test_descent_ends_at_least_squares_on_the_weights_that_stay():
    torch.manual_seed(0)
    layer, x = nn.Linear(30, 8), correlated(1000, 30)
    moments, before = x.T @ x / len(x), layer.weight.detach().clone()
    prune_layer(layer, moments, share(0.5), passes=300)
    h = moments.double() + 0.01 * moments.diagonal().mean() * torch.eye(30)
    for row, old in zip(layer.weight.detach().double(), before.double(), strict=True):
        kept = row != 0
        best = torch.linalg.solve(h[kept][:, kept], h[kept] @ old)
        torch.testing.assert_close(row[kept], best, rtol=1e-2, atol=1e-4)


class Chain(nn.Module):
    """The first layer's output counts a hundredth of the second's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weak, self.strong = nn.Linear(32, 16), nn.Linear(32, 16)

    def forward(self, x):
        return 0.01 * self.weak(x) + self.strong(x)


def test_a_global_amount_goes_where_the_output_does_not_feel_it():
    chain, x = Chain(), correlated(500, 32)
    pruned = prune_unstructured(chain, 0.6, "global", importance="second_order", calibration=lambda: chain(x))
    zeros = {name: int((getattr(pruned, name).weight == 0).sum()) for name in ("weak", "strong")}
    assert sum(zeros.values()) == round(0.6 * 1024) and zeros["weak"] > 480
    with pytest.raises(ValueError, match="can save"):
        prune_unstructured(chain, 0.99, "global", importance="second_order", calibration=lambda: chain(x))


def test_a_small_layer_costs_what_its_own_number_of_zeros_costs(monkeypatch):
    """Of 4 weights, 20 % and 30 % are 1, 40 to 60 % are 2, and so on."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(2, 2)), correlated(200, 2)
    seen = calibrate(net, lambda: net(x))
    curves = []
    monkeypatch.setattr(
        unstructured, "divide", lambda found, total: curves.append(found["0"]) or {"0": total}
    )
    unstructured.layer_amounts({"0": net[0]}, 0.5, seen)
    rules = [share(count / 4, seen.gradients["0"]) for count in range(5)]
    errors = [float(error @ seen.gradients["0"]) for error in sweep_errors(net[0], seen.moments["0"], rules)]
    assert curves[0].saved == [0, 1, 2, 3, 4]
    assert list(curves[0].error) == pytest.approx(errors) and errors[1] < errors[2] < errors[4]


def test_layers_take_amounts_of_their_own(small):
    pruned = prune_unstructured(small.unet, {"middle_block.0.in_layers.2": 0.75, "input_blocks.0.0": 0})
    layer = pruned.get_submodule("middle_block.0.in_layers.2")
    assert int((layer.weight == 0).sum()) == 0.75 * layer.weight.numel()
    changed = [n for n, t in small.unet.state_dict().items() if not torch.equal(t, pruned.state_dict()[n])]
    assert {n.rpartition(".")[0] for n in changed} == {"middle_block.0.in_layers.2"}
    with pytest.raises(ValueError, match="amount names 'out.2', which is no layer that is pruned"):
        prune_unstructured(small.unet, {"out.2": 0.5})
    with pytest.raises(ValueError, match="amounts of single layers go with scope 'layer'"):
        prune_unstructured(small.unet, {"input_blocks.0.0": 0.5}, "global")
    with pytest.raises(ValueError, match="fraction from 0 to below 1"):
        prune_unstructured(small.unet, {"input_blocks.0.0": 1.0})


CURVES = {
    "a": Curve([0, 1, 2, 3], [0, 1, 5, 20]),
    "b": Curve([0, 2, 4], [0, 9, 10]),  # a level that no optimum takes
    "c": Curve([0, 1, 5], [0, 0.1, 30]),
}


@pytest.mark.parametrize("total", [0, 1, 2, 6, 7, 8, 12])
def test_no_other_choice_that_saves_as_much_costs_less(total):
    levels = allocate(CURVES, total)
    saved = sum(CURVES[name].saved[level] for name, level in levels.items())
    error = sum(CURVES[name].error[level] for name, level in levels.items())
    others = itertools.product(*(range(len(curve.saved)) for curve in CURVES.values()))
    best = min(
        sum(curve.error[i] for curve, i in zip(CURVES.values(), other, strict=True))
        for other in others
        if sum(curve.saved[i] for curve, i in zip(CURVES.values(), other, strict=True)) >= saved
    )
    assert saved >= total and error == pytest.approx(best)
    assert levels["b"] != 1
    assert sum(divide(CURVES, total).values()) == pytest.approx(total)


def test_more_than_all_is_refused():
    with pytest.raises(ValueError, match="all layers together can save 12, less than 13"):
        allocate(CURVES, 13)


@pytest.mark.parametrize("importance", ["magnitude", "wanda", "gradient", "second_order"])
def test_two_of_four_is_what_sparse_tensor_cores_take(importance):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(32, 64, 1)).eval()
    x = torch.randn(2, 16, 8, 8)
    pruned = prune_n_m(module, importance=importance, calibration=lambda: module(x))
    for layer in pruned:
        # PyTorch's own conversion refuses matrices that are not 2:4. Rows: kernel position and output.
        matrix = layer.weight.detach().permute(2, 3, 0, 1).flatten(0, 2)
        assert ((matrix.unflatten(1, (-1, 4)) != 0).sum(-1) == 2).all()
        for rows in matrix.split(32):
            values, _ = sparse_semi_structured_from_dense_cutlass(
                torch.nn.functional.pad(rows, (0, -rows.shape[1] % 64)).half()
            )
            assert values.count_nonzero() == rows.count_nonzero()
    if importance == "magnitude":
        groups = module[0].weight.detach().permute(2, 3, 0, 1).unflatten(3, (4, 4))
        kept = pruned[0].weight.detach().permute(2, 3, 0, 1).unflatten(3, (4, 4)) != 0
        best = groups.abs().topk(2, dim=-1).indices.sort(-1).values
        assert torch.equal(kept.nonzero()[:, -1].view(best.shape), best)


def test_layers_that_tensor_cores_do_not_take_stay_whole(small):
    pruned = prune_n_m(small.unet)
    for name, tensor in pruned.state_dict().items():
        if name == "input_blocks.0.0.weight" or not name.endswith("weight"):  # 4 input channels
            assert torch.equal(tensor, small.unet.state_dict()[name]), name
    assert count_zeros(pruned).zero_fraction > 0.4
    with pytest.raises(UserError, match="no layer takes the pattern"):
        prune_n_m(nn.Linear(12, 8))


def test_ties_of_a_pattern_lose_the_first():
    layer = nn.Linear(16, 8)
    nn.init.ones_(layer.weight)
    assert prune_n_m(layer, 1).weight[0].tolist() == [0, 0, 0, 1] * 4


def test_second_order_patterns_beat_magnitude():
    torch.manual_seed(0)
    layer, x = nn.Linear(128, 32), correlated(2000, 128)
    magnitude = prune_n_m(layer)
    second = prune_n_m(layer, importance="second_order", calibration=lambda: layer(x))
    with torch.no_grad():
        errors = [float((pruned(x) - layer(x)).square().mean()) for pruned in (magnitude, second)]
    assert errors[1] < 0.5 * errors[0]
    assert ((second.weight.unflatten(1, (-1, 4)) != 0).sum(-1) == 2).all()


def test_budgets_of_patterns_leave_sensitive_layers_whole():
    chain, x = Chain(), correlated(500, 32)
    calibration = calibrate(chain, lambda: chain(x))
    assert n_m_budgets(chain, 0.75, choices=[2], calibration=calibration) == {"weak": 2, "strong": 4}
    with pytest.raises(ValueError, match="kept must be a fraction above 0, and at most 1, not 75"):
        n_m_budgets(chain, 75, choices=[2], calibration=calibration)
    budgets = n_m_budgets(chain, 0.5, choices=(1, 2, 3), calibration=calibration)
    assert budgets["weak"] == 1 and budgets["strong"] >= 2
    pruned = prune_n_m(chain, budgets, importance="second_order", calibration=calibration)
    assert int((pruned.weak.weight != 0).sum()) == 128


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "n must be a whole number from 1 to m, 4, not 0"),
        ({"n": 5}, "n must be a whole number"),
        ({"m": 1}, "m must be a whole number from 2, not 1"),
        ({"n": {"nope": 2}}, "n names 'nope', which is no layer that takes the pattern"),
    ],
)
def test_patterns_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        prune_n_m(nn.Linear(16, 16), **arguments)
