import json
import re

import pytest
from omegaconf import OmegaConf
from PIL import Image
from tiny_config import tiny_config

from expire_span.runner.commands import play
from expire_span.runner.load_run import load_run
from expire_span.runner.play.frames import Frame
from expire_span.runner.play.frames import play as play_frames
from expire_span.runner.play.terminal import BRIGHT, DARK, as_text, memory_cell
from expire_span.runner.play.video import map_image, memory_image
from expire_span.runner.train import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = tiny_config("model=expire_span", "memory.init_span_ratio=0.1", "memory.ramp=2", task="corridor")
    train(config, folder)
    (folder / ".hydra").mkdir()
    OmegaConf.save(config, folder / ".hydra/config.yaml")
    return folder, config


@pytest.fixture
def call(run, monkeypatch, capsys):
    """Run the command with options, and return what it prints."""

    def call(*options):
        monkeypatch.setattr("sys.argv", ["expire-span-play", str(run[0]), *map(str, options)])
        play.main()
        return capsys.readouterr().out

    return call


def test_each_frame_has_the_map_the_observations_and_what_each_layer_still_holds(run):
    frames = list(play_frames(load_run(*run), num_steps=30, seed=1))
    assert len(frames) == 30
    frame = frames[12]
    assert sum(row.count("@") for row in frame.map) == 1
    assert frame.observed[0] in "rb"
    assert {len(frame.actions), *map(len, frame.memories)} == {len(frame.observed)}
    # With spans of 3.2 and a ramp of 2 the last timesteps are held in full, and the earlier ones are gone.
    for memory in frame.memories:
        assert memory[-1] == 1
        assert set(memory[:-6]) <= {0}
    begins = [True, *(frame.ending is not None for frame in frames[:-1])]
    assert [len(frame.observed) == 1 for frame in frames] == begins


def test_the_same_seed_plays_the_same_episode(run):
    first, second = (list(play_frames(load_run(*run), num_steps=20, seed=3)) for _ in range(2))
    assert first == second


def test_a_terminal_without_colors_has_shades_and_one_with_colors_the_same_text(run):
    ansi = re.compile("\033\\[[0-9;]*m")
    for frame in play_frames(load_run(*run), num_steps=20, seed=1):
        plain, colored = as_text(frame), as_text(frame, color=True)
        assert "\033" not in plain
        assert ansi.sub("", colored) == re.sub("[█▓▒░·]", " ", plain)
        strips = [line[9:] for line in plain.splitlines() if line.startswith("layer")]
        expected = [[bool(m > 0) for m in memory] for memory in frame.memories]
        assert [[shade != "·" for shade in strip] for strip in strips] == expected
    assert [memory_cell(m, color=False) for m in (0, 0.2, 0.5, 0.7, 1)] == [*"·░▒▓█"]


def test_color_is_for_terminals_and_on_request(call):
    assert "\033" not in call("--steps", 2)
    assert "\033" in call("--steps", 2, "--color", "always")


def test_the_page_has_every_frame_and_loads_nothing(run, call, tmp_path):
    path = tmp_path / "new/page.html"
    assert call("--steps", 15, "--seed", 1, "--html", path).split() == [str(path)]
    text = path.read_text()
    assert not re.search(r"https?://|\bsrc=|\bhref=", text)
    data = json.loads(re.search(r'<script type="application/json"[^>]*>(.*?)</script>', text, re.DOTALL)[1])
    frames = list(play_frames(load_run(*run), 15, seed=1))
    assert [frame["decision"] for frame in data] == [frame.decision for frame in frames]
    assert data[7]["memories"] == [[round(100 * m) for m in row] for row in frames[7].memories]


def test_a_video_has_every_frame(call, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    call("--steps", 4, "--pause", 0.5, "--video=~/new/agent.gif")
    with Image.open(tmp_path / "new/agent.gif") as video:
        assert (video.n_frames, video.info["duration"]) == (4, 500)


def test_a_memory_is_green_while_it_is_held_and_dark_once_it_is_forgotten():
    frame = Frame(["###", "#@#"], "", "..", ">>", [[0.0, 1.0]], "", None)
    assert memory_image(frame)[0, :3].tolist() == [list(DARK), list(BRIGHT), [255, 255, 255]]
    assert map_image(frame).shape == (2, 3, 3)


def test_a_video_of_another_kind_is_refused_in_one_line(call, tmp_path):
    with pytest.raises(SystemExit, match=r"--video must end with .gif or .mp4, got agent.avi"):
        call("--steps", 1, "--video", tmp_path / "agent.avi")


def test_a_run_without_environments_is_refused_in_one_line(tmp_path, monkeypatch):
    config = tiny_config(task="copy")
    (tmp_path / ".hydra").mkdir()
    OmegaConf.save(config, tmp_path / ".hydra/config.yaml")
    train(config, tmp_path)
    monkeypatch.setattr("sys.argv", ["expire-span-play", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"error: the task of .* has no map; play shows corridor and portal"):
        play.main()
    monkeypatch.setattr("sys.argv", ["expire-span-play", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match="is not a run folder"):
        play.main()


def test_the_command_prints_as_many_frames_as_asked_for(call):
    assert call("--steps", 4).count("expects a return of") == 4


@pytest.mark.parametrize("option", ["--steps=0", "--pause=-1", "--seed=-1"])
def test_meaningless_options_are_refused_in_one_line(run, option, monkeypatch):
    monkeypatch.setattr("sys.argv", ["expire-span-play", str(run[0]), option])
    with pytest.raises(SystemExit, match=f"error: .*{option.partition('=')[0]}"):
        play.main()
