"""The predictions for a run: sizes that agree with what is built, and micro-batches that fit."""

from types import SimpleNamespace

import pytest
import torch
from tiny_config import COPY, compose_config, each_model

from expire_span.runner.build import build_model, build_optimizer
from expire_span.runner.config.schema import validate
from expire_span.runner.cost_model import (
    DEVICES,
    expected_memories,
    largest_micro_batch,
    memory_by_part,
    run_sizes,
    seconds_per_update,
)


def tiny(*overrides):
    return validate(compose_config(*COPY, "train.batch_size=12", *overrides))


@pytest.mark.parametrize("model", each_model())
def test_a_run_has_as_many_parameters_as_its_model(model):
    config = tiny(f"model={model}")
    built = build_model(config, SimpleNamespace(vocab_size=9, num_classes=5), torch.device("cpu"))
    assert run_sizes(config, 9, 5).num_parameters == sum(parameter.numel() for parameter in built.parameters())


def test_an_adaptive_softmax_is_counted():
    config = tiny("transformer.cutoffs=[20,50]")
    built = build_model(config, SimpleNamespace(vocab_size=90, num_classes=90), torch.device("cpu"))
    assert run_sizes(config, 90, 90).num_parameters == sum(parameter.numel() for parameter in built.parameters())


@pytest.mark.parametrize(("optimizer", "numbers"), [("Adam", 2), ("RMSprop", 1), ("SGD", 0)])
def test_the_optimizer_s_state_is_counted(optimizer, numbers):
    config = tiny(f"optimizer._target_=torch.optim.{optimizer}")
    assert run_sizes(config, 9, 9).optimizer_numbers == numbers
    model = build_model(config, SimpleNamespace(vocab_size=9, num_classes=9), torch.device("cpu"))
    build_optimizer(config, model)


def test_the_largest_micro_batch_is_the_largest_divisor_that_fits_with_a_margin():
    config = tiny()
    sizes = run_sizes(config, 4, 4)
    memories = expected_memories(sizes.mechanism)
    needed = {size: sum(memory_by_part(sizes, 12, size, memories, "cpu").values()) for size in (1, 2, 3, 4, 6, 12)}
    assert list(needed.values()) == sorted(needed.values())
    for size, number in needed.items():
        assert largest_micro_batch(config, 4, 4, 12, bytes_available=number / 0.89) == size
    with pytest.raises(ValueError, match=r"micro_batch_size=auto: even one stream at a time is predicted to need"):
        largest_micro_batch(config, 4, 4, 12, bytes_available=needed[1])


def test_waiting_memories_take_no_memory_of_the_device_when_offloaded():
    sizes = run_sizes(tiny(), 4, 4)
    held = memory_by_part(sizes, 12, 2, 10, "cuda")["memories held"]
    sizes.config.train.offload_memory = True
    assert memory_by_part(sizes, 12, 2, 10, "cuda")["memories held"] == held / 3  # this part's and the next one's


def test_blocks_without_targets_and_other_devices_take_time():
    config = tiny("task.episode_length=64", "train.block_size=16", "task.initial_episode_length=32")
    seconds = seconds_per_update(run_sizes(config, 4, 4), 12, 12, 10, DEVICES["h100"], processes=2)
    assert 0 < seconds["blocks without targets"] < 3 * seconds["training blocks"]
    assert seconds["reducing gradients"] > 0
