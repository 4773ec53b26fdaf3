"""Measure the time and the arithmetic of a network, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop

from sdcomp.evaluation.timing import clock, interleaved_times
from sdcomp.integer.packed_layers import NBitLayer
from sdcomp.model.device import computes_bfloat16

if TYPE_CHECKING:
    from sdcomp.model import StableDiffusion


def macs(module: nn.Module, *args: object) -> int:
    """Multiply-accumulates of convolutions, linear layers and attention's products in one call.

    PyTorch counts them; its formula for attention is used for the CPU's kernel too, which PyTorch leaves
    out. `module` must be in floating point.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        counter.flop_registry[torch.ops.aten._scaled_dot_product_flash_attention_for_cpu] = sdpa_flop
        module(*args)
    return counter.get_total_flops() // 2


def component_times(
    variants: Mapping[str, StableDiffusion], prompts: list[str], repeats: int = 5, **settings: Any
) -> pd.DataFrame:
    """Seconds that `generate(prompts, **settings)` spends in text encoder, UNet and decoder, and in total.

    One row for each variant and repeat; columns `variant`, `text encoder`, `UNet`, `decoder`, `total`. Every
    round runs all variants, so that a slow phase of the machine affects all; the first round is dropped.
    """
    rows = []
    for turn in range(repeats + 1):
        for name, sd in variants.items():
            parts = {"text encoder": sd.text_encoder, "UNet": sd.unet, "decoder": sd.decoder}
            seconds, total = _time_parts(parts, sd.device, lambda sd=sd: sd.generate(prompts, **settings))
            if turn > 0:
                rows.append({"variant": name, **seconds, "total": total})
    return pd.DataFrame(rows)


def _time_parts(
    parts: Mapping[str, nn.Module], device: torch.device, call: Callable[[], Any]
) -> tuple[dict[str, float], float]:
    """Seconds that `call` spends in each of these modules, and in total."""
    clocks = {name: _Clock(module, device) for name, module in parts.items()}
    try:
        begin = clock(device)
        call()
        total = clock(device) - begin
    finally:
        for timed in clocks.values():
            timed.remove()
    return {name: timed.seconds() for name, timed in clocks.items()}, total


class _Clock:
    """Records when a module's calls begin and end.

    On CUDA the marks are events: the device records them between its kernels, and they are read after all
    work is done. Waiting at every layer would leave the device idle.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.device = device
        self.marks: list[Any] = []  # begin, end, begin, end, ...: seconds, or events
        self._hooks = (
            module.register_forward_pre_hook(lambda *_: self._mark()),
            module.register_forward_hook(lambda *_: self._mark()),
        )

    def _mark(self) -> None:
        if self.device.type != "cuda":
            self.marks.append(clock(self.device))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        self.marks.append(event)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def seconds(self) -> float:
        """The seconds of all calls."""
        calls = zip(self.marks[::2], self.marks[1::2], strict=True)
        if self.device.type != "cuda":
            return sum(end - begin for begin, end in calls)
        torch.cuda.synchronize(self.device)
        return sum(begin.elapsed_time(end) for begin, end in calls) / 1000


def layer_profile(module: nn.Module, *args: object, repeats: int = 3) -> pd.DataFrame:
    """Profile one call: one row for every convolution, linear layer, norm and attention.

    Columns: `name`, `kind`, `block` (the first two parts of the name), `seconds` (median over repeats),
    `flops` (twice the multiply-accumulates) and `bytes` (input, weight and output, each moved once). The row
    of an attention covers only its products of queries, keys and values: its time minus the time of its
    linear layers. The row `rest` covers everything else: activations, additions, concatenations. The clock
    waits for the device of the first tensor in `args`. `module` must compute in floating point, as a
    `PackedModel` does; the bytes of its weights are the packed ones. Raises ValueError for fewer than one
    repeat.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, not {repeats}")
    attentions = {
        name: sub
        for name, sub in module.named_modules()
        if type(sub).__name__ in ("CrossAttention", "Attention")
    }
    layers = {name: sub for name, sub in module.named_modules() if _kind(sub)} | attentions
    device = next((x.device for x in args if isinstance(x, Tensor)), torch.device("cpu"))
    with torch.no_grad():
        costs = _costs(module, layers, args)
        runs = [_time_parts(layers, device, lambda: module(*args)) for _ in range(repeats)]
    seconds = {name: float(np.median([parts[name] for parts, _ in runs])) for name in layers}
    for name in attentions:
        seconds[name] -= sum(s for other, s in seconds.items() if other.startswith(f"{name}."))
    rows = [
        {
            "name": name,
            "kind": _kind(layer) or "attention",
            "block": ".".join(name.split(".")[:2]),
            "seconds": seconds[name],
            "flops": costs[name][0],
            "bytes": costs[name][1],
        }
        for name, layer in layers.items()
        if name in costs
    ]
    rest = float(np.median([total for _, total in runs])) - sum(row["seconds"] for row in rows)
    rows.append({"name": "", "kind": "rest", "block": "", "seconds": rest, "flops": 0, "bytes": 0})
    return pd.DataFrame(rows)


def _costs(module: nn.Module, layers: Mapping[str, nn.Module], args: tuple) -> dict[str, tuple[int, int]]:
    """Floating-point operations and bytes of each layer in one call of the module, counted by `_cost`."""
    costs: dict[str, tuple[int, int]] = {}

    def count(name: str) -> Callable[[nn.Module, tuple, Tensor], None]:
        return lambda layer, inputs, out: costs.update({name: _cost(layer, inputs, out)})

    hooks = [layer.register_forward_hook(count(name)) for name, layer in layers.items()]
    try:
        module(*args)
    finally:
        for hook in hooks:
            hook.remove()
    return costs


def _kind(layer: nn.Module) -> str | None:
    if isinstance(layer, nn.Conv2d):
        return f"convolution {layer.kernel_size[0]}x{layer.kernel_size[1]}"
    if isinstance(layer, nn.Linear):
        return "linear"
    if isinstance(layer, nn.GroupNorm | nn.LayerNorm):
        return "norm"
    return None


def _cost(layer: nn.Module, inputs: tuple, out: Tensor) -> tuple[int, int]:
    """Floating-point operations and bytes moved at least."""
    x = inputs[0]
    if isinstance(layer, nn.Conv2d | nn.Linear):
        packed = isinstance(layer, NBitLayer)
        shape = layer.shape if packed else layer.weight.shape
        stored = layer.packed_weight if packed else layer.weight
        return 2 * out.numel() * prod(shape[1:]), x.nbytes + out.nbytes + stored.nbytes
    if isinstance(layer, nn.GroupNorm | nn.LayerNorm):
        return 8 * x.numel(), x.nbytes + out.nbytes
    context = x if len(inputs) < 2 or inputs[1] is None else inputs[1]
    batch, tokens, dim = x.shape[0], x.shape[1], layer.to_q.out_features
    moved = x.element_size() * batch * dim * 2 * (tokens + context.shape[1])
    return 4 * batch * tokens * context.shape[1] * dim, moved


def machine_peaks(
    repeats: int = 5, n: int | None = None, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """Measure the peak rates of a device: products in GFLOP/s (GOP/s for int8), memory in GB/s.

    "fp32", "bf16" unless the CPU lacks it, and on a GPU "fp16": square matrix products of size `n` (2048 on a
    CPU, 4096 on a GPU), as a product and as a 1x1 convolution; the faster one counts, as the two may come
    from different libraries.
    "int8", only on a CPU: the same product by oneDNN, if PyTorch has it. "memory": a copy of 64 n^2 bytes;
    reads and writes count. On a GPU "fp32" may round to TF32: call `fix_precision` first.
    """
    device = torch.device(device)
    n = n or (2048 if device.type == "cpu" else 4096)
    types = {"fp32": torch.float32}
    if device.type != "cpu" or computes_bfloat16():
        types["bf16"] = torch.bfloat16
    if device.type != "cpu":
        types["fp16"] = torch.float16
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, n, generator=generator) for _ in range(2))
    calls = {}
    for name, dtype in types.items():
        left, right = a.to(device, dtype), b.to(device, dtype)
        calls[name] = partial(torch.matmul, left, right)
        calls[f"{name}, convolution"] = partial(F.conv2d, right[None, :, None], left[:, :, None, None])
    if device.type == "cpu" and hasattr(torch.ops.onednn, "qlinear_pointwise"):
        calls["int8"] = _int8_product(a, b)
    work = dict.fromkeys(calls, 2 * n**3)
    source, target = (torch.ones(16 * n * n, device=device) for _ in range(2))
    calls["memory"], work["memory"] = lambda: target.copy_(source), 2 * source.nbytes
    times = interleaved_times(calls, repeats, device=device)
    peaks: dict[str, float] = {}
    for call, values in times.items():
        name = call.partition(",")[0]
        peaks[name] = max(peaks.get(name, 0.0), work[call] / values.min() / 1e9)
    return peaks


def _int8_product(a: Tensor, b: Tensor) -> Callable[[], Tensor]:
    """The product of two matrices by oneDNN, after rounding both to int8."""
    # Unsigned: for signed inputs oneDNN takes a kernel that is a thousand times slower.
    integers = (10 * a + 128).clamp(0, 255).to(torch.uint8)
    packed = torch.ops.onednn.qlinear_prepack((10 * b).clamp(-127, 127).to(torch.int8), None)
    ones, zeros = torch.ones(len(b)), torch.zeros(len(b), dtype=torch.int32)
    return lambda: torch.ops.onednn.qlinear_pointwise(
        integers, 1.0, 128, packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
