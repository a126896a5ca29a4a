"""`size_report`, and `course size`, which prints it."""

import json

import pytest
from typer.testing import CliRunner

from course_lib.cli import app
from course_lib.sizing.catalog import gpus, models
from course_lib.sizing.report import size_report


def run(*arguments: str, columns: int = 80):
    return CliRunner().invoke(
        app, ["size", *arguments], env={"COLUMNS": str(columns), "NO_COLOR": "1"}
    )


def test_a_70b_plan_on_h100():
    report = size_report("Llama-3-70B", "H100_80GB", 8192, 4)
    row = next(row for row in report.gpus if row.name == "H100_80GB")
    assert (row.needed, row.tensor_parallel_size, report.speed.gpus) == (3, 4, 4)
    assert report.dollars.usd_per_hour == 4 * report.gpu.usd_per_hour
    assert report.best_mig is None
    assert report.speed.prefill.bound == "compute"
    assert report.speed.decode.bound == "memory"
    assert any("4 GPUs" in note for note in report.notes)


@pytest.mark.parametrize("model", list(models()))
@pytest.mark.parametrize("gpu", ["L4_24GB", "H200_141GB"])
def test_every_model_can_be_sized(model, gpu):
    report = size_report(model, gpu, 4096, 8)
    assert report.speed.ttft_ms > 0 < report.speed.tpot_ms
    assert len(report.gpus) == len(gpus())


def test_precisions_are_given_in_any_case_and_change_the_plan():
    bf16 = size_report("Llama-3-70B", "H100_80GB", 8192, 4)
    int4 = size_report("Llama-3-70B", "H100_80GB", 8192, 4, weights="INT4", kv="FP8")
    assert (int4.weights, int4.kv) == ("int4", "fp8")
    assert int4.requirements.weights_gb == bf16.requirements.weights_gb / 4
    assert int4.requirements.kv_cache_gb == bf16.requirements.kv_cache_gb / 2
    assert int4.dollars.usd_per_hour < bf16.dollars.usd_per_hour


def test_notes_say_what_to_mind():
    notes = " ".join(size_report("Llama-3-8B", "L4_24GB", 20_000, 1).notes)
    assert "made for 8192 tokens of context; 20000 is more" in notes
    notes = " ".join(size_report("Qwen2.5-0.5B", "L4_24GB", 32_768, 2000).notes)
    assert "14 query heads" in notes
    # The logits of 5000 requests are more than the overhead sets aside.
    notes = " ".join(size_report("Qwen2.5-0.5B", "L4_24GB", 290, 5000).notes)
    assert "short of the 1450000 planned" in notes


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("model", ["Llama-3-70B", "Mixtral-8x7B", "Qwen3-0.6B"])
def test_the_tables_fit_the_terminal(model, columns):
    result = run(model, "--concurrency", "400", columns=columns)
    assert result.exit_code == 0
    assert max(len(line) for line in result.output.splitlines()) <= columns
    assert "…" not in result.output
    for words in ("KV cache", "H100_80GB", "MIG slices", "TTFT", "TPOT", "an hour"):
        assert words in result.output


def test_the_command_takes_any_case_and_all_options():
    result = run(
        *("llama-3-8b", "--gpu", "a100_40gb", "--context", "2048", "--concurrency", "2"),
        *("--weights", "int8", "--kv", "fp8"),
    )
    assert result.exit_code == 0
    assert "On 1 x A100_40GB" in result.output
    assert "weights in int8, KV cache in fp8" in result.output


def test_a_gpu_without_mig_is_said_to_have_none():
    assert "L4_24GB has no MIG" in run("Llama-3-8B", "--gpu", "L4_24GB").output


def test_json_is_for_programs():
    result = run("Llama-3-8B", "--context", "4096", "--concurrency", "8", "--json")
    report = json.loads(result.output)
    assert report["model"]["name"] == "Llama-3-8B"
    assert report["requirements"]["gpu_options"]["H100_80GB"] == {"memory_gb": 76, "needed": 1}
    assert round(report["requirements"]["kv_cache_gb"], 1) == 4.3
    assert report["best_mig"]["profile"]["name"] == "3g.40gb"


def test_a_config_json_can_be_sized(tmp_path):
    config = {
        "model_type": "llama",
        "vocab_size": 1000,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    for path in (tmp_path, tmp_path / "config.json"):
        result = run(str(path), "--context", "512")
        assert result.exit_code == 0
        assert "0.2M parameters" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["Llama-9"], "unknown model 'Llama-9'; known are Llama-2-7B"),
        (["Llama-3-8B", "--gpu", "H100"], "unknown GPU 'H100'; known are L4_24GB"),
        (["Llama-3-8B", "--context", "0"], "context must be a whole number of at least 1, got 0"),
        (["Llama-3-8B", "--concurrency=-2"], "concurrency must be a whole number of at least 1"),
        (["Llama-3-8B", "--weights", "int3"], "unknown precision 'int3'; known are fp32"),
        (["nowhere/config.json"], "does not exist"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_1(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 1
    assert message in result.output
    assert len(result.output.splitlines()) == 1
