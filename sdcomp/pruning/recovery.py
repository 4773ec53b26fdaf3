"""Recovery: a pruned UNet learns again to predict what the whole one predicts. No images are needed."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdcomp.model import StableDiffusion, weights_digest
from sdcomp.model.samplers import whole
from sdcomp.pruning.layers import prunable_layers
from sdcomp.training.loop import Loss, Trained, fit


def recover(
    unet: nn.Module,
    sd: StableDiffusion,
    prompts: Sequence[str],
    steps: int,
    *,
    lr: float = 1e-4,
    batch_size: int = 32,
    negative_prompt: str = "",
    sampling_steps: int = 20,
    sampler: str = "ddim",
    guidance_scale: float | None = None,
    size: tuple[int, int] | None = None,
    seed: int = 0,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 120.0,
    progress: bool = True,
) -> Trained:
    """Train a pruned copy of `sd.unet` to predict the same noise as `sd.unet` itself.

    The distillation loss on outputs of BK-SDM (Kim et al. 2023): the squared distance of the two
    predictions. Its inputs are those that the whole model meets when it generates `prompts`, at every
    step, with the prompt and with the negative one; its targets are what it then predicts. Both are
    recorded in one generation, so training runs the pruned UNet alone; a resumed run records them again.

    `steps` updates of `batch_size` rows. `sampling_steps` to `size` are those of
    `StableDiffusion.generate`. Parameters that are exactly zero stay zero. Returns a new UNet (the moving
    average) with the loss of each step; `unet` is left as it is. From `checkpoint` a killed run takes up
    as if it had not been. Raises ValueError for no prompts, and what `generate` and `fit` raise.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        raise ValueError("recovery needs at least one calibration prompt")
    if whole("steps", steps) < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    if any(p.dtype != torch.float32 for p in unet.parameters()):
        raise ValueError("recovery trains in float32: give unet.float(), and convert the result")
    prunable_layers(unet, [""])  # refuses kept masks, which a copy would lose
    sampling = {
        "negative_prompt": negative_prompt, "steps": sampling_steps, "sampler": sampler,
        "guidance_scale": guidance_scale, "size": size, "seed": seed,
    }  # fmt: skip
    recorder = _Recorder(sd.unet)
    sd.replace(unet=recorder).generate(
        prompts, batch_size=min(batch_size, len(prompts)), progress=progress, **sampling
    )
    student = copy.deepcopy(unet).requires_grad_(True)
    _hold_zeros(student)
    return fit(
        student,
        _distillation_loss(student, recorder.calls, batch_size),
        steps,
        lr=lr,
        weight_decay=0.0,
        warmup=max(1, min(100, steps // 10)),
        seed=seed,
        checkpoint=checkpoint,
        checkpoint_seconds=checkpoint_seconds,
        inputs={
            "pruned": weights_digest(unet),
            "dense": weights_digest(sd.unet),
            "prompts": _digest(prompts),
            "sampling": _digest(sampling),
            "batch_size": batch_size,
        },
        progress=progress,
        desc="recover",
    )


class _Recorder(nn.Module):
    """A UNet that remembers its calls: latents, timesteps, context, prediction."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet
        self.calls: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def forward(self, latents: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        predicted = self.unet(latents, timesteps, context)
        # The context is one tensor for all steps of a batch, so this keeps it once.
        self.calls.append((latents, timesteps, context, predicted))
        return predicted


def _distillation_loss(student: nn.Module, calls: list[tuple[Tensor, ...]], batch_size: int) -> Loss:
    rows = [(call, i) for call in calls for i in range(len(call[0]))]

    def loss(rng: np.random.Generator, generator: torch.Generator) -> Tensor:
        chosen = [rows[r] for r in rng.integers(len(rows), size=batch_size)]
        latents, timesteps, context, target = (
            torch.stack([call[k][i] for call, i in chosen]) for k in range(4)
        )
        return F.mse_loss(student(latents.float(), timesteps, context.float()), target.float())

    return loss


def _hold_zeros(module: nn.Module) -> None:
    """Give what is zero no gradient; without decay, AdamW then leaves it at zero."""
    for layer in prunable_layers(module, [""]):
        for parameter in layer.parameters():
            if (zeros := parameter.detach() == 0).any():
                parameter.register_hook(partial(torch.Tensor.masked_fill, mask=zeros, value=0))


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]
