"""Wrong settings are refused before any work starts, in one line, by their keys."""

import pytest
from omegaconf import OmegaConf
from tiny_config import compose_config, config_options, tiny_config

from expire_span.runner.config.former_names import FORMER_KEYS, check_current_names
from expire_span.runner.config.schema import validate
from expire_span.runner.trainer import Trainer


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
        ("run.precision=float8", "run.precision must be one of auto, float32, bfloat16, float64, got float8"),
        ("run.compile=yes", "run.compile must be one of auto, true, false, got yes"),
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


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("transformer.pre_norm=no", False),
        ("transformer.pre_norm=off", False),
        ("transformer.pre_norm='false'", False),
        ("memory.random_drop=off", False),
        ("run.progress_bar=yes", True),
        ("optimizer.lr='1e-3'", 1e-3),
        ("train.batch_size='8'", 8),
        ("lr_schedule.final_factor=1", 1.0),
        ("transformer.cutoffs=['10','20']", [10, 20]),
        ("wandb.project=2025", "2025"),
        ("wandb.tags=[2025]", ["2025"]),
        ("evaluate=20251125", "20251125"),
        ("run.device=1", "1"),
        ("+optimizer.betas=['0.5',0.9]", [0.5, 0.9]),
        ("wandb.group=\\${literal}", "${literal}"),
    ],
)
def test_a_value_is_used_as_it_was_converted(override, value):
    config = validate(compose_config(override))
    used = OmegaConf.select(config, override.lstrip("+").partition("=")[0])
    assert used == value
    assert type(used) is type(value) or OmegaConf.is_list(used)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.grad_clip=nan", "train.grad_clip must be a finite number, got nan"),
        ("train.grad_clip=-1", "train.grad_clip must be above 0, got -1.0"),
        ("actor_critic.discount=2", "actor_critic.discount must be at most 1, got 2.0"),
        ("lr_schedule.final_factor=-1", "lr_schedule.final_factor must be at least 0, got -1.0"),
        ("lr_schedule.warmup_updates=-1", "lr_schedule.warmup_updates must be at least 0, got -1"),
        (f"seed={2**64}", f"seed must be at most {2**63 - 1}, got {2**64}"),
        (f"train.updates={10**30}", "train.updates must not be beyond"),
        ("run.num_threads=100000", "run.num_threads must be at most 1024"),
        ("wandb=false", "wandb must be a section of keys, got False; wandb.KEY=VALUE sets one"),
        ("run=null", "run must be a section of keys, got None"),
        ("+model._args_=[1]", "model._args_ is not allowed"),
        ("+optimizer._partial_=true", "optimizer._partial_ is not allowed"),
        ("+task.episode_length._target_=os.system", "task.episode_length"),
        ("transformer.cutoffs=true", "transformer.cutoffs must be a list"),
        ("task._target_=expire_span.ExpireSpan", "must be a subclass of expire_span.tasks.base.Task or"),
        ("+milestones={0:0.5,100:0.9}", "milestones.0 must be a percentage of the updates, above 0 and at most 100"),
        ("+milestones={-10:0.5}", "milestones.-10 must be a percentage"),
        ("+milestones={101:0.5}", "milestones.101 must be a percentage"),
        ("train.updates=50", "train.updates=50 is less than lr_schedule.warmup_updates=20 and"),
    ],
)
def test_a_value_out_of_its_bounds_is_named_in_one_line(override, message):
    with pytest.raises(ValueError, match="^[^\n]*$") as caught:
        validate(compose_config(override))
    assert message in str(caught.value)


@pytest.mark.parametrize("optimizer", ["LBFGS", "SparseAdam", "Adam, +optimizer.capturable=true"])
def test_an_optimizer_that_cannot_take_a_step_is_refused_before_the_training(optimizer, tmp_path):
    overrides = f"optimizer._target_=torch.optim.{optimizer}".split(", ")
    with pytest.raises(ValueError, match="^optimizer._target_=.* cannot train this model: [^\n]*$"):
        Trainer(tiny_config(*overrides), tmp_path)


def test_random_drop_is_refused_where_the_model_acts(tmp_path):
    with pytest.raises(ValueError, match="memory.random_drop=true hides from learning what acting has seen"):
        Trainer(tiny_config("memory.random_drop=true", task="corridor"), tmp_path)
