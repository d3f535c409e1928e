"""The compiled C++ library in the cache folder: when it is compiled, and what happens when it cannot be."""

import hashlib
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from expire_span.kernels import cpp_backend, dispatch

pytestmark = pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="no C++ compiler")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder of its own."""
    monkeypatch.setenv("EXPIRE_SPAN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def use_compiler(monkeypatch, path, script):
    """Let CXX be a shell script; its last -o names the file to write, $target."""
    text = 'while [ $# -gt 0 ]; do [ "$1" = -o ] && target="$2"; shift; done'
    path.write_text(f"#!/bin/sh\n{text}\necho compiled >> {path}.log\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))


def times_compiled(path):
    log = path.with_name(path.name + ".log")
    return len(log.read_text().splitlines()) if log.exists() else 0


def flip_a_bit(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGE = {
    "flipped bit": flip_a_bit,
    "truncated": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "zeroed": lambda content: bytes(len(content)),
    "without its hash": lambda content: content[:-32],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_library_is_compiled_anew_and_a_whole_one_is_not(damage, cache, monkeypatch, tmp_path):
    use_compiler(monkeypatch, tmp_path / "cxx", "echo some machine code > $target")
    library = cpp_backend.compiled_library()
    content = library.read_bytes()
    assert cpp_backend.compiled_library() == library
    assert times_compiled(tmp_path / "cxx") == 1
    library.write_bytes(DAMAGE[damage](content))
    assert cpp_backend.compiled_library() == library
    assert times_compiled(tmp_path / "cxx") == 2
    assert library.read_bytes() == content
    assert list(cache.iterdir()) == [library]


def test_the_library_that_is_compiled_is_the_one_that_is_loaded_after_damage(cache, monkeypatch, tmp_path):
    """In a process of its own, as a library can be loaded only once; with the copy of a real library as compiler."""
    monkeypatch.delenv("EXPIRE_SPAN_CACHE")
    if not cpp_backend.available():
        pytest.skip("no C++ compiler")
    real = cpp_backend.compiled_library()
    monkeypatch.setenv("EXPIRE_SPAN_CACHE", str(cache))
    use_compiler(monkeypatch, tmp_path / "cxx", f"cp {real} $target")
    library = cpp_backend.compiled_library()
    library.write_bytes(flip_a_bit(real.read_bytes())[: len(real.read_bytes()) // 2])
    code = "from expire_span.kernels.dispatch import *; print(select_backend('auto', 'cpu', torch.float32))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "cpp\n"), done.stderr
    assert hashlib.sha256(library.read_bytes()[:-32]).digest() == library.read_bytes()[-32:]


def test_processes_that_compile_at_once_leave_one_whole_library(cache, monkeypatch, tmp_path):
    use_compiler(monkeypatch, tmp_path / "cxx", "sleep 1; echo some machine code > $target")
    code = "from expire_span.kernels.cpp_backend import *; print(is_whole(compiled_library()))"
    command = [sys.executable, "-c", code]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0] for process in processes] == ["True\n", "True\n"]
    assert [path.suffix for path in cache.iterdir()] == [".so"]


def select_backend_anew(monkeypatch, capsys):
    """The backend that "auto" selects on a CPU in a new process, and what it prints."""
    monkeypatch.setattr(cpp_backend, "available", cpp_backend.available.__wrapped__)
    return dispatch.select_backend("auto", "cpu", torch.float32), capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("compiler", ["/nowhere/c++", "false", "g++ -U__GNUC__ -D__GNUC__=11"])
def test_without_a_working_compiler_auto_selects_torch_and_says_so(compiler, cache, monkeypatch, capsys):
    monkeypatch.setenv("CXX", compiler)
    backend, line = select_backend_anew(monkeypatch, capsys)
    assert backend == "torch"
    assert re.match("expire-span: attention takes twice as long, as its C\\+\\+ (did not compile|cannot be used)", line)
    assert ("g++ 12 or later is needed" in line) == compiler.startswith("g++")
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("obstacle", ["a file where the folder should be", "no space left"])
def test_without_a_place_for_the_library_auto_selects_torch_and_says_so(obstacle, cache, monkeypatch, tmp_path, capsys):
    use_compiler(monkeypatch, tmp_path / "cxx", "echo cannot write $target: error: No space left on device >&2; exit 1")
    if obstacle == "a file where the folder should be":
        cache.touch()
    backend, line = select_backend_anew(monkeypatch, capsys)
    assert backend == "torch"
    assert str(cache) in line


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_cache_folder_is_named(cache, monkeypatch, capsys):
    cache.mkdir(mode=0o500)
    backend, line = select_backend_anew(monkeypatch, capsys)
    assert backend == "torch"
    assert str(cache) in line
