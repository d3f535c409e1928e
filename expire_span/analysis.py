"""What a trained model remembers (section 6 and A.1.2 of the paper)."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate, compress
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from expire_span.tasks.base import IGNORE_INDEX, Batch

from .attention import soft_mask
from .kernels.packed_layout import sample_index
from .memory.packed import Memory, from_dense, keep_rows
from .transformer import State, Transformer, TransformerBlock


@torch.no_grad()
def memory_contents(model: Transformer, state: State) -> list[tuple[Tensor, Tensor]]:
    """Find what each layer remembers for the next query.

    Args:
        model: Any Transformer.
        state: As returned by the model.

    Returns:
        For each layer, the timesteps (N,) of its memories and the soft mask m (N,) of each, averaged over the heads.
    """
    contents = []
    for layer, memory in zip(model.layers, state["layers"], strict=True):
        layer = cast(TransformerBlock, layer)
        span = layer.spans(layer.normalized(memory))  # (N, H or 1)
        m = soft_mask((state["step"] - memory.time)[:, None], span, layer.mechanism.ramp).mean(1)  # (N,)
        contents.append((memory.time, m))
    return contents


@contextmanager
def recorded_spans(model: Transformer) -> Iterator[list[list[Tensor]]]:
    """A context that records the spans of each layer, block after block: (B, H or 1, T) timesteps each."""
    spans: list[list[Tensor]] = [[] for _ in model.layers]

    def record_spans(layer_index: int):
        def hook(layer: TransformerBlock, inputs: tuple) -> None:
            hidden = inputs[0]  # (B, T, d)
            batch_size, block_size, _ = hidden.shape
            memory = from_dense(hidden, torch.arange(block_size, device=hidden.device))
            span = layer.mechanism.finite(layer.spans(layer.normalized(memory)))  # (B T, H or 1)
            spans[layer_index].append(span.unflatten(0, (batch_size, block_size)).transpose(1, 2))

        return hook

    hooks = [layer.register_forward_pre_hook(record_spans(index)) for index, layer in enumerate(model.layers)]
    try:
        yield spans
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def spans_over_time(model: Transformer, blocks: Iterable[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor]:
    """Record the span that each layer gives to each timestep when it becomes a memory (figures 9 and 12).

    Args:
        model: In any mode; it is left in evaluation mode.
        blocks: Pairs of tokens (B, T) and reach (B, T) or None, in order of time.

    Returns:
        The spans (layers, B, time) in timesteps, averaged over the heads, and the tokens (B, time).
    """
    tokens, state = [], None
    with recorded_spans(model) as spans:
        for block, reach in blocks:
            state = model.initial_state(len(block)) if state is None else state
            _, state, _ = model.eval()(block, state, reach)
            tokens.append(block)
    return torch.stack([torch.cat([span.mean(1) for span in parts], 1) for parts in spans]), torch.cat(tokens, 1)


class Reading(NamedTuple):
    """What a model made of B streams of tokens."""

    tokens: Tensor  # (B, time)
    losses: Tensor  # (B, time) nats: the cross-entropy of each timestep's target, nan where there is none
    spans: list[Tensor]  # of each layer, (B, H or 1, time) timesteps
    pooled: list[list[tuple[int, int, float]]]  # of each layer and the first stream, see `pooled_rows`
    metrics: dict[str, float]  # memory/... of `Transformer.forward`, the means over time


@torch.no_grad()
def read(model: Transformer, blocks: Iterable[Batch], span_cap: int | None = None) -> Reading:
    """Let a model read streams from their start, with empty memories.

    Args:
        model: In any mode; it is left in evaluation mode.
        blocks: In order of time, on the model's device: tokens, targets and reach of each are used.
        span_cap: Timesteps: longer spans are shortened to this, as in figure 10 (None: no limit). What is returned as
            spans is not shortened.

    Raises ValueError without a block.
    """
    tokens, losses, state = [], [], None
    pooled: list[dict[int, tuple[int, int, float]]] = [{} for _ in model.layers]  # by time
    sums: dict[str, float] = {}
    model.eval()
    with recorded_spans(model) as spans:
        for block in blocks:
            state = model.initial_state(len(block.tokens)) if state is None else state
            logits, state, metrics = model(block.tokens, state, block.reach, span_cap)
            has_target = block.targets != IGNORE_INDEX  # (B, T)
            nats = model.output_head.token_losses(logits[has_target], block.targets[has_target])
            tokens.append(block.tokens)
            losses.append(torch.full_like(block.targets, math.nan, dtype=nats.dtype).masked_scatter(has_target, nats))
            for by_time, layer, memory in zip(pooled, model.layers, state["layers"], strict=True):
                by_time.update((row[0], row) for row in pooled_rows(cast(TransformerBlock, layer), memory))
            for name in metrics:
                if name.startswith("memory/"):
                    sums[name] = sums.get(name, 0.0) + float(metrics[name]) * block.tokens.shape[1]
    if not tokens:
        raise ValueError("there is nothing to read")
    read_tokens = torch.cat(tokens, 1)
    return Reading(
        read_tokens,
        torch.cat(losses, 1),
        [torch.cat(parts, 2) for parts in spans],
        [list(by_time.values()) for by_time in pooled],
        {name: total / read_tokens.shape[1] for name, total in sums.items()},
    )


def pooled_rows(layer: TransformerBlock, memory: Memory) -> list[tuple[int, int, float]]:
    """Time, min_distance and span, in timesteps, of each pooled memory of the first stream (Compressive has them)."""
    first_stream = sample_index(memory.offsets, len(memory.time)) == 0
    memory = keep_rows(memory, (memory.min_distance > 1) & first_stream)
    if not len(memory.time):
        return []
    span = layer.spans(layer.normalized(memory)).mean(1)
    return list(zip(memory.time.tolist(), memory.min_distance.tolist(), span.tolist(), strict=True))


KINDS = ("capital letters", "other letters", "digits", "spaces", "newlines", "punctuation", "unknown")


def kind_of(character: str) -> str:
    """Which of KINDS a character is."""
    if character == "\N{REPLACEMENT CHARACTER}":
        return "unknown"
    if character.isspace():
        return "newlines" if character == "\n" else "spaces"
    if character.isdigit():
        return "digits"
    if character.isalpha():
        return "capital letters" if character.isupper() else "other letters"
    return "punctuation"


def token_groups(texts: Sequence[str], word_counts: Mapping[str, int] | None = None) -> dict[str, np.ndarray]:
    """Sort tokens into groups: which are retained (section 6)? Each is of one of KINDS, and may be in others, too.

    A token counts by its first character; one without a character, such as the first byte of several that are one
    character, by the next one.

    Args:
        texts: The text of each token.
        word_counts: How often each word (lower case) is in some large text. Of the different words in `texts`, the
            quarter with the lowest counts is called rare, that with the highest frequent (None: counted in `texts`).

    Returns:
        A mask (time,) for each group that has tokens.
    """
    text = "".join(texts) or "\N{REPLACEMENT CHARACTER}"
    starts = np.array([0, *accumulate(map(len, texts))][:-1], int).clip(max=len(text) - 1)  # (time,)

    def tokens_within(matches: Iterable[re.Match[str]]) -> np.ndarray:
        inside = np.zeros(len(text), bool)
        for match in matches:
            inside[match.start() : match.end()] = True
        return inside[starts]

    is_unknown = np.array([label.strip() in ("<unk>", "<unknown>") for label in texts], bool)
    kinds = np.where(is_unknown, "unknown", np.array([kind_of(text[start]) for start in starts.tolist()], object))
    words = list(re.finditer(r"[^\W\d_]+", text))
    is_name = [
        word[0][0].isupper() and re.search(r"[a-z,] [\[(\"']*$", text[max(0, word.start() - 5) : word.start()])
        for word in words
    ]
    groups = {kind: kinds == kind for kind in KINDS}
    groups["capitalized within a sentence"] = tokens_within(compress(words, is_name))
    groups["headings (= ... =)"] = tokens_within(re.finditer(r"^ *(=+)[^=\n].*\1 *$", text, re.MULTILINE))
    groups["links ([[...]])"] = tokens_within(re.finditer(r"\[\[[^\[\]\n]+\]\]", text))
    if words:
        in_text = Counter(word[0].lower() for word in words)
        counts = {word: (in_text if word_counts is None else word_counts).get(word, 0) for word in in_text}
        low, high = np.quantile(list(counts.values()), [0.25, 0.75])
        if low < high:
            groups["rare words"] = tokens_within(word for word in words if counts[word[0].lower()] <= low)
            groups["frequent words"] = tokens_within(word for word in words if counts[word[0].lower()] >= high)
    return {name: mask for name, mask in groups.items() if mask.any()}


def mean_of_known(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Mean over the last axis of the values that are not nan, where `known`; nan without any."""
    known = known & ~np.isnan(values)
    count = known.sum(-1)
    return np.where(count > 0, np.where(known, values, 0).sum(-1) / count.clip(min=1), math.nan)


def means_by_group(values: np.ndarray, groups: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Average over the tokens of each group: values (rows, time), such as spans (layers, time) -> (rows,)."""
    return {name: mean_of_known(values, mask) for name, mask in groups.items()}


def window_means(values: np.ndarray, size: int) -> np.ndarray:
    """Average over windows of `size` timesteps, such as the loss along the data (figure 13): (time,) -> (windows,)."""
    windows = np.pad(values, (0, -len(values) % size), constant_values=math.nan).reshape(-1, size)
    return mean_of_known(windows, np.ones_like(windows, bool))
