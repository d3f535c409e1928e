"""The rules of a gridworld once more, one environment at a time, and a walk that compares both implementations."""

import io

import torch

MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))  # up, right, down, left: (rows, columns)


def view(floor, things, position, words):
    """Nine bags of words around `position`; a cell that is neither floor nor a thing is a block."""
    observation = []
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            cell = position[0] + down, position[1] + right
            bag = set(things.get(cell, () if cell in floor else ("block",)))
            bag |= {"agent"} if cell == position else set()
            assert bag <= set(words)
            observation += [float(word in bag) for word in words]
    return observation


def one_hot(number, length):
    return [float(number == index) for index in range(length)]


def assert_envs_follow(reference, task, weights, num_envs=16, steps=1000):
    """Take random actions, of these weights, in both implementations; return the info of all episodes that ended."""
    envs, generator = task.make_envs(num_envs), torch.Generator().manual_seed(0)
    references, episodes = [reference(envs, env) for env in range(num_envs)], []
    for _ in range(steps):
        assert envs.observe().tolist() == [single.observe() for single in references]
        assert envs.steps.tolist() == [single.time for single in references]
        action = torch.multinomial(torch.tensor(weights), num_envs, replacement=True, generator=generator)
        reward, done = envs.step(action)
        expected = [single.step(move) for single, move in zip(references, action.tolist(), strict=True)]
        torch.testing.assert_close(reward, torch.tensor([expected_reward for expected_reward, _ in expected]))
        assert done.tolist() == [expected_done for _, expected_done in expected]
        for env in done.nonzero().flatten().tolist():
            info = {name: float(values[env]) for name, values in envs.episode_info.items()}
            assert {name: round(value, 4) for name, value in info.items()} == references[env].info()
            episodes.append(info)
            references[env] = reference(envs, env)
    return episodes


def assert_saved_envs_resume(task, steps=100):
    """Save to a file and load it with weights_only, as checkpoints are."""
    envs, actions = task.make_envs(8), torch.randint(4, (2 * steps, 8), generator=torch.Generator().manual_seed(1))
    for action in actions[:steps]:
        envs.step(action)
    torch.save(envs.state_dict(), file := io.BytesIO())
    file.seek(0)
    resumed = task.make_envs(8, seed=5)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for action in actions[steps:]:
        assert torch.equal(envs.observe(), resumed.observe())
        assert torch.equal(envs.steps, resumed.steps)
        for expected, actual in zip(envs.step(action), resumed.step(action), strict=True):
            assert torch.equal(expected, actual)
