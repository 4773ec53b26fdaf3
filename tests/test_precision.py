"""What decides the last bits: set explicitly, and told."""

import torch

from sdcomp.evaluation import fix_precision, precision_facts


def test_float32_is_computed_in_float32_after_any_other_setting():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    assert precision_facts()["tf32"] == {"matmul": True, "convolution": True}
    fix_precision()
    assert precision_facts()["tf32"] == {"matmul": False, "convolution": False}


def test_facts_name_the_machine_and_the_variables_that_choose_its_kernels(monkeypatch):
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    facts = precision_facts("cpu")
    assert facts["device"].endswith(" cores") and facts["variables"]["MKL_CBWR"] == "COMPATIBLE"
    assert facts["torch"] == torch.__version__ and facts["threads"] == torch.get_num_threads()
