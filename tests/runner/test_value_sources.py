from hydra import compose, initialize_config_module

from expire_span.runner.config.value_sources import value_sources

PACKAGE = ["pkg://expire_span.conf"]


def sources_of(*overrides, **choices):
    groups = [f"{group}={option}" for group, option in choices.items()]
    with initialize_config_module("expire_span.conf", version_base="1.3"):
        config = compose("config", overrides=[*groups, *overrides])
    task, size = choices["task"], choices["size"]
    return value_sources(config, {**choices, "model": "expire_span", "recipe": f"{task}/{size}"}, PACKAGE, overrides)


def test_a_mark_is_for_the_keys_of_its_line_and_throughout_for_all_that_are_not_the_papers():
    corridor = sources_of(task="corridor", size="paper")["value_sources"]
    ours = corridor["our choice"]
    assert ours["transformer.num_heads"] == 2
    assert ours["actor_critic.discount"] == 0.99
    assert ours["task.random_door_sides"] is True
    papers = {"transformer.num_layers", "memory.max_span", "actor_critic.entropy_coef", "task.max_length"}
    assert not papers & set(ours)
    assert corridor["the authors' released code"]["model.pre_div"] == 1.0

    copy = sources_of(task="copy", size="paper")["value_sources"]["our choice"]
    assert copy["memory.ramp"] == 128
    assert "memory.max_span" not in copy  # from table 1


def test_the_last_file_that_sets_a_key_decides_and_a_value_of_the_users_has_no_source():
    sources = sources_of("train.grad_clip=0.2", "task.num_rooms=9", task="portal", size="mini")["value_sources"]
    assert "train.grad_clip" not in sources["our choice"]
    assert "task.num_rooms" not in sources["our choice"]
    assert "memory.max_span" in sources["our choice"]
    enwik8 = sources_of(task="enwik8", size="paper")["value_sources"]
    assert "memory.max_span" not in enwik8["our choice"]  # only size/mini.yaml, which is not in use, marks it
    assert enwik8["the authors' released code"]["memory.random_drop"] is True


def test_simplifications_are_given_in_the_words_of_the_recipe_that_makes_them():
    [note] = sources_of(task="portal", size="mini")["simplifications"]
    assert note.startswith("Simplifications: 6 rooms")
    assert sources_of(task="portal", size="paper")["simplifications"] == []


def test_marks_are_also_read_from_the_users_own_files(tmp_path):
    (tmp_path / "task").mkdir()
    (tmp_path / "task/mine.yaml").write_text("# Mine.\nseed: 1   # (c)\n")
    with initialize_config_module("expire_span.conf", version_base="1.3"):
        config = compose("config", overrides=["task=copy"])
    sources = value_sources(config, {"task": "mine"}, [f"file://{tmp_path}", *PACKAGE, "pkg://no.such.module"], [])
    assert sources["value_sources"]["our choice"] == {"task.seed": 1}
