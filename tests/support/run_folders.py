"""Run folders as the runner leaves them, without any training."""

from expire_span.runner.run_folder.files import write_summary


def run_folder(folder, seed=1, task="copy", model="expire_span", metrics=(), config=(), protocol=(), **summary):
    """A finished run; `config` and `protocol` take dotted and plain keys."""
    settings = {
        "task": {"_target_": f"expire_span.tasks.{task}.Task", "episode_length": 128, "seed": seed},
        "model": {"_target_": f"expire_span.{model}", "max_span": 256 if model == "expire_span" else 128},
        "train": {"updates": 400, "batch_size": 16},
        "seed": seed,
    }
    for key, value in dict(config).items():
        section, _, name = key.partition(".")
        settings[section][name] = value
    folder.mkdir(parents=True)
    write_summary(
        folder,
        {
            "format": 2, "task": task, "model": model, "metric": "accuracy", "finished": True,
            "commit": "c0ffee", "dirty": False, "config": settings,
            "metrics": {
                "test/accuracy": 0.9, "test/memory/size": 16.5, "test/memory/held": 20.0, "perf/ms_per_batch": 20.0,
                **dict(metrics),
            },
            "protocol": {
                "splits": ["test"], "updates": settings["train"]["updates"], "tokens": 1000 + seed,
                "batch_size": settings["train"]["batch_size"], "max_span": settings["model"]["max_span"],
                "seed": seed, **dict(protocol),
            },
            **summary,
        },
    )  # fmt: skip
    return folder
