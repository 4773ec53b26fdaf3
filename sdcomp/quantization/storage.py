"""Quantized models as files: scales in safetensors, everything else in JSON. Weights are not included."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sdcomp.errors import UserError
from sdcomp.files import find, replacing
from sdcomp.quantization.layers import QuantLayer
from sdcomp.quantization.model import QuantModel, TimeStepCalibratedQuantModel

CONFIG, SCALES = "quantization.json", "quantization.safetensors"
_KINDS = {kind.__name__: kind for kind in (QuantModel, TimeStepCalibratedQuantModel)}


class QuantizationFileError(UserError):
    """A saved quantization cannot be read, or is of another module; the message says what to do."""


def _buffers(model: QuantModel) -> dict[str, Tensor]:
    """What quantization added to the state dict, by its names there."""
    buffers = dict(model.named_buffers(recurse=False))
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLayer):
            for kind in ("weight_scale", "act_scale", "act_clipped"):
                if getattr(layer, kind) is not None:
                    buffers[f"{name}.{kind}"] = getattr(layer, kind)
    return buffers


def save(model: QuantModel, folder: str | Path) -> Path:
    """Write `quantization.json` and `quantization.safetensors` into a folder; returns it.

    The weights stay where they are: `load_quant_model` is given the module. Raises UserError where the
    folder cannot be written.
    """
    folder = Path(folder).expanduser()
    config = {
        "kind": type(model).__name__,
        "arguments": model.arguments(),
        "use_quant": {"weights": model.state.weights, "activations": model.state.activations},
        "intervals": model.intervals,
        "calibration": model.calibration,
    }
    text = json.dumps(config, indent=2, default=lambda v: v.item() if hasattr(v, "item") else list(v))
    with replacing(folder / SCALES) as partial:
        save_file({k: v.detach().cpu().contiguous() for k, v in _buffers(model).items()}, partial)
    with replacing(folder / CONFIG) as partial:
        partial.write_text(text + "\n", encoding="utf-8")
    return folder


def load_quant_model(folder: str | Path, module: nn.Module) -> QuantModel:
    """The quantized model that was saved, around a module with the weights that it was made for.

    Outputs are those of the saved model bit for bit. Raises QuantizationFileError, a ValueError, when a
    file is missing, damaged, or made for a module with other layers.
    """
    folder = find(folder)
    for file in (CONFIG, SCALES):
        if not (folder / file).is_file():
            raise QuantizationFileError(f"{folder} is no saved quantization: it has no {file}")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        kind, arguments, switches = (config[name] for name in ("kind", "arguments", "use_quant"))
        model = _KINDS[kind](module, **arguments).set_use_quant(**switches)
        model.calibration = dict(config["calibration"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise QuantizationFileError(f"{folder / CONFIG} does not fit this module: {error}") from error
    try:
        saved = load_file(folder / SCALES)
    except (SafetensorError, OSError) as error:
        raise QuantizationFileError(f"{folder / SCALES} is damaged: {error}") from error
    wanted = _buffers(model)
    differing = sorted(
        name
        for name in saved.keys() | wanted.keys()
        if name not in saved or name not in wanted or saved[name].shape != wanted[name].shape
    )
    if differing:
        raise QuantizationFileError(
            f"{folder / SCALES} was made for another module: {', '.join(differing[:3])} differ"
        )
    model.load_state_dict(saved, strict=False)
    return model
