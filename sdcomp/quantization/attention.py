"""Attention's product with rounded queries, keys, values and probabilities."""

from __future__ import annotations

from torch import Tensor, nn

from sdcomp.errors import UserError
from sdcomp.model.attention import AttentionProduct
from sdcomp.quantization.quantizer import UniformQuantizer
from sdcomp.quantization.shared_state import QuantState


class QuantAttentionProduct(AttentionProduct):
    """`AttentionProduct` that simulates two products of `n_bits` integers; each call finds its scales.

    Queries and keys have one scale for each token of each head, values one for each of a head's channels. So
    no scale changes along a sum, and the integers could be multiplied (Zhang et al. 2025, "SageAttention").
    Probabilities have an affine grid for each query, since they are never negative.
    """

    def __init__(self, n_bits: int, state: QuantState) -> None:
        super().__init__()
        self.state = state
        self.signed = UniformQuantizer(n_bits, "token")
        self.unsigned = UniformQuantizer(n_bits, "token", symmetric=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        state = self.state
        if not state.activations or state.observer is not None or state.only is not None:
            return super().forward(q, k, v)
        q, k, v = self.signed(q), self.signed(k), self.signed(v.mT).mT
        probabilities = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        return self.unsigned(probabilities) @ v

    def extra_repr(self) -> str:
        """Bits."""
        return f"{self.signed.n_bits} bits"


def quantized_products(
    module: nn.Module, quantizer: UniformQuantizer | None, state: QuantState
) -> dict[str, QuantAttentionProduct]:
    """Make the quantized twins of a module's attention products, with the bits of its activations.

    Raises ValueError where activations are not quantized, and for a module without such products.
    """
    names = [name for name, part in module.named_modules() if isinstance(part, AttentionProduct)]
    if quantizer is None:
        raise ValueError("quantize_attention_products needs act_quant_params, which say how many bits")
    if not names:
        raise ValueError(
            f"{type(module).__name__} has no AttentionProduct: leave quantize_attention_products out"
        )
    return {name: QuantAttentionProduct(quantizer.n_bits, state) for name in names}


def refuse_quantized_products(model: nn.Module, what: str) -> None:
    """Raise UserError if attention's products are quantized, which `what` cannot compute."""
    if getattr(model, "quantize_attention_products", False) and model.state.activations:
        raise UserError(
            f"{what} cannot quantize attention's products, which are only simulated: make the model without"
            " quantize_attention_products"
        )
