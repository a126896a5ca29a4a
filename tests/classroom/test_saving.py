"""Saving a part from a notebook, in the ways in which students write them, in a real kernel."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

SOLUTION = """
class MyScheduler(SchedulerBase):
    def schedule(self):
        global steps
        steps += 1
        needs, results = [], self.max_num_batched_tokens  # names that the notebook has, too
        evicted = []
        for request in self.running.copy():
            if results == 0 or request in evicted:
                break
            count = smaller(left_to_do(request), results)
            while request not in evicted and not self.block_pool.allocate(request, count):
                evicted.append(self.preempt_last())
            if request not in evicted:
                needs.append(ScheduledRequest(request, request.num_computed_tokens, count))
                results -= count
        while self.waiting and results and not evicted and len(self.running) < self.max_num_seqs:
            request = self.waiting[0]
            prefix = self.match_prefix(request)
            if not self.block_pool.can_admit(request, prefix):
                break
            start = len(prefix) * self.block_pool.block_size
            count = smaller(request.num_tokens - start, results)
            self.block_pool.allocate(request, count, prefix)
            self.admit(request, start)
            needs.append(ScheduledRequest(request, start, count))
            results -= count
        return self.make_batch(needs, evicted)
"""
IMPORTS = """
from functools import lru_cache
from course_lib.classroom.checks import check
from course_lib.engine.batch import ScheduledRequest
from course_lib.engine.scheduler_base import SchedulerBase
"""
HELPERS = """
steps = START
needs, results = object(), object()


@lru_cache
def smaller(a, b):
    return a - b  # replaced below


@lru_cache
def smaller(a, b):
    return min(a, b)


def left_to_do(request):
    return request.num_tokens_with_draft - request.num_computed_tokens
"""
USE = """
from course_lib.classroom.parts import part
print(part("scheduler").__module__)
"""


@pytest.mark.slow
def test_helpers_globals_and_syntax_errors_elsewhere_do_no_harm(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("COURSE_PARTS_DIR", str(tmp_path))
    outputs = _run([IMPORTS, "def broken(:", HELPERS.replace("START", "0"), SOLUTION, CHECK, USE])
    assert "5 of 5 points" in outputs[4] and "Saved in my_engine" in outputs[4]
    assert outputs[5].strip() == "my_engine_scheduler"


@pytest.mark.slow
def test_a_part_that_cannot_be_saved_keeps_its_points(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("COURSE_PARTS_DIR", str(tmp_path))
    helpers = HELPERS.replace("START", "__import__('fractions').Fraction(0)")
    outputs = _run([IMPORTS, helpers, SOLUTION, CHECK, USE])
    assert "5 of 5 points" in outputs[3] and outputs[3].rstrip().endswith("5.0")
    assert "not saved" in outputs[3] and "'steps'" in outputs[3]
    assert outputs[4].strip() == "course_lib.engine.scheduler"
    assert [path.name for path in tmp_path.iterdir()] == ["points.json"]


KERNEL = """
WARPS = 4


@triton.jit
def weights_of(scores, largest):
    return tl.exp(scores - largest)


@triton.jit
def kernel(q, k, v, tables, request_of, visible, out, scale, width,
           H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, P: tl.constexpr, N: tl.constexpr):
    token, head, d, slots = tl.program_id(0), tl.program_id(1), tl.arange(0, P), tl.arange(0, N)
    row = (token * H + head) * D + d
    query = tl.load(q + row, mask=d < D, other=0.0).to(tl.float32) * scale
    num_visible = tl.load(visible + token)
    largest, total, mean = float("-inf"), 0.0, tl.zeros([P], tl.float32)
    for i in range(0, tl.cdiv(num_visible, N)):
        block = tl.load(tables + tl.load(request_of + token) * width + i)
        at = ((block * N + slots) * KV + head // (H // KV))[:, None] * D + d[None, :]
        seen = i * N + slots < num_visible
        mask = seen[:, None] & (d < D)[None, :]
        scores = tl.sum(tl.load(k + at, mask=mask, other=0.0).to(tl.float32) * query[None, :], 1)
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(largest, tl.max(scores, 0))
        weights = weights_of(scores, higher)
        mean = mean * weights_of(largest, higher)
        mean += tl.sum(weights[:, None] * tl.load(v + at, mask=mask, other=0.0).to(tl.float32), 0)
        total = total * weights_of(largest, higher) + tl.sum(weights, 0)
        largest = higher
    tl.store(out + row, mean / total, mask=d < D)


def attention(q, k_cache, v_cache, block_tables, context_lens, query_start_loc, *,
              scale, sliding_window=None, out=None):
    if sliding_window:
        raise ValueError("no window")
    q, heads, dim = q.contiguous(), q.shape[1], q.shape[2]
    out = torch.empty_like(q) if out is None else out
    lens = query_start_loc.diff()
    request_of = torch.arange(len(lens), device=q.device).repeat_interleave(lens)
    after = query_start_loc[request_of + 1] - torch.arange(1, len(q) + 1, device=q.device)
    kernel[(len(q), heads)](
        q, k_cache, v_cache, block_tables, request_of, context_lens[request_of] - after, out, scale,
        block_tables.shape[1], heads, k_cache.shape[2], dim, triton.next_power_of_2(dim),
        k_cache.shape[1], num_warps=WARPS)
    return out
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "from kernels.runtime import tl, triton",
        "import course_lib.model.attention\nimport triton\nimport triton.language as tl",
    ],
)
def test_a_triton_kernel_is_saved_with_the_kernels_that_it_calls(
    tmp_path: Path, monkeypatch, imports
):
    monkeypatch.setenv("COURSE_PARTS_DIR", str(tmp_path))
    cells = [f"import torch\nfrom course_lib.classroom.checks import check\n{imports}", KERNEL]
    outputs = _run([*cells, 'check("B3.3", attention)'])
    assert "4 of 4 points" in outputs[2] and "Saved in my_engine" in outputs[2], outputs
    text = (tmp_path / "paged_attention.py").read_text()
    assert "from kernels.runtime import tl" in text and "WARPS = 4" in text
    assert text.index("def weights_of") < text.index("def kernel") < text.index("def attention")


CHECK = 'check("A1.2", MyScheduler)'


def _run(cells: list[str]) -> list[str]:
    """What each cell printed and returned, as text; a cell may fail."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    NotebookClient(notebook, timeout=200, kernel_name="python3", allow_errors=True).execute()
    return [
        "".join(o.get("text") or o.get("data", {}).get("text/plain", "") for o in cell.outputs)
        for cell in notebook.cells
    ]
