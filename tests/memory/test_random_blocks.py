"""Memories over random splits of a text into blocks: equal outputs, and what is kept and seen against plain loops."""

import pytest
import torch
from assertions import assert_equal
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import MECHANISMS, run_in_blocks, small_model

import expire_span.transformer as transformer

TIMESTEPS = 120


def spans_of_all(model, tokens):
    """The spans (TIMESTEPS, H or 1) of all hidden states of each layer, with one sample and nothing deleted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer, "keep_rows", lambda memory, *_: memory)
        _, state, _ = run_in_blocks(model, tokens, TIMESTEPS // 2)
    return [layer.spans(memory).tolist() for layer, memory in zip(model.layers, state["layers"], strict=True)]


def seen_by_query(mechanism, spans, time):
    """How many memories query `time` sees, averaged over the heads, and the timesteps that some head sees."""
    seen = []
    for i in range(time):
        distance = time - i
        in_reach = mechanism.max_distance is None or distance <= mechanism.max_distance
        seen.append([in_reach and 1 + (span - distance) / mechanism.ramp > 0 for span in spans[i]])
    return sum(sum(heads) / len(heads) for heads in seen), [i for i in range(time) if any(seen[i])]


@pytest.mark.parametrize("kind", MECHANISMS)
@settings(deadline=None, derandomize=True, max_examples=4)
@given(lengths=st.lists(st.integers(1, 64), min_size=2, max_size=20), seed=st.integers(0, 2**31))
def test_a_text_in_random_blocks_gives_equal_outputs_and_the_memories_of_plain_loops(kind, lengths, seed):
    model = small_model(kind)
    tokens = torch.randint(11, (2, TIMESTEPS), generator=torch.Generator().manual_seed(seed))
    ends = [end for end in torch.tensor(lengths).cumsum(0).tolist() if end < TIMESTEPS]
    blocks = [block for block in tokens.tensor_split(ends, 1) if block.shape[1] <= 64]
    tokens = torch.cat(blocks, 1)  # Compressive takes no longer blocks
    with torch.no_grad():
        spans = [spans_of_all(model, tokens[[sample]]) for sample in range(2)]
        expected, _, _ = run_in_blocks(model, tokens, 1)
        state, logits = model.initial_state(2), []
        for block in blocks:
            begin = int(state["step"])
            block_logits, state, metrics = model(block, state)
            logits.append(block_logits)
            end = int(state["step"])
            for layer, memory in enumerate(state["layers"]):
                mechanism, size, held = model.mechanisms[layer], 0.0, 0
                for sample in range(2):
                    if kind == "compressive":
                        counts = [
                            min(t, 68) + sum(68 <= t - i <= 95 for i in range(0, t, 4)) for t in range(begin, end)
                        ]
                        counts.append(min(end, 68) + sum(68 < end - i <= 95 for i in range(0, end, 4)))
                    else:
                        seen = [seen_by_query(mechanism, spans[sample][layer], t) for t in range(begin, end + 1)]
                        counts, kept = [count for count, _ in seen], seen[-1][1]
                        rows = slice(*memory.offsets[sample : sample + 2].tolist())
                        assert memory.time[rows].tolist() == kept
                    size += sum(counts[:-1]) / len(counts[:-1]) / 2
                    held += counts[-1] if kind == "compressive" else len(kept)
                assert metrics[f"memory/size_layer_{layer}"].item() == pytest.approx(size, rel=1e-6)
                assert metrics[f"memory/held_layer_{layer}"] == held / 2
    assert_equal("logits", torch.cat(logits, 1), expected)
