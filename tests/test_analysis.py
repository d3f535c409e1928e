"""What a model remembers, against loops over tokens and against the model itself."""

import math

import numpy as np
import pytest
import torch
from assertions import assert_equal
from small_models import MECHANISMS, run_in_blocks, small_model
from torch.nn.functional import cross_entropy

from expire_span.analysis import means_by_group, read, spans_over_time, token_groups, window_means
from expire_span.memory.packed import from_dense
from expire_span.tasks.base import IGNORE_INDEX, Batch

TOKENS = torch.randint(11, (2, 112), generator=torch.Generator().manual_seed(1))
TARGETS = TOKENS.roll(-1, 1).masked_fill(torch.arange(112) % 5 == 0, IGNORE_INDEX)
BLOCKS = [Batch(tokens, targets) for tokens, targets in zip(TOKENS.split(16, 1), TARGETS.split(16, 1), strict=True)]


@pytest.mark.parametrize("cap", [None, 7])
@pytest.mark.parametrize("kind", MECHANISMS)
@torch.no_grad()
def test_a_reading_has_the_losses_and_the_memory_size_of_the_model_with_and_without_a_span_cap(kind, cap):
    model = small_model(kind)
    reading = read(model, BLOCKS, cap)
    logits, _, size = run_in_blocks(model, TOKENS, 16, span_cap=cap)
    expected = cross_entropy(logits.transpose(1, 2), TARGETS, reduction="none", ignore_index=IGNORE_INDEX)
    assert torch.equal(reading.losses.isnan(), TARGETS == IGNORE_INDEX)
    assert_equal("losses", reading.losses.nan_to_num(), expected)
    assert reading.metrics["memory/size"] == pytest.approx(size)
    assert torch.equal(reading.tokens, TOKENS)


@pytest.mark.parametrize("kind", MECHANISMS)
@torch.no_grad()
def test_a_reading_has_the_spans_of_each_head_and_spans_over_time_their_mean(kind):
    model = small_model(kind)
    spans = read(model, BLOCKS).spans
    first_layer = model.layers[0]
    memory = from_dense(model.embed(TOKENS), torch.arange(TOKENS.shape[1]))
    expected = first_layer.mechanism.span(memory).expand(TOKENS.numel(), -1)
    expected = expected.unflatten(0, tuple(TOKENS.shape)).transpose(1, 2)  # (B, H or 1, time)
    assert_equal("spans", spans[0], expected)
    assert_equal("spans with a cap on what attention makes of them", read(model, BLOCKS, 3).spans[0], expected)
    means, tokens = spans_over_time(model, [(block.tokens, None) for block in BLOCKS])
    assert_equal("means", means, torch.stack([span.mean(1) for span in spans]))
    assert torch.equal(tokens, TOKENS)


def test_nothing_to_read_is_refused():
    with pytest.raises(ValueError, match="there is nothing to read"):
        read(small_model("trans_xl"), [])


ARTICLE = "The Nile.\n== The river ==\nIt flows to Cairo, in 2 [[countries]].\nA river is long, a river is wet.\n"


def members(groups, name, texts):
    return "".join(text for text, inside in zip(texts, groups[name], strict=True) if inside)


def test_characters_are_sorted_into_kinds_as_a_loop_over_them_sorts_them():
    groups = token_groups(ARTICLE)
    conditions = {
        "capital letters": str.isupper,
        "other letters": str.islower,
        "digits": str.isdigit,
        "spaces": lambda character: character == " ",
        "newlines": lambda character: character == "\n",
        "punctuation": lambda character: character in "=.,[]",
    }
    for name, condition in conditions.items():
        assert groups[name].tolist() == [condition(character) for character in ARTICLE]
    assert "unknown" not in groups


def test_names_headings_links_and_rare_words_are_found():
    groups = token_groups(ARTICLE)
    assert members(groups, "capitalized within a sentence", ARTICLE) == "NileCairo"
    assert members(groups, "headings (= ... =)", ARTICLE) == "== The river =="
    assert members(groups, "links ([[...]])", ARTICLE) == "[[countries]]"
    counts = dict.fromkeys(ARTICLE.lower().replace(".", " ").replace(",", " ").split(), 10)
    groups = token_groups(ARTICLE, counts | {"nile": 1, "is": 99, "river": 99, "a": 99, "in": 99, "to": 99})
    assert members(groups, "frequent words", ARTICLE) == "rivertoinAriverisariveris"
    assert "Nile" in members(groups, "rare words", ARTICLE)
    assert "river" not in members(groups, "rare words", ARTICLE)


def test_a_word_is_sorted_by_its_first_character_and_a_byte_by_the_character_that_it_is_part_of():
    words = ["= ", "Wolf ", "= ", "\n", "a ", "<unk> ", "of ", "1,000 ", "Wolves ", ". "]
    groups = token_groups(words)
    assert members(groups, "capital letters", words) == "Wolf Wolves "
    assert members(groups, "other letters", words) == "a of "
    assert members(groups, "unknown", words) == "<unk> "
    assert members(groups, "digits", words) == "1,000 "
    assert members(groups, "headings (= ... =)", words) == "= Wolf = "
    two_bytes = ["x", "", "É", " ", "", "", "€"]
    assert token_groups(two_bytes)["capital letters"].tolist() == [False, True, True, False, False, False, False]
    assert token_groups(two_bytes)["punctuation"].tolist() == [False] * 4 + [True] * 3


def test_means_by_group_are_those_of_a_loop_that_skips_what_is_unknown():
    values = np.random.default_rng(1).random((3, 60))
    values[1, ::4] = math.nan
    masks = {"few": np.arange(60) % 7 == 0, "fourth": np.arange(60) % 4 == 0, "none": np.zeros(60, bool)}
    means = means_by_group(values, masks)
    for name, mask in masks.items():
        for row in range(3):
            chosen = [values[row, i] for i in range(60) if mask[i] and not math.isnan(values[row, i])]
            expected = sum(chosen) / len(chosen) if chosen else math.nan
            assert means[name][row] == pytest.approx(expected, nan_ok=True)
    assert math.isnan(means["fourth"][1])


def test_windows_average_what_is_known_and_the_last_may_be_shorter():
    values = np.array([1.0, 3, math.nan, 5, 7, 8, 9, math.nan])
    assert window_means(values, 3).tolist() == [2.0, 20 / 3, 9.0]
    assert np.isnan(window_means(np.array([math.nan, math.nan, 1.0]), 2)[0])
