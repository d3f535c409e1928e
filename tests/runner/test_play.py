import pytest
from omegaconf import OmegaConf
from tiny import tiny

from expire_span.runner import play
from expire_span.runner.loop import train
from expire_span.runner.saved import open_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = tiny("model=expire_span", "memory.init=0.1", "memory.ramp=2", task="corridor")
    train(config, folder)
    (folder / ".hydra").mkdir()
    OmegaConf.save(config, folder / ".hydra/config.yaml")
    return folder, config


def test_each_frame_shows_the_world_what_was_seen_and_what_is_left_of_it(run):
    folder, config = run
    frames = list(play.frames(open_run(folder, config), steps=30, seed=1))
    worlds = [frame for frame in frames if not frame.startswith("over")]
    assert len(worlds) == 30
    lines = worlds[12].splitlines()
    assert lines[1].count("@") == 1
    strips = {line[:9].strip(): line[9:] for line in lines[4:-1]}
    assert list(strips) == ["seen", "moves", "layer 0", "layer 1"]
    assert strips["seen"][0] in "rb"
    assert len({len(strip) for strip in strips.values()}) == 1
    # spans of 3.2 and a ramp of 2: the last timesteps in full, the earlier ones gone
    for layer in ("layer 0", "layer 1"):
        assert strips[layer][-1] == "█"
        assert set(strips[layer][:-6]) <= {"·"}


def test_the_same_seed_shows_the_same_episode(run):
    first, again = (list(play.frames(open_run(*run), steps=20, seed=3)) for _ in range(2))
    assert first == again


def test_a_run_without_worlds_is_refused_in_one_line(tmp_path, monkeypatch):
    config = tiny(task="copy")
    (tmp_path / ".hydra").mkdir()
    OmegaConf.save(config, tmp_path / ".hydra/config.yaml")
    train(config, tmp_path)
    monkeypatch.setattr("sys.argv", ["expire-span-play", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"error: .* is of a task without worlds; .* shows corridor and portal"):
        play.main()
    monkeypatch.setattr("sys.argv", ["expire-span-play", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match="is not a run folder"):
        play.main()


def test_the_command_prints_frames_up_to_the_number_asked_for(run, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["expire-span-play", str(run[0]), "--steps", "4"])
    play.main()
    assert capsys.readouterr().out.count("expects a return of") == 4


@pytest.mark.parametrize("option", ["--steps=0", "--pause=-1", "--seed=-1"])
def test_options_without_a_meaning_end_with_one_line(run, option, monkeypatch):
    monkeypatch.setattr("sys.argv", ["expire-span-play", str(run[0]), option])
    with pytest.raises(SystemExit, match=f"error: .*{option.partition('=')[0]}"):
        play.main()
