"""Wrong arguments of `generate` end in one sentence, before anything runs."""

import pytest
import torch
from torch import nn

from sdcomp.model.pipeline import StableDiffusion

RED = "a small red star on a navy background"
BLUE = "a large striped blue circle above a small green square"
IMAGE = torch.full((1, 3, 64, 64), 0.5)
BAD_VALUES = {
    "sampler a list": ({"sampler": ["ddim"]}, "sampler must be one of ddpm, ddim, dpmpp_2m, not .'ddim'."),
    "guidance huge": ({"guidance_scale": 1e30}, "guidance_scale must be 0 or more, and at most 1000"),
    "half a surrogate pair": ({"prompts": [RED, "a \ud800 star"]}, r"'a .ud800 star' is no valid text"),
    "unknown sampler": ({"sampler": "euler"}, "sampler must be one of ddpm, ddim, dpmpp_2m, not 'euler'"),
    "no steps": ({"steps": 0}, "steps must be 1 to 1000, not 0"),
    "too many steps": ({"steps": 1001}, "steps must be 1 to 1000, not 1001"),
    "strength 0": ({"strength": 0}, "strength must be above 0 and at most 1, not 0"),
    "strength 2": ({"strength": 2}, "strength must be above 0 and at most 1, not 2"),
    "strength nan": ({"strength": float("nan")}, "strength must be above 0 and at most 1, not nan"),
    "guidance nan": ({"guidance_scale": float("nan")}, "guidance_scale must be 0 or more, .*, not nan"),
    "guidance inf": ({"guidance_scale": float("inf")}, "guidance_scale must be .*, not inf"),
    "guidance negative": ({"guidance_scale": -1.0}, "guidance_scale must be 0 or more, .*, not -1.0"),
    "no batch": ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
    "a seed too big": ({"seed": [1, 2**64]}, f"a seed of an image must be .*, not {2**64}"),
    "a seed negative": ({"seed": [1, -1]}, "a seed of an image must be .*, not -1"),
    "one seed for two": ({"seed": [1]}, "1 seeds for 2 prompts"),
    "three negatives for two": ({"negative_prompt": ["", "", ""]}, "3 negative prompts for 2 prompts"),
    "size no multiple": ({"size": (60, 64)}, "height and width must be multiples of 8, not 60 and 64"),
    "size zero": ({"size": (0, 64)}, "height and width must be multiples of 8, not 0 and 64"),
    "image too bright": ({"image": IMAGE * 255}, "image must have values in "),
    "image negative": ({"image": IMAGE - 1}, "image must have values in "),
    "image nan": ({"image": IMAGE * float("nan")}, "image must have values in "),
    "image empty": ({"image": IMAGE[:, :, :0]}, "height and width must be multiples of 8, not 0 and 64"),
    "image no multiple": ({"image": IMAGE[..., :60]}, "height and width must be multiples of 8, not 64"),
    "image grey": ({"image": IMAGE[:, :1]}, r"image must be \(1 or 2, 3, H, W\), not \(1, 1, 64, 64\)"),
    "three images for two": ({"image": IMAGE.repeat(3, 1, 1, 1)}, r"image must be \(1 or 2, 3, H, W\)"),
    "image and size": ({"image": IMAGE, "size": (32, 32)}, "size and image disagree"),
}  # fmt: skip
BAD_TYPES = {
    "strength text": ({"strength": "0.5"}, "strength must be a number, not '0.5'"),
    "strength a bool": ({"strength": True}, "strength must be a number, not True"),
    "guidance text": ({"guidance_scale": "4"}, "guidance_scale must be a number, not '4'"),
    "steps a float": ({"steps": 20.0}, "steps must be a whole number, not 20.0"),
    "steps a bool": ({"steps": True}, "steps must be a whole number, not True"),
    "batch a float": ({"batch_size": 2.0}, "batch_size must be a whole number, not 2.0"),
    "seed a float": ({"seed": 0.5}, "seed must be a whole number, not 0.5"),
    "seed a bool": ({"seed": True}, "seed must be a whole number, not True"),
    "seed text": ({"seed": "12"}, "seed must be a whole number, not '12'"),
    "seeds floats": ({"seed": [1.5, 2.0]}, "seed must be a whole number, not 1.5"),
    "negative no text": ({"negative_prompt": None}, "negative_prompt must be text or a list of texts"),
    "prompts no text": ({"prompts": [RED, 3]}, "prompts must be text or a list of texts"),
    "prompt a number": ({"prompts": 3}, "prompts must be text or a list of texts"),
    "size one number": ({"size": 64}, r"size must be \(height, width\), not 64"),
    "size floats": ({"size": (64.0, 64.0)}, "size must be a whole number, not 64.0"),
    "image of bytes": ({"image": (IMAGE * 255).byte()}, "image must be a floating-point tensor"),
    "image no tensor": ({"image": IMAGE.numpy()}, "image must be a floating-point tensor"),
}  # fmt: skip


class Recorder(nn.Module):
    """A UNet that counts its calls."""

    calls = 0

    def forward(self, *args: object) -> None:
        self.calls += 1


def assert_refused(sd: StableDiffusion, error: type[Exception], settings: dict, message: str) -> None:
    recorder = Recorder()
    with pytest.raises(error, match=f"^{message}") as caught:
        sd.replace(unet=recorder).generate(**{"prompts": [RED, BLUE], "steps": 2, **settings})
    assert "\n" not in str(caught.value)
    assert recorder.calls == 0


@pytest.mark.parametrize("name", BAD_VALUES)
def test_a_bad_value_is_refused_in_one_sentence_before_anything_runs(small, name):
    assert_refused(small, ValueError, *BAD_VALUES[name])


@pytest.mark.parametrize("name", BAD_TYPES)
def test_a_bad_type_is_refused_in_one_sentence_before_anything_runs(small, name):
    assert_refused(small, TypeError, *BAD_TYPES[name])
