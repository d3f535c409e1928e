import numpy as np
import pytest
import torch

gymnasium = pytest.importorskip("gymnasium")
from gymnasium.utils.env_checker import check_env  # noqa: E402
from gymnasium.vector import AutoresetMode  # noqa: E402
from gymnasium.wrappers import vector as wrappers  # noqa: E402

from expire_span.tasks.corridor import Corridor  # noqa: E402
from expire_span.tasks.gymnasium_adapter import GymnasiumWorlds  # noqa: E402
from expire_span.tasks.portal import Portal  # noqa: E402

TASKS = [Corridor(longest=5), Portal(rooms=3, time_limit=40)]
NAMES = ["corridor", "portal"]


class First(gymnasium.Env):
    """One world as a single environment: gymnasium's checker takes no vector."""

    metadata = {"render_modes": ["ansi"], "render_fps": 8}  # noqa: RUF012

    def __init__(self, task):
        self.worlds, self.render_mode = GymnasiumWorlds(task, 1, render_mode="ansi"), "ansi"
        self.observation_space, self.action_space = (
            self.worlds.single_observation_space,
            self.worlds.single_action_space,
        )

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.worlds.reset(seed=seed, options=options)[0][0], {}

    def step(self, action):
        observation, reward, terminated, truncated, _ = self.worlds.step(np.array([action]))
        return observation[0], float(reward[0]), bool(terminated[0]), bool(truncated[0]), {}

    def render(self):
        return self.worlds.render()[0]


@pytest.mark.parametrize("task", TASKS, ids=NAMES)
@pytest.mark.filterwarnings("error", "ignore:.*alternative render modes.*")
def test_gymnasium_finds_nothing_wrong(task):
    check_env(First(task))


@pytest.mark.parametrize("task", TASKS, ids=NAMES)
def test_shapes_and_types_are_those_of_the_spaces(task):
    worlds = GymnasiumWorlds(task, 5)
    assert worlds.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    observations, infos = worlds.reset(seed=1)
    assert observations in worlds.observation_space
    assert infos == {}
    worlds.action_space.seed(1)
    for _ in range(50):
        observations, reward, terminated, truncated, _ = worlds.step(worlds.action_space.sample())
        assert observations in worlds.observation_space
        assert [each.shape for each in (reward, terminated, truncated)] == [(5,)] * 3
        assert [each.dtype for each in (reward, terminated, truncated)] == [np.float64, np.bool_, np.bool_]


@pytest.mark.parametrize("task", TASKS, ids=NAMES)
def test_it_is_the_same_world_as_without_gymnasium_and_tells_of_the_episode_that_ended(task):
    adapter = GymnasiumWorlds(task, 5)
    adapter.reset(seed=1)
    worlds = task.worlds(5)
    worlds.load_state_dict(adapter.worlds.state_dict())
    endings = set()
    for action in torch.randint(4, (500, 5), generator=torch.Generator().manual_seed(0)):
        observations, reward, terminated, truncated, infos = adapter.step(action.numpy())
        expected_reward, done = worlds.advance(action)
        last = worlds.observe()
        worlds.restart(done)
        assert np.array_equal(observations, worlds.observe().numpy())
        assert np.array_equal(reward, expected_reward.double().numpy())
        assert np.array_equal(terminated | truncated, done.numpy())
        assert not (terminated & truncated).any()
        for world in done.nonzero().flatten().tolist():
            assert infos["_final_obs"][world]
            assert np.array_equal(infos["final_obs"][world], last[world].numpy())
            figures = {name: infos["final_info"][name][world] for name in worlds.ended}
            assert figures == {name: each[world].item() for name, each in worlds.ended.items()}
            assert truncated[world] == figures["late"]
            endings.add(bool(truncated[world]))
        assert done.any() or infos == {}
    assert endings == {False, True}


def test_a_seed_repeats_its_episodes_and_a_mask_restarts_only_its_worlds():
    worlds = GymnasiumWorlds(TASKS[0], 4)
    first, _ = worlds.reset(seed=7)
    worlds.step(np.ones(4, dtype=np.int64))
    second, _ = worlds.reset()
    assert np.array_equal(worlds.reset(seed=7)[0], first)
    worlds.step(np.zeros(4, dtype=np.int64))
    assert np.array_equal(worlds.reset()[0], second)
    worlds.step(np.ones(4, dtype=np.int64))
    worlds.reset(options={"reset_mask": np.array([True, False, True, False])})
    assert worlds.worlds.steps.tolist() == [0, 1, 0, 1]


def test_gymnasiums_own_wrappers_count_its_episodes():
    counted = wrappers.DictInfoToList(wrappers.RecordEpisodeStatistics(GymnasiumWorlds(TASKS[0], 4)))
    counted.reset(seed=1)
    ended = 0
    for _ in range(100):
        *_, terminated, truncated, infos = counted.step(counted.action_space.sample())
        for world in (terminated | truncated).nonzero()[0]:
            told = infos[world]
            assert told["episode"]["r"] == told["final_info"]["return"]
            assert told["episode"]["l"] == told["final_info"]["length"]
            ended += 1
    assert ended > 0


@pytest.mark.parametrize("actions", [[0, 4], [-1, 0], [0], [0.5, 1.0]], ids=str)
def test_actions_outside_the_space_are_refused(actions):
    worlds = GymnasiumWorlds(TASKS[0], 2)
    worlds.reset(seed=1)
    with pytest.raises(ValueError, match=r"actions must be 2 whole numbers from 0 to 3, got \["):
        worlds.step(np.array(actions))
    assert worlds.worlds.steps.eq(0).all()


def test_another_way_to_render_is_refused():
    with pytest.raises(ValueError, match="render_mode must be None or ansi, got human"):
        GymnasiumWorlds(TASKS[0], 2, render_mode="human")
