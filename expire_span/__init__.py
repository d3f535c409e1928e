"""Transformers that learn what to forget: Expire-Span, Transformer-XL, Adaptive-Span and Compressive."""

from .attention import packed_span_attention, span_attention
from .decoding import Decoder
from .memory import (
    AdaptiveSpan,
    Alibi,
    Compressive,
    ExpireFox,
    ExpireSpan,
    Fox,
    KeyNorm,
    Mechanism,
    RandomEviction,
    Streaming,
    Tova,
    TransXL,
)
from .transformer import Transformer, TransformerConfig

__all__ = [
    "AdaptiveSpan",
    "Alibi",
    "Compressive",
    "Decoder",
    "ExpireFox",
    "ExpireSpan",
    "Fox",
    "KeyNorm",
    "Mechanism",
    "RandomEviction",
    "Streaming",
    "Tova",
    "TransXL",
    "Transformer",
    "TransformerConfig",
    "packed_span_attention",
    "span_attention",
]
