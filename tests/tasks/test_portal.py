import pytest
import torch
from gridworld_reference import MOVES, assert_envs_follow, assert_saved_envs_resume, one_hot, view

from expire_span.tasks.gridworld import LEFT, RIGHT
from expire_span.tasks.portal import Portal


class PortalReference:
    """Portal by its rules, with the layout that an environment has drawn."""

    def __init__(self, envs, env):
        self.task, self.last_room = envs.task, int(envs.episode.last_room[env]) + 1
        drawn = envs.episode.rooms[env].tolist()
        self.right = [("left", "right")[room % 2] for room in drawn]
        self.red = [("left", "right")[room // 2] for room in drawn]
        size = self.task.room_size
        self.doors = {"left": (size // 2, 0), "right": (size // 2, size - 1)}
        self.floor = {(row, column) for row in range(size) for column in range(size)}
        self.center = size // 2, size // 2
        self.position, self.room, self.furthest, self.time, self.episode_return, self.last_action = (
            self.center,
            1,
            1,
            0,
            0.0,
            None,
        )
        self.mistakes, self.terminated = dict.fromkeys(range(1, self.task.num_rooms + 1), 0), False

    def observe(self):
        red = self.red[self.room - 1]
        things = {position: {"door", "red" if side == red else "blue"} for side, position in self.doors.items()}
        extra = one_hot(self.room - 1, self.task.num_rooms) + (
            one_hot(self.last_action, 4) if self.task.observe_last_action else []
        )
        return view(self.floor, things, self.position, self.task.cell_words) + extra

    def step(self, action):
        self.time, self.last_action, reward = self.time + 1, action, 0.0
        to = self.position[0] + MOVES[action][0], self.position[1] + MOVES[action][1]
        if to == self.doors[self.right[self.room - 1]]:
            reward, self.room, self.position = 0.1 * self.room, self.room + 1, self.center
            self.furthest, self.terminated = max(self.furthest, self.room), self.room == self.last_room
        elif to in self.doors.values():
            self.mistakes[self.room] += 1
            self.terminated = self.mistakes[self.room] == self.task.max_mistakes
            self.room, self.position = 1, self.center
        elif to in self.floor:
            self.position = to
        self.episode_return += reward
        return reward, self.terminated or self.time >= self.task.max_episode_steps

    def info(self):
        success, fraction = self.room == self.last_room, round(self.furthest / self.last_room, 4)
        info = {
            "success": success,
            "episode_return": round(self.episode_return, 4),
            "episode_length": self.time,
            "truncated": not self.terminated,
        }
        return {**info, "rooms": self.furthest, "room_fraction": fraction}


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"room_size": 3, "initial_num_rooms": 3, "observe_last_action": False},
        {"max_mistakes": 3, "num_rooms": 5, "max_episode_steps": 120},
    ],
    ids=str,
)
def test_batched_portals_follow_the_rules_step_by_step(arguments):
    task = Portal(**{"num_rooms": 4, "max_episode_steps": 30, **arguments})
    episodes = assert_envs_follow(PortalReference, task, [0.1, 0.4, 0.1, 0.4])
    assert len(episodes) > 100
    for name in ("success", "truncated"):
        assert {info[name] for info in episodes} == {0.0, 1.0}
    assert max(info["episode_return"] for info in episodes) > sum(range(1, task.curriculum_stage)) / 10, (
        "some passed a room twice"
    )


def walk_through(envs, right):
    """Every agent from the center through the right door, or the wrong one; returns the last step's reward and done."""
    leads_on = envs.current_room() % 2 == 1
    for _ in range(envs.task.room_size // 2):
        reward, done = envs.step(torch.where(leads_on == right, RIGHT, LEFT))
    return reward, done


def test_right_doors_lead_to_the_last_room_and_give_a_tenth_of_the_room_number():
    envs = Portal().make_envs(16)
    for room in range(1, 50):
        assert envs.observe()[:, 45:95].argmax(dim=1).eq(room - 1).all(), "the room's number is seen"
        reward, done = walk_through(envs, right=True)
        torch.testing.assert_close(reward, torch.full((16,), 0.1 * room))
        assert done.eq(room == 49).all()
    assert envs.episode_info["success"].all()
    assert envs.episode_info["rooms"].eq(50).all()
    torch.testing.assert_close(envs.episode_info["episode_return"], torch.full((16,), 122.5))
    assert envs.steps.eq(0).all()


def test_a_wrong_door_leads_back_to_room_1_and_passing_again_gives_the_reward_again():
    envs = Portal().make_envs(16)
    for right in (True, True, False, True, True):
        reward, done = walk_through(envs, right)
        assert not done.any()
    torch.testing.assert_close(reward, torch.full((16,), 0.2))
    assert envs.episode.room.eq(2).all()
    assert envs.episode.furthest_room.eq(2).all()


def test_the_second_mistake_in_a_room_ends_the_episode_and_mistakes_in_others_do_not():
    envs = Portal().make_envs(16)
    for right in (False, True, False, True, True, False, True):
        assert not walk_through(envs, right)[1].any()
    assert walk_through(envs, right=False)[1].all()
    assert not envs.episode_info["success"].any()
    assert envs.episode_info["rooms"].eq(3).all()
    assert envs.episode.rooms.lt(4).all(), "the next episode begins without mistakes"


def test_doors_are_drawn_evenly_for_each_episode_and_stay_during_it():
    envs = Portal(num_rooms=6).make_envs(4000)
    before = envs.episode.rooms
    assert torch.stack([(before == value).float().mean(0) for value in range(4)]).min() > 0.22
    walk_through(envs, right=True)
    assert torch.equal(envs.episode.rooms, before)
    envs.reset(torch.arange(4000) < 2000)
    assert torch.equal(envs.episode.rooms[2000:], before[2000:])
    assert 0.2 < (envs.episode.rooms[:2000] == before[:2000]).float().mean() < 0.3


def test_which_door_is_right_cannot_be_seen():
    envs = Portal().make_envs(64)
    observation = envs.observe()
    envs.episode.rooms = envs.episode.rooms ^ 1
    assert torch.equal(envs.observe(), observation)


def test_saved_portals_resume_where_they_were_saved():
    assert_saved_envs_resume(Portal(num_rooms=4, max_episode_steps=40))


def test_rooms_are_added_by_the_share_visited_and_evaluation_has_all_from_the_start():
    task = Portal(num_rooms=4, initial_num_rooms=2, curriculum_threshold=0.88)
    envs, stages = task.make_envs(2), []
    for share in (0.5, 0.9, float("nan"), 0.87, 0.88, 1.0):
        stages.append(task.curriculum_stage)
        task.update_curriculum(share)
    assert stages == [2, 2, 3, 3, 3, 4]
    assert envs.episode.last_room.eq(1).all(), "the episodes in progress keep their size"
    envs.reset(torch.tensor([True, False]))
    assert envs.episode.last_room.tolist() == [3, 1]
    assert Portal(num_rooms=4, initial_num_rooms=2).make_envs(2, split="valid").episode.last_room.eq(3).all()


def test_render_shows_the_room_and_what_the_agent_cannot_see():
    envs = Portal(num_rooms=4).make_envs(1)
    envs.episode.rooms[:] = 1
    assert envs.render().splitlines() == [
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
        ({"num_rooms": 1}, r"task.num_rooms must be at least 2, got 1"),
        ({"num_rooms": -3}, r"task.num_rooms must be at least 2, got -3"),
        ({"num_rooms": 502}, r"task.num_rooms must be at most 501 for task.max_episode_steps=1000, got 502"),
        ({"room_size": 4}, r"task.room_size must be odd and at least 3 cells, got 4"),
        ({"room_size": 1}, r"task.room_size .*, got 1"),
        ({"max_mistakes": 0}, r"task.max_mistakes must be 1 to 30, got 0"),
        ({"max_episode_steps": 0}, r"task.num_rooms must be at most 1 for task.max_episode_steps=0, got 50"),
        ({"initial_num_rooms": 51}, r"task.initial_num_rooms must be 2 to task.num_rooms=50, got 51"),
        ({"curriculum_min_intervals": 0}, r"task.curriculum_min_intervals"),
    ],
)
def test_invalid_arguments_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        Portal(**arguments)
