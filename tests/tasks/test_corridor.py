import pytest
import torch
from cells import MOVES, assert_saved_worlds_go_on, assert_worlds_follow, look, one_hot

from expire_span.tasks.corridor import Corridor
from expire_span.tasks.gridworld import BLUE, DOWN, LEFT, RED, RIGHT, UP, noticed

COLOURS = ("red", "blue")


class OneCorridor:
    """Corridor by its rules, of the layout that a world has drawn."""

    def __init__(self, worlds, world):
        drawn = {name: int(value[world]) for name, value in vars(worlds.episode).items()}
        self.task, self.length, self.colour = worlds.task, drawn["length"], COLOURS[drawn["object"]]
        self.limit = 4 * self.length + 16 if self.task.time_limit is None else self.task.time_limit
        self.floor = {(0, column) for column in range(self.length)}
        self.things = {
            (-1, 0): {"object", self.colour},
            (-1, self.length - 1): {"door", COLOURS[drawn["upper"]]},
            (1, self.length - 1): {"door", COLOURS[1 - drawn["upper"]]},
        }
        self.at, self.time, self.gained, self.door, self.last = (0, 0), 0, 0.0, False, None

    def look(self):
        seen = look(self.floor, self.things, self.at, self.task.words)
        return seen + (one_hot(self.last, 4) if self.task.last_action else [])

    def step(self, action):
        self.time, self.last = self.time + 1, action
        to = self.at[0] + MOVES[action][0], self.at[1] + MOVES[action][1]
        self.door = "door" in self.things.get(to, ())
        self.gained = float(self.door and self.colour in self.things[to])
        self.at = to if to in self.floor else self.at
        return self.gained, self.door or self.time >= self.limit

    def figures(self):
        figures = {"success": self.gained, "return": self.gained, "length": self.time}
        return {**figures, "late": not self.door, "distance": self.length}


@pytest.mark.parametrize("arguments", [{}, {"random_sides": False, "last_action": True}, {"time_limit": 12}], ids=str)
def test_batched_corridors_follow_the_rules_step_by_step(arguments):
    ended = assert_worlds_follow(OneCorridor, Corridor(shortest=2, longest=9, **arguments), [0.15, 0.5, 0.15, 0.2])
    assert len(ended) > 200
    for name in ("success", "late"):
        assert {figures[name] for figures in ended} == {0.0, 1.0}
    assert {figures["distance"] for figures in ended} == set(range(2, 10))


def test_the_first_observation_is_the_agent_beside_the_object_at_the_closed_end():
    task = Corridor()
    worlds = task.worlds(64)
    cells = worlds.observe().view(64, 3, 3, len(task.words))
    for seen, colour in zip(cells, worlds.episode.object.tolist(), strict=True):
        bags = [[{word for word, on in zip(task.words, cell, strict=True) if on} for cell in row] for row in seen]
        above, below = [{"block"}, {"object", COLOURS[colour]}, {"block"}], [{"block"}] * 3
        assert bags == [above, [{"block"}, {"agent"}, set()], below]


def test_the_way_to_the_right_door_takes_as_many_steps_as_there_are_cells():
    worlds = Corridor(longest=20).worlds(32)
    length, up = worlds.episode.length, worlds.episode.object == worlds.episode.upper
    first = torch.zeros(32, dtype=torch.int64)
    for step in range(1, 21):
        action = torch.where(step < length, RIGHT, torch.where(up, UP, DOWN))
        reward, done = worlds.step(action)
        now = done & (first == 0)
        assert torch.equal(now, step == length)
        assert reward[now].eq(1).all()
        first[now] = step


def test_lengths_colours_and_sides_are_drawn_evenly_and_apart():
    episode = Corridor().worlds(40_000).episode
    lengths = torch.bincount(episode.length)
    assert len(lengths) == 201
    assert lengths[:3].sum() == 0
    assert lengths[3:].min() > 0.6 * 40_000 / 198
    assert torch.bincount(2 * episode.object + episode.upper, minlength=4).min() > 0.95 * 10_000
    assert Corridor(random_sides=False).worlds(1000).episode.upper.eq(RED).all()


def test_splits_and_seeds_have_worlds_of_their_own():
    lengths = [
        Corridor(seed=own).worlds(64, seed=seed, split=split).episode.length
        for own, seed, split in ((0, 0, "train"), (1, 0, "train"), (0, 1, "train"), (0, 0, "valid"), (0, 0, "test"))
    ]
    for i, one in enumerate(lengths):
        assert not any(torch.equal(one, other) for other in lengths[i + 1 :])
    assert torch.equal(Corridor().worlds(64).episode.length, lengths[0])


def test_saved_corridors_go_on_where_they_were_saved():
    assert_saved_worlds_go_on(Corridor(longest=6, last_action=True))


def test_a_checkpoint_of_another_number_of_worlds_is_refused():
    with pytest.raises(ValueError, match=r"train.batch must be 4 environments as in the checkpoint, got 8"):
        Corridor().worlds(8).load_state_dict(Corridor().worlds(4).state_dict())


def test_corridors_lengthen_by_success_and_evaluation_is_at_its_own_length_from_the_start():
    task = Corridor(longest=40, first_longest=20, growth=1.5, bar=0.9, wait=2, evaluation_longest=80)
    worlds, stages = task.worlds(4000), []
    for success in (0.95, 0.5, 0.91, float("nan"), 0.91, 0.92, 1.0):
        stages.append(task.stage)
        task.feedback(success)
    assert stages == [20, 20, 20, 30, 30, 30, 40]
    assert worlds.episode.length.max() == 20, "those begun go on as they were"
    worlds.restart(torch.ones(4000, dtype=torch.bool))
    assert worlds.episode.length.max() == 40
    assert Corridor(longest=40, first_longest=20, evaluation_longest=80).worlds(4000, split="test").stage == 80
    again = Corridor(longest=40, first_longest=20)
    again.load_state_dict(task.state_dict())
    assert again.stage == 40


def test_a_frame_shows_the_corridor_and_the_agent_in_it():
    worlds = Corridor(shortest=4, longest=4).worlds(1)
    worlds.episode.object[:], worlds.episode.upper[:] = BLUE, RED
    for action in (RIGHT, RIGHT, LEFT):
        worlds.step(torch.tensor([action]))
    assert worlds.frame().splitlines()[:3] == ["#b##R#", "# @  #", "####B#"]
    assert noticed(worlds.task, worlds.observe()[0]) == "b"
    worlds.step(torch.tensor([RIGHT]))
    worlds.step(torch.tensor([RIGHT]))
    assert noticed(worlds.task, worlds.observe()[0]) == "R"
    assert max(len(line) for line in Corridor(shortest=200).worlds(1).frame(width=40).splitlines()[:3]) == 40


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shortest": 0}, r"task.shortest must be at least 2 cells, .*, got 0"),
        ({"longest": 2}, r"task.longest must be at least task.shortest=3 cells, got 2"),
        ({"longest": -1}, r"task.longest .*, got -1"),
        ({"evaluation_longest": 1}, r"task.evaluation_longest .*, got 1"),
        ({"time_limit": 199}, r"task.time_limit must be at least task.longest=200 timesteps, got 199"),
        ({"first_longest": 201}, r"task.first_longest must be task.shortest=3 to task.longest=200 cells, got 201"),
        ({"growth": 1.0}, r"task.growth must be more than 1, got 1.0"),
        ({"wait": 0}, r"task.wait must be at least 1 feedback, got 0"),
        ({"seed": -1}, r"seed must not be negative, got -1"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        Corridor(**arguments)


def test_no_worlds_at_all_are_refused():
    with pytest.raises(ValueError, match="at least 1 environment, got 0"):
        Corridor().worlds(0)
