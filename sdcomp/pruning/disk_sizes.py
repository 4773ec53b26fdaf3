"""The size of pruned weights on disk, measured on files that are really written."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import zstandard
from safetensors.torch import save_file
from torch import Tensor, nn


def disk_sizes(weights: nn.Module | Mapping[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, int]:
    """Bytes of a safetensors file of some weights, converted to `dtype` if given; tied ones are stored once.

    `dense` is the file itself; `dense_zstd` is that file compressed by Zstandard at its default level, 3;
    `sparse` is a file of the tensors that `sparse_state` gives.
    """
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    names = {(t.data_ptr(), t.shape, t.stride()) if t.numel() else name: name for name, t in state.items()}
    state = {name: state[name] for name in names.values()}
    state = {
        name: t.detach().to("cpu", dtype if dtype and t.is_floating_point() else t.dtype).contiguous()
        for name, t in state.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weights.safetensors"
        save_file(state, file)
        dense = file.stat().st_size
        with file.open("rb") as source:
            compressed = sum(len(chunk) for chunk in zstandard.ZstdCompressor().read_to_iter(source))
        stored, shapes = sparse_state(state)
        save_file(stored, file, {"shapes": json.dumps(shapes)})
        return {"dense": dense, "dense_zstd": compressed, "sparse": file.stat().st_size}


def sparse_state(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """Store tensors as bit masks and nonzero values where this takes fewer bytes.

    Returns the tensors to store, and the shapes of those that became sparse. A sparse tensor `name` is stored
    as `name.mask` and `name.values`. The mask has one bit for each entry in row-major order; the first entry
    is the highest bit of the first byte.
    """
    stored, shapes = {}, {}
    for name, tensor in state.items():
        mask = tensor.flatten() != 0
        values = tensor.flatten()[mask]
        bits = torch.from_numpy(np.packbits(mask.numpy()))
        if bits.nbytes + values.nbytes < tensor.nbytes:
            stored[f"{name}.mask"], stored[f"{name}.values"] = bits, values
            shapes[name] = list(tensor.shape)
        else:
            stored[name] = tensor
    return stored, shapes
