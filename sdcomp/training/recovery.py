"""Recovery: train a compressed UNet to predict what the UNet itself predicts. It needs no images."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sdcomp.files import source_digest
from sdcomp.model import StableDiffusion, weights_digest
from sdcomp.model.batch_size import BATCH_SIZE, default_batch_size
from sdcomp.model.generate_arguments import image_pixels
from sdcomp.model.kinds import require_model
from sdcomp.pruning.layers import prunable_layers
from sdcomp.quantization import QuantModel
from sdcomp.quantization.not_calibrated import require_calibrated
from sdcomp.quantization.rounding_gradients import rounded, trainable
from sdcomp.settings import plain, whole_number
from sdcomp.training.loop import Trained, fit, training_seed
from sdcomp.training.losses import recovery_loss
from sdcomp.training.recorded_calls import recorded_calls

SAMPLING = ("negative_prompt", "sampler", "guidance_scale", "size")
"""The arguments of `StableDiffusion.generate` that `recover` passes on; it raises TypeError for others."""


def recover(
    unet: nn.Module,
    sd: StableDiffusion,
    prompts: Sequence[str],
    steps: int,
    *,
    lr: float = 1e-4,
    batch_size: int = 32,
    sampling_steps: int = 20,
    seed: int = 0,
    micro_batch: int | None = None,
    recompute: bool | None = None,
    autocast: bool | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_seconds: float = 120.0,
    progress: bool = True,
    **sampling: Any,
) -> Trained:
    """Train a pruned or quantized copy of `sd.unet` to predict the same noise as `sd.unet` itself.

    The loss is BK-SDM's distillation loss on outputs (Kim et al. 2023): the mean squared distance of the two
    predictions. One generation of `prompts` records what the full UNet is given and predicts at every step,
    with the prompt and with the negative prompt. Training then runs the compressed UNet alone. The generation
    takes `sampling_steps` steps, and the arguments of `StableDiffusion.generate` that `SAMPLING` names. A
    `QuantModel` is trained through the rounding, see `sdcomp.quantization.rounding_gradients`. Its
    full-precision weights are then the trained ones.

    There are `steps` updates of `batch_size` rows. Zeros stay zero, so masks and N:M patterns last. Returns a
    new UNet (the moving average) with the loss of each step. A killed run resumes from `checkpoint`.

    Memory: an update sums the gradients of micro-batches of `micro_batch` rows (default: the rows of one UNet
    call in `generate`). `recompute` recomputes activations in the backward pass instead of storing them
    (default: if `generate` takes fewer than 16 images at a time). `autocast` multiplies in bfloat16
    (default: on CUDA); weights stay float32. The recorded tensors stay on the CPU.

    Raises ValueError for no prompts, for weights that are not float32, and if `micro_batch` does not divide
    `batch_size`; UserError for an int8 or packed UNet; and what `generate` and `fit` raise.
    """
    steps, batch_size = whole_number("steps", steps), whole_number("batch_size", batch_size)
    prompts, seed = _check(unet, sd, prompts, steps, batch_size, sampling), training_seed(seed)
    own = default_batch_size(image_pixels(sd.config, sampling.get("size")))
    rows = math.gcd(batch_size, 2 * own) if micro_batch is None else whole_number("micro_batch", micro_batch)
    if rows < 1 or batch_size % rows:
        raise ValueError(f"micro_batch must divide batch_size, {batch_size}, which {rows} does not")
    sampling |= {"steps": sampling_steps, "seed": seed}
    calls = recorded_calls(sd, prompts, batch_size=min(own, len(prompts)), progress=progress, **sampling)
    quantized = isinstance(unet, QuantModel)
    student = trainable(unet) if quantized else copy.deepcopy(unet).requires_grad_(True)
    _hold_zeros(student, unet)
    _set_recompute(student, own < BATCH_SIZE if recompute is None else recompute)
    inputs = {"compressed": weights_digest(unet), "dense": weights_digest(sd.unet), "batch_size": batch_size}
    inputs |= {"prompts": _digest(prompts), "sampling": _digest(sampling), "source code": source_digest()}
    loss = recovery_loss(student, calls, batch_size, rows, autocast)
    trained = fit(
        student, loss, steps, lr=lr, warmup=max(1, min(100, steps // 10)), weight_decay=0.0, seed=seed,
        checkpoint=checkpoint, checkpoint_seconds=checkpoint_seconds, inputs=inputs, progress=progress,
        desc="recover",
    )  # fmt: skip
    _set_recompute(trained.module, False)
    return replace(trained, module=rounded(trained.module)) if quantized else trained


def _check(
    unet: nn.Module,
    sd: StableDiffusion,
    prompts: str | Sequence[str],
    steps: int,
    batch_size: int,
    sampling: Mapping[str, Any],
) -> list[str]:
    """Return the prompts. Raise ValueError, TypeError or UserError for what cannot be recovered."""
    require_model(sd)
    for name in sampling:
        if name not in SAMPLING:
            raise TypeError(f"recovery does not take {name}; its generation takes {', '.join(SAMPLING)}")
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        raise ValueError("recovery needs at least one calibration prompt")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    if not isinstance(unet, QuantModel):
        prunable_layers(unet, [""])  # refuses integer layers and weights that are not finite
    else:
        require_calibrated(unet, "before the recovery")
    if any(p.dtype != torch.float32 for p in unet.parameters()):
        raise ValueError("recovery trains in float32: give unet.float(), and convert the result")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    return prompts


def _set_recompute(unet: nn.Module, recompute: bool) -> None:
    """Switch recomputation on or off, in our UNets and diffusers'."""
    if hasattr(unet, "recompute"):
        unet.recompute = recompute
    elif hasattr(unet, "enable_gradient_checkpointing"):
        (unet.enable_gradient_checkpointing if recompute else unet.disable_gradient_checkpointing)()


def _hold_zeros(student: nn.Module, unet: nn.Module) -> None:
    """Set the gradients of weights to zero that are zero in `unet`; AdamW without decay then keeps them zero.

    A weight that quantization rounded to zero may move: in full precision it is not zero.
    """
    for name, layer in unet.named_modules():
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            continue
        for kind, parameter in layer.named_parameters(recurse=False):
            if (zeros := parameter.detach() == 0).any():
                trained = student.get_submodule(name).get_parameter(kind)
                trained.register_hook(partial(torch.Tensor.masked_fill, mask=zeros, value=0))


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, default=plain).encode()).hexdigest()[:12]
