"""What only training shows. Minutes each: `make test-slow`."""

import math

import pytest
import torch
from tiny import composed, tiny

from expire_span.runner.loop import train
from expire_span.runner.record import read_metrics
from expire_span.runner.settings import checked
from expire_span.runner.training import Training

pytestmark = pytest.mark.slow
QUIET = ["wandb.mode=disabled", "run.device=cpu", "run.threads=1", "run.progress=false"]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_expire_span_mini_copies_with_less_than_a_quarter_of_the_full_memory(seed, tmp_path):
    figures = train(checked(composed("task=copy", "model=expire_span", "size=mini", f"seed={seed}", *QUIET)), tmp_path)
    everything = (256 - 1) / 2  # what Transformer-XL's queries see on average when nothing is forgotten
    assert figures["test/accuracy"] >= 0.95
    assert figures["test/memory/size"] < everything / 4


def test_transformer_xl_of_the_same_memory_stays_near_guessing_beyond_its_reach(tmp_path):
    config = checked(composed("task=copy", "model=trans_xl", "size=mini", "model.max_span=17", *QUIET))
    figures = train(config, tmp_path)
    assert figures["test/accuracy_distance_128_256"] < 0.35  # guessing: 0.25


def test_expire_span_mini_remembers_collisions_alone(tmp_path):
    config = checked(composed("task=collision", "model=expire_span", "size=mini", *QUIET))
    figures = train(config, tmp_path)
    assert figures["test/error"] < 0.1  # guessing: 0.75
    assert figures["test/memory/size"] < 32


def test_transformer_xl_of_the_same_memory_forgets_most_collisions(tmp_path):
    config = checked(composed("task=collision", "model=trans_xl", "size=mini", "model.max_span=25", *QUIET))
    figures = train(config, tmp_path)
    assert figures["test/error"] > 0.25


def test_expire_span_mini_remembers_who_gave_an_instruction(tmp_path):
    figures = train(checked(composed("task=instruction", "model=expire_span", "size=mini", *QUIET)), tmp_path)
    assert figures["test/accuracy_distance_128_256"] > 0.3  # guessing who gave it: 0.25 at best
    assert figures["test/memory/size"] < 64


def test_expire_span_mini_finds_the_right_door_of_a_corridor(tmp_path):
    figures = train(checked(composed("task=corridor", "model=expire_span", "size=mini", *QUIET)), tmp_path)
    assert figures["test/rl/success"] > 0.95  # guessing: 0.5
    assert figures["test/memory/size"] < 12


def test_expire_span_mini_passes_the_portals_to_the_last_room(tmp_path):
    figures = train(checked(composed("task=portal", "model=expire_span", "size=mini", *QUIET)), tmp_path)
    assert figures["test/rl/rooms"] > 5.7  # of 6
    assert figures["test/memory/size"] < 8


def test_small_texts_are_learned_and_a_larger_alpha_keeps_fewer_memories(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"The square of {n} is {n * n}, and its double {2 * n}.\n" for n in range(20_000)))
    sizes = []
    for alpha in ("1e-6", "1e-3"):
        folder = tmp_path / alpha
        folder.mkdir()
        figures = train(
            checked(composed("task=text", f"task.path={text}", f"memory.alpha={alpha}", "train.updates=300", *QUIET)),
            folder,
        )
        assert figures["test/bpb"] < 2.0  # bytes alone, without their neighbours, cost more than 4
        sizes.append(figures["test/memory/size"])
    assert sizes[1] < sizes[0]


def test_compiled_training_follows_the_same_losses(tmp_path):
    curves = []
    for compiled in ("false", "true"):
        folder = tmp_path / compiled
        folder.mkdir()
        torch.compiler.reset()
        train(tiny(f"run.compile={compiled}", "train.updates=8", "run.log_every=1", "run.precision=float64"), folder)
        curves.append([row["train/loss"] for row in read_metrics(folder / "metrics.jsonl") if "train/loss" in row])
    assert curves[1] == pytest.approx(curves[0], rel=1e-6)


def test_deterministic_training_gives_the_same_weights_twice(tmp_path):
    weights = []
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            config = tiny("run.deterministic=true", "run.threads=2", "train.updates=8", "transformer.dropout=0.1")
            train(config, folder)
            weights.append(Training(config, folder))
            weights[-1].restore()
        finally:
            torch.use_deterministic_algorithms(False)
            torch.set_num_threads(1)
    for one, two in zip(weights[0].model.parameters(), weights[1].model.parameters(), strict=True):
        assert torch.equal(one, two)
        assert math.isfinite(one.sum().item())
