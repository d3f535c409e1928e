"""Acting and learning see the same memories, and learning follows the equations of GAE and PPO."""

from itertools import pairwise

import pytest
import torch
from assertions import assert_equal
from tiny_config import each_model, tiny_config

from expire_span.runner.micro_batches import MicroBatches
from expire_span.runner.objectives.actor_critic import (
    ActionSampler,
    Actor,
    ActorCritic,
    collect_rollout,
    compute_gae,
    policy_and_value,
)
from expire_span.runner.train import interval_metrics, train, train_step
from expire_span.runner.trainer import Trainer, build_task
from expire_span.tasks.actions import Categorical


def act(model, state, envs, generator, num_steps):
    """A rollout, and the state after it."""
    states = MicroBatches(model, envs.num_envs)
    states[0] = state
    actor = Actor(model, states)
    sampler = ActionSampler(generator, slice(0, envs.num_envs), envs.num_envs)
    rollout, _ = collect_rollout(actor, envs, sampler, num_steps)
    state = actor.decoders[0].state()
    rollout["next_value"] = actor(envs.observe(), envs.steps)[:, -1]
    return rollout, state


@pytest.mark.parametrize("block_size", [1, 5, 16])
@pytest.mark.parametrize("model", each_model())
@pytest.mark.parametrize("task", ["corridor", "portal"])
def test_acting_step_by_step_and_learning_from_the_block_give_the_same_log_probabilities(
    task, model, block_size, tmp_path
):
    sizes = [f"train.block_size={block_size}", "run.precision=float64", "memory.init_span_ratio=0.4"]
    trainer = Trainer(tiny_config(f"model={model}", *sizes, task=task), tmp_path)
    torch.nn.init.normal_(trainer.model.output_head.weight)  # a policy with preferences
    for mechanism in trainer.model.mechanisms:
        if hasattr(mechanism, "weight"):
            torch.nn.init.normal_(mechanism.weight)  # spans that differ, so that memories expire within an episode
    objective, state = trainer.objective, trainer.model.initial_state(4)
    for _ in range(48 // block_size):
        rollout, acting_state = act(trainer.model, state, objective.envs, objective.generator, block_size)
        outputs, learning_state, _ = trainer.model(rollout["observation"], state, rollout["reach"])
        policy, value = policy_and_value(outputs, trainer.task.action_distribution)
        assert_equal("log prob", policy.log_prob(rollout["action"]), rollout["log_prob"])
        assert_equal("value", value, rollout["value"])
        for acting_memory, learning_memory in zip(acting_state["layers"], learning_state["layers"], strict=True):
            assert torch.equal(acting_memory.offsets, learning_memory.offsets)
        state = learning_state
    assert (rollout["reach"].amax(1) < 48).any()  # some streams began a new episode on the way


@pytest.mark.parametrize("bootstrap_truncated", [False, True])
def test_advantages_equal_those_of_a_loop_over_each_episode(bootstrap_truncated):
    generator = torch.Generator().manual_seed(0)
    rollout = {name: torch.randn(5, 20, generator=generator, dtype=torch.double) for name in ("reward", "value")}
    rollout["done"] = torch.rand(5, 20, generator=generator) < 0.3
    rollout["truncated"] = rollout["done"] & (torch.rand(5, 20, generator=generator) < 0.5)
    rollout["next_value"] = torch.randn(5, generator=generator).double()
    advantages = compute_gae(rollout, 0.9, 0.8, bootstrap_truncated)
    for b in range(5):
        values = [*rollout["value"][b].tolist(), rollout["next_value"][b].item()]
        for t in range(20):
            total, weight = 0.0, 1.0
            for k in range(t, 20):
                done, truncated = bool(rollout["done"][b, k]), bool(rollout["truncated"][b, k])
                goes_on = not done or (truncated and bootstrap_truncated)
                total += weight * (rollout["reward"][b, k].item() + goes_on * 0.9 * values[k + 1] - values[k])
                weight *= 0.9 * 0.8
                if done:
                    break
            assert advantages[b, t].item() == pytest.approx(total)


@pytest.mark.parametrize("task", ["corridor", "portal"])
def test_with_bootstrapping_each_episode_shows_its_last_observation_and_nothing_is_learned_from_that(task, tmp_path):
    config = tiny_config("actor_critic.bootstrap_truncated=true", "train.block_size=200", task=task)
    trainer = Trainer(config, tmp_path)
    block = trainer.objective.next_block(trainer.model, trainer.states)
    assert block["truncated"].any()
    assert torch.equal(block["resetting"][:, 1:], block["done"][:, :-1])
    assert torch.equal(block["reach"][:, 1:] == 0, block["resetting"][:, :-1])
    assert not (block["done"] | (block["reward"] != 0))[block["resetting"]].any()
    assert torch.equal(block["weight"] == 0, block["resetting"])
    assert block["weight"].mean().item() == pytest.approx(1)

    def gradient(name):
        part = block[name].clone().requires_grad_()
        trainer.objective.epoch = 0
        loss = trainer.objective.loss(trainer.model, block | {name: part}, trainer.states, 0, 0.0, 0.0)
        return torch.autograd.grad(loss, part)[0]

    for name in ("advantage", "return"):
        assert torch.equal(gradient(name) == 0, block["resetting"])


@pytest.mark.parametrize("task", ["corridor", "portal"])
def test_episodes_that_show_their_last_observation_are_otherwise_the_same(task):
    env_task = build_task(tiny_config(task=task))
    generator = torch.Generator().manual_seed(0)
    for seed in range(20):
        plain = env_task.make_envs(1, seed=seed)
        delayed = env_task.make_envs(1, seed=seed, autoreset_mode="next_step")
        assert torch.equal(plain.observe(), delayed.observe())
        assert plain.steps == delayed.steps == 0
        done = False
        while not done:
            action = torch.randint(4, (1,), generator=generator)
            (reward, done), delayed_step = plain.step(action), delayed.step(action)
            assert (reward, done) == delayed_step
            assert plain.episode_info == delayed.episode_info
        assert delayed.resetting
        assert delayed.steps == plain.episode_info["episode_length"]
        reward, done = delayed.step(action)
        assert (reward, done, delayed.steps, delayed.resetting) == (0, False, 0, False)


def test_with_one_epoch_the_gradient_is_that_of_plain_actor_critic(tmp_path):
    plain = ["update_epochs=1", "normalize_advantage=false", "entropy_coef=0.0", "value_coef=0.0"]
    overrides = [f"actor_critic.{override}" for override in plain]
    trainer = Trainer(tiny_config(*overrides, "run.precision=float64", task="corridor"), tmp_path)
    start = trainer.model.initial_state(4)
    block = trainer.objective.next_block(trainer.model, trainer.states)
    loss = trainer.objective.loss(trainer.model, block, trainer.states, 0, span_loss_scale=0.0, progress=0.0)
    gradient = torch.autograd.grad(loss, trainer.model.output_head.weight)[0]

    again = Trainer(trainer.config, tmp_path)
    again.model.load_state_dict(trainer.model.state_dict())
    num_steps, settings = trainer.config.train.block_size, trainer.config.actor_critic
    rollout, _ = act(again.model, start, again.objective.envs, again.objective.generator, num_steps)
    policy, _ = policy_and_value(again.model(rollout["observation"], start, rollout["reach"])[0], Categorical)
    advantages = compute_gae(rollout, settings.discount, settings.gae_lambda)
    surrogate = -(policy.log_prob(rollout["action"]) * advantages).mean()
    assert_equal("gradient", gradient, torch.autograd.grad(surrogate, again.model.output_head.weight)[0])


def test_policy_and_value_loss_kl_and_clip_fraction_are_logged_and_add_up(tmp_path):
    overrides = ["actor_critic.update_epochs=3", "actor_critic.final_entropy_coef=0.04", "memory.alpha=0"]
    trainer = Trainer(tiny_config(*overrides, task="corridor"), tmp_path)
    for _ in range(3):
        train_step(trainer)
    metrics = {name: values[-1] for name, values in trainer.averager.values().items()}
    settings = trainer.config.actor_critic
    total = metrics["train/policy_loss"] + settings.value_coef * metrics["train/value_loss"]
    assert metrics["train/loss"] == pytest.approx(total - settings.entropy_coef * metrics["train/entropy"], abs=1e-5)
    assert metrics["train/approx_kl"] > 0  # by the third epoch the policy has moved
    assert 0 <= metrics["train/clip_fraction"] <= 1


def test_each_rollout_is_used_for_as_many_updates_as_there_are_epochs(tmp_path):
    trainer = Trainer(tiny_config("actor_critic.update_epochs=3", task="corridor"), tmp_path)
    timesteps = []
    for _ in range(7):
        train_step(trainer)
        timesteps.append(trainer.states[0]["step"].item())
    assert trainer.objective.blocks == 3
    assert timesteps == [0, 0, 16, 16, 16, 32, 32]


@pytest.mark.parametrize(("task", "bootstrap_truncated"), [("corridor", False), ("corridor", True), ("portal", False)])
def test_a_stopped_run_resumes_as_if_it_had_not_been_stopped(task, bootstrap_truncated, tmp_path):
    bootstrap = f"actor_critic.bootstrap_truncated={bootstrap_truncated}"
    config = tiny_config("actor_critic.update_epochs=2", "train.updates=6", bootstrap, task=task)
    uninterrupted, interrupted = tmp_path / "uninterrupted", tmp_path / "interrupted"
    for folder in (uninterrupted, interrupted):
        folder.mkdir()
    train(config, uninterrupted)
    stopped = Trainer(config, interrupted)
    for _ in range(3):  # between the two epochs of a rollout
        train_step(stopped)
        if stopped.update == 2:
            interval_metrics(stopped)
    stopped.save_checkpoint()
    train(config, interrupted)
    trainers = [Trainer(config, folder) for folder in (uninterrupted, interrupted)]
    assert all(trainer.load_checkpoint() for trainer in trainers)
    for expected, parameter in zip(*(trainer.model.parameters() for trainer in trainers), strict=True):
        assert torch.equal(expected, parameter)


def test_an_evaluation_that_would_never_end_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match="eval.max_blocks must be a number"):
        Trainer(tiny_config("eval.max_blocks=null", task="corridor"), tmp_path)


def test_an_update_that_would_use_a_rollout_twice_is_refused(tmp_path):
    overrides = ["train.grad_accumulation=2", "actor_critic.update_epochs=2"]
    with pytest.raises(ValueError, match="train.grad_accumulation=2 does not go together with .*update_epochs=2"):
        Trainer(tiny_config(*overrides, task="corridor"), tmp_path)


@pytest.mark.parametrize("task", ["corridor", "portal"])
def test_evaluation_counts_every_episode_that_begins_in_its_blocks_however_long_it_lasts(task, tmp_path):
    config = tiny_config("eval.block_size=3", "eval.max_blocks=2", task=task)
    trainer = Trainer(config, tmp_path)
    metrics = ActorCritic.evaluate(trainer.model, trainer.task, "test", config, trainer.device)

    envs = trainer.task.make_envs(config.eval.batch_size, trainer.device, split="test")
    generator = torch.Generator().manual_seed(config.seed)
    rollout, _ = act(trainer.model, trainer.model.initial_state(4), envs, generator, 200)
    lengths = []
    for done in rollout["done"]:
        ends = [-1, *done.nonzero().flatten().tolist()]  # an episode begins after each of these timesteps
        lengths += [end - previous_end for previous_end, end in pairwise(ends) if previous_end + 1 < 6]
    assert max(lengths) > 6
    assert metrics["test/rl/episode_length"] == pytest.approx(sum(lengths) / len(lengths))


def test_the_time_of_a_rollout_covers_all_its_epochs_and_is_logged_once(tmp_path):
    trainer = Trainer(tiny_config("actor_critic.update_epochs=3", task="corridor"), tmp_path)
    logged = []
    for _ in range(7):
        train_step(trainer)
        logged.append("perf/ms_per_batch" in interval_metrics(trainer))
    assert logged == [True, False, False] * 2 + [True]


def test_success_is_also_given_by_the_length_of_the_corridor_beyond_the_lengths_trained_on(tmp_path):
    longer = ["task.eval_max_length=40", "eval.batch_size=64", "eval.max_blocks=20"]
    config = tiny_config("task.initial_max_length=4", "task.max_length=4", *longer, task="corridor")
    trainer = Trainer(config, tmp_path)
    metrics = ActorCritic.evaluate(trainer.model, trainer.task, "test", config, trainer.device)
    by_length = {name: value for name, value in metrics.items() if name.startswith("test/rl/success_distance_")}
    assert {"test/rl/success_distance_2_4", "test/rl/success_distance_16_32"} <= set(by_length)
    assert min(by_length.values()) <= metrics["test/rl/success"] <= max(by_length.values())


def test_actions_are_drawn_as_by_multinomial():
    log_probs = torch.randn(5, 3).log_softmax(-1)
    drawn = Categorical(log_probs).sample(ActionSampler(torch.Generator().manual_seed(1), slice(0, 5), 5))
    expected = torch.multinomial(log_probs.exp(), 1, generator=torch.Generator().manual_seed(1))[:, 0]
    assert torch.equal(drawn, expected)
