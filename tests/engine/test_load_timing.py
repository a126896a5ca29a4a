"""What is timed is a real load: of real files, cold or warm, that an engine can serve."""

import random

import pytest
import torch
from safetensors import safe_open

from course_lib import LLM, SamplingParams
from course_lib.data import DEFAULT_MODEL
from course_lib.engine import load_timing
from course_lib.engine.load_timing import (
    drop_from_page_cache,
    layers_that_fit,
    scale_loading,
    share_in_page_cache,
    time_loading,
    time_phases,
    write_layers,
)
from course_lib.model.config import CheckpointError

SHAPE = {
    "model_type": "mistral",
    "num_hidden_layers": 5,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
    "vocab_size": 32000,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
ON_GPU = torch.cuda.is_available()
PHASES = ["disk_read", "host_copy", *["device_copy"] * ON_GPU, "warm_up"]


def test_the_files_have_the_layers_of_the_shape_and_an_engine_serves_them(tmp_path):
    folder = write_layers(SHAPE, tmp_path / "three", 3)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert files == [*(f"layer-00{i}.safetensors" for i in range(3)), "rest.safetensors"]
    with safe_open(folder / "layer-001.safetensors", "pt") as tensors:
        up = tensors.get_tensor("model.layers.1.mlp.up_proj.weight")
    assert up.shape == (256, 128) and up.dtype == torch.bfloat16
    assert 0.015 < up.float().std() < 0.025
    llm = LLM(folder, max_model_len=64, num_gpu_blocks_override=9)
    (output,) = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=4), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 4


def test_layers_beyond_the_shape_are_refused(tmp_path):
    with pytest.raises(ValueError, match="layers must be a whole number from 1 to 5"):
        write_layers(SHAPE, tmp_path, 6)


def test_as_many_layers_as_fit_the_limit_the_disk_and_the_memory(tmp_path, monkeypatch):
    layer_gb = 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 256 + 2 * 128) / 1e9
    assert layers_that_fit(SHAPE, tmp_path, 3.5 * layer_gb) == 3
    assert layers_that_fit(SHAPE, tmp_path, 1000 * layer_gb) == 5
    monkeypatch.setattr(load_timing, "_available_memory_gb", lambda: 5 * layer_gb)
    assert layers_that_fit(SHAPE, tmp_path, 1000 * layer_gb) == 2
    with pytest.raises(OSError, match=r"one layer has 0\.00 GB.*free some"):
        layers_that_fit(SHAPE, tmp_path, layer_gb / 2)


def test_a_load_is_timed_by_phase(tmp_path):
    folder = write_layers(SHAPE, tmp_path, 2)
    timing = time_loading(folder, cold=False)
    assert list(timing.seconds) == PHASES and all(took > 0 for took in timing.seconds.values())
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert timing.gb == size / 1e9 and timing.device == ("cuda" if ON_GPU else "cpu")


def test_the_timer_can_be_replaced():
    asked = []

    def timer(phases, synchronize):
        asked.append((list(phases), synchronize()))
        for run in phases.values():
            run()
        return dict.fromkeys(phases, 1.0)

    assert time_loading(DEFAULT_MODEL, cold=False, timer=timer).seconds == dict.fromkeys(PHASES, 1)
    assert asked == [(PHASES, None)]


def test_what_is_no_checkpoint_is_refused(tmp_path):
    folder = write_layers(SHAPE, tmp_path, 2)
    (folder / "layer-001.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"layer-001\.safetensors does not exist"):
        time_loading(folder, cold=True)


def test_a_file_that_was_read_is_in_the_page_cache_and_one_that_was_dropped_is_not(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(2**22))
    path.read_bytes()
    assert share_in_page_cache(path) > 0.9
    drop_from_page_cache(path)
    if share_in_page_cache(path) == 1:
        pytest.skip("this file system keeps its files in memory")
    assert share_in_page_cache(path) < 0.1


def test_a_cold_load_begins_without_the_files_and_leaves_them_in_memory(tmp_path):
    folder = write_layers(SHAPE, tmp_path, 2)
    cold = time_loading(folder, cold=True)
    if cold.cached_share == 1:
        pytest.skip("this file system keeps its files in memory")
    assert cold.cached_share < 0.1
    assert time_loading(folder, cold=False).cached_share > 0.9


def test_phases_that_go_on_after_their_call_count_until_the_device_is_done():
    now, pending = [0.0], [3.0]  # the device is still busy with something from before

    def synchronize():
        now[0] += pending[0]
        pending[0] = 0.0

    def copy():
        now[0] += 0.5
        pending[0] = 4.0

    def read():
        now[0] += 2.0

    times = time_phases({"copy": copy, "read": read}, synchronize, lambda: now[0])
    assert times == {"copy": 4.5, "read": 2.0}


def test_a_line_through_two_measurements_gives_any_size():
    assert scale_loading(1, {"a": 3.0}, 3, {"a": 7.0}, 10) == {"a": 21.0}  # 1 + 2 a GB
    rng = random.Random(3)
    for _ in range(50):
        fixed_s, per_gb_s = rng.uniform(0, 9), rng.uniform(0, 9)
        at = {gb: {"a": fixed_s + per_gb_s * gb} for gb in (0.5, 2.0, 70.0)}
        assert scale_loading(0.5, at[0.5], 2.0, at[2.0], 70.0) == pytest.approx(at[70.0])


def test_noise_makes_neither_negative_parts_nor_loads_that_get_shorter():
    assert scale_loading(1, {"a": 1.0}, 2, {"a": 4.0}, 10) == {"a": 20.0}  # not 1 - 2 + 3 x 10
    assert scale_loading(1, {"a": 5.0}, 2, {"a": 4.0}, 10) == {"a": 4.0}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((0, {}, 2, {}, 3), "small_gb"),
        ((2, {}, 2, {}, 3), "large_gb"),
        ((1, {}, 2, {}, 0), "weights_gb"),
        ((1, {"a": 1}, 2, {"b": 1}, 3), "the phases differ"),
    ],
)
def test_measurements_that_do_not_go_together_are_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        scale_loading(*arguments)
