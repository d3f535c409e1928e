"""Instruction (section 5.2, A.2.1, figure 4): pass a message on, once the agent that it is for is present.

The text is everything that one agent of a LIGHT world, the viewer, sees and does:

    You are the squire. The queen arrives. Can you tell the cook that the queen wants to see them?      instruction
    You say "they say a lazy crow swallowed my boots." The queen says "nobody believes ..." ...         distractors
    You go towards the kitchen. The cook is here. You tell the cook "queen wants to see you!"           execution
                                                      <------------- answer ------------->

All agents act in turn, for ever. An agent in the viewer's room gives, with a chance of 25%, an instruction for the
first agent elsewhere that has none pending; otherwise it moves, with a chance of 50%. If an agent with a pending
instruction is present, the viewer executes it (the oldest first). Otherwise the viewer talks to one of those present,
and moves with a chance of 50%.

Every word is a target. Accuracy is of executing lines as a whole: all their words after the first, which follows from
the rules alone. Who is to be told can be seen from who is present; who gave the instruction only from the instruction,
so that guessing is right 1 / (agents - 2) of the time at best.

These are our choices: the wording, the order of turns and of pending instructions, that talk needs company, and the
growing number of distractors in training.
"""

import math
import re
from collections.abc import Iterator, Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .base import SPLITS, Batch, Task
from .dialogue import load_dialogue
from .instruction_map import load_map

MOVE_PROB = 0.5  # per turn
NO_REPEAT = 50  # an utterance does not come again among this many
CURRICULUM_GROWTH = 1.5  # of the number of distractors, from stage to stage
TRIAL_ROUNDS = 12_000  # for each agent: measures within 2 % how often the viewer talks before it executes

VIEWER, GOES, HERE = "You are the {}.", "You go towards the {}.", "The {} is here."
ARRIVES, LEAVES = "The {} arrives.", "The {} leaves towards the {}."
YOU_SAY, SAYS, QUOTE = 'You say "', 'The {} says "', '"'
TARGET, GIVER = "Can you tell the {} that the", "{} wants to see them?"
YOU_TELL, MESSAGE = 'You tell the {} "', '{} wants to see you!"'
TEMPLATES = (VIEWER, GOES, HERE, ARRIVES, LEAVES, YOU_SAY, SAYS, TARGET, GIVER, YOU_TELL, MESSAGE)


def split_words(text: str) -> list[str]:
    """Words and punctuation marks, in lower case."""
    return re.findall(r"\w+(?:['\u2019-]\w+)*|[^\w\s]", text.lower())


class Instruction(Task):
    """The text of endless worlds. Each stream of a batch is a world of its own; all have the same map.

    Args:
        distractors: Mean number of sentences said between an instruction and its execution.
        seed: Seed of the random numbers.
        map_path: A map of LIGHT's, such as complex_world.json (None: a built-in one), see instruction_map.py.
        dialogue: What agents say: "light", a file, or None for built-in sentences, see dialogue.py.
        num_rooms: Number of rooms, the first of the map (None: all).
        num_agents: Number of agents, the first of the map (None: all).
        instruction_prob: Chance per turn that an agent in the viewer's room gives an instruction (LIGHT: 0.25).
        max_pending: Number of instructions that may be pending at once (None: one for each agent).
        initial_distractors: Distractors in the first training episodes (None: `distractors` at once); the number grows
            by half at a time.
        curriculum_threshold: Mean training accuracy above which it grows.
        eval_tokens: Number of words of valid and of test each, shared by the streams, rounded up to whole blocks; with
            the full number of distractors.

    Attributes:
        vocab: the words of the tokens; the first stands for every word that is not in the training texts.

    Raises:
        FileNotFoundError: if there is no such map or dialogue.
        ValueError: if these are not what they should be, or the arguments do not fit each other.
    """

    metric = "accuracy"
    scoring = "line"
    vocab: list[str]
    curriculum_stage: float  # mean number of distractors in training from now on

    def __init__(
        self,
        distractors: float,
        seed: int = 0,
        map_path: str | Path | None = None,
        dialogue: str | Path | None = None,
        num_rooms: int | None = None,
        num_agents: int | None = None,
        instruction_prob: float = 0.25,
        max_pending: int | None = None,
        initial_distractors: float | None = None,
        curriculum_threshold: float = 0.8,
        eval_tokens: int = 1_000_000,
    ):
        initial_distractors = distractors if initial_distractors is None else initial_distractors
        if not 0 < initial_distractors <= distractors:
            limits = f"positive and at most task.distractors={distractors}"
            raise ValueError(f"task.initial_distractors must be {limits}, got {initial_distractors}")
        if not 0 < instruction_prob <= 1:
            raise ValueError(f"task.instruction_prob must be above 0 and at most 1, got {instruction_prob}")
        if max_pending is not None and max_pending < 1:
            advice = f"got {max_pending}; for no limit use null"
            raise ValueError(f"task.max_pending must be at least 1 instruction, {advice}")
        if eval_tokens < 1:
            raise ValueError(f"task.eval_tokens must be at least 1, got {eval_tokens}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self.map = load_map(map_path, num_rooms, num_agents)
        self.distractors, self.curriculum_threshold, self.eval_tokens = distractors, curriculum_threshold, eval_tokens
        self.instruction_prob = instruction_prob
        self.max_pending = len(self.map.agents) if max_pending is None else max_pending
        self.curriculum_stage = initial_distractors
        texts = {split: list(dict.fromkeys(utterances)) for split, utterances in load_dialogue(dialogue).items()}
        for split, utterances in texts.items():
            if len(utterances) <= NO_REPEAT:
                have = f"{len(utterances)} different utterances in {split}"
                raise ValueError(f"task.dialogue={dialogue} has {have}, more than {NO_REPEAT} are needed")
        known = {word for text in (*TEMPLATES, *self.map.rooms, *self.map.agents) for word in split_words(text)}
        known.update(word for text in texts["train"] for word in split_words(text))
        self.vocab = ["<unknown>", *sorted(known)]
        self.vocab_size = self.num_classes = len(self.vocab)
        self.token_of = {word: token for token, word in enumerate(self.vocab)}
        self.encode_line = cache(self.encode)  # templates with names filled in: a few thousand lines
        self.utterances = {split: [self.encode(text) for text in utterances] for split, utterances in texts.items()}
        self.seed = 0  # for the trial, so that `distractors` means the same for every seed
        rules = str((self.map, instruction_prob, self.max_pending))
        if rules not in measured_talks:  # a second or more, once in a process
            measured_talks[rules] = measure_talks(SilentWorld(self, "train", 0))
        self.talks_per_instruction = measured_talks[rules]
        if not self.talks_per_instruction:
            raise ValueError(f"task.map_path={map_path}: in a trial no instruction is executed after any talk")
        self.seed = seed

    def encode(self, text: str) -> list[int]:
        return [self.token_of.get(word, 0) for word in split_words(text)]

    def stream(self, split: str, batch_size: int, block_size: int) -> "InstructionStream":
        return InstructionStream(self, split, batch_size, block_size)

    def update_curriculum(self, progress: float) -> None:
        """Add distractors if the training accuracy is above the threshold; nan (nothing was executed) is not."""
        if progress > self.curriculum_threshold:
            self.curriculum_stage = min(CURRICULUM_GROWTH * self.curriculum_stage, self.distractors)

    def state_dict(self) -> dict[str, Any]:
        return {"curriculum_stage": self.curriculum_stage}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.curriculum_stage = state["curriculum_stage"]


measured_talks: dict[str, float] = {}  # by the rules of the world


def measure_talks(world: "World") -> float:
    """Mean number of talks of the viewer between an instruction and its execution; 0 if there are none.

    The first rounds are left out: what is executed in them was not pending for long.
    """
    before, num_rounds = (0, 0), TRIAL_ROUNDS * len(world.map.agents)
    for round_number in range(-num_rounds // 8, num_rounds):
        if round_number == 0:
            before = world.talks_between, world.num_executed
        world.play_round(0.0)
    return (world.talks_between - before[0]) / max(1, world.num_executed - before[1])


class World:
    """One world and its viewer's text: a pure function of its number, split, seed and the calls of `play_round`."""

    STATE = (
        *("num_drawn", "room", "pending", "recent_utterances", "num_words", "num_talks", "talks_between"),
        *("num_executed", "text", "answer_id", "answer_distance"),
    )

    def __init__(self, task: Instruction, split: str, number: int):
        self.task, self.map, self.utterances = task, task.map, task.utterances[split]
        self.seed = [task.seed, SPLITS.index(split), number]
        self.num_drawn = 0  # random numbers
        self.uniform = self.random_numbers()
        everyone = range(len(self.map.agents))
        self.viewer, *self.agents = sorted(everyone, key=lambda _: self.draw())  # in the order of their turns
        self.room = [self.choose(range(len(self.map.rooms))) for _ in everyone]
        self.pending: dict[int, tuple[int, int, int]] = {}  # target: giver, num_words and num_talks when it was given
        self.recent_utterances: list[int] = []
        self.num_words = 0
        self.num_talks = self.num_executed = 0
        self.talks_between = 0  # talks between instructions and their executions, over all executed ones
        # The text that has not been read yet, and for each word
        self.text: list[int] = []
        self.answer_id: list[int] = []  # the number of the executing line; -1: none
        self.answer_distance: list[int] = []  # words back from the giver's name in it to that in the instruction
        self.write(VIEWER.format(self.name(self.viewer)))
        self.describe_agents_present()

    def play_round(self, sentences: float) -> None:
        """Everyone's turn, once. sentences: mean number of sentences that are said when the viewer talks."""
        self.viewer_turn(sentences)
        for agent in self.agents:
            if self.room[agent] != self.room[self.viewer]:
                if self.draw() < MOVE_PROB:
                    self.room[agent] = self.choose(self.map.exits[self.room[agent]])
                    if self.room[agent] == self.room[self.viewer]:
                        self.write(ARRIVES.format(self.name(agent)))
            elif not (self.draw() < self.task.instruction_prob and self.instruct(agent)) and self.draw() < MOVE_PROB:
                self.room[agent] = self.choose(self.map.exits[self.room[agent]])
                self.write(LEAVES.format(self.name(agent), self.map.rooms[self.room[agent]]))

    def viewer_turn(self, sentences: float) -> None:
        """Execute the oldest instruction whose target is present or, without one, talk to an agent and maybe move."""
        present = self.agents_present()
        targets = [target for target in self.pending if target in present]  # the oldest first
        if targets:
            self.execute(targets[0])
            return
        if present:
            self.talk(self.choose(present), sentences)
        if self.draw() < MOVE_PROB:
            self.room[self.viewer] = self.choose(self.map.exits[self.room[self.viewer]])
            self.write(GOES.format(self.map.rooms[self.room[self.viewer]]))
            self.describe_agents_present()

    def instruct(self, giver: int) -> bool:
        """Give an instruction. Returns False if there is nobody to send for, or too much is pending."""
        if len(self.pending) >= self.task.max_pending:
            return False
        for target in self.agents:
            if target not in self.pending and self.room[target] != self.room[giver]:
                self.write(TARGET.format(self.name(target)))
                self.pending[target] = giver, self.num_words, self.num_talks
                self.write(GIVER.format(self.name(giver)))
                return True
        return False

    def execute(self, target: int) -> None:
        """Tell `target`, who is present, who wants to see them: the answer to the instruction pending for them."""
        giver, words_then, talks_then = self.pending.pop(target)
        line = self.task.encode_line(YOU_TELL.format(self.name(target)))
        message = self.task.encode_line(MESSAGE.format(self.name(giver)))
        distance = self.num_words + len(line) - words_then
        self.append(line[:1])  # not scored: when an executing line begins follows from the rules alone
        self.append(line[1:] + message, self.num_executed, distance)
        self.num_executed += 1
        self.talks_between += self.num_talks - talks_then

    def talk(self, partner: int, sentences: float) -> None:
        """The viewer and another agent take turns: a uniform number of sentences, up to twice the mean."""
        self.num_talks += 1
        for number in range(int(2 * sentences * self.draw() + self.draw())):
            self.write(SAYS.format(self.name(partner)) if number % 2 else YOU_SAY)
            while (utterance := self.choose(range(len(self.utterances)))) in self.recent_utterances:
                pass
            self.recent_utterances = [*self.recent_utterances[1 - NO_REPEAT :], utterance]
            self.append(self.utterances[utterance])
            self.write(QUOTE)

    def describe_agents_present(self) -> None:
        for agent in self.agents_present():
            self.write(HERE.format(self.name(agent)))

    def agents_present(self) -> list[int]:
        """The other agents in the viewer's room."""
        here = self.room[self.viewer]
        return [agent for agent in self.agents if self.room[agent] == here]

    def name(self, agent: int) -> str:
        return self.map.agents[agent]

    def write(self, line: str) -> None:
        self.append(self.task.encode_line(line))

    def append(self, tokens: list[int], answer_id: int = -1, answer_distance: int = 0) -> None:
        self.text += tokens
        self.answer_id += [answer_id] * len(tokens)
        self.answer_distance += [answer_distance] * len(tokens)
        self.num_words += len(tokens)

    def choose(self, options: Sequence[int]) -> int:
        return options[int(self.draw() * len(options))]

    def draw(self) -> float:
        """A random number from 0 to 1."""
        self.num_drawn += 1
        return next(self.uniform)

    def random_numbers(self) -> Iterator[float]:
        """Uniform numbers from 0 to 1, continuing after the `num_drawn` so far."""
        generator = np.random.Generator(np.random.PCG64(self.seed).advance(self.num_drawn))
        while True:
            yield from generator.random(1024).tolist()

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.STATE:
            setattr(self, name, state[name])
        self.uniform = self.random_numbers()


class SilentWorld(World):
    """A world whose text is not written, for which everything else happens sooner."""

    def write(self, line: str) -> None:
        pass

    def append(self, tokens: list[int], answer_id: int = -1, answer_distance: int = 0) -> None:
        pass


class InstructionStream:
    """Blocks of parallel worlds."""

    def __init__(self, task: Instruction, split: str, batch_size: int, block_size: int):
        self.task, self.split, self.block_size = task, split, block_size
        self.worlds = [World(task, split, number) for number in range(batch_size)]
        self.num_blocks = 0  # read so far
        self.max_blocks = math.inf if split == "train" else math.ceil(task.eval_tokens / (batch_size * block_size))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self.num_blocks == self.max_blocks:
            raise StopIteration
        self.num_blocks += 1
        distractors = self.task.curriculum_stage if self.split == "train" else self.task.distractors
        for world in self.worlds:
            while len(world.text) <= self.block_size:
                world.play_round(distractors / self.task.talks_per_instruction)
        words, answer_id, answer_distance = (
            torch.from_numpy(np.array([getattr(world, name)[: self.block_size + 1] for world in self.worlds]))
            for name in ("text", "answer_id", "answer_distance")
        )  # (B, T + 1) each
        for world in self.worlds:
            for values in (world.text, world.answer_id, world.answer_distance):
                del values[: self.block_size]
        return Batch(words[:, :-1], words[:, 1:], answer_distance=answer_distance[:, 1:], answer_id=answer_id[:, 1:])

    def state_dict(self) -> dict[str, Any]:
        return {"num_blocks": self.num_blocks, "worlds": [deepcopy(world.state_dict()) for world in self.worlds]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_blocks = state["num_blocks"]
        for world, world_state in zip(self.worlds, state["worlds"], strict=True):
            world.load_state_dict(deepcopy(world_state))
