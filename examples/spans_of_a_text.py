"""Train a small byte model on a text with Transformer and ExpireSpan alone, and plot the spans that it learns.

    python examples/spans_of_a_text.py                         Python's own documentation; a minute on a CPU
    python examples/spans_of_a_text.py book.txt --updates 2000

Prints bits per byte and the memory size, and draws spans.png. Needs matplotlib: pip install 'expire-span[plots]'.
"""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import matplotlib
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from expire_span import ExpireSpan, Transformer, TransformerConfig
from expire_span.analysis import spans_over_time

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STREAMS, BLOCK = 16, 64  # parallel streams, and timesteps of each that are processed at once
COLORS = ("#edae49", "#d1495b", "#2b6777", "#8d99ae")  # one for each layer
VISIBLE = {"\n": "↵", " ": ""}


def read_text(path: Path | None) -> Tensor:
    """(N,) int64: the bytes of a file, or of Python's documentation of its statements and types."""
    content = "\n".join(topics.values()).encode() if path is None else path.read_bytes()
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).long()


def blocks(text: Tensor, streams: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and targets (B, T), block after block: each stream reads its own part of the text."""
    length = (len(text) - 1) // streams
    tokens, targets = (text[shift : shift + streams * length].view(streams, length) for shift in (0, 1))
    yield from zip(tokens.split(BLOCK, 1), targets.split(BLOCK, 1), strict=True)


def build_model(layers: int = 2, size: int = 96) -> Transformer:
    """A Transformer over bytes whose memories live for up to 512 timesteps."""
    config = TransformerConfig(vocab_size=256, hidden_size=size, num_heads=4, feedforward_size=4 * size, pre_norm=True)
    mechanisms = [
        ExpireSpan(size, max_span=512, ramp=32, alpha=1e-5, num_positions=BLOCK, init_span_ratio=0.1)
        for _ in range(layers)
    ]
    return Transformer(config, mechanisms)


def train(model: Transformer, text: Tensor, updates: int) -> None:
    """Read the text again and again, one block of all streams per update, and carry the memories along."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=max(2, updates), pct_start=0.1)
    state, update = model.initial_state(STREAMS), 0
    model.train()
    while update < updates:
        for tokens, targets in blocks(text, STREAMS):
            logits, state, metrics = model(tokens, state)
            loss = cross_entropy(logits.flatten(0, 1), targets.flatten())
            optimizer.zero_grad()
            (loss + metrics["span_loss"]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            update += 1
            if update % 50 == 0 or update == updates:
                size, span = float(metrics["memory/size"]), float(metrics["memory/span"])
                print(f"update {update}: {loss / math.log(2):.3f} bpb, memory size {size:.0f}, mean span {span:.0f}")
            if update == updates:
                break


@torch.no_grad()
def evaluate(model: Transformer, text: Tensor) -> tuple[float, float]:
    """Bits per byte of a text that the model has not seen, and the mean memory size."""
    model.eval()
    state, nats, sizes = model.initial_state(1), 0.0, []
    for tokens, targets in blocks(text, 1):
        logits, state, metrics = model(tokens, state)
        nats += float(cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
        sizes += [float(metrics["memory/size"])] * tokens.shape[1]
    return nats / math.log(2) / len(sizes), sum(sizes) / len(sizes)


def plot(spans: Tensor, tokens: Tensor, path: Path, width: int = 110) -> None:
    """Draw spans (layers, time) over the text (time,), some lines of `width` characters each."""
    lines = math.ceil(len(tokens) / width)
    figure, axes = plt.subplots(
        lines, 1, figsize=(15, 1.9 * lines + 0.5), sharey=True, squeeze=False, layout="constrained"
    )
    for line, ax in enumerate(axes[:, 0]):
        part = slice(line * width, (line + 1) * width)
        characters = [VISIBLE.get(chr(token), chr(token)) for token in tokens[part].tolist()]
        for layer, span in enumerate(spans[:, part]):
            color = COLORS[layer % len(COLORS)]
            ax.step(range(len(characters)), span, where="mid", color=color, linewidth=1.3, label=f"layer {layer}")
            ax.fill_between(
                range(len(characters)), 1, span.clamp(min=1), step="mid", color=color, alpha=0.15, linewidth=0
            )
        ax.set_xticks(range(len(characters)), characters, family="monospace", fontsize=9)
        ax.set(xlim=(-0.5, width - 0.5), yscale="log", ylim=(1, 2 * float(spans.max())))
        ax.yaxis.set_major_formatter("{x:.0f}")
        ax.tick_params(axis="x", length=0)
        ax.spines[["top", "right"]].set_visible(False)
    figure.supylabel("span, timesteps (log)")
    figure.suptitle("How long each layer remembers each character")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="upper right", ncols=len(spans), frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, nargs="?", help="a text file (default: Python's documentation)")
    parser.add_argument("--updates", type=int, default=600)
    parser.add_argument("--output", type=Path, default=Path("spans.png"))
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(1)  # more do not help so small a model

    text = read_text(arguments.text)
    held_out = min(len(text) // 10, 20_000)
    if held_out <= 2 * BLOCK:
        parser.error(f"the text has {len(text)} bytes, at least {20 * (BLOCK + 1)} are needed")
    model = build_model()
    train(model, text[:-held_out], arguments.updates)
    bpb, size = evaluate(model, text[-held_out:])
    print(f"on the last {held_out:,} bytes, which it has not seen: {bpb:.3f} bpb, memory size {size:.1f}")

    shown = text[-held_out:][None, : 12 * BLOCK]  # (1, time)
    spans, tokens = spans_over_time(model, [(block, None) for block in shown.split(BLOCK, 1)])
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    plot(spans[:, 0, -440:], tokens[0, -440:], arguments.output)
    print(f"the spans of 440 characters are in {arguments.output}")


if __name__ == "__main__":
    main()
