import base64
import io
import json
import re

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from tiny_config import tiny_config

from expire_span.runner.build import build_model
from expire_span.runner.commands import play
from expire_span.runner.load_run import LoadedRun, load_run
from expire_span.runner.play.frames import Frame
from expire_span.runner.play.frames import play as play_frames
from expire_span.runner.play.terminal import BRIGHT, DARK, as_text, memory_cell
from expire_span.runner.play.video import memory_image
from expire_span.runner.train import train
from expire_span.runner.trainer import build_task


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = tiny_config("model=expire_span", "memory.init_span_ratio=0.1", "memory.ramp=2", task="corridor")
    train(config, folder)
    (folder / ".hydra").mkdir()
    OmegaConf.save(config, folder / ".hydra/config.yaml")
    return folder, config


@pytest.fixture(scope="module")
def drawn_run(tmp_path_factory):
    """In an environment of Gymnasium with episodes of five timesteps, which are drawn."""
    pytest.importorskip("gymnasium")
    overrides = ["task.id=checking_envs:DrawnEnv", "train.updates=1", "eval.splits=[]", "memory.init_span_ratio=0.1"]
    config, folder = tiny_config(*overrides, task="gymnasium"), tmp_path_factory.mktemp("drawn")
    train(config, folder)
    (folder / ".hydra").mkdir()
    OmegaConf.save(config, folder / ".hydra/config.yaml")
    return folder, config


@pytest.fixture
def call(run, monkeypatch, capsys):
    """Run the command with options, and return what it prints."""

    def call(*options, run=run):
        monkeypatch.setenv("EXPIRE_SPAN_TRUST", "checking_envs")
        monkeypatch.setattr("sys.argv", ["expire-span-play", str(run[0]), *map(str, options)])
        play.main()
        return capsys.readouterr().out

    return call


def test_each_frame_has_the_map_the_observations_and_what_each_layer_still_holds(run):
    frames = list(play_frames(load_run(*run), num_steps=30, seed=1))
    assert len(frames) == 30
    frame = frames[12]
    assert sum(row.count("@") for row in frame.text) == 1
    assert frame.image.shape == (len(frame.text), max(map(len, frame.text)), 3)
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
    assert [as_text(frame) for frame in first] == [as_text(frame) for frame in second]


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
    data = page_data(path)
    frames = list(play_frames(load_run(*run), 15, seed=1))
    assert [frame["decision"] for frame in data] == [frame.decision for frame in frames]
    assert data[7]["memories"] == [[round(100 * m) for m in row] for row in frames[7].memories]


def page_data(path):
    """The frames of a page."""
    return json.loads(re.search(r'<script type="application/json"[^>]*>(.*?)</script>', path.read_text(), re.DOTALL)[1])


def test_an_environment_of_gymnasium_is_printed_without_its_colors_and_a_new_episode_begins_after_each(drawn_run, call):
    frames = call("--steps", 7, run=drawn_run).split("\n\n")
    steps = [0, 1, 2, 3, 4, 0, 1]
    assert [f"step {step}\n|---|\n" in frame for step, frame in zip(steps, filter(is_a_frame, frames), strict=True)]
    assert re.findall(r"checking_envs:DrawnEnv, step (\d), return (\d)", "".join(frames)) == [
        (str(step), str(step)) for step in steps
    ]
    assert "episode over: episode_return 5, episode_length 5, truncated 0" in frames
    actions = [re.search("actions  (.*)", frame)[1] for frame in filter(is_a_frame, frames)]
    assert [len(action) for action in actions] == [1, 2, 3, 4, 5, 1, 2]
    assert re.search(r"does (-1|0|1), with probability \d+%; expects a return of", frames[0])


def is_a_frame(text):
    return "actions" in text


def test_an_environment_of_gymnasium_is_drawn_on_a_page_and_in_a_video(drawn_run, call, tmp_path):
    call("--steps", 3, "--html", tmp_path / "page.html", "--video", tmp_path / "video.gif", run=drawn_run)
    for step, frame in enumerate(page_data(tmp_path / "page.html")):
        assert (frame["text"], frame["observed"]) == ([], "")
        with Image.open(io.BytesIO(base64.b64decode(frame["image"].removeprefix("data:image/png;base64,")))) as image:
            assert (np.asarray(image)[..., :3] == step).all()
    with Image.open(tmp_path / "video.gif") as video:
        assert video.n_frames == 3


@pytest.mark.parametrize(
    ("action", "told"),
    [("box", r"does \(-?[\d.]+, [\d.]+\); expects"), ("multi_discrete", r"does \(\d, .*\), with .*%; ")],
)
def test_several_actions_at_a_time_are_told_and_no_picture_is_none(action, told):
    pytest.importorskip("gymnasium")
    config = tiny_config(f"task.kwargs={{action:{action}}}", "task.id=checking_envs:CheckingEnv", task="gymnasium")
    task, device = build_task(config), torch.device("cpu")
    run = LoadedRun(config, task, build_model(config, task, device), device, update=0, blocks=0, run_id=None)
    for frame in play_frames(run, num_steps=7, seed=1, with_image=True):
        assert re.match(told, frame.decision)
        assert (frame.text, frame.image) == ([], None)


def test_an_environment_that_cannot_be_drawn_is_told_in_one_line(drawn_run, call, tmp_path):
    config = OmegaConf.merge(drawn_run[1], {"task": {"kwargs": {"cannot_be_drawn": True}}})
    with pytest.raises(ValueError, match="checking_envs:DrawnEnv cannot be drawn: no paint"):
        next(play_frames(load_run(drawn_run[0], config), num_steps=1, seed=0))


def test_a_video_has_every_frame(call, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    call("--steps", 4, "--pause", 0.5, "--video=~/new/agent.gif")
    with Image.open(tmp_path / "new/agent.gif") as video:
        assert (video.n_frames, video.info["duration"]) == (4, 500)


def test_a_memory_is_green_while_it_is_held_and_dark_once_it_is_forgotten():
    frame = Frame([], None, "", "..", ">>", [[0.0, 1.0]], "", None)
    assert memory_image(frame)[0, :3].tolist() == [list(DARK), list(BRIGHT), [255, 255, 255]]


def test_a_video_of_another_kind_is_refused_in_one_line(call, tmp_path):
    with pytest.raises(SystemExit, match=r"--video must end with .gif or .mp4, got agent.avi"):
        call("--steps", 1, "--video", tmp_path / "agent.avi")


def test_a_run_without_environments_is_refused_in_one_line(tmp_path, monkeypatch):
    config = tiny_config(task="copy")
    (tmp_path / ".hydra").mkdir()
    OmegaConf.save(config, tmp_path / ".hydra/config.yaml")
    train(config, tmp_path)
    monkeypatch.setattr("sys.argv", ["expire-span-play", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"error: the model of .* does not act; expire-span-spans shows"):
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
