"""A killed second-order pruning goes on from its checkpoint to the same bits."""

import copy

import pytest
import torch
from torch import nn

import sdcomp.pruning.patterns
import sdcomp.pruning.unstructured
from sdcomp.errors import UserError
from sdcomp.pruning import calibrate, prune_n_m, prune_unstructured
from sdcomp.pruning.layers import prunable_layers
from sdcomp.pruning.second_order import prune_layer, sweep_errors

PRUNINGS = {
    "layer": lambda unet, **more: prune_unstructured(unet, 0.5, importance="second_order", **more),
    "global": lambda unet, **more: prune_unstructured(unet, 0.5, "global", importance="second_order", **more),
    "2:4": lambda unet, **more: prune_n_m(unet, importance="second_order", **more),
}


@pytest.fixture
def seen(small):
    return calibrate(small.unet, lambda: small.generate(["a"], steps=1))


def first(unet, count):
    """The names of the layers that are pruned first."""
    return list(prunable_layers(unet, None))[:count]


@pytest.fixture
def pruned_layers(monkeypatch):
    """Layers whose pruning was begun; the fifth is where the run is killed."""
    begun = []

    def killed_at_the_fifth(layer, *args, **kwargs):
        begun.append(layer)
        if len(begun) == 5:
            raise KeyboardInterrupt
        prune_layer(layer, *args, **kwargs)

    monkeypatch.setattr("sdcomp.checkpoints._EVERY", 0)
    for module in (sdcomp.pruning.unstructured, sdcomp.pruning.patterns):
        monkeypatch.setattr(module, "prune_layer", killed_at_the_fifth)
    return begun


@pytest.mark.parametrize("kind", PRUNINGS)
def test_a_killed_pruning_goes_on_to_the_same_bits(small, seen, tmp_path, monkeypatch, kind, request):
    prune, file = PRUNINGS[kind], tmp_path / "pruning.ckpt"
    whole = prune(small.unet, calibration=seen)
    begun = request.getfixturevalue("pruned_layers")
    with pytest.raises(KeyboardInterrupt):
        prune(small.unet, calibration=seen, checkpoint=file, inputs="a")
    with pytest.raises(UserError, match="is of another pruning: delete it"):
        prune(small.unet, calibration=seen, checkpoint=file, inputs="b")
    with pytest.raises(UserError, match="is of another pruning: delete it"):
        prune(whole, calibration=seen, checkpoint=file, inputs="a")
    measured = []
    monkeypatch.setattr(
        sdcomp.pruning.unstructured, "sweep_errors", lambda *args: measured.append(0) or sweep_errors(*args)
    )
    resumed = prune(small.unet, calibration=seen, checkpoint=file, inputs="a")
    assert all(torch.equal(t, whole.state_dict()[name]) for name, t in resumed.state_dict().items())
    # Only the layer at which it was killed was begun twice, and the amounts are those of the first run.
    changed = [n for n, t in small.unet.state_dict().items() if not torch.equal(t, whole.state_dict()[n])]
    assert len(begun) == 1 + len(changed) and not measured
    assert not file.exists()


def test_a_pruning_in_place_resumes_too(small, seen, tmp_path, pruned_layers):
    killed, fresh = copy.deepcopy(small.unet), copy.deepcopy(small.unet)
    how = {"calibration": seen, "checkpoint": tmp_path / "pruning.ckpt", "inplace": True}
    with pytest.raises(KeyboardInterrupt):
        PRUNINGS["layer"](killed, **how)
    assert PRUNINGS["layer"](fresh, **how) is fresh
    assert all(killed.get_submodule(n).weight.equal(fresh.get_submodule(n).weight) for n in first(fresh, 4))


@pytest.mark.parametrize("kind", ["layer", "2:4"])
def test_tied_weights_are_kept_too(tmp_path, randomize, kind, request):
    tied = randomize(nn.Sequential(*(nn.Linear(16, 16) for _ in range(6))), 0)
    for i in (2, 3):
        tied[i].weight = tied[0].weight
    seen = calibrate(tied, lambda: tied(torch.eye(16)))
    how = {"calibration": seen, "checkpoint": tmp_path / "pruning.ckpt"}
    whole = PRUNINGS[kind](tied, calibration=seen)
    begun = request.getfixturevalue("pruned_layers")
    if kind == "layer":  # a weight that layers share is pruned once
        begun.append(None)
    with pytest.raises(KeyboardInterrupt):
        PRUNINGS[kind](tied, **how)
    resumed = PRUNINGS[kind](tied, **how)
    assert all(torch.equal(t, whole.state_dict()[name]) for name, t in resumed.state_dict().items())
    assert resumed[0].weight is resumed[3].weight


def test_a_checkpoint_may_be_named_by_a_text(small, seen, tmp_path, monkeypatch, pruned_layers):
    monkeypatch.setenv("HOME", str(tmp_path))
    how = {"calibration": seen, "checkpoint": "~/pruning.ckpt"}
    with pytest.raises(KeyboardInterrupt):
        PRUNINGS["layer"](small.unet, **how)
    assert (tmp_path / "pruning.ckpt").is_file()
    PRUNINGS["layer"](small.unet, **how)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_other_source_code_is_refused(small, seen, tmp_path, monkeypatch, pruned_layers):
    how = {"calibration": seen, "checkpoint": tmp_path / "pruning.ckpt"}
    with pytest.raises(KeyboardInterrupt):
        PRUNINGS["layer"](small.unet, **how)
    with monkeypatch.context() as patch:
        patch.setattr("sdcomp.checkpoints.source_digest", lambda: "changed")
        with pytest.raises(UserError, match="is of another pruning: delete it"):
            PRUNINGS["layer"](small.unet, **how)
    PRUNINGS["layer"](small.unet, **how)


def test_other_files_and_other_importances_are_refused(small, seen, tmp_path):
    file = tmp_path / "pruning.ckpt"
    file.write_bytes(b"nothing")
    with pytest.raises(UserError, match="is no checkpoint of a pruning: delete it or name another"):
        PRUNINGS["layer"](small.unet, calibration=seen, checkpoint=file)
    message = "is kept for importance 'second_order' only, not for 'magnitude'"
    with pytest.raises(ValueError, match=message):
        prune_unstructured(small.unet, 0.5, checkpoint=file)
    with pytest.raises(ValueError, match=message):
        prune_n_m(small.unet, checkpoint=file)
