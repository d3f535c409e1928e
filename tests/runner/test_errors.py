"""What a user gets wrong is one short line that says what to do."""

import pytest
from forked_command import forked_command
from tiny_config import COPY

from expire_span.runner.errors import OutOfMemory, shortened


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("memroy.alpha=3", "there is no key memroy.alpha; did you mean memory.alpha or "),
        ("memory.alhpa=3", "there is no key memory.alhpa; did you mean memory.alpha?"),
        ("milestones={7:1}", "there is no key milestones.7; `expire-span --cfg job` prints those there are"),
        ("sead=3", "there is no key sead; did you mean seed?"),
        ("hydra.run.dri=x", "there is no key hydra.run.dri; did you mean hydra.run.dir?"),
        ("optimizer.eps=1", "there is no key optimizer.eps; `expire-span --cfg job` prints those there are"),
        ("~eval.interval", "~eval.interval removes nothing: the key is null, or there is none; eval.interval=null is"),
        ("model=tran_xl", "model=tran_xl does not exist; did you mean trans_xl?"),
        ("foo", "foo is neither KEY=VALUE nor a flag; see expire-span --help"),
        ("--unknown", "unrecognized arguments: --unknown; see expire-span --help"),
        ("--hel", "unrecognized arguments: --hel; see expire-span --help"),
        ("--mult", "unrecognized arguments: --mult; see expire-span --help"),
        ("--conf=x", "unrecognized arguments: --conf=x; see expire-span --help"),
        ("-s", "unrecognized arguments: -s; see expire-span --help"),
        ("--info=x", "argument --info/-i: invalid choice: 'x'"),
        ("--experimental-rerun=x", "would load a pickle"),
        (f"seed={'[' * 200}{']' * 200}", "the config is nested too deeply"),
        (f"train.updates={'x' * 5000}", "train.updates: Value 'xxx"),
        ("transformer.hidden_size=100000000000", "tried to allocate 400000000000 bytes); set "),
    ],
)
def test_a_mistake_on_the_command_line_is_explained_in_one_short_line(override, message, tmp_path):
    (tmp_path / "here").mkdir()
    ended = forked_command(["expire-span", *COPY, override], tmp_path / "here")
    assert ended.code == 1
    [line] = ended.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert len(line) < 1000
    assert not list((tmp_path / "here").glob("runs/*/*/.hydra"))  # which would be taken for a run


def test_a_long_message_keeps_its_beginning_and_its_end():
    assert shortened("a" * 1000) == "a" * 1000
    assert shortened("say " + "x" * 5000 + " what to do").startswith("say x")
    assert shortened("say " + "x" * 5000 + " what to do").endswith("x what to do")


def test_a_lack_of_memory_names_what_to_lower():
    error = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 12 bytes. Error code 12")
    assert "(tried to allocate 12 bytes); set a smaller train.micro_batch_size" in str(OutOfMemory(error))
