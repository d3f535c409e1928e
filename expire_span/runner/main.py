"""The one entry: `expire-span task=... model=... size=...`, or evaluate=RUN, or resume=RUN."""

import logging
import os
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .choices import marked
from .loop import evaluate_run, train
from .record import lock, write_texts
from .saved import saved_config
from .settings import checked

log = logging.getLogger(__name__)
GROUPS = ("task", "model", "size", "setting", "experiment")
FULL_ERROR = os.environ.get("HYDRA_FULL_ERROR") == "1"  # the user's


@hydra.main(config_path="pkg://expire_span.conf", config_name="config", version_base="1.3")
def run(config: DictConfig) -> None:
    """One job. In a sweep a failing one raises, and the others go on; alone it ends the process with one line."""
    try:
        job(config)
    except Exception as error:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            log.error(f"job {HydraConfig.get().job.num} failed: {cause(error)}")
            raise
        end(error)


def job(config: DictConfig) -> None:
    """Train, or evaluate, in Hydra's folder for this job, and print the figures."""
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    overrides = list(hydra_config.overrides.task)
    command = ["expire-span", *overrides]  # of this job alone, whoever launched it
    if config.evaluate is not None:
        source = Path(config.evaluate)
        if (folder / "checkpoint.pt").exists():
            raise ValueError(f"{folder} holds a run; evaluate into another hydra.run.dir")
        before = saved_config(source)
        config = checked(changed(before.copy(), overrides))
        trained = OmegaConf.load(source / ".hydra" / "hydra.yaml").hydra
        origin = origin_of(config, trained, [*trained.overrides.task, *overrides])
        origin["trained"] = trained_otherwise(before, config, overrides)
        with lock(folder):
            write_texts(folder, composition(config, hydra_config))
            figures = evaluate_run(config, source, folder, command, origin)
    else:
        texts = composition(config, hydra_config)
        config = checked(config)
        origin = origin_of(config, hydra_config, overrides)
        if config.wandb.group is None and (folder.parent / "multirun.yaml").exists():  # Hydra's, of a sweep
            config.wandb.group = folder.parent.name
        with lock(folder):
            figures = train(config, folder, command, origin, texts)
    for name, figure in figures.items():
        print(f"{name:40} {figure:.5g}")


def composition(config: DictConfig, hydra_config: Any) -> dict[str, str]:
    """The files of a run's .hydra, as Hydra itself would write them."""
    hydra_node = OmegaConf.create({"hydra": hydra_config})
    parts = {"config": config, "hydra": hydra_node, "overrides": hydra_config.overrides.task}
    return {f".hydra/{name}.yaml": OmegaConf.to_yaml(part) for name, part in parts.items()}


def origin_of(config: DictConfig, hydra_config: Any, overrides: list[str]) -> dict[str, Any]:
    """Which values are our choice, by the marks in the YAML files that Hydra composed."""
    sources = [f"{source.schema}://{source.path}" for source in hydra_config.runtime.config_sources]
    return marked(config, hydra_config.runtime.choices, sources, overrides)


def trained_otherwise(before: DictConfig, config: DictConfig, overrides: list[str]) -> dict[str, Any]:
    """What this command has changed for the evaluation, as it was in training."""
    keys = {override.lstrip("+").partition("=")[0] for override in overrides} - {"evaluate"}
    values = {key: OmegaConf.select(before, key) for key in sorted(keys) if not key.startswith("wandb.")}
    values = {key: value for key, value in values.items() if value != OmegaConf.select(config, key)}
    return {key: OmegaConf.to_container(each) if OmegaConf.is_config(each) else each for key, each in values.items()}


def changed(config: DictConfig, overrides: list[str]) -> DictConfig:
    """A saved config with this command's values; choosing another task or model would make it another run."""
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        if key in GROUPS:
            raise ValueError(f"evaluate=RUN takes {key} from the run itself; leave {key}={value} away")
        if OmegaConf.select(config, key, default=override) is override and key != "evaluate":
            raise ValueError(f"{key} is not in the config of the run that evaluate=RUN names (its .hydra/config.yaml)")
        OmegaConf.update(config, key, OmegaConf.from_dotlist([f"x={value}"]).x)
    return config


def evaluating(arguments: list[str]) -> list[str]:
    """With evaluate=RUN the keys are that run's, which `changed` knows, and not those of the default task."""
    given = [argument for argument in arguments if argument.startswith("evaluate=")]
    if not given:
        return arguments
    plain = re.compile(r"(?!hydra[./])[\w.]+\.[\w.]+=")  # section.key=value
    arguments = [f"++{argument}" if plain.match(argument) else argument for argument in arguments]
    if not any(argument.startswith(("hydra.run.dir=", "-m", "--multirun")) for argument in arguments):
        name = Path(given[0].partition("=")[2].strip("'\"")).name.replace("'", "")
        arguments.append(f"hydra.run.dir='runs/${{now:%Y-%m-%d}}/${{now:%H-%M-%S}}-evaluate-{name}'")
    return arguments


def resumed(arguments: list[str]) -> list[str]:
    """resume=RUN stands for the run's own overrides, in its own folder; whatever else is given changes them."""
    given = [argument for argument in arguments if argument.startswith("resume=")]
    if not given:
        return arguments
    if {"-m", "--multirun"} & set(arguments):
        raise ValueError("resume=RUN goes on with one run; leave -m away")
    run_folder = Path(given[0].partition("=")[2])
    path = run_folder / ".hydra" / "overrides.yaml"
    if not path.exists():
        raise FileNotFoundError(f"resume={run_folder} is not a run folder: it has no .hydra/overrides.yaml")
    before = [str(each) for each in OmegaConf.load(path)]
    new = [each for each in arguments if each not in given and re.match(r"~|[^-][^=]*=", each)]
    flags = [each for each in arguments if each not in given and each not in new]
    for each in new:
        key = each.partition("=")[0]
        if key in (*GROUPS, "seed") and each not in before:
            raise ValueError(f"resume=RUN goes on with the run's own {key}; leave {each} away")
    if not any(each.startswith(("--config-dir", "-cd")) for each in flags):
        sources = OmegaConf.load(path.with_name("hydra.yaml")).hydra.runtime.config_sources
        flags += [f"--config-dir={each.path}" for each in sources if each.provider == "command-line"]
    changed_keys = {each.partition("=")[0] for each in new}
    before = [each for each in before if each.partition("=")[0] not in changed_keys]
    return [*flags, *before, *new, f"hydra.run.dir='{run_folder}'"]  # Hydra wants all overrides in one piece


def main() -> None:
    """The console command. Bad input ends it with one line; HYDRA_FULL_ERROR=1 shows where it was found."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra itself prints what it caught, and ends
    try:
        sys.argv[1:] = evaluating(resumed(sys.argv[1:]))
        run()
    except KeyboardInterrupt:  # before or after the training, which saves itself
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        end(error)


def cause(error: Exception) -> Exception:
    """Of what Hydra could not build: what the constructor said."""
    while isinstance(error, InstantiationException) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def end(error: Exception) -> NoReturn:
    """Bad input ends the process with one line; anything else is a bug, and keeps its trace."""
    error = cause(error)
    if FULL_ERROR or not isinstance(error, (ValueError, OSError, HydraException, OmegaConfBaseException)):
        raise error
    if isinstance(error, BrokenPipeError):  # of a reader that has seen enough, such as head
        os._exit(1)
    message = " ".join(str(error).split())
    if message.startswith("Could not override"):
        message = message.split(". ")[0] + ": there is no such key; `expire-span --cfg job` prints those there are"
        message += ", ++key=value sets one of another task or optimiser, as in a sweep"
    sys.exit(f"error: {message}")
