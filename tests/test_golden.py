"""The reference inputs and outputs that all implementations of the course agree on.

The file lies beside the repository and is not part of it. Without it these tests are skipped; the
same values are written out in the ordinary tests of each module.
"""

import dataclasses
import json
from pathlib import Path

import pytest

from course_lib.fleet.autoscaler import GPUAutoscaler
from course_lib.fleet.cold_start import capacity_plan, readiness
from course_lib.serving.disaggregation import should_benchmark_split_pools
from course_lib.serving.lifecycle import DrainPolicy
from course_lib.sizing.batching import simulate_slots
from course_lib.sizing.catalog import reference_fits
from course_lib.sizing.memory import estimate_gpu_requirements, paged_kv_accounting
from course_lib.sizing.parallelism import communication_events
from course_lib.sizing.roofline import decode_ceiling_tokens_per_s

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden" / "examples.json"


@pytest.fixture(scope="module")
def golden():
    if not GOLDEN.is_file():
        pytest.skip("the reference file ../shared/golden/examples.json is not there")
    return json.loads(GOLDEN.read_text(encoding="utf-8"))


def test_slots(golden):
    entry = golden["batching_slots"]
    lengths, slots = entry["inputs"]["reply_lengths_tokens"], entry["inputs"]["slots"]
    for mode in ("static", "continuous"):
        usage = simulate_slots(lengths, slots, continuous=mode == "continuous")
        assert dataclasses.asdict(usage) == entry[mode]


def test_paged_kv_accounting(golden):
    entry = golden["paged_kv_accounting"]
    assert dataclasses.asdict(paged_kv_accounting(**entry["inputs"])) == entry["outputs"]


def test_gpu_sizing(golden):
    entry = golden["gpu_sizing"]
    for case in entry["cases"]:
        needs = estimate_gpu_requirements(**case["inputs"])
        for name, expected in case["outputs"].items():
            if name in entry["usable_gb"]:
                assert needs.gpu_options[name].needed == expected
            else:
                assert round(getattr(needs, name), 1) == expected
        for name, usable_gb in entry["usable_gb"].items():
            assert needs.gpu_options[name].memory_gb == usable_gb


def test_reference_table(golden):
    rows = [dataclasses.asdict(row) for row in reference_fits()]
    for row in rows:
        row["kv_gb_per_1k_tokens"] = list(row["kv_gb_per_1k_tokens"])
    assert rows == golden["gpu_sizing"]["reference_table"]


def test_decode_ceiling(golden):
    entry = golden["decode_bandwidth_ceiling"]
    sizes_gb = {"7B BF16 (14 GB)": 14, "7B INT8 (7 GB)": 7, "70B BF16 (140 GB)": 140}
    for name, expected in entry["outputs_tokens_per_s"].items():
        ceiling = decode_ceiling_tokens_per_s(entry["inputs"]["bandwidth_gb_s"], sizes_gb[name])
        assert round(ceiling, 1) == expected


def test_parallelism(golden):
    entry = golden["parallelism_communication"]
    assert dataclasses.asdict(communication_events(**entry["inputs"])) == entry["outputs"]


def test_autoscaler(golden):
    for case in golden["autoscaler"]["cases_with_cooldown_0"]:
        replicas = GPUAutoscaler(cooldown_s=0).recommend(case["metrics"], case["current"])
        assert replicas == case["recommended"], case["name"]


def test_capacity_plan(golden):
    entry = golden["capacity_plan"]
    for warm, expected in entry["outputs_by_warm_replicas"].items():
        plan = capacity_plan(**entry["inputs"], warm_replicas=int(warm))
        assert dataclasses.asdict(plan) == expected


def test_readiness(golden):
    entry = golden["cold_start_readiness"]
    phases, outputs = entry["inputs"]["phase_seconds"], entry["outputs"]
    for lead_time_s, expected in outputs["by_lead_time_s"].items():
        ready = readiness(phases, float(lead_time_s))
        assert dataclasses.asdict(ready) == {"ready_s": outputs["ready_s"], **expected}


def test_spot_drain(golden):
    inputs = golden["spot_drain"]["inputs"]
    policy = DrainPolicy(inputs["warning_s"], inputs["shutdown_margin_s"])
    assert policy.decide(inputs["remaining_s"]) == golden["spot_drain"]["outputs"]


def test_disaggregation_gate(golden):
    entry = golden["disaggregation_gate"]
    for case in entry["cases"]:
        answer = should_benchmark_split_pools(
            case["ttft_p95_ms"], case["tpot_p95_ms"], **entry["inputs"]
        )
        assert answer is case["output"], case["name"]


def test_worked_example(golden):
    entry = golden["worked_example"]
    plan = capacity_plan(entry["peak_concurrent"], entry["requests_per_gpu"], entry["warm_at_8_59"])
    assert (plan.target_replicas, plan.replicas_to_start) == (
        entry["gpus_needed"],
        entry["to_add"],
    )
