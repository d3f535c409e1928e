"""Let a trained model write on, for as long as one likes: `expire-span-generate RUN`."""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from expire_span.tasks.tokens import written

from ..transformer import Transformer
from .main import end
from .saved import open_run, saved_config
from .settings import checked

PROMPT_BLOCK = 256  # timesteps of the prompt that are read at once
REPORT = 1000  # tokens between two words on the memory


@torch.no_grad()
def generate(
    model: Transformer, prompt: Sequence[int], temperature: float = 1.0, top_k: int | None = None, seed: int = 0
) -> Iterator[tuple[int, Tensor, dict[str, Tensor | float]]]:
    """Token after token, without an end, each with the log p (vocabulary,) that it was drawn from, and memory figures.

    temperature divides the log p; 0 takes the likeliest. top_k draws from so many of the likeliest alone. Every
    memory's keys, values and spans are made once, so a token costs what its survivors cost.
    """
    model.eval()
    device = model.position.device
    chance = torch.Generator(device).manual_seed(seed)
    state = model.initial_state(1)
    at_once = min(PROMPT_BLOCK, *(mechanism.longest_block for mechanism in model.mechanisms))
    for block in torch.tensor([list(prompt)], device=device).split(at_once, 1):
        scores, state, figures = model(block, state)  # (1, T, classes)
    while True:
        log_p = model.output.log_p(scores[:, -1])[0]  # (vocabulary,)
        if temperature == 0:
            token = log_p.argmax()
        else:
            bent = log_p / temperature
            if top_k is not None:
                bent = bent.masked_fill(bent < bent.topk(min(top_k, len(bent))).values[-1], -torch.inf)
            token = torch.multinomial(bent.softmax(-1), 1, generator=chance)[0]
        yield int(token), log_p, figures
        scores, state, figures = model(token.view(1, 1), state)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="expire-span-generate",
        description="Let the model of a run write on. The text goes to the output; how fast it comes, and how much "
        f"the model remembers, to the error output, every {REPORT:,} tokens and at the end.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder of a text task")
    parser.add_argument("--prompt", default="\n", help="what to go on from")
    parser.add_argument("--tokens", type=int, default=500, help="how many to write (default 500)")
    parser.add_argument("--temperature", type=float, default=1.0, help="above 1: bolder; 0: always the likeliest")
    parser.add_argument("--top-k", type=int, help="draw from so many of the likeliest tokens alone")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        if options.temperature < 0 or (options.top_k is not None and options.top_k < 1) or options.tokens < 1:
            raise ValueError("--temperature must not be negative, --top-k and --tokens must be at least 1")
        run = open_run(options.run, checked(saved_config(options.run)))
        write(run.model, run.task, options)
    except (KeyboardInterrupt, BrokenPipeError):
        pass
    except Exception as error:
        end(error)


def write(model: Transformer, task: object, options: argparse.Namespace) -> None:
    encode, decode = written(task)
    prompt = encode(options.prompt)
    if not prompt:
        raise ValueError("--prompt is empty; give at least one character or word")
    sys.stdout.buffer.write(options.prompt.encode())
    began = before = time.perf_counter()
    for number, (token, _, figures) in enumerate(
        generate(model, prompt, options.temperature, options.top_k, options.seed), start=1
    ):
        sys.stdout.buffer.write(decode(token))
        sys.stdout.buffer.flush()
        if number % REPORT == 0 or number == options.tokens:
            now = time.perf_counter()
            speed = ((number - 1) % REPORT + 1) / (now - before)
            size, kept = float(figures["memory/size"]), float(figures["memory/bytes"])
            print(f"\n[{number:,} tokens, {speed:.0f}/s, {size:.1f} memories, {kept / 1000:.1f} kB]", file=sys.stderr)
            before = now
        if number == options.tokens:
            break
    if options.tokens > REPORT:
        print(f"[{options.tokens / (time.perf_counter() - began):.0f} tokens/s in all]", file=sys.stderr)


if __name__ == "__main__":
    main()
