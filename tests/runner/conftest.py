"""A text to train on, an empty run folder, runs of the paper's rows, and a full disk."""

import json
import resource
import shutil
import signal
from contextlib import contextmanager

import pytest
from omegaconf import OmegaConf
from tiny_config import compose_config
from tiny_tables import LONG, preset_row

from expire_span.paper_rows import row_config
from expire_span.runner.config.schema import validate
from expire_span.runner.run_folder.config_files import ConfigFiles
from expire_span.runner.run_folder.summary import NO_SETTINGS
from expire_span.runner.train import train


@pytest.fixture(autouse=True, scope="session")
def signals_are_heeded():
    """Where the tests run under nohup or in the background, they and their processes would ignore some signals."""
    for number, handler in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{number} bottles of beer on the wall, {number} bottles. " for number in range(300)))
    return path


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.fixture
def full_disk():
    """A context in which no file can grow beyond a number of bytes: that fails in the same way as a full disk."""

    @contextmanager
    def limit_file_size(size):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)

    return limit_file_size


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder of a run."""
    folder = tmp_path_factory.mktemp("trained")
    config = validate(compose_config(*preset_row(LONG).overrides))
    config.milestones = {}  # as of every run that changes its recipe
    train(config, folder, config_files=ConfigFiles(config, {}, []).texts())
    return folder


@pytest.fixture
def make_run(tmp_path, trained):
    """Make the run of a row and a seed in `runs`: a copy of one that was trained, with the row's config."""

    def make(row, seed, metrics=(), metric="accuracy"):
        folder = shutil.copytree(trained, tmp_path / "runs/mini" / row.preset / f"seed{seed}")
        summary = json.loads((folder / "summary.json").read_text())
        config = row_config((*row.overrides, f"seed={seed}"))
        OmegaConf.set_struct(config, False)
        for section in ("hydra", *NO_SETTINGS):
            config.pop(section, None)
        summary["config"] = OmegaConf.to_container(config, resolve=True)
        summary["protocol"]["seed"], summary["metric"] = seed, metric
        summary["metrics"] |= dict(metrics)
        (folder / "summary.json").write_text(json.dumps(summary))
        return folder

    return make
