"""Second moments of layers' inputs, against sums over what each layer multiplies."""

import pytest
import torch
from torch import nn

from sdcomp.errors import UserError
from sdcomp.moments import MomentsOnDemand, second_moments, weight_matrix
from sdcomp.quantization.shared_state import LastInput


class Shared(nn.Module):
    """A convolution, then two linear layers that read the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False)
        self.q, self.k, self.unused = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(4, 5)

    def forward(self, x):
        tokens = self.conv(x).flatten(2).transpose(1, 2)
        return self.q(tokens) + self.k(tokens)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_moments_give_the_energy_of_the_outputs():
    # trace(W H W^T) is the mean squared norm of the outputs: it ties columns, weights and rows together.
    module, inputs = Shared(), [random(2, 3, 8, 6), random(5, 3, 8, 6, seed=1)]
    moments = second_moments(module, ["conv", "q"], lambda: [module(x) for x in inputs], rows=10**6)
    with torch.no_grad():
        maps = torch.cat([module.conv(x) for x in inputs]).flatten(2).transpose(1, 2).reshape(-1, 4)
    weight = weight_matrix(module.conv)
    energy = (weight @ moments["conv"] @ weight.T).trace()
    assert energy.item() == pytest.approx(maps.square().sum(1).mean().item(), rel=1e-5)
    torch.testing.assert_close(moments["q"], maps.T @ maps / len(maps))


class Repeated(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, y):
        # Both read x, and b also reads y, which is larger.
        return self.b(y) + self.a(x) + self.b(x)


def test_moments_do_not_depend_on_the_layers_that_are_observed_beside():
    module, x, y = Repeated(), random(3, 4), 10 * random(3, 4, seed=1)
    both = second_moments(module, ["a", "b"], lambda: module(x, y))
    for name in ("a", "b"):
        alone = second_moments(module, [name], lambda: module(x, y))
        torch.testing.assert_close(both[name], alone[name], rtol=0, atol=0)
    torch.testing.assert_close(both["a"], x.T @ x / 3)
    torch.testing.assert_close(both["b"], (x.T @ x + y.T @ y) / 6)


def test_rows_are_drawn_over_all_images_and_calls():
    module = nn.Linear(2, 2)
    x = torch.cat([torch.ones(1, 100, 2), 3 * torch.ones(1, 100, 2)])
    found = second_moments(nn.Sequential(module), ["0"], lambda: module(x), rows=10)["0"]
    torch.testing.assert_close(found, torch.full((2, 2), 5.0))  # the mean of 1 and 9


def test_moments_on_demand_are_those_of_one_run_in_as_many_runs_as_memory_needs():
    module, runs = nn.Sequential(*(nn.Linear(8, 8) for _ in range(5))), []

    def run():
        runs.append(module(random(1, 50, 8)))

    names = [str(i) for i in range(5)]
    expected = second_moments(module, names, run, rows=10)
    runs.clear()
    found = MomentsOnDemand(module, names, run, memory=2 * 4 * 8**2, rows=10)  # two layers at a time
    assert list(found) == names and len(found) == 5
    assert all(torch.equal(found[name], expected[name]) for name in names)
    assert len(runs) == 3
    assert torch.equal(found["1"], expected["1"]) and len(runs) == 4
    with pytest.raises(KeyError):
        found["5"]


def test_what_cannot_be_observed_is_refused():
    module = Shared()
    with pytest.raises(UserError, match="unused did not run"):
        second_moments(module, ["unused"], lambda: module(random(1, 3, 4, 4)))
    with pytest.raises(UserError, match="input of layer conv has NaN"):
        second_moments(module, ["conv"], lambda: module(torch.full((1, 3, 4, 4), torch.inf)))
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(UserError, match="one group"):
        second_moments(grouped, ["0"], lambda: grouped(random(1, 4, 4, 4)))
    assert not module.conv._forward_pre_hooks and not grouped[0]._forward_pre_hooks


def test_the_last_input_is_known_by_object_version_and_key():
    memo, x = LastInput(), random(3)
    memo.keep(x, "key", 1)
    assert memo.get(x, "key") == 1
    assert memo.get(x, "other") is None and memo.get(x.clone(), "key") is None
    x.add_(1)
    assert memo.get(x, "key") is None
    with torch.inference_mode():
        y = random(3) + 1
        memo.keep(y, "key", 2)
        assert memo.get(y, "key") is None
