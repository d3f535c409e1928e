"""Watch a trained agent, and what it still remembers: `expire-span-play RUN`."""

import argparse
import os
import sys
import time
from pathlib import Path

from expire_span.tasks.base import RLTask

from ..config.schema import validate
from ..errors import exit_with_message
from ..load_run import LoadedRun, load_run
from ..play.frames import play
from ..play.page import page
from ..play.terminal import as_text
from ..play.video import video_writer, write_video
from ..run_folder.config_files import load_config
from .output_files import output_path, write_output

SECONDS_PER_FRAME = 0.25  # of a video, unless --pause says otherwise


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="expire-span-play",
        description="Watch the agent of a run, and what it still remembers.",
        epilog="The rows below the map go through the current episode, one character a timestep. observed, in corridor "
        "and portal: r, b an object, R, B a door. layer N: what the layer still holds: █, or green, in full, ▓▒░ "
        "fading, · forgotten. An environment of Gymnasium is printed if it has the render mode ansi, and drawn by "
        "--html and --video if it has rgb_array.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--steps", type=int, default=100, help="timesteps to watch (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the environment and of the sampled actions (default 0)")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds between timesteps (default 0; videos 0.25)")
    parser.add_argument(
        "--color",
        choices=("auto", "always", "never"),
        default="auto",
        help="auto: in a terminal, unless NO_COLOR is set",
    )
    parser.add_argument(
        "--html", type=output_path, metavar="FILE", help="write a page to step through, instead of printing"
    )
    parser.add_argument("--video", type=output_path, metavar="FILE", help="write a .gif, or with ffmpeg an .mp4")
    options = parser.parse_args()
    try:
        if options.steps < 1 or options.pause < 0 or options.seed < 0:
            raise ValueError("--steps must be at least 1, --pause and --seed must not be negative")
        run = load_run(options.run, validate(load_config(options.run)))
        if not isinstance(run.task, RLTask):
            raise ValueError(f"the model of {options.run} does not act; expire-span-spans shows what it remembers")
        if options.html or options.video:
            write(run, options)
        else:
            watch(run, options)
    except (KeyboardInterrupt, BrokenPipeError):
        pass
    except Exception as error:
        exit_with_message(error)


def watch(run: LoadedRun, options: argparse.Namespace) -> None:
    """Print frame after frame."""
    color = options.color == "always"
    if options.color == "auto":
        color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for frame in play(run, options.steps, options.seed):
        print(f"{as_text(frame, color)}\n", flush=True)
        time.sleep(options.pause)


def write(run: LoadedRun, options: argparse.Namespace) -> None:
    """Write the files that the options ask for."""
    frames_per_second = max(1, round(1 / (options.pause or SECONDS_PER_FRAME)))
    writer = video_writer(options.video, frames_per_second) if options.video else None
    frames = list(play(run, options.steps, options.seed, with_image=True))
    if options.html:
        title = f"What {options.run.resolve().name} does, and what it remembers"
        write_output(options.html, page(frames, title))
        print(options.html)
    if options.video:
        options.video.parent.mkdir(parents=True, exist_ok=True)
        write_video(frames, options.video, writer)
        print(options.video)


if __name__ == "__main__":
    main()
