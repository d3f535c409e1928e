from copy import deepcopy
from itertools import islice

import pytest
import torch
from omegaconf import OmegaConf
from tiny import tiny
from tolerance import assert_equal

from expire_span import AdaptiveSpan, Compressive, ExpireSpan, Transformer, TransformerConfig, TransXL
from expire_span.runner import generate
from expire_span.runner.loop import train

TEXT = "".join(f"{number} bottles of beer on the wall, {number} bottles of beer.\n" for number in range(300))


def model_of(memory, vocabulary=11):
    torch.manual_seed(0)
    return Transformer(TransformerConfig(vocabulary, 12, 3, 20), memory).double().eval()


def forgetful(vocabulary=11, positions=8):
    """A float64 model whose memories live for 0 to 24 timesteps."""
    model = model_of([ExpireSpan(12, 24, 4.0, 0.1, positions, init=0.4) for _ in range(2)], vocabulary)
    for mechanism in model.mechanisms:
        torch.nn.init.normal_(mechanism.weight, std=2.0)
    return model


def tokens_of(model, prompt, number, **how):
    return list(islice(generate.generate(model, prompt, **how), number))


def test_what_is_written_token_by_token_has_the_probabilities_of_the_whole_text_at_once():
    model = forgetful()
    prompt = torch.randint(11, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    written = tokens_of(model, prompt, 120)
    text = [*prompt, *(token for token, _, _ in written)]
    with torch.no_grad():
        scores, state, _ = model(torch.tensor([text]), model.initial_state(1))
    log_p = model.output.log_p(scores)[0]
    for number, (_, ours, _) in enumerate(written):
        assert_equal(f"log p of token {number}", ours, log_p[len(prompt) - 1 + number])
    assert 0 < len(state["layers"][0].time) < 60  # most were forgotten on the way


@pytest.mark.parametrize("memory", [ExpireSpan(12, 24, 4.0, 0.1, 8), AdaptiveSpan(3, 24, 4.0, 0.1, 0.5), TransXL(24)])
def test_every_memory_is_projected_once_however_long_the_text(memory):
    model = model_of([memory, deepcopy(memory)])
    rows = []
    for layer in model.layers:
        layer.attention.key.register_forward_hook(lambda module, given, out: rows.append(given[0].shape[0]))
    tokens_of(model, [1, 2, 3], 51)  # the last one is not read any more
    assert sum(rows) == 2 * (3 + 50)  # layers, prompt and text


def test_weights_that_change_are_noticed_and_memories_projected_anew():
    model = forgetful()
    text = torch.randint(11, (1, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        _, state, _ = model(text, model.initial_state(1))
        model.layers[0].attention.key.weight.mul_(1.5)
        fresh = {**state, "layers": [memory._replace(projected=None) for memory in state["layers"]]}
        ours, theirs = (model(text[:, :4], each)[0] for each in (state, fresh))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("change", ["data", "another model", "assign"])
def test_weights_that_are_others_are_noticed_too(change):
    model, other = forgetful(), forgetful()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.5)
    text = torch.randint(11, (1, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        _, state, _ = model(text, model.initial_state(1))
        if change == "data":
            for parameter, theirs in zip(model.parameters(), other.parameters(), strict=True):
                parameter.data = theirs.data.clone()
        elif change == "assign":
            model.load_state_dict(other.state_dict(), assign=True)
        else:
            model = other
        fresh = {**state, "layers": [memory._replace(projected=None) for memory in state["layers"]]}
        ours, theirs = (model(text[:, :4], each)[0] for each in (state, fresh))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("rate", [1, 2, 4])
def test_a_prompt_of_any_length_is_read_by_every_model(rate):
    model = model_of([Compressive(12, 4, rate) for _ in range(2)])
    for length in range(1, 40):
        assert len(tokens_of(model, [1] * length, 3)) == 3


def test_memory_stays_flat_while_the_text_grows():
    model = forgetful()
    sizes = [float(figures["memory/bytes"]) for _, _, figures in tokens_of(model, [1], 1500)]
    assert max(sizes[1000:]) <= max(sizes[100:1000]) * 1.2


def test_the_likeliest_and_the_top_k_are_what_is_drawn():
    model = forgetful()
    for token, log_p, _ in tokens_of(model, [1], 20, temperature=0):
        assert token == log_p.argmax()
    for token, log_p, _ in tokens_of(model, [1], 60, top_k=2, temperature=3.0):
        assert token in log_p.topk(2).indices
    first, again, other = ([token for token, _, _ in tokens_of(model, [1], 40, seed=seed)] for seed in (1, 1, 2))
    assert first == again != other


@pytest.fixture(scope="module", params=["bytes", "characters"])
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "text.txt").write_text(TEXT)
    config = tiny(f"task.unit={request.param}", "model=expire_span", task="text", text=folder / "text.txt")
    train(config, folder)
    (folder / ".hydra").mkdir()
    OmegaConf.save(config, folder / ".hydra/config.yaml")
    return folder


def test_the_command_continues_a_prompt_and_tells_its_speed_and_memory(run, monkeypatch, capfdbinary):
    monkeypatch.setattr("sys.argv", ["expire-span-generate", str(run), "--prompt", "9 bottles", "--tokens", "30"])
    generate.main()
    said = capfdbinary.readouterr()
    assert said.out.startswith(b"9 bottles")
    assert len(said.out.decode(errors="replace")) >= 9 + 20
    assert b"[30 tokens, " in said.err
    assert b" memories, " in said.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--prompt", ""], "--prompt is empty"),
        (["--temperature", "-1"], "must not be negative"),
        (["--top-k", "0"], "at least 1"),
    ],
)
def test_bad_options_are_refused_in_one_line(run, monkeypatch, options, words):
    monkeypatch.setattr("sys.argv", ["expire-span-generate", str(run), *options])
    with pytest.raises(SystemExit, match=words):
        generate.main()


def test_a_run_without_text_is_refused(tmp_path, monkeypatch):
    config = tiny(task="copy")
    train(config, tmp_path)
    (tmp_path / ".hydra").mkdir()
    OmegaConf.save(config, tmp_path / ".hydra/config.yaml")
    monkeypatch.setattr("sys.argv", ["expire-span-generate", str(tmp_path)])
    with pytest.raises(SystemExit, match="task Copy is not one of text"):
        generate.main()
