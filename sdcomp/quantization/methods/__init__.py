"""What is done to a calibrated model's layers, one method a file, each with its paper."""

from sdcomp.quantization.methods.second_order import SecondOrderRounding

__all__ = ["SecondOrderRounding"]
