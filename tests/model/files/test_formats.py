"""Load and save every format: the original single file, diffusers' folder, and ours."""

import copy
import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import sdcomp
from sdcomp.errors import UserError
from sdcomp.export import as_diffusers_unet, from_diffusers_unet
from sdcomp.model import (
    SD15,
    ModelError,
    StableDiffusion,
    UNet,
    VAEDecoder,
    VAEEncoder,
    load,
    load_from_standard_weights,
)
from sdcomp.model import pipeline as pipeline
from sdcomp.model.clip import build_clip, build_text_encoder
from sdcomp.model.offloading import weights_on
from sdcomp.model.tokenizer import save_tokenizer, tokenize
from sdcomp.pruning import prune_structured

PROMPTS = ["a small red star on a navy background"]
PARTS = ("unet", "encoder", "decoder", "text_encoder")


@pytest.fixture(scope="module")
def plain(small) -> StableDiffusion:
    """A small model without image encoder and reader, like Stable Diffusion 1.x."""
    return small.replace(config=dataclasses.replace(small.config, vision=None, reader=False))


@pytest.fixture(scope="module")
def single(plain, tmp_path_factory) -> Path:
    """A single file with its tokenizer beside it; tests must not change it."""
    file = sdcomp.save(plain, tmp_path_factory.mktemp("single") / "model.safetensors")
    save_tokenizer(plain.tokenizer, file.parent)
    return file


@pytest.fixture(scope="module")
def made(plain, tmp_path_factory) -> Path:
    """A diffusers folder; tests must not change it."""
    return sdcomp.save(plain, tmp_path_factory.mktemp("made") / "model", format="diffusers")


@pytest.fixture
def folder(made, tmp_path) -> Path:
    """A diffusers folder that a test may change."""
    return Path(shutil.copytree(made, tmp_path / "model"))


def states(sd: StableDiffusion) -> dict[str, torch.Tensor]:
    return {f"{p}.{name}": t for p in PARTS for name, t in getattr(sd, p).state_dict().items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys() and a
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def change(file: Path, **changes: object) -> None:
    values = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**values, **changes}), encoding="utf-8")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# The original layout


def test_a_single_file_loads_with_the_configuration_of_the_model_that_was_saved(small, single, plain):
    # A single file has neither image encoder nor reader.
    assert small.config.reader and small.config.vision
    again = load(single, config=small.config)
    assert again.config == plain.config and again.reader is None
    assert_same(states(again), states(plain))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_ckpt_with_everything_that_published_ones_hold(plain, single, tmp_path, legacy, wrapped):
    state = load_file(single)
    names = list(state)
    state |= {f"model_ema.{n.removeprefix('model.').replace('.', '')}": torch.zeros(2) for n in names[:9]}
    state |= {"model_ema.decay": torch.tensor(0.99), "betas": torch.zeros(1000), "logvar": torch.zeros(1000)}
    state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(24)[None]
    state["first_stage_model.loss.logvar"] = torch.zeros(())
    held = {"state_dict": state, "epoch": 3, "global_step": 7, "lr_schedulers": []} if wrapped else state
    torch.save(held, tmp_path / "model.ckpt", _use_new_zipfile_serialization=not legacy)
    loaded = load(tmp_path / "model.ckpt", config=plain.config, tokenizer=plain.tokenizer)
    assert_same(states(loaded), states(plain))
    assert not any(m.training for part in PARTS for m in getattr(loaded, part).modules())
    # Batch size and memory format change images within rounding.
    torch.testing.assert_close(
        loaded.generate(PROMPTS, steps=2), plain.generate(PROMPTS, steps=2), atol=1e-4, rtol=0
    )


def test_text_encoder_with_and_without_its_prefix(plain, single, tmp_path):
    state = {name.replace(".text_model.", "."): t for name, t in load_file(single).items()}
    assert state.keys() != load_file(single).keys()
    save_file(state, tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.safetensors", config=plain.config, tokenizer=plain.tokenizer)
    assert_same(states(loaded), states(plain))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_have_the_stored_or_the_given_type(plain, tmp_path, stored):
    file = sdcomp.save(plain, tmp_path / "model.safetensors", stored)
    options = {"config": plain.config, "tokenizer": plain.tokenizer}
    assert load(file, dtype=None, **options).unet.out[2].weight.dtype == stored
    rounded = {name: t.to(stored).float() for name, t in states(plain).items()}
    assert_same(states(load(file, **options)), rounded)
    for dtype in ("float16", torch.int8, torch.float8_e4m3fn, 16):
        with pytest.raises(TypeError, match="dtype must be a floating-point type"):
            load(file, dtype=dtype, **options)


def test_diffusers_reads_the_single_file(plain, single, made, diffusers):
    theirs = diffusers.StableDiffusionPipeline.from_single_file(
        str(single), config=str(made), local_files_only=True
    )
    expected = diffusers.StableDiffusionPipeline.from_pretrained(made)
    for part in ("unet", "vae", "text_encoder"):
        assert_same(getattr(theirs, part).state_dict(), getattr(expected, part).state_dict())


# The diffusers folder


def test_diffusers_generates_our_images_from_the_folder(plain, made, diffusers):
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(made)
    ours = load(made)
    assert dataclasses.replace(ours.config, projection_dim=128, guidance_scale=4.0) == plain.config
    assert_same(states(ours), states(plain))
    noise = torch.randn(1, 4, 16, 16, generator=seeded())
    images = theirs(
        PROMPTS,
        num_inference_steps=5,
        guidance_scale=4.0,
        latents=noise,
        height=64,
        width=64,
        output_type="pt",
    ).images
    assert theirs.safety_checker is None and images.std() > 0.01
    # The same noise through our pipeline.
    sd = ours.replace(config=dataclasses.replace(ours.config, guidance_scale=4.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "row_noise", lambda generators, shape: noise)
        ours_images = sd.generate(PROMPTS, steps=5, batch_size=1)
    torch.testing.assert_close(ours_images, images, atol=1e-3, rtol=0)


def test_original_to_diffusers_to_original_gives_the_same_bytes(plain, single, tmp_path, diffusers):
    a = load(single, config=plain.config)
    b = load(sdcomp.save(a, tmp_path / "ours", format="diffusers"))
    assert sdcomp.save(b, tmp_path / "b.safetensors").read_bytes() == single.read_bytes()
    # Also after diffusers and transformers have loaded and saved it.
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    c = load(tmp_path / "theirs")
    assert sdcomp.save(c, tmp_path / "c.safetensors").read_bytes() == single.read_bytes()
    assert c.config == b.config
    assert torch.equal(tokenize(c.tokenizer, PROMPTS), tokenize(plain.tokenizer, PROMPTS))


def test_older_folders_with_other_names_load(plain, folder):
    vae = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, name in old.items():
        vae = {k.replace(f".0.{new}.", f".0.{name}."): t for k, t in vae.items()}
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in vae
    text = load_file(folder / "text_encoder" / "model.safetensors")
    text = {k.removeprefix("text_model."): t for k, t in text.items()}
    text["embeddings.position_ids"] = torch.arange(24)[None]
    save_file(vae, folder / "vae" / "diffusion_pytorch_model.safetensors")
    save_file(text, folder / "text_encoder" / "model.safetensors")
    config = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
    del config["mid_block_add_attention"], config["use_quant_conv"]
    (folder / "vae" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert_same(states(load(folder)), states(plain))


def test_safetensors_come_before_bin_and_the_variant_is_respected(plain, folder):
    for part, stem, old in (
        ("unet", "diffusion_pytorch_model", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model", "diffusion_pytorch_model"),
        ("text_encoder", "model", "pytorch_model"),
    ):
        state = load_file(folder / part / f"{stem}.safetensors")
        torch.save(state, folder / part / f"{old}.bin")
        save_file({k: t.half() for k, t in state.items()}, folder / part / f"{stem}.fp16.safetensors")
    half = {name: t.half() for name, t in states(plain).items()}
    assert_same(states(load(folder, variant="fp16", dtype=None)), half)
    assert_same(states(load(folder, dtype=None)), states(plain))
    for file in folder.glob("*/*model.safetensors"):
        file.unlink()
    # First the other safetensors, then the other files.
    assert_same(states(load(folder, dtype=None)), half)
    for file in folder.glob("*/*.safetensors"):
        file.unlink()
    assert_same(states(load(folder)), states(plain))
    for file in folder.glob("unet/*.bin"):
        file.unlink()
    with pytest.raises(ModelError, match=r"unet/diffusion_pytorch_model\.safetensors is missing"):
        load(folder)
    with pytest.raises(ModelError, match=r"unet/diffusion_pytorch_model\.ema\.safetensors is missing"):
        load(folder, variant="ema")


def test_a_part_without_the_variant_has_its_plain_weights(plain, folder):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({k: t + 1 for k, t in load_file(file).items()}, file.with_suffix(".ema.safetensors"))
    other = states(load(folder, variant="ema"))
    moved = {k: t + 1 if k.startswith("unet.") else t for k, t in states(plain).items()}
    assert_same(other, moved)
    with pytest.raises(ModelError, match="no weights of the variant 'none'; leave variant out"):
        load(folder, variant="none")


@pytest.mark.parametrize("index", ["safetensors.index.json", "safetensors.index.fp16.json"])
def test_shards_are_refused_by_name(folder, index):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_name("diffusion_pytorch_model-00001-of-00001.safetensors"))
    file.with_suffix(f".{index}").write_text("{}", encoding="utf-8")
    with pytest.raises(ModelError, match=r"unet is in shards: save it with one file"):
        load(folder)


@pytest.mark.parametrize(
    "left",
    ["unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.safetensors.index.json"],
)
def test_a_save_over_a_folder_leaves_no_other_weights_of_the_old_model(plain, folder, left):
    (folder / left).write_text("{}", encoding="utf-8")
    (folder / "unet" / "notes.txt").write_text("mine", encoding="utf-8")
    sdcomp.save(plain, folder, format="diffusers")
    assert not (folder / left).exists() and (folder / "unet" / "notes.txt").exists()
    assert_same(states(load(folder)), states(plain))


def test_a_spacing_that_the_samplers_do_not_have_is_warned_of(folder):
    change(folder / "scheduler" / "scheduler_config.json", timestep_spacing="linspace")
    with pytest.warns(UserWarning, match="timestep_spacing is 'linspace'"):
        assert load(folder).config.schedule.timestep_spacing == "leading"


def test_values_that_a_narrower_type_cannot_hold_are_not_saved(plain, tmp_path):
    large = copy.deepcopy(plain.unet)
    with torch.no_grad():
        large.out[2].weight[0, 0, 0, 0] = 1e5
    sdcomp.save(plain, tmp_path / "model")
    with pytest.raises(UserError, match=r"out\.2\.weight has values that torch.float16 cannot hold"):
        sdcomp.save(plain.replace(unet=large), tmp_path / "model", dtype=torch.float16)
    assert_same(states(load(tmp_path / "model")), states(plain))


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        (
            "model_index.json",
            {"text_encoder_2": ["transformers", "CLIPTextModel"]},
            "StableDiffusionPipeline",
        ),
        ("unet/config.json", {"cross_attention_dim": 1024}, "Stable Diffusion 2.x"),
        ("unet/config.json", {"attention_head_dim": [5, 10]}, "Stable Diffusion 2.x"),
        ("unet/config.json", {"use_linear_projection": True}, "use_linear_projection is True"),
        ("unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type is 'timestep'"),
        ("unet/config.json", {"act_fn": "gelu"}, "act_fn is 'gelu', not 'silu'"),
        ("unet/config.json", {"block_out_channels": [16, 40]}, "block_out_channels is [16, 40]"),
        ("unet/config.json", {"block_out_channels": 3}, "unet/config.json"),
        ("unet/config.json", {"in_channels": 9}, "unet: in_channels, out_channels are (9, 4)"),
        ("vae/config.json", {"shift_factor": 0.1}, "shift_factor is 0.1"),
        ("vae/config.json", {"latent_channels": 16}, "vae has z_channels of 16"),
        ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}, "prediction_type"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "linear"}, "beta_schedule is 'linear'"),
        ("text_encoder/config.json", {"layer_norm_eps": 1e-3}, "layer_norm_eps"),
        ("text_encoder/config.json", {"hidden_size": 16}, "text has a hidden_size of 16"),
    ],
)
def test_folders_of_other_models_are_refused(folder, file, changes, words):
    change(folder / file, **changes)
    with pytest.raises(ModelError, match=re.escape(words)) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["unet/config.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json", "vae/config.json"]
)
def test_a_missing_or_broken_file_of_a_folder_is_named(folder, name):
    (folder / name).write_text("[]", encoding="utf-8")
    with pytest.raises(ModelError, match=name.split("/")[-1]):
        load(folder)
    (folder / name).unlink()
    with pytest.raises(ModelError, match=f"{name} is missing"):
        load(folder)


# Parts


@pytest.mark.parametrize("kind", ["single", "made", "base"])
def test_standard_weights_load_strictly(plain, single, made, kind, tmp_path, small, randomize):
    path = {"single": single, "made": made}.get(kind)
    if kind == "base":
        clip = randomize(build_clip(small.config), 5)
        config = dataclasses.replace(small.config, reader=False)
        path = sdcomp.save(small.replace(config=config, clip=clip, text_encoder=clip.text_model), tmp_path)
    parts = load_from_standard_weights(path, config=plain.config)
    assert list(parts) == ["clip", "encoder", "decoder", "diffusion"]
    modules = {
        "clip": build_text_encoder(plain.config),
        "encoder": VAEEncoder(plain.config.vae),
        "decoder": VAEDecoder(plain.config.vae),
        "diffusion": UNet(plain.config.unet),
    }
    for name, module in modules.items():
        module.load_state_dict(parts[name], strict=True)
    assert torch.equal(modules["diffusion"].out[2].weight, plain.unet.out[2].weight)
    with pytest.raises(ModelError, match="does not exist"):
        load_from_standard_weights("data/no_such")


# Saving


def test_a_model_can_be_saved_over_the_file_it_is_mapped_from(single, plain, tmp_path):
    file = Path(shutil.copy(single, tmp_path))
    options = {"config": plain.config, "tokenizer": plain.tokenizer}
    sd = load(file, **options)
    sdcomp.save(sd, file, torch.float16)
    assert_same(states(sd), states(plain))
    sdcomp.save(sd, file)
    assert file.read_bytes() == single.read_bytes()
    # Weights that are changed in place change no file.
    with torch.no_grad():
        load(file, **options).unet.time_embed[0].weight.zero_()
    assert file.read_bytes() == single.read_bytes()


def test_a_model_that_a_format_cannot_hold_is_refused_before_anything_is_written(plain, tmp_path):
    removed = plain.replace(unet=prune_structured(plain.unet, 0.5, mode="remove"))
    for name, format in (("a.safetensors", None), ("d", "diffusers")):
        with pytest.raises(ModelError, match="lost channels"):
            sdcomp.save(removed, tmp_path / name, format=format)
    other = plain.replace(unet=nn.Sequential(plain.unet))
    for name, format in (("a.safetensors", None), ("d", "diffusers"), ("e", None)):
        with pytest.raises(ModelError, match="the model's unet does not fit its configuration"):
            sdcomp.save(other, tmp_path / name, format=format)
    for name, format in (
        ("a.ckpt", None),
        ("b.bin", None),
        ("c.safetensors", "diffusers"),
        ("d", "original"),
    ):
        with pytest.raises(ModelError, match=r"give a name ending in \.safetensors"):
            sdcomp.save(plain, tmp_path / name, format=format)
    with pytest.raises(ValueError, match="format must be"):
        sdcomp.save(plain, tmp_path / "x", format="pickle")
    assert not list(tmp_path.iterdir())


def test_a_unet_that_lost_channels_comes_back_from_our_folder(plain, tmp_path):
    unet = prune_structured(plain.unet, 0.5, mode="remove")
    sd = plain.replace(unet=unet)
    loaded = load(sdcomp.save(sd, tmp_path / "a"))
    assert_same(states(loaded), states(sd))
    assert sum(p.numel() for p in loaded.unet.parameters()) < sum(p.numel() for p in plain.unet.parameters())
    x, context = torch.randn(1, 4, 16, 16), torch.randn(1, 24, 32)
    torch.testing.assert_close(loaded.unet(x, 5, context), unet(x, 5, context), atol=1e-5, rtol=1e-4)
    # A whole model saved over it leaves no channel map behind.
    sdcomp.save(plain, tmp_path / "a")
    assert_same(states(load(tmp_path / "a")), states(plain))
    sdcomp.save(sd, tmp_path / "a")
    (tmp_path / "a" / "unet_channels.json").write_text('{"middle_block": [0]}', encoding="utf-8")
    with pytest.raises(ModelError, match="middle_block"):
        load(tmp_path / "a")


def test_a_model_that_lost_its_image_encoder_is_saved_without_it(small, randomize, tmp_path):
    clip = randomize(build_clip(small.config), 5)
    config = dataclasses.replace(small.config, reader=False)
    whole = small.replace(config=config, clip=clip, text_encoder=clip.text_model)
    loaded = load(sdcomp.save(whole.replace(clip=None), tmp_path))
    assert loaded.clip is None and loaded.config.vision is None
    assert_same(states(loaded), states(whole))


def test_an_empty_configuration_is_refused_before_anything_is_allocated(plain, tmp_path):
    folder = sdcomp.save(plain, tmp_path / "model")
    (folder / "config.json").write_text("{}", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            nn.init, "kaiming_uniform_", lambda tensor, **_: tensor.is_meta or pytest.fail("allocated")
        )
        with pytest.raises(ModelError, match="the text encoder knows 49408"):
            load(folder)


# Tokenizers


def test_the_tokenizer_of_a_single_file(plain, single, tmp_path):
    file = Path(shutil.copy(single, tmp_path / "model.safetensors"))
    # Without one beside the file it is CLIP's own, which does not fit this small text encoder.
    with pytest.raises(ModelError, match="49408 tokens, but the text encoder knows 627"):
        load(file, config=plain.config)
    expected = tokenize(plain.tokenizer, PROMPTS)
    assert torch.equal(tokenize(load(single, config=plain.config).tokenizer, PROMPTS), expected)
    save_tokenizer(plain.tokenizer, tmp_path / "tokenizer")
    assert torch.equal(tokenize(load(file, config=plain.config).tokenizer, PROMPTS), expected)
    assert load(file, config=plain.config, tokenizer=plain.tokenizer).tokenizer is plain.tokenizer
    given = load(file, config=plain.config, tokenizer=tmp_path / "tokenizer").tokenizer
    assert torch.equal(tokenize(given, PROMPTS), expected)
    (tmp_path / "tokenizer" / "merges.txt").unlink()
    with pytest.raises(ModelError, match="merges.txt is missing"):
        load(file, config=plain.config, tokenizer=tmp_path / "tokenizer")
    clip = load(single, config=plain.config).tokenizer
    clip.add_tokens(["<new>"])
    with pytest.raises(ModelError, match="628 tokens"):
        load(file, config=plain.config, tokenizer=clip)


# The hub


def test_a_name_is_fetched_from_the_hub_unless_it_is_a_path(made, monkeypatch):
    asked = []

    def fetch(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(made)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert load("someone/a-model.v1").config.unet.model_channels == 16
    assert "unet/diffusion_pytorch_model.safetensors" in asked.pop()[1]
    with pytest.raises(ModelError, match="fp16"):
        load("someone/a-model.v1", variant="fp16")
    (name, patterns) = asked.pop()
    assert name == "someone/a-model.v1" and "unet/diffusion_pytorch_model.fp16.safetensors" in patterns
    assert not any("safety" in p or p.endswith(("*", ".bin", ".ckpt")) for p in patterns)
    for path in ("data/no_such", "nowhere", "weights/x.safetensors", "a/b/c", "../a", "/a/b"):
        with pytest.raises(ModelError, match=f"model {path!r} does not exist"):
            load(path)
    assert not asked


def test_offline_a_hub_name_is_an_error_of_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="cannot be fetched from the hub") as caught:
        load("stable-diffusion-v1-5/stable-diffusion-v1-5")
    assert "\n" not in str(caught.value)


# UNets in diffusers' pipelines, and diffusers' UNets here


def test_our_unet_in_diffusers_pipeline(plain, made, diffusers):
    options = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "pt"}
    for kind, extra in (
        ("StableDiffusionPipeline", {}),
        (
            "StableDiffusionImg2ImgPipeline",
            {"image": torch.rand(1, 3, 64, 64, generator=seeded()), "strength": 0.7},
        ),
    ):
        theirs = getattr(diffusers, kind).from_pretrained(made)
        expected = theirs(PROMPTS, generator=seeded(), **options, **extra).images
        theirs.unet = as_diffusers_unet(plain.unet, plain.config)
        images = theirs(PROMPTS, generator=seeded(), **options, **extra).images
        assert images.shape == (1, 3, 64, 64) and theirs.to("cpu").device.type == "cpu"
        torch.testing.assert_close(images, expected, atol=1e-4, rtol=0)


def test_the_bridge_accepts_the_inputs_of_sd_and_refuses_others(plain):
    unet = as_diffusers_unet(plain.unet, plain.config)
    x, context = torch.randn(2, 4, 16, 16), torch.randn(2, 24, 32)
    expected = plain.unet(x, 7, context)
    assert torch.equal(unet(x, torch.tensor(7), encoder_hidden_states=context).sample, expected)
    assert torch.equal(unet(x, 7, context, return_dict=False, cross_attention_kwargs=None)[0], expected)
    assert unet.dtype == torch.float32 and unet.config.in_channels == 4 and unet.config.sample_size == 16
    assert as_diffusers_unet(plain.unet).config.sample_size == 64
    with pytest.raises(ValueError, match="takes no class_labels"):
        unet(x, 7, context, class_labels=torch.zeros(2))


def test_a_unet_of_diffusers_becomes_ours(made, diffusers):
    theirs = diffusers.UNet2DConditionModel.from_pretrained(made / "unet").eval()
    ours = from_diffusers_unet(theirs)
    x, context = torch.randn(2, 4, 16, 16), torch.randn(2, 24, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(x, 7, context), theirs(x, 7, context).sample, atol=1e-5, rtol=0)
    assert ours.out[2].weight.data_ptr() == theirs.conv_out.weight.data_ptr() and not ours.training
    theirs.register_to_config(use_linear_projection=True)
    with pytest.raises(ModelError, match="use_linear_projection"):
        from_diffusers_unet(theirs)


# Memory


def test_a_module_gets_its_own_weights_back(plain):
    before = dict(plain.unet.named_parameters())
    with (
        pytest.raises(KeyError),
        torch.inference_mode(),
        weights_on(plain.unet, torch.device("meta")) as unet,
    ):
        assert all(p.is_meta for p in unet.parameters())
        assert unet(torch.zeros(1, 4, 8, 8, device="meta"), 5, torch.zeros(1, 24, 32, device="meta")).is_meta
        raise KeyError
    after = dict(plain.unet.named_parameters())
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)


def test_an_offloaded_model_copies_one_part_at_a_time(plain, monkeypatch):
    expected = plain.generate(PROMPTS, steps=2, batch_size=1)
    names = {id(getattr(plain, part)): part for part in PARTS}
    used = []

    def spy(module, device):
        used.append((names[id(module)], str(device)))
        return weights_on(module, device)

    monkeypatch.setattr(pipeline, "weights_on", spy)
    sd = plain.replace().offload("cpu")
    assert torch.equal(sd.generate(PROMPTS, steps=2, batch_size=1), expected)
    image = torch.rand(1, 3, 64, 64, generator=seeded())
    sd.generate(PROMPTS, steps=2, batch_size=1, image=image)
    once = [name for i, (name, _) in enumerate(used) if i == 0 or used[i - 1][0] != name]
    assert once == ["text_encoder", "unet", "decoder", "text_encoder", "encoder", "unet", "decoder"]
    assert {device for _, device in used} == {"cpu"}
    # `replace` keeps offloading, and `to` ends it.
    assert sd.replace(unet=plain.unet).offloaded_to == torch.device("cpu")
    assert sd.to("cpu").offloaded_to is None and plain.offloaded_to is None


def test_large_images_are_computed_one_at_a_time(plain, monkeypatch):
    seen = []
    plain.decoder.register_forward_pre_hook(hook := lambda m, args: seen.append(len(args[0])) or None)
    handle = plain.unet.register_forward_pre_hook(hook)
    try:
        plain.generate(PROMPTS, steps=1, guidance_scale=1)
        assert seen == [16, 16]
        seen.clear()
        # As for images of which two fit into the memory of one 512x512 image.
        monkeypatch.setattr(pipeline, "rows_at_once", lambda n, pixels: 2)
        plain.decode_latents(torch.zeros(6, 4, 16, 16))
        assert seen == [2, 2, 2]
    finally:
        handle.remove()
        plain.decoder._forward_pre_hooks.clear()


def test_the_first_use_converts_convolutions_and_keeps_them_trainable(single, plain):
    sd = load(single, config=plain.config)
    weight = sd.decoder.decoder.conv_in.weight
    mapped = sd.unet.input_blocks[1][0].in_layers[2].weight.data_ptr()
    assert weight.is_contiguous()
    sd.generate(PROMPTS, steps=1, batch_size=1)
    convolutions = [m.weight for m in sd.decoder.modules() if isinstance(m, nn.Conv2d)]
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in convolutions)
    assert sd.decoder.decoder.conv_in.weight is weight and not weight.is_contiguous()
    assert sd.unet.input_blocks[1][0].in_layers[2].weight.data_ptr() == mapped  # a CPU needs no other format
    for part, arguments in ((sd.unet, (5, torch.randn(1, 24, 32))), (sd.decoder, ())):
        part(torch.randn(1, 4, 16, 16), *arguments).sum().backward()
        assert all(p.grad is not None for p in part.parameters())


def test_parameters_at_the_size_of_stable_diffusion():
    with torch.device("meta"):
        unet, vae = UNet(SD15.unet), nn.ModuleList([VAEEncoder(SD15.vae), VAEDecoder(SD15.vae)])
        text = build_text_encoder(SD15)
    counts = [sum(p.numel() for p in module.parameters()) for module in (unet, vae, text)]
    assert counts == [859_520_964, 83_653_863, 123_060_480]
