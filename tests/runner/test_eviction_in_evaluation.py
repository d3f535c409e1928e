"""eval.eviction: a trained model of any mechanism holds fewer memories than it was trained with."""

import pytest
from omegaconf import OmegaConf
from tiny_config import tiny_config

from expire_span.runner.evaluate import evaluate_run
from expire_span.runner.eviction import EVICTIONS
from expire_span.runner.run_folder.files import read_summary
from expire_span.runner.train import train

RUNS = {"copy": ["model=trans_xl", "train.updates=30"], "corridor": ["model=expire_span", "eval.max_blocks=2"]}


@pytest.fixture(scope="module", params=RUNS)
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    config = tiny_config(*RUNS[request.param], task=request.param)
    return config, folder, train(config, folder)


def evaluated(run, folder, **settings):
    config, run_folder, _ = run
    folder.mkdir()
    return evaluate_run(OmegaConf.merge(config, {"eval": settings}), run_folder, folder)


@pytest.mark.parametrize("eviction", EVICTIONS)
def test_as_many_memories_are_held_as_were_asked_for_and_enough_of_them_change_nothing(run, eviction, tmp_path):
    enough = evaluated(run, tmp_path / "enough", eviction=eviction, num_kept=1000)
    for name, value in enough.items():
        if name.startswith(("valid/", "test/")):
            assert value == pytest.approx(run[2][name], rel=1e-5, abs=1e-6)
    few = evaluated(run, tmp_path / "few", eviction=eviction, num_kept=3)
    assert few["test/memory/held"] <= 3 < enough["test/memory/held"]
    assert few["test/memory/size"] < enough["test/memory/size"]
    protocol = read_summary(tmp_path / "few")["protocol"]
    assert (protocol["eval_eviction"], protocol["eval_num_kept"]) == (eviction, 3)
    assert "eval_eviction" not in read_summary(run[1])["protocol"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["eval.eviction=lru", "eval.num_kept=3"], "eval.eviction must be null or one of key_norm, tova, random_"),
        (["eval.eviction=tova"], "eval.eviction and eval.num_kept belong together, got tova and None"),
        (["eval.num_kept=3"], "eval.eviction and eval.num_kept belong together, got None and 3"),
        (["eval.eviction=tova", "eval.num_kept=0"], "eval.num_kept must be at least 1, got 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(*settings)
