from hydra import compose, initialize_config_module

from expire_span.runner.choices import marked

OURS = ["pkg://expire_span.conf"]


def marks(*overrides, **choices):
    with initialize_config_module("expire_span.conf", version_base="1.3"):
        config = compose("config", overrides=[*(f"{group}={option}" for group, option in choices.items()), *overrides])
    task, size = choices["task"], choices["size"]
    return marked(config, {**choices, "model": "expire_span", "setting": f"{task}/{size}"}, OURS, overrides)


def test_a_line_s_mark_is_for_its_keys_and_throughout_is_for_all_that_are_not_the_paper_s():
    corridor = marks(task="corridor", size="paper")["choices"]
    ours = corridor["our choice"]
    assert ours["transformer.heads"] == 2
    assert ours["actor_critic.discount"] == 0.99
    assert ours["task.random_sides"] is True
    assert not {"transformer.layers", "memory.max_span", "actor_critic.entropy", "task.longest"} & set(ours)
    assert corridor["the authors' released code"]["model.pre_div"] == 1.0

    copy = marks(task="copy", size="paper")["choices"]["our choice"]
    assert copy["memory.ramp"] == 128
    assert "memory.max_span" not in copy  # table 1's


def test_the_last_file_that_sets_a_key_decides_and_what_the_user_sets_is_no_choice_of_ours():
    choices = marks("train.clip=0.2", "task.rooms=9", task="portal", size="mini")["choices"]
    assert "train.clip" not in choices["our choice"]
    assert "task.rooms" not in choices["our choice"]
    assert "memory.max_span" in choices["our choice"]
    enwik8 = marks(task="enwik8", size="paper")["choices"]
    assert "memory.max_span" not in enwik8["our choice"]  # marked in size/mini, which is not in use
    assert enwik8["the authors' released code"]["memory.random_drop"] is True


def test_simplifications_are_told_in_the_words_of_the_setting_that_makes_them():
    [note] = marks(task="portal", size="mini")["simplifications"]
    assert note.startswith("Simplifications: 6 rooms")
    assert marks(task="portal", size="paper")["simplifications"] == []


def test_files_are_found_where_the_user_keeps_them(tmp_path):
    (tmp_path / "task").mkdir()
    (tmp_path / "task/mine.yaml").write_text("# Mine.\nseed: 1   # (c)\n")
    with initialize_config_module("expire_span.conf", version_base="1.3"):
        config = compose("config", overrides=["task=copy"])
    found = marked(config, {"task": "mine"}, [f"file://{tmp_path}", *OURS, "pkg://no.such.module"], [])
    assert found["choices"]["our choice"] == {"task.seed": 1}
