"""The cost model counts the operations that torch counts, and the bytes that autograd saves."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny_config import OF_THE_PAPER, compose_config
from torch.utils.flop_counter import FlopCounterMode

from expire_span import Transformer, TransformerConfig, TransXL
from expire_span.memory.packed import from_dense
from expire_span.runner.build import autocast, build_model
from expire_span.runner.config.schema import validate
from expire_span.runner.cost_model import initial_memories, run_sizes, step_cost
from expire_span.runner.step_cost import StepCost

SMALL = StepCost(TransformerConfig(30, 12, 3, 20), 2, batch_size=2, block_size=8, num_memories=32, num_positions=32)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_the_operations_are_those_that_torch_counts(pre_norm):
    config = TransformerConfig(30, 12, 3, 20, attention_backend="reference", pre_norm=pre_norm)
    model = Transformer(config, [TransXL(32) for _ in range(2)])
    past = from_dense(torch.randn(2, 32, 12), torch.arange(-32, 0))
    with FlopCounterMode(display=False) as counter:
        model(torch.randint(30, (2, 8)), {"step": torch.tensor(0), "layers": [past, past]})[0].sum().backward()
    assert sum(replace(SMALL, transformer=config).operations().values()) == counter.get_total_flops()


def test_the_forward_pass_alone_has_the_operations_that_torch_counts():
    config = TransformerConfig(30, 12, 3, 20, attention_backend="reference")
    model = Transformer(config, [TransXL(32) for _ in range(2)])
    past = from_dense(torch.randn(2, 32, 12), torch.arange(-32, 0))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(30, (2, 8)), {"step": torch.tensor(0), "layers": [past, past]})
    assert sum(SMALL.operations(backward=False).values()) == counter.get_total_flops()


def test_the_roofline_is_the_longer_of_computing_and_moving():
    assert SMALL.roofline_seconds(1e6, 1e30) == sum(SMALL.operations().values()) / 1e6
    assert SMALL.roofline_seconds(1e30, 1e6) == SMALL.bytes_moved() / 1e6


SIZES = ["transformer.num_layers=2", "transformer.hidden_size=64", "transformer.feedforward_size=128"]
SIZES += ["transformer.num_heads=2", "train.batch_size=3", "train.block_size=16", "memory.max_span=64", "memory.ramp=8"]


OPTIONS = {
    "plain": ["transformer.pre_norm=false"],
    "pre_norm": ["transformer.pre_norm=true", "transformer.dropout=0.2", "transformer.embedding_dropout=0.2"],
    "bfloat16": ["transformer.pre_norm=false", "run.precision=bfloat16"],
}
CASES = [(model, option) for model in (*OF_THE_PAPER, "expire_fox") for option in OPTIONS]


@pytest.mark.parametrize(("model", "option"), CASES)
def test_the_bytes_saved_for_the_backward_pass_are_predicted_within_5_percent(model, option):
    config = validate(compose_config("task=enwik8", f"model={model}", *SIZES, *OPTIONS[option]))
    sizes = run_sizes(config, vocab_size=64, num_classes=64)
    transformer = build_model(config, SimpleNamespace(vocab_size=64, num_classes=64), torch.device("cpu"))
    state = transformer.initial_state(3)
    with torch.no_grad():
        for _ in range(24):  # fills the memory
            state = transformer(torch.randint(64, (3, 16)), state)[1]
    excluded = [*transformer.parameters(), *transformer.buffers(), *(memory.hidden for memory in state["layers"])]
    saved = {tensor.untyped_storage().data_ptr(): 0 for tensor in excluded}

    def count(tensor):
        saved.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor), autocast(config, torch.device("cpu")):
        outputs = transformer(torch.randint(64, (3, 16)), state)  # keeps all that is saved alive
    cast_weights = 2 * (2 * (2 * 64 * 64 + 2 * 64 * 128) + 64 * 64) if option == "bfloat16" else 0  # a part of its own
    predicted = step_cost(sizes, 3, initial_memories(sizes.mechanism), "cpu").saved_bytes()
    assert predicted == pytest.approx(sum(saved.values()) - cast_weights, rel=0.05)
    del outputs
