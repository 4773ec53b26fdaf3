"""The key of cached images covers everything that may change an image, but no code that only judges."""

import pytest
import torch

from sdcomp.errors import NonFiniteError
from sdcomp.evaluation import cache, cached_images, fix_precision

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
        lambda patch: patch.setattr("sdcomp.evaluation.precision.device_name", lambda device: "another"),
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
    monkeypatch.setattr(cache, "__file__", str(tmp_path / "evaluation" / "cache.py"))
    return cache._source.__wrapped__


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
