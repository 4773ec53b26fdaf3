"""Where the time and the arithmetic of a network go."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop

from sdcomp.evaluation.timing import clock, interleaved_times

if TYPE_CHECKING:
    from sdcomp.model import StableDiffusion


def macs(module: nn.Module, *args: object) -> int:
    """Multiply-accumulates of convolutions, linear layers and attention's products in one call.

    As PyTorch counts them, whose formula for attention also serves for the kernel on CPUs, which it leaves
    out. For a module in floating point.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        counter.flop_registry[torch.ops.aten._scaled_dot_product_flash_attention_for_cpu] = sdpa_flop
        module(*args)
    return counter.get_total_flops() // 2


def weight_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers as the state dict has them, shared ones once.

    Of integer layers these are the plain integers; the kernels' own layout of them is of about that size.
    """
    tensors = {t.data_ptr(): t for t in module.state_dict().values()}
    return sum(t.nbytes for t in tensors.values())


def component_times(
    variants: Mapping[str, StableDiffusion], prompts: list[str], repeats: int = 5, **settings: Any
) -> pd.DataFrame:
    """Seconds of `generate(prompts, **settings)` in text encoder, UNet and decoder, and in all.

    A row for each variant and repeat; columns `variant`, `text encoder`, `UNet`, `decoder`, `total`. Every
    round runs all variants, so that drift meets all alike; the first round is thrown away.
    """
    rows = []
    for turn in range(repeats + 1):
        for name, sd in variants.items():
            parts = {"text encoder": sd.text_encoder, "UNet": sd.unet, "decoder": sd.decoder}
            clocks = {part: _Clock(module, sd.device) for part, module in parts.items()}
            begin = clock(sd.device)
            sd.generate(prompts, **settings)
            total = clock(sd.device) - begin
            seconds = {part: timed.stop() for part, timed in clocks.items()}
            if turn > 0:
                rows.append({"variant": name, **seconds, "total": total})
    return pd.DataFrame(rows)


class _Clock:
    """Adds up the seconds that a module's calls take, until it is stopped.

    On CUDA events are recorded beside the work and read when it is done: waiting around every layer would
    make the device idle in between.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.device, self.marks = device, []
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

    def stop(self) -> float:
        """The seconds of all calls."""
        for hook in self._hooks:
            hook.remove()
        calls = zip(self.marks[::2], self.marks[1::2], strict=True)
        if self.device.type != "cuda":
            return sum(end - begin for begin, end in calls)
        torch.cuda.synchronize(self.device)
        return sum(begin.elapsed_time(end) for begin, end in calls) / 1000


def layer_profile(module: nn.Module, *args: object, repeats: int = 3) -> pd.DataFrame:
    """The layers of one call: a row each for every convolution, linear layer, norm and attention.

    Columns: `name`, `kind`, `block` (the first two parts of the name), `seconds` (median over repeats),
    `flops` (twice the multiply-accumulates) and `bytes` (input, weight and output, each moved once). An
    attention's row is its products of queries, keys and values: its time less that of its linear layers.
    The device is that of the first tensor among `args`.
    The row `rest` is what no layer accounts for: activations, additions, concatenations.
    """
    attentions = {
        name: sub
        for name, sub in module.named_modules()
        if type(sub).__name__ in ("CrossAttention", "Attention")
    }
    layers = {name: sub for name, sub in module.named_modules() if _kind(sub)} | attentions
    costs: dict[str, tuple[int, int]] = {}
    hooks = [
        layer.register_forward_hook(
            lambda layer, inputs, out, name=name: costs.__setitem__(name, _cost(layer, inputs, out))
        )
        for name, layer in layers.items()
    ]
    runs: dict[str, list[float]] = defaultdict(list)
    device = next((x.device for x in args if isinstance(x, Tensor)), torch.device("cpu"))
    with torch.no_grad():
        module(*args)
        for hook in hooks:
            hook.remove()
        for _ in range(repeats):
            clocks = {name: _Clock(layer, device) for name, layer in layers.items()}
            begin = clock(device)
            module(*args)
            runs[""].append(clock(device) - begin)
            for name, timed in clocks.items():
                runs[name].append(timed.stop())
    seconds = {name: sorted(values)[len(values) // 2] for name, values in runs.items()}
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
    rest = seconds[""] - sum(row["seconds"] for row in rows)
    rows.append({"name": "", "kind": "rest", "block": "", "seconds": rest, "flops": 0, "bytes": 0})
    return pd.DataFrame(rows)


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
        moved = x.nbytes + out.nbytes + layer.weight.nbytes
        return 2 * out.numel() * layer.weight[0].numel(), moved
    if isinstance(layer, nn.GroupNorm | nn.LayerNorm):
        return 8 * x.numel(), x.nbytes + out.nbytes
    context = x if len(inputs) < 2 or inputs[1] is None else inputs[1]
    batch, tokens, dim = x.shape[0], x.shape[1], layer.to_q.out_features
    moved = x.element_size() * batch * dim * 2 * (tokens + context.shape[1])
    return 4 * batch * tokens * context.shape[1] * dim, moved


def machine_peaks(repeats: int = 5, n: int = 2048) -> dict[str, float]:
    """What this machine's CPU reaches: products in GFLOP/s (GOP/s for int8), memory in GB/s.

    "fp32" and "bf16": square matrix products of size `n`; "int8": the same through oneDNN, where
    PyTorch has it; "memory": a copy of 64 n^2 bytes, reads and writes added.
    """
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, n, generator=generator) for _ in range(2))
    a16, b16 = a.bfloat16(), b.bfloat16()
    source, target = torch.ones(16 * n * n), torch.empty(16 * n * n)
    calls: dict[str, Callable[[], Any]] = {
        "fp32": lambda: a @ b,
        "bf16": lambda: a16 @ b16,
        "memory": lambda: target.copy_(source),
    }
    if hasattr(torch.ops.onednn, "qlinear_pointwise"):
        # Unsigned: signed inputs fall to a kernel that is a thousand times slower.
        integers = (10 * a + 128).clamp(0, 255).to(torch.uint8)
        packed = torch.ops.onednn.qlinear_prepack((10 * b).clamp(-127, 127).to(torch.int8), None)
        ones, zeros = torch.ones(n), torch.zeros(n, dtype=torch.int32)
        calls["int8"] = lambda: torch.ops.onednn.qlinear_pointwise(
            integers, 1.0, 128, packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
    work = {"fp32": 2 * n**3, "bf16": 2 * n**3, "int8": 2 * n**3, "memory": 2 * source.nbytes}
    times = interleaved_times(calls, repeats)
    return {name: work[name] / values.min() / 1e9 for name, values in times.items()}
