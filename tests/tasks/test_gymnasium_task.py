"""Environments of Gymnasium give observations as rows of numbers, and get legal actions."""

import sys

import numpy as np
import pytest
import torch

gymnasium = pytest.importorskip("gymnasium")
from checking_envs import SPACES  # noqa: E402
from gymnasium.spaces import flatten, flatten_space  # noqa: E402
from gymnasium.vector.utils import concatenate, create_empty_array  # noqa: E402

from expire_span.runner.objectives.actor_critic import ActionSampler  # noqa: E402
from expire_span.tasks.base import EnvError, EnvValueError  # noqa: E402
from expire_span.tasks.gymnasium_envs import CLIP, observation_layout  # noqa: E402
from expire_span.tasks.gymnasium_task import GymnasiumTask  # noqa: E402

CHECKING = "checking_envs:CheckingEnv"
SELECT = "expire_span.tasks.gymnasium_wrappers.SelectObservation"
USABLE = [name for name in SPACES if not name.startswith("text")]


def checking_task(**kwargs):
    return GymnasiumTask(CHECKING, kwargs)


def play(task, envs, num_steps, seed=0):
    """Random actions; what each step gives: rewards (B, T), done (B, T) and the task's episode_info by name (B, T)."""
    sampler = ActionSampler(torch.Generator().manual_seed(seed), slice(0, envs.num_envs), envs.num_envs)
    steps = []
    for _ in range(num_steps):
        policy = task.action_distribution(torch.zeros(envs.num_envs, task.num_classes - 1))
        reward, done = envs.step(policy.sample(sampler))
        steps.append({"reward": reward, "done": done, "observation": envs.observe(), **envs.episode_info})
    return {name: torch.stack([step[name] for step in steps], 1) for name in steps[0]}


@pytest.mark.parametrize("name", USABLE)
def test_observations_are_flattened_as_gymnasium_flattens_each_of_them(name):
    space = SPACES[name]
    samples = [space.sample() for _ in range(4)]
    batch = concatenate(space, samples, create_empty_array(space, 4))
    layout = observation_layout("x", space)
    expected = np.stack([flatten(space, sample) for sample in samples])
    assert np.allclose(layout.flatten(batch), expected / 255 if name == "pixels" else expected)
    assert layout.size == flatten_space(space).shape[0]


@pytest.mark.parametrize("observation", USABLE)
def test_every_observation_space_is_seen_as_finite_rows(observation):
    task = checking_task(observation=observation)
    envs = task.make_envs(3)
    assert envs.observe().shape == (3, task.vocab_size)
    assert envs.observe().dtype == torch.float32
    assert play(task, envs, 7)["observation"].isfinite().all()


@pytest.mark.parametrize("action", ["box", "half_bounded", "discrete", "multi_discrete", "multi_binary"])
def test_every_action_space_gets_legal_actions(action):
    task = checking_task(action=action)
    played = play(task, task.make_envs(3), 60)  # the environment raises an error for any other
    assert played["reward"].sum() == 3 * 50  # those of ten episodes


def test_a_process_for_each_environment_gives_the_same():
    outcomes = []
    for mode in ("sync", "async"):
        task = GymnasiumTask(CHECKING, {"observation": "dict"}, vectorization_mode=mode)
        outcomes.append(play(task, task.make_envs(2), 8))
    assert all(torch.equal(outcomes[0][name], outcomes[1][name]) for name in outcomes[0])


def test_the_bounds_of_a_box_are_at_minus_1_and_1_and_nothing_is_beyond_them():
    actions = checking_task(action="box").actions
    assert actions.to_env(np.array([[-1.0, 1.0], [0.0, 0.0], [9.0, -9.0]])).tolist() == [[-2, 10], [0, 5], [2, 0]]
    half_bounded = checking_task(action="half_bounded").actions
    assert half_bounded.to_env(np.array([[-3.0, 7.0], [3.0, 2.0]])).tolist() == [[[0], [5]], [[3], [2]]]


@pytest.mark.parametrize("truncated", [False, True])
def test_the_last_observation_is_seen_for_a_timestep_and_episodes_are_told_apart(truncated):
    task = checking_task(length=3, truncated=truncated)
    envs = task.make_envs(2)
    steps, resetting = [], []
    for _ in range(8):
        steps.append(envs.steps[0].item())
        resetting.append(envs.resetting[0].item())
        played = play(task, envs, 1)
        assert played["reward"][0].item() == (not resetting[-1])
        if played["done"].any():
            assert played["truncated"].all() == truncated
            assert played["episode_return"].tolist() == played["episode_length"].tolist() == [[3], [3]]
    assert steps == [0, 1, 2, 3] * 2
    assert resetting == [False, False, False, True] * 2


def test_a_vectorization_of_its_own_is_used():
    task = GymnasiumTask("CartPole-v1", vectorization_mode="vector_entry_point")
    played = play(task, task.make_envs(3), 40)
    assert played["done"].any()
    lengths = played["episode_length"][played["done"]]
    assert torch.equal(lengths, played["episode_return"][played["done"]].long())


def test_processes_that_share_environments_have_those_of_one_process():
    task = checking_task()
    whole, share = task.make_envs(4), task.make_envs(2, first=2, total=4)
    assert torch.equal(whole.observe()[2:], share.observe())
    shared = GymnasiumTask(CHECKING, normalize_observation=True)
    with pytest.raises(ValueError, match="task.normalize_observation=true works in one process only"):
        shared.make_envs(2, first=2, total=4)


def test_splits_and_seeds_have_episodes_of_their_own():
    options = [{}, {"split": "test"}, {"seed": 1}]
    first = [checking_task().make_envs(2, **each).observe() for each in options]
    assert torch.equal(first[0], checking_task().make_envs(2).observe())
    assert len({tuple(each.flatten().tolist()) for each in (*first, first[0][[1, 0]])}) == 4


def test_normalized_observations_have_mean_0_and_deviation_1_and_evaluation_uses_what_training_has_seen():
    task = GymnasiumTask(CHECKING, {"observation": "box"}, normalize_observation=True)
    assert play(task, task.make_envs(20), 200)["observation"].abs().max() <= CLIP
    state = task.state_dict()
    envs = task.make_envs(20, split="test")
    seen = play(task, envs, 200)["observation"]
    assert seen.mean((0, 1)).tolist() == pytest.approx([0, 0], abs=0.1)
    assert seen.std((0, 1)).tolist() == pytest.approx([1, 1], abs=0.1)
    assert task.state_dict() == state


def test_rewards_are_normalized_in_training_alone_and_returns_never():
    task = GymnasiumTask(CHECKING, {"length": 50}, normalize_reward=True)
    for split, expected in (("train", False), ("test", True)):
        played = play(task, task.make_envs(4, split=split), 50)
        assert played["reward"][:, 1:].eq(1).all() == expected
        assert played["episode_return"][:, -1].tolist() == [50] * 4


def test_wrappers_change_what_is_observed():
    wrappers = [
        {"_target_": SELECT, "indices": [2, 0]},
        {"_target_": "gymnasium.wrappers.TimeLimit", "max_episode_steps": 4},
    ]
    task = GymnasiumTask("CartPole-v1", wrappers=wrappers)
    plain = GymnasiumTask("CartPole-v1").make_envs(2)
    envs = task.make_envs(2)
    assert torch.equal(envs.observe(), plain.observe()[:, [2, 0]])
    assert play(task, envs, 4)["truncated"][:, -1].all()


@pytest.mark.parametrize("success", [True, False])
def test_success_is_what_the_last_info_tells(success):
    task = GymnasiumTask(CHECKING, {"success": success}, metric="success")
    assert play(task, task.make_envs(2), 5)["success"].sum(1).tolist() == [success] * 2


def test_success_that_no_info_tells_is_refused():
    task = GymnasiumTask(CHECKING, metric="success")
    with pytest.raises(EnvValueError, match="task.metric=success needs is_success or success in the infos of checking"):
        play(task, task.make_envs(2), 5)


@pytest.mark.parametrize(
    ("id", "message"),
    [
        ("CartPol-v1", "no environment is called CartPol-v1; did you mean CartPole-v1"),
        ("no_such_module:Env-v0", "no_such_module cannot be imported"),
        ("checking_envs:Chekcing", "checking_envs has no function Chekcing, and no environment is called"),
    ],
)
def test_an_unknown_id_is_refused_with_names_like_it(id, message):
    with pytest.raises(ValueError, match=f"^task.id={id}: {message}"):
        GymnasiumTask(id)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"observation": "text"}, "observation is of a Text space; those that can be used are Box"),
        ({"observation": "text_within"}, r"observation\['seen'\]\[1\] is of a Text space"),
        ({"action": "dict"}, r"the action space is a Dict \(.*those that can be used are Discrete"),
        ({"action": "pixels"}, "the action space is a Box"),
        ({"color": "red"}, r"1 environments cannot be made by sync \(TypeError: .*color"),
    ],
)
def test_what_cannot_be_used_is_refused_in_a_line_that_names_it(kwargs, message):
    with pytest.raises(ValueError, match=f"^task.id={CHECKING}: {message}"):
        checking_task(**kwargs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "score"}, "task.metric must be one of episode_return, episode_length, success, got score"),
        ({"vectorization_mode": "threads"}, "task.vectorization_mode must be one of sync, async, vector_entry_point"),
        ({"wrappers": [{"_target_": "os.nothing"}]}, r"task.wrappers\[0\]._target_ must name a class"),
        ({"wrappers": [{"_target_": "fractions.Fraction"}]}, "Fraction must be a subclass of gymnasium.Wrapper"),
        ({"wrappers": [{"_target_": SELECT, "indices": [2]}]}, "indices must be some of 0 to 1"),
        ({"vectorization_mode": "vector_entry_point"}, "doesn't have a vector entry point"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GymnasiumTask(CHECKING, **options)


def test_environments_that_reset_in_the_same_step_are_refused():
    with pytest.raises(
        ValueError, match="has autoreset_mode .*SAME_STEP, not NEXT_STEP; use task.vectorization_mode=sync"
    ):
        GymnasiumTask("checking_envs:SameStep-v0", vectorization_mode="vector_entry_point")


def test_an_error_of_an_environment_is_the_cause_of_ours():
    task = checking_task(raises_at=3)
    with pytest.raises(EnvError, match=f"^{CHECKING} has raised an error at step 3$") as caught:
        play(task, task.make_envs(2), 5)
    assert str(caught.value.__cause__) == "the motor is on fire"


@pytest.mark.parametrize(("what", "option"), [("observation", "nan_at"), ("reward", "nan_reward_at")])
def test_a_number_that_is_not_finite_is_refused_with_its_environment_and_step(what, option):
    task = checking_task(**{option: 3})
    message = f"^{CHECKING} has given {what}s that are not finite, in environment 2 at step 3$"
    with pytest.raises(EnvValueError, match=message):
        play(task, task.make_envs(2, first=2, total=4), 5)


def test_without_gymnasium_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "expire_span.tasks.gymnasium_envs", None)
    monkeypatch.delattr("expire_span.tasks.gymnasium_envs")
    with pytest.raises(ValueError, match=r"task=gymnasium needs Gymnasium: pip install 'expire-span\[rl\]'"):
        GymnasiumTask("CartPole-v1")
