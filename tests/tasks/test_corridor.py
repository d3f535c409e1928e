import pytest
import torch
from gridworld_reference import MOVES, assert_envs_follow, assert_saved_envs_resume, one_hot, view

from expire_span.tasks.corridor import Corridor
from expire_span.tasks.gridworld import BLUE, DOWN, LEFT, RED, RIGHT, UP, landmark_in_view

COLORS = ("red", "blue")


class CorridorReference:
    """Corridor by its rules, with the layout that an environment has drawn."""

    def __init__(self, envs, env):
        drawn = {name: int(value[env]) for name, value in vars(envs.episode).items()}
        self.task, self.length, self.color = envs.task, drawn["length"], COLORS[drawn["object_color"]]
        self.limit = 4 * self.length + 16 if self.task.max_episode_steps is None else self.task.max_episode_steps
        self.floor = {(0, column) for column in range(self.length)}
        self.things = {
            (-1, 0): {"object", self.color},
            (-1, self.length - 1): {"door", COLORS[drawn["upper_color"]]},
            (1, self.length - 1): {"door", COLORS[1 - drawn["upper_color"]]},
        }
        self.position, self.time, self.episode_return, self.door, self.last_action = (0, 0), 0, 0.0, False, None

    def observe(self):
        observation = view(self.floor, self.things, self.position, self.task.cell_words)
        return observation + (one_hot(self.last_action, 4) if self.task.observe_last_action else [])

    def step(self, action):
        self.time, self.last_action = self.time + 1, action
        to = self.position[0] + MOVES[action][0], self.position[1] + MOVES[action][1]
        self.door = "door" in self.things.get(to, ())
        self.episode_return = float(self.door and self.color in self.things[to])
        self.position = to if to in self.floor else self.position
        return self.episode_return, self.door or self.time >= self.limit

    def info(self):
        info = {"success": self.episode_return, "episode_return": self.episode_return, "episode_length": self.time}
        return {**info, "truncated": not self.door, "distance": self.length}


@pytest.mark.parametrize(
    "arguments", [{}, {"random_door_sides": False, "observe_last_action": True}, {"max_episode_steps": 12}], ids=str
)
def test_batched_corridors_follow_the_rules_step_by_step(arguments):
    episodes = assert_envs_follow(
        CorridorReference, Corridor(min_length=2, max_length=9, **arguments), [0.15, 0.5, 0.15, 0.2]
    )
    assert len(episodes) > 200
    for name in ("success", "truncated"):
        assert {info[name] for info in episodes} == {0.0, 1.0}
    assert {info["distance"] for info in episodes} == set(range(2, 10))


def test_the_first_observation_is_the_agent_beside_the_object_at_the_closed_end():
    task = Corridor()
    envs = task.make_envs(64)
    cells = envs.observe().view(64, 3, 3, len(task.cell_words))
    for observed_view, color in zip(cells, envs.episode.object_color.tolist(), strict=True):
        bags = [
            [{word for word, on in zip(task.cell_words, cell, strict=True) if on} for cell in row]
            for row in observed_view
        ]
        above, below = [{"block"}, {"object", COLORS[color]}, {"block"}], [{"block"}] * 3
        assert bags == [above, [{"block"}, {"agent"}, set()], below]


def test_the_way_to_the_right_door_takes_as_many_steps_as_there_are_cells():
    envs = Corridor(max_length=20).make_envs(32)
    length, up = envs.episode.length, envs.episode.object_color == envs.episode.upper_color
    first = torch.zeros(32, dtype=torch.int64)
    for step in range(1, 21):
        action = torch.where(step < length, RIGHT, torch.where(up, UP, DOWN))
        reward, done = envs.step(action)
        now = done & (first == 0)
        assert torch.equal(now, step == length)
        assert reward[now].eq(1).all()
        first[now] = step


def test_lengths_colors_and_sides_are_drawn_evenly_and_independently():
    episode = Corridor().make_envs(40_000).episode
    lengths = torch.bincount(episode.length)
    assert len(lengths) == 201
    assert lengths[:3].sum() == 0
    assert lengths[3:].min() > 0.6 * 40_000 / 198
    assert torch.bincount(2 * episode.object_color + episode.upper_color, minlength=4).min() > 0.95 * 10_000
    assert Corridor(random_door_sides=False).make_envs(1000).episode.upper_color.eq(RED).all()


def test_every_split_and_seed_has_different_corridors():
    lengths = [
        Corridor(seed=task_seed).make_envs(64, seed=seed, split=split).episode.length
        for task_seed, seed, split in (
            (0, 0, "train"),
            (1, 0, "train"),
            (0, 1, "train"),
            (0, 0, "valid"),
            (0, 0, "test"),
        )
    ]
    for i, one in enumerate(lengths):
        assert not any(torch.equal(one, other) for other in lengths[i + 1 :])
    assert torch.equal(Corridor().make_envs(64).episode.length, lengths[0])


def test_saved_corridors_resume_where_they_were_saved():
    assert_saved_envs_resume(Corridor(max_length=6, observe_last_action=True))


def test_a_checkpoint_of_another_number_of_environments_is_refused():
    with pytest.raises(ValueError, match=r"train.batch_size must be 4 environments as in the checkpoint, got 8"):
        Corridor().make_envs(8).load_state_dict(Corridor().make_envs(4).state_dict())


def test_corridors_lengthen_with_success_and_evaluation_has_its_own_length_from_the_start():
    task = Corridor(
        max_length=40,
        initial_max_length=20,
        curriculum_growth=1.5,
        curriculum_threshold=0.9,
        curriculum_min_intervals=2,
        eval_max_length=80,
    )
    envs, stages = task.make_envs(4000), []
    for success in (0.95, 0.5, 0.91, float("nan"), 0.91, 0.92, 1.0):
        stages.append(task.curriculum_stage)
        task.update_curriculum(success)
    assert stages == [20, 20, 20, 30, 30, 30, 40]
    assert envs.episode.length.max() == 20, "the episodes in progress keep their size"
    envs.reset(torch.ones(4000, dtype=torch.bool))
    assert envs.episode.length.max() == 40
    assert Corridor(max_length=40, initial_max_length=20, eval_max_length=80).make_envs(4000, split="test").stage == 80
    again = Corridor(max_length=40, initial_max_length=20)
    again.load_state_dict(task.state_dict())
    assert again.curriculum_stage == 40


def test_render_shows_the_corridor_and_the_agent_in_it():
    envs = Corridor(min_length=4, max_length=4).make_envs(1)
    envs.episode.object_color[:], envs.episode.upper_color[:] = BLUE, RED
    for action in (RIGHT, RIGHT, LEFT):
        envs.step(torch.tensor([action]))
    assert envs.render().splitlines()[:3] == ["#b##R#", "# @  #", "####B#"]
    assert landmark_in_view(envs.task, envs.observe()[0]) == "b"
    envs.step(torch.tensor([RIGHT]))
    envs.step(torch.tensor([RIGHT]))
    assert landmark_in_view(envs.task, envs.observe()[0]) == "R"
    assert max(len(line) for line in Corridor(min_length=200).make_envs(1).render(width=40).splitlines()[:3]) == 40


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_length": 0}, r"task.min_length must be at least 2 cells, .*, got 0"),
        ({"max_length": 2}, r"task.max_length must be at least task.min_length=3 cells, got 2"),
        ({"max_length": -1}, r"task.max_length .*, got -1"),
        ({"eval_max_length": 1}, r"task.eval_max_length .*, got 1"),
        ({"max_episode_steps": 199}, r"task.max_episode_steps must be at least task.max_length=200 timesteps, got 199"),
        (
            {"initial_max_length": 201},
            r"task.initial_max_length must be task.min_length=3 to .*=200 cells, got 201",
        ),
        ({"curriculum_growth": 1.0}, r"task.curriculum_growth must be more than 1, got 1.0"),
        ({"curriculum_min_intervals": 0}, r"task.curriculum_min_intervals must be at least 1 interval, got 0"),
        ({"seed": -1}, r"seed must not be negative, got -1"),
    ],
)
def test_invalid_arguments_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        Corridor(**arguments)


def test_less_than_one_environment_is_refused():
    with pytest.raises(ValueError, match="at least 1 environment, got 0"):
        Corridor().make_envs(0)
