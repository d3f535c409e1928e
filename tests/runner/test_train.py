"""A training run from start to end: what it leaves behind, how it resumes, and what it does when things go wrong."""

import json
import math

import pytest
import torch
from tiny_config import each_model, tiny_config

from expire_span.kernels import cpp_backend
from expire_span.runner.objectives.prediction import Prediction
from expire_span.runner.run_folder import checkpoint
from expire_span.runner.run_folder.files import append_metrics, read_metrics
from expire_span.runner.run_folder.identity import MAY_CHANGE_IN_RESUME
from expire_span.runner.train import interval_metrics, train, train_step
from expire_span.runner.trainer import Trainer


def losses(folder):
    return {row["update"]: row["train/loss"] for row in read_metrics(folder / "metrics.jsonl") if "train/loss" in row}


def step_and_log(trainer):
    train_step(trainer)
    if trainer.update % trainer.config.run.log_every == 0:
        interval_metrics(trainer)


# What a run leaves behind


def test_a_run_leaves_metrics_protocol_and_a_checkpoint(folder):
    metrics = train(tiny_config(), folder)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["finished"]
    assert summary["metrics"]["test/accuracy"] == metrics["test/accuracy"]
    assert {"commit", "versions", "command"} <= set(summary)
    assert summary["protocol"]["attention_backend"] in ("cpp", "torch")
    assert summary["protocol"]["tokens"] == 4 * 16 * checkpoint.load(folder)["objective"]["blocks"]
    row = read_metrics(folder / "metrics.jsonl")[0]
    expected = {"train/loss", "train/accuracy", "memory/size", "memory/size_layer_1", "memory/span", "memory/bytes"}
    assert expected | {"perf/ms_per_batch", "perf/tokens_per_second", "perf/peak_resident_gb"} <= set(row)


def test_memory_size_in_training_is_the_mean_over_all_timesteps_also_those_of_blocks_without_targets(folder):
    whole_episodes = ["task.initial_episode_length=64", "run.log_every=4"]  # only the last of four blocks has targets
    train(tiny_config("model=trans_xl", *whole_episodes), folder)
    row = read_metrics(folder / "metrics.jsonl")[0]
    assert row["memory/size"] == pytest.approx(sum(min(t, 32) for t in range(64)) / 64)  # L = 32


@pytest.mark.parametrize("block_size", [1, 16, 64, 200])
def test_memory_size_in_evaluation_is_the_mean_over_timesteps_whatever_the_block_size(block_size, folder, text):
    text.write_text("ab c" * 365)  # the validation part is 73 characters
    whole = ["eval.batch_size=1", "eval.max_blocks=null", f"eval.block_size={block_size}", "eval.splits=[valid]"]
    metrics = train(tiny_config("model=trans_xl", *whole, task="text", text=text), folder)
    assert metrics["valid/memory/size"] == pytest.approx(sum(min(t, 32) for t in range(72)) / 72)  # L = 32


def test_text_is_scored_in_bits_per_byte(folder, text):
    metrics = train(tiny_config("train.updates=2", "eval.max_blocks=null", task="text", text=text), folder)
    assert metrics["test/bpb"] == pytest.approx(metrics["test/loss"] / math.log(2))


def test_evaluation_in_other_batches_gives_the_same_metrics_on_aligned_episodes(folder):
    trainer = Trainer(tiny_config("run.precision=float64"), folder)
    results = []
    for batch_size in (4, 8):
        trainer.config.eval.batch_size, trainer.config.eval.max_blocks = batch_size, None
        results.append(Prediction.evaluate(trainer.model, trainer.task, "test", trainer.config, trainer.device))
    assert results[0]["test/loss"] == pytest.approx(results[1]["test/loss"], rel=1e-12)
    assert results[0]["test/accuracy"] == results[1]["test/accuracy"]
    assert results[0]["test/memory/size"] == pytest.approx(results[1]["test/memory/size"], rel=1e-6)


# What an update does


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float64"])
def test_every_precision_trains_with_weights_of_at_least_float32(precision, folder):
    trainer = Trainer(tiny_config(f"run.precision={precision}"), folder)
    step_and_log(trainer)
    assert math.isfinite(trainer.averager.values()["train/loss"][0])
    assert trainer.model.mechanisms[0].bias.grad is None  # gradients are released
    dtype = torch.float64 if precision == "float64" else torch.float32
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {dtype}
    assert trainer.states[0]["layers"][0].time.dtype == torch.int64


def test_gradient_accumulation_gives_the_gradient_of_the_mean_loss(folder, text):
    """One SGD update over two blocks is the mean of the updates that each block alone would give."""
    sgd = ["optimizer._target_=torch.optim.SGD", "optimizer.lr=1.0", "lr_schedule.warmup_updates=0"]
    overrides = [*sgd, "train.grad_clip=null", "train.grad_accumulation=2", "run.precision=float64"]
    config = tiny_config(*overrides, task="text", text=text)
    accumulating, single = Trainer(config, folder), Trainer(config, folder)
    before = [parameter.detach().clone() for parameter in accumulating.model.parameters()]
    step_and_log(accumulating)
    single.config.train.grad_accumulation = 1
    updates = []
    for _ in range(2):
        step_and_log(single)
        updates.append([p.detach() - start for p, start in zip(single.model.parameters(), before, strict=True)])
        with torch.no_grad():
            for parameter, start in zip(single.model.parameters(), before, strict=True):
                parameter.copy_(start)
    for parameter, start, first, second in zip(accumulating.model.parameters(), before, *updates, strict=True):
        assert torch.allclose(parameter - start, (first + second) / 2, atol=1e-12)


def test_blocks_without_targets_cost_no_update(folder):
    trainer = Trainer(tiny_config("task.initial_episode_length=64"), folder)
    step_and_log(trainer)
    assert trainer.update == 1
    assert trainer.objective.blocks == 4
    assert trainer.states[0]["step"].item() == 64


# How a run resumes


@pytest.mark.parametrize("task", ["copy", "collision", "text"])
@pytest.mark.parametrize("model", each_model())
def test_a_stopped_run_resumes_to_the_same_losses_bit_for_bit(model, task, tmp_path, text, monkeypatch):
    monkeypatch.setenv("EXPIRE_SPAN_CACHE", str(tmp_path / "cache"))
    dropout = ["transformer.dropout=0.1", "memory.random_drop=true"]
    config = tiny_config(f"model={model}", "train.updates=6", *dropout, task=task, text=text)
    uninterrupted, interrupted = tmp_path / "uninterrupted", tmp_path / "interrupted"
    for run_folder in (uninterrupted, interrupted):
        run_folder.mkdir()
    train(config, uninterrupted)
    stopped = Trainer(config, interrupted)
    for _ in range(3):  # stops in the middle of a logging interval
        step_and_log(stopped)
    stopped.save_checkpoint()
    train(config, interrupted)
    expected_losses = {update: loss for update, loss in losses(uninterrupted).items() if update > 2}
    assert losses(interrupted) == expected_losses
    expected, resumed = (checkpoint.load(run_folder)["model"] for run_folder in (uninterrupted, interrupted))
    for name, weight in expected.items():
        assert torch.equal(weight, resumed[name]), name


def test_a_finished_run_that_is_started_again_keeps_the_peak_memory_of_its_training(folder):
    train(tiny_config(), folder)
    path = folder / "metrics.jsonl"
    rows = read_metrics(path)
    path.unlink()
    for row in rows:  # as if the training had needed more memory than anything after it
        append_metrics(path, row | ({"perf/peak_resident_gb": 123.0} if row["update"] == 2 else {}))
    assert train(tiny_config(), folder)["perf/peak_resident_gb"] == 123.0
    assert len(read_metrics(path)) == len(rows)  # the final metrics are not logged twice


def test_resuming_takes_the_optimizers_settings_from_the_current_config(folder):
    train(tiny_config(), folder)
    trainer = Trainer(tiny_config("train.updates=8", "optimizer.lr=0.5"), folder)
    assert trainer.load_checkpoint(MAY_CHANGE_IN_RESUME)
    assert max(group["initial_lr"] for group in trainer.optimizer.param_groups) == 0.5


# What is refused


def test_an_attention_backend_that_is_not_available_is_refused_before_the_training(folder, monkeypatch):
    monkeypatch.setattr(cpp_backend, "available", lambda: False)
    with pytest.raises(ValueError, match="cpp.* needs a C"):
        train(tiny_config("transformer.attention_backend=cpp"), folder)
    assert not (folder / "metrics.jsonl").exists()


@pytest.mark.parametrize("splits", [["valid"], ["test"]])
def test_an_evaluation_without_targets_is_refused_before_the_training(splits, folder):
    config = tiny_config("eval.max_blocks=2")  # of 16 timesteps; the answers are at the end of 64
    config.eval.splits = splits
    with pytest.raises(ValueError, match=rf"the first 2 blocks of the {splits[0]} split have no targets"):
        Trainer(config, folder)


def test_an_evaluation_that_cannot_work_is_refused_before_the_training(folder, text):
    overrides = ["eval.interval=2", "eval.splits=[test]", "task.valid_fraction=0"]
    with pytest.raises(ValueError, match="the valid split of task.path=.* has 0 tokens"):
        Trainer(tiny_config(*overrides, task="text", text=text), folder)


def test_a_checkpoint_of_another_model_is_refused(folder):
    train(tiny_config(), folder)
    with pytest.raises(ValueError, match="holds a run with .*model._target_=expire_span.ExpireSpan"):
        train(tiny_config("model=trans_xl"), folder)


def test_a_checkpoint_of_a_version_with_other_names_is_refused_with_what_to_do(folder):
    train(tiny_config(), folder)
    for path in checkpoint.paths(folder):
        path.unlink()
    (folder / "checkpoint.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="was written by expire-span 0.1, .* open it with that version"):
        train(tiny_config(), folder)


def test_results_without_a_checkpoint_are_not_overwritten(folder):
    train(tiny_config(), folder)
    for path in checkpoint.paths(folder):
        path.unlink()
    with pytest.raises(ValueError, match="results but no checkpoint"):
        train(tiny_config(), folder)


# When things go wrong


def test_a_nan_loss_ends_the_run_with_its_update_and_keeps_the_last_good_checkpoint(folder):
    config = tiny_config("train.updates=20", "run.checkpoint_every=1", "run.log_every=10")
    trainer = Trainer(config, folder)
    for _ in range(2):
        step_and_log(trainer)
    trainer.save_checkpoint()
    with torch.no_grad():
        trainer.model.output_head.bias.fill_(math.nan)
    step_and_log(trainer)
    with pytest.raises(ValueError, match="train/loss is nan at update 3"):
        trainer.save_checkpoint()
    content = checkpoint.load(folder)
    assert content["update"] == 2
    assert all(weight.isfinite().all() for weight in content["model"].values())


def test_a_nan_gradient_does_not_reach_a_checkpoint(folder):
    trainer = Trainer(tiny_config("train.updates=20", "run.log_every=10"), folder)
    step_and_log(trainer)
    trainer.save_checkpoint()
    trainer.model.output_head.weight.register_hook(lambda gradient: gradient * math.nan)
    step_and_log(trainer)  # the loss is still finite, the weights no longer are
    with pytest.raises(ValueError, match="train/grad_norm is nan at update 2"):
        trainer.save_checkpoint()
    assert checkpoint.load(folder)["update"] == 1


def test_a_full_disk_costs_only_the_checkpoint_being_written(folder, full_disk):
    trainer = Trainer(tiny_config(), folder)
    step_and_log(trainer)
    trainer.save_checkpoint()
    step_and_log(trainer)
    with full_disk(30_000), pytest.raises(OSError, match="checkpoint_2.pt could not be written"):
        trainer.save_checkpoint()
    assert checkpoint.load(folder)["update"] == 1
    assert not list(folder.glob("*.part"))


def test_a_start_in_a_folder_with_damaged_metrics_is_refused_before_anything_is_written(folder):
    (folder / "metrics.jsonl").write_text("no row\nnor this\n")
    with pytest.raises(ValueError, match="metrics.jsonl: line 1"):
        train(tiny_config(), folder, config_files={".hydra/config.yaml": "x"})
    assert [path.name for path in folder.iterdir()] == ["metrics.jsonl"]
