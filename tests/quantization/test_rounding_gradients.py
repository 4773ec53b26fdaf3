"""Gradients through the rounding, against LSQ's formula; recovery of quantized models."""

import pytest
import torch

from sdcomp.errors import UserError
from sdcomp.evaluation import noise_mse
from sdcomp.pruning import prune_unstructured
from sdcomp.quantization import (
    Calibrator,
    QuantModel,
    TimeStepCalibratedQuantModel,
    fake_quantize,
)
from sdcomp.quantization.rounding_gradients import rounded, straight_through, trainable
from sdcomp.training import recover

PROMPTS = ["a red star on a navy background", "a blue circle"]
FOUR = {"n_bits": 4}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("high", "low"), [(7, -7), (12, -3)])
def test_it_rounds_as_the_simulation_does(high, low):
    x, scale = 2 * random(500), torch.tensor([0.13])
    assert torch.equal(straight_through(x, scale, high, low), fake_quantize(x, scale, high, low))


def test_gradients_are_those_of_lsq():
    x, scale = (2 * random(300)).requires_grad_(), torch.tensor([0.21]).requires_grad_()
    straight_through(x, scale, 7, -7).sum().backward()
    multiples = x.detach() / scale.detach()
    inside = multiples.abs() < 7
    torch.testing.assert_close(x.grad, inside.float())
    # Esser et al. 2020, equation 3.
    expected = torch.where(inside, multiples.round() - multiples, 7 * multiples.sign()).sum()
    assert scale.grad.item() == pytest.approx(expected.item(), rel=1e-4)


def models(sd) -> dict[str, QuantModel]:
    params = {"weight_quant_params": FOUR, "act_quant_params": {"n_bits": 4, "symmetric": False}}
    made = {
        "plain": QuantModel(sd.unet, **params),
        "timesteps": TimeStepCalibratedQuantModel(sd.unet, k=2, timesteps=2, split_shortcuts=True, **params),
        "weights": QuantModel(sd.unet, weight_quant_params=FOUR, act_quant_params=None),
    }
    for q in made.values():
        Calibrator(sd, q).calibrate(PROMPTS, steps=2)
    return made


@pytest.mark.parametrize("kind", ["plain", "timesteps", "weights"])
def test_before_and_after_training_a_model_is_the_same(small, kind):
    q = models(small)[kind]
    args = random(2, 4, 8, 8), 700, random(2, 5, 32, seed=1)
    expected = q(*args)
    student = trainable(q)
    made = student(*args)
    # The same roundings, but for values that lie between two of them.
    assert (made - expected).abs().median() < 1e-5
    made.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())
    again = rounded(student)
    assert torch.equal(again(*args), expected) and again.state_dict().keys() >= q.state_dict().keys()
    assert not any(p.requires_grad for p in again.parameters())
    assert torch.equal(q(*args), expected)


@pytest.mark.parametrize("kind", ["plain", "timesteps"])
def test_recovery_brings_a_quantized_model_nearer(small, kind):
    q = models(small)[kind]
    before = {name: tensor.clone() for name, tensor in q.state_dict().items()}

    path = {"steps": 4, "guidance_scale": 2.0}
    trace = small.generate(PROMPTS, trace=True, seed=3, **path)[1]

    def distance(unet) -> float:
        return noise_mse(small, unet, PROMPTS, trace, guidance_scale=2.0).mean().item()

    trained = recover(
        q, small, PROMPTS, 30, lr=2e-3, batch_size=16, sampling_steps=4, progress=False, guidance_scale=2.0
    )
    made = trained.module
    assert isinstance(made, QuantModel) and len(trained.losses) == 30
    assert distance(made) < distance(q)
    # What comes back is quantized, and the model that was given is as it was.
    for layer in made.quantized_layers():
        assert layer.weight_integers.unique().numel() <= 15
    assert all(torch.equal(tensor, before[name]) for name, tensor in q.state_dict().items())


def test_a_model_without_scales_is_refused(small):
    with pytest.raises(UserError, match="calibrate the model before the recovery"):
        recover(QuantModel(small.unet), small, PROMPTS, 1, progress=False)


def test_inputs_with_a_grid_for_each_token_are_refused(small):
    q = QuantModel(small.unet, act_quant_params={"n_bits": 4, "granularity": "token"})
    with pytest.raises(UserError, match="a grid for each token cannot be trained"):
        trainable(q)


def test_two_bytes_hold_the_scales_of_groups_after_training(small):
    params = {"n_bits": 4, "granularity": "group", "group_size": 16}
    q = trainable(QuantModel(small.unet, weight_quant_params=params, act_quant_params=None))
    for layer in q.quantized_layers():
        with torch.no_grad():
            layer.weight_scale_change.fill_(0.123)
    for layer in rounded(q).quantized_layers():
        assert torch.equal(layer.weight_scale, layer.weight_scale.half().float())


def test_zeros_stay_zero_while_a_quantized_model_recovers(small):
    unet = prune_unstructured(small.unet, 0.4)
    q = QuantModel(unet, weight_quant_params=FOUR, act_quant_params=None)
    path = {"sampling_steps": 2, "guidance_scale": 1.0}
    made = recover(q, small, PROMPTS, 3, lr=1e-3, batch_size=4, progress=False, **path).module
    moved = 0
    for before, after in zip(q.quantized_layers(), made.quantized_layers(), strict=True):
        zeros = before.weight == 0
        assert (after.weight[zeros] == 0).all() and (after.fake_weight()[zeros] == 0).all()
        moved += int(after.weight[(before.integer_weight() == 0) & ~zeros].count_nonzero())
    # Weights that were only rounded to zero are trained like all others.
    assert moved > 0
