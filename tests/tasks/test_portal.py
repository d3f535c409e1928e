import pytest
import torch
from cells import MOVES, assert_saved_worlds_go_on, assert_worlds_follow, look, one_hot

from expire_span.tasks.gridworld import LEFT, RIGHT
from expire_span.tasks.portal import Portal


class OnePortal:
    """Portal by its rules, of the layout that a world has drawn."""

    def __init__(self, worlds, world):
        self.task, self.last_room = worlds.task, int(worlds.episode.last[world]) + 1
        drawn = worlds.episode.rooms[world].tolist()
        self.right = [("left", "right")[room % 2] for room in drawn]
        self.red = [("left", "right")[room // 2] for room in drawn]
        size = self.task.size
        self.doors = {"left": (size // 2, 0), "right": (size // 2, size - 1)}
        self.floor = {(row, column) for row in range(size) for column in range(size)}
        self.centre = size // 2, size // 2
        self.at, self.room, self.furthest, self.time, self.gained, self.last = self.centre, 1, 1, 0, 0.0, None
        self.mistakes, self.over = dict.fromkeys(range(1, self.task.rooms + 1), 0), False

    def look(self):
        red = self.red[self.room - 1]
        things = {place: {"door", "red" if side == red else "blue"} for side, place in self.doors.items()}
        told = one_hot(self.room - 1, self.task.rooms) + (one_hot(self.last, 4) if self.task.last_action else [])
        return look(self.floor, things, self.at, self.task.words) + told

    def step(self, action):
        self.time, self.last, reward = self.time + 1, action, 0.0
        to = self.at[0] + MOVES[action][0], self.at[1] + MOVES[action][1]
        if to == self.doors[self.right[self.room - 1]]:
            reward, self.room, self.at = 0.1 * self.room, self.room + 1, self.centre
            self.furthest, self.over = max(self.furthest, self.room), self.room == self.last_room
        elif to in self.doors.values():
            self.mistakes[self.room] += 1
            self.over = self.mistakes[self.room] == self.task.mistakes
            self.room, self.at = 1, self.centre
        elif to in self.floor:
            self.at = to
        self.gained += reward
        return reward, self.over or self.time >= self.task.time_limit

    def figures(self):
        success, share = self.room == self.last_room, round(self.furthest / self.last_room, 4)
        figures = {"success": success, "return": round(self.gained, 4), "length": self.time, "late": not self.over}
        return {**figures, "rooms": self.furthest, "share": share}


@pytest.mark.parametrize(
    "arguments",
    [{}, {"size": 3, "first_rooms": 3, "last_action": False}, {"mistakes": 3, "rooms": 5, "time_limit": 120}],
    ids=str,
)
def test_batched_portals_follow_the_rules_step_by_step(arguments):
    task = Portal(**{"rooms": 4, "time_limit": 30, **arguments})
    ended = assert_worlds_follow(OnePortal, task, [0.1, 0.4, 0.1, 0.4])
    assert len(ended) > 100
    for name in ("success", "late"):
        assert {figures[name] for figures in ended} == {0.0, 1.0}
    assert max(figures["return"] for figures in ended) > sum(range(1, task.stage)) / 10, "some passed a room twice"


def through(worlds, right):
    """Every agent from the centre through the right door, or the wrong one; returns the last step's reward and done."""
    leads_on = worlds.here() % 2 == 1
    for _ in range(worlds.task.size // 2):
        reward, done = worlds.step(torch.where(leads_on == right, RIGHT, LEFT))
    return reward, done


def test_right_doors_lead_to_the_last_room_and_pay_a_tenth_of_the_room_number():
    worlds = Portal().worlds(16)
    for room in range(1, 50):
        assert worlds.observe()[:, 45:95].argmax(dim=1).eq(room - 1).all(), "the room's number is seen"
        reward, done = through(worlds, right=True)
        torch.testing.assert_close(reward, torch.full((16,), 0.1 * room))
        assert done.eq(room == 49).all()
    assert worlds.ended["success"].all()
    assert worlds.ended["rooms"].eq(50).all()
    torch.testing.assert_close(worlds.ended["return"], torch.full((16,), 122.5))
    assert worlds.steps.eq(0).all()


def test_a_wrong_door_leads_back_to_room_1_and_passing_again_pays_again():
    worlds = Portal().worlds(16)
    for right in (True, True, False, True, True):
        reward, done = through(worlds, right)
        assert not done.any()
    torch.testing.assert_close(reward, torch.full((16,), 0.2))
    assert worlds.episode.room.eq(2).all()
    assert worlds.episode.furthest.eq(2).all()


def test_the_second_mistake_in_a_room_ends_the_episode_and_mistakes_in_others_do_not():
    worlds = Portal().worlds(16)
    for right in (False, True, False, True, True, False, True):
        assert not through(worlds, right)[1].any()
    assert through(worlds, right=False)[1].all()
    assert not worlds.ended["success"].any()
    assert worlds.ended["rooms"].eq(3).all()
    assert worlds.episode.rooms.lt(4).all(), "the next episode begins without mistakes"


def test_doors_are_drawn_evenly_anew_for_each_episode_and_stay_within_it():
    worlds = Portal(rooms=6).worlds(4000)
    before = worlds.episode.rooms
    assert torch.stack([(before == each).float().mean(0) for each in range(4)]).min() > 0.22
    through(worlds, right=True)
    assert torch.equal(worlds.episode.rooms, before)
    worlds.restart(torch.arange(4000) < 2000)
    assert torch.equal(worlds.episode.rooms[2000:], before[2000:])
    assert 0.2 < (worlds.episode.rooms[:2000] == before[:2000]).float().mean() < 0.3


def test_which_door_is_right_cannot_be_seen():
    worlds = Portal().worlds(64)
    seen = worlds.observe()
    worlds.episode.rooms = worlds.episode.rooms ^ 1
    assert torch.equal(worlds.observe(), seen)


def test_saved_portals_go_on_where_they_were_saved():
    assert_saved_worlds_go_on(Portal(rooms=4, time_limit=40))


def test_rooms_grow_by_the_share_visited_and_evaluation_has_them_all():
    task = Portal(rooms=4, first_rooms=2, bar=0.88)
    worlds, stages = task.worlds(2), []
    for share in (0.5, 0.9, float("nan"), 0.87, 0.88, 1.0):
        stages.append(task.stage)
        task.feedback(share)
    assert stages == [2, 2, 3, 3, 3, 4]
    assert worlds.episode.last.eq(1).all(), "those begun go on as they were"
    worlds.restart(torch.tensor([True, False]))
    assert worlds.episode.last.tolist() == [3, 1]
    assert Portal(rooms=4, first_rooms=2).worlds(2, split="valid").episode.last.eq(3).all()


def test_a_frame_shows_the_room_and_what_the_agent_cannot_see():
    worlds = Portal(rooms=4).worlds(1)
    worlds.episode.rooms[:] = 1
    assert worlds.frame().splitlines() == [
        "#######",
        *["#     #"] * 2,
        "#R @ B#",
        *["#     #"] * 2,
        "#######",
        "room 1 of 4 (blue leads on, 0 mistakes), step 0, return 0.0",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rooms": 1}, r"task.rooms must be at least 2, got 1"),
        ({"rooms": -3}, r"task.rooms must be at least 2, got -3"),
        ({"rooms": 502}, r"task.rooms must be at most 501 for task.time_limit=1000, got 502"),
        ({"size": 4}, r"task.size must be odd and at least 3 cells, got 4"),
        ({"size": 1}, r"task.size .*, got 1"),
        ({"mistakes": 0}, r"task.mistakes must be 1 to 30, got 0"),
        ({"time_limit": 0}, r"task.rooms must be at most 1 for task.time_limit=0, got 50"),
        ({"first_rooms": 51}, r"task.first_rooms must be 2 to task.rooms=50, got 51"),
        ({"wait": 0}, r"task.wait"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        Portal(**arguments)
