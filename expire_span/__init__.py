"""Transformers that learn what to forget: Expire-Span, Transformer-XL, Adaptive-Span and Compressive."""

from .attention import packed_span_attention, span_attention
from .decoding import Decoder
from .memory import AdaptiveSpan, Alibi, Compressive, ExpireFox, ExpireSpan, Fox, Mechanism, Streaming, TransXL
from .transformer import Transformer, TransformerConfig

__all__ = [
    "AdaptiveSpan",
    "Alibi",
    "Compressive",
    "Decoder",
    "ExpireFox",
    "ExpireSpan",
    "Fox",
    "Mechanism",
    "Streaming",
    "TransXL",
    "Transformer",
    "TransformerConfig",
    "packed_span_attention",
    "span_attention",
]
