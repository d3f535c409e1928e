"""Small models of each mechanism, whose memories expire within a few blocks."""

import torch

from expire_span import (
    AdaptiveSpan,
    Alibi,
    Compressive,
    ExpireFox,
    ExpireSpan,
    Fox,
    KeyNorm,
    RandomEviction,
    Streaming,
    Tova,
    Transformer,
    TransformerConfig,
    TransXL,
)

MECHANISMS = {
    "trans_xl": lambda: TransXL(max_span=40),
    "adaptive_span": lambda: AdaptiveSpan(num_heads=3, max_span=40, ramp=4.0, alpha=0.1, init_span_ratio=0.4),
    "compressive": lambda: Compressive(max_span=68, compressed_size=6),
    "expire_span": lambda: ExpireSpan(12, max_span=60, ramp=3.0, alpha=0.1, num_positions=16, init_span_ratio=0.3),
}
NEWER_MECHANISMS = {  # with all the memories that gates leave
    "fox": lambda: Fox(12, num_heads=3, max_span=40, threshold=1e-300),
    "expire_fox": lambda: ExpireFox(12, 3, 60, ramp=3.0, alpha=0.1, num_positions=16, threshold=1e-300),
    "alibi": lambda: Alibi(num_heads=3, max_span=30),
    "key_norm": lambda: KeyNorm(max_span=40, num_kept=12),
    "tova": lambda: Tova(max_span=40, num_kept=12),
    "random_eviction": lambda: RandomEviction(max_span=40, num_kept=12),
    "streaming": lambda: Streaming(max_span=20, num_sinks=3),
}


def small_model(kind, pre_norm=False):
    """A small float64 model with spans that differ from memory to memory, layer to layer and head to head."""
    torch.manual_seed(0)
    config = TransformerConfig(vocab_size=11, hidden_size=12, num_heads=3, feedforward_size=20, pre_norm=pre_norm)
    make = {**MECHANISMS, **NEWER_MECHANISMS}[kind]
    model = Transformer(config, [make() for _ in range(2)]).double().eval()
    for mechanism in model.mechanisms:
        if kind in NEWER_MECHANISMS:
            for parameter in mechanism.parameters():
                torch.nn.init.normal_(parameter, std=0.7)
        if kind == "expire_span":
            torch.nn.init.normal_(mechanism.weight)
        if kind == "adaptive_span":
            torch.nn.init.uniform_(mechanism.span_ratio)
    return model


def run_in_blocks(model, tokens, block_size, reach=None, span_cap=None):
    """The logits (B, T, num_classes), the last state, and the mean memory size over all queries."""
    state, logits, size_sum = model.initial_state(len(tokens)), [], 0.0
    for start in range(0, tokens.shape[1], block_size):
        block = slice(start, start + block_size)
        block_reach = None if reach is None else reach[:, block]
        block_logits, state, metrics = model(tokens[:, block], state, block_reach, span_cap)
        logits.append(block_logits)
        size_sum += metrics["memory/size"].item() * block_logits.shape[1]
    return torch.cat(logits, 1), state, size_sum / tokens.shape[1]
