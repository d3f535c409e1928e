"""Frames as a GIF, or with ffmpeg as an MP4."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .frames import Frame
from .terminal import BRIGHT, DARK

WINDOW = 80  # timesteps of the current episode that are shown


def video_writer(path: Path, frames_per_second: int) -> Any:
    """The writer of a kind of file. Raises ValueError for one that cannot be written."""
    from matplotlib import animation  # only videos need it

    writers = {".gif": "pillow", ".mp4": "ffmpeg"}
    if path.suffix not in writers:
        raise ValueError(f"--video must end with {' or '.join(writers)}, got {path.name}")
    if not animation.writers.is_available(writers[path.suffix]):
        raise ValueError(f"--video {path.name} needs {writers[path.suffix]}, which is not installed; a .gif does not")
    return animation.writers[writers[path.suffix]](fps=frames_per_second)


def write_video(frames: Sequence[Frame], path: Path, writer: Any) -> None:
    """Write a video of frames, with what `video_writer` returned."""
    from matplotlib.figure import Figure

    image = frames[0].image
    is_high = image is not None and image.shape[0] > image.shape[1] / 3  # unlike a corridor
    figure = Figure(figsize=(9, 6 if is_high else 4), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=[3 if is_high else 1, 1])
    with writer.saving(figure, str(path), dpi=80):
        for frame in frames:
            above.clear(), below.clear()
            if frame.image is not None:
                above.imshow(frame.image, interpolation="nearest")
            else:
                above.text(0, 1, "\n".join(frame.text), family="monospace", verticalalignment="top")
            above.set_axis_off()
            above.set_title(f"{frame.caption}\n{frame.ending or frame.decision}", fontsize=9, loc="left")
            below.imshow(memory_image(frame), interpolation="nearest", aspect="auto", extent=extent(frame))
            below.set_yticks(range(len(frame.memories)), [f"layer {layer}" for layer in range(len(frame.memories))])
            below.set_xlabel("timestep of the episode; green: still remembered")
            writer.grab_frame()


def memory_image(frame: Frame) -> np.ndarray:
    """What each layer holds of the last WINDOW timesteps, (layers, WINDOW, 3) uint8; white is yet to come."""
    m = np.array(frame.memories)[:, -WINDOW:, None]  # (layers, timesteps, 1)
    colors = np.array(DARK) + m * (np.array(BRIGHT) - np.array(DARK))
    image = np.full((len(frame.memories), WINDOW, 3), 255.0)
    image[:, : m.shape[1]] = colors
    return image.round().astype(np.uint8)


def extent(frame: Frame) -> tuple[float, float, float, float]:
    """Where the cells of `memory_image` are: left, right, bottom, top."""
    first = max(0, len(frame.actions) - WINDOW)
    return first - 0.5, first + WINDOW - 0.5, len(frame.memories) - 0.5, -0.5
