"""Wrong settings are refused before any work starts, in one line, by their keys."""

import pytest
from omegaconf import OmegaConf
from tiny_config import compose_config, config_options

from expire_span.runner.config.former_names import FORMER_KEYS, check_current_names
from expire_span.runner.config.schema import validate


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.updates=many", "train.updates: Value 'many'"),
        ("train.updates=1.5", "train.updates: Value '1.5'"),
        ("train.updates=0", "train.updates must be at least 1, got 0"),
        ("+train.speed=3", "train.speed is not known; train takes: updates, batch_size"),
        ("+model.spam=3", "model.spam is not known; model takes: hidden_size, max_span"),
        ("model.max_span=wide", "model.max_span: Value 'wide'"),
        ("+task.color=red", "task.color is not known; task takes: episode_length"),
        ("optimizer.lr=fast", "optimizer.lr: Value 'fast'"),
        ("+optimizer.momentum=0.9", "optimizer.momentum is not known; optimizer takes: lr"),
        ("transformer.num_heads=two", "transformer.num_heads: Value 'two'"),
        ("lr_schedule.name=square", "lr_schedule.name must be one of constant, cosine, got square"),
        ("run.precision=float8", "run.precision must be one of float32, bfloat16, float64, got float8"),
        ("seed=lucky", "seed: Value 'lucky'"),
        ("+sede=3", "sede is not known"),
        ("+actor_critics.epochs=3", "actor_critics is not known"),
        ("+memory.apha=3", "memory.apha is not known; memory takes: max_span, ramp"),
        ("eval.splits=[tset]", "eval.splits may name valid and test, got tset"),
        ("eval.splits=test", "eval.splits must be a list, as in eval.splits=[test]"),
        ("task=text", "task.path has no value yet; give it one, as in task.path=VALUE"),
        ("model._target_=nowhere.Model", "model._target_ must name a class that can be imported, got nowhere.Model"),
        ("model.hidden_size=0", "model.hidden_size=0 must be transformer.hidden_size=64"),
        ("~train.grad_clip", "train.grad_clip is needed"),
        ("train.batch_size=${nowhere}", "train.batch_size: Interpolation key 'nowhere' not found"),
        ("+train.clip=1.0", "train.clip is called train.grad_clip since version 0.2"),
        ("+evaluation.blocks=3", "evaluation is called eval since version 0.2"),
    ],
)
def test_a_wrong_setting_is_named_in_one_line(override, message):
    with pytest.raises(ValueError, match="^.*$") as caught:
        validate(compose_config(override))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimiser.lr=1e-3", "optimiser.lr is called optimizer.lr since version 0.2"),
        ("++schedule.final_updates=5", "schedule.final_updates is called lr_schedule.final_updates"),
        ("schedule.alpha_start=5", "schedule.alpha_start is called alpha_schedule.start_update"),
        ("evaluation.every=10", "evaluation.every is called eval.interval"),
        ("splits=[test]", "splits is called eval.splits"),
        ("hydra/launcher=side_by_side", "is written hydra/launcher=processes since version 0.2"),
    ],
)
def test_a_former_name_on_the_command_line_is_refused_with_the_present_one(override, message):
    with pytest.raises(ValueError, match="since version 0.2") as caught:
        check_current_names(["task=copy", override])
    assert message in str(caught.value)


def test_every_present_name_of_the_table_of_former_names_exists():
    tasks, models = config_options("task"), config_options("model")
    configs = [compose_config(f"task={task}") for task in tasks] + [compose_config(f"model={m}") for m in models]
    configs = [OmegaConf.to_container(config) for config in configs]
    for former, present in FORMER_KEYS.items():
        if "." in present:
            section, name = present.split(".")
            assert any(name in config[section] for config in configs), former


def test_interpolated_values_follow_the_keys_they_name():
    config = validate(compose_config("memory.max_span=77", "train.block_size=8"))
    assert config.model.max_span == 77
    assert config.model.num_positions == 8
    assert config.eval.block_size == 8


def test_an_optimizer_of_torch_takes_its_own_arguments():
    config = validate(compose_config("optimizer._target_=torch.optim.RMSprop", "+optimizer.momentum=0.9"))
    assert config.optimizer.momentum == 0.9
