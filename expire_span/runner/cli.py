"""The command `expire-span`: train, evaluate (evaluate=RUN) or resume (resume=RUN) a run, or a sweep of runs (-m)."""

import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NoReturn, cast

import hydra
import torch
from hydra._internal.utils import get_args_parser
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from . import ranks
from .config.former_names import check_current_names
from .config.overrides import (
    GROUPS,
    apply_overrides,
    is_below,
    is_override,
    literal,
    missing_folders,
    new_folders,
    parse,
    quote,
    quote_text,
    remove_empty_new_folders,
    sweep_folder_name,
)
from .config.schema import validate
from .config.value_sources import read_first, value_sources
from .errors import USER_ERRORS, exit_with_message, one_line, root_cause
from .evaluate import evaluate_run
from .logging.metrics import Metrics
from .logging.wandb_logger import MAX_TAG_LENGTH, default_group
from .milestones import is_plain_recipe
from .output import keep_running_without_output
from .preemption import requeue_after_saving
from .ranks import is_reporter
from .run_folder import checkpoint
from .run_folder.config_files import ConfigFiles, load_config, load_config_files, merge_overrides
from .run_folder.files import lock
from .run_folder.identity import CHANGED_BY_EVALUATION, MAY_CHANGE_IN_RESUME, changes
from .run_folder.provenance import provenance, versions
from .stop_signals import Stopped, ignore_further_signals, stop_signals
from .train import train

log = logging.getLogger(__name__)


def main() -> None:
    """The console command. User errors are one line; HYDRA_FULL_ERROR=1 shows their traceback."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # otherwise Hydra prints errors itself and exits
    sys.argv[0] = "expire-span"  # as Hydra's usage names it, also for `python -m expire_span`
    os.environ.setdefault("LOGNAME", str(os.getuid()))  # of a user without an entry, whose name torch.compile asks for
    keep_running_without_output()
    with stop_signals():
        run_command()


def run_command() -> None:
    """Let Hydra run what the command line says."""
    try:
        sys.path.append(os.getcwd())  # a task or mechanism of the user's own may lie in the current folder
        sys.path.append(str(Path(__file__).parents[1] / "plugins"))  # the launchers of sweeps, which Hydra looks for
        Plugins.instance().register(InstalledConfigs)
        ranks.connect()
        check_current_names(sys.argv[1:])
        sys.argv[1:] = hydra_arguments(sys.argv[1:])
        check_flags(sys.argv[1:])
        if not ranks.is_main() and only_prints(sys.argv[1:]):
            return
        if not ranks.is_main():  # their folder is that of rank 0, whose name may hold the time
            others = [argument for argument in sys.argv[1:] if not argument.startswith("hydra.run.dir=")]
            sys.argv[1:] = [f"hydra.run.dir={quote(ranks.broadcast(None))}", *others]
        hydra_main()
        ranks.disconnect()
    except Stopped as stop:
        ignore_further_signals()
        if ranks.is_main():
            with suppress(OSError):  # of a terminal that was closed
                print(stop.message, file=sys.stderr)
        raise
    except Exception as error:
        exit_with_message(error)
    finally:
        remove_empty_new_folders()
        sys.stdout.flush()  # what the interpreter could not write at its end would change the exit code


class InstalledConfigs(SearchPathPlugin):
    """Adds the config files of installed packages, which name them in the entry point group `expire_span.conf`."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for entry_point in entry_points(group="expire_span.conf"):
            search_path.append(provider=entry_point.name, path=f"pkg://{entry_point.value}")


def hydra_arguments(arguments: list[str]) -> list[str]:
    """The arguments for Hydra: paths quoted, folders named, and the keys of a run that is named admitted.

    Raises:
        ValueError: for what `check_arguments` refuses.
        FileNotFoundError: if resume=RUN does not name a run folder.
    """
    arguments = [quote_text(argument) if is_override(argument) else argument for argument in arguments]
    overrides = [argument for argument in arguments if is_override(argument)]
    flags = [argument for argument in arguments if argument not in overrides and argument not in ("-m", "--multirun")]
    is_sweep = len(overrides) + len(flags) < len(arguments)
    parsed = {override.key_or_group: override for override in map(parse, overrides)}
    check_arguments(parsed, flags, is_sweep)
    new = []
    for key in parsed.keys() & {"hydra.run.dir", "hydra.sweep.dir"}:
        new_folders.extend(missing_folders(str(parsed[key].value())))
    if "resume" in parsed:
        folder = Path(str(OmegaConf.create([parsed["resume"].value()])[0]))  # without the escapes of OmegaConf
        if "${" in str(folder):
            raise ValueError(f"Hydra cannot work in a folder with ${{ in its name: rename {folder}")
        load_config(folder, overrides)
        new.append(f"hydra.run.dir={quote(str(folder))}")
    elif "evaluate" in parsed and not is_sweep and "hydra.run.dir" not in parsed:
        name = re.sub(r"[^\w.+=,-]+", "_", Path(str(parsed["evaluate"].value())).name)
        new.append(f"hydra.run.dir='${{free_folder:runs/${{now:%Y-%m-%d}}/${{now:%H-%M-%S}}-evaluate-{name}}}'")
    if is_sweep and "hydra.sweep.subdir" not in parsed and (subfolder := sweep_folder_name(overrides)):
        new.append(f"hydra.sweep.subdir='{subfolder}'")
    if {"evaluate", "resume"} & set(parsed):
        # The keys are those of the run, which `apply_overrides` checks; the config that Hydra composes is not used.
        section_key = re.compile(r"(?!hydra[./])[\w.]+\.[\w.]+=")
        overrides = [f"++{override}" if section_key.match(override) else override for override in overrides]
    # Hydra takes the overrides in one piece, and a flag such as --info takes what follows it.
    return [*(["-m"] if is_sweep else []), *overrides, *new, *flags]


def check_arguments(parsed: Mapping[str, Override], flags: list[str], is_sweep: bool) -> None:
    """Raises ValueError for overrides, by their keys, and flags that do not go together."""
    actions = [action for action in ("evaluate", "resume") if action in parsed]
    for action in actions:
        if not parsed[action].is_sweep_override() and parsed[action].value() in ("", None):
            raise ValueError(f"{action}=RUN must name a run folder")
        if any(re.match(r"--cfg|-c\b", flag) for flag in flags):
            run = parsed[action].value()
            raise ValueError(
                f"{action}=RUN uses the run's own config, which --cfg cannot show: see {run}/.hydra/config.yaml"
            )
    if is_sweep and ranks.world_size() > 1:
        raise ValueError("a sweep starts the processes of its jobs itself: run it without torchrun")
    if len(actions) > 1 or ("resume" in parsed and is_sweep):
        raise ValueError("resume=RUN resumes a single run; omit -m and evaluate=RUN")
    for key, override in parsed.items():
        if override.is_sweep_override() and not is_sweep:
            raise ValueError(f"{key} has several values; add -m for a sweep of runs, or brackets for a list")
        if "experiment" in parsed and key in GROUPS and key != "experiment":
            text = override.input_line
            raise ValueError(
                f"an experiment brings its own {key}; omit {text}, or choose task, model and size without one"
            )


def only_prints(arguments: list[str]) -> bool:
    """Whether the flags ask for help or for the config, and nothing is run."""
    flags = get_args_parser().parse_args(arguments)
    return bool(flags.help or flags.hydra_help or flags.cfg or flags.info)


def check_flags(arguments: list[str]) -> None:
    """Raises ValueError for a flag that Hydra's parser does not take, or would guess, as --mult for --multirun."""

    def refuse(message: str) -> NoReturn:
        raise ValueError(f"{message}; see expire-span --help")

    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    parser.allow_abbrev = False
    if "-s" in arguments:  # which argparse completes nevertheless
        parser.error("unrecognized arguments: -s")
    if parser.parse_args(arguments).experimental_rerun:
        raise ValueError("--experimental-rerun would load a pickle, which can run code; resume=RUN continues a run")


@hydra.main(config_path="pkg://expire_span.conf", config_name="config", version_base="1.3")
def hydra_main(config: DictConfig) -> None:
    """One run, alone or as a job of a sweep, whose error then names the job."""
    try:
        ranks.connect()  # in a job that submitit starts
        with requeue_after_saving():
            metrics = run_job(config)
    except Exception as error:
        job = HydraConfig.get().job
        if OmegaConf.is_missing(job, "num"):
            exit_with_message(error)
        is_reporter(one_line(root_cause(error)))
        log.error(f"job {job.num} failed: {one_line(root_cause(error))}")
        if not isinstance(root_cause(error), USER_ERRORS) or HydraConfig.get().mode == RunMode.MULTIRUN:
            raise
        sys.exit(1)
    for name, value in metrics.items() if ranks.is_main() else ():
        print(f"{name:40} {value:.5g}")


def run_job(config: DictConfig) -> Metrics:
    """Train, resume or evaluate in the folder that Hydra has made for this job; returns the final metrics."""
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    if ranks.is_main() and hydra_config.mode == RunMode.RUN:
        ranks.broadcast(str(folder.absolute()))  # to the others, see `run_command`
    # As they were typed: the summary must not tell what ${oc.env:KEY} stands for.
    overrides = cast(list[str], OmegaConf.to_container(hydra_config.overrides.task, resolve=False))
    if config.evaluate is not None:
        return evaluate_job(Path(str(config.evaluate)).expanduser(), folder, [text.lstrip("+") for text in overrides])
    if config.resume is not None:
        return resume_job(folder, [text.lstrip("+") for text in overrides if not text.startswith("resume=")])
    check_recipe(overrides, config_folders())
    config = validate(config)
    if not is_plain_recipe(overrides, hydra_config.runtime.choices, config_folders()):
        config.milestones = {}
    if (folder.parent / "multirun.yaml").exists():  # written by Hydra for a sweep
        config.wandb.tags = [*config.wandb.tags, folder.parent.name[:MAX_TAG_LENGTH]]
    hydra_node: Any = OmegaConf.to_container(hydra_config, resolve=False, enum_to_str=True)
    files = ConfigFiles(config, hydra_node, overrides)
    with lock_by_main(folder, config):
        # the command of this job alone, also in a sweep
        return train(config, folder, ["expire-span", *overrides], config_sources(files), files.texts())


def resume_job(folder: Path, overrides: list[str]) -> Metrics:
    """Continue the run in a folder with its own config, of which few keys may change."""
    files = load_config_files(folder, overrides)
    apply_overrides(files.config, overrides, "resume", MAY_CHANGE_IN_RESUME)
    config = validate(files.config)
    overrides = merge_overrides(files.overrides, overrides)
    if not is_plain_recipe(overrides, files.hydra["runtime"]["choices"], config_folders()):
        config.milestones = {}
    files = ConfigFiles(config, files.hydra, overrides)
    with lock_by_main(folder, config):
        command = ["expire-span", *overrides]
        return train(config, folder, command, config_sources(files), files.texts(), MAY_CHANGE_IN_RESUME)


def evaluate_job(run_folder: Path, folder: Path, overrides: list[str]) -> Metrics:
    """Evaluate a run, with its own config except for the data and how it is evaluated, into another folder."""
    if checkpoint.paths(folder):
        raise ValueError(f"{folder} holds a run; evaluate into another hydra.run.dir")
    trained = load_config_files(run_folder, overrides)
    config = trained.config.copy()
    apply_overrides(config, overrides, "evaluate", CHANGED_BY_EVALUATION)
    config = validate(config)
    config.evaluate = literal(str(run_folder))
    trained_config = validate(trained.config)
    config.wandb.group = config.wandb.group or default_group(trained_config)  # W&B shows it beside the run
    files = ConfigFiles(config, trained.hydra, [*trained.overrides, *overrides])
    extras = config_sources(files) | {"simplifications": config_sources(trained)["simplifications"]}
    extras["trained"] = {
        key: old
        for key, old, _ in changes(
            OmegaConf.to_container(trained_config, resolve=True), OmegaConf.to_container(config, resolve=True)
        )
        if not is_below(key, ("evaluate", "wandb", "tracker"))
    }
    with lock_by_main(folder, config):
        return evaluate_run(config, run_folder, folder, ["expire-span", *overrides], extras, files.texts())


@contextmanager
def lock_by_main(folder: Path, config: DictConfig) -> Iterator[None]:
    """Lock a run folder by rank 0, and check that all ranks see it, and have the same config and code."""
    with lock(folder) if ranks.is_main() else nullcontext():
        if ranks.world_size() > 1:
            code = provenance()["commit"] or versions().get("expire-span")
            ranks.check_same({
                "config": OmegaConf.to_yaml(config),
                "run folder": str(folder.absolute()),
                "version of the code": code,
                "version of torch": torch.__version__,
            })  # fmt: skip
            if not all(ranks.gather((folder / ".lock").exists())):
                raise ValueError(f"{folder} is not one folder for all processes; choose one that all machines share")
        yield


def check_recipe(overrides: Sequence[str], folders: Sequence[str]) -> None:
    """Raises ValueError for a recipe that none of the folders of configs has, which Hydra leaves out silently."""
    for override in map(parse, overrides):
        recipe = override.value() if override.key_or_group == "recipe" else None
        if recipe and read_first(folders, f"recipe/{recipe}.yaml") is None:
            raise ValueError(f"recipe={recipe} does not exist; there are the tasks and sizes of conf/recipe")


def config_folders() -> list[str]:
    """Where the present command looks for config files, in Hydra's order."""
    return [f"{source.schema}://{source.path}" for source in HydraConfig.get().runtime.config_sources]


def config_sources(files: ConfigFiles) -> dict[str, Any]:
    """Which values are not the paper's, by the marks in the YAML files that the config was composed of."""
    choices = files.hydra["runtime"]["choices"]
    return value_sources(files.config, choices, config_folders(), files.overrides)
