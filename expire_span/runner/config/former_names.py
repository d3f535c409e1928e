"""Config names of versions before 0.2, so that whoever still uses one is told the new one."""

FORMER_KEYS = {
    "optimiser": "optimizer",
    "schedule": "lr_schedule",
    "evaluation": "eval",
    "splits": "eval.splits",
    "setting": "recipe",
    "memory.init": "memory.init_span_ratio",
    "memory.positions": "memory.num_positions",
    "model.init": "model.init_span_ratio",
    "model.positions": "model.num_positions",
    "model.heads": "model.num_heads",
    "model.compressed": "model.compressed_size",
    "model.rate": "model.compression_rate",
    "transformer.layers": "transformer.num_layers",
    "transformer.heads": "transformer.num_heads",
    "transformer.embedding_init": "transformer.embedding_std",
    "transformer.kernel": "transformer.attention_backend",
    "transformer.recompute": "transformer.activation_checkpointing",
    "schedule.warmup": "lr_schedule.warmup_updates",
    "schedule.shape": "lr_schedule.name",
    "schedule.span_factor": "lr_schedule.span_lr_factor",
    "schedule.alpha_start": "alpha_schedule.start_update",
    "schedule.alpha_warmup": "alpha_schedule.warmup_updates",
    "train.batch": "train.batch_size",
    "train.block": "train.block_size",
    "train.accumulate": "train.grad_accumulation",
    "train.clip": "train.grad_clip",
    "actor_critic.trace": "actor_critic.gae_lambda",
    "actor_critic.entropy": "actor_critic.entropy_coef",
    "actor_critic.final_entropy": "actor_critic.final_entropy_coef",
    "actor_critic.value": "actor_critic.value_coef",
    "actor_critic.ratio_clip": "actor_critic.clip_coef",
    "actor_critic.epochs": "actor_critic.update_epochs",
    "actor_critic.normalise": "actor_critic.normalize_advantage",
    "evaluation.every": "eval.interval",
    "evaluation.batch": "eval.batch_size",
    "evaluation.block": "eval.block_size",
    "evaluation.blocks": "eval.max_blocks",
    "run.threads": "run.num_threads",
    "run.progress": "run.progress_bar",
    "task.distance": "task.episode_length",
    "task.first_distance": "task.initial_episode_length",
    "task.bar": "task.curriculum_threshold",
    "task.patience": "task.curriculum_max_intervals",
    "task.wait": "task.curriculum_min_intervals",
    "task.growth": "task.curriculum_growth",
    "task.largest_count": "task.max_count",
    "task.episodes": "task.num_eval_episodes",
    "task.grid": "task.grid_size",
    "task.colours": "task.num_colors",
    "task.colour_change": "task.color_change_prob",
    "task.last_collision_questions": "task.last_collision_question_fraction",
    "task.mapping_questions": "task.mapping_question_fraction",
    "task.speed": "task.velocity_std",
    "task.evaluation_timesteps": "task.eval_timesteps",
    "task.worlds": "task.num_simulations",
    "task.evaluation_worlds": "task.eval_simulations",
    "task.merged": "task.merge_fields",
    "task.shortest": "task.min_length",
    "task.longest": "task.max_length",
    "task.first_longest": "task.initial_max_length",
    "task.evaluation_longest": "task.eval_max_length",
    "task.random_sides": "task.random_door_sides",
    "task.time_limit": "task.max_episode_steps",
    "task.last_action": "task.observe_last_action",
    "task.rooms": "task.num_rooms",
    "task.size": "task.room_size",
    "task.mistakes": "task.max_mistakes",
    "task.first_rooms": "task.initial_num_rooms",
    "task.world": "task.map_path",
    "task.chatter": "task.dialogue",
    "task.agents": "task.num_agents",
    "task.ask": "task.instruction_prob",
    "task.waiting": "task.max_pending",
    "task.first_distractors": "task.initial_distractors",
    "task.evaluation_words": "task.eval_tokens",
    "task.folder": "task.data_dir",
    "task.books": "task.num_books",
    "task.missing": "task.on_missing",
    "task.unit": "task.tokenizer",
    "task.valid": "task.valid_fraction",
    "task.test": "task.test_fraction",
}
FORMER_VALUES = {
    "hydra/launcher=side_by_side": "hydra/launcher=processes",
    "hydra/launcher=joblib": "hydra/launcher=processes",
    "transformer.attention_backend=definition": "transformer.attention_backend=reference",
    "task.tokenizer=bytes": "task.tokenizer=byte",
    "task.tokenizer=characters": "task.tokenizer=char",
    "task.on_missing=fetch": "task.on_missing=download",
}


def current_name(key: str) -> str | None:
    """The present name of a former key, or None if the key is not a former one."""
    if key in FORMER_KEYS:
        return FORMER_KEYS[key]
    section, _, name = key.partition(".")
    return f"{FORMER_KEYS[section]}.{name}" if name and section in FORMER_KEYS else None


def check_current_names(overrides: list[str]) -> None:
    """Raises ValueError for the first override of the command line that uses a former name, with the present one."""
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0]
        if "=" not in override or key.startswith("-"):
            continue
        if name := current_name(key):
            raise ValueError(f"{key} is called {name} since version 0.2")
        if override in FORMER_VALUES:
            raise ValueError(f"{override} is written {FORMER_VALUES[override]} since version 0.2")
