"""Importance: formulas of the papers, and gradients and moments of a model that runs."""

import pytest
import torch
from torch import nn

from sdcomp.errors import UserError
from sdcomp.moments import input_columns
from sdcomp.pruning import Calibration, calibrate, prune_structured, prune_unstructured, remove_cheapest


class Toy(nn.Module):
    """Two layers, one of which counts ten times as much in the output."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 6), nn.Linear(8, 6)

    def forward(self, x):
        return 10 * self.first(x) + self.second(x)


def inputs(rows: int = 200) -> torch.Tensor:
    x = torch.randn(rows, 8, generator=torch.Generator().manual_seed(1))
    return x * torch.tensor([0.01, 5, 1, 1, 1, 1, 1, 1])


def test_wanda_prunes_the_smallest_products_of_weight_and_input_norm():
    layer, x = nn.Linear(8, 6), inputs()
    norms = x.norm(dim=0).tolist()
    scores = [[abs(w) * norms[j] for j, w in enumerate(row)] for row in layer.weight.tolist()]
    gone = sorted((score, i, j) for i, row in enumerate(scores) for j, score in enumerate(row))[:24]
    pruned = prune_unstructured(layer, 0.5, importance="wanda", calibration=lambda: layer(x))
    zeros = (pruned.weight == 0).nonzero().tolist()
    assert sorted(zeros) == sorted([i, j] for _, i, j in gone)
    assert torch.equal(pruned.bias, layer.bias)
    assert torch.equal(pruned.weight[pruned.weight != 0], layer.weight[pruned.weight != 0])


def test_gradient_importance_compares_layers_by_what_they_do_to_the_output():
    toy, x = Toy(), inputs()
    pruned = prune_unstructured(toy, 0.5, "global", importance="gradient", calibration=lambda: toy(x))
    zeros = [int((layer.weight == 0).sum()) for layer in (pruned.first, pruned.second)]
    assert zeros[0] < 12 and sum(zeros) == 48
    moments = x.square().mean(0)
    scores = torch.cat([100 * toy.first.weight.square() * moments, toy.second.weight.square() * moments])
    kept = torch.cat([pruned.first.weight, pruned.second.weight]) != 0
    assert scores[kept].min() > scores[~kept].max()


def test_output_gradients_are_the_squares_of_the_jacobian(small):
    unet, layers = small.unet, ["middle_block.0.out_layers.3", "output_blocks.3.0.emb_layers.1"]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 4, 4, generator=generator)
    context = torch.randn(1, 3, small.config.unet.context_dim, generator=generator)

    def run():
        for _ in range(400):
            unet(x, 500, context)

    with torch.no_grad():
        found = calibrate(unet, run, parts=layers, rows=1).gradients
    for name in layers:
        kept = []

        def change(module, args, output, kept=kept):
            kept.append(torch.zeros_like(output, requires_grad=True))
            return output + kept[-1]

        handle = unet.get_submodule(name).register_forward_hook(change)
        output = unet(x, 500, context)
        handle.remove()
        rows = [torch.autograd.grad(value, kept[0], retain_graph=True)[0] for value in output.flatten()]
        squares = torch.stack(rows).square().sum(0) / output.numel()
        expected = squares.flatten(2).sum((0, 2)) if squares.dim() == 4 else squares.sum(0)
        # 400 random probes of an estimate.
        assert float((found[name] / expected).mean()) == pytest.approx(1, abs=0.1), name
    assert all(p.grad is None for p in unet.parameters())


def test_gradients_are_of_the_outputs_whatever_the_dimensions_of_the_input():
    torch.manual_seed(0)
    linear, last = nn.Linear(4, 3), nn.Linear(3, 2)
    module = nn.Sequential(linear, nn.Tanh(), last)
    x = torch.randn(2, 5, 6, 4)
    found = calibrate(module, lambda: module(x)).gradients
    signs = torch.randint(0, 2, (2, 5, 6, 2), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    g = signs / signs.numel() ** 0.5
    torch.testing.assert_close(found["2"], g.square().sum((0, 1, 2)))
    inner = (g @ last.weight) * (1 - linear(x).tanh().square())
    torch.testing.assert_close(found["0"], inner.square().sum((0, 1, 2)).detach())
    conv, images = nn.Conv2d(3, 4, 1), torch.randn(1, 3, 5, 5)
    alone = nn.Sequential(conv)
    summed = calibrate(alone, lambda: alone(images)).gradients["0"]
    torch.testing.assert_close(summed, torch.full((4,), 0.25))


def test_moments_and_means_are_of_the_inputs_as_the_weight_matrix_meets_them():
    torch.manual_seed(0)
    layer, x = nn.Conv2d(3, 4, 3, padding=1, stride=2), torch.randn(2, 3, 6, 6) + 1
    found = calibrate(layer, lambda: layer(x), gradients=False)
    rows = torch.cat(list(input_columns(layer, x)))
    torch.testing.assert_close(found.moments[""], rows.T @ rows / len(rows))
    mean = rows.mean(0)
    torch.testing.assert_close(found.means[""], mean)
    expected = torch.cov(rows.T, correction=0) + 0.05 * torch.outer(mean, mean)
    torch.testing.assert_close(found.covariance(""), expected, atol=1e-5, rtol=1e-4)


def test_a_layer_that_the_output_ignores_is_named():
    toy = Toy()
    toy.forward = lambda x: toy.first(x) + 0 * toy.second(x).detach()
    with pytest.raises(UserError, match="the output does not depend on layer second"):
        calibrate(toy, lambda: toy(inputs()))


def test_a_calibration_says_what_it_lacks():
    layer = nn.Linear(8, 6)
    with pytest.raises(UserError, match="has no moments of layer"):
        prune_unstructured(layer, 0.5, importance="wanda", calibration=Calibration({}))
    moments = Calibration({"": torch.eye(8)})
    with pytest.raises(UserError, match="has no gradients of layer"):
        prune_unstructured(layer, 0.5, importance="gradient", calibration=moments)
    with pytest.raises(ValueError, match="importance 'wanda' needs data: give calibration="):
        prune_unstructured(layer, 0.5, importance="wanda")
    with pytest.raises(ValueError, match="importance must be one of magnitude, wanda"):
        prune_unstructured(layer, 0.5, importance="size")
    with pytest.raises(UserError, match="did not run"):
        prune_unstructured(layer, 0.5, importance="wanda", calibration=lambda: None)


def test_masks_of_channels_take_no_data(small):
    with pytest.raises(ValueError, match="importance 'wanda' belongs to mode 'remove'"):
        prune_structured(small.unet, 0.5, importance="wanda", calibration=Calibration({}))


def test_a_module_without_layers_is_pruned_to_itself():
    module = nn.Sequential(nn.ReLU())
    pruned = prune_unstructured(module, 0.5, importance="wanda", calibration=lambda: module(inputs()))
    assert torch.equal(pruned(inputs()), module(inputs()))


@pytest.mark.parametrize("how", ["zeros", "removal"])
def test_results_do_not_depend_on_the_memory_for_moments(small, how):
    unet = small.unet
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    context = torch.randn(2, 3, small.config.unet.context_dim, generator=generator)

    def pruned(memory):
        calibration = calibrate(unet, lambda: unet(x, 500, context), memory=memory)
        if how == "removal":
            return remove_cheapest(unet, 0.2, calibration)
        return prune_unstructured(unet, 0.5, "global", importance="second_order", calibration=calibration)

    one, parts = pruned(2**40).state_dict(), pruned(1).state_dict()  # one byte: a layer at a time
    assert one.keys() == parts.keys() and all(torch.equal(one[name], parts[name]) for name in one)
