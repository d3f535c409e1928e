"""What only training shows. Each test takes minutes: `make test-slow`."""

import hashlib
import math
import random

import pytest
import torch
from tiny_config import compose_config, tiny_config

from expire_span import AdaptiveSpan, ExpireSpan, Transformer, TransformerConfig
from expire_span.runner.config.schema import validate
from expire_span.runner.run_folder.files import read_metrics
from expire_span.runner.train import train
from expire_span.runner.trainer import Trainer
from expire_span.tasks import pg19, wikitext103
from expire_span.tasks.dialogue import load_dialogue

pytestmark = pytest.mark.slow
QUIET = ["wandb.mode=disabled", "run.device=cpu", "run.num_threads=1", "run.progress_bar=false"]


def train_mini(folder, *overrides):
    return train(validate(compose_config("size=mini", *overrides, *QUIET)), folder)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_expire_span_mini_copies_with_less_than_a_third_of_the_full_memory(seed, tmp_path):
    metrics = train_mini(tmp_path, "task=copy", "model=expire_span", f"seed={seed}")
    full_memory = (256 - 1) / 2  # the average memory size when nothing is forgotten
    assert metrics["test/accuracy"] >= 0.95
    assert metrics["test/memory/size"] < full_memory / 3


def test_transformer_xl_of_the_same_memory_size_is_near_chance_beyond_its_span(tmp_path):
    metrics = train_mini(tmp_path, "task=copy", "model=trans_xl", "model.max_span=17")
    assert metrics["test/accuracy_distance_128_256"] < 0.35  # guessing: 0.25


def test_expire_span_mini_keeps_little_more_than_the_collisions(tmp_path):
    metrics = train_mini(tmp_path, "task=collision", "model=expire_span")
    assert metrics["test/error"] < 0.1  # guessing: 0.75
    assert metrics["test/memory/size"] < 32


def test_transformer_xl_of_the_same_memory_forgets_most_collisions(tmp_path):
    metrics = train_mini(tmp_path, "task=collision", "model=trans_xl", "model.max_span=25")
    assert metrics["test/error"] > 0.25


def test_expire_span_mini_remembers_the_last_collisions_without_colors(tmp_path):
    metrics = train_mini(tmp_path, "task=collision_easy", "model=expire_span")
    assert metrics["test/error"] < 0.35  # guessing: 0.75
    assert metrics["test/memory/size"] < 32


def test_expire_span_mini_remembers_who_gave_an_instruction(tmp_path):
    metrics = train_mini(tmp_path, "task=instruction", "model=expire_span")
    assert metrics["test/accuracy_distance_128_256"] > 0.3  # guessing who gave it: 0.25 at best
    assert metrics["test/memory/size"] < 64


def test_expire_span_mini_finds_the_right_door_of_a_corridor(tmp_path):
    metrics = train_mini(tmp_path, "task=corridor", "model=expire_span")
    assert metrics["test/rl/success"] > 0.93
    assert metrics["test/rl/success_distance_32_64"] > 0.8  # guessing: 0.5
    assert metrics["test/memory/size"] < 9


def test_transformer_xl_of_the_same_memory_size_is_near_chance_in_long_corridors(tmp_path):
    metrics = train_mini(tmp_path, "task=corridor", "model=trans_xl", "model.max_span=12")
    assert metrics["test/rl/success_distance_2_4"] > 0.9
    assert metrics["test/rl/success_distance_32_64"] < 0.65  # two layers of span 12 reach back 24 cells


def test_expire_span_mini_passes_the_portals_to_the_last_room(tmp_path):
    metrics = train_mini(tmp_path, "task=portal", "model=expire_span")
    assert metrics["test/rl/rooms"] > 5.5  # of 6
    assert metrics["test/memory/size"] < 9


def test_small_texts_are_learned_and_a_larger_alpha_keeps_fewer_memories(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"The square of {n} is {n * n}, and its double {2 * n}.\n" for n in range(20_000)))
    sizes = []
    for alpha in ("1e-6", "1e-3"):
        folder = tmp_path / alpha
        folder.mkdir()
        metrics = train_mini(folder, "task=text", f"task.path={text}", f"memory.alpha={alpha}", "train.updates=300")
        assert metrics["test/bpb"] < 2.0  # bytes alone, without their neighbors, cost more than 4
        sizes.append(metrics["test/memory/size"])
    assert sizes[1] < sizes[0]


def grammar_sentences(count, seed):
    """Sentences of a small grammar, which cost about a bit per word: of 12 words 6 are free choices."""
    rng = random.Random(seed)
    return [rng.choice(load_dialogue(None)["train"]) for _ in range(count)]


def test_pg19_mini_learns_the_characters_of_a_few_books(tmp_path, monkeypatch):
    monkeypatch.setenv("EXPIRE_SPAN_CACHE", str(tmp_path / "cache"))
    index = {"train": [], "valid": [], "test": []}
    for number, split in enumerate(["train"] * 8 + ["validation", "test"]):
        content = "\r\n".join(grammar_sentences(1500, number)).encode()
        file = tmp_path / split / f"{number}.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
        book = pg19.Book(f"{split}/{number}.txt", len(content), hashlib.sha256(content).hexdigest()[:8])
        index[split.replace("validation", "valid")].append(book)
    monkeypatch.setattr(pg19, "read_index", lambda: index)
    books = [f"task.data_dir={tmp_path}", "task.num_books=8", "train.updates=300"]
    metrics = train_mini(tmp_path, "task=pg19", "model=expire_span", *books)
    assert metrics["test/bpb"] < 1.0  # one character after another, without what came before them: 4.2


@pytest.mark.parametrize("model", ["expire_span", "trans_xl", "adaptive_span", "compressive"])
def test_wikitext103_mini_learns_which_word_follows_through_the_adaptive_softmax(model, tmp_path, monkeypatch):
    monkeypatch.setenv("EXPIRE_SPAN_CACHE", str(tmp_path / "cache"))
    words: dict[str, list[str]] = {}
    for seed, (split, count) in enumerate({"train": 8000, "valid": 400, "test": 400}.items()):
        lines = grammar_sentences(count, seed)
        (tmp_path / f"wiki.{split}.tokens").write_text("".join(f" {line} \n" for line in lines), encoding="utf-8")
        words[split] = [word for line in lines for word in [*line.split(), "<eos>"]]
    monkeypatch.setattr(wikitext103, "NUM_WORDS", {split: len(part) for split, part in words.items()})
    monkeypatch.setattr(wikitext103, "VOCAB_SIZE", len(set(words["train"])))
    small = [f"task.data_dir={tmp_path}", "transformer.cutoffs=[20,40,60]", "train.updates=300"]
    metrics = train_mini(tmp_path, "task=wikitext103", f"model={model}", *small)
    assert metrics["test/ppl"] < 3.5  # by frequency alone: 51


def test_compiled_training_follows_the_same_losses(tmp_path):
    curves = []
    for compiled in ("false", "true"):
        folder = tmp_path / compiled
        folder.mkdir()
        torch.compiler.reset()
        overrides = ["train.updates=8", "run.log_every=1", "run.precision=float64"]
        train(tiny_config(f"run.compile={compiled}", *overrides), folder)
        curves.append([row["train/loss"] for row in read_metrics(folder / "metrics.jsonl") if "train/loss" in row])
    assert curves[1] == pytest.approx(curves[0], rel=1e-6)


def test_memories_that_shrink_and_grow_cause_no_recompilation():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    expire_span = ExpireSpan(32, 256, 8.0, 1e-5, num_positions=16, init_span_ratio=0.2)
    adaptive_span = AdaptiveSpan(2, 256, 8.0, 1e-5, init_span_ratio=0.8)  # uses more and more positions
    model = Transformer(TransformerConfig(50, 32, 2, 64), [expire_span, adaptive_span])
    torch.nn.init.normal_(expire_span.weight)
    compiled, state, sizes, graphs = torch.compile(model, dynamic=True), model.initial_state(4), set(), []
    for _ in range(200):
        logits, state, metrics = compiled(torch.randint(50, (4, 16)), state)
        (logits.logsumexp(-1).mean() + metrics["span_loss"]).backward()
        sizes.add(len(state["layers"][0].time))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert len(sizes) > 20
    assert graphs[-1] <= 4
    assert len(set(graphs[2:])) <= 2  # one graph more, once, where the positions of adaptive_span reach L


def test_deterministic_training_gives_the_same_weights_twice(tmp_path):
    weights = []
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            overrides = ["run.deterministic=true", "run.num_threads=2", "transformer.dropout=0.1"]
            config = tiny_config("train.updates=8", *overrides)
            train(config, folder)
            weights.append(Trainer(config, folder))
            weights[-1].load_checkpoint()
        finally:
            torch.use_deterministic_algorithms(False)
            torch.set_num_threads(1)
    for one, two in zip(weights[0].model.parameters(), weights[1].model.parameters(), strict=True):
        assert torch.equal(one, two)
        assert math.isfinite(one.sum().item())
