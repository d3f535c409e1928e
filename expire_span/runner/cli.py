"""The command `expire-span`: train, evaluate (evaluate=RUN) or resume (resume=RUN) a run, or a sweep of runs (-m)."""

import logging
import os
import re
import sys
from contextlib import suppress
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from .config.former_names import check_current_names
from .config.schema import validate
from .config.value_sources import value_sources
from .errors import USER_ERRORS, exit_with_message, one_line, root_cause
from .evaluate import evaluate_run
from .load_run import load_config
from .logging.wandb_logger import MAX_NAME_LENGTH
from .output import keep_running_without_output
from .preemption import requeue_after_saving
from .run_folder import checkpoint
from .run_folder.files import lock, write_texts
from .stop_signals import Stopped, ignore_further_signals, stop_signals
from .train import train

log = logging.getLogger(__name__)
GROUPS = ("task", "model", "size", "recipe", "experiment")


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
        check_current_names(sys.argv[1:])
        sys.argv[1:] = evaluate_arguments(resume_arguments(sys.argv[1:]))
        hydra_main()
    except Stopped as stop:
        ignore_further_signals()
        with suppress(OSError):  # of a terminal that was closed
            print(stop.message, file=sys.stderr)
        raise
    except Exception as error:
        exit_with_message(error)
    finally:
        sys.stdout.flush()  # what the interpreter could not write at its end would change the exit code


class InstalledConfigs(SearchPathPlugin):
    """Adds the config files of installed packages, which name them in the entry point group `expire_span.conf`."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for entry_point in entry_points(group="expire_span.conf"):
            search_path.append(provider=entry_point.name, path=f"pkg://{entry_point.value}")


@hydra.main(config_path="pkg://expire_span.conf", config_name="config", version_base="1.3")
def hydra_main(config: DictConfig) -> None:
    """One run, alone or as a job of a sweep, whose error then names the job."""
    try:
        with requeue_after_saving():
            run_job(config)
    except Exception as error:
        job = HydraConfig.get().job
        if OmegaConf.is_missing(job, "num"):
            exit_with_message(error)
        log.error(f"job {job.num} failed: {one_line(root_cause(error))}")
        if not isinstance(root_cause(error), USER_ERRORS) or HydraConfig.get().mode == RunMode.MULTIRUN:
            raise
        sys.exit(1)


def run_job(config: DictConfig) -> None:
    """Train or evaluate in the folder that Hydra has made for this job, and print the final metrics."""
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    overrides = list(hydra_config.overrides.task)
    command = ["expire-span", *overrides]  # the command of this job alone, also in a sweep
    check_size_of_experiment(hydra_config.runtime.choices, overrides)
    if config.evaluate is not None:
        run_folder = Path(config.evaluate)
        if checkpoint.paths(folder):
            raise ValueError(f"{folder} holds a run; evaluate into another hydra.run.dir")
        trained_config = load_config(run_folder)
        config = validate(apply_overrides(trained_config.copy(), overrides))
        trained_hydra = OmegaConf.load(run_folder / ".hydra" / "hydra.yaml").hydra
        summary_extras = config_sources(config, trained_hydra, [*trained_hydra.overrides.task, *overrides])
        summary_extras["trained"] = changed_settings(trained_config, config, overrides)
        with lock(folder):
            write_texts(folder, hydra_files(config, hydra_config))
            metrics = evaluate_run(config, run_folder, folder, command, summary_extras)
    else:
        config_files = hydra_files(config, hydra_config)
        config = validate(config)
        summary_extras = config_sources(config, hydra_config, overrides)
        if config.wandb.group is None and (folder.parent / "multirun.yaml").exists():  # written by Hydra for a sweep
            config.wandb.group = folder.parent.name[:MAX_NAME_LENGTH]
        with lock(folder):
            metrics = train(config, folder, command, summary_extras, config_files)
    for name, value in metrics.items():
        print(f"{name:40} {value:.5g}")


def check_size_of_experiment(choices: Any, overrides: list[str]) -> None:
    """Raises ValueError if a task, model or size is asked for beside an experiment: its spans are made for its own."""
    for override in overrides:
        if choices.get("experiment") and override.startswith(("task=", "model=", "size=", "recipe=")):
            raise ValueError(
                f"experiment={choices['experiment']} brings its own {override.partition('=')[0]}; omit {override}, or "
                "choose task, model and size without an experiment"
            )


def hydra_files(config: DictConfig, hydra_config: Any) -> dict[str, str]:
    """The files of .hydra as Hydra itself would write them."""
    hydra_node = OmegaConf.create({"hydra": hydra_config})
    nodes = {"config": config, "hydra": hydra_node, "overrides": hydra_config.overrides.task}
    return {f".hydra/{name}.yaml": OmegaConf.to_yaml(node) for name, node in nodes.items()}


def config_sources(config: DictConfig, hydra_config: Any, overrides: list[str]) -> dict[str, Any]:
    """Which values are not the paper's, by the marks in the YAML files that Hydra composed."""
    folders = [f"{source.schema}://{source.path}" for source in hydra_config.runtime.config_sources]
    return value_sources(config, hydra_config.runtime.choices, folders, overrides)


def apply_overrides(config: DictConfig, overrides: list[str]) -> DictConfig:
    """Change a saved config by the command line. Raises ValueError for another task or model, or an unknown key."""
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        if key in GROUPS:
            raise ValueError(f"evaluate=RUN takes {key} from the run itself; omit {key}={value}")
        if OmegaConf.select(config, key, default=override) is override and key != "evaluate":
            raise ValueError(f"{key} is not in the config of the run that evaluate=RUN names (its .hydra/config.yaml)")
        OmegaConf.update(config, key, OmegaConf.from_dotlist([f"x={value}"]).x)
    return config


def changed_settings(trained_config: DictConfig, config: DictConfig, overrides: list[str]) -> dict[str, Any]:
    """The training's values of those settings that an evaluation has changed."""
    keys = {override.lstrip("+").partition("=")[0] for override in overrides} - {"evaluate"}
    values = {key: OmegaConf.select(trained_config, key) for key in sorted(keys) if not key.startswith("wandb.")}
    values = {key: value for key, value in values.items() if value != OmegaConf.select(config, key)}
    return {key: OmegaConf.to_container(v) if OmegaConf.is_config(v) else v for key, v in values.items()}


def evaluate_arguments(arguments: list[str]) -> list[str]:
    """For evaluate=RUN: let Hydra accept the keys of that run, which `apply_overrides` checks, and name the folder.

    Raises:
        ValueError: if --cfg is given, since Hydra would print a config that is not used.
    """
    evaluate = [argument for argument in arguments if argument.startswith("evaluate=")]
    if not evaluate:
        return arguments
    if any(re.match(r"--cfg|-c\b", argument) for argument in arguments):
        run = evaluate[0].partition("=")[2]
        raise ValueError(
            f"evaluate=RUN uses the run's own config, which --cfg cannot show: see {run}/.hydra/config.yaml"
        )
    section_key = re.compile(r"(?!hydra[./])[\w.]+\.[\w.]+=")
    arguments = [f"++{argument}" if section_key.match(argument) else argument for argument in arguments]
    if not any(argument.startswith(("hydra.run.dir=", "-m", "--multirun")) for argument in arguments):
        name = Path(evaluate[0].partition("=")[2].strip("'\"")).name.replace("'", "")
        position = arguments.index(evaluate[0])  # among the overrides: Hydra takes none after a flag
        arguments.insert(position, f"hydra.run.dir='runs/${{now:%Y-%m-%d}}/${{now:%H-%M-%S}}-evaluate-{name}'")
    return arguments


def resume_arguments(arguments: list[str]) -> list[str]:
    """For resume=RUN: the run's own overrides and folder, and then whatever else is given.

    Raises:
        ValueError: for a sweep, or for another task, model, size or seed.
        FileNotFoundError: if RUN is not a run folder.
    """
    resume = [argument for argument in arguments if argument.startswith("resume=")]
    if not resume:
        return arguments
    if {"-m", "--multirun"} & set(arguments):
        raise ValueError("resume=RUN resumes a single run; omit -m")
    run_folder = Path(resume[0].partition("=")[2])
    path = run_folder / ".hydra" / "overrides.yaml"
    if not path.exists():
        reason = f"resume={run_folder} is not a run folder: it has no .hydra/overrides.yaml"
        if run_folder.is_dir():
            reason += f"; if a run was stopped before it wrote that, repeat its command with hydra.run.dir={run_folder}"
        raise FileNotFoundError(reason)
    load_config(run_folder)  # refuses a run of an older version
    saved_overrides = [str(override) for override in OmegaConf.load(path)]
    new_overrides = [a for a in arguments if a not in resume and re.match(r"~|[^-][^=]*=", a)]
    flags = [a for a in arguments if a not in resume and a not in new_overrides]
    for override in new_overrides:
        key = override.partition("=")[0]
        if key in (*GROUPS, "seed") and override not in saved_overrides:
            raise ValueError(f"resume=RUN keeps the run's own {key}; omit {override}")
    if not any(flag.startswith(("--config-dir", "-cd")) for flag in flags):
        sources = OmegaConf.load(path.with_name("hydra.yaml")).hydra.runtime.config_sources
        flags += [f"--config-dir={source.path}" for source in sources if source.provider == "command-line"]
    new_keys = {override.partition("=")[0] for override in new_overrides}
    saved_overrides = [override for override in saved_overrides if override.partition("=")[0] not in new_keys]
    return [*flags, *saved_overrides, *new_overrides, f"hydra.run.dir='{run_folder}'"]  # Hydra wants overrides last
