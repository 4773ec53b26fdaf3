"""UNets that lost channels and blocks, in diffusers' pipelines."""

import copy
import json

import pytest
import torch
from quantized_models import small_call

import sdcomp
from sdcomp.export import load_diffusers
from sdcomp.model.channel_map import apply_channel_map
from sdcomp.model.prune_groups import prune_groups
from sdcomp.pruning import prune_structured
from sdcomp.quantization import QuantModel


def smaller(unet, kind: str):
    if kind == "channels":
        return prune_structured(unet, 0.3, mode="remove")
    groups = prune_groups(unet)
    if kind == "all blocks":
        # Outer groups alone: what is inside them goes with them.
        outer = [g.name for g in groups if g.kind in ("residual", "transformer")]
    else:
        outer = [g.name for g in groups if g.kind in ("attention", "feed-forward")][::2]
    return apply_channel_map(copy.deepcopy(unet), {name: [] for name in outer})


@pytest.mark.parametrize("kind", ["channels", "all blocks", "branches"])
def test_a_pipeline_of_diffusers_runs_the_smaller_unet(small, kind, tmp_path, diffusers):
    unet = smaller(small.unet, kind)
    folder = sdcomp.export(small.replace(unet=unet), tmp_path / "model", format="diffusers")
    pipe = load_diffusers(folder)
    assert type(pipe.unet) is diffusers.UNet2DConditionModel
    assert sum(p.numel() for p in pipe.unet.parameters()) == sum(p.numel() for p in unet.parameters())
    latents, timestep, context = small_call(small)
    with torch.no_grad():
        expected = unet(latents, timestep, context)
        found = pipe.unet(latents, timestep, context).sample
        assert (expected - small.unet(latents, timestep, context)).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    settings = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "pt"}
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    images = pipe("a red star", generator=generators[0], **settings).images
    pipe.unet = sdcomp.as_diffusers_unet(unet, small.config)
    torch.testing.assert_close(
        images, pipe("a red star", generator=generators[1], **settings).images, atol=1e-3, rtol=0
    )


def test_rounded_weights_and_another_type(small, tmp_path, diffusers):
    unet = QuantModel(smaller(small.unet, "channels"), act_quant_params=None)
    folder = sdcomp.export(small.replace(unet=unet), tmp_path / "model", format="diffusers")
    call = small_call(small)
    with torch.no_grad():
        torch.testing.assert_close(load_diffusers(folder).unet(*call).sample, unet(*call), atol=1e-4, rtol=0)
    assert load_diffusers(folder, torch.bfloat16).unet.dtype == torch.bfloat16


def test_a_whole_unet_replaces_a_smaller_one(small, tmp_path, diffusers):
    folder = tmp_path / "model"
    for unet in (smaller(small.unet, "channels"), small.unet):
        sdcomp.export(small.replace(unet=unet), folder, format="diffusers")
    call = small_call(small)
    with torch.no_grad():
        found = diffusers.StableDiffusionPipeline.from_pretrained(folder).unet(*call).sample
        torch.testing.assert_close(found, small.unet(*call), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "damage, message",
    [
        ({"down_blocks.0.resnets.9": [0]}, "has no group"),
        ({"mid_block.attentions.7": []}, "does not fit the UNet"),
        ({"mid_block.resnets.0": [99]}, "must be a list of numbers"),
        ([], "no table"),
        (None, "size mismatch"),
    ],
)
def test_a_damaged_channel_map_is_refused(small, damage, message, tmp_path, diffusers):
    unet = smaller(small.unet, "channels")
    folder = sdcomp.export(small.replace(unet=unet), tmp_path / "model", format="diffusers")
    file = folder / "unet" / "unet_channels.json"
    file.unlink() if damage is None else file.write_text(json.dumps(damage))
    with pytest.raises(sdcomp.ModelError, match=message):
        load_diffusers(folder)
