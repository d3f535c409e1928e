"""Acting and generating timestep by timestep: by `Transformer.forward` with blocks of one timestep, and by a `Decoder`.

The two forms take turns. Each line has the median speed of both, the least and the most, and the median of the ratios.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from expire_span import AdaptiveSpan, Compressive, ExpireSpan, Transformer, TransformerConfig, TransXL
from expire_span.decoding import Decoder
from expire_span.tasks.corridor import Corridor

Step = Callable[[Tensor, Tensor | None], Tensor]  # one timestep: tokens and reach to logits


def decoder_form(model: Transformer, num_streams: int) -> Step:
    return Decoder(model, model.initial_state(num_streams))


def block_form(model: Transformer, num_streams: int) -> Step:
    state = model.initial_state(num_streams)

    def step(tokens: Tensor, reach: Tensor | None = None) -> Tensor:
        nonlocal state
        logits, state, _ = model(tokens[:, None], state, None if reach is None else reach[:, None])
        return logits[:, 0]

    return step


FORMS = {"blocks of one timestep": block_form, "decoder": decoder_form}


def acting(form: Callable[[Transformer, int], Step], num_envs: int, device: str) -> Callable[[], None]:
    """A timestep of corridor, by a model whose memories live for a few timesteps, as after training."""
    torch.manual_seed(0)
    task = Corridor()
    config = TransformerConfig(task.vocab_size, 64, 2, 256, num_classes=task.num_classes, pre_norm=True)
    mechanisms = [ExpireSpan(64, 40, 8, 1e-5, num_positions=25, init_span_ratio=0.1) for _ in range(2)]
    step, envs = form(Transformer(config, mechanisms).to(device).eval(), num_envs), task.make_envs(num_envs, device)
    generator = torch.Generator(device).manual_seed(0)

    def act() -> None:
        probs = step(envs.observe(), envs.steps)[:, :-1].softmax(-1)
        envs.step((probs / torch.empty_like(probs).exponential_(generator=generator)).argmax(1))

    return act


def generating(form: Callable[[Transformer, int], Step], kind: str, device: str) -> Callable[[], None]:
    """A byte of text, by a model of the size of `task=text size=mini`."""
    torch.manual_seed(0)
    mechanisms = {
        "expire_span": lambda: ExpireSpan(96, 512, 32, 1e-6, num_positions=64),
        "trans_xl": lambda: TransXL(512),
        "adaptive_span": lambda: AdaptiveSpan(2, 512, 32, 1e-6, init_span_ratio=0.1),
        "compressive": lambda: Compressive(256, 64),
    }
    config = TransformerConfig(256, 96, 2, 384, pre_norm=True)
    model = Transformer(config, [mechanisms[kind]() for _ in range(2)]).to(device).eval()
    step, token = form(model, 1), torch.zeros(1, dtype=torch.long, device=device)

    def generate() -> None:
        token.copy_(step(token, None).softmax(-1).multinomial(1)[:, 0])

    return generate


@torch.no_grad()
def compare(name: str, make: Callable[..., Callable[[], None]], per_step: int, timesteps: int, repeats: int) -> None:
    """Print the speeds of both forms, in timesteps of all streams a second."""
    steps = [make(form) for form in FORMS.values()]
    for _ in range(600):  # until all memories are held that ever will be
        for step in steps:
            step()
    speeds: list[list[float]] = [[] for _ in steps]
    for _ in range(repeats):
        for step, of_step in zip(steps, speeds, strict=True):
            start = time.perf_counter()
            for _ in range(timesteps):
                step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            of_step.append(per_step * timesteps / (time.perf_counter() - start))
    cells = [f"{statistics.median(of):,.0f} ({min(of):,.0f} to {max(of):,.0f})" for of in speeds]
    ratio = statistics.median(new / old for old, new in zip(*speeds, strict=True))
    print(f"| {name} | {' | '.join(cells)} | {ratio:.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--num-threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.num_threads)
    print(f"| timesteps a second | {' | '.join(FORMS)} | ratio |\n| --- | ---: | ---: | ---: |")
    for num_envs in (64, 1024):
        compare(
            f"acting in {num_envs} environments",
            lambda form, num_envs=num_envs: acting(form, num_envs, options.device), num_envs, 25, options.repeats,
        )  # fmt: skip
    for kind in ("expire_span", "trans_xl", "adaptive_span", "compressive"):
        compare(
            f"generating, {kind}",
            lambda form, kind=kind: generating(form, kind, options.device),
            1,
            50,
            options.repeats,
        )


if __name__ == "__main__":
    main()
