"""The pipeline on a GPU: the images of the CPU in each type, and the memory that stays in use."""

import pytest
import torch

import sdcomp

pytestmark = pytest.mark.cuda

PROMPTS = ["a small red star on a navy background", "a large striped blue circle above a small green square"]


@pytest.fixture(scope="module")
def reference() -> torch.Tensor:
    return sdcomp.load("data/tiny").generate(PROMPTS, steps=5)


@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.float32, 0.02), (torch.float16, 0.05), (torch.bfloat16, 0.15)]
)
def test_images_agree_with_the_cpu(reference, dtype, most):
    images = sdcomp.load("data/tiny", device="cuda", dtype=dtype).generate(PROMPTS, steps=5)
    assert images.device.type == "cpu" and images.dtype == torch.float32
    assert (images - reference).abs().mean() < most


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_an_image_is_the_same_wherever_its_prompt_stands(guidance_scale):
    sd = sdcomp.load("data/tiny", device="cuda")
    alone, others = PROMPTS[0], [PROMPTS[1], "a star", "a circle", ""]
    settings = {"steps": 3, "batch_size": 3, "guidance_scale": guidance_scale}
    wanted = sd.generate(alone, **settings)[0]
    for row in range(5):
        found = sd.generate([*others[:row], alone, *others[row:]], **settings)[row]
        # GPU libraries do not promise equal bits for equal rows of a product.
        assert (found - wanted).abs().max() < 1e-3


def test_offloading_leaves_nothing_on_the_device(reference):
    sd = sdcomp.load("data/tiny").offload("cuda")
    before = torch.cuda.memory_allocated()
    images = sd.generate(PROMPTS, steps=5)
    assert (images - reference).abs().mean() < 0.02
    assert torch.cuda.memory_allocated() - before < 2**20
    assert next(sd.unet.parameters()).device.type == "cpu"


def test_a_step_with_values_that_are_not_finite_is_an_error_that_names_it():
    sd = sdcomp.load("data/tiny", device="cuda", dtype=torch.float16)
    with torch.no_grad():
        sd.unet.out[2].weight.mul_(1e6)
    with pytest.raises(sdcomp.errors.NonFiniteError, match=r"^step \d+ of 5 \(timestep \d+\) gives values"):
        sd.generate(PROMPTS, steps=5)
