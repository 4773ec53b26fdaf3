"""Any pipeline of diffusers calibrates a model, beside hooks of the test that see the same inputs."""

from bisect import bisect_right

import pytest
import torch
from pipelines import PIPELINES
from torch import Tensor, nn

from sdcomp.quantization import (
    CalibrationError,
    Calibrator,
    QuantModel,
    TimeStepCalibratedQuantModel,
    apply_recipe,
    build,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:diffusers")


@pytest.fixture(params=PIPELINES)
def made(request, diffusers, small):
    torch.manual_seed(0)
    return PIPELINES[request.param](diffusers, small)


def put(made, module: nn.Module) -> None:
    """Give the pipeline another UNet or transformer."""
    setattr(made.pipe, made.name, module)


def watch(module: nn.Module, run) -> dict[str, list[tuple[float, float]]]:
    """Run; of each convolution and linear layer, the timestep and the largest magnitude of each input."""
    seen, now = {}, []

    def enter(_: nn.Module, args: tuple, kwargs: dict) -> None:
        # Pipelines of UNets give the timestep by position, those of transformers by name.
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        now[:] = [float(torch.as_tensor(timestep).flatten()[0])]

    def look(name: str):
        return lambda _, args: seen.setdefault(name, []).append((now[0], args[0].abs().max().item()))

    layers = {n: layer for n, layer in module.named_modules() if type(layer) in (nn.Conv2d, nn.Linear)}
    handles = [layer.register_forward_pre_hook(look(name)) for name, layer in layers.items()]
    handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
    run()
    for handle in handles:
        handle.remove()
    return seen


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).square().mean() / expected.square().mean()).item()


def test_observe_finds_the_largest_input_of_each_layer_in_each_interval(made):
    module = getattr(made.pipe, made.name)
    seen = watch(module, made.run)
    q = TimeStepCalibratedQuantModel(module, timesteps=4, k=2)
    put(made, q)
    calibrator = Calibrator(None, q)
    calibrator.observe(made.run)
    assert {layer.name for layer in q.quantized_layers()} == seen.keys()
    for layer in q.quantized_layers():
        largest = [0.0, 0.0]
        for timestep, magnitude in seen[layer.name]:
            interval = bisect_right([500], timestep)
            largest[interval] = max(largest[interval], magnitude)
        torch.testing.assert_close(layer.act_scale * 127, torch.tensor(largest), rtol=1e-5, atol=0)
    visited = {timestep for calls in seen.values() for timestep, _ in calls}
    assert set(calibrator.ranges.timestep) == visited
    assert len(visited) == 4


@pytest.mark.parametrize("kind", [QuantModel, TimeStepCalibratedQuantModel])
def test_a_pipeline_runs_its_quantized_model(made, kind):
    module = getattr(made.pipe, made.name)
    expected = made.run()
    errors = []
    for bits in (8, 5):
        q = kind(module, weight_quant_params={"n_bits": bits}, act_quant_params={"n_bits": bits})
        put(made, q)
        Calibrator(None, q, act_scale_policy="mse").observe(lambda: made.run(steps=8))
        errors.append(relative(made.run(), expected))
    assert 0 < errors[0] < 0.3 * errors[1]
    q.set_use_quant(False, False)
    # With several threads the last bits of large products depend on where tensors lie.
    torch.testing.assert_close(made.run(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("recipe", "plain"), [("weights_gptq", "weights_only"), ("timestep_low_bits", "timestep_mse")]
)
def test_recipes_are_closer_than_rounding_to_nearest(made, recipe, plain):
    module = getattr(made.pipe, made.name)
    expected = made.run()
    errors = {}
    for name in (recipe, plain):
        q = build(name, module, weight_bits=4, act_bits=8, timesteps=4, k=2)
        put(made, q)
        apply_recipe(q, name, made.run)
        errors[name] = relative(made.run(), expected)
    assert errors[recipe] < 0.75 * errors[plain]


def test_ends_keep_8_bits_in_every_model(made):
    module = getattr(made.pipe, made.name)
    q = build("low_bits", module, weight_bits=4, act_bits=4)
    bits = {layer.name: layer.weight_quantizer.n_bits for layer in q.quantized_layers()}
    blocks = ("down_blocks.", "mid_block.", "up_blocks.", "transformer_blocks.")
    assert {n for name, n in bits.items() if not name.startswith(blocks)} == {8}
    inner = [n for name, n in bits.items() if name.startswith(blocks)]
    assert inner.count(4) > inner.count(8)


def test_a_pipeline_that_misses_an_interval_is_refused(made):
    q = TimeStepCalibratedQuantModel(getattr(made.pipe, made.name), k=20)
    put(made, q)
    with pytest.raises(CalibrationError, match="no calibration step fell into timesteps"):
        Calibrator(None, q).observe(made.run)


class Block(nn.Module):
    """Takes its timestep last, as the transformers of diffusers do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, context: Tensor | None = None, timestep: Tensor | float = 0) -> Tensor:
        return self.layer(x)


def test_the_timestep_is_found_by_its_name_in_every_form():
    torch.manual_seed(0)
    q = TimeStepCalibratedQuantModel(Block(), k=2, act_quant_params={"n_bits": 3})
    assert q.timestep_arg == 2
    x = torch.randn(3, 4)

    def run() -> None:
        q(0.1 * x, x, 100)
        q(x, timestep=torch.tensor(900.0))

    Calibrator(None, q).observe(run)
    early, late = q(x, None, 100), q(x, None, 900)
    assert not torch.equal(early, late)
    for value in (900.0, torch.tensor(900), torch.tensor([900.5] * 3), torch.tensor([1000.0])):
        assert torch.equal(q(x, timestep=value), late)
        assert torch.equal(q(x, x, value), late)
    with pytest.raises(TypeError, match="needs its timesteps, in argument 'timestep'"):
        q(x)
