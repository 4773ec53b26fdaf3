"""OpenVINO models with the calibrated scales as FakeQuantize operators and int8 weights."""

from __future__ import annotations

import hashlib
import re
import warnings
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sdcomp.errors import UserError
from sdcomp.export.graph import DYNAMIC, INPUTS, GraphUNet, Grids, deploy_extra, example_inputs
from sdcomp.files import regular, replacing, resolve_input
from sdcomp.integer import int8_kernels
from sdcomp.model import ModelError, StableDiffusion
from sdcomp.model.files.tensors import one_line

if TYPE_CHECKING:
    import openvino

_PER_VALUE = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Interpolate")
"""Operators that move or repeat values. Our UNet's only interpolation takes the nearest pixel."""


def save_openvino(sd: StableDiffusion, path: Path, dtype: torch.dtype | None = None) -> Path:
    """Write the UNet as `path`, which ends in `.xml`, and a `.bin` with the weights beside it.

    See `sdcomp.export.graph.GraphUNet` for its inputs; batch, height, width and text length may vary. Weights
    of up to 8 bits are int8 in the file, the rest is float32.

    Raises UserError without OpenVINO, for a `dtype` and for a file that cannot be written, and what
    `GraphUNet` raises.
    """
    with deploy_extra():
        import openvino
    if path.suffix != ".xml":
        raise ModelError(f"{path}: an OpenVINO model needs a name that ends in .xml")
    if dtype is not None:
        raise UserError("the openvino format has types of its own: leave dtype out")
    example = example_inputs(sd)
    shapes = [
        openvino.PartialShape([-1 if i in dynamic else size for i, size in enumerate(part.shape)])
        for part, dynamic in zip(example, DYNAMIC, strict=True)
    ]
    graph = GraphUNet(sd.unet, OpenVINODialect())
    with torch.no_grad(), warnings.catch_warnings():
        # Sizes are checked while the graph is recorded; nothing depends on them later.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        model = openvino.convert_model(graph, example_input=example, input=shapes)
    for port, name in zip(model.inputs, INPUTS, strict=True):
        port.get_tensor().set_names({name})
    _raise_quantizers(model)
    with replacing(path.with_suffix(".bin")) as weights, replacing(path) as text:
        openvino.save_model(model, weights.with_suffix(".xml"), compress_to_fp16=False)
        weights.with_suffix(".xml").replace(text)
    return path


class OpenVINODialect:
    """Operators of PyTorch that OpenVINO turns into FakeQuantize and compressed weights.

    The engine's integers have 256 levels, and it is exact for no other number: 8-bit inputs may reach -128,
    and inputs of fewer bits are clipped before they are rounded to 8 bits.
    """

    def dequantize(self, integers: Tensor, scale: Tensor) -> Tensor:
        if scale.dim() == 2:
            return (integers.unflatten(1, (scale.shape[1], -1)).float() * scale[:, :, None]).flatten(1)
        return integers.float() * scale.view(-1, *[1] * (integers.dim() - 1))

    def quantize(self, x: Tensor, grids: Grids) -> tuple[Tensor, Tensor | None]:
        scale, low, high = grids.rows[0]
        if grids.fixed:
            x = x.clamp(scale * low, scale * high) if grids.narrow else x
            return _round(x, scale, low if grids.affine else -128), None
        scale, *bounds = grids.current()
        x = x / scale
        if grids.affine:
            # Zero points that change with the timestep: the engine computes such layers in floats.
            return x.round().clamp(*bounds) * scale, None
        x = x.clamp(low, high) if grids.narrow else x
        # This scale is no constant, so it must not stand between the integers and their product.
        return _round(x, 1.0, -128), scale

    def integers(self, x: Tensor, high: int) -> Tensor:
        return _round(x if high == 127 else x.clamp(-high, high), 1.0, -128)


def _round(x: Tensor, scale: float, low: float) -> Tensor:
    """Round to 256 multiples of a scale, the lowest of which is `low`."""
    return torch.fake_quantize_per_tensor_affine(x, scale, -int(low), 0, 255)


def _raise_quantizers(model: openvino.Model) -> None:
    """Move FakeQuantize before operators that only move values, in place.

    There it runs as a part of the operator that computes the values, and integers are moved, not floats.
    """
    for fake in [op for op in model.get_ordered_ops() if op.get_type_name() == "FakeQuantize"]:
        if any(prod(fake.input(i).get_partial_shape().to_shape()) != 1 for i in range(1, 5)):
            continue
        while True:
            source = fake.input(0).get_source_output()
            mover = source.get_node()
            if mover.get_type_name() not in _PER_VALUE or len(source.get_target_inputs()) > 1:
                break
            users = fake.output(0).get_target_inputs()
            fake.input(0).replace_source_output(mover.input(0).get_source_output())
            for user in users:
                user.replace_source_output(source)
            mover.input(0).replace_source_output(fake.output(0))
    model.validate_nodes_and_infer_types()


class OpenVINOUNet(nn.Module):
    """A UNet that OpenVINO runs on the CPU, called as `unet(latents, timesteps, context)`.

    `weights`: the content of the `.bin` file, mapped and not read, so that digests and sizes are the file's.
    `how`: by which engine it runs, and in which type. For inference only.
    """

    def __init__(self, file: Path, compiled: openvino.CompiledModel, how: str) -> None:
        super().__init__()
        self.file, self._compiled, self._how = file, compiled, how
        self._graph = _graph_digest(file)
        binary = file.with_suffix(".bin")
        mapped = torch.from_file(str(binary), shared=False, size=binary.stat().st_size, dtype=torch.uint8)
        self.register_buffer("weights", mapped)
        self.eval()

    def forward(
        self, latents: Tensor, timesteps: Tensor | float, context: Tensor, *residuals: object
    ) -> Tensor:
        if residuals:
            raise ValueError("an exported UNet takes no residuals of a ControlNet: run the UNet itself")
        timesteps = torch.as_tensor(timesteps, dtype=torch.float32).reshape(-1)
        if (timesteps != timesteps[0]).any():
            raise ValueError("an exported UNet takes one timestep for all rows: run others separately")
        arrays = [x.detach().float().cpu().contiguous().numpy() for x in (latents, timesteps[:1], context)]
        return torch.from_numpy(self._compiled(arrays)[0]).to(latents)

    def extra_repr(self) -> str:
        """Engine, type and graph: with the weights, all that the results depend on."""
        return f"{self._how}, {self.file.name}, graph {self._graph}"


def _graph_digest(file: Path) -> str:
    """A hash of the `.xml` file without names: each export counts its constants on from the last one's."""
    return hashlib.sha256(re.sub(rb' names?="[^"]*"', b"", file.read_bytes())).hexdigest()[:12]


PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}
"""The engine's names of the types in which it computes everything that is not integers."""


def load_openvino(path: str | Path, dtype: torch.dtype = torch.float32) -> OpenVINOUNet:
    """Load a UNet that `export` wrote with format "openvino", for `sd.replace(unet=...)`.

    Attention, norms and layers that are not quantized compute in `dtype`: float32, or bfloat16, which large
    models may run faster on CPUs that multiply it. The engine uses as many threads as PyTorch. Nothing in the
    files is executed but the operators of the graph.

    Warns of weights of 8 bits on a CPU without VNNI, where the engine's sums of products overflow. Raises
    UserError without OpenVINO, ModelError for a file that is missing or damaged, ValueError for another type.
    """
    if dtype not in PRECISIONS:
        raise ValueError(f"dtype must be torch.float32 or torch.bfloat16, not {dtype!r}")
    with deploy_extra():
        import openvino
    file = resolve_input(path)
    for part in (file, file.with_suffix(".bin")):
        regular(part, ModelError)
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": PRECISIONS[dtype],
        # By default the engine rounds inputs to 8 bits where only the weights have 8 bits.
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
    }
    how = f"OpenVINO {openvino.get_version()}, {dtype}, {torch.get_num_threads()} threads"
    core = openvino.Core()
    try:
        model = core.read_model(str(file))
        if int8_kernels.products_overflow() and _largest_factor(model) > int8_kernels.NARROW:
            warnings.warn(
                f"{file} has weights of 8 bits, and this CPU has no VNNI: OpenVINO's sums overflow here, so"
                " images are worse than those of the simulation; quantize with weight_bits=7",
                stacklevel=2,
            )
        return OpenVINOUNet(file, core.compile_model(model, "CPU", settings), how)
    except RuntimeError as error:
        raise ModelError(f"OpenVINO cannot load {file}: {one_line(error)}; export it again") from None


def _largest_factor(model: openvino.Model) -> int:
    """The largest magnitude of the int8 constants that are multiplied as integers."""
    if all(op.get_type_name() != "FakeQuantize" for op in model.get_ops()):
        return 0  # weights alone are turned into floats
    constants = (op for op in model.get_ops() if op.get_type_name() == "Constant")
    weights = [op.data for op in constants if op.get_element_type().to_string() == "i8"]
    return max((max(-int(weight.min()), int(weight.max())) for weight in weights), default=0)
