"""ONNX models with the calibrated scales as QuantizeLinear and DequantizeLinear, and int8 weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.onnx.ops import symbolic

from sdcomp.errors import UserError
from sdcomp.export.graph import DYNAMIC, INPUTS, GraphUNet, Grids, deploy_extra, example_inputs
from sdcomp.files import replacing
from sdcomp.model import ModelError, StableDiffusion

OPSET = 21
"""The first in which DequantizeLinear takes scales of groups."""


def save_onnx(sd: StableDiffusion, path: Path, dtype: torch.dtype | None = None) -> Path:
    """Write the UNet as `path`, which ends in `.onnx`; large weights go to `path` + `.data` beside it.

    See `sdcomp.export.graph.GraphUNet` for its inputs; batch, height, width and text length may vary. Weights
    of up to 8 bits are int8 in the file, the rest is float32.

    Raises UserError without onnx and onnxscript, for a `dtype` and for a file that cannot be written, and
    what `GraphUNet` raises.
    """
    with deploy_extra():
        import onnxscript  # noqa: F401  torch.onnx needs it
    if path.suffix != ".onnx":
        raise ModelError(f"{path}: an ONNX model needs a name that ends in .onnx")
    if dtype is not None:
        raise UserError("the onnx format has types of its own: leave dtype out")
    # Every level halves the maps, and the skip connections need them to fit.
    factor = 2 ** (len(sd.config.unet.channel_mult) - 1)
    sizes = {name: torch.export.Dim(name) for names in DYNAMIC for name in names.values()}
    sizes |= {name: factor * sizes[name] for name in ("height", "width")}
    shapes = tuple({i: sizes[name] for i, name in names.items()} for names in DYNAMIC)
    with torch.no_grad():
        graph = torch.export.export(
            GraphUNet(sd.unet, ONNXDialect()), example_inputs(sd), dynamic_shapes=shapes
        )
        program = torch.onnx.export(
            graph, input_names=INPUTS, output_names=["noise"], opset_version=OPSET, verbose=False
        )
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces with local paths, larger than a small model
    data = path.with_name(path.name + ".data")
    with replacing(path) as partial:
        program.save(partial)  # files beyond 2 GB cannot be read in one piece
        outside = partial.with_name(data.name)
        outside.replace(data) if outside.exists() else data.unlink(missing_ok=True)
    return path


class ONNXDialect:
    """QuantizeLinear and DequantizeLinear; inputs of fewer bits than 8 are clipped first."""

    def dequantize(self, integers: Tensor, scale: Tensor) -> Tensor:
        attributes = {"axis": 0}
        if scale.dim() == 2:
            attributes = {"axis": 1, "block_size": integers.shape[1] // scale.shape[1]}
        return _operator("DequantizeLinear", (integers, scale), torch.float32, attributes)

    def quantize(self, x: Tensor, grids: Grids) -> tuple[Tensor, None]:
        scale, low, high = grids.current()
        if grids.narrow:
            x = x.clamp(low * scale, high * scale)
        # Symmetric integers may also reach -128.
        zero = (-low).to(torch.uint8) if grids.affine else torch.zeros((), dtype=torch.int8)
        integers = _operator("QuantizeLinear", (x, scale, zero), zero.dtype)
        return _operator("DequantizeLinear", (integers, scale, zero), x.dtype), None

    def integers(self, x: Tensor, high: int) -> Tensor:
        return x.round().clamp(-high, high)


def _operator(
    name: str, inputs: tuple[Tensor, ...], dtype: torch.dtype, attributes: dict[str, int] | None = None
) -> Tensor:
    """Record an operator of ONNX whose output has the shape of its first input."""
    return symbolic(name, inputs, attributes, dtype=dtype, shape=inputs[0].shape, version=OPSET)
