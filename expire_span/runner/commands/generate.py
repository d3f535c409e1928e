"""Generate text with a trained model, as long as one likes: `expire-span-generate RUN`."""

import argparse
import math
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from expire_span.tasks.base import Task
from expire_span.tasks.token_stream import text_codec

from ...decoding import Decoder
from ...transformer import Transformer
from ..config.schema import validate
from ..errors import exit_with_message
from ..load_run import LoadedRun, load_run
from ..logging.media import Table
from ..logging.trackers import trackers
from ..logging.wandb_logger import default_group
from ..run_folder.config_files import load_config

PROMPT_BLOCK_SIZE = 256  # timesteps of the prompt that are processed at once
REPORT_EVERY = 1000  # tokens between two reports of speed and memory


@torch.no_grad()
def generate(
    model: Transformer, prompt: Sequence[int], temperature: float = 1.0, top_k: int | None = None, seed: int = 0
) -> Iterator[tuple[int, Tensor, Decoder]]:
    """Sample token after token, without end.

    Every memory's keys, values and span are computed once, so that a token costs what the surviving memories cost.

    Args:
        prompt: token ids, at least one.
        temperature: divides the log-probabilities; 0 takes the most likely token.
        top_k: sample from the k most likely tokens only.

    Yields:
        each token, the log-probabilities (vocab_size,) that it was sampled from, and what it was decoded with.
    """
    model.eval()
    device = model.position.device
    generator = torch.Generator(device).manual_seed(seed)
    state = model.initial_state(1)
    block_size = min(PROMPT_BLOCK_SIZE, *(mechanism.max_block_size for mechanism in model.mechanisms))
    tokens = torch.tensor([list(prompt)], device=device)  # (1, T)
    for block in tokens[:, :-1].split(block_size, 1) if len(prompt) > 1 else ():
        _, state, _ = model(block, state)
    decoder, token = Decoder(model, state), tokens[0, -1]
    while True:
        log_probs = model.output_head.log_probs(decoder(token[None]))[0]  # (vocab_size,)
        if temperature == 0:
            token = log_probs.argmax()
        else:
            scaled = (log_probs - log_probs.max()) / temperature  # the most likely one stays finite: 0
            if top_k is not None:
                lowest = scaled.topk(min(top_k, len(scaled))).values[-1]
                scaled = scaled.masked_fill(scaled < lowest, -torch.inf)
            token = torch.multinomial(scaled.softmax(-1), 1, generator=generator)[0]
        yield int(token), log_probs, decoder


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="expire-span-generate",
        description="Let the model of a run continue a prompt. The text goes to standard output; speed and memory size "
        f"to standard error, every {REPORT_EVERY:,} tokens and at the end.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder of a text task")
    parser.add_argument("--prompt", default="\n", help="the text to continue (default: a line break)")
    parser.add_argument("--max-new-tokens", type=int, default=500, help="how many to generate (default 500)")
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="above 1: more random; 0: the most likely (default 1)"
    )
    parser.add_argument("--top-k", type=int, help="sample from the k most likely tokens only (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampled tokens (default 0)")
    parser.add_argument("--wandb", action="store_true", help="log the text to W&B, beside the run")
    parser.add_argument("--tokens", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tokens:
        parser.error(f"--tokens is now called --max-new-tokens: --max-new-tokens {options.tokens}")
    try:
        if not 0 <= options.temperature < math.inf:
            raise ValueError(f"--temperature must be a number from 0 on, got {options.temperature}")
        for flag, value in {"--top-k": options.top_k, "--max-new-tokens": options.max_new_tokens}.items():
            if value is not None and value < 1:
                raise ValueError(f"{flag} must be at least 1, got {value}")
        run = load_run(options.run, validate(load_config(options.run)))
        text = print_generated_text(run.model, run.task, options)
        if options.wandb:
            log_to_wandb(run, text, options)
    except (KeyboardInterrupt, BrokenPipeError):
        pass
    except Exception as error:
        exit_with_message(error)


def print_generated_text(model: Transformer, task: Task, options: argparse.Namespace) -> str:
    """Write the prompt and its continuation to stdout, and return the latter. Raises ValueError for an empty prompt."""
    encode, decode = text_codec(task)
    prompt = encode(options.prompt)
    if not prompt:
        raise ValueError("--prompt is empty; give at least one character or word")
    sys.stdout.buffer.write(options.prompt.encode())
    start_time = last_report = time.perf_counter()
    parts = []
    tokens = generate(model, prompt, options.temperature, options.top_k, options.seed)
    for count, (token, _, decoder) in enumerate(tokens, start=1):
        text = decode(token)
        parts.append(text)
        sys.stdout.buffer.write(text)
        sys.stdout.buffer.flush()
        if count % REPORT_EVERY == 0 or count == options.max_new_tokens:
            now = time.perf_counter()
            speed = ((count - 1) % REPORT_EVERY + 1) / (now - last_report)
            metrics = decoder.pop_metrics()
            size, kilobytes = metrics["memory/size"], metrics["memory/bytes"] / 1000
            report = f"{count:,} tokens, {speed:.0f}/s, {size:.1f} memories, {kilobytes:.1f} kB"
            print(f"\n[{report}]", file=sys.stderr)
            last_report = now
        if count == options.max_new_tokens:
            break
    if not text.endswith(b"\n"):
        print()
    if options.max_new_tokens > REPORT_EVERY:
        print(f"[{options.max_new_tokens / (time.perf_counter() - start_time):.0f} tokens/s in all]", file=sys.stderr)
    return b"".join(parts).decode(errors="replace")


def log_to_wandb(run: LoadedRun, text: str, options: argparse.Namespace) -> None:
    """Log a text as a W&B run of its own, in the group of the run that wrote it, by that run's settings of W&B.

    The settings of a run that was not shown in W&B are those of wandb.mode=auto.
    """
    config = run.config.copy()
    config.tracker = "wandb"
    if config.wandb.mode == "disabled":
        config.wandb.mode = "auto"
    config.wandb.group = config.wandb.group or default_group(config)
    name = f"generate-{options.run.resolve().name}"
    columns = ("prompt", "text", "temperature", "top_k", "seed")
    table = Table(columns, [(options.prompt, text, options.temperature, str(options.top_k), options.seed)])
    new_id, metric = uuid.uuid4().hex[:8], run.task.metric
    with trackers(config, Path(name), new_id, metric, job_type="generation", trained_run=run.run_id) as log_row:
        log_row({"update": run.update}, lambda: {"text": table})


if __name__ == "__main__":
    main()
