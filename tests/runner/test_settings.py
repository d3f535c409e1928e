"""Wrong settings are refused at the door, in one line, with the key."""

import pytest
from tiny import composed

from expire_span.runner.settings import checked


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.updates=many", "train.updates: Value 'many'"),
        ("train.updates=1.5", "train.updates: Value '1.5'"),
        ("train.updates=0", "train.updates must be at least 1, got 0"),
        ("+train.speed=3", "train.speed is not known; train takes: updates, batch"),
        ("+model.spam=3", "model.spam is not known; model takes: hidden_size, max_span"),
        ("model.max_span=wide", "model.max_span: Value 'wide'"),
        ("+task.colour=red", "task.colour is not known; task takes: distance"),
        ("optimiser.lr=fast", "optimiser.lr: Value 'fast'"),
        ("+optimiser.momentum=0.9", "optimiser.momentum is not known; optimiser takes: lr"),
        ("transformer.heads=two", "transformer.heads: Value 'two'"),
        ("schedule.shape=square", "schedule.shape must be one of constant, cosine, got square"),
        ("run.precision=float8", "run.precision must be one of float32, bfloat16, float64, got float8"),
        ("seed=lucky", "seed: Value 'lucky'"),
        ("+sede=3", "sede is not known"),
        ("+actor_critics.epochs=3", "actor_critics is not known"),
        ("+memory.apha=3", "memory.apha is not known; memory takes: max_span, ramp"),
        ("splits=[tset]", "splits may name valid and test, got tset"),
        ("splits=test", "splits must be a list, as in splits=[test]"),
        ("task=text", "task.path has no value yet; give it one, as in task.path=VALUE"),
        ("model._target_=nowhere.Model", "model._target_ must name a class that can be imported, got nowhere.Model"),
        ("~train.clip", "train.clip is needed"),
        ("train.batch=${nowhere}", "train.batch: Interpolation key 'nowhere' not found"),
    ],
)
def test_a_wrong_setting_is_named_in_one_line(override, words):
    with pytest.raises(ValueError, match="^.*$") as caught:
        checked(composed(override))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_interpolated_values_follow_what_they_name():
    config = checked(composed("memory.max_span=77", "train.block=8"))
    assert config.model.max_span == 77
    assert config.model.positions == 8
    assert config.evaluation.block == 8


def test_an_optimiser_of_torch_takes_its_own_arguments():
    config = checked(composed("optimiser._target_=torch.optim.RMSprop", "+optimiser.momentum=0.9"))
    assert config.optimiser.momentum == 0.9
