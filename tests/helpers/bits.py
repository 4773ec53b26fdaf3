"""Measure whether an image depends on the place of its prompt in the batch, under one instruction set.

`python tests/helpers/bits.py 1 2` runs with one and with two threads, and prints a line of JSON: the largest
difference between images of the same prompt and seed at different places, for each case. The environment
chooses the instruction set; libraries read it once, when they are loaded.
"""

from __future__ import annotations

import json
import sys
import warnings

import conftest
import torch
from quantized_models import timestep_model

from sdcomp.integer import int8_kernels, to_int8
from sdcomp.model import StableDiffusion
from sdcomp.pruning import prune_structured
from sdcomp.quantization import Calibrator

PROMPT = "a small red star on a navy background"
OTHERS = ("a large striped blue circle above a small green square", "a star", "")
BATCHES = (1, 2, 3, 5, 8, 16)


def place_matters(sd: StableDiffusion, batch: int, guidance_scale: float, **settings: object) -> float:
    """The largest difference between images of one prompt in the first, middle and last row of a batch.

    The last row of a batch that is not full is repeated, so one prompt more fills a second batch with
    equal rows; the first of these is compared too.
    """
    places = {0, batch // 2, batch - 1, batch}
    prompts = [PROMPT if i in places else OTHERS[i % len(OTHERS)] for i in range(batch + 1)]
    seeds = [7 if i in places else 100 + i for i in range(batch + 1)]
    images = sd.generate(
        prompts, seed=seeds, steps=1, guidance_scale=guidance_scale, batch_size=batch, **settings
    )
    return max((images[i] - images[0]).abs().max().item() for i in places)


def main() -> None:
    """Print the differences for every kind of UNet, batch size and guidance."""
    warnings.simplefilter("ignore")
    sd = conftest.random_model(conftest.BITS)
    simulated = timestep_model(sd.unet, timesteps=2, k=2)
    Calibrator(sd, simulated).calibrate([PROMPT], steps=2)
    unets = {"plain": sd.unet, "simulated": simulated}
    unets["removed"] = prune_structured(sd.unet, 0.3, mode="remove")  # unusual widths take other kernels
    if int8_kernels.missing(int8_kernels.NARROW) is None:
        unets["int8"] = to_int8(simulated)
        small = timestep_model(unets["removed"], timesteps=2, k=2)
        unets["removed, int8"] = to_int8(Calibrator(sd, small).calibrate([PROMPT], steps=2))
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    cases = [(name, unet, {"size": (32, 32)}) for name, unet in unets.items()]
    cases.append(("image to image", sd.unet, {"image": image, "strength": 1.0}))  # runs the encoder too
    found = {}
    for threads in map(int, sys.argv[1:]):
        torch.set_num_threads(threads)
        found |= {
            f"{name}, {threads} threads, batch {batch}, guidance {scale}": place_matters(
                sd.replace(unet=unet), batch, scale, **settings
            )
            for name, unet, settings in cases
            for batch in BATCHES
            for scale in (1.0, 3.0)
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
