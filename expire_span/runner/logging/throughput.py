"""How fast a training is: timesteps a second on each device, and operations a second against the device's peak."""

import torch
from omegaconf import DictConfig

from ...transformer import Transformer
from ..cost_model import DEVICES
from ..ranks import world_size
from ..step_cost import StepCost
from .metrics import Metrics

NAMES = {  # of the devices whose published peak is known, as torch calls them
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h100",  # of the same speed, with more memory
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA A100-SXM4-40GB": "a100",
    "NVIDIA A100 80GB PCIe": "a100",
    "NVIDIA GeForce RTX 4090": "rtx4090",
}


def throughput(config: DictConfig, model: Transformer, device: torch.device, metrics: Metrics) -> Metrics:
    """The figures of one device, from the times and the memories held of a logging interval.

    Operations are those that a block's training step needs, by `StepCost`, with as many memories as were held; what is
    computed twice for lack of memory does not count. They are not given where the model acts, which is no matter of
    operations.
    """
    if "perf/tokens_per_second" not in metrics:
        return {}
    figures = {"perf/tokens_per_second_per_device": metrics["perf/tokens_per_second"] / world_size()}
    if "perf/ms_per_rollout" not in metrics:
        cost = StepCost(
            model.config,
            num_layers=len(model.layers),
            batch_size=config.train.batch_size,
            block_size=config.train.block_size,
            num_memories=metrics["memory/held"],
            num_positions=len(model.position),
        )
        flops = sum(cost.operations().values()) / world_size() / (metrics["perf/ms_per_batch"] / 1000)
        figures["perf/model_tflops_per_second"] = flops / 1e12
        name = NAMES.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        if name is not None:
            figures["perf/model_flops_utilization"] = flops / DEVICES[name].flops[config.run.precision]
    return figures
