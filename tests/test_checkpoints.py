"""A checkpoint keeps what numpy counted and what layers share, and belongs to one version of the code."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sdcomp import checkpoints
from sdcomp.checkpoints import LayerCheckpoint
from sdcomp.errors import UserError


def test_numbers_of_numpy_and_tied_weights_are_kept(tmp_path):
    kept, tied = LayerCheckpoint(str(tmp_path / "work.ckpt"), "pruning", "inputs"), torch.arange(6.0)
    tensors = {"a": tied, "b": tied, "c": tied.view(2, 3)}
    kept.write(
        lambda: tensors, {"a", "b"}, {"momentum": np.float32(0.5), "steps": np.array([1, 2])}, now=True
    )
    assert kept.read() == ({"a", "b"}, {"momentum": 0.5, "steps": [1, 2]})
    found = load_file(kept.path)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_a_checkpoint_of_other_code_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "work.ckpt"
    LayerCheckpoint(path, "pruning", "inputs").write(dict, set(), {}, now=True)
    assert LayerCheckpoint(path, "pruning", "inputs").read() == (set(), {})
    monkeypatch.setattr(checkpoints, "source_digest", lambda: "changed")
    with pytest.raises(UserError, match="is of another pruning: delete it"):
        LayerCheckpoint(path, "pruning", "inputs").read()


def test_a_path_may_be_text_and_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    LayerCheckpoint("~/work.ckpt", "pruning", "inputs").write(dict, {"a"}, {}, now=True)
    assert LayerCheckpoint(tmp_path / "work.ckpt", "pruning", "inputs").read() == ({"a"}, {})
