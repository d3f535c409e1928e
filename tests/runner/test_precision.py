"""What `auto` becomes on a device, and what stays float32 under bfloat16 autocast."""

import json

import pytest
import torch
from tiny_config import compose_config, each_model, tiny_config

from expire_span.runner import build
from expire_span.runner.build import resolve_auto
from expire_span.runner.train import train, train_step
from expire_span.runner.trainer import Trainer
from expire_span.transformer import TransformerBlock

AUTO = ["run.precision=auto", "run.compile=auto"]


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that multiplies bfloat16 and runs Triton, as far as `resolve_auto` asks."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(build, "select_backend", lambda backend, *_: "triton" if backend == "auto" else backend)
    return torch.device("cuda")


def resolved(config, device):
    resolve_auto(config, device)
    return config.run.precision, config.run.compile


def test_auto_is_bfloat16_and_compiled_on_cuda_and_neither_on_a_cpu(gpu):
    assert resolved(tiny_config(*AUTO), gpu) == ("bfloat16", True)
    assert resolved(tiny_config(*AUTO), torch.device("cpu")) == ("float32", False)
    assert resolved(tiny_config(*AUTO, "transformer.attention_backend=torch"), gpu) == ("bfloat16", False)
    assert resolved(tiny_config("run.precision=float64", "run.compile=false"), gpu) == ("float64", False)


def test_only_the_papers_size_leaves_precision_to_the_device_and_acting_is_not_compiled():
    for task in ("corridor", "portal"):  # acting uses the cache of keys and values, which compiled code does not have
        run = compose_config(f"task={task}", "size=paper").run
        assert (run.precision, run.compile) == ("auto", False)
    for size in ("mini", "small"):
        run = compose_config("task=copy", f"size={size}").run
        assert (run.precision, run.compile) == ("float32", False)


def test_the_summary_and_the_checkpoint_say_what_auto_has_become(folder):
    train(tiny_config(*AUTO, "train.updates=2"), folder)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["protocol"]["precision"] == summary["config"]["run"]["precision"] == "float32"
    assert summary["config"]["run"]["compile"] is False
    train(tiny_config("run.precision=float32", "train.updates=4"), folder)  # the same precision by its name goes on


def test_a_run_of_a_gpu_that_goes_on_elsewhere_is_told_its_precision_in_one_line(folder):
    train(tiny_config("run.precision=bfloat16", "train.updates=2"), folder)  # what auto is on a GPU
    with pytest.raises(ValueError, match=r"holds a run with run.precision=bfloat16; use .*, or set run.precision=bf"):
        train(tiny_config(*AUTO, "train.updates=4"), folder)
    train(tiny_config("run.precision=bfloat16", "run.compile=auto", "train.updates=4"), folder)


@pytest.mark.parametrize("task", ["copy", "corridor"])
@pytest.mark.parametrize("model", each_model())
def test_the_residual_stream_memories_spans_and_losses_are_float32_under_bfloat16_autocast(model, task, tmp_path):
    trainer = Trainer(tiny_config("run.precision=bfloat16", f"model={model}", task=task), tmp_path)
    dtypes = {}

    def record(module, inputs, outputs):
        hidden, attended, _, metrics = outputs
        dtypes["hidden"], dtypes["memory"], dtypes["span"] = hidden.dtype, attended.hidden.dtype, attended.kv[2].dtype
        dtypes["key"] = attended.kv[0].dtype
        dtypes.update({name: value.dtype for name, value in metrics.items()})

    for module in trainer.model.modules():
        if isinstance(module, TransformerBlock):
            module.register_forward_hook(record)
    for _ in range(2):
        train_step(trainer)
    assert dtypes.pop("key") == torch.bfloat16  # autocast is on
    assert set(dtypes.values()) <= {torch.float32, torch.float64}, dtypes
    for memory in trainer.states[0]["layers"]:
        assert (memory.hidden.dtype, memory.time.dtype) == (torch.float32, torch.int64)
    losses = trainer.averager.recent
    assert {values[-1].dtype for name, values in losses.items() if name.endswith("loss")} == {torch.float32}
