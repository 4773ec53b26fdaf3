"""Pruned and recovered UNets, as two studies make them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn

from sdcomp.evaluation import load_prompts
from sdcomp.pruning import prune_structured, prune_unstructured
from sdcomp.training import recover

if TYPE_CHECKING:
    from sdcomp.model import StableDiffusion
    from sdcomp.study.run import Run


def pruned(
    run: Run,
    sd: StableDiffusion,
    kind: str,
    amount: float,
    recover_steps: int = 0,
    *,
    scope: str = "layer",
    norm: str = "l2",
) -> nn.Module:
    """A pruned copy of the UNet, recovered by `recover_steps` updates where these are not 0.

    `kind`: "unstructured" zeroes single weights, the smallest of each layer or, with `scope` "global", of
    all; "masked channels" zeroes output channels, and "removed" takes units out, those with the smallest
    L1 or L2 `norm`. A recovery sees up to 128 calibration prompts, four for each image of the study; it is
    kept in the run's folder, from which a killed one goes on. Raises KeyError for another kind.
    """
    makers: dict[str, Callable[[], nn.Module]] = {
        "unstructured": lambda: prune_unstructured(sd.unet, amount, scope=scope),
        "masked channels": lambda: prune_structured(sd.unet, amount, mode="mask", n=int(norm[1])),
        "removed": lambda: prune_structured(sd.unet, amount, mode="remove", criterion=norm),
    }
    unet = makers[kind]()
    if not recover_steps:
        return unet
    return recover(
        unet,
        sd,
        load_prompts(sd, "calibration", min(4 * run.parameters["n_images"], 128)).texts,
        recover_steps,
        lr=5e-4,
        guidance_scale=run.generation(sd)["guidance_scale"],
        seed=run.parameters["seed"] + 5,
        checkpoint=run.folder / f"{kind} {amount:g} {recover_steps}.ckpt".replace(" ", "_"),
        progress=run.progress,
    ).module
