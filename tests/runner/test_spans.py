"""The page of `expire-span-spans`: its data are read out of the HTML and compared with naive recomputations."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from small_models import MECHANISMS, small_model
from tiny_config import tiny_config
from torch.nn.functional import cross_entropy

from expire_span.analysis import memory_contents
from expire_span.runner.commands.spans import main
from expire_span.runner.load_run import LoadedRun, load_run
from expire_span.runner.spans.describe import describe
from expire_span.runner.spans.page import page, span_colors
from expire_span.runner.spans.passage import Codec, Passage, codec_of, encode_file, encode_pairs, replace
from expire_span.runner.train import train
from expire_span.tasks.base import IGNORE_INDEX, Task
from expire_span.tasks.copy import Copy

EVIL = "</script><script>alert(1)</script><!-- & \u2028 é\n"
TEXT = "".join(f"{number} bottles of Beer on the wall. {EVIL if number % 10 == 0 else ''}" for number in range(200))
LETTERS = Codec(
    "character",
    lambda text: [ord(letter) - ord("a") for letter in text],
    lambda token: b"abcdefghijk"[token : token + 1],
)


class Letters(Task):
    """The first 11 letters, for the small models."""

    vocab_size = num_classes = 11
    vocab = "abcdefghij"
    metric = "bpc"
    scoring = "token"

    def stream(self, split, batch_size, block_size):
        raise NotImplementedError


class Words(Letters):
    vocab = ("<unknown>", "the", "cook", "sings", ".", "a", "b", "c", "d", "e", "f")


class Page(HTMLParser):
    """The scripts, addresses and title of a page, as a browser would find them."""

    def __init__(self, text):
        super().__init__()
        self.scripts, self.title, self.addresses, self.inside = [], "", [], None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.inside = tag
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, text):
        if self.inside == "script":
            self.scripts[-1] += text
        elif self.inside == "title":
            self.title += text


def save(config, folder):
    (folder / ".hydra").mkdir(parents=True, exist_ok=True)
    OmegaConf.save(config, folder / ".hydra/config.yaml")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose test split has everything that could break a page."""
    folder = tmp_path_factory.mktemp("spans") / "a <b>run"
    folder.mkdir()
    text = folder.parent / "text.txt"
    text.write_text(TEXT)
    overrides = ["task.tokenizer=char", "task.test_fraction=0.1", "train.updates=2", "memory.init_span_ratio=0.3"]
    config = tiny_config(*overrides, "lr_schedule.warmup_updates=0", task="text", text=text)
    train(config, folder)
    save(config, folder)
    return folder


def make_page(folder, *options):
    """Call the command; return the page that it writes, and the data in it."""
    path = folder / "new/spans.html"
    main([*map(str, options), "--output", str(path)])
    parsed = Page(path.read_text())
    return parsed, json.loads(parsed.scripts[0])


@pytest.fixture(scope="module")
def edited(run, tmp_path_factory):
    """The page of the test split with a replacement and capped spans, beside a copy of the run."""
    folder = tmp_path_factory.mktemp("page")
    shutil.copytree(run, folder / "copy")
    options = [run, folder / "copy", "--max-tokens", 300, "--replace", "Beer=Bottle", "--span-cap", 3]
    parsed, data = make_page(folder, *options, "--loss-tokens", 500)
    return folder, parsed, data


def naive_losses(run, text, block_size=16, span_cap=None):
    """Bits of each character but the first, by one pass of the model through the text; and the last logits."""
    loaded = load_run(run, OmegaConf.load(run / ".hydra/config.yaml"))
    tokens = torch.tensor([[loaded.task.vocab.index(character) for character in text]])
    state, logits = loaded.model.initial_state(1), []
    with torch.no_grad():
        for block in tokens.split(block_size, 1):
            outputs, state, _ = loaded.model(block, state, None, span_cap)
            logits.append(outputs[0])
    nats = cross_entropy(torch.cat(logits)[:-1], tokens[0, 1:], reduction="none")
    return (nats / np.log(2)).tolist()


def test_no_text_breaks_out_of_the_page_and_nothing_is_loaded(edited):
    _, parsed, data = edited
    assert len(parsed.scripts) == 2
    assert parsed.addresses == []
    assert parsed.title == "What the run a <b>run remembers"
    assert "".join(data["texts"][0]["tokens"]) == TEXT[-(len(TEXT) // 10) :][:300]
    assert EVIL in "".join(data["texts"][0]["tokens"])
    assert "http" not in re.sub(r"http://www.w3.org/\S+", "", parsed.scripts[1])


def test_the_losses_are_those_of_the_model_read_by_hand_with_and_without_the_cap(run, edited):
    for text in edited[2]["texts"]:
        characters = "".join(text["tokens"])
        assert text["bits"][0] is None
        assert text["bits"][1:] == pytest.approx(naive_losses(run, characters), abs=1e-3)
        capped = np.array(naive_losses(run, characters, span_cap=3))
        assert text["more_bits"][1:] == pytest.approx(capped - np.array(text["bits"][1:]), abs=2e-3)
        assert max(map(abs, text["more_bits"][1:])) > 0.01


def test_the_replaced_text_is_that_of_str_replace_and_each_slot_has_the_same_text_or_was_replaced(edited):
    before, after = (text["tokens"] for text in edited[2]["texts"])
    assert "".join(after) == "".join(before).replace("Beer", "Bottle") != "".join(before)
    places = [0, 0]
    for start, end, new_start, new_end, is_replaced in edited[2]["slots"]:
        assert [start, new_start] == places
        texts = "".join(before[start:end]), "".join(after[new_start:new_end])
        assert texts == ("Beer", "Bottle") if is_replaced else texts[0] == texts[1]
        places = [end, new_end]
    assert places == [len(before), len(after)]


def test_the_table_has_the_mean_span_and_loss_of_each_kind_and_of_what_was_replaced(edited):
    for text, removed in zip(edited[2]["texts"], ("Beer", "Bottle"), strict=True):
        characters = "".join(text["tokens"])
        rows = {row["name"]: row for row in text["groups"]}
        members = {
            "spaces": [place for place, character in enumerate(characters) if character in " \u2028"],
            "digits": [place for place, character in enumerate(characters) if character.isdigit()],
            "replaced": [place for match in re.finditer(removed, characters) for place in range(*match.span())],
            "all": range(len(characters)),
        }
        for name, places in members.items():
            assert rows[name]["count"] == len(places)
            for layer, heads in enumerate(text["spans"]):
                assert rows[name]["spans"][layer] == pytest.approx(np.mean([heads[0][i] for i in places]), abs=0.02)
            bits = [text["bits"][place] for place in places if text["bits"][place] is not None]
            assert rows[name]["bits"][0] == pytest.approx(np.mean(bits), abs=2e-3)


def test_the_loss_along_the_data_is_averaged_in_windows_for_each_run(run, edited):
    curves = edited[2]["curves"]
    assert [curve["name"] for curve in curves["runs"]] == ["a <b>run", "copy"]
    bits = [None, *naive_losses(run, TEXT[-(len(TEXT) // 10) :][:500])]
    assert curves["size"] == 3
    for curve in curves["runs"]:
        for window, mean in enumerate(curve["bits"]):
            known = [value for value in bits[3 * window : 3 * window + 3] if value is not None]
            assert mean == pytest.approx(np.mean(known), abs=2e-3)


def test_a_picture_lies_beside_the_page_and_without_matplotlib_the_page_says_what_is_missing(
    run, edited, tmp_path, monkeypatch, capsys
):
    assert (edited[0] / "new/spans.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "expire_span.runner.spans.picture", raising=False)
    make_page(tmp_path, run, "--max-tokens", 20)
    assert capsys.readouterr().out.endswith("matplotlib is missing: pip install 'expire-span[plots]'\n")
    assert not (tmp_path / "new/spans.png").exists()


def soft_masks(data, layer, settings, moment):
    """The m of each head (places, H) for the tokens before a moment, and of pooled memories {time: m}, by the page."""
    masks, pooled = [], {}
    for place in range(moment):
        heads = [head[place] if isinstance(head, list) else head for head in data["spans"][layer]]
        distance = moment - place
        hidden = settings.max_distance and distance > settings.max_distance
        masks.append([0 if hidden else min(1, max(0, 1 + (span - distance) / settings.ramp)) for span in heads])
    for time, least, span in data["pooled"][layer]:
        m = min(1, max(0, 1 + (span - (moment - time)) / settings.ramp))
        if m > 0 and moment - time >= least:
            pooled[time] = m
    return np.array(masks), pooled


@pytest.mark.parametrize("kind", MECHANISMS)
@torch.no_grad()
def test_what_the_page_calls_alive_is_what_each_layer_holds_and_what_a_query_sees_then(kind):
    model = small_model(kind)
    run = LoadedRun(tiny_config("run.precision=float64"), Letters(), model, torch.device("cpu"), 0, 0, "")
    tokens = torch.randint(11, (144,), generator=torch.Generator().manual_seed(1)).tolist()
    data = describe(run, Passage(tokens, [*tokens[1:], IGNORE_INDEX]), [], LETTERS, None, None)
    state = model.initial_state(1)
    for block in torch.tensor([tokens])[:, :128].split(16, 1):
        _, state, _ = model(block, state)
        moment = int(state["step"])
        _, _, metrics = model(torch.tensor([[tokens[moment]]]), state)
        for layer, (times, m) in enumerate(memory_contents(model, state)):
            masks, pooled = soft_masks(data, layer, model.mechanisms[layer], moment)
            is_pooled = state["layers"][layer].min_distance > 1
            held = {
                time: mask
                for time, mask in zip(times[~is_pooled].tolist(), m[~is_pooled].tolist(), strict=True)
                if mask
            }
            ours = {place: mask for place, mask in enumerate(masks.mean(1).tolist()) if mask}
            assert ours == pytest.approx(held, abs=0.01)
            seen = (masks > 0).sum(0).mean() + len(pooled)
            assert seen == pytest.approx(float(metrics[f"memory/size_layer_{layer}"]))
    assert len(held) < moment
    assert (len(pooled) > 2) == (kind == "compressive")


def test_the_symbols_of_copy_and_the_words_of_a_task_are_written_and_unknown_ones_are_refused_by_name():
    codec = codec_of(Copy(64))
    assert codec.unit == "symbol"
    assert codec.texts(codec.encode("AAB?.")) == ["A", "A", "B", "?", "."]
    with pytest.raises(ValueError, match=r"not in the vocabulary of this run: 'x' \(U\+0078\), 'é' \(U\+00E9\)"):
        codec.encode("AxBé")
    words = codec_of(Words())
    assert words.texts(words.encode("the cook\nhums .\n")) == ["the ", "cook ", "<unknown> ", ". "]


def test_the_bytes_of_one_character_are_a_text_of_its_last_one():
    codec = Codec("byte", lambda text: list(text.encode()), lambda token: bytes([token]))
    assert codec.texts(codec.encode("aé€")) == ["a", "", "é", "", "", "€"]
    assert codec.texts(list("aé".encode())[:-1]) == ["a", "\N{REPLACEMENT CHARACTER}"]


def test_a_replacement_keeps_where_episodes_begin():
    passage = Passage([0, 1, 2, 0, 1, 2], [IGNORE_INDEX] * 6, [0, 1, 2, 0, 1, 2])
    changed, _ = replace(passage, [([0, 1], [7, 7, 7])])
    assert changed == Passage([7, 7, 7, 2, 7, 7, 7, 2], [IGNORE_INDEX] * 8, [0, 1, 2, 3, 0, 1, 2, 3])
    without, slots = replace(passage, [([2], []), ([0], [])])
    assert without == Passage([1, 1], [IGNORE_INDEX] * 2, [0, 0])
    assert slots[2] == (2, 3, 1, 1, True)
    with pytest.raises(ValueError, match="leaves nothing"):
        replace(passage, [([0, 1, 2], [])])
    assert encode_pairs([("a", "")], LETTERS.encode("ba"), LETTERS) == [([0], [])]


def test_a_file_is_refused_by_name_if_it_is_empty_or_not_utf_8(tmp_path):
    path = tmp_path / "text.txt"
    for content, message in ((b"", "is empty: give a text of at least one symbol"), (b"A\xff", "is not UTF-8")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"^{path} {message}"):
            encode_file(path, codec_of(Copy(64)))


def test_a_larger_span_is_darker_on_a_light_page_and_lighter_on_a_dark_one():
    def lightness(color):
        return sum(weight * int(color[i : i + 2], 16) for weight, i in ((0.2126, 1), (0.7152, 3), (0.0722, 5)))

    for is_dark in (False, True):
        values = list(map(lightness, span_colors(is_dark)))
        assert values == sorted(values, reverse=not is_dark)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--span-cap", "0"], "--span-cap must be at least 1, got 0"),
        (["--max-tokens", "1"], "--max-tokens must be at least 2, got 1"),
        (["--replace", "wall"], "--replace must look like OLD=NEW, got 'wall'"),
        (["--replace", "Egypt=wall"], "--replace Egypt=wall: not in the vocabulary of this run: 'E'"),
        (["--replace", "llaw=wall"], "--replace llaw=wall: the text that is shown does not have 'llaw'"),
        (["--text", "nowhere.txt"], "--text nowhere.txt does not exist"),
        (["--output", "spans.txt"], "--output must be a .html file, got spans.txt"),
        (["--output", "/dev/null/spans.html"], "/dev/null/spans.html cannot be written: /dev/null is no folder"),
    ],
)
def test_bad_options_are_refused_in_one_line(run, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=re.escape(message)):
        main([str(run), *options])
    assert list(tmp_path.iterdir()) == []


def test_a_missing_run_and_one_that_acts_are_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tiny_config(task="corridor"), tmp_path / "corridor")
    with pytest.raises(SystemExit, match="corridor acts in environments and reads no text; try expire-span-play"):
        main(["corridor"])
    with pytest.raises(SystemExit, match="nowhere is not a run folder"):
        main(["nowhere"])


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium")
def test_a_browser_shows_what_is_alive_at_the_moment_of_the_address(edited):
    folder, _, data = edited
    (folder / "page.html").write_text(page({**data, "texts": data["texts"][:1], "slots": None}))
    address = f"{(folder / 'page.html').as_uri()}#200"
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={folder}/profile",
        "--dump-dom",
    ]
    dom = subprocess.run([*command, address], capture_output=True, text=True, timeout=120, check=True).stdout
    for layer in range(2):
        masks, _ = soft_masks(data["texts"][0], layer, SimpleNamespace(**data["layers"][layer]), 200)
        assert f"layer {layer} still has {(masks > 0).sum()}" in dom
    assert dom.count('class="c later"') == 2 * (300 - 201)
