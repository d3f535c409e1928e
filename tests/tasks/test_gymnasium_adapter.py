import numpy as np
import pytest
import torch

gymnasium = pytest.importorskip("gymnasium")
from gymnasium.utils.env_checker import check_env  # noqa: E402
from gymnasium.vector import AutoresetMode  # noqa: E402
from gymnasium.wrappers import vector as wrappers  # noqa: E402

from expire_span.tasks.corridor import Corridor  # noqa: E402
from expire_span.tasks.gymnasium_adapter import GymnasiumVectorEnv  # noqa: E402
from expire_span.tasks.portal import Portal  # noqa: E402

TASKS = [Corridor(max_length=5), Portal(num_rooms=3, max_episode_steps=40)]
NAMES = ["corridor", "portal"]


class SingleEnv(gymnasium.Env):
    """One environment of a vector: Gymnasium has no checker of vectors."""

    metadata = {"render_modes": ["ansi"], "render_fps": 8}  # noqa: RUF012

    def __init__(self, task):
        self.envs, self.render_mode = GymnasiumVectorEnv(task, 1, render_mode="ansi"), "ansi"
        self.observation_space, self.action_space = (
            self.envs.single_observation_space,
            self.envs.single_action_space,
        )

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.envs.reset(seed=seed, options=options)[0][0], {}

    def step(self, action):
        observation, reward, terminated, truncated, _ = self.envs.step(np.array([action]))
        return observation[0], float(reward[0]), bool(terminated[0]), bool(truncated[0]), {}

    def render(self):
        return self.envs.render()[0]


@pytest.mark.parametrize("task", TASKS, ids=NAMES)
@pytest.mark.filterwarnings("error", "ignore:.*alternative render modes.*")
def test_the_checker_of_gymnasium_passes(task):
    check_env(SingleEnv(task))


@pytest.mark.parametrize("task", TASKS, ids=NAMES)
def test_shapes_and_types_are_those_of_the_spaces(task):
    envs = GymnasiumVectorEnv(task, 5)
    assert envs.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    observations, infos = envs.reset(seed=1)
    assert observations in envs.observation_space
    assert infos == {}
    envs.action_space.seed(1)
    for _ in range(50):
        observations, reward, terminated, truncated, _ = envs.step(envs.action_space.sample())
        assert observations in envs.observation_space
        assert [values.shape for values in (reward, terminated, truncated)] == [(5,)] * 3
        assert [values.dtype for values in (reward, terminated, truncated)] == [np.float64, np.bool_, np.bool_]


@pytest.mark.parametrize("task", TASKS, ids=NAMES)
def test_steps_equal_those_without_gymnasium_and_infos_describe_the_episode_that_ended(task):
    adapter = GymnasiumVectorEnv(task, 5)
    adapter.reset(seed=1)
    envs = task.make_envs(5)
    envs.load_state_dict(adapter.envs.state_dict())
    endings = set()
    for action in torch.randint(4, (500, 5), generator=torch.Generator().manual_seed(0)):
        observations, reward, terminated, truncated, infos = adapter.step(action.numpy())
        expected_reward, done = envs.step_without_reset(action)
        last = envs.observe()
        envs.reset(done)
        assert np.array_equal(observations, envs.observe().numpy())
        assert np.array_equal(reward, expected_reward.double().numpy())
        assert np.array_equal(terminated | truncated, done.numpy())
        assert not (terminated & truncated).any()
        for env in done.nonzero().flatten().tolist():
            assert infos["_final_obs"][env]
            assert np.array_equal(infos["final_obs"][env], last[env].numpy())
            info = {name: infos["final_info"][name][env] for name in envs.episode_info}
            assert info == {name: values[env].item() for name, values in envs.episode_info.items()}
            assert truncated[env] == info["truncated"]
            endings.add(bool(truncated[env]))
        assert done.any() or infos == {}
    assert endings == {False, True}


def test_a_seed_repeats_its_episodes_and_a_mask_resets_only_its_environments():
    envs = GymnasiumVectorEnv(TASKS[0], 4)
    first, _ = envs.reset(seed=7)
    envs.step(np.ones(4, dtype=np.int64))
    second, _ = envs.reset()
    assert np.array_equal(envs.reset(seed=7)[0], first)
    envs.step(np.zeros(4, dtype=np.int64))
    assert np.array_equal(envs.reset()[0], second)
    envs.step(np.ones(4, dtype=np.int64))
    envs.reset(options={"reset_mask": np.array([True, False, True, False])})
    assert envs.envs.steps.tolist() == [0, 1, 0, 1]


def test_the_statistics_wrapper_of_gymnasium_agrees_with_the_final_info():
    counted = wrappers.DictInfoToList(wrappers.RecordEpisodeStatistics(GymnasiumVectorEnv(TASKS[0], 4)))
    counted.reset(seed=1)
    ended = 0
    for _ in range(100):
        *_, terminated, truncated, infos = counted.step(counted.action_space.sample())
        for env in (terminated | truncated).nonzero()[0]:
            info = infos[env]
            assert info["episode"]["r"] == info["final_info"]["episode_return"]
            assert info["episode"]["l"] == info["final_info"]["episode_length"]
            ended += 1
    assert ended > 0


@pytest.mark.parametrize("actions", [[0, 4], [-1, 0], [0], [0.5, 1.0]], ids=str)
def test_actions_outside_the_space_are_refused(actions):
    envs = GymnasiumVectorEnv(TASKS[0], 2)
    envs.reset(seed=1)
    with pytest.raises(ValueError, match=r"actions must be 2 whole numbers from 0 to 3, got \["):
        envs.step(np.array(actions))
    assert envs.envs.steps.eq(0).all()


def test_an_unknown_render_mode_is_refused():
    with pytest.raises(ValueError, match="render_mode must be None or ansi, got human"):
        GymnasiumVectorEnv(TASKS[0], 2, render_mode="human")
