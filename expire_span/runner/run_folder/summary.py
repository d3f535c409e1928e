"""What summary.json says of a run: its metrics and the protocol that gave them."""

from typing import Any, cast

import torch
from omegaconf import DictConfig, OmegaConf

from ...kernels.dispatch import select_backend
from ...transformer import Transformer
from ..logging.metrics import Metrics

NO_SETTINGS = ("wandb", "tracker", "paper", "simplified", "milestones")  # sections of the config that change no metric
FORMAT = 2  # 1, without this key, was written by versions before 0.2, which had other names


def run_summary(
    config: DictConfig,
    task: Any,
    model: Transformer,
    device: torch.device,
    update: int,
    blocks: int,
    metrics: Metrics,
) -> dict[str, Any]:
    """Metrics and protocol of a run. Task and model are named after the modules that define them."""
    evicts = config.eval.eviction is not None
    plain_config = cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    return {
        "format": FORMAT,
        "finished": update >= config.train.updates or config.eval.weights == "best",
        "task": type(task).__module__.split(".")[-1],
        "model": type(model.mechanisms[0]).__module__.split(".")[-1],
        "metric": task.metric,
        "paper": plain_config["paper"],
        "data": task.data_info,
        "metrics": metrics,
        "protocol": {
            "splits": list(config.eval.splits),
            "updates": update,
            "tokens": blocks * config.train.batch_size * config.train.block_size,
            "batch_size": config.train.batch_size,
            "block_size": config.train.block_size,
            "eval_batch_size": config.eval.batch_size,
            "eval_block_size": config.eval.block_size,
            "eval_max_blocks": config.eval.max_blocks,
            "eval_span_cap": config.eval.span_cap,
            **({"eval_eviction": config.eval.eviction, "eval_num_kept": config.eval.num_kept} if evicts else {}),
            "initial_memory": "empty",
            "max_span": config.model.get("max_span"),
            "seed": config.seed,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "precision": config.run.precision,
            "attention_backend": select_backend(model.config.attention_backend, device.type, model.position.dtype),
        },
        "config": {key: value for key, value in plain_config.items() if key not in NO_SETTINGS},
    }
