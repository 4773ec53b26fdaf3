"""One training loop for every model part: cosine learning rate, moving average, checkpoints, resume."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from sdcomp.errors import UserError
from sdcomp.files import replacing
from sdcomp.settings import whole_number

Loss = Callable[[np.random.Generator, torch.Generator], Tensor | Iterator[Tensor]]
"""The loss of a step, or the losses of its micro-batches, which add up to the loss of the step."""


@dataclass
class Trained:
    """The moving average of the trained module, in eval mode; the loss of each step; the seconds."""

    module: nn.Module
    losses: list[float]
    seconds: float


def fit(
    module: nn.Module,
    loss: Loss,
    steps: int,
    *,
    lr: float,
    warmup: int = 100,
    weight_decay: float = 0.01,
    ema_decay: float = 0.999,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    checkpoint_seconds: float = 120.0,
    inputs: dict[str, str] | None = None,
    progress: bool = True,
    desc: str = "train",
) -> Trained:
    """Minimise `loss` over the parameters of `module`: AdamW, `warmup_cosine`.

    `loss(rng, generator)` draws its batch and noise from the two generators. It returns a scalar, or yields
    several scalars, whose gradients are added up. `seed` and the step's number seed the generators, so a
    killed run resumes from `checkpoint` with the same result. Gradients are clipped to norm 1.

    A checkpoint belongs to one training: `inputs` holds hashes of everything else that the loss depends on,
    such as data and other parts. Raises UserError for a checkpoint of another training, FloatingPointError if
    the loss becomes infinite or NaN, and what `training_seed` raises.
    """
    steps, lr, seed = whole_number("steps", steps), float(lr), training_seed(seed)
    recipe = {
        "part": desc, "steps": steps, "lr": lr, "warmup": warmup, "weight_decay": weight_decay,
        "ema_decay": ema_decay, "seed": seed, **(inputs or {}),
    }  # fmt: skip
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True
    )
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(ema_decay))
    stateful = {"module": module, "average": average, "optimizer": optimizer}
    start, losses, seconds = 0, [], 0.0
    checkpoint = None if checkpoint is None else Path(checkpoint).expanduser()
    if checkpoint is not None and checkpoint.exists():
        start, losses, seconds = _resume(checkpoint, recipe, stateful)
    module.train()
    begun = saved = time.monotonic()
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=desc, disable=not progress)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = lr * warmup_cosine(step, steps, warmup)
        found = loss(np.random.default_rng([seed, step]), torch.Generator().manual_seed(seed * 10**9 + step))
        losses.append(_backward(found, f"{desc}, step {step}"))
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        # A short memory at first: the average of a short run must forget its random start.
        average.multi_avg_fn = get_ema_multi_avg_fn(min(ema_decay, (step + 1) / (step + 10)))
        average.update_parameters(module)
        bar.set_postfix(loss=f"{np.mean(losses[-50:]):.4f}")
        if checkpoint is not None and (time.monotonic() - saved > checkpoint_seconds or step == steps - 1):
            so_far = {"step": step + 1, "losses": losses, "seconds": seconds + time.monotonic() - begun}
            _write(checkpoint, recipe, stateful, so_far)
            saved = time.monotonic()
    return Trained(average.module.eval(), losses, seconds + time.monotonic() - begun)


def warmup_cosine(step: int, steps: int, warmup: int) -> float:
    """The share of the highest learning rate at a step, from 0 to `steps` - 1.

    A linear warm-up, then cosine decay to zero (Loshchilov & Hutter 2017).
    """
    return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))


def training_seed(seed: object) -> int:
    """Return the seed of a training as an int. Raises TypeError for other kinds, ValueError out of range."""
    seed = whole_number("seed", seed)
    if not 0 <= seed < 2**34:  # with the step's number it must fit into PyTorch's 64 bits
        raise ValueError(f"the seed of a training must be at least 0 and below 2**34, not {seed}")
    return seed


def _backward(loss: Tensor | Iterator[Tensor], where: str) -> float:
    """Compute the gradients of a step's losses and return their sum; FloatingPointError unless finite."""
    total = 0.0
    for part in [loss] if isinstance(loss, Tensor) else loss:
        part.backward()
        total += part.item()
    if not math.isfinite(total):
        raise FloatingPointError(f"{where}: the loss is {total}; lower the learning rate")
    return total


def _write(path: Path, recipe: dict[str, Any], stateful: dict[str, Any], so_far: dict[str, Any]) -> None:
    """Write the checkpoint that `_resume` loads."""
    states = {name: part.state_dict() for name, part in stateful.items()}
    with replacing(path) as partial, open(partial, "wb") as file:
        try:
            torch.save({"recipe": recipe, **states, **so_far}, file)
        except RuntimeError as error:  # PyTorch's writer hides the OSError of a full disk behind this
            raise error.__context__ or error from None


def _resume(path: Path, recipe: dict[str, Any], stateful: dict[str, Any]) -> tuple[int, list[float], float]:
    """Load a checkpoint of the same recipe into `stateful`; return the next step, losses and seconds."""
    device = next(stateful["module"].parameters()).device
    if not path.is_file():  # opening a pipe would block
        raise UserError(f"{path} is no file: a checkpoint cannot be read from it, nor written to it")
    try:
        state = torch.load(path, weights_only=True, map_location=device)
    except (RuntimeError, EOFError, UnpicklingError, OSError) as error:
        raise UserError(f"{path} cannot be read as a checkpoint; delete it to start again") from error
    found = state.get("recipe") if isinstance(state, dict) else None
    if not isinstance(found, dict):
        raise UserError(f"{path} is no checkpoint of a training; give another name, or delete it")
    for key, value in recipe.items():
        if (there := found.get(key)) != value:
            raise UserError(
                f"{path} belongs to another training ({key} is {there} there and {value} here); "
                "delete it, or train in another folder"
            )
    for name, part in stateful.items():
        part.load_state_dict(state[name])
    return state["step"], state["losses"], state["seconds"]
