"""LoRA files merge on load, as diffusers fuses them; other files end in one sentence."""

import json

import pytest
import torch
import torch.nn.functional as F
from diffusers_keys import unet_state
from safetensors.torch import save_file
from torch import Tensor, nn

import sdcomp
from sdcomp.model import ModelError
from sdcomp.model.files.names import unet_name

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:diffusers")

ATTENTION = "input_blocks.3.1.transformer_blocks.0.attn1.to_q"
LAYERS = (
    ATTENTION,
    "input_blocks.3.1.transformer_blocks.0.attn2.to_k",
    "input_blocks.3.1.transformer_blocks.0.attn2.to_out.0",
    "middle_block.1.transformer_blocks.0.ff.net.0.proj",
    "output_blocks.0.1.proj_in",
)
CONVOLUTIONS = ("input_blocks.1.0.in_layers.2", "input_blocks.2.0.op", "output_blocks.3.0.skip_connection")
TEXT = ("layers.0.self_attn.q_proj", "layers.1.mlp.fc1", "layers.1.self_attn.out_proj")
PEFT = ("unet.", "text_encoder.text_model.encoder.")
ADAPTER = "adapter_model.safetensors"
KOHYA = ("lora_unet_", "lora_te_text_model_encoder_")


@pytest.fixture(scope="module")
def folder(small, tmp_path_factory):
    """The small model in diffusers' layout."""
    return sdcomp.save(small, tmp_path_factory.mktemp("lora") / "model", format="diffusers")


def matrices(layer: nn.Module, rank: int, seed: int) -> dict[str, Tensor]:
    """Random `down` and `up` of a layer; `down` has the kernel of a convolution."""
    generator = torch.Generator().manual_seed(seed)
    shape = layer.weight.shape
    ones = (1, 1) if len(shape) == 4 else ()
    return {
        "down": torch.randn(rank, *shape[1:], generator=generator),
        "up": 0.1 * torch.randn(shape[0], rank, *ones, generator=generator),
    }


def kohya(layer: str, kind: str) -> str:
    return f"{layer.replace('.', '_')}.lora_{kind}.weight"


def peft(layer: str, kind: str) -> str:
    return f"{layer}.lora_{'A' if kind == 'down' else 'B'}.weight"


def old_diffusers(layer: str, kind: str) -> str:
    return f"{layer}.{'lora' if layer.startswith('unet') else 'lora_linear_layer'}.{kind}.weight"


def processor(layer: str, kind: str) -> str:
    head, _, last = layer.removesuffix(".0").rpartition(".")
    return f"{head}.processor.{last}_lora.{kind}.weight"


def lora(small, spell, layers, text=(), *, prefixes=PEFT, alpha=None):
    """The tensors of a file for these layers, whose ranks differ, in the spelling of some program."""
    tensors = {}
    named = [(prefixes[0], unet_name(f"{n}.weight", small.config.unet)[:-7], small.unet, n) for n in layers]
    named += [(prefixes[1], n, small.text_encoder.encoder, n) for n in text]
    for i, (prefix, name, module, ours) in enumerate(named):
        made = matrices(module.get_submodule(ours), rank=2 + i % 2, seed=i)
        tensors |= {spell(prefix + name, kind): tensor for kind, tensor in made.items()}
        if alpha:
            tensors[f"{(prefix + name).replace('.', '_')}.alpha"] = torch.tensor(float(alpha))
    return tensors


FILES = {
    "kohya": lambda sd: lora(sd, kohya, LAYERS, TEXT, prefixes=KOHYA, alpha=1),
    "kohya, convolutions": lambda sd: lora(sd, kohya, CONVOLUTIONS, prefixes=KOHYA),
    "peft": lambda sd: lora(sd, peft, (*LAYERS, *CONVOLUTIONS), TEXT),
    "old diffusers": lambda sd: lora(sd, old_diffusers, LAYERS, TEXT),
    "processors": lambda sd: lora(sd, processor, LAYERS[:3]),
}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize("kind", FILES)
def test_weights_become_those_that_diffusers_fuses(small, folder, diffusers, tmp_path, kind):
    pytest.importorskip("peft")
    tensors = FILES[kind](small)
    save_file(tensors, tmp_path / "lora.safetensors")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    pipe.fuse_lora(lora_scale=0.8)
    pipe.unload_lora_weights()

    sd = sdcomp.load(folder, loras={tmp_path / "lora.safetensors": 0.8})
    ours, theirs = unet_state(sd.unet), pipe.unet.state_dict()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    text = {n.removeprefix("text_model."): t for n, t in pipe.text_encoder.state_dict().items()}
    for name, tensor in sd.text_encoder.state_dict().items():
        torch.testing.assert_close(tensor, text[name], rtol=1e-5, atol=1e-6, msg=name)
    found = changed(small.unet.state_dict(), sd.unet.state_dict())
    found |= changed(small.text_encoder.state_dict(), sd.text_encoder.state_dict())
    assert 2 * len(found) == len([name for name in tensors if not name.endswith("alpha")])


@pytest.mark.parametrize("prefix", ["lora_unet_", "diffusion_model."])
def test_original_names_and_several_files_add_up(small, folder, tmp_path, prefix):
    layer = small.unet.get_submodule(ATTENTION)
    made = matrices(layer, 4, 0)
    name = ATTENTION.replace(".", "_") if prefix == "lora_unet_" else ATTENTION
    tensors = {f"{prefix}{name}.lora_{kind}.weight": tensor for kind, tensor in made.items()}
    save_file({**tensors, f"{prefix}{name}.alpha": torch.tensor(2.0)}, tmp_path / "a.safetensors")
    save_file(tensors, tmp_path / "b.safetensors")
    loras = {tmp_path / "a.safetensors": 0.5, tmp_path / "b.safetensors": -1.0}
    merged = sdcomp.load(folder, loras=loras).unet.get_submodule(ATTENTION).weight
    product = made["up"] @ made["down"]
    torch.testing.assert_close(merged, layer.weight + (0.5 * 2 / 4 - 1) * product)


def test_a_matrix_in_the_middle_is_three_convolutions_in_a_row(small, folder, tmp_path):
    name = "input_blocks.1.0.in_layers.2"
    layer = small.unet.get_submodule(name)
    generator = torch.Generator().manual_seed(0)
    out, inputs = layer.weight.shape[:2]
    shapes = {"down": (3, inputs, 1, 1), "mid": (3, 3, 3, 3), "up": (out, 3, 1, 1)}
    made = {kind: torch.randn(*shape, generator=generator) for kind, shape in shapes.items()}
    file = tmp_path / "locon.safetensors"
    save_file({f"lora_unet_{kohya(name, kind)}": tensor for kind, tensor in made.items()}, file)
    merged = sdcomp.load(folder, loras={file: 1.0}).unet.get_submodule(name)
    x = torch.randn(2, inputs, 8, 8, generator=generator)
    inner = F.conv2d(F.conv2d(x, made["down"]), made["mid"], padding=1)
    torch.testing.assert_close(merged(x), layer(x) + F.conv2d(inner, made["up"]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_sum_is_rounded_once_to_the_type_of_the_weights(small, folder, tmp_path, dtype):
    save_file(lora(small, peft, [ATTENTION]), tmp_path / "lora.safetensors")
    made = matrices(small.unet.get_submodule(ATTENTION), 2, 0)
    sd = sdcomp.load(folder, dtype=dtype, loras={tmp_path / "lora.safetensors": 0.3})
    weight = small.unet.get_submodule(ATTENTION).weight.to(dtype).float()
    expected = (weight + 0.3 * (made["up"] @ made["down"])).to(dtype)
    torch.testing.assert_close(sd.unet.get_submodule(ATTENTION).weight, expected, rtol=1e-2, atol=1e-3)
    assert sd.unet.get_submodule(ATTENTION).weight.dtype == dtype


def test_alpha_may_be_in_the_settings_of_peft(small, folder, diffusers, tmp_path):
    peft_package = pytest.importorskip("peft")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    config = peft_package.LoraConfig(
        r=2, lora_alpha=5, target_modules=["to_q"], init_lora_weights=False, task_type=None
    )
    pipe.unet.add_adapter(config)
    state = peft_package.get_peft_model_state_dict(pipe.unet)
    settings = {**config.to_dict(), "target_modules": ["to_q"]}
    pipe.save_lora_weights(tmp_path, unet_lora_layers=state, unet_lora_adapter_metadata=settings)
    pipe.fuse_lora(lora_scale=0.7)
    pipe.unload_lora_weights()
    sd = sdcomp.load(folder, loras={tmp_path / "pytorch_lora_weights.safetensors": 0.7})
    theirs = pipe.unet.state_dict()
    for name, tensor in unet_state(sd.unet).items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-6, msg=name)
    assert changed(small.unet.state_dict(), sd.unet.state_dict())


@pytest.mark.parametrize("rslora", [False, True])
def test_the_folder_that_peft_saves_is_what_peft_merges(small, folder, diffusers, tmp_path, rslora):
    peft_package = pytest.importorskip("peft")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    expected, files = {}, {}
    for part, targets in (("unet", ["to_q", "conv1"]), ("text_encoder", ["q_proj", "fc1"])):
        config = peft_package.LoraConfig(
            r=3, lora_alpha=5, target_modules=targets, rank_pattern={targets[0]: 2}, use_rslora=rslora
        )
        model = peft_package.get_peft_model(getattr(pipe, part), config)
        for name, tensor in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(tensor, std=0.1, generator=torch.Generator().manual_seed(len(name)))
        model.save_pretrained(tmp_path / part)
        files[tmp_path / part] = 1.0
        expected[part] = model.merge_and_unload().state_dict()
    sd = sdcomp.load(folder, loras=files)
    for name, tensor in unet_state(sd.unet).items():
        torch.testing.assert_close(tensor, expected["unet"][name], rtol=1e-5, atol=1e-6, msg=name)
    text = {name.removeprefix("text_model."): t for name, t in expected["text_encoder"].items()}
    for name, tensor in sd.text_encoder.state_dict().items():
        torch.testing.assert_close(tensor, text[name], rtol=1e-5, atol=1e-6, msg=name)
    assert len(changed(small.unet.state_dict(), sd.unet.state_dict())) > 2
    assert len(changed(small.text_encoder.state_dict(), sd.text_encoder.state_dict())) == 4


def peft_folder(small, folder, **settings):
    """A file of peft's layout for one layer, and its settings."""
    save_file(lora(small, peft, [ATTENTION], prefixes=("base_model.model.", "")), folder / ADAPTER)
    peft_settings(folder, **settings)
    return folder


def peft_settings(folder, **settings):
    values = {"peft_type": "LORA", "r": 2, "lora_alpha": 7, "use_rslora": False, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(values))


@pytest.mark.parametrize(("rslora", "factor"), [(False, 7 / 2), (True, 7 / 2**0.5)])
def test_settings_beside_a_file_of_peft_scale_it(small, folder, tmp_path, rslora, factor):
    file = peft_folder(small, tmp_path, use_rslora=rslora) / ADAPTER
    made, layer = matrices(small.unet.get_submodule(ATTENTION), 2, 0), small.unet.get_submodule(ATTENTION)
    merged = sdcomp.load(folder, loras={file: 0.3}).unet.get_submodule(ATTENTION).weight
    torch.testing.assert_close(merged, layer.weight + 0.3 * factor * made["up"] @ made["down"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_dora": True}, "use_dora is True; merge it with the tool that trained it"),
        ({"alpha_pattern": {"to_q": 3}}, "alpha_pattern is {'to_q': 3}; merge it"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'; merge it"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; merge it"),
        ({"lora_alpha": "much"}, "could not convert"),
        ({"lora_alpha": None}, "must be a string or a real number"),
    ],
)
def test_settings_of_peft_that_cannot_be_merged_are_refused(small, folder, tmp_path, settings, words):
    file = peft_folder(small, tmp_path, **settings) / "adapter_config.json"
    with pytest.raises(ModelError, match=f"^{file} cannot be used: .*{words}") as caught:
        sdcomp.load(folder, loras={tmp_path: 1.0})
    assert "\n" not in str(caught.value)
    scalar = {f"base_model.model.{name}.weight": torch.tensor(1.0) for name in ("a.lora_A", "a.lora_B")}
    save_file(scalar, tmp_path / ADAPTER)
    peft_settings(tmp_path)
    with pytest.raises(ModelError, match="is a LoRA of another model"):
        sdcomp.load(folder, loras={tmp_path: 1.0})
    file.unlink()
    with pytest.raises(ModelError, match=f"^{file} is missing; copy the whole folder"):
        sdcomp.load(folder, loras={tmp_path / ADAPTER: 1.0})
    (tmp_path / ADAPTER).unlink()
    with pytest.raises(ModelError, match=f"^{tmp_path / ADAPTER} is missing"):
        sdcomp.load(folder, loras={tmp_path: 1.0})


NAME = f"lora_unet_{ATTENTION.replace('.', '_')}"
DOWN, UP = f"{NAME}.lora_down.weight", f"{NAME}.lora_up.weight"
GOOD = {DOWN: torch.ones(2, 32), UP: torch.ones(32, 2)}
XL = {key.replace("lora_unet_input_blocks_3", "lora_te2_3"): tensor for key, tensor in GOOD.items()}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({**GOOD, DOWN: torch.ones(2, 31)}, r"of another model: its tensors of .* \(2, 31\), \(32, 2\), but"),
        ({**GOOD, UP: torch.ones(32, 3)}, "of another model: its tensors of"),
        ({**GOOD, UP: torch.tensor(1.0)}, "of another model: its tensors of"),
        ({**GOOD, DOWN: torch.tensor(1.0)}, "of another model: its tensors of"),
        ({DOWN: torch.ones(0, 32), UP: torch.ones(32, 0)}, "of another model: its tensors of"),
        ({**GOOD, f"{NAME}.lora_mid.weight": torch.ones(2, 2, 3, 3)}, "of another model: its tensors of"),
        ({**GOOD, f"{NAME}.alpha": torch.ones(2)}, "of another model: its tensors of"),
        ({DOWN: GOOD[DOWN]}, "lacks the matrix 'up' of lora_unet_"),
        ({UP: GOOD[UP]}, "lacks the matrix 'down' of lora_unet_"),
        (XL, "is a LoRA of another model: it changes lora_te2_3_1"),
        ({**GOOD, f"{NAME}.dora_scale": torch.ones(32)}, "holds DoRA, which cannot be merged here: merge it"),
        ({f"{NAME}.hada_w1_a": torch.ones(2, 2)}, "holds LoHa, which"),
        ({f"{NAME}.lokr_w1": torch.ones(2, 2)}, "holds LoKr, which"),
        ({f"{NAME}.diff": torch.ones(2, 2)}, "is no LoRA: it holds lora_unet_"),
        ({"model.diffusion_model.out.2.bias": torch.ones(4)}, "is no LoRA: it holds model.diffusion_model"),
        ({}, "is empty: it holds no LoRA"),
        ({**GOOD, DOWN: torch.ones(2, 32, dtype=torch.int8)}, "in another type than floating point"),
        ({**GOOD, DOWN: torch.full((2, 32), float("nan"))}, "infinite or NaN; copy it again"),
    ],
)
def test_other_files_end_in_one_sentence(folder, tmp_path, tensors, message):
    file = tmp_path / "lora.safetensors"
    save_file(tensors, file)
    with pytest.raises(ModelError, match=rf"^{file} .*{message}") as caught:
        sdcomp.load(folder, loras={file: 1.0})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        "[1]",
        f'{{"unet.lora_alpha": {10**400}}}',
        '{"unet.lora_alpha": "much"}',
        "{",
        '{"unet.use_rslora": true}',
    ],
)
def test_odd_settings_end_in_one_sentence(folder, tmp_path, settings):
    file = tmp_path / "lora.safetensors"
    save_file(GOOD, file, metadata={"lora_adapter_metadata": settings})
    with pytest.raises(ModelError, match=rf"^{file} (has wrong settings in lora_adapter_metadata|sets unet)"):
        sdcomp.load(folder, loras={file: 1.0})


def test_truncated_and_missing_files_end_in_one_sentence(folder, tmp_path):
    file = tmp_path / "lora.safetensors"
    save_file(GOOD, file)
    whole = file.read_bytes()
    for part in (whole[: len(whole) // 2], whole[:100], b""):
        file.write_bytes(part)
        with pytest.raises(ModelError, match=rf"^{file} is damaged or no safetensors file"):
            sdcomp.load(folder, loras={file: 1.0})
    torch.save(GOOD, file)
    with pytest.raises(ModelError, match=rf"^{file} is damaged or no safetensors file"):
        sdcomp.load(folder, loras={file: 1.0})
    file.unlink()
    with pytest.raises(ModelError, match=rf"^{file} is missing"):
        sdcomp.load(folder, loras={file: 1.0})


def test_wrong_arguments_are_refused(small, folder, tmp_path):
    save_file(GOOD, tmp_path / "lora.safetensors")
    with pytest.raises(TypeError, match="loras must map files to scales"):
        sdcomp.load(folder, loras=["lora.safetensors"])
    for scale in ("1", True, float("nan"), None):
        with pytest.raises(TypeError, match="the scale of .* must be a number"):
            sdcomp.load(folder, loras={tmp_path / "lora.safetensors": scale})
    with pytest.raises(ModelError, match="leave loras or unet out"):
        sdcomp.model.load(folder, unet=small.unet, loras={tmp_path / "lora.safetensors": 1})
    quantized = sdcomp.save(
        small.replace(unet=sdcomp.QuantModel(small.unet, act_quant_params=None)), tmp_path / "q"
    )
    with pytest.raises(ModelError, match="is quantized: merge LoRA files into the model that it was made of"):
        sdcomp.load(quantized, loras={tmp_path / "lora.safetensors": 1.0})


def test_a_lora_given_as_a_model_says_how_to_merge_it(tmp_path):
    save_file(GOOD, tmp_path / "lora.safetensors")
    with pytest.raises(ModelError, match="is a LoRA, a change to a model; load the model with loras="):
        sdcomp.load(tmp_path / "lora.safetensors")


def test_metadata_of_kohya_is_left_alone(folder, tmp_path):
    file = tmp_path / "lora.safetensors"
    save_file(GOOD, file, metadata={"ss_network_alpha": "4", "ss_tag_frequency": json.dumps({"a": 1})})
    sdcomp.load(folder, loras={file: 1.0})
