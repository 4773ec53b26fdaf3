"""The settings that change the last bits are set explicitly and recorded."""

import pytest
import torch

from sdcomp.evaluation import fix_precision, precision_facts

FULL = {"matmul": False, "convolution": False}


@pytest.fixture(autouse=True)
def as_it_was():
    """Restore the precision that `fix_precision` sets after each test, also after a failed one."""
    yield
    fix_precision()


def older_switches():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True


def newer_switches():
    torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = "tf32"


def one_newer_switch_for_all():
    torch.backends.fp32_precision = "tf32"


@pytest.mark.parametrize("change", [older_switches, newer_switches, one_newer_switch_for_all])
def test_float32_is_computed_in_float32_after_any_other_setting(change):
    fix_precision()
    change()
    # The switch for all operators does not change products that have been set individually.
    assert precision_facts("cpu")["tf32"]["convolution"]
    assert precision_facts("cpu")["tf32"]["matmul"] == (change is not one_newer_switch_for_all)
    fix_precision()
    facts = precision_facts("cpu")
    assert facts["tf32"] == FULL and facts["cpu_rounds_float32"] == FULL
    # Other packages read the older switches, which raise errors if the two kinds disagree.
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32


def test_a_cpu_does_not_round_products_to_bfloat16():
    a, b = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0))
    fix_precision()
    exact = a @ b
    torch.set_float32_matmul_precision("medium")
    torch.backends.mkldnn.conv.fp32_precision = "bf16"
    # Not every CPU can round to bfloat16, so the product is not checked here.
    assert precision_facts("cpu")["cpu_rounds_float32"] == {"matmul": True, "convolution": True}
    fix_precision()
    assert precision_facts("cpu")["cpu_rounds_float32"] == FULL
    assert torch.equal(a @ b, exact)


def test_facts_name_the_machine_and_the_variables_that_choose_its_kernels(monkeypatch):
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    facts = precision_facts("cpu")
    assert facts["device"].endswith(" cores") and facts["variables"]["MKL_CBWR"] == "COMPATIBLE"
    assert facts["torch"] == torch.__version__ and facts["threads"] == torch.get_num_threads()


def test_facts_name_the_gpu_that_is_used(monkeypatch):
    names = {"cuda:0": "small", "cuda:1": "large"}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[str(device)])
    assert precision_facts("cuda:1")["device"] == "large"


@pytest.mark.cuda
def test_products_and_convolutions_on_a_device_have_float32_precision():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 512, 512, generator=generator)
    x = torch.randn(1, 64, 32, 32, generator=generator)
    weight = torch.randn(64, 64, 3, 3, generator=generator)

    def errors():
        product = (a.cuda() @ b.cuda()).cpu().double() - a.double() @ b.double()
        wanted = torch.nn.functional.conv2d(x.double(), weight.double())
        image = torch.nn.functional.conv2d(x.cuda(), weight.cuda()).cpu().double() - wanted
        return torch.stack([product.abs().max(), image.abs().max()])

    fix_precision()
    # TF32 has 10 bits of mantissa: errors near 1e-2 here, against 1e-4.
    assert (errors() < 1e-3).all()
