"""Every image has noise of its own, from its own seed."""

import numpy as np
import pytest
import torch

from sdcomp.model.seeds import image_generators, image_seeds, row_noise

RED = "a small red star on a navy background"
BLUE = "a large striped blue circle above a small green square"


def test_rows_draw_their_noise_from_their_own_generators():
    alone = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(3))
    noise = row_noise(image_generators([5, 3, 3]), (4, 8, 8))
    assert noise.shape == (3, 4, 8, 8)
    assert torch.equal(noise[1], alone) and torch.equal(noise[2], alone)
    assert not torch.equal(noise[0], alone)


def test_images_do_not_depend_on_the_global_random_state(small):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = small.generate(RED, steps=2, sampler="ddpm", batch_size=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(small.generate(RED, steps=2, sampler="ddpm", batch_size=1), first)


def test_equal_prompts_give_different_images_in_a_fixed_order(small):
    images = small.generate([RED, RED, RED], steps=2, batch_size=2)
    assert len({image.numpy().tobytes() for image in images}) == 3
    again = small.generate([BLUE, RED, BLUE, RED], steps=2, batch_size=2)
    assert torch.equal(again[1], images[0]) and torch.equal(again[3], images[1])


def test_another_seed_gives_another_image(small):
    first, second = (small.generate(RED, steps=2, seed=seed, batch_size=1) for seed in (0, 1))
    assert (first - second).abs().mean() > 0.01


def test_a_seed_may_be_a_number_of_numpy_or_torch():
    expected = image_seeds(3, [RED, BLUE])
    for seed in (torch.tensor(3), np.array(3), np.int64(3)):
        assert image_seeds(seed, [RED, BLUE]) == expected
    for seed in (torch.tensor([3]), np.array([3])):
        assert image_seeds(seed, [RED]) == [3]
    for seed in (torch.tensor(3.5), np.array(3.5), "3"):
        with pytest.raises(TypeError, match="seed must be a whole number"):
            image_seeds(seed, [RED])


def test_listed_seeds_seed_the_noise_of_their_rows(small):
    settings = {"steps": 2, "batch_size": 2, "guidance_scale": 1, "trace": True}
    images, trace = small.generate([RED, RED, BLUE], seed=[7, 7, 8], **settings)
    assert torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])
    for row, seed in enumerate((7, 7, 8)):
        alone = torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(trace.latents[0, row], alone)
    swapped, _ = small.generate([BLUE, RED], seed=[8, 7], **settings)
    assert torch.equal(swapped[0], images[2]) and torch.equal(swapped[1], images[0])
