"""What `expire-span-spans` shows, as plain data: spans, losses and memories of a text (section 6, A.1.2, A.1.3)."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from hydra.utils import get_class
from tqdm import tqdm

from expire_span.tasks.base import RLTask

from ...analysis import Reading, means_by_group, read, token_groups, window_means
from ..build import autocast
from ..config.schema import validate
from ..load_run import LoadedRun, load_run
from ..logging.answer_metrics import loss_to_metric
from ..run_folder.config_files import load_config
from ..run_folder.files import read_summary
from .passage import (
    Codec,
    Passage,
    codec_of,
    encode_file,
    encode_pairs,
    predicts_every_token,
    replace,
    sample_passage,
    text_passage,
)

NUM_WINDOWS = 200  # of the loss along the data
COUNTED_TOKENS = 500_000  # of the training data, in which words are counted


class Request(NamedTuple):
    """What is asked for, as the options of the command say."""

    runs: Sequence[Path]  # the first one is shown, and the loss of all along the data
    text: Path | None = None  # None: the test split
    max_tokens: int = 4000
    replacements: Sequence[tuple[str, str]] = ()
    span_cap: int | None = None  # timesteps
    loss_tokens: int = 0


def word_counts(run: LoadedRun, codec: Codec) -> dict[str, int]:
    """How often each word, in lower case, is in the beginning of the training data."""
    tokens: list[int] = []
    config = run.config.train
    for batch in run.task.stream("train", 1, config.batch_size * config.block_size):  # the data are at least as long
        tokens += batch.tokens[0].tolist()
        if len(tokens) >= COUNTED_TOKENS:
            break
    text = b"".join(map(codec.decode, tokens)).decode(errors="replace")
    return Counter("".join(c if c.isalpha() else " " for c in text.lower()).split())


def read_passage(run: LoadedRun, passage: Passage, span_cap: int | None = None, label: str = "reading") -> Reading:
    blocks = tqdm(passage.blocks(run), desc=label, unit="block", disable=None, leave=False)
    with autocast(run.config, run.device):
        return read(run.model, blocks, span_cap)


def losses_in_bits(reading: Reading) -> np.ndarray:
    """What predicting each token costs, (time,): the loss of the timestep before it; nan where nothing is scored."""
    return np.append(math.nan, reading.losses[0, :-1].double().cpu().numpy() / math.log(2))


def describe(
    run: LoadedRun,
    passage: Passage,
    marked: Sequence[int],
    codec: Codec,
    counts: dict[str, int] | None,
    span_cap: int | None,
) -> dict[str, Any]:
    """Everything that the page shows of a text; the tokens at the `marked` places are the group "replaced"."""
    reading = read_passage(run, passage)
    capped = None if span_cap is None else read_passage(run, passage, span_cap, "with capped spans")
    texts = codec.texts(passage.tokens)
    spans = np.stack([span[0].double().mean(0).cpu().numpy() for span in reading.spans])  # (layers, time)
    bits = losses_in_bits(reading)
    rows = [*spans, spans.max(0), bits]
    more_bits = None
    if capped is not None:
        more_bits = losses_in_bits(capped) - bits
        rows.append(more_bits)
    groups = {"all": np.ones(len(texts), bool)}
    if codec.unit == "symbol":
        groups |= {symbol: np.array(texts) == symbol for symbol in sorted(set(texts))}
    else:
        groups |= token_groups(texts, counts)
    if marked:
        groups["replaced"] = np.isin(np.arange(len(texts)), marked)
    means = means_by_group(np.stack(rows), groups)
    num_layers = len(spans)
    return {
        "tokens": texts,
        "spans": [[rounded(head, 2) for head in span[0].double().cpu().numpy()] for span in reading.spans],
        "pooled": reading.pooled,
        "reach": passage.reach,
        "bits": numbers(bits, 3),
        "more_bits": None if more_bits is None else numbers(more_bits, 3),
        "groups": [
            {
                "name": name,
                "count": int(groups[name].sum()),
                "spans": numbers(values[:num_layers], 2),
                "longest": numbers(values[num_layers : num_layers + 1], 2)[0],  # span of the layers
                "bits": numbers(values[num_layers + 1 :], 3),
            }
            for name, values in means.items()
        ],
        "memory": {name: round(value, 2) for name, value in reading.metrics.items()},
        "result": result(run, passage, codec, texts, bits),
    }


def result(run: LoadedRun, passage: Passage, codec: Codec, texts: Sequence[str], bits: np.ndarray) -> dict[str, float]:
    """The loss in bits per token, and the task's own metric if it follows from the loss."""
    if np.isnan(bits).all():
        return {}
    mean, metric = float(np.nanmean(bits)), run.task.metric
    values = {} if metric == "bpb" and codec.unit == "byte" else {f"bits per {codec.unit}": round(mean, 4)}
    if metric in ("bpb", "bpc", "ppl") and predicts_every_token(passage):
        num_bytes = 1.0 if codec.unit == "byte" else len("".join(texts[1:]).encode()) / len(texts[1:])
        values[metric] = round(loss_to_metric(metric, mean * math.log(2), math.nan, num_bytes), 4)
    return values


def rounded(values: np.ndarray, digits: int) -> float | list[float | None]:
    """A list, or one number if all values are the same."""
    if (values == values[0]).all():
        return round(float(values[0]), digits)
    return numbers(values, digits)


def numbers(values: np.ndarray, digits: int) -> list[float | None]:
    """Rounded, None for nan, which JSON does not have."""
    return [None if math.isnan(value) else round(value, digits) for value in values.tolist()]


def loss_curves(run: LoadedRun, request: Request, passage: Passage, codec: Codec) -> dict[str, Any]:
    """The loss of each run in windows along the data (figure 13), and how each window begins.

    Raises ValueError if another run reads the same text in other tokens.
    """
    size = max(1, math.ceil(len(passage.tokens) / NUM_WINDOWS))
    texts = codec.texts(passage.tokens)
    curves = []
    for folder in request.runs:
        other = run if folder == request.runs[0] else load(folder)
        if other is not run:
            count = len(passage.tokens)
            tokens = (
                encode_file(request.text, codec_of(other.task)) if request.text else sample_passage(other, count).tokens
            )
            if tokens[:count] != passage.tokens:
                raise ValueError(
                    f"{folder} reads the text in other tokens than {request.runs[0]}, or has another test split, so "
                    "that their loss cannot be compared"
                )
        bits = losses_in_bits(read_passage(other, passage, label=name_of(folder)))
        curves.append({"name": name_of(folder), "bits": numbers(window_means(bits, size), 3)})
    return {
        "size": size,
        "count": len(texts),
        "runs": curves,
        "excerpts": ["".join(texts[start : start + 120])[:120] for start in range(0, len(texts), size)],
    }


def describe_runs(request: Request) -> dict[str, Any]:
    """Everything that the page shows, as plain data.

    Raises FileNotFoundError and ValueError for runs and texts that cannot be shown.
    """
    run = load(request.runs[0])
    codec = codec_of(run.task)
    sample = sample_passage(run, max(request.max_tokens, request.loss_tokens))
    is_scored = predicts_every_token(sample)
    passage = sample
    if request.text:
        passage = text_passage(encode_file(request.text, codec), is_scored, sample.reach is not None)
    shown = passage.first(request.max_tokens)
    counts = word_counts(run, codec) if is_scored else None
    passages, slots = [shown], None
    if request.replacements:
        changed, slots = replace(shown, encode_pairs(request.replacements, shown.tokens, codec))
        passages.append(changed)
    texts = []
    for number, part in enumerate(passages):
        marked = [place for slot in slots or () if slot[4] for place in range(*slot[2 * number : 2 * number + 2])]
        texts.append(describe(run, part, marked, codec, counts, request.span_cap))
    curves = None
    if request.loss_tokens:
        curves = loss_curves(run, request, passage.first(request.loss_tokens), codec)
    return {
        "run": name_of(request.runs[0]),
        "facts": facts(run, request.runs[0]),
        "source": request.text.name if request.text else "the beginning of the run's test split",
        "length": len(passage.tokens) if request.text else None,
        "unit": codec.unit,
        "layers": [
            {
                "ramp": mechanism.ramp,
                "max_distance": mechanism.max_distance,
                "pooled_tokens": getattr(mechanism, "compression_rate", 1),  # of each pooled memory
            }
            for mechanism in run.model.mechanisms
        ],
        "span_cap": request.span_cap,
        "replacements": list(request.replacements),
        "texts": texts,
        "slots": slots,
        "curves": curves,
    }


def load(folder: Path) -> LoadedRun:
    """A run of a token task. Raises ValueError for one in which the model acts."""
    config = validate(load_config(folder))
    if issubclass(get_class(config.task._target_), RLTask):
        raise ValueError(f"the model of {folder} acts in environments and reads no text; try expire-span-play {folder}")
    return load_run(folder, config)


def name_of(folder: Path) -> str:
    return folder.resolve().name


def facts(run: LoadedRun, folder: Path) -> dict[str, str]:
    """What a reader should know of the run."""
    model, config = run.model, run.config
    mechanisms = model.mechanisms
    commit = "unknown"
    if (folder / "summary.json").exists():
        summary = read_summary(folder)
        commit = f"{str(summary.get('commit') or 'unknown')[:10]}{' with changes' if summary.get('dirty') else ''}"
    return {
        "task": type(run.task).__module__.split(".")[-1],
        "model": type(mechanisms[0]).__name__,
        "trained": f"{run.update:,} updates",
        "commit": commit,
        "L (longest span)": ", ".join(dict.fromkeys(f"{mechanism.max_span:,}" for mechanism in mechanisms)),
        "R (ramp)": ", ".join(dict.fromkeys(f"{mechanism.ramp:g}" for mechanism in mechanisms)),
        "layers": str(len(mechanisms)),
        "heads": str(config.transformer.num_heads),
    }
