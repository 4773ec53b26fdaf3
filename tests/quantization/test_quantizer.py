"""The quantizer against float64 references, PyTorch's operators and brute force."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdcomp.errors import UserError
from sdcomp.quantization import UniformSymmetricQuantizer, fake_quantize
from sdcomp.quantization.ranges import BINS, Histogram

finite = st.floats(-1e4, 1e4, width=32)
bits = st.integers(2, 8)


def reference(x: np.ndarray, scale: np.ndarray, qmax: int) -> np.ndarray:
    """Integers by division in float64, half to even."""
    return np.clip(np.rint(x.astype(np.float64) / scale.astype(np.float64)), -qmax, qmax)


def lp_error(x: np.ndarray, clip: float, qmax: int) -> float:
    scale = clip / qmax
    return float((np.abs(np.clip(np.rint(x / scale), -qmax, qmax) * scale - x) ** 2.4).sum())


def sample(kind: str, n: int = 20_000) -> np.ndarray:
    rng = np.random.default_rng(7)
    x = rng.laplace(size=n) if kind == "laplace" else rng.normal(size=n)
    if kind == "outliers":
        x[rng.random(n) < 0.001] *= 50
    return x.astype(np.float32)


@pytest.mark.parametrize("n_bits", range(2, 9))
@pytest.mark.parametrize("channel_wise", [False, True])
def test_integers_are_those_of_a_float64_reference(n_bits, channel_wise):
    generator = torch.Generator().manual_seed(n_bits)
    x = torch.randn(60, 50, 10, 10, generator=generator)
    quantizer = UniformSymmetricQuantizer(n_bits, channel_wise)
    scale = quantizer.scale(x)
    qmax = 2 ** (n_bits - 1) - 1
    top = np.abs(x.numpy()).reshape(60, -1).max(axis=1) if channel_wise else [np.abs(x.numpy()).max()]
    assert np.allclose(scale.numpy(), np.array(top) / qmax, rtol=1e-7)
    integers = quantizer.quantize(x, scale)
    assert integers.dtype == torch.int8
    expected = reference(x.numpy(), scale.numpy().reshape(-1, 1, 1, 1), qmax)
    off = np.abs(integers.numpy() - expected)
    assert off.max() <= 1 and (off > 0).mean() < 1e-5
    assert abs(expected).max() == qmax
    assert torch.equal(quantizer(x), integers * scale.view(-1, 1, 1, 1))


def test_halves_go_to_the_even_integer():
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5])
    assert UniformSymmetricQuantizer(4).quantize(x, torch.tensor([1.0])).tolist() == [-2, -2, 0, 0, 2, 2, 4]


@pytest.mark.parametrize("n_bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_simulation_is_pytorchs_bit_for_bit(n_bits, dtype):
    x = (torch.randn(8, 24, 16, 16, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    x = x.to(memory_format=torch.channels_last)
    qmax = 2 ** (n_bits - 1) - 1
    for scale in (0.031, 0.1, 1 / 3):
        made = fake_quantize(x, torch.tensor(scale).item(), qmax)
        if dtype == torch.bfloat16:  # an operator that PyTorch has for half and single precision only
            expected = torch.fake_quantize_per_tensor_affine(x.float(), scale, 0, -qmax, qmax).to(dtype)
        else:
            expected = torch.fake_quantize_per_tensor_affine(x, scale, 0, -qmax, qmax)
        assert torch.equal(made, expected)
        assert made.dtype == dtype and made.stride() == x.stride()
    if dtype == torch.float32:
        quantizer = UniformSymmetricQuantizer(n_bits, channel_wise=True, scale_method="mse")
        scales = quantizer.scale(x)
        zeros = torch.zeros(8, dtype=torch.int32)
        expected = torch.fake_quantize_per_channel_affine(x, scales, zeros, 0, -qmax, qmax)
        assert torch.equal(quantizer.fake_quantize(x, scales), expected)


@pytest.mark.parametrize("n_bits", [8, 6, 4, 2])
@pytest.mark.parametrize("kind", ["normal", "laplace", "outliers"])
def test_mse_ranges_are_within_two_percent_of_brute_force(kind, n_bits):
    x, qmax = sample(kind), 2 ** (n_bits - 1) - 1
    top = float(np.abs(x).max())
    best = min(lp_error(x, clip, qmax) for clip in top * np.linspace(0.005, 1, 600))
    weights = UniformSymmetricQuantizer(n_bits, scale_method="mse").scale(torch.from_numpy(x)).item() * qmax
    activations = Histogram.of(torch.from_numpy(x)).range("mse", qmax)[1]
    for clip in (weights, activations):
        assert lp_error(x, clip, qmax) <= 1.02 * best
        assert clip <= top * (1 + 1e-6)
    if n_bits <= 4 and kind != "outliers":
        assert lp_error(x, top, qmax) > 1.3 * best  # there was something to find


def test_mse_ranges_are_each_channels_own():
    x = torch.stack(
        [torch.from_numpy(sample(kind, 3000)) * 10**i for i, kind in enumerate(["normal", "outliers"])]
    )
    x = torch.cat([x, torch.zeros(1, 3000), x[:1] * (x[:1] > 1)])
    channel_wise = UniformSymmetricQuantizer(4, channel_wise=True, scale_method="mse").scale(x)
    per_tensor = UniformSymmetricQuantizer(4, scale_method="mse")
    assert torch.equal(channel_wise, torch.cat([per_tensor.scale(row) for row in x]))
    assert len(set(channel_wise.tolist())) == 4


def test_what_is_all_zero_stays_so_at_scale_one():
    x = torch.zeros(3, 8)
    x[1] = torch.linspace(-1, 1, 8)
    for method in ("max", "mse"):
        quantizer = UniformSymmetricQuantizer(8, channel_wise=True, scale_method=method)
        scale = quantizer.scale(x)
        assert scale[[0, 2]].tolist() == [1, 1] and scale[1] < 0.01
        assert torch.equal(quantizer(x)[[0, 2]], x[[0, 2]])
        assert UniformSymmetricQuantizer(8, scale_method=method).scale(torch.zeros(5)).item() == 1
        assert UniformSymmetricQuantizer(8, scale_method=method)(torch.full((4,), 1e-42)).isfinite().all()


@settings(max_examples=60, deadline=None)
@given(values=st.lists(finite, min_size=1, max_size=40), n_bits=bits, method=st.sampled_from(["max", "mse"]))
def test_the_laws_of_a_quantizer(values, n_bits, method):
    quantizer = UniformSymmetricQuantizer(n_bits, scale_method=method)
    x = torch.tensor(values, dtype=torch.float32)
    scale = quantizer.scale(x)
    made = quantizer.fake_quantize(x, scale)
    assert torch.equal(quantizer.fake_quantize(made, scale), made)  # idempotent
    assert torch.equal(quantizer.fake_quantize(-x, scale), -made)  # odd-symmetric
    order = x.argsort()
    assert (made[order].diff() >= 0).all()  # monotone
    inside = x.abs() <= scale * quantizer.qmax
    assert ((made - x).abs()[inside] <= scale * (0.5 + 1e-5)).all()  # half a step
    assert (quantizer.quantize(x, scale).abs() <= quantizer.qmax).all()
    assert len(made.unique()) <= 2**n_bits - 1


@pytest.mark.parametrize("wrong", [1, 9, 0, -8])
def test_bits_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=f"n_bits must be 2 to 8, not {wrong}"):
        UniformSymmetricQuantizer(wrong)


@pytest.mark.parametrize(
    "wrong", [{"n_bits": 8.0}, {"n_bits": True}, {"n_bits": "8"}, {"channel_wise": 1}, {"bits": 8}]
)
def test_arguments_of_another_type_or_name_are_refused(wrong):
    with pytest.raises(TypeError):
        UniformSymmetricQuantizer(**wrong)
    with pytest.raises(ValueError, match="'max' or 'mse'"):
        UniformSymmetricQuantizer(scale_method="mean")


def magnitudes(x: torch.Tensor, exponent: int) -> np.ndarray:
    """NumPy's histogram of the magnitudes that are not zero."""
    values = np.abs(x.numpy().astype(np.float64)).ravel()
    return np.histogram(values[values > 0], bins=BINS, range=(0, 2.0**exponent))[0]


def test_a_histogram_counts_as_numpy_does_in_any_memory_format():
    x = torch.randn(3, 5, 7, 9, generator=torch.Generator().manual_seed(1)) * 3
    x[0, 0] = 0
    for formatted in (x, x.to(memory_format=torch.channels_last), x[:, 1:4], x.double(), x.transpose(0, 1)):
        made = Histogram.of(formatted)
        assert made.maximum == formatted.abs().max().item() and made.total == formatted.numel()
        assert 2.0**made.exponent > made.maximum >= 2.0 ** (made.exponent - 1)
        assert (made.magnitudes.numpy() == magnitudes(formatted.float(), made.exponent)).all()
        negative = formatted.float().clamp(max=0)
        assert (made.counts[1].numpy() == magnitudes(negative, made.exponent)).all()


@settings(max_examples=40, deadline=None)
@given(parts=st.lists(st.lists(finite, max_size=12), min_size=1, max_size=6))
def test_a_growing_range_is_binned_as_if_it_had_been_known(parts):
    tensors = [torch.tensor(part, dtype=torch.float32) for part in parts]
    grown = Histogram()
    for tensor in tensors:
        grown.add(Histogram.of(tensor))
    whole = Histogram.of(torch.cat(tensors))
    assert torch.equal(grown.counts, whole.counts)
    assert (grown.exponent, grown.total, grown.maximum) == (whole.exponent, whole.total, whole.maximum)


def test_what_lies_beyond_a_range_is_counted():
    x = torch.arange(1, 1025) / 1024.0
    made = Histogram.of(x)
    assert made.beyond(-0.75, 0.75) == pytest.approx(256, abs=2)
    assert made.beyond(-made.maximum, made.maximum) == 0
    assert Histogram.of(-x).beyond(-0.75, 0.0) == pytest.approx(256, abs=2)
    assert Histogram.of(torch.zeros(4)).beyond(0, 0) == 0


@pytest.mark.parametrize("wrong", [math.inf, -math.inf, math.nan])
def test_values_that_are_not_finite_are_refused(wrong):
    with pytest.raises(ValueError, match="not finite"):
        Histogram.of(torch.tensor([1.0, wrong]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_stays_nan_and_infinity_is_clipped(dtype):
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.3], dtype=dtype)
    for scale in (0.25, torch.tensor([0.25])):
        made = fake_quantize(x, scale, 7)
        assert made[0].isnan() and made[1:].tolist() == [1.75, -1.75, 0.25]


@pytest.mark.parametrize("method", ["max", "mse"])
@pytest.mark.parametrize("channel_wise", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_has_no_scale(method, channel_wise, value):
    x = torch.ones(3, 4)
    x[1, 2] = value
    with pytest.raises(UserError, match="a tensor with NaN or infinite values has no scale"):
        UniformSymmetricQuantizer(8, channel_wise, method).scale(x)
