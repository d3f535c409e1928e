"""Transformers that learn what to forget: Expire-Span, Transformer-XL, Adaptive-Span and Compressive."""

from .attention import packed_span_attention, span_attention
from .decoding import Decoder
from .memory import AdaptiveSpan, Compressive, ExpireSpan, Mechanism, TransXL
from .transformer import Transformer, TransformerConfig

__all__ = [
    "AdaptiveSpan",
    "Compressive",
    "Decoder",
    "ExpireSpan",
    "Mechanism",
    "TransXL",
    "Transformer",
    "TransformerConfig",
    "packed_span_attention",
    "span_attention",
]
