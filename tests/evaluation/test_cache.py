"""Images are generated once; their key covers all that may change an image, but no code that only judges."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from sdcomp import files
from sdcomp.errors import NonFiniteError, UserError
from sdcomp.evaluation import cache, cached_images, fix_precision, float_precision
from sdcomp.integer import to_int8, to_packed
from sdcomp.model.unet import UNet
from sdcomp.quantization import QuantModel

PROMPTS = ["a small red star"]
QUICK = {"steps": 1, "batch_size": 1}


@pytest.fixture
def key(small):
    return lambda: cache._key(small, PROMPTS, QUICK)


def test_another_number_of_threads_has_another_key(key):
    before = torch.get_num_threads()
    first = key()
    torch.set_num_threads(before + 1)
    try:
        assert key() != first
    finally:
        torch.set_num_threads(before)
    assert key() == first


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setattr(torch.backends.cudnn, "allow_tf32", True),
        lambda patch: patch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2"),
        lambda patch: patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another"),
        lambda patch: patch.setattr(float_precision, "device_name", lambda device: "another"),
        lambda patch: patch.setattr(torch, "__version__", "another"),
    ],
)
def test_another_machine_has_another_key(key, monkeypatch, change):
    fix_precision()
    first = key()
    with monkeypatch.context() as patch:
        change(patch)
        assert key() != first
    assert key() == first


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A made-up package in place of this one, and the function that hashes its source."""
    for name in ("__init__", "model/unet", "evaluation/metrics", "study/run"):
        file = tmp_path / f"{name}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"# {name}")
    monkeypatch.setattr(files, "__file__", str(tmp_path / "files.py"))
    return files.source_digest.__wrapped__


def test_code_that_makes_images_is_in_the_key_in_any_folder(source, tmp_path):
    found = [source()]

    def write(name, text):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        found.append(source())

    write("model/unet.py", "# changed")
    write("quantization/methods/rounding.py", "# a room, and a room in it")
    write("top.py", "")
    (tmp_path / "top.py").rename(tmp_path / "model" / "top.py")
    found.append(source())
    assert len(set(found)) == len(found)


def test_code_that_only_judges_is_not_in_the_key(source, tmp_path):
    first = source()
    (tmp_path / "evaluation" / "metrics.py").write_text("# changed")
    (tmp_path / "study" / "plots.py").write_text("# new")
    (tmp_path / "model" / "notes.txt").write_text("no code")
    assert source() == first


def test_a_variant_that_fails_leaves_no_file(small, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise NonFiniteError("step 1 of 1 gives values that are not finite")

    with monkeypatch.context() as patch:
        patch.setattr(type(small), "generate", broken)
        with pytest.raises(NonFiniteError, match="step 1"):
            cached_images(small, PROMPTS, folder=tmp_path, **QUICK)
    assert not list(tmp_path.iterdir())
    images = cached_images(small, PROMPTS, folder=tmp_path, **QUICK)
    assert torch.equal(images, small.generate(PROMPTS, **QUICK))


FEW = ["a small red star on navy", "a large ring on teal"]
PAIR = {"steps": 1, "batch_size": 2}


def test_images_are_generated_once(small, tmp_path, monkeypatch):
    folder = tmp_path / "images"
    images = cached_images(small, FEW, folder=folder, **PAIR)
    assert torch.equal(images, small.generate(FEW, **PAIR))
    (file,) = folder.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(type(small), "generate", None)
        again = cached_images(small, FEW, folder=folder, progress=True, **PAIR)
    assert torch.equal(again, images) and again.dtype == images.dtype
    # A damaged file is made again.
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    assert torch.equal(cached_images(small, FEW, folder=folder, **PAIR), images)
    assert file.read_bytes() == whole and list(folder.iterdir()) == [file]


def test_every_change_that_matters_makes_new_images(small, tmp_path):
    unet = copy.deepcopy(small.unet)
    with torch.no_grad():
        unet.out[2].bias[0] += 1e-6
    guided = dataclasses.replace(small.config, guidance_scale=3.25)
    picture = torch.full((1, 3, 64, 64), 0.5)
    dotted = picture.clone()
    dotted[0, 1, 30, 30] += 1e-4
    variants = [
        (small, FEW, {}),
        (small, FEW[::-1], {}),
        (small, FEW, {"seed": 1}),
        (small, FEW, {"sampler": "ddpm"}),
        (small.replace(unet=unet), FEW, {}),
        (small.replace(config=guided), FEW, {}),
        (small, FEW, {"image": picture, "strength": 1.0}),
        # The printed text of both tensors is the same.
        (small, FEW, {"image": dotted, "strength": 1.0}),
    ]
    for count, (sd, prompts, settings) in enumerate(variants, start=1):
        images = cached_images(sd, prompts, folder=tmp_path, **PAIR, **settings)
        assert torch.equal(images, sd.generate(prompts, **PAIR, **settings))
        assert len(list(tmp_path.iterdir())) == count


TOKENS = {"n_bits": 4, "granularity": "token"}


def models(unet):
    """Pairs of models with the same tensors and other results."""
    first, second = (QuantModel(unet, act_quant_params={**TOKENS, "symmetric": s}) for s in (True, False))
    yield first, second
    yield to_packed(first), to_packed(second)
    yield first, QuantModel(unet, act_quant_params={**TOKENS, "scale_method": "mse"})
    eight = QuantModel(unet)
    for layer in eight.quantized_layers():
        layer.set_act_scales(torch.ones(1), torch.zeros(1))
    eight.is_calibrated.fill_(True)
    four = QuantModel(unet, act_quant_params={"n_bits": 4})
    four.load_state_dict(eight.state_dict())
    yield eight, four
    yield to_int8(eight), to_int8(four)
    heads = UNet(dataclasses.replace(unet.config, num_heads=1))
    heads.load_state_dict(unet.state_dict())
    yield unet, heads


def test_models_with_the_same_tensors_and_other_results_have_other_keys(small):
    call = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)), 500, torch.ones(1, 3, 32)
    for pair in models(small.unet):
        states = [dict(unet.state_dict()) for unet in pair]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
        with torch.no_grad():
            assert not torch.equal(*(unet(*call) for unet in pair))
        assert len({cache._key(small.replace(unet=unet), PROMPTS, QUICK) for unet in pair}) == 2


def test_a_model_with_one_quantized_layer_has_another_key(small):
    model = QuantModel(small.unet, act_quant_params=None)
    sd = small.replace(unet=model)
    first = cache._key(sd, PROMPTS, QUICK)
    with model.only("out.2"):
        one = cache._key(sd, PROMPTS, QUICK)
        with model.only("input_blocks.0.0"):
            assert len({first, one, cache._key(sd, PROMPTS, QUICK)}) == 3
    assert cache._key(sd, PROMPTS, QUICK) == first


def test_a_quantized_decoder_has_another_key_with_its_switches_off(small):
    decoder = QuantModel(small.decoder, act_quant_params=None)
    sd = small.replace(decoder=decoder)
    first = cache._key(sd, PROMPTS, QUICK)
    decoder.set_use_quant(weights=False)
    assert cache._key(sd, PROMPTS, QUICK) != first


@pytest.mark.parametrize("make", [np.asarray, torch.tensor, list, tuple])
def test_one_of_many_seeds_is_in_the_key(small, make):
    # The printed text of a long array leaves out most values.
    seeds = list(range(1200))
    changed = [*seeds[:500], 7, *seeds[501:]]
    first, again, other = (
        cache._key(small, PROMPTS, {"seed": make(some)}) for some in (seeds, seeds, changed)
    )
    assert first == again != other


def test_a_tensor_of_any_type_is_in_the_key(small):
    images = [torch.full((1, 3, 64, 64), value, dtype=torch.bfloat16) for value in (0.5, 0.25)]
    keys = [cache._key(small, PROMPTS, {"image": image}) for image in (*images, images[0].float())]
    assert len(set(keys)) == 3


def test_an_unwritable_cache_is_an_error_of_one_sentence(small, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be written") as caught:
        cached_images(small, FEW, folder=tmp_path / "file", **PAIR)
    assert "\n" not in str(caught.value)

    def full(*_):
        # The error that safetensors raises.
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("sdcomp.evaluation.cache.save_file", full)
    with pytest.raises(UserError, match="cannot be written .*No space left"):
        cached_images(small, FEW, folder=tmp_path / "images", **PAIR)
    assert not list((tmp_path / "images").iterdir())
