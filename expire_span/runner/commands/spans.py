"""Show what the model of a run remembers of a text: `expire-span-spans RUN --text FILE`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import exit_with_message
from ..run_folder.provenance import command_line
from ..spans.describe import Request, describe_runs
from ..spans.page import page
from .output_files import output_path, write_output

LOSS_TOKENS = 100_000  # of the loss along the data, if several runs are compared


def main(arguments: Sequence[str] | None = None) -> None:
    """The console command; user errors are one line."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="expire-span-spans",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Write a page (HTML) and a picture (PNG) of what the model of a run remembers of a text: the\n"
        "span of every token in each layer, what is still alive at a moment that you click, and the loss.",
        epilog="examples:\n"
        "  expire-span-spans RUN                                    the beginning of the run's test split\n"
        "  expire-span-spans RUN --text book.txt --replace 'Egypt=somewhere'       the same text, edited (figure 9)\n"
        "  expire-span-spans RUN --span-cap 1024                    which tokens need longer spans (figure 10)\n"
        "  expire-span-spans RUN RUN2 RUN3                          the runs' loss along the data (figure 13)",
    )
    add = parser.add_argument
    add(
        "runs", nargs="+", type=Path, metavar="RUN", help="a run folder of a token task; of others the loss is compared"
    )
    add("--text", type=Path, metavar="FILE", help="read this instead of the test split")
    add("--max-tokens", type=int, default=4000, metavar="N", help="how many to show (default 4000)")
    help_replace = "show the text once more, with this replaced wherever it occurs (may be given several times)"
    add("--replace", action="append", default=[], metavar="OLD=NEW", help=help_replace)
    add("--span-cap", type=int, metavar="N", help="also show the loss with all spans shortened to N timesteps")
    help_loss = f"tokens of the loss along the data (default {LOSS_TOKENS:,} with several runs, else 0: none)"
    add("--loss-tokens", type=int, metavar="N", help=help_loss)
    add(
        "--output",
        type=output_path,
        default=Path("spans.html"),
        metavar="FILE",
        help="default spans.html; beside it the .png",
    )
    options = parser.parse_args(arguments)
    if options.loss_tokens is None:
        options.loss_tokens = LOSS_TOKENS if len(options.runs) > 1 else 0
    try:
        check(options)
        request = Request(
            options.runs,
            options.text,
            options.max_tokens,
            [split_pair(pair) for pair in options.replace],
            options.span_cap,
            options.loss_tokens,
        )
        data = describe_runs(request) | {"command": command_line(sys.argv)}
        write_output(options.output, page(data))
        report(data)
        print(f"page: {options.output}")
        draw(data, options.output.with_suffix(".png"))
    except KeyboardInterrupt:
        pass
    except Exception as error:
        exit_with_message(error)


def check(options: argparse.Namespace) -> None:
    """Raises ValueError or FileNotFoundError for options that cannot be meant."""
    for flag, value, least in (
        ("--max-tokens", options.max_tokens, 2),
        ("--span-cap", options.span_cap, 1),
        ("--loss-tokens", options.loss_tokens, 0),
    ):
        if value is not None and value < least:
            raise ValueError(f"{flag} must be at least {least}, got {value}")
    if options.output.suffix != ".html":
        raise ValueError(f"--output must be a .html file, got {options.output}")
    existing = next(path for path in options.output.absolute().parents if path.exists())
    if not existing.is_dir():  # before minutes of reading
        raise ValueError(f"--output {options.output} cannot be written: {existing} is no folder")
    if options.text and not options.text.is_file():
        raise FileNotFoundError(f"--text {options.text} does not exist, or is no file")


def split_pair(option: str) -> tuple[str, str]:
    """OLD and NEW of OLD=NEW. Raises ValueError without an OLD."""
    old, equals, new = option.partition("=")
    if not old or not equals:
        raise ValueError(f"--replace must look like OLD=NEW, got {option!r}")
    return old, new


def report(data: dict[str, Any]) -> None:
    """Print the results in a few lines."""
    for name, text in zip(("text", "with the replacement"), data["texts"], strict=False):
        sizes = [text["memory"][f"memory/size_layer_{layer}"] for layer in range(len(data["layers"]))]
        values = [f"{value:g} {metric}" for metric, value in text["result"].items()]
        memories = f"memories seen in each layer: {', '.join(f'{size:.1f}' for size in sizes)}"
        print("; ".join([f"{name}: {len(text['tokens']):,} {data['unit']}s", *values, memories]))


def draw(data: dict[str, Any], path: Path) -> None:
    """Write the picture, if matplotlib is installed."""
    try:
        from ..spans.picture import draw_spans
    except ImportError:
        print("no picture, since matplotlib is missing: pip install 'expire-span[plots]'")
        return
    draw_spans(data, path)
    print(f"picture: {path}")


if __name__ == "__main__":
    main()
