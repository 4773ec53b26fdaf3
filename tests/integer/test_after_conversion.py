"""Converted models beside the simulation that they were made of: what happens to one leaves the other."""

import pytest
import torch
from quantized_models import WEIGHT_BITS, calibrate, random
from safetensors.torch import load_file
from torch import nn

from sdcomp.errors import UserError
from sdcomp.files import write_tensors
from sdcomp.integer import load_int8, load_packed, save_int8, save_packed, to_int8, to_packed
from sdcomp.quantization import QuantModel, save_quant_model
from sdcomp.quantization.rounding_gradients import rounded, trainable

SAVED = {"int8": (to_int8, save_int8, load_int8), "packed": (to_packed, save_packed, load_packed)}
x = random(4, 16)


def made(margin: float = 1.0) -> QuantModel:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 8))
    return calibrate(QuantModel(module, weight_quant_params={"n_bits": WEIGHT_BITS}), (x,), margin=margin)


@pytest.mark.parametrize("kind", SAVED)
def test_a_new_calibration_of_the_simulation_leaves_the_converted_model(kind, tmp_path):
    convert, save, load = SAVED[kind]
    q = made()
    model = convert(q)
    before = model(x)
    for layer in q.quantized_layers():
        layer.set_act_scales(2 * layer.act_scale, layer.act_clipped)
    assert not torch.equal(q(x), before)
    save(model, tmp_path)
    assert torch.equal(model(x), before) and torch.equal(load(tmp_path, q.module)(x), before)


@pytest.mark.parametrize("convert", [to_int8, lambda q: to_int8(q, execution="dequantized"), to_packed])
def test_a_state_dict_brings_weights_and_scales(convert):
    mine, other = convert(made()), convert(made(margin=0.5))
    assert not torch.equal(mine(x), other(x))
    mine.load_state_dict(other.state_dict())
    assert torch.equal(mine(x), other(x))


@pytest.mark.parametrize("finish", [to_int8, to_packed, lambda q: save_quant_model(q, "never")])
def test_a_model_in_training_is_refused_until_it_is_rounded(finish):
    training = trainable(made())
    with pytest.raises(UserError, match=r"training has ended: call rounded\(\) first"):
        finish(training)
    assert to_packed(rounded(training))(x).isfinite().all()


def test_tied_weights_and_bits_from_numpy_are_saved(tmp_path):
    np = pytest.importorskip("numpy")
    norm = nn.LayerNorm(16)
    module = nn.Sequential(norm, nn.Linear(16, 16), norm)
    q = QuantModel(module, weight_quant_params={"n_bits": np.int64(4)}, act_quant_params=None)
    packed = to_packed(q)
    save_packed(packed, tmp_path)
    assert torch.equal(load_packed(tmp_path, module)(x), packed(x))


def test_a_state_dict_of_more_bits_is_refused():
    module = nn.Sequential(nn.Linear(16, 8))
    few, more = (
        to_int8(
            calibrate(QuantModel(module, weight_quant_params={"n_bits": bits}), (x,)), execution=execution
        )
        for bits, execution in ((4, "auto"), (8, "dequantized"))
    )
    before = few(x)
    with pytest.raises(UserError, match="these weights have more bits than the model's"):
        few.load_state_dict(more.state_dict())
    assert torch.equal(few(x), before)


def test_tensors_that_overlap_are_written_apart(tmp_path):
    whole = torch.arange(10.0)
    write_tensors(tmp_path / "parts.safetensors", {"a": whole[:8], "b": whole[2:], "c": whole})
    again = load_file(tmp_path / "parts.safetensors")
    assert torch.equal(again["a"], whole[:8]) and torch.equal(again["b"], whole[2:])
    assert torch.equal(again["c"], whole)
