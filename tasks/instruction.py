"""Instruction: pass a message on, once the one it is for is there. One of a world's agents tells all that it sees.

    You are the squire. The queen arrives. Can you tell the cook that the queen wants to see them?      instruction
    You say "they say a lazy crow swallowed my boots." The queen says "nobody believes ..." ...         distractors
    You go towards the kitchen. The cook is here. You tell the cook "queen wants to see you!"           execution
                                                      <------------- answer ------------->

All act in turn, for ever. Whoever is in the viewer's room gives, with a chance of 25 %, an instruction for the first
agent elsewhere for whom none waits; else moves with a chance of 50 %. The viewer, when someone is there for whom an
instruction waits, executes it (the oldest first); else talks to one of those present, and moves likewise.

Every word is a target. Scored is the executing line as a whole: all its words after the first, which the rules alone
call for. For whom it is can be told from who is there; who gave it only from the instruction, so that guessing is
right once in agents - 2 times at best. The wording, the order of turns and of what waits, that talk needs company,
and the growing number of distractors in training are our choice.
"""

import math
import re
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .chatter import build_chatter
from .light_world import build_map
from .stream import SPLITS, Batch

MOVE = 0.5  # chance a turn
UNHEARD = 50  # no utterance comes again among so many
GROWTH = 1.5  # of the distractors, from stage to stage
TRIAL = 15_000  # rounds in which it is found out how often there is talk before an instruction is executed

VIEWER, GOES, HERE = "You are the {}.", "You go towards the {}.", "The {} is here."
ARRIVES, LEAVES = "The {} arrives.", "The {} leaves towards the {}."
YOU_SAY, SAYS, QUOTE = 'You say "', 'The {} says "', '"'
TARGET, GIVER = "Can you tell the {} that the", "{} wants to see them?"
YOU_TELL, MESSAGE = 'You tell the {} "', '{} wants to see you!"'
FRAMES = (VIEWER, GOES, HERE, ARRIVES, LEAVES, YOU_SAY, SAYS, TARGET, GIVER, YOU_TELL, MESSAGE)


def split_words(text: str) -> list[str]:
    """Words and single signs, in small letters."""
    return re.findall(r"\w+(?:['\u2019-]\w+)*|[^\w\s]", text.lower())


class Instruction:
    """Words of endless worlds: streams of a batch are worlds of their own, alike only in their map.

    world               a map of LIGHT's, such as complex_world.json (None: a built-in one), see light_world.py
    chatter             what the dialogue is made of: "light", a file, or None for built-in sentences, see chatter.py
    rooms, agents       only the first so many of the world (None: all)
    ask                 chance a turn that one who is in the viewer's room gives an instruction (LIGHT: 0.25)
    waiting             instructions that may wait at once (None: one for each agent)
    distractors         mean number of sentences said between an instruction and its execution
    first_distractors   the same in training's beginning, growing up to `distractors` (None: `distractors` at once)
    bar                 mean accuracy above which it grows
    evaluation_words    in valid and in test each, shared by the streams, in whole blocks; at the full `distractors`

    `words[token]` is a token's word, the first stands for all that training's worlds do not have.

    Raises what `build_map` and `build_chatter` raise, ValueError where the sizes do not fit each other.
    """

    measure = "accuracy"
    answer = "line"

    def __init__(
        self,
        distractors: float,
        seed: int = 0,
        world: str | Path | None = None,
        chatter: str | Path | None = None,
        rooms: int | None = None,
        agents: int | None = None,
        ask: float = 0.25,
        waiting: int | None = None,
        first_distractors: float | None = None,
        bar: float = 0.8,
        evaluation_words: int = 1_000_000,
    ):
        first_distractors = distractors if first_distractors is None else first_distractors
        if not 0 < first_distractors <= distractors:
            limits = f"positive and at most task.distractors={distractors}"
            raise ValueError(f"task.first_distractors must be {limits}, got {first_distractors}")
        if not 0 < ask <= 1:
            raise ValueError(f"task.ask is a chance and must be above 0 and at most 1, got {ask}")
        if waiting is not None and waiting < 1:
            raise ValueError(f"task.waiting must be at least 1 instruction, got {waiting}; for no limit use null")
        if evaluation_words < 1:
            raise ValueError(f"task.evaluation_words must be at least 1, got {evaluation_words}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self.map = build_map(world, rooms, agents)
        self.distractors, self.bar, self.evaluation_words = distractors, bar, evaluation_words
        self.ask = ask
        self.waiting = len(self.map.agents) if waiting is None else waiting
        self.stage = first_distractors  # mean number of distractors in training from now on
        texts = {split: list(dict.fromkeys(utterances)) for split, utterances in build_chatter(chatter).items()}
        for split, utterances in texts.items():
            if len(utterances) <= UNHEARD:
                few = f"task.chatter={chatter} has {len(utterances)} different utterances in {split}"
                raise ValueError(f"{few}, more than {UNHEARD} are needed")
        known = {word for text in (*FRAMES, *self.map.rooms, *self.map.agents) for word in split_words(text)}
        known.update(word for text in texts["train"] for word in split_words(text))
        self.words = ["<unknown>", *sorted(known)]
        self.vocabulary = self.classes = len(self.words)
        self.tokens = {word: token for token, word in enumerate(self.words)}
        self.encode = cache(self.encoded)  # the frames with their names: a few thousand lines
        self.utterances = {split: [self.encoded(text) for text in utterances] for split, utterances in texts.items()}
        self.seed = 0  # so that the talk is as much for every seed
        self.talks = talks_between(World(self, "train", 0))  # chances to talk between instruction and execution
        if not self.talks:
            raise ValueError(f"task.world={world}: in {TRIAL:,} rounds no instruction is executed after any talk")
        self.seed = seed

    def encoded(self, text: str) -> list[int]:
        return [self.tokens.get(word, 0) for word in split_words(text)]

    def stream(self, split: str, batch: int, block: int) -> "InstructionStream":
        return InstructionStream(self, split, batch, block)

    def feedback(self, accuracy: float) -> None:
        """Mean training accuracy of late (nan: nothing was executed); above the bar, more distractors come."""
        if accuracy > self.bar:
            self.stage = min(GROWTH * self.stage, self.distractors)

    def state_dict(self) -> dict[str, Any]:
        return {"stage": self.stage}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stage = state["stage"]


def talks_between(world: "World") -> float:
    """Mean number of chances to talk between an instruction and its execution; 0 if there are none.

    What is executed first did not wait long: a first part of the rounds is left out.
    """
    before = (0, 0)
    for number in range(TRIAL + TRIAL // 8):
        if number == TRIAL // 8:
            before = world.talks_between, world.executed
        world.turns(0.0)
    return (world.talks_between - before[0]) / max(1, world.executed - before[1])


class World:
    """One world and what its viewer tells of it: a pure function of its number, the split, the seed and `turns`."""

    STATE = (
        *("drawn", "room", "waiting", "heard", "time", "talks", "talks_between", "executed"),
        *("text", "answer", "distance"),
    )

    def __init__(self, task: Instruction, split: str, number: int):
        self.task, self.map, self.utterances = task, task.map, task.utterances[split]
        self.seed = [task.seed, SPLITS.index(split), number]
        self.drawn = 0  # random numbers
        self.random = self.numbers()
        everyone = range(len(self.map.agents))
        self.viewer, *self.agents = sorted(everyone, key=lambda _: self.draw())  # in the order of their turns
        self.room = [self.choose(range(len(self.map.rooms))) for _ in everyone]
        self.waiting: dict[int, tuple[int, int, int]] = {}  # target: giver, when its name was said, talks before
        self.heard: list[int] = []  # the last utterances
        self.time = 0  # words told
        self.talks = self.talks_between = self.executed = 0
        self.text: list[int] = []  # told, but not read yet; and of each word
        self.answer: list[int] = []  # the number of the executing line, -1 elsewhere
        self.distance: list[int] = []  # how many words before it the instruction had the giver's name, 0 elsewhere
        self.tell(VIEWER.format(self.name(self.viewer)))
        self.look()

    def turns(self, sentences: float) -> None:
        """Everyone's turn, once. sentences: mean number that are said when there is talk."""
        self.act(sentences)
        for agent in self.agents:
            if self.room[agent] != self.room[self.viewer]:
                if self.draw() < MOVE:
                    self.room[agent] = self.choose(self.map.exits[self.room[agent]])
                    if self.room[agent] == self.room[self.viewer]:
                        self.tell(ARRIVES.format(self.name(agent)))
            elif not (self.draw() < self.task.ask and self.ask(agent)) and self.draw() < MOVE:
                self.room[agent] = self.choose(self.map.exits[self.room[agent]])
                self.tell(LEAVES.format(self.name(agent), self.map.rooms[self.room[agent]]))

    def act(self, sentences: float) -> None:
        there = self.company()
        targets = [target for target in self.waiting if target in there]  # the oldest first
        if targets:
            self.execute(targets[0])
            return
        if there:
            self.talk(self.choose(there), sentences)
        if self.draw() < MOVE:
            self.room[self.viewer] = self.choose(self.map.exits[self.room[self.viewer]])
            self.tell(GOES.format(self.map.rooms[self.room[self.viewer]]))
            self.look()

    def ask(self, giver: int) -> bool:
        """False where there is nobody to ask for, or too much waits already."""
        if len(self.waiting) >= self.task.waiting:
            return False
        for target in self.agents:
            if target not in self.waiting and self.room[target] != self.room[giver]:
                self.tell(TARGET.format(self.name(target)))
                self.waiting[target] = giver, self.time, self.talks
                self.tell(GIVER.format(self.name(giver)))
                return True
        return False

    def execute(self, target: int) -> None:
        giver, said, talks = self.waiting.pop(target)
        line = self.task.encode(YOU_TELL.format(self.name(target)))
        message = self.task.encode(MESSAGE.format(self.name(giver)))
        distance = self.time + len(line) - said
        self.add(line[:1])  # when it begins follows from the rules alone
        self.add(line[1:] + message, self.executed, distance)
        self.executed += 1
        self.talks_between += self.talks - talks

    def talk(self, partner: int, sentences: float) -> None:
        """The viewer and another take turns: uniformly many sentences, up to twice the mean."""
        self.talks += 1
        for number in range(int(2 * sentences * self.draw() + self.draw())):
            self.tell(SAYS.format(self.name(partner)) if number % 2 else YOU_SAY)
            while (utterance := self.choose(range(len(self.utterances)))) in self.heard:
                pass
            self.heard = [*self.heard[1 - UNHEARD :], utterance]
            self.add(self.utterances[utterance])
            self.tell(QUOTE)

    def look(self) -> None:
        for agent in self.company():
            self.tell(HERE.format(self.name(agent)))

    def company(self) -> list[int]:
        here = self.room[self.viewer]
        return [agent for agent in self.agents if self.room[agent] == here]

    def name(self, agent: int) -> str:
        return self.map.agents[agent]

    def tell(self, line: str) -> None:
        self.add(self.task.encode(line))

    def add(self, tokens: list[int], answer: int = -1, distance: int = 0) -> None:
        self.text += tokens
        self.answer += [answer] * len(tokens)
        self.distance += [distance] * len(tokens)
        self.time += len(tokens)

    def choose(self, options: Any) -> int:
        return options[int(self.draw() * len(options))]

    def draw(self) -> float:
        self.drawn += 1
        return next(self.random)

    def numbers(self) -> Iterator[float]:
        """Uniform from 0 to 1, going on after those drawn so far."""
        generator = np.random.Generator(np.random.PCG64(self.seed).advance(self.drawn))
        while True:
            yield from generator.random(1024).tolist()

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.STATE:
            setattr(self, name, state[name])
        self.random = self.numbers()


class InstructionStream:
    """Blocks of worlds side by side."""

    def __init__(self, task: Instruction, split: str, batch: int, block: int):
        self.task, self.split, self.block = task, split, block
        self.worlds = [World(task, split, number) for number in range(batch)]
        self.blocks = 0  # read
        self.end = math.inf if split == "train" else math.ceil(task.evaluation_words / (batch * block))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self.blocks == self.end:
            raise StopIteration
        self.blocks += 1
        mean = self.task.stage if self.split == "train" else self.task.distractors
        for world in self.worlds:
            while len(world.text) <= self.block:
                world.turns(mean / self.task.talks)
        words, answers, distances = (
            torch.from_numpy(np.array([getattr(world, part)[: self.block + 1] for world in self.worlds]))  # (B, T + 1)
            for part in ("text", "answer", "distance")
        )
        for world in self.worlds:
            for part in (world.text, world.answer, world.distance):
                del part[: self.block]
        return Batch(words[:, :-1], words[:, 1:], distance=distances[:, 1:], answer=answers[:, 1:])

    def state_dict(self) -> dict[str, Any]:
        return {"blocks": self.blocks, "worlds": [deepcopy(world.state_dict()) for world in self.worlds]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.blocks = state["blocks"]
        for world, saved in zip(self.worlds, state["worlds"], strict=True):
            world.load_state_dict(deepcopy(saved))
