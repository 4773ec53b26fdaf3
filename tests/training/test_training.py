"""The training loop resumes exactly, averages correctly and stops at NaN; the training set."""

import dataclasses
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from sdcomp.errors import UserError
from sdcomp.model.clip import build_clip
from sdcomp.model.config import TINY
from sdcomp.scenes import render
from sdcomp.training import Latents, fit, loop, scene_set, train_unet

STEPS = 12
OPTIONS = {"lr": 0.05, "warmup": 3, "seed": 4, "progress": False}


class Killed(Exception):
    pass


def small_module() -> nn.Module:
    """A module with batch statistics, so that buffers must be resumed too."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))


def noisy_loss(module: nn.Module, kill_at: int | None = None):
    """A loss that uses both generators, and records the parameters at the start of each step."""

    def loss(rng: np.random.Generator, generator: torch.Generator) -> torch.Tensor:
        if len(loss.history) == kill_at:
            raise Killed
        loss.history.append([p.detach().clone() for p in module.parameters()])
        x = torch.from_numpy(rng.normal(size=(8, 3))).float()
        x = x + 0.1 * torch.randn(x.shape, generator=generator)
        return (module(x)[:, 0] - x.sum(1)).square().mean()

    loss.history = []
    return loss


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def straight(**options):
    module = small_module()
    loss = noisy_loss(module)
    trained = fit(module, loss, STEPS, **OPTIONS, **options)
    return trained, module, loss


@pytest.mark.parametrize(("kill_at", "saved"), [(1, 0), (7, 4), (STEPS - 1, 8)])
def test_a_killed_run_resumes_with_the_same_bits(tmp_path, monkeypatch, kill_at, saved):
    expected, module, _ = straight()
    # A clock that moves one second at each reading, so that only some steps are saved.
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=itertools.count().__next__))
    checkpoint = tmp_path / "new" / "part.pt"
    options = {"checkpoint": checkpoint, "checkpoint_seconds": 3, **OPTIONS}
    first = small_module()
    with pytest.raises(Killed):
        fit(first, noisy_loss(first, kill_at), STEPS, **options)
    assert checkpoint.exists() == (saved > 0)

    second = small_module()
    loss = noisy_loss(second)
    resumed = fit(second, loss, STEPS, **options)
    assert len(loss.history) == STEPS - saved
    assert resumed.losses == expected.losses
    assert_same(state(second), state(module))
    assert_same(state(resumed.module), state(expected.module))
    assert [path.name for path in checkpoint.parent.iterdir()] == ["part.pt"]

    # After the end nothing is trained, and the result is the same.
    third = small_module()
    loss = noisy_loss(third, kill_at=0)
    again = fit(third, loss, STEPS, **options)
    assert again.losses == expected.losses
    assert_same(state(again.module), state(expected.module))


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    checkpoint = tmp_path / "part.pt"
    straight(checkpoint=checkpoint, inputs={"scenes": "abc"})
    before = checkpoint.read_bytes()
    for changed in ({"seed": 5}, {"lr": 0.1}, {"inputs": {"scenes": "xyz"}}):
        module = small_module()
        options = {**OPTIONS, "inputs": {"scenes": "abc"}, **changed}
        with pytest.raises(UserError, match="another training") as caught:
            fit(module, noisy_loss(module), STEPS, checkpoint=checkpoint, **options)
        assert str(checkpoint) in str(caught.value) and "\n" not in str(caught.value)
    module = small_module()
    with pytest.raises(UserError, match=f"steps is {STEPS} there and {STEPS + 1} here"):
        fit(module, noisy_loss(module), STEPS + 1, checkpoint=checkpoint, inputs={"scenes": "abc"}, **OPTIONS)
    assert checkpoint.read_bytes() == before


def test_the_seed_decides_the_run():
    expected, module, _ = straight()
    again, other, _ = straight()
    assert again.losses == expected.losses
    assert_same(state(other), state(module))
    third = small_module()
    changed = fit(third, noisy_loss(third), STEPS, **{**OPTIONS, "seed": 5})
    assert changed.losses[0] != expected.losses[0]


@pytest.mark.parametrize("decay", [0.5, 0.999])
def test_the_result_is_the_moving_average_in_eval_mode(decay):
    trained, module, loss = straight(ema_decay=decay)
    after = [*loss.history[1:], [p.detach() for p in module.parameters()]]
    for k, parameter in enumerate(trained.module.parameters()):
        # Start with the first parameters; then d times the average plus 1 - d times the new ones.
        average = after[0][k].double()
        for t, parameters in enumerate(after[1:], start=1):
            d = min(decay, (t + 1) / (t + 10))
            average = d * average + (1 - d) * parameters[k].double()
        assert torch.allclose(parameter.double(), average, rtol=0, atol=1e-6)
    assert not torch.allclose(next(trained.module.parameters()), after[-1][0], rtol=0, atol=1e-4)
    assert not any(part.training for part in trained.module.modules())
    for ours, theirs in zip(trained.module.buffers(), module.buffers(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(tmp_path):
    checkpoint = tmp_path / "part.pt"
    for bad in (math.nan, math.inf):
        module = small_module()
        plain = noisy_loss(module)

        def loss(rng, generator, plain=plain, bad=bad):
            value = plain(rng, generator)
            return value * bad if len(plain.history) == 4 else value

        with pytest.raises(FloatingPointError, match=r"part, step 3: the loss is (nan|inf)"):
            fit(
                module, loss, STEPS, lr=0.05, progress=False, desc="part", checkpoint=checkpoint,
                checkpoint_seconds=-1,
            )  # fmt: skip
        saved = torch.load(checkpoint, weights_only=True)
        assert saved["step"] == 3 and all(map(math.isfinite, saved["losses"]))
        assert all(t.isfinite().all() for t in saved["module"].values())
        checkpoint.unlink()


def test_a_known_problem_is_solved():
    torch.manual_seed(0)
    module, truth = nn.Linear(3, 1), torch.tensor([[1.0, -2.0, 0.5]])

    def loss(rng, generator):
        x = torch.randn(32, 3, generator=generator)
        return (module(x) - x @ truth.T - 0.25).square().mean()

    trained = fit(module, loss, 300, lr=0.05, warmup=10, weight_decay=0.0, ema_decay=0.9, progress=False)
    assert trained.losses[-1] < 1e-4 < trained.losses[0]
    assert torch.allclose(trained.module.weight, truth, atol=0.01)
    assert torch.allclose(trained.module.bias, torch.tensor([0.25]), atol=0.01)


# The training set


def test_the_training_set_has_families_of_scenes_and_their_images():
    data = scene_set(24, 3, progress=False)
    assert len(data.scenes) == 24 and data.images.shape == (24, 3, 64, 64) and data.images.dtype == np.uint8
    assert {scene.split for scene in data.scenes} == {"train"}
    for i in range(0, 24, 4):
        first, *others = (scene.attributes() for scene in data.scenes[i : i + 4])
        for other in others:
            assert other.keys() == first.keys() and other != first
    # Each image shows its scene, rounded to 256 levels.
    for i in (0, 13, 23):
        image = render([data.scenes[i]], [[3, i]])[0]
        batch = data.batch(np.array([i]))
        assert batch.dtype == torch.float32
        assert (batch[0] - image).abs().max() <= 0.5 / 255 + 1e-6
    assert not np.array_equal(data.images, scene_set(24, 4, progress=False).images)
    with pytest.raises(ValueError, match="multiple of 4, not 6"):
        scene_set(6, 0, progress=False)


def test_the_training_set_is_mapped_from_its_folder(tmp_path, monkeypatch):
    plain = scene_set(8, 0, progress=False)
    folder = tmp_path / "set"
    made = scene_set(8, 0, folder, progress=False)
    (file,) = folder.iterdir()
    assert file.suffix == ".npy"

    monkeypatch.setattr("sdcomp.training.data.render", None)
    mapped = scene_set(8, 0, folder, progress=False)
    assert isinstance(mapped.images, np.memmap)
    for data in (made, mapped):
        assert data.scenes == plain.scenes and np.array_equal(data.images, plain.images)
    rows = np.array([5, 2])
    assert torch.equal(mapped.batch(rows), plain.batch(rows))


def test_an_interrupted_training_set_is_made_again(tmp_path, monkeypatch):
    def interrupted(file, images):
        file.write(b"half")
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("sdcomp.training.data.np.save", interrupted)
        with pytest.raises(Killed):
            scene_set(8, 0, tmp_path, progress=False)
    assert not list(tmp_path.glob("*.npy"))
    made = scene_set(8, 0, tmp_path, progress=False)
    assert [path.suffix for path in tmp_path.iterdir()] == [".npy"]
    assert np.array_equal(made.images, scene_set(8, 0, progress=False).images)


def test_training_continues_from_given_weights(small):
    data = scene_set(32, 0, progress=False)
    latents = Latents(torch.randn(32, 4, 16, 16), torch.full((32, 4, 16, 16), 0.1), 1.0, "random")
    clip = build_clip(dataclasses.replace(small.config, vision=TINY.vision))
    parts = small.config, clip, small.tokenizer, data, latents, 1
    before = state(small.unet)
    gone_on = train_unet(*parts, start=small.unet, progress=False).module
    anew = train_unet(*parts, progress=False).module
    name = "middle_block.0.in_layers.2.weight"
    # One warm-up step moves a weight by at most about a hundredth of the learning rate.
    assert 0 < (gone_on.get_parameter(name) - before[name]).abs().max() < 1e-4
    assert (anew.get_parameter(name) - before[name]).abs().max() > 0.01
    assert_same(state(small.unet), before)
