import pytest
from omegaconf import OmegaConf
from tiny_config import tiny_config

from expire_span.runner.commands import play
from expire_span.runner.load_run import load_run
from expire_span.runner.train import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = tiny_config("model=expire_span", "memory.init_span_ratio=0.1", "memory.ramp=2", task="corridor")
    train(config, folder)
    (folder / ".hydra").mkdir()
    OmegaConf.save(config, folder / ".hydra/config.yaml")
    return folder, config


def test_each_frame_shows_the_map_the_observations_and_what_each_layer_still_holds(run):
    folder, config = run
    frames = list(play.frames(load_run(folder, config), num_steps=30, seed=1))
    maps = [frame for frame in frames if not frame.startswith("episode over")]
    assert len(maps) == 30
    lines = maps[12].splitlines()
    assert lines[1].count("@") == 1
    strips = {line[:9].strip(): line[9:] for line in lines[4:-1]}
    assert list(strips) == ["observed", "actions", "layer 0", "layer 1"]
    assert strips["observed"][0] in "rb"
    assert len({len(strip) for strip in strips.values()}) == 1
    # With spans of 3.2 and a ramp of 2 the last timesteps are held in full, and the earlier ones are gone.
    for layer in ("layer 0", "layer 1"):
        assert strips[layer][-1] == "█"
        assert set(strips[layer][:-6]) <= {"·"}


def test_the_same_seed_plays_the_same_episode(run):
    first, second = (list(play.frames(load_run(*run), num_steps=20, seed=3)) for _ in range(2))
    assert first == second


def test_a_run_without_environments_is_refused_in_one_line(tmp_path, monkeypatch):
    config = tiny_config(task="copy")
    (tmp_path / ".hydra").mkdir()
    OmegaConf.save(config, tmp_path / ".hydra/config.yaml")
    train(config, tmp_path)
    monkeypatch.setattr("sys.argv", ["expire-span-play", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"error: the task of .* has no environments; play shows corridor and portal"):
        play.main()
    monkeypatch.setattr("sys.argv", ["expire-span-play", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match="is not a run folder"):
        play.main()


def test_the_command_prints_as_many_frames_as_asked_for(run, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["expire-span-play", str(run[0]), "--steps", "4"])
    play.main()
    assert capsys.readouterr().out.count("expects a return of") == 4


@pytest.mark.parametrize("option", ["--steps=0", "--pause=-1", "--seed=-1"])
def test_meaningless_options_are_refused_in_one_line(run, option, monkeypatch):
    monkeypatch.setattr("sys.argv", ["expire-span-play", str(run[0]), option])
    with pytest.raises(SystemExit, match=f"error: .*{option.partition('=')[0]}"):
        play.main()
