"""Exercises that are Triton kernels: hints, stubs, ownership, saving, and compiling for a GPU."""

import importlib.util
import os
import random
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch

from course_lib.classroom.checks import CheckFailed, check, find_exercise, reference
from course_lib.classroom.exercises.b3_oracle import attend, make_batch
from course_lib.classroom.parts import part
from course_lib.classroom.source import kernels_of, program_of
from tests.classroom.answers_b3 import BUGS, RIGHT, WRONG

EVERY_BUG = [(e, wrong) for e in BUGS for wrong in WRONG[e] if hasattr(wrong, "bug")]


@pytest.fixture(autouse=True)
def own_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COURSE_PARTS_DIR", str(tmp_path / "parts"))
    return tmp_path / "parts"


@pytest.mark.parametrize(
    ("exercise", "answer"), EVERY_BUG, ids=[f"{e}: {w.bug}" for e, w in EVERY_BUG]
)
def test_a_known_mistake_gets_the_hint_that_fits(exercise, answer):
    with pytest.raises(CheckFailed) as failure:
        check(exercise, answer, seed=4)
    hint = next(line for line in str(failure.value).splitlines() if line.startswith("Hint: "))
    assert BUGS[exercise][answer.bug] in hint


def test_an_error_in_a_kernel_is_told_with_the_line_of_the_kernel():
    with pytest.raises(CheckFailed, match=r"(?s)raised.*tl.load\(q\) \+ undefined_name"):
        check("B3.2", WRONG["B3.2"][-1])


def test_an_answer_without_a_kernel_is_told_so():
    with pytest.raises(CheckFailed, match="launches no Triton kernel"):
        check("B3.3", WRONG["B3.3"][-1])


HEADER = "from kernels.runtime import tl, triton\nimport torch\n\n\n"


def test_a_stub_in_the_kernel_counts_as_not_implemented(tmp_path, capsys):
    """Also where the launcher is written: a compiled kernel could not raise."""
    source = HEADER + "@triton.jit\ndef kernel(q, out):\n    raise NotImplementedError()\n\n\n"
    source += "def answer(q, *_):\n    kernel[(1,)](q, q)\n    return q\n"
    assert check("B3.1", _load(tmp_path, source)) == 0
    assert "not implemented yet" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("imported", "call"),
    [
        ("from kernels.paged_attention import launch_paged_attention as f", "f"),
        ("import kernels.paged_attention as p", "p.launch_paged_attention"),
        ("from kernels.paged_attention import _attention_kernel as f", "f[(1,)]"),
        ("from course_lib.classroom.exercises.b3_kernels import _paged_attention_kernel as f", "f"),
    ],
)
def test_the_engines_own_kernel_is_not_an_answer(tmp_path, imported, call):
    source = f"{HEADER}{imported}\n\n\n@triton.jit\ndef mine(q):\n    pass\n\n\n"
    source += f"def answer(*args, **kwargs):\n    mine[(1,)](args[0])\n    return {call}("
    with pytest.raises(CheckFailed, match="course's own"):
        check("B3.3", _load(tmp_path, source + "*args, **kwargs)\n"))


def test_the_reference_is_shown_with_its_kernels(capsys):
    reference("B3.4")
    shown = capsys.readouterr().out
    assert shown.index("def _partial_kernel") < shown.index("def _combine_kernel")
    assert shown.index("def _combine_kernel") < shown.index("def split_attention")
    assert shown.count("@triton.jit") == 2


def test_a_saved_kernel_runs_on_its_own_and_serves_the_contract(own_parts):
    for answer in RIGHT["B3.3"]:
        assert check("B3.3", answer) == find_exercise("B3.3").points
        text = (own_parts / "paged_attention.py").read_text()
        assert "from kernels.runtime import triton" in text and "import triton\n" in text
        for kernel in kernels_of(answer):
            assert f"@triton.jit\ndef {kernel.__name__}(" in text
        batch = make_batch(
            random.Random(7), [(3, 6), (1, 2)], block_size=8, num_kv_heads=2, group=3
        )
        got = part("paged_attention")(*batch.contract, scale=batch.scale)
        assert torch.allclose(got.double().cpu(), attend(batch), atol=1e-5)


def test_a_part_is_loaded_before_anything_else_switched_the_interpreter_on(own_parts):
    """As in a later notebook whose first cell asks for the parts."""
    check("B3.3", RIGHT["B3.3"][0])
    code = (
        "from course_lib.classroom.parts import part; f = part('paged_attention'); import torch;"
        "one = torch.ones(1, 1, 16); cache = torch.ones(1, 4, 1, 16); i = torch.int32;"
        "t = lambda *v: torch.tensor(v, dtype=i);"
        "print(f(one, cache, cache, t(0)[None], t(3), t(0, 1), scale=1.0).sum().item())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "16.0", result.stderr


def test_a_program_is_a_function_with_its_kernels_helpers_included():
    answer = RIGHT["B3.2"][0]
    names = [kernel.__name__ for kernel in kernels_of(answer)]
    assert names == ["_walk", "_decode"]  # launched by a helper, and called by a kernel
    assert program_of(answer).index("def _walk") < program_of(answer).index("def _decode")


def _load(folder: Path, source: str):
    path = folder / "student.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("student", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.answer


COMPILE = """
import importlib.util, sys
import torch, triton
from tests.kernels.compile_ahead import compiled, empty

spec = importlib.util.spec_from_file_location("kernels_here", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sizes = {"NUM_HEADS": 4, "NUM_KV_HEADS": 2, "HEAD_DIM": 20, "PADDED_DIM": 32, "BLOCK_SIZE": 16}
sizes |= {"NUM_SPLITS": 3, "COLUMNS": 5, "PADDED": 8, "scale": 0.1, "max_blocks": 7}
tables = ("block_tables", "context_lens", "request_of_token", "visible_keys")
for kernel in vars(module).values():
    if isinstance(kernel, triton.JITFunction):
        values = sizes | {name: empty(64, dtype=torch.int32) for name in tables}
        options = {name: values.get(name, empty(64)) for name in kernel.arg_names}
        for capability in ((7, 5), (9, 0)):
            assert compiled(kernel, (), options, capability).asm["ptx"]
        print(kernel.__name__)
"""


@pytest.mark.slow
@pytest.mark.parametrize("source", ["reference", "notebook"])
def test_the_kernels_compile_for_gpus_that_are_not_here(source, tmp_path):
    """What the interpreter takes is more than what the compiler takes."""
    pytest.importorskip("triton", reason="Triton is published for Linux only")
    root = Path(__file__).parents[2]
    path = root / "course_lib" / "classroom" / "exercises" / "b3_kernels.py"
    if source == "notebook":
        solution = root / "solutions" / "lab_b_optimizer" / "b3_paged_attention_kernel.ipynb"
        cells = nbformat.read(solution, as_version=4).cells
        path = tmp_path / "cells.py"
        path.write_text(HEADER + "\n\n".join(c.source for c in cells if c.id.endswith("-answer")))
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(path)],
        cwd=root,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 5
