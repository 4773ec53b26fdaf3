"""Attention's product with rounded queries and keys, and also with rounded values and probabilities."""

from __future__ import annotations

from torch import Tensor, nn

from sdcomp.errors import UserError
from sdcomp.model.attention import AttentionProduct
from sdcomp.quantization.quantizer import UniformQuantizer
from sdcomp.quantization.shared_state import QuantState
from sdcomp.settings import OneOf


class QuantAttentionScores(AttentionProduct):
    """`AttentionProduct` that simulates queries and keys of `n_bits` integers; each call finds their scales.

    Each head of each row has one scale for its queries and one for its keys. Probabilities and values are not
    rounded, so only the product that gives the scores is one of integers. An exported OpenVINO graph
    multiplies them as int8, an ONNX graph rounds them and multiplies floats.
    """

    def __init__(self, n_bits: int, state: QuantState) -> None:
        super().__init__()
        self.state = state
        self.quantizer = UniformQuantizer(n_bits, "token")

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if _rounds_nothing(self.state):
            return super().forward(q, k, v)
        q, k = (self.quantizer(x.flatten(-2)).unflatten(-1, x.shape[-2:]) for x in (q, k))
        return super().forward(q, k, v)

    def extra_repr(self) -> str:
        """Bits."""
        return f"{self.quantizer.n_bits} bits"


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
        if _rounds_nothing(self.state):
            return super().forward(q, k, v)
        q, k, v = self.signed(q), self.signed(k), self.signed(v.mT).mT
        probabilities = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        return self.unsigned(probabilities) @ v

    def extra_repr(self) -> str:
        """Bits."""
        return f"{self.signed.n_bits} bits"


def _rounds_nothing(state: QuantState) -> bool:
    return not state.activations or state.observer is not None or state.only is not None


PRODUCTS = {True: QuantAttentionProduct, "scores": QuantAttentionScores}
"""What `quantize_attention_products` of a `QuantModel` may be, besides False."""
ASKED = OneOf(False, *PRODUCTS)
"""All that it may be."""


def quantized_products(
    module: nn.Module, asked: bool | str, quantizer: UniformQuantizer | None, state: QuantState
) -> dict[str, AttentionProduct]:
    """Make the quantized twins of a module's attention products, with the bits of its activations.

    There are none if False is `asked`. Raises ValueError where activations are not quantized, for a module
    without such products, and for `asked` that the rule `ASKED` does not allow.
    """
    if not ASKED(asked):
        raise ValueError(f'quantize_attention_products must be False, True or "scores", not {asked!r}')
    if asked is False:
        return {}
    names = [name for name, part in module.named_modules() if isinstance(part, AttentionProduct)]
    if quantizer is None:
        raise ValueError("quantize_attention_products needs act_quant_params, which say how many bits")
    if not names:
        raise ValueError(
            f"{type(module).__name__} has no AttentionProduct: leave quantize_attention_products out"
        )
    return {name: PRODUCTS[asked](quantizer.n_bits, state) for name in names}


def refuse_quantized_products(model: nn.Module, what: str, can_compute_scores: bool = False) -> None:
    """Raise UserError if attention's products are quantized, which `what` cannot compute.

    `can_compute_scores`: whether it can compute `QuantAttentionScores`.
    """
    asked = getattr(model, "quantize_attention_products", False) and model.state.activations
    if asked and not (can_compute_scores and model.quantize_attention_products == "scores"):
        instead = ' or with "scores"' if can_compute_scores else ""
        raise UserError(
            f"{what} cannot quantize attention's products: make the model without"
            f" quantize_attention_products{instead}"
        )
