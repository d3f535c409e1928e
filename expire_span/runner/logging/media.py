"""What trackers show beside numbers: histograms and a picture of the spans, and a table of accuracy by distance."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from expire_span.tasks.base import RLTask

from ...analysis import spans_over_time
from ...memory.packed import map_rows
from ...transformer import State, Transformer
from ..build import autocast
from .metrics import Metrics

MEMORIES_PER_HISTOGRAM = 4096
PICTURE_TIMESTEPS = 512


class Table(NamedTuple):
    """A table, with a list of cells for each row."""

    columns: Sequence[str]
    rows: Sequence[Sequence[float | str]]


# By name: a histogram's values (N,) on the CPU, an image (height, width, 3) uint8, or a table.
Media = Mapping[str, Tensor | np.ndarray | Table]


@torch.no_grad()
def span_histograms(model: Transformer, state: State, device: torch.device) -> dict[str, Tensor]:
    """The spans of some memories that each layer holds, in timesteps, as spans/layer_N.

    Only every n-th memory is looked at, so that the cost does not grow with the memory.
    """
    histograms = {}
    for index, (layer, memory) in enumerate(zip(model.eval().layers, state["layers"], strict=True)):
        every_nth = slice(None, None, -(-len(memory.time) // MEMORIES_PER_HISTOGRAM) or 1)
        some = map_rows(lambda rows, every_nth=every_nth: rows[every_nth].to(device), memory._replace(kv=None))
        if len(some.time):
            block: Any = layer
            spans = block.mechanism.finite(block.spans(block.normalized(some)))  # (n, H or 1)
            histograms[f"spans/layer_{index}"] = spans.flatten().float().cpu()
    return histograms


def final_media(model: Transformer, task: Any, config: DictConfig, device: torch.device, metrics: Metrics) -> Media:
    """What belongs to the final metrics of a run or of an evaluation."""
    return {**distance_tables(metrics), **span_picture(model, task, config, device)}


def distance_tables(metrics: Metrics) -> dict[str, Table]:
    """The metrics SPLIT/METRIC_distance_LOW_HIGH, gathered in a table SPLIT/METRIC_by_distance."""
    tables: dict[str, Table] = {}
    for name, value in metrics.items():
        if match := re.fullmatch(r"(\w+)/(\w+)_distance_(\d+)_(\d+)", name):
            split, metric, low, high = match.groups()
            columns = ("distance from", "to", metric)
            table = tables.setdefault(f"{split}/{metric}_by_distance", Table(columns, []))
            tables[f"{split}/{metric}_by_distance"] = table._replace(rows=[*table.rows, (int(low), int(high), value)])
    return tables


def span_picture(model: Transformer, task: Any, config: DictConfig, device: torch.device) -> dict[str, np.ndarray]:
    """The spans that each layer gives to the first timesteps of the test split, as the image test/spans.

    Without matplotlib, and where the model acts, there is none. A run that does not evaluate the test split has the
    first split that it does evaluate.
    """
    splits = list(config.eval.splits)
    if isinstance(task, RLTask) or not splits:
        return {}
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return {}
    split = "test" if "test" in splits else splits[0]
    blocks, timesteps = [], 0
    for batch in task.stream(split, config.eval.batch_size, config.eval.block_size):
        reach = None if batch.reach is None else batch.reach[:1].to(device)
        blocks.append((batch.tokens[:1].to(device), reach))  # the first stream
        timesteps += batch.tokens.shape[1]
        if timesteps >= PICTURE_TIMESTEPS:
            break
    with autocast(config, device):
        spans = spans_over_time(model, blocks)[0][:, 0, :PICTURE_TIMESTEPS].float().cpu()  # (layers, time)
    figure = Figure(figsize=(11, 1.2 + 0.9 * len(spans)), dpi=100, layout="constrained")
    axes = figure.subplots(len(spans), 1, sharex=True, squeeze=False)[:, 0]
    for index, (ax, span) in enumerate(zip(axes, spans, strict=True)):
        ax.fill_between(range(len(span)), span, step="mid", color="#2b6777", linewidth=0)
        ax.set(xlim=(-0.5, len(span) - 0.5), ylim=(0, None), ylabel=f"layer {index}")
    axes[0].set_title(f"span of each memory, in timesteps: first stream of the {split} split")
    axes[-1].set_xlabel("timestep at which it is made")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return {f"{split}/spans": np.asarray(canvas.buffer_rgba())[..., :3].copy()}
