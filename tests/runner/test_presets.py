"""Each preset of conf/experiment/ composes to the paper's numbers, which are written down here once more.

The numbers are those of the paper's tables 1 to 6, figure 6, and sections A.1.1 and A.2.1 to A.2.4. What the paper does
not say is not checked.
"""

import pytest
from omegaconf import OmegaConf
from tiny_config import compose_config, config_options

from expire_span.runner.config.schema import validate

K = 1024
ADAM = {"optimizer._target_": "torch.optim.Adam"}
SETTINGS = {  # of a task, for every model
    "enwik8": {
        **ADAM,
        "transformer.num_layers": 12,
        "transformer.hidden_size": 512,
        "transformer.num_heads": 8,
        "optimizer.lr": 7e-4,
        "lr_schedule.warmup_updates": 8000,
        "train.batch_size": 512,
        "train.block_size": 512,
        "train.updates": 100_000,
    },
    "pg19": {
        "transformer.num_layers": 12,
        "transformer.hidden_size": 512,
        "transformer.feedforward_size": 2048,
        "transformer.num_heads": 8,
        "transformer.dropout": 0.2,
        "train.block_size": 512,
        "train.grad_clip": 0.3,
        "lr_schedule.warmup_updates": 8000,
        "lr_schedule.name": "cosine",
        "task.num_books": None,
    },
    "wikitext103": {
        **ADAM,
        "transformer.num_layers": 8,
        "transformer.hidden_size": 1024,
        "transformer.feedforward_size": 4096,
        "transformer.num_heads": 8,
        "transformer.dropout": 0.3,
        "transformer.embedding_dropout": 0.2,
        "optimizer.lr": 7e-4,
        "lr_schedule.warmup_updates": 8000,
        "train.batch_size": 512,
        "train.block_size": 256,
        "train.grad_clip": 0.1,
        "train.updates": 300_000,
    },
    "collision": {
        "task.grid_size": 16,
        "task.num_colors": 5,
        "task.color_change_prob": 0.05,
        "task.last_collision_question_fraction": 0.4,
        "task.timesteps": 50_000_000,
        "task.merge_fields": False,
    },
    "collision_easy": {"task.grid_size": 16, "task.timesteps": 50_000_000, "task.merge_fields": False},
    "instruction": {
        **ADAM,
        "transformer.num_layers": 6,
        "transformer.hidden_size": 512,
        "transformer.num_heads": 8,
        "optimizer.lr": 7e-4,
        "lr_schedule.warmup_updates": 8000,
        "task.distractors": 950,
        "task.dialogue": "light",
    },
    "copy": {},
}
SPAN_SETTINGS = {  # of a task, for Expire-Span
    "pg19": {"model.ramp": 128, "model.alpha": 1e-6},
    "instruction": {"model.ramp": 64, "model.alpha": 2e-6},
}
PRESETS = {  # task, model, its longest span in timesteps (None: the paper does not say), the paper's figures
    "table1_trans_xl_2k": ("copy", "trans_xl", 2048, {"test/accuracy": 0.267}),
    "table1_expire_span_16k": ("copy", "expire_span", 16 * K, {"test/accuracy": 0.294}),
    "table1_expire_span_128k": ("copy", "expire_span", 128 * K, {"test/accuracy": 0.521}),
    "table2_trans_xl": ("enwik8", "trans_xl", None, {"test/bpb": 1.06}),
    "table2_expire_span": ("enwik8", "expire_span", 16 * K, {"test/bpb": 0.994}),
    "table3_trans_xl_1k": ("collision", "trans_xl", K, {"test/error": 0.733}),
    "table3_compressive": (
        *("collision", "compressive", 512),
        {"test/error": 0.638, "perf/peak_memory_gb": 11.6, "perf/ms_per_batch": 327},
    ),
    "table3_adaptive_span": (
        *("collision", "adaptive_span", 16 * K),
        {"test/error": 0.598, "perf/peak_memory_gb": 17.2, "perf/ms_per_batch": 365},
    ),
    "table3_expire_span_16k": (
        *("collision", "expire_span", 16 * K),
        {"test/error": 0.522, "perf/peak_memory_gb": 11.9, "perf/ms_per_batch": 130},
    ),
    "table3_expire_span_32k": ("collision", "expire_span", 32 * K, {"test/error": 0.367}),
    "table3_expire_span_64k": ("collision", "expire_span", 64 * K, {"test/error": 0.267}),
    "table4_instruction_compressive": (
        *("instruction", "compressive", None),
        {"test/accuracy": 0.71, "perf/peak_memory_gb": 9.8, "perf/ms_per_batch": 210},
    ),
    "table4_instruction_adaptive_span": (
        *("instruction", "adaptive_span", None),
        {"test/accuracy": 0.64, "perf/peak_memory_gb": 14.2, "perf/ms_per_batch": 240},
    ),
    "table4_instruction_expire_span": (
        *("instruction", "expire_span", None),
        {"test/accuracy": 0.74, "perf/peak_memory_gb": 8.4, "perf/ms_per_batch": 90},
    ),
    "table4_enwik8_compressive": (
        *("enwik8", "compressive", None),
        {"test/bpb": 1.015, "perf/peak_memory_gb": 21.3, "perf/ms_per_batch": 805},
    ),
    "table4_enwik8_adaptive_span": (
        *("enwik8", "adaptive_span", None),
        {"test/bpb": 1.036, "perf/peak_memory_gb": 20.3, "perf/ms_per_batch": 483},
    ),
    "table4_enwik8_expire_span": (
        *("enwik8", "expire_span", 16 * K),
        {"test/bpb": 1.034, "perf/peak_memory_gb": 14.6, "perf/ms_per_batch": 408},
    ),
    "table4_pg19_adaptive_span": (
        *("pg19", "adaptive_span", None),
        {"test/bpc": 1.12, "perf/peak_memory_gb": 13.5, "perf/ms_per_batch": 515},
    ),
    "table4_pg19_expire_span": (
        *("pg19", "expire_span", None),
        {"test/bpc": 1.12, "perf/peak_memory_gb": 12.9, "perf/ms_per_batch": 585},
    ),
    "table5_expire_span": ("wikitext103", "expire_span", 8 * K, {"test/ppl": 19.6}),
    "table6_trans_xl_1k": ("collision_easy", "trans_xl", K, {"test/error": 0.391}),
    "table6_expire_span_1k": ("collision_easy", "expire_span", K, {"test/error": 0.195}),
    "table6_expire_span_2k": ("collision_easy", "expire_span", 2 * K, {"test/error": 0.091}),
    "table6_expire_span_4k": ("collision_easy", "expire_span", 4 * K, {"test/error": 0.032}),
    "figure4_corridor_expire_span": ("corridor", "expire_span", 200, {}),
    **{f"figure4_corridor_trans_xl_{size}": ("corridor", "trans_xl", size, {}) for size in (20, 50, 75, 100, 200)},
    "figure5_portal_expire_span": ("portal", "expire_span", 100, {}),
    **{f"figure5_portal_trans_xl_{size}": ("portal", "trans_xl", size, {}) for size in (5, 10, 20, 40, 100)},
    "figure6_trans_xl_1k": ("pg19", "trans_xl", K, {}),
    "figure6_trans_xl_2k": ("pg19", "trans_xl", 2 * K, {}),
    "figure6_expire_span_8k": ("pg19", "expire_span", 8 * K, {}),
    "figure6_expire_span_16k": ("pg19", "expire_span", 16 * K, {}),
    "figure6_expire_span_32k": ("pg19", "expire_span", 32 * K, {}),
}
OWN_SETTINGS = {
    "table2_expire_span": {
        "train.updates": 110_000,
        "lr_schedule.final_updates": 10_000,
        "lr_schedule.final_factor": 0.1,
    },
    "table3_compressive": {"model.compressed_size": 2048, "model.compression_rate": 4},
    "table3_expire_span_16k": {"model.random_drop": False},
    "table3_expire_span_64k": {"model.random_drop": True},
    "table4_enwik8_compressive": {"model.compression_rate": 4},
}


@pytest.mark.parametrize("experiment", config_options("experiment"))
def test_a_preset_has_the_numbers_of_the_paper(experiment):
    config = validate(compose_config(f"experiment={experiment}"))
    task, model, max_span, figures = PRESETS[experiment]
    expected = {
        **SETTINGS.get(task, {}),  # corridor and portal: the next test
        **(SPAN_SETTINGS.get(task, {}) if model == "expire_span" else {}),
        **({"model.max_span": max_span} if max_span else {}),
        **({"model.num_positions": config.train.block_size} if model == "expire_span" else {}),  # section 4.2
        **OWN_SETTINGS.get(experiment, {}),
    }
    assert {key: OmegaConf.select(config, key) for key in expected} == expected
    if task not in ("corridor", "portal"):  # which are not compiled
        assert (config.run.precision, config.run.compile) == ("auto", "auto")  # as the device allows: test_precision.py
    assert config.paper == figures
    assert config.model["_target_"].rpartition(".")[2].lower() == model.replace("_", "")
    assert config.task["_target_"].split(".")[-2] == task


@pytest.mark.parametrize("task", ["corridor", "portal"])
def test_the_recipes_of_the_gridworlds_have_the_numbers_of_the_paper(task):
    config = validate(compose_config(f"task={task}", "size=paper"))
    expected = {
        "transformer.num_layers": 2,
        "transformer.hidden_size": 64,
        "train.block_size": 100,
        "actor_critic.entropy_coef": 0.0005,
        "actor_critic.final_entropy_coef": 0.0005,
        "memory.ramp": 16,
        **{
            "corridor": {
                "task.min_length": 3,
                "task.max_length": 200,
                "optimizer._target_": "torch.optim.RMSprop",
                "optimizer.lr": 1e-4,
                "train.batch_size": 64,
                "train.updates": 100_000_000 // (64 * 100),
                "memory.max_span": 200,
                "memory.alpha": 5e-6,
            },
            "portal": {
                "task.num_rooms": 50,
                "task.room_size": 5,
                "task.max_mistakes": 2,
                "task.max_episode_steps": 1000,
                **ADAM,
                "optimizer.lr": 5e-4,
                "train.batch_size": 1024,
                "train.grad_clip": 0.1,
                "actor_critic.discount": 0.98,
                "memory.max_span": 100,
                "memory.alpha": 1e-6,
            },
        }[task],
    }
    assert {key: OmegaConf.select(config, key) for key in expected} == expected


def test_the_models_of_the_instruction_task_reach_as_far_as_each_other():
    reaches = []
    for model in ("expire_span", "adaptive_span", "compressive"):
        settings = validate(compose_config(f"experiment=table4_instruction_{model}")).model
        reaches.append(settings.max_span + settings.get("compression_rate", 0) * settings.get("compressed_size", 0))
    assert reaches == [32 * K] * 3
