"""Pruning of diffusers' UNets while its pipelines run them."""

import pytest
import torch
from pipelines import PIPELINES
from torch import nn

from sdcomp.pruning import channel_map, prune_n_m, prune_structured, prune_unstructured, remove_cheapest

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:diffusers")
BLOCKS = ("down_blocks.", "mid_block.", "up_blocks.")


@pytest.fixture(params=["sdxl", "controlnet"])
def made(request, diffusers, small):
    torch.manual_seed(0)
    return PIPELINES[request.param](diffusers, small)


def error(made, unet: nn.Module, expected: torch.Tensor) -> float:
    """The squared error of the latents that the pipeline makes with `unet`; the pipeline then has its own."""
    own, made.pipe.unet = made.pipe.unet, unet
    found = made.run()
    made.pipe.unet = own
    assert found.isfinite().all()
    return (found - expected).square().mean().item()


def prediction_error(made, unet: nn.Module) -> float:
    """The squared error of `unet` on the calls that the pipeline makes of its own UNet."""
    errors = []

    def compare(_: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        found, expected = unet(*args, **kwargs)[0], output[0]
        errors.append((found - expected).square().mean().item())

    handle = made.pipe.unet.register_forward_hook(compare, with_kwargs=True)
    made.run()
    handle.remove()
    return sum(errors) / len(errors)


def zeros(unet: nn.Module, kinds: tuple[type, ...] = (nn.Conv2d, nn.Linear)) -> dict[str, float]:
    """The share of zeros in each weight."""
    layers = {name: layer for name, layer in unet.named_modules() if isinstance(layer, kinds)}
    return {name: (layer.weight == 0).float().mean().item() for name, layer in layers.items()}


def test_second_order_zeros_weights_of_blocks_and_is_closer_than_magnitude(made):
    unet, expected = made.pipe.unet, made.run()
    magnitude = prune_unstructured(unet, 0.4)
    second = prune_unstructured(unet, 0.4, importance="second_order", calibration=made.run)
    for pruned in (magnitude, second):
        for name, share in zeros(pruned).items():
            assert share == pytest.approx(0.4 if name.startswith(BLOCKS) else 0, abs=0.02), name
    assert error(made, second, expected) < error(made, magnitude, expected)


def test_2_4_patterns_are_kept_and_corrected(made):
    unet = made.pipe.unet
    magnitude = prune_n_m(unet)
    second = prune_n_m(unet, importance="second_order", calibration=made.run)
    for name, layer in second.named_modules():
        # Rows of 16 inputs or more; of the kernel, each position by itself.
        if name.startswith(BLOCKS) and isinstance(layer, nn.Conv2d | nn.Linear):
            fours = layer.weight.flatten(2) if layer.weight.dim() == 4 else layer.weight[..., None]
            if fours.shape[1] % 16 == 0 and fours.shape[0] % 8 == 0:
                assert (fours.unflatten(1, (-1, 4)) != 0).sum(2).max() <= 2, name
    # Single predictions: over the steps of this random model the errors grow at random.
    assert prediction_error(made, second) < prediction_error(made, magnitude)


def test_channels_and_heads_go_where_it_costs_least(made):
    unet, expected = made.pipe.unet, made.run()
    size = sum(p.numel() for p in unet.parameters())
    chosen = remove_cheapest(unet, 0.25, made.run)
    assert sum(p.numel() for p in chosen.parameters()) < 0.76 * size
    by_norm = prune_structured(unet, 0.25, mode="remove")
    assert sum(p.numel() for p in by_norm.parameters()) > 0.76 * size
    assert channel_map(chosen)
    assert error(made, chosen, expected) < error(made, by_norm, expected)
