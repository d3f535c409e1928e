"""Acting and learning see the same, and learn what pays."""

from itertools import pairwise

import pytest
import torch
from tiny import tiny
from tolerance import assert_equal

from expire_span.runner import actor_critic
from expire_span.runner.loop import interval, train, train_update
from expire_span.runner.training import Training

MODELS = ("trans_xl", "adaptive_span", "compressive", "expire_span")


@pytest.mark.parametrize("block", [1, 5, 16])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("task", ["corridor", "portal"])
def test_acting_step_by_step_and_learning_over_the_block_give_the_same_log_probabilities(task, model, block, tmp_path):
    config = tiny(f"model={model}", f"train.block={block}", "run.precision=float64", "memory.init=0.4", task=task)
    training = Training(config, tmp_path)
    torch.nn.init.normal_(training.model.output.weight)  # a policy with preferences
    for mechanism in training.model.mechanisms:
        if hasattr(mechanism, "weight"):
            torch.nn.init.normal_(mechanism.weight)  # and spans that differ, so that memories expire within an episode
    state = training.model.initial_state(4)
    for _ in range(60 // block):
        acted, after, _ = actor_critic.act(training.model, state, training.source, block)
        scores, learned, _ = training.model(acted["observation"], state, acted["reach"])
        moves, value = actor_critic.split(scores)
        assert_equal("log p", moves.gather(-1, acted["action"][..., None])[..., 0], acted["log_p"])
        assert_equal("value", value, acted["value"])
        for one, other in zip(after["layers"], learned["layers"], strict=True):
            assert torch.equal(one.offsets, other.offsets)
        state = learned
    assert (acted["reach"].amax(1) < 60).any()  # some began a new episode on the way


def test_advantages_are_those_of_a_loop_over_each_episode():
    g = torch.Generator().manual_seed(0)
    block = {name: torch.randn(3, 12, generator=g, dtype=torch.double) for name in ("reward", "value")}
    block |= {"done": torch.rand(3, 12, generator=g) < 0.2, "next_value": torch.randn(3, generator=g).double()}
    ours = actor_critic.advantages(block, discount=0.9, trace=0.8)
    for b in range(3):
        values = [*block["value"][b].tolist(), block["next_value"][b].item()]
        for t in range(12):
            total, weight = 0.0, 1.0
            for k in range(t, 12):
                done = bool(block["done"][b, k])
                total += weight * (block["reward"][b, k].item() + (0 if done else 0.9 * values[k + 1]) - values[k])
                weight *= 0.9 * 0.8
                if done:
                    break
            assert ours[b, t].item() == pytest.approx(total)


def test_with_one_epoch_the_gradient_is_that_of_plain_actor_critic(tmp_path):
    plain = ["actor_critic.epochs=1", "actor_critic.normalise=false", "actor_critic.entropy=0.0"]
    training = Training(tiny(*plain, "actor_critic.value=0.0", "run.precision=float64", task="corridor"), tmp_path)
    start = training.model.initial_state(4)
    training.state = start
    loss, _ = actor_critic.step(training, alpha=0.0)
    ours = torch.autograd.grad(loss, training.model.output.weight)[0]
    again = Training(training.config, tmp_path)
    again.model.load_state_dict(training.model.state_dict())
    block, _, _ = actor_critic.act(again.model, start, again.source, training.config.train.block)
    moves, _ = actor_critic.split(again.model(block["observation"], start, block["reach"])[0])
    gain = actor_critic.advantages(block, training.config.actor_critic.discount, training.config.actor_critic.trace)
    surrogate = -(moves.gather(-1, block["action"][..., None])[..., 0] * gain).mean()
    assert_equal("gradient", ours, torch.autograd.grad(surrogate, again.model.output.weight)[0])


def test_each_block_is_learned_from_as_often_as_there_are_epochs(tmp_path):
    training = Training(tiny("actor_critic.epochs=3", task="corridor"), tmp_path)
    times = []
    for _ in range(7):
        train_update(training)
        times.append(training.state["now"].item())
    assert training.blocks == 3
    assert times == [0, 0, 16, 16, 16, 32, 32]


@pytest.mark.parametrize("task", ["corridor", "portal"])
def test_a_stopped_run_goes_on_as_if_it_had_not_been_stopped(task, tmp_path):
    config = tiny("actor_critic.epochs=2", "train.updates=6", task=task)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    for each in (whole, halves):
        each.mkdir()
    train(config, whole)
    stopped = Training(config, halves)
    for _ in range(3):  # between the two epochs of a block
        train_update(stopped)
        if stopped.update == 2:
            stopped.kind.interval(stopped, stopped.meter.means())
    stopped.save()
    train(config, halves)
    ends = [Training(config, each) for each in (whole, halves)]
    assert all(each.restore() for each in ends)
    for one, other in zip(ends[0].model.parameters(), ends[1].model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_evaluation_without_an_end_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match="evaluation.blocks must be a number"):
        Training(tiny("evaluation.blocks=null", task="corridor"), tmp_path)


def test_an_update_that_would_learn_from_one_block_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"train.accumulate must be 1 where actor_critic.epochs is more"):
        Training(tiny("train.accumulate=2", "actor_critic.epochs=2", task="corridor"), tmp_path)


@pytest.mark.parametrize("task", ["corridor", "portal"])
def test_in_evaluation_every_episode_that_begins_in_its_blocks_counts_however_long_it_lasts(task, tmp_path):
    config = tiny("evaluation.block=3", "evaluation.blocks=2", task=task)
    training = Training(config, tmp_path)
    figures = actor_critic.evaluate(training.model, training.task, "test", config, training.device)

    acting, lengths = actor_critic.source(training.task, config, training.device, "test"), []
    block, _, _ = actor_critic.act(training.model, training.model.initial_state(4), acting, 200)
    for done in block["done"]:
        ends = [-1, *done.nonzero().flatten().tolist()]  # an episode begins after each of these
        lengths += [end - before for before, end in pairwise(ends) if before + 1 < 6]
    assert max(lengths) > 6
    assert figures["test/rl/length"] == pytest.approx(sum(lengths) / len(lengths))


def test_a_block_s_time_is_told_once_it_is_learned_from_and_holds_all_its_epochs(tmp_path):
    training = Training(tiny("actor_critic.epochs=3", task="corridor"), tmp_path)
    told = []
    for _ in range(7):
        train_update(training)
        told.append("perf/ms_per_batch" in interval(training))
    assert told == [True, False, False] * 2 + [True]
    assert not training.watch.laps


def test_evaluation_tells_success_by_the_corridors_length_beyond_those_trained_on_too(tmp_path):
    wide = ["task.evaluation_longest=40", "evaluation.batch=64", "evaluation.blocks=20"]
    config = tiny("task.first_longest=4", "task.longest=4", *wide, task="corridor")
    training = Training(config, tmp_path)
    figures = actor_critic.evaluate(training.model, training.task, "test", config, training.device)
    by_length = {name: share for name, share in figures.items() if name.startswith("test/rl/success_distance_")}
    assert {"test/rl/success_distance_2_4", "test/rl/success_distance_16_32"} <= set(by_length)
    assert min(by_length.values()) <= figures["test/rl/success"] <= max(by_length.values())
