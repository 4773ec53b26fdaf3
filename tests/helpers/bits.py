"""Whether an image is the same, bit for bit, wherever its prompt stands: one process, one instruction set.

`python tests/helpers/bits.py 1 2` prints a line of JSON: the largest difference that a prompt's place makes,
for each case and for one and two threads. The environment chooses the instruction set; libraries read it
once, when they are loaded.
"""

from __future__ import annotations

import json
import sys
import warnings

import conftest
import torch

from sdcomp.integer import kernels, to_int8
from sdcomp.model import StableDiffusion
from sdcomp.pruning import prune_structured
from sdcomp.quantization import Calibrator, TimeStepCalibratedQuantModel

PROMPT = "a small red star on a navy background"
OTHERS = ("a large striped blue circle above a small green square", "a star", "")
BATCHES = (1, 2, 3, 5, 8, 16)


def place_matters(sd: StableDiffusion, batch: int, guidance_scale: float) -> float:
    """The largest difference between the images of one prompt at the batch's first, middle and last row."""

    def image(row: int) -> torch.Tensor:
        prompts = [OTHERS[i % len(OTHERS)] for i in range(batch)]
        prompts[row] = PROMPT
        seeds = [7 if i == row else 100 + i for i in range(batch)]
        settings = {"steps": 1, "guidance_scale": guidance_scale, "size": (32, 32), "batch_size": batch}
        return sd.generate(prompts, seed=seeds, **settings)[row]

    first = image(0)
    return max((image(row) - first).abs().max().item() for row in {batch // 2, batch - 1})


def main() -> None:
    """Print the differences of every kind of UNet, batch size and guidance."""
    warnings.simplefilter("ignore")
    sd = conftest.random_model(conftest.BITS)
    simulated = TimeStepCalibratedQuantModel(sd.unet, timesteps=2, k=2)
    Calibrator(sd, simulated).calibrate([PROMPT], steps=2)
    unets = {"plain": sd.unet, "simulated": simulated}
    unets["removed"] = prune_structured(sd.unet, 0.3, mode="remove")  # widths that no kernel is made for
    if kernels.missing() is None:
        unets["int8"] = to_int8(simulated)
        small = TimeStepCalibratedQuantModel(unets["removed"], timesteps=2, k=2)
        unets["removed, int8"] = to_int8(Calibrator(sd, small).calibrate([PROMPT], steps=2))
    found = {}
    for threads in map(int, sys.argv[1:]):
        torch.set_num_threads(threads)
        found |= {
            f"{name}, {threads} threads, batch {batch}, guidance {scale}": place_matters(
                sd.replace(unet=unet), batch, scale
            )
            for name, unet in unets.items()
            for batch in BATCHES
            for scale in (1.0, 3.0)
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
