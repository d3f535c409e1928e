"""A training step waits for its device once a block: nowhere else does the host ask for a value or a size."""

import sys
import warnings
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tiny_config import each_model, tiny_config
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode

import expire_span
from expire_span.runner.train import train_step
from expire_span.runner.trainer import Trainer
from expire_span.tasks import base

PACKAGE, TASKS = Path(expire_span.__file__).parent, Path(base.__file__).parent
# What makes the host wait if the tensor is on a device: as aten calls it, and as Python does.
OPERATIONS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "_unique2", "equal", "bincount")
METHODS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__")
# Here tensors are on the host, whatever the device: a batch before it is copied, and what random drop and dropout draw.
HOST_FUNCTIONS = ["a task", "the CPU's attention", "check_tokens", "count_targets", "Prediction.next_block"]
HOST_FUNCTIONS += ["packed_span_attention"]


def place() -> str:
    """The innermost function of the package that is running."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if PACKAGE in path.parents or TASKS in path.parents:
            if path.name == "cpp_backend.py":
                return "the CPU's attention"
            return "a task" if TASKS in path.parents else frame.f_code.co_qualname.partition(".<locals>")[0]
        frame = frame.f_back
    return "elsewhere"


@contextmanager
def places_that_wait():
    """Yield how often each function of the package has asked for a value or a size."""
    places = Counter()

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function.overloadpacket.__name__
            has_mask = name in ("index", "index_put", "index_put_") and any(
                getattr(index, "dtype", None) == torch.bool for index in args[1]
            )
            sizes_unknown = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
            if name in OPERATIONS or has_mask or sizes_unknown:
                places[place()] += 1
            return function(*args, **kwargs or {})

    class Methods(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if resolve_name(function) in {f"torch.Tensor.{name}" for name in METHODS}:
                places[place()] += 1
            return function(*args, **kwargs or {})

    with Operations(), Methods():
        yield places


@pytest.mark.parametrize("task", ["copy", "text"])
@pytest.mark.parametrize("model", each_model())
def test_a_step_waits_for_the_device_once_a_block(model, task, tmp_path, text):
    overrides = ["transformer.dropout=0.1", "memory.random_drop=true", "train.grad_accumulation=2"]
    overrides += [f"model={model}", "+optimizer.fused=true"]  # as on CUDA
    if model in ("expire_span", "adaptive_span"):
        overrides.append("memory.budget=40")
    trainer = Trainer(tiny_config(*overrides, task=task, text=text), tmp_path)
    train_step(trainer)  # the first one allocates the optimizer's state
    before = trainer.objective.blocks
    with places_that_wait() as places:
        for _ in range(3):
            train_step(trainer)
    waits = {name: count for name, count in places.items() if name not in HOST_FUNCTIONS}
    assert waits == {"Transformer.forward": trainer.objective.blocks - before}


def test_the_count_notices_each_way_of_waiting():
    tensor = torch.arange(4)
    with places_that_wait() as places:
        waits = [
            lambda: tensor.sum().item(),
            lambda: bool(tensor[0]),
            lambda: tensor.tolist(),
            lambda: tensor[tensor > 1],
            lambda: tensor.nonzero(),
            lambda: tensor.repeat_interleave(tensor),
            lambda: tensor.cpu(),
        ]
        for number, wait in enumerate(waits, 1):
            wait()
            assert places.total() >= number, f"way {number} is not noticed"
        before = places.total()
        torch.nonzero_static(tensor, size=3)
        tensor.repeat_interleave(tensor, output_size=6)
        assert places.total() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("model", each_model())
def test_cuda_itself_counts_one_wait_a_block(model, tmp_path, text):
    overrides = ["run.device=cuda", "run.precision=bfloat16", "transformer.dropout=0.1", f"model={model}"]
    trainer = Trainer(tiny_config(*overrides, "memory.random_drop=true", task="text", text=text), tmp_path)
    train_step(trainer)
    before = trainer.objective.blocks
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                train_step(trainer)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(warning.message) for warning in caught if "synchronizing" in str(warning.message)]
    assert len(waits) == trainer.objective.blocks - before, waits
