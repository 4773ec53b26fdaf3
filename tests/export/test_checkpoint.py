"""Plain checkpoints of quantized and pruned UNets, read by diffusers."""

import dataclasses

import pytest
import torch
from quantized_models import small_call

import sdcomp
from sdcomp.export.checkpoint import rounded_unet
from sdcomp.pruning import count_zeros, prune_structured, prune_unstructured
from sdcomp.quantization import QuantModel, build


def weights_only(unet, kind: str) -> QuantModel:
    if kind == "groups":
        return build("weights_gptq_groups", unet, weight_bits=4)  # the method itself is not applied
    if kind == "pruned":
        unet = prune_unstructured(unet, 0.5)
    if kind == "split":
        return QuantModel(unet, act_quant_params=None, split_shortcuts=True)
    return QuantModel(unet, weight_quant_params={"n_bits": 3}, act_quant_params=None)


@pytest.fixture(scope="module")
def folder(small, tmp_path_factory):
    """diffusers' configuration of the small model, which a single file does not hold."""
    return sdcomp.export(small, tmp_path_factory.mktemp("plain") / "model", format="checkpoint")


@pytest.mark.parametrize("kind", ["bits", "groups", "pruned", "split"])
def test_diffusers_computes_with_the_rounded_weights(small, folder, kind, tmp_path, diffusers):
    q = weights_only(small.unet, kind)
    latents, timestep, context = small_call(small)
    with torch.no_grad():
        expected, plain = q(latents, timestep, context), small.unet(latents, timestep, context)
    sd = small.replace(unet=q)
    single = sdcomp.export(sd, tmp_path / "model.safetensors", format="checkpoint")
    made = sdcomp.export(sd, tmp_path / "folder", format="checkpoint")
    load = diffusers.StableDiffusionPipeline
    for pipe in (
        load.from_single_file(str(single), config=str(folder), local_files_only=True),
        load.from_pretrained(made),
    ):
        with torch.no_grad():
            found = pipe.unet(latents, timestep, context).sample
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        assert (expected - plain).abs().max() > 1e-2


def test_zeros_and_bits_stay_in_the_file(small, tmp_path):
    q = weights_only(small.unet, "pruned")
    sd = small.replace(unet=q)
    file = sdcomp.export(sd, tmp_path / "model.safetensors", format="checkpoint", dtype=torch.float16)
    config = dataclasses.replace(small.config, vision=None, reader=False)
    unet = sdcomp.load(file, config=config, tokenizer=small.tokenizer).unet
    assert count_zeros(unet).zero_fraction > 0.4
    assert len(unet.middle_block[0].in_layers[2].weight[0].unique()) <= 7  # 3 bits, one scale a channel


def test_packed_models_give_the_same_checkpoint(small):
    q = weights_only(small.unet, "groups")
    ours, packed = rounded_unet(q).state_dict(), rounded_unet(sdcomp.to_packed(q)).state_dict()
    assert ours.keys() == packed.keys() == small.unet.state_dict().keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(packed[name], tensor, atol=0, rtol=0)


def test_switched_off_weights_are_not_rounded(small):
    state = rounded_unet(QuantModel(small.unet).set_use_quant(weights=False)).state_dict()
    assert all(torch.equal(t, state[name]) for name, t in small.unet.state_dict().items())


def test_the_model_stays_as_it_is(small, tmp_path):
    q = weights_only(small.unet, "bits")
    before = sdcomp.model.weights_digest(q)
    sdcomp.export(small.replace(unet=q), tmp_path / "a.safetensors", format="checkpoint")
    assert sdcomp.model.weights_digest(q) == before
    assert all(layer._fake_weight is None for layer in q.quantized_layers())


def test_what_a_checkpoint_cannot_hold_is_refused(small, tmp_path):
    removed = small.replace(unet=prune_structured(small.unet, 0.3, mode="remove"))
    with pytest.raises(sdcomp.ModelError, match="format='diffusers'"):
        sdcomp.export(removed, tmp_path / "a.safetensors", format="checkpoint")
    with pytest.raises(sdcomp.ModelError, match="not a Linear"):
        sdcomp.export(small.replace(unet=torch.nn.Linear(1, 1)), tmp_path / "a", format="checkpoint")
    with pytest.raises(ValueError, match="format must be one of checkpoint"):
        sdcomp.export(small, tmp_path / "a", format="tflite")
