"""TensorBoard mirrors metrics.jsonl, in the folder `tensorboard` of the run. See trackers.py for what isolates it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from torch import Tensor

from .media import Media, Table


@contextmanager
def tensorboard_logger(
    folder: Path, update: int, earlier_rows: Iterable[Mapping[str, float]]
) -> Iterator[Callable[[Mapping[str, float], Media], None]]:
    """Yield a function that writes one row of metrics, and the media beside it.

    A run that goes on adds a file, which tells TensorBoard to forget everything from `update` on: what a killed run
    wrote after its checkpoint is not shown twice. Where there is no file yet, all earlier rows are written.
    """
    from torch.utils.tensorboard import SummaryWriter  # imports TensorBoard, which is an optional extra

    event_folder = folder / "tensorboard"
    goes_on = any(event_folder.glob("events.out.tfevents.*"))
    with SummaryWriter(str(event_folder), purge_step=update if goes_on else None) as writer:

        def log_row(row: Mapping[str, float], media: Media) -> None:
            step = int(row["update"])
            for name, value in row.items():
                if name != "update":
                    writer.add_scalar(name, value, step)
            for name, item in media.items():
                if isinstance(item, Table):
                    writer.add_text(name, markdown(item), step)
                elif isinstance(item, np.ndarray):
                    writer.add_image(name, item, step, dataformats="HWC")
                elif isinstance(item, Tensor):
                    writer.add_histogram(name, item, step)
            writer.flush()  # a kill loses nothing

        for row in earlier_rows:
            if not goes_on or row["update"] >= update:
                log_row(row, {})
        yield log_row


def markdown(table: Table) -> str:
    """The table in Markdown, which TensorBoard renders."""
    rows = [table.columns, ["---"] * len(table.columns), *(map(cell_text, row) for row in table.rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def cell_text(cell: float | str) -> str:
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)
