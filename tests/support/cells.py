"""A gridworld's rules once more: one world, cell by cell, as a dictionary of places; and a walk that compares."""

import io

import torch

MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))  # up, right, down, left: (rows, columns)


def look(floor, things, at, words):
    """Nine bags of words around `at`: what is neither floor nor a thing is block."""
    seen = []
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            place = at[0] + down, at[1] + right
            bag = set(things.get(place, () if place in floor else ("block",)))
            bag |= {"agent"} if place == at else set()
            assert bag <= set(words)
            seen += [float(word in bag) for word in words]
    return seen


def one_hot(number, length):
    return [float(number == each) for each in range(length)]


def assert_worlds_follow(reference, task, weights, environments=16, steps=1000):
    """Random actions, of these weights, in worlds and in a reference of each; returns the figures of all that ended."""
    worlds, chance = task.worlds(environments), torch.Generator().manual_seed(0)
    ones, ended = [reference(worlds, each) for each in range(environments)], []
    for _ in range(steps):
        assert worlds.observe().tolist() == [one.look() for one in ones]
        assert worlds.steps.tolist() == [one.time for one in ones]
        action = torch.multinomial(torch.tensor(weights), environments, replacement=True, generator=chance)
        reward, done = worlds.step(action)
        expected = [one.step(each) for one, each in zip(ones, action.tolist(), strict=True)]
        torch.testing.assert_close(reward, torch.tensor([each[0] for each in expected]))
        assert done.tolist() == [each[1] for each in expected]
        for each in done.nonzero().flatten().tolist():
            figures = {name: float(figure[each]) for name, figure in worlds.ended.items()}
            assert {name: round(figure, 4) for name, figure in figures.items()} == ones[each].figures()
            ended.append(figures)
            ones[each] = reference(worlds, each)
    return ended


def assert_saved_worlds_go_on(task, steps=100):
    """Through a file, as a checkpoint of plain tensors is."""
    worlds, actions = task.worlds(8), torch.randint(4, (2 * steps, 8), generator=torch.Generator().manual_seed(1))
    for action in actions[:steps]:
        worlds.step(action)
    torch.save(worlds.state_dict(), file := io.BytesIO())
    file.seek(0)
    resumed = task.worlds(8, seed=5)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for action in actions[steps:]:
        assert torch.equal(worlds.observe(), resumed.observe())
        assert torch.equal(worlds.steps, resumed.steps)
        for one, other in zip(worlds.step(action), resumed.step(action), strict=True):
            assert torch.equal(one, other)
