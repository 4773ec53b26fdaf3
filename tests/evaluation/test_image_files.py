"""The crop for the judges against Pillow's, and files without an image."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from sdcomp.errors import UserError
from sdcomp.evaluation import load_images
from sdcomp.evaluation.image_files import center_crop


@pytest.mark.parametrize(
    ("height", "width", "side"), [(40, 64, 24), (64, 40, 24), (97, 97, 31), (20, 33, 48)]
)
def test_the_crop_agrees_with_pillow(height, width, side):
    # Pillow's bicubic filter, with antialiasing, is the one that CLIP's preprocessing uses.
    rows, columns = torch.meshgrid(torch.linspace(0, 9, height), torch.linspace(0, 7, width), indexing="ij")
    waves = torch.stack([rows.sin(), columns.cos(), (rows + columns).sin()]).add(1).div(2)
    pixels = (255 * waves).round().byte()
    size = [max(side, round(length * side / min(height, width))) for length in (width, height)]
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    wanted = np.array(picture.crop((left, top, left + side, top + side)))
    found = center_crop(pixels[None] / 255, side)
    assert found.shape == (1, 3, side, side)
    # Pillow rounds twice, once after each direction.
    assert np.abs(255 * found[0].permute(1, 2, 0).numpy() - wanted).max() < 1.6


def test_a_file_without_a_whole_image_is_refused_in_one_sentence(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    Image.effect_noise((400, 400), 50).save(path)
    whole = path.read_bytes()
    second = whole.index(b"IDAT", whole.index(b"IDAT") + 4)
    for content in (whole[:500], whole[:10], whole[:second] + b"\0\1\2\3" + whole[second + 4 :]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.png cannot be read as an image") as caught:
            load_images(tmp_path, 8)
        assert "\n" not in str(caught.value)
    path.unlink()
    os.mkfifo(path)  # opening it would block
    with pytest.raises(UserError, match="is a pipe, a socket or a device, not a file"):
        load_images(tmp_path, 8)
    path.unlink()
    path.write_bytes(whole)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match=r"a\.png cannot be read as an image"):
        load_images(tmp_path, 8)


def test_a_folder_of_images_becomes_a_batch(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (8, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "b.png")
    Image.new("L", (8, 8), 255).save(tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("no image")
    images = load_images(tmp_path, 8)
    assert images.shape == (2, 3, 8, 8) and (images[0] == 1).all()
    middle = torch.from_numpy(pixels[:, 2:10]).permute(2, 0, 1) / 255
    assert torch.allclose(images[1], middle, atol=1e-6)
    assert load_images(tmp_path, 4).shape == (2, 3, 4, 4)
    assert torch.equal(load_images(tmp_path / "b.png", 8), images[1:])
    (tmp_path / "c.png").write_bytes(b"<html>")
    with pytest.raises(UserError, match=r"c\.png cannot be read as an image"):
        load_images(tmp_path, 8)
    with pytest.raises(UserError, match="no image and no folder"):
        load_images(tmp_path / "nowhere", 8)
