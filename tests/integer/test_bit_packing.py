"""Packed integers against a slow packer of whole numbers, and dequantized weights against numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sdcomp.integer import to_packed
from sdcomp.integer.bit_packing import block, pack, packed_shape, unpack
from sdcomp.quantization import QuantModel

BITS = range(1, 9)


def slow_pack(codes: np.ndarray, n_bits: int) -> np.ndarray:
    """One block after the other, as a whole number of any length."""
    count = next(c for c in range(1, 9) if c * n_bits % 8 == 0)
    rows, columns = codes.shape
    height = (rows + count - 1) // count
    packed = np.zeros((count * n_bits // 8, height, columns), dtype=np.uint8)
    for row in range(height):
        for column in range(columns):
            number = 0
            for i in range(count):
                if i * height + row < rows:
                    number += int(codes[i * height + row, column]) * 2 ** (n_bits * i)
            packed[:, row, column] = list(number.to_bytes(len(packed), "little"))
    return packed


def slow_unpack(packed: np.ndarray, n_bits: int, rows: int) -> np.ndarray:
    count, height = 8 * len(packed) // n_bits, packed.shape[1]
    codes = np.zeros((rows, packed.shape[2]), dtype=np.int64)
    for row in range(rows):
        i, place = divmod(row, height)
        assert i < count
        for column in range(packed.shape[2]):
            number = int.from_bytes(packed[:, place, column].tobytes(), "little")
            codes[row, column] = number // 2 ** (n_bits * i) % 2**n_bits
    return codes


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(1, 20), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_bytes_are_those_of_a_slow_packer(n_bits, rows, columns, seed):
    codes = np.random.default_rng(seed).integers(0, 2**n_bits, (rows, columns), dtype=np.uint8)
    packed = pack(torch.from_numpy(codes), n_bits)
    assert packed.shape == packed_shape((rows, columns), n_bits)
    assert np.array_equal(packed.numpy(), slow_pack(codes, n_bits))
    assert np.array_equal(unpack(packed, n_bits, rows).numpy(), codes)


@pytest.mark.parametrize("n_bits", [0, 9])
def test_other_widths_are_refused(n_bits):
    codes = torch.zeros(8, 3, dtype=torch.uint8)
    for call in (lambda: pack(codes, n_bits), lambda: unpack(codes[None], n_bits, 8)):
        with pytest.raises(ValueError, match=f"codes of {n_bits} bits cannot be packed, only of 1 to 8"):
            call()


@pytest.mark.parametrize("n_bits", BITS)
def test_no_bit_is_wasted(n_bits):
    codes, size = block(n_bits)
    assert codes * n_bits == 8 * size
    assert pack(torch.zeros(40, 7, dtype=torch.uint8), n_bits).numel() * 8 == 40 * 7 * n_bits


def slow_codes(layer, rows: int, columns: int, zero: np.ndarray) -> np.ndarray:
    """The codes of a packed layer; zeros that are left out get the code `zero` `(rows, columns)`."""
    packed, n_bits = layer.packed_weight.numpy(), layer.weight_quantizer.n_bits
    if layer.weight_mask is None:
        return slow_unpack(packed, n_bits, rows)
    kept = slow_unpack(layer.weight_mask.numpy().reshape(1, -1, 1), 1, rows * columns).astype(bool).ravel()
    codes = zero.flatten()
    codes[kept] = slow_unpack(packed, n_bits, kept.sum()).ravel() if kept.any() else []
    assert (codes[kept] != zero.ravel()[kept]).all()  # no zero is stored as a value
    return codes.reshape(rows, columns)


GRIDS = st.one_of(
    st.fixed_dictionaries({"granularity": st.sampled_from(["tensor", "channel"])}),
    st.fixed_dictionaries({"granularity": st.just("group"), "group_size": st.integers(1, 80)}),
)


@settings(max_examples=80, deadline=None)
@given(
    n_bits=st.integers(2, 8), symmetric=st.booleans(), grid=GRIDS, rows=st.integers(1, 20),
    columns=st.integers(1, 70), kernel=st.sampled_from([None, 1, 3]), chunk=st.sampled_from([1, 100, 2**19]),
    zeros=st.sampled_from([0, 0.5, 0.9, 1]), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_dense_weights_are_those_of_the_simulation_and_of_numpy(
    n_bits, symmetric, grid, rows, columns, kernel, chunk, zeros, seed
):
    layer = nn.Linear(columns, rows) if kernel is None else nn.Conv2d(columns, rows, kernel)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) + 0.3)
        layer.weight[torch.rand(layer.weight.shape, generator=generator) < zeros] = 0
        layer.weight[0] = 0  # as structured pruning leaves it
    params = {"n_bits": n_bits, "symmetric": symmetric, **grid}
    q = QuantModel(layer, weight_quant_params=params, act_quant_params=None)
    simulated, packed = q.quantized_layers()[0], to_packed(q).module
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sdcomp.integer.bit_packing._CHUNK", chunk)
        assert torch.equal(packed.dense_weight(torch.float32), simulated.fake_weight())
        for dtype in (torch.bfloat16, torch.float16):
            assert torch.equal(packed.dense_weight(dtype), simulated.fake_weight().to(dtype))
    assert packed.integer_weight().dtype == simulated.integer_weight().dtype
    assert torch.equal(packed.integer_weight(), simulated.integer_weight())

    columns = layer.weight[0].numel()
    width = {"group": grid.get("group_size")}.get(grid["granularity"], columns)
    group = np.arange(columns) // width
    scale = packed.weight_scale.float().numpy().reshape(-1, group[-1] + 1)[:, group]
    zero = np.full((rows, columns), 2 ** (n_bits - 1) - 1)
    if not symmetric:
        zero = packed.weight_zero_point.numpy().astype(np.int64).reshape(-1, group[-1] + 1)[:, group]
        zero = np.broadcast_to(zero, (rows, columns))
    codes = slow_codes(packed, rows, columns, zero)
    wanted = (codes - zero).astype(np.float32) * scale
    assert np.array_equal(packed.dense_weight(torch.float32).numpy().reshape(rows, -1), wanted)
