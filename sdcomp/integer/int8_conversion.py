"""From calibrated models to models with int8 weights."""

from __future__ import annotations

import torch
from torch import Tensor

from sdcomp.errors import UserError
from sdcomp.integer.execution import choose_execution
from sdcomp.integer.int8_layers import TENSORS
from sdcomp.integer.int8_model import Int8Model, float_tensors, largest_weight
from sdcomp.integer.packed_layers import NBitLayer
from sdcomp.integer.packed_model import PackedModel
from sdcomp.model.kinds import require_kind
from sdcomp.quantization.attention import refuse_quantized_products
from sdcomp.quantization.layers import QuantLayer
from sdcomp.quantization.model import QuantModel
from sdcomp.quantization.not_calibrated import require_calibrated

_FLOATS = tuple(kind for kind in TENSORS if kind != "weight")


def to_int8(
    model: QuantModel | PackedModel, dtype: torch.dtype | None = None, execution: str = "auto"
) -> Int8Model:
    """Turn a calibrated model, simulated or packed, into one with int8 weights; `model` stays as it is.

    Weights and activations of any number of bits up to 8 run on the 8-bit kernels. Everything between them
    (norms, activation functions, layers left out) computes in `dtype`: float32, bfloat16 or float16, by
    default the model's own. In bfloat16, attention's products are bfloat16 on CPUs that multiply it faster,
    else float32; this pays for large images. On identical inputs a float32 layer agrees with its simulation
    to 1e-5 relative.

    `execution`: see `sdcomp.integer.execution.choose_execution`. By default a CPU that has the integer
    kernels uses them; a CPU without VNNI has them for weights of at most 7 bits. Elsewhere, on CUDA for
    example, the weights stay int8 and are dequantized layer by layer: that saves memory and no time.

    Inputs may be affine; weights must be symmetric, with one scale for a channel or for the whole tensor, and
    without low-rank branches.

    Raises UserError for kernels that this machine does not have, for a model whose weights or activations are
    not quantized, switched off or on other grids, for quantized attention products, and (NotCalibratedError)
    for a model that is not calibrated; ValueError for another dtype or execution; TypeError for other models.
    """
    require_kind(model, (QuantModel, PackedModel), "to_int8 takes a QuantModel or a PackedModel")
    model.state.refuse_training("to_int8()")
    if model.weight_quantizer is None or model.act_quantizer is None:
        side = "weights" if model.weight_quantizer is None else "activations"
        raise UserError(f"int8 execution needs weights and activations quantized; the {side} are not")
    if not (model.state.weights and model.state.activations):
        side = "activations" if model.state.weights else "weights"
        raise UserError(f"the {side} are switched off: call set_use_quant() before to_int8()")
    require_calibrated(model, "before to_int8()")
    refuse_quantized_products(model, "int8 execution")
    for layer in model.quantized_layers():
        _check(layer)
    layers = {layer.name: layer for layer in model.quantized_layers()}
    first = next(iter(layers.values()))
    if dtype is None:
        dtype = model.dtype if isinstance(model, PackedModel) else first.weight.dtype
    integers = {
        name: {"weight": layer.integer_weight(), **{kind: _float(getattr(layer, kind)) for kind in _FLOATS}}
        for name, layer in layers.items()
    }
    weight_max = largest_weight(integers)
    execution = choose_execution(first.weight_scale.device, dtype, execution, weight_max)
    settings = {
        "weight_bits": model.weight_quantizer.n_bits,
        "act_bits": model.act_quantizer.n_bits,
        "layer_act_bits": {
            name: layer.act_quantizer.n_bits
            for name, layer in layers.items()
            if layer.act_quantizer.n_bits != model.act_quantizer.n_bits
        },
        "dtype": str(dtype).removeprefix("torch."),
        "execution": execution,
        "starts": list(model.starts),
        "train_timesteps": model.train_timesteps,
        "timestep_arg": getattr(model, "timestep_arg", None),
        "splits": {name: layer.split for name, layer in layers.items() if layer.split is not None},
    }
    return Int8Model(model.module, integers, dict(float_tensors(model.module, layers)), settings)


def _float(tensor: Tensor | None) -> Tensor | None:
    """A copy: a new calibration of the simulation does not change the integer model."""
    return None if tensor is None else tensor.detach().to(torch.float32, copy=True)


def _check(layer: QuantLayer | NBitLayer) -> None:
    """Raise UserError for a layer that does not run as a product of integers."""
    weight, act = layer.weight_quantizer, layer.act_quantizer
    if weight is None or act is None:
        reason = "only one of its sides is quantized"
    elif not weight.symmetric or weight.granularity == "group":
        reason = "its weights are affine or in groups of columns"
    elif layer.branch_up is not None:
        reason = "it has a low-rank branch"
    elif not layer.spec.calibrated:
        reason = "its input has a scale for each token"
    else:
        return
    raise UserError(f"layer {layer.name} cannot run in int8: {reason}")
