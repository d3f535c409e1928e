import json
from copy import deepcopy
from itertools import islice

import pytest
import torch
import wandb
from assertions import assert_equal
from omegaconf import OmegaConf
from tiny_config import tiny_config
from wandb_file import wandb_records

from expire_span import AdaptiveSpan, Compressive, ExpireSpan, Transformer, TransformerConfig, TransXL
from expire_span.runner.commands.generate import generate, main
from expire_span.runner.config.schema import validate
from expire_span.runner.logging.wandb_logger import default_group
from expire_span.runner.run_folder import weights
from expire_span.runner.run_folder.config_files import load_config
from expire_span.runner.train import train

TEXT = "".join(f"{number} bottles of beer on the wall, {number} bottles of beer.\n" for number in range(300))


def build_model(mechanisms, vocab_size=11):
    torch.manual_seed(0)
    return Transformer(TransformerConfig(vocab_size, 12, 3, 20), mechanisms).double().eval()


def expire_span_model():
    """A float64 model whose memories have spans of 0 to 24 timesteps."""
    model = build_model([ExpireSpan(12, 24, 4.0, 0.1, num_positions=8, init_span_ratio=0.4) for _ in range(2)])
    for mechanism in model.mechanisms:
        torch.nn.init.normal_(mechanism.weight, std=2.0)
    return model


def generate_tokens(model, prompt, count, **options):
    return list(islice(generate(model, prompt, **options), count))


def test_tokens_generated_one_by_one_have_the_probabilities_of_the_whole_text_at_once():
    model = expire_span_model()
    prompt = torch.randint(11, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    generated = generate_tokens(model, prompt, 120)
    text = [*prompt, *(token for token, _, _ in generated)]
    with torch.no_grad():
        logits, state, _ = model(torch.tensor([text]), model.initial_state(1))
    log_probs = model.output_head.log_probs(logits)[0]
    for index, (_, token_log_probs, _) in enumerate(generated):
        assert_equal(f"log probs of token {index}", token_log_probs, log_probs[len(prompt) - 1 + index])
    assert 0 < len(state["layers"][0].time) < 60  # most memories have expired on the way


@pytest.mark.parametrize("memory", [ExpireSpan(12, 24, 4.0, 0.1, 8), AdaptiveSpan(3, 24, 4.0, 0.1, 0.5), TransXL(24)])
def test_keys_of_a_memory_are_computed_once_however_long_the_text(memory):
    model = build_model([memory, deepcopy(memory)])
    projected_rows = []
    for layer in model.layers:
        layer.attention.key_proj.register_forward_hook(
            lambda module, inputs, output: projected_rows.append(inputs[0].shape[0])
        )
    state = model.initial_state(1)
    with torch.no_grad():
        for block in torch.ones(1, 53, dtype=torch.long).split([3] + [1] * 50, 1):
            _, state, _ = model(block, state)
    assert sum(projected_rows) == 2 * 53  # layers, timesteps


def test_cached_keys_are_recomputed_when_weights_change():
    model = expire_span_model()
    text = torch.randint(11, (1, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        _, state, _ = model(text, model.initial_state(1))
        model.layers[0].attention.key_proj.weight.mul_(1.5)
        without_cache = {**state, "layers": [memory._replace(kv=None) for memory in state["layers"]]}
        cached, expected = (model(text[:, :4], start)[0] for start in (state, without_cache))
    assert torch.equal(cached, expected)


@pytest.mark.parametrize("change", ["data", "another model", "assign"])
def test_cached_keys_are_recomputed_when_weights_are_replaced(change):
    model, other = expire_span_model(), expire_span_model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.5)
    text = torch.randint(11, (1, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        _, state, _ = model(text, model.initial_state(1))
        if change == "data":
            for parameter, new_parameter in zip(model.parameters(), other.parameters(), strict=True):
                parameter.data = new_parameter.data.clone()
        elif change == "assign":
            model.load_state_dict(other.state_dict(), assign=True)
        else:
            model = other
        without_cache = {**state, "layers": [memory._replace(kv=None) for memory in state["layers"]]}
        cached, expected = (model(text[:, :4], start)[0] for start in (state, without_cache))
    assert torch.equal(cached, expected)


@pytest.mark.parametrize("compression_rate", [1, 2, 4])
def test_a_prompt_of_any_length_is_read_by_compressive(compression_rate):
    model = build_model([Compressive(12, 4, compression_rate) for _ in range(2)])
    for length in range(1, 40):
        assert len(generate_tokens(model, [1] * length, 3)) == 3


def test_memory_stays_flat_while_the_text_grows():
    model = expire_span_model()
    sizes = [decoder.pop_metrics()["memory/bytes"] for _, _, decoder in islice(generate(model, [1]), 1500)]
    assert max(sizes[1000:]) <= max(sizes[100:1000]) * 1.2


def test_temperature_0_takes_the_most_likely_token_and_top_k_one_of_the_k_most_likely():
    model = expire_span_model()
    for token, log_probs, _ in generate_tokens(model, [1], 20, temperature=0):
        assert token == log_probs.argmax()
    for token, log_probs, _ in generate_tokens(model, [1], 60, top_k=2, temperature=3.0):
        assert token in log_probs.topk(2).indices
    first, same, other = ([token for token, _, _ in generate_tokens(model, [1], 40, seed=seed)] for seed in (1, 1, 2))
    assert first == same != other


@pytest.fixture(scope="module", params=["byte", "char"])
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "text.txt").write_text(TEXT)
    config = tiny_config(f"task.tokenizer={request.param}", "model=expire_span", task="text", text=folder / "text.txt")
    train(config, folder)
    (folder / ".hydra").mkdir()
    OmegaConf.save(config, folder / ".hydra/config.yaml")
    return folder


def test_the_command_continues_a_prompt_and_reports_speed_and_memory(run, monkeypatch, capfdbinary):
    monkeypatch.setattr(
        "sys.argv", ["expire-span-generate", str(run), "--prompt", "9 bottles", "--max-new-tokens", "30"]
    )
    main()
    output = capfdbinary.readouterr()
    assert output.out.startswith(b"9 bottles")
    assert len(output.out.decode(errors="replace")) >= 9 + 20
    assert b"[30 tokens, " in output.err
    assert b" memories, " in output.err


def test_the_text_is_logged_beside_the_run_if_asked_for(run, tmp_path, monkeypatch, capfdbinary):
    wandb.teardown()  # otherwise W&B stays in the folder of an earlier test
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    options = ["--prompt", "9 bottles", "--max-new-tokens", "30", "--wandb"]
    monkeypatch.setattr("sys.argv", ["expire-span-generate", str(run), *options])
    main()
    wandb.teardown()
    [path] = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    [logged] = [record.run for record in wandb_records(path) if record.HasField("run")]
    assert (logged.job_type, logged.display_name) == ("generation", f"generate-{run.name}")
    assert logged.run_group == default_group(validate(load_config(run)))
    config = {item.key: item.value_json for item in logged.config.update}
    assert config["trained_run"] == f'"{weights.load(run / "model.safetensors").run_id}"'
    [table] = tmp_path.glob("wandb/offline-run-*/files/media/table/text_*.json")
    [[prompt, text, *_]] = json.loads(table.read_text())["data"]
    assert prompt == "9 bottles"
    assert capfdbinary.readouterr().out.decode(errors="replace").startswith(prompt + text)


def test_where_wandb_fails_the_text_is_written_and_the_warning_names_no_file_that_is_not_there(
    run, tmp_path, monkeypatch, capfdbinary, caplog
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(wandb, "init", lambda **keywords: 1 / 0)
    monkeypatch.setattr("sys.argv", ["expire-span-generate", str(run), "--max-new-tokens", "3", "--wandb"])
    main()
    assert len(capfdbinary.readouterr().out) > 3
    [warning] = [record.message for record in caplog.records if "W&B" in record.message]
    assert warning == "W&B is off for this run (division by zero); nothing else is lost"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", ""], "--prompt is empty"),
        (["--temperature", "-1"], "--temperature must be a number from 0 on, got -1.0"),
        (["--temperature", "nan"], "--temperature must be a number from 0 on, got nan"),
        (["--top-k", "0"], "--top-k must be at least 1, got 0"),
        (["--max-new-tokens", "-5"], "--max-new-tokens must be at least 1, got -5"),
    ],
)
def test_bad_options_are_refused_in_one_line(run, monkeypatch, options, message):
    monkeypatch.setattr("sys.argv", ["expire-span-generate", str(run), *options])
    with pytest.raises(SystemExit, match=message):
        main()


def test_the_former_flag_is_refused_with_its_new_name(run, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["expire-span-generate", str(run), "--tokens", "9"])
    with pytest.raises(SystemExit):
        main()
    assert "--tokens is now called --max-new-tokens: --max-new-tokens 9" in capsys.readouterr().err


def test_a_run_without_text_is_refused(tmp_path, monkeypatch):
    config = tiny_config(task="copy")
    train(config, tmp_path)
    (tmp_path / ".hydra").mkdir()
    OmegaConf.save(config, tmp_path / ".hydra/config.yaml")
    monkeypatch.setattr("sys.argv", ["expire-span-generate", str(tmp_path)])
    with pytest.raises(SystemExit, match="task Copy does not predict text"):
        main()
