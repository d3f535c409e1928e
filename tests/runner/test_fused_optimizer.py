"""Fused optimizers: where they are the default, and that no cached projection outlives their steps."""

import copy

import pytest
import torch
from omegaconf import DictConfig
from tiny_config import each_model, tiny_config

from expire_span.runner.build import fused_option
from expire_span.runner.train import evaluate, train, train_step
from expire_span.runner.trainer import Trainer

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
FUSED = "+optimizer.fused=true"


def optimizer(**options):
    return DictConfig({"optimizer": {"_target_": "torch.optim.Adam", "lr": 0.1, **options}})


def test_an_optimizer_is_fused_on_cuda_if_it_can_be_and_nothing_else_was_chosen():
    assert fused_option(optimizer(), CUDA) == {"fused": True}
    assert fused_option(optimizer(_target_="torch.optim.AdamW"), CUDA) == {"fused": True}
    assert fused_option(optimizer(_target_="torch.optim.RMSprop"), CUDA) == {}  # torch has no fused one
    assert fused_option(optimizer(), CPU) == {}
    for option in ({"fused": False}, {"foreach": True}, {"differentiable": True}):
        assert fused_option(optimizer(**option), CUDA) == {}


@pytest.mark.parametrize("task", ["copy", "corridor"])
@pytest.mark.parametrize("model", each_model())
def test_evaluation_and_acting_after_a_fused_step_use_the_new_weights(model, task, tmp_path):
    """A fused step may change weights without a sign of it, so that nothing of before may be carried over it."""
    overrides = [FUSED, "optimizer.lr=0.05", f"model={model}"]
    overrides += ["eval.max_blocks=8" if task == "copy" else "eval.max_blocks=1"]
    trainer = Trainer(tiny_config(*overrides, task=task), tmp_path)
    assert trainer.optimizer.param_groups[0]["fused"]
    for _ in range(2):
        evaluate(trainer, "valid")  # fills caches
        train_step(trainer)
        assert all(memory.kv is None for memory in trainer.states[0]["layers"])
    fresh = Trainer(trainer.config, tmp_path)
    fresh.model.load_state_dict(copy.deepcopy(trainer.model.state_dict()))
    assert evaluate(trainer, "valid") == evaluate(fresh, "valid")


def test_a_run_goes_on_with_a_fused_optimizer_or_without_to_nearly_the_same_weights(tmp_path):
    """As when it moves between a CPU and a GPU: the state of one is that of the other."""
    weights = []
    for index, overrides in enumerate(([], [FUSED])):
        folder = tmp_path / str(index)
        folder.mkdir()
        train(tiny_config("train.updates=2"), folder)
        train(tiny_config("train.updates=4", *overrides), folder, changeable=("optimizer", "train.updates", "run"))
        trainer = Trainer(tiny_config(*overrides), folder)
        trainer.load_checkpoint(("optimizer", "run"))
        weights.append(torch.cat([parameter.flatten() for parameter in trainer.model.parameters()]))
    assert torch.allclose(weights[0], weights[1], atol=1e-5)
    assert {state["step"].item() for state in trainer.optimizer.state.values()} == {4.0}
