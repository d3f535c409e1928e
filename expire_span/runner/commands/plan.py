"""Predict what a run needs before anything is bought: `expire-span-plan experiment=NAME gpus=8 device=h100`."""

import argparse
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import NamedTuple

import torch
from hydra import compose, initialize_config_module
from hydra.core.plugins import Plugins
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from expire_span.tasks.base import RLTask

from ..build import resolve_auto, select_device
from ..cli import InstalledConfigs, check_arguments, check_recipe
from ..config.former_names import check_current_names
from ..config.overrides import is_override, parse, quote_text
from ..config.schema import validate
from ..cost_model import (
    DEVICES,
    Device,
    RunSizes,
    blocks_without_targets,
    copy_bandwidth,
    fitting_micro_batch,
    initial_memories,
    matmul_flops,
    memory_by_part,
    run_sizes,
    seconds_per_update,
    step_cost,
    usable,
)
from ..errors import exit_with_message
from ..logging.performance import free_memory
from ..run_folder.config_files import load_config
from ..trainer import build_task

DEFAULTS = {"gpus": "1", "device": "h100", "kept": "0.1"}
VOCABULARIES = {  # tasks whose data would have to be read: number of tokens, and how it is known
    "expire_span.tasks.enwik8.Enwik8": (256, "bytes"),
    "expire_span.tasks.pg19.PG19": (3507, "the published characters and one for others"),
    "expire_span.tasks.wikitext103.Wikitext103": (267_735, "the published words"),
    "expire_span.tasks.text.Text": (256, "bytes; an assumption with task.tokenizer=char"),
    "expire_span.tasks.instruction.Instruction": (20_000, "an assumption: the words of the dialogues are not counted"),
}
MEASURED_EFFICIENCY = 0.4  # of a large matrix product, as results/bench/cpu.md has measured
REMEDIES: tuple[dict[str, bool], ...] = (  # tried in this order; each as overrides of the config
    {},
    {"train.offload_memory": True},
    {"transformer.activation_checkpointing": True},
    {"train.offload_memory": True, "transformer.activation_checkpointing": True},
)


class Case(NamedTuple):
    """A run with some number of memories, changed until it is predicted to fit."""

    title: str
    num_memories: float
    micro_batch_size: int | None  # None: nothing makes it fit
    overrides: Mapping[str, bool]  # that make it fit
    memory: dict[str, float]  # bytes by part
    offloaded: float  # bytes of memories in the host's memory, of all GPUs
    seconds: dict[str, float]  # of an update, by part

    def hours(self, config: DictConfig) -> float:
        return sum(self.seconds.values()) * config.train.updates / 3600


class Plan(NamedTuple):
    """The predictions for a run on a number of devices."""

    sizes: RunSizes
    vocabulary: str
    device: Device
    gpus: int
    cases: list[Case]

    def __str__(self) -> str:
        sections = (heading(self), table(self), advice(self))
        return "\n\n".join("\n".join(lines) for lines in sections)


def make_plan(arguments: Sequence[str]) -> Plan:
    """The predictions for a command line of `expire-span-plan`.

    Raises:
        ValueError: For what `expire-span` would refuse, too, or options that do not fit.
    """
    options = DEFAULTS | dict(text.split("=", 1) for text in arguments if text.partition("=")[0] in DEFAULTS)
    config = read_config([text for text in arguments if text.partition("=")[0] not in DEFAULTS])
    gpus, kept = int(read_number("gpus", options["gpus"], 1, 1e6)), read_number("kept", options["kept"], 0, 1)
    if gpus not in (possible := possible_gpus(config)):
        key = "train.batch_size" if config.train.batch_size % gpus else "eval.batch_size"
        raise ValueError(
            f"{key}={OmegaConf.select(config, key)} streams cannot be split evenly over gpus={gpus}; use one of "
            f"{', '.join(map(str, possible[:20]))}"
        )
    device = read_device(options["device"], config)
    vocab_size, num_classes, source = vocabulary(config)
    sizes = run_sizes(config, vocab_size, num_classes)
    cases = [fit(sizes, title, memories, device, gpus) for title, memories in memory_cases(sizes, kept)]
    return Plan(sizes, f"{vocab_size:,} tokens ({source})", device, gpus, cases)


def possible_gpus(config: DictConfig) -> list[int]:
    """Numbers of GPUs over which all streams can be split evenly."""
    evaluates = config.eval.splits or config.eval.interval
    common = math.gcd(config.train.batch_size, config.eval.batch_size if evaluates else 0)
    return [number for number in range(1, common + 1) if common % number == 0]


def read_config(arguments: Sequence[str]) -> DictConfig:
    """The validated config of overrides, as `expire-span` takes them, or of one run folder."""
    folders = [text for text in arguments if not is_override(text)]
    if folders:
        if len(arguments) > 1 or folders[0].startswith("-"):
            raise ValueError(f"{folders[0]} is neither KEY=VALUE nor, alone, a run folder; see expire-span-plan --help")
        return validate(load_config(Path(folders[0])))
    sys.path.append(os.getcwd())  # a task or mechanism of the user's own may lie in the current folder
    Plugins.instance().register(InstalledConfigs)
    check_current_names(list(arguments))
    overrides = [quote_text(argument) for argument in arguments]
    parsed = {override.key_or_group: override for override in map(parse, overrides)}
    for action in ("resume", "evaluate"):
        if action in parsed:
            raise ValueError(f"a plan takes a run folder as it is: expire-span-plan {parsed[action].value()}")
    check_arguments(parsed, [], is_sweep=False)
    installed = [entry_point.value for entry_point in entry_points(group="expire_span.conf")]
    check_recipe(overrides, [f"pkg://{package}" for package in ("expire_span.conf", *installed)])
    with initialize_config_module("expire_span.conf", version_base="1.3"):
        return validate(compose("config", overrides=overrides))


def read_number(name: str, text: str, smallest: float, largest: float) -> float:
    """Raises ValueError for what is no number, or out of its bounds."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not smallest <= number <= largest:
        raise ValueError(f"{name} must be a number from {smallest:g} to {largest:g}, got {text}")
    return number


def read_device(name: str, config: DictConfig) -> Device:
    """The device, for which `run.precision=auto` is replaced. Raises ValueError for one that is not known here."""
    if name == "this":
        resolve_auto(config, select_device(config.run.device))
        return this_device(config)
    if name not in DEVICES:
        raise ValueError(f"device must be one of {', '.join(DEVICES)} or this, got {name}")
    if config.run.precision == "auto":
        config.run.precision = "bfloat16"
    return DEVICES[name]


def this_device(config: DictConfig) -> Device:
    """The device that a run would take here; its speed is measured, in a second. Links are those of an H100."""
    device = select_device(config.run.device)
    flops, bandwidth = {config.run.precision: matmul_flops(device, config.run.precision)}, copy_bandwidth(device)
    measured = replace(DEVICES["h100"], flops=flops, bandwidth=bandwidth, efficiency=MEASURED_EFFICIENCY)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return replace(measured, name=properties.name, memory=properties.total_memory)
    return replace(measured, name=f"this {device.type}", memory=free_memory(), type="cpu")


def vocabulary(config: DictConfig) -> tuple[int, int, str]:
    """The numbers of tokens and of classes of the task, and how they are known without reading data."""
    target = config.task._target_
    if target in VOCABULARIES and not (target.endswith(".Instruction") and config.task.dialogue is None):
        size, source = VOCABULARIES[target]
        return size, size, source
    task = build_task(config)
    return task.vocab_size, task.num_classes, "of the task"


def memory_cases(sizes: RunSizes, kept: float) -> list[tuple[str, float]]:
    """Numbers of memories to predict for: one, or several where spans are learned."""
    most = sizes.mechanism.max_memories
    if not hasattr(sizes.mechanism, "init_span_ratio"):
        return [("all memories", most)]
    return [("initial spans", initial_memories(sizes.mechanism)), (f"kept={kept:g}", kept * most), ("all kept", most)]


def changed(sizes: RunSizes, overrides: Mapping[str, bool]) -> RunSizes:
    """The sizes of the run with other values of the config."""
    config = sizes.config.copy()
    for key, value in overrides.items():
        OmegaConf.update(config, key, value)
    checkpointing = config.transformer.activation_checkpointing
    return sizes._replace(config=config, transformer=replace(sizes.transformer, activation_checkpointing=checkpointing))


def fit(sizes: RunSizes, title: str, num_memories: float, device: Device, gpus: int) -> Case:
    """The first remedy that is predicted to make the run fit; if none does, the last one, with a stream at a time."""
    streams = sizes.config.train.batch_size // gpus
    for overrides in REMEDIES if device.type == "cuda" else REMEDIES[::2]:
        new = changed(sizes, overrides)
        size = fitting_micro_batch(new, streams, num_memories, device.type, device.memory)
        if size is not None:
            size = min(size, at_once(sizes, streams))
            break
    memory = memory_by_part(new, streams, size or 1, num_memories, device.type)
    offloaded = 0.0
    if new.config.train.offload_memory and device.type == "cuda":
        offloaded = step_cost(new, streams * gpus, num_memories, device.type).memory_bytes()
    seconds = seconds_per_update(new, streams, size or 1, num_memories, device, gpus)
    return Case(title, num_memories, size, overrides, memory, offloaded, seconds)


def at_once(sizes: RunSizes, streams: int) -> int:
    """Streams that the config would process at a time. Raises ValueError for a number that does not divide them."""
    size = sizes.config.train.micro_batch_size
    if not isinstance(size, int):  # null or auto
        return streams
    if streams % size:
        raise ValueError(f"train.micro_batch_size={size} must divide the {streams} streams of each GPU")
    return size


def heading(plan: Plan) -> list[str]:
    """What the predictions are for."""
    config, train, device = plan.sizes.config, plan.sizes.config.train, plan.device
    task, model, precision = (config.task._target_, config.model._target_, config.run.precision)
    names = f"{task.rpartition('.')[2]}, {model.rpartition('.')[2]}"
    speed = f"{device.flops[precision] / 1e12:,.4g} TFLOP/s in {precision}"
    lines = [
        "Predictions of a cost model; no run was measured.",
        f"{names}: {plan.sizes.num_parameters:,} parameters; {plan.vocabulary}",
        f"{train.updates:,} updates of {train.batch_size} streams in blocks of {train.block_size}",
        f"{plan.gpus} x {device.name}, {train.batch_size // plan.gpus} streams each; of its {speed} "
        f"{100 * device.efficiency:.0f} % are assumed to be reached",
    ]
    if blocks := blocks_without_targets(config):
        lines.append(f"{blocks:,} blocks without targets before each that trains, in the longest episodes")
    if issubclass(get_class(task), RLTask):
        lines.append("the time of acting in the environments is left out")
    return lines


def table(plan: Plan) -> list[str]:
    """One column for each case."""
    cases = plan.cases
    whole = [sum(case.memory.values()) for case in cases]
    unit, name = (1e9, "GB") if max(whole) >= 1e9 else (1e6, "MB")

    def row(title: str, cells: Iterable[str]) -> str:
        return f"{title:36}" + "".join(f"{cell:>15}" for cell in cells)

    def bytes_row(title: str, numbers: Sequence[float]) -> str:
        return row(f"{name} {title}", (short(number / unit) for number in numbers))

    lines = [row("", (case.title for case in cases))]
    lines.append(row("memories of a stream in a layer", (f"{case.num_memories:,.0f}" for case in cases)))
    lines.append(row("streams at a time (micro-batch)", (f"{case.micro_batch_size or 1}" for case in cases)))
    for part in dict.fromkeys(part for case in cases for part in case.memory):
        lines.append(bytes_row(part, [case.memory.get(part, 0) for case in cases]))
    lines.append(bytes_row(f"in all, of {short(plan.device.memory / unit)}", whole))
    if any(case.offloaded for case in cases):
        lines.append(bytes_row("of the host, for memories", [case.offloaded for case in cases]))
    hours = [case.hours(plan.sizes.config) for case in cases]
    lines.append(row("seconds for an update", (f"{sum(case.seconds.values()):.3g}" for case in cases)))
    lines.append(row("hours for the run", map(short, hours)))
    return lines


def short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.1f}" if number >= 10 else f"{number:.2f}"


def advice(plan: Plan) -> list[str]:
    """What would not fit, and what makes it fit."""
    sizes, device = plan.sizes, plan.device
    batch_size = sizes.config.train.batch_size
    streams, lines = batch_size // plan.gpus, []
    for case in plan.cases:
        size = at_once(sizes, streams)
        whole = sum(memory_by_part(sizes, streams, size, case.num_memories, device.type).values())
        if whole <= usable(device.memory):
            lines.append(f"{case.title}: fits as it is")
            continue
        problem = f"{case.title}: {size} streams at once need {short(whole / 1e9)} GB"
        if case.micro_batch_size is None:
            lines.append(
                f"{problem}, and one at a time does not fit either; lower memory.max_span or the sizes of transformer"
            )
            continue
        overrides = [f"train.micro_batch_size={case.micro_batch_size}", *(f"{key}=true" for key in case.overrides)]
        enough = [
            number
            for number in possible_gpus(sizes.config)
            if number > plan.gpus
            and fitting_micro_batch(sizes, batch_size // number, case.num_memories, device.type, device.memory)
            == batch_size // number
        ]
        more = f"; or gpus={enough[0]} alone" if enough else ""
        lines.append(f"{problem}; add {' '.join(overrides)}{more}")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """The console command; user errors are one line."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="expire-span-plan",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Predict parameters, memory by part and time of a run from a cost model, without data and before\n"
        "anything is bought; say what would not fit, and what would make it fit.",
        epilog="besides the overrides of expire-span:\n"
        "  gpus=N     over which the streams are split (default 1)\n"
        f"  device=D   {', '.join(DEVICES)}, or this: the present device, measured in a second (default h100)\n"
        "  kept=X     share of the memories kept, where spans are learned (default 0.1)\n\n"
        "example:\n  expire-span-plan experiment=table2_expire_span gpus=8 device=h100",
    )
    parser.add_argument("arguments", nargs="*", metavar="KEY=VALUE", help="as for expire-span; or one run folder")
    try:
        print(make_plan(parser.parse_args(arguments).arguments))
    except Exception as error:
        exit_with_message(error)


if __name__ == "__main__":
    main()
