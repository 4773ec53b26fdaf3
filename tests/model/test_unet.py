"""The UNet against diffusers' `UNet2DConditionModel` with the same weights."""

import dataclasses

import pytest
import torch
from diffusers_keys import diffusers_unet, unet_state

from sdcomp.model.config import SD15, TINY, UNetConfig
from sdcomp.model.unet import UNet, timestep_embedding

SD_LIKE = dataclasses.replace(SD15.unet, model_channels=16, context_dim=24, norm_groups=8)
"""SD 1.x's structure: two residual blocks, four levels, attention from the first level on."""

CONFIGS = {
    "tiny": TINY.unet,
    "sd_like": SD_LIKE,
    "deep_transformer": dataclasses.replace(
        SD_LIKE, channel_mult=(1, 2), attention_levels=(0,), transformer_depth=2
    ),
    "inpainting_channels": dataclasses.replace(
        SD_LIKE, channel_mult=(1, 3), attention_levels=(), in_channels=9
    ),
}


def inputs(
    config: UNetConfig, *, rows: int = 2, height: int = 16, width: int = 8
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(11)
    latents = torch.randn(rows, config.in_channels, height, width, generator=generator)
    timesteps = torch.tensor([999, 1, 0, 501])[:rows]
    context = torch.randn(rows, 5, config.context_dim, generator=generator)
    return latents, timesteps, context


@pytest.mark.parametrize("gain", [1.0, 0.05])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_output_agrees_with_diffusers_for_the_same_weights(diffusers, randomize, name, gain):
    config = CONFIGS[name]
    ours = randomize(UNet(config), 5, gain)
    theirs = diffusers_unet(diffusers, config)
    theirs.load_state_dict(unet_state(ours), strict=True)
    latents, timesteps, context = inputs(config)
    with torch.inference_mode():
        output = ours(latents, timesteps, context)
        expected = theirs(latents, timesteps, context).sample
    assert output.shape == (2, config.out_channels, 16, 8)
    assert (output - expected).abs().max() < 1e-5 * expected.abs().max()


def test_sd15_has_the_published_parameters(diffusers):
    with torch.device("meta"):
        ours, theirs = UNet(SD15.unet), diffusers_unet(diffusers, SD15.unet)
    state = {name: tuple(value.shape) for name, value in unet_state(ours).items()}
    assert state == {name: tuple(value.shape) for name, value in theirs.state_dict().items()}


def test_sd15_has_the_published_size_and_names():
    with torch.device("meta"):
        unet = UNet(SD15.unet)
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964
    state = unet.state_dict()
    assert len(state) == 686
    published = {
        "time_embed.2.weight": (1280, 1280),
        "input_blocks.0.0.weight": (320, 4, 3, 3),
        "input_blocks.3.0.op.weight": (320, 320, 3, 3),
        "input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
        "input_blocks.8.1.transformer_blocks.0.attn2.to_k.weight": (1280, 768),
        "middle_block.1.proj_in.weight": (1280, 1280, 1, 1),
        "middle_block.2.out_layers.3.weight": (1280, 1280, 3, 3),
        "output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        "output_blocks.5.2.conv.bias": (1280,),
        "output_blocks.8.0.in_layers.0.weight": (960,),
        "output_blocks.11.1.transformer_blocks.0.ff.net.0.proj.weight": (2560, 320),
        "output_blocks.11.1.transformer_blocks.0.attn1.to_out.0.bias": (320,),
        "out.2.weight": (4, 320, 3, 3),
    }
    assert {name: tuple(state[name].shape) for name in published} == published


def test_the_timestep_embedding_agrees_with_diffusers(diffusers):
    from diffusers.models.embeddings import get_timestep_embedding

    timesteps = torch.arange(1000)
    expected = get_timestep_embedding(timesteps, 48, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(timestep_embedding(timesteps, 48), expected, rtol=0, atol=1e-6)


def test_a_scalar_timestep_applies_to_every_row(randomize):
    unet = randomize(UNet(SD_LIKE), 5)
    latents, _, context = inputs(SD_LIKE)
    with torch.inference_mode():
        per_row = unet(latents, torch.tensor([37, 37]), context)
        assert torch.equal(unet(latents, 37, context), per_row)
        assert torch.equal(unet(latents, torch.tensor(37), context), per_row)
        assert not torch.allclose(unet(latents, 38, context), per_row, rtol=0, atol=1e-5)


def test_each_row_has_its_own_latents_timestep_and_context(randomize):
    unet = randomize(UNet(SD_LIKE), 5)
    latents, timesteps, context = inputs(SD_LIKE, rows=4, width=16)
    with torch.inference_mode():
        together = unet(latents, timesteps, context)
        for i in range(4):
            alone = unet(latents[i : i + 1], timesteps[i : i + 1], context[i : i + 1])
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@torch.inference_mode()
def test_a_row_is_the_same_wherever_it_stands_in_the_batch(randomize, memory_format):
    unet = randomize(UNet(SD_LIKE), 5).to(memory_format=memory_format)
    latents, _, context = (x[:1].expand(3, *x.shape[1:]) for x in inputs(SD_LIKE, height=32, width=32))
    output = unet(latents, 500, context)
    assert torch.equal(output[1], output[0]) and torch.equal(output[2], output[0])


@pytest.mark.usefixtures("threads")
@torch.inference_mode()
def test_bits_do_not_depend_on_the_address_of_the_weights(randomize):
    unet, moved = (randomize(UNet(CONFIGS["tiny"]), 5) for _ in range(2))
    for parameter in moved.parameters():
        # Weights mapped from a file are not aligned either.
        memory = torch.empty(parameter.numel() + 2)[2:].view_as(parameter)
        parameter.data = memory.copy_(parameter)
    assert all(p.data_ptr() % 16 for p in moved.parameters())
    latents, _, context = inputs(CONFIGS["tiny"])
    assert torch.equal(moved(latents, 501, context), unet(latents, 501, context))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_float_types_are_kept_throughout(randomize, dtype):
    unet = randomize(UNet(SD_LIKE), 5)
    latents, timesteps, context = inputs(SD_LIKE)
    with torch.inference_mode():
        expected = unet(latents, timesteps, context)
        output = unet.to(dtype)(latents.to(dtype), timesteps, context.to(dtype))
    assert output.dtype == dtype
    error = (output.float() - expected).abs().max() / expected.abs().max()
    assert error < (1e-4 if dtype == torch.float64 else 0.1)


def test_a_shared_timestep_is_embedded_once_however_it_is_given(randomize):
    unet = randomize(UNet(CONFIGS["tiny"]), 5)
    rows = []
    unet.time_embed.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    latents, _, context = inputs(CONFIGS["tiny"], rows=3)
    same = [501, torch.tensor(501), torch.tensor([501]), torch.full((3,), 501)]
    with torch.no_grad():
        outputs = [unet(latents, timestep, context) for timestep in same]
        unet(latents, torch.tensor([501, 501, 500]), context)
    assert rows == [1, 1, 1, 1, 3]
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_timesteps_that_do_not_fit_the_rows_are_refused(randomize):
    unet = randomize(UNet(CONFIGS["sd_like"]), 5)
    latents, _, context = inputs(CONFIGS["sd_like"], rows=3)
    with pytest.raises(ValueError, match="^2 timesteps for 3 rows: give one, or one for each"):
        unet(latents, torch.tensor([1, 2]), context)


def test_recomputed_stages_have_the_same_gradients_and_keep_less(randomize):
    unet = randomize(UNet(CONFIGS["tiny"]), 5)
    found = {}
    for recompute in (False, True):
        unet.recompute, kept = recompute, []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: kept.append(t.nbytes) or t, lambda t: t
        ):
            loss = unet(*inputs(CONFIGS["tiny"])).square().mean()
        unet.zero_grad()
        loss.backward()
        found[recompute] = sum(kept), [p.grad.clone() for p in unet.parameters()]
    for plain, again in zip(found[False][1], found[True][1], strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-8)
    assert found[True][0] < found[False][0] / 4
