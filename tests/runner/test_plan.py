"""`expire-span-plan`: predictions for any config, and one line for what it cannot read."""

import re

import pytest
from forked_command import forked_command
from tiny_config import COPY, config_options, tiny_config

from expire_span.runner.commands.plan import fit, make_plan
from expire_span.runner.cost_model import DEVICES, run_sizes
from expire_span.runner.run_folder.config_files import ConfigFiles
from expire_span.runner.train import train


def rows(text):
    """The numbers of each row of the table."""
    matches = re.findall(r"^(\S.*?)  +((?:[\d.,]+ *)+)$", text, re.MULTILINE)
    return {name: [float(cell.replace(",", "")) for cell in cells.split()] for name, cells in matches}


EACH_TABLE = {name.partition("_")[0]: name for name in config_options("experiment")}


@pytest.mark.parametrize("experiment", EACH_TABLE.values())
def test_every_table_of_the_paper_has_a_plan_that_adds_up(experiment):
    text = str(make_plan([f"experiment={experiment}", "gpus=8"]))
    assert text.startswith("Predictions of a cost model; no run was measured.")
    numbers = rows(text)
    parts = [cells for name, cells in numbers.items() if re.match("[GM]B (?!in all|of the host)", name)]
    [total] = [cells for name, cells in numbers.items() if re.match("[GM]B in all", name)]
    for column, whole in zip(zip(*parts, strict=True), total, strict=True):
        assert sum(column) == pytest.approx(whole, rel=0.05, abs=0.05)


def test_what_does_not_fit_is_told_with_overrides_that_make_it_fit():
    text = str(make_plan(["experiment=table2_expire_span", "device=rtx4090"]))
    assert re.search(
        r"^all kept: 512 streams at once need [\d,]+ GB; add train.micro_batch_size=\d+ train.off", text, re.M
    )
    fits = str(make_plan(["experiment=table2_expire_span", "device=h100", "gpus=32"]))
    assert "initial spans: fits as it is" in fits


def test_more_kept_memories_take_more_memory_and_time():
    few, many = (make_plan(["size=paper", "task=enwik8", f"kept={kept}", "gpus=8"]).cases[1] for kept in (0.01, 0.1))
    assert sum(few.seconds.values()) < sum(many.seconds.values())
    assert few.memory["memories held"] < many.memory["memories held"]


def test_a_micro_batch_of_the_config_is_kept_if_it_fits():
    sizes = run_sizes(tiny_config(), 4, 4)  # 4 streams
    sizes.config.train.micro_batch_size = 2
    assert fit(sizes, "", 10, DEVICES["h100"], gpus=1).micro_batch_size == 2
    sizes.config.train.micro_batch_size = 3
    with pytest.raises(ValueError, match="train.micro_batch_size=3 must divide the 4 streams of each GPU"):
        fit(sizes, "", 10, DEVICES["h100"], gpus=1)


def test_the_present_device_is_measured():
    text = str(make_plan([*COPY, "device=this"]))
    assert re.search(r"1 x this cpu, 4 streams each; of its [\d.,]+ TFLOP/s in float32 \d+ % are assumed", text)


def test_a_run_folder_has_a_plan(tmp_path):
    config = tiny_config("train.updates=2")
    train(config, tmp_path, config_files=ConfigFiles(config, {}, []).texts())
    assert "Copy, ExpireSpan" in str(make_plan([str(tmp_path)]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gpus=3"], "train.batch_size=64 streams cannot be split evenly over gpus=3; use one of 1, 2, 4, 8, 16, 32"),
        (["gpus=no"], "gpus must be a number from 1 to 1e+06, got no"),
        (
            ["eval.batch_size=6", "gpus=4"],
            "eval.batch_size=6 streams cannot be split evenly over gpus=4; use one of 1, 2",
        ),
        (["recipe=copy/TYPO"], "recipe=copy/TYPO does not exist"),
        (["kept=2"], "kept must be a number from 0 to 1, got 2"),
        (["device=h200"], "device must be one of h100, a100, rtx4090 or this, got h200"),
        (["memory.alpa=1"], "there is no key memory.alpa; did you mean memory.alpha?"),
        (["experiment=table9"], "experiment=table9 does not exist; there are figure4"),
        (["resume=runs/a"], "a plan takes a run folder as it is: expire-span-plan runs/a"),
        (["seed=1,2"], "seed has several values"),
        (["nowhere"], "nowhere is not a run folder"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path):
    (tmp_path / "work").mkdir()
    ended = forked_command(["expire-span-plan", *arguments], tmp_path / "work")
    assert ended.code == 1
    assert len(ended.stderr.splitlines()) == 1
    assert message in ended.stderr
