"""Decoding timestep by timestep gives what blocks of one timestep give, in few operators."""

import statistics

import pytest
import torch
from small_models import MECHANISMS, NEWER_MECHANISMS, small_model
from torch.utils._python_dispatch import TorchDispatchMode

from expire_span.decoding import Decoder
from expire_span.kernels import cpp_backend
from expire_span.memory import cache

BATCH, TIMESTEPS = 3, 90


@pytest.fixture(params=["torch", "cpp"])
def backend(request):
    if request.param == "cpp" and not cpp_backend.available():
        pytest.skip("needs a C++ compiler")
    return request.param


@pytest.fixture(autouse=True)
def small_caches(monkeypatch):
    monkeypatch.setattr(cache, "COLUMNS", 8)  # so that they are often full


def model_with(kind, backend, pre_norm=False):
    model = small_model(kind, pre_norm)
    for layer in model.layers:
        layer.attention.backend = backend
    return model


def random_tokens(model):
    return torch.randint(model.config.vocab_size, (BATCH, TIMESTEPS), generator=torch.Generator().manual_seed(0))


def episode_steps():
    """Timesteps since each stream's episode began, (B, T): of long episodes, short ones, and very short ones."""
    generator = torch.Generator().manual_seed(0)
    begins = torch.rand(BATCH, TIMESTEPS, generator=generator) < torch.tensor([[0.02], [0.1], [0.5]])
    steps = torch.zeros(BATCH, TIMESTEPS, dtype=torch.int64)
    for t in range(1, TIMESTEPS):
        steps[:, t] = torch.where(begins[:, t], 0, steps[:, t - 1] + 1)
    return steps


def assert_equal_memories(state, expected):
    for memory, expected_memory in zip(state["layers"], expected["layers"], strict=True):
        for name in ("time", "min_distance", "offsets"):
            assert torch.equal(getattr(memory, name), getattr(expected_memory, name))
        for rows, expected_rows in zip(
            (memory.hidden, *memory.kv), (expected_memory.hidden, *expected_memory.kv), strict=True
        ):
            torch.testing.assert_close(rows, expected_rows, rtol=0, atol=1e-12, check_dtype=False)
        if expected_memory.log_decay is not None:
            torch.testing.assert_close(memory.log_decay, expected_memory.log_decay, rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize(
    ("episodes", "pre_norm", "span_cap"), [(False, False, None), (True, True, None), (True, True, 9)]
)
@pytest.mark.parametrize("kind", MECHANISMS)
def test_decoding_equals_blocks_of_one_timestep(kind, pre_norm, episodes, span_cap, backend):
    check_decoding(model_with(kind, backend, pre_norm), episodes, span_cap)


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "threshold"), [*((kind, 1e-300) for kind in NEWER_MECHANISMS), ("fox", 1e-2), ("expire_fox", 1e-2)]
)
def test_decoding_by_newer_mechanisms_equals_blocks_of_one_timestep(kind, threshold):
    model = small_model(kind, pre_norm=True)
    for mechanism in model.mechanisms:
        mechanism.threshold = threshold
    check_decoding(model, episodes=True, span_cap=None)


def check_decoding(model, episodes, span_cap):
    tokens, reach = random_tokens(model), episode_steps() if episodes else None
    state = model.initial_state(BATCH)
    decoder = Decoder(model, state, span_cap)
    for t in range(TIMESTEPS):
        block_reach = None if reach is None else reach[:, t : t + 1]
        expected, state, expected_metrics = model(tokens[:, t : t + 1], state, block_reach, span_cap)
        logits = decoder(tokens[:, t], None if reach is None else reach[:, t])
        torch.testing.assert_close(logits, expected[:, 0], rtol=0, atol=1e-12)
        del expected_metrics["span_loss"]
        expected_metrics = {name: float(value) for name, value in expected_metrics.items()}
        assert decoder.pop_metrics() == pytest.approx(expected_metrics, abs=1e-9)
        if t % 10 == 9:
            assert_equal_memories(decoder.state(), state)


@torch.no_grad()
@pytest.mark.parametrize("kind", MECHANISMS)
def test_blocks_and_decoders_continue_each_other_and_leave_the_state_as_it_is(kind, backend):
    model = model_with(kind, backend)
    tokens = random_tokens(model)
    expected, expected_state, _ = model(tokens[:, :64], model.initial_state(BATCH))
    after_block = model(tokens[:, :32], model.initial_state(BATCH))[1]
    for _ in range(2):
        decoder = Decoder(model, after_block)
        logits = torch.stack([decoder(tokens[:, t]) for t in range(32, 48)], 1)
        after_decoder = decoder.state()
        decoder(tokens[:, 0])  # does not change the state that was taken before
        last, state, _ = model(tokens[:, 48:64], after_decoder)
        torch.testing.assert_close(torch.cat([logits, last], 1), expected[:, 32:], rtol=0, atol=1e-12)
        assert_equal_memories(state, expected_state)


class CountOperators(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        self.count += 1
        return operator(*arguments, **(options or {}))


@pytest.mark.parametrize("kind", MECHANISMS)
def test_a_timestep_of_two_layers_takes_at_most_120_operators(kind):
    if not cpp_backend.available():
        pytest.skip("needs a C++ compiler")
    model = model_with(kind, "cpp")
    tokens, decoder = random_tokens(model), Decoder(model, model.initial_state(BATCH))
    counts = []
    for t in range(TIMESTEPS):
        with CountOperators() as operators:
            decoder(tokens[:, t])
        counts.append(operators.count)
    assert 0 < statistics.mean(counts[-20:]) <= 120


def test_a_model_in_training_is_refused():
    model = small_model("expire_span").train()
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        Decoder(model, model.initial_state(BATCH))
