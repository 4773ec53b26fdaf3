"""The memory of weights and the peak memory of calls, in bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn


def weight_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers in the state dict; shared ones count once.

    The state dict of an integer layer holds plain integers; the kernels' own layout has about that size.
    """
    sizes = Counter[torch.UntypedStorage]()
    for tensor in module.state_dict().values():
        sizes[tensor.untyped_storage()] += tensor.nbytes
    return sum(min(size, storage.nbytes()) for storage, size in sizes.items())


def peak_memory(call: Callable[[], Any], device: torch.device | str = "cpu") -> int | None:
    """The peak of the memory that `call` takes in addition, in bytes, on `device`.

    On CUDA this is the memory of its allocator, on a CPU the resident set of the process. The result is None
    on a system that cannot tell: a CPU needs Linux, and other devices than CUDA do not tell. On a CPU, memory
    that the process already holds and reuses does not count, so measure in a fresh process.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu" or not _reset_peak():
        call()
        return None
    before = _status("VmRSS")
    call()
    return max(0, _status("VmHWM") - before)


def _reset_peak() -> bool:
    """Reset the peak of this process's memory; return False if the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return False
    return True


def _status(name: str) -> int:
    """A memory size of this process from /proc, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name)))
