"""A checkpoint that is incomplete, damaged or of another shape fails with a `CheckpointError` that
names file, tensor and expectation; whatever happens to its bytes, nothing else is raised.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from course_lib import LLM, SamplingParams
from course_lib.model.config import CheckpointError
from course_lib.model.weights import INDEX_FILE
from tests.checkpoints import random_model, save

WEIGHTS = "model.safetensors"
UP = "model.layers.1.mlp.up_proj.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = random_model("llama", num_hidden_layers=2)
    return save(model, tmp_path_factory.mktemp("good"))


@pytest.fixture(scope="module")
def good_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = random_model("llama", num_hidden_layers=2)
    return save(model, tmp_path_factory.mktemp("shards"), max_shard_size="60KB")


@pytest.fixture
def checkpoint(good: Path, tmp_path: Path) -> Path:
    return shutil.copytree(good, tmp_path / "checkpoint")


@pytest.fixture
def shards(good_shards: Path, tmp_path: Path) -> Path:
    return shutil.copytree(good_shards, tmp_path / "checkpoint")


def load(directory: Path, **options: Any) -> LLM:
    return LLM(directory, dtype="float32", max_model_len=32, max_num_seqs=2, **options)


def assert_refused(directory: Path, *parts: str) -> None:
    with pytest.raises(CheckpointError) as refused:
        load(directory)
    for part in parts:
        assert part in str(refused.value)


def change_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS)


def change_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_a_missing_tensor(checkpoint: Path) -> None:
    change_tensors(checkpoint, lambda tensors: tensors.pop(UP))
    assert_refused(checkpoint, WEIGHTS, f"lacks the tensor {UP}", "expected shape [64, 48]")


@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight"])
def test_a_missing_tensor_outside_the_layers(checkpoint: Path, name: str) -> None:
    change_tensors(checkpoint, lambda tensors: tensors.pop(name))
    assert_refused(checkpoint, f"lacks the tensor {name}")


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_proj.bias", "model.layers.2.mlp.up_proj.weight", "adapter"]
)
def test_a_tensor_that_the_config_does_not_describe(checkpoint: Path, name: str) -> None:
    change_tensors(checkpoint, lambda tensors: tensors.update({name: torch.ones(48)}))
    assert_refused(checkpoint, WEIGHTS, f"unexpected tensor {name}", "LlamaForCausalLM without it")


def test_tensors_that_change_nothing_are_passed_over(checkpoint: Path) -> None:
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}
    change_tensors(checkpoint, lambda tensors: tensors.update(extra))
    load(checkpoint)


def test_a_stored_head_of_a_tied_checkpoint_is_passed_over(checkpoint: Path) -> None:
    change_json(checkpoint / "config.json", tie_word_embeddings=True)
    load(checkpoint)


@pytest.mark.parametrize("shape", [(48, 64), (64,), (64, 48, 1), (0,), (65, 48)])
def test_a_wrong_shape(checkpoint: Path, shape: tuple[int, ...]) -> None:
    change_tensors(checkpoint, lambda tensors: tensors.update({UP: torch.ones(shape)}))
    assert_refused(checkpoint, WEIGHTS, UP, f"shape {list(shape)}, expected [64, 48]")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_a_dtype_that_is_no_floating_type(checkpoint: Path, dtype: torch.dtype) -> None:
    change_tensors(checkpoint, lambda tensors: tensors.update({UP: tensors[UP].to(dtype)}))
    assert_refused(checkpoint, WEIGHTS, UP, "has dtype", "expected a floating type")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_any_floating_type_is_read(checkpoint: Path, dtype: torch.dtype) -> None:
    change_tensors(checkpoint, lambda t: t.update({name: t[name].to(dtype) for name in t}))
    stored = load_file(checkpoint / WEIGHTS)[UP].float()
    llm = load(checkpoint, attention_backend="TORCH_SDPA")  # with which weights stay as they are
    weight = llm.llm_engine.executor.decoder.model.layers[1].mlp.gate_up_proj.weight
    assert torch.equal(weight[64:], stored)


@pytest.mark.parametrize("field", ["hidden_size", "vocab_size", "head_dim", "intermediate_size"])
def test_a_config_of_another_shape_is_refused_before_memory_is_taken(
    checkpoint: Path, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("course_lib.engine.engine.Decoder")
    change_json(checkpoint / "config.json", **{field: 2**20})
    assert_refused(checkpoint, WEIGHTS, "has shape", "from config.json")


def test_more_layers_than_there_are(checkpoint: Path) -> None:
    change_json(checkpoint / "config.json", num_hidden_layers=3, layer_types=None)
    assert_refused(checkpoint, WEIGHTS, "lacks the tensor model.layers.2.")


def test_no_safetensors_at_all(checkpoint: Path) -> None:
    (checkpoint / WEIGHTS).rename(checkpoint / "pytorch_model.bin")
    assert_refused(checkpoint, str(checkpoint), f"neither {WEIGHTS} nor {INDEX_FILE}")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999])
def test_a_truncated_file(checkpoint: Path, share: float) -> None:
    contents = (checkpoint / WEIGHTS).read_bytes()
    (checkpoint / WEIGHTS).write_bytes(contents[: int(len(contents) * share)])
    assert_refused(checkpoint, str(checkpoint / WEIGHTS), "damaged or truncated", "complete")


def test_a_truncated_shard(shards: Path) -> None:
    shard = sorted(shards.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-1])
    assert_refused(shards, str(shard), "damaged or truncated")


def test_a_missing_shard(shards: Path) -> None:
    shard = sorted(shards.glob("*.safetensors"))[1]
    shard.unlink()
    assert_refused(shards, str(shard), "does not exist", INDEX_FILE)


def test_an_index_that_promises_what_its_file_lacks(shards: Path) -> None:
    weight_map = json.loads((shards / INDEX_FILE).read_text())["weight_map"]
    other = next(file for file in weight_map.values() if file != weight_map[UP])
    change_json(shards / INDEX_FILE, weight_map={**weight_map, UP: other})
    assert_refused(shards, other, f"lacks the tensor {UP} that the index promises")


def test_an_index_that_leaves_a_tensor_out(shards: Path) -> None:
    weight_map = json.loads((shards / INDEX_FILE).read_text())["weight_map"]
    del weight_map[UP]
    change_json(shards / INDEX_FILE, weight_map=weight_map)
    assert_refused(shards, INDEX_FILE, f"lacks the tensor {UP}", "expected shape [64, 48]")


@pytest.mark.parametrize("weight_map", [None, [], "x", {UP: 5}, {UP: None}, {UP: ["x"]}], ids=str)
def test_an_index_of_another_form(shards: Path, weight_map: Any) -> None:
    change_json(shards / INDEX_FILE, weight_map=weight_map)
    assert_refused(shards, INDEX_FILE, "expected a 'weight_map'")


@pytest.mark.parametrize("file", ["", ".", "config.json", "nowhere/x.safetensors", "a\0b"])
def test_an_index_that_points_elsewhere(shards: Path, file: str) -> None:
    weight_map = json.loads((shards / INDEX_FILE).read_text())["weight_map"]
    change_json(shards / INDEX_FILE, weight_map={**weight_map, UP: file})
    assert_refused(shards, str(shards))


def test_a_stale_copy_in_another_shard_is_not_read(shards: Path) -> None:
    """The index decides, whatever shape the copy has."""
    weight_map = json.loads((shards / INDEX_FILE).read_text())["weight_map"]
    tokens = generated(load(shards))
    for file in set(weight_map.values()) - {weight_map[UP], weight_map[QUERY]}:
        stale = {UP: torch.zeros(64, 48), QUERY: torch.zeros(3)}
        save_file({**load_file(shards / file), **stale}, shards / file)
    assert generated(load(shards)) == tokens


def generated(llm: LLM) -> list[int]:
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    return llm.generate([1, 2, 3], params, use_tqdm=False)[0].outputs[0].token_ids


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json"])
@pytest.mark.parametrize("contents", ["", "{", "[]", '{"a":'])
def test_broken_json(checkpoint: Path, name: str, contents: str) -> None:
    (checkpoint / name).write_text(contents)
    assert_refused(checkpoint, str(checkpoint / name))


def test_a_missing_config(checkpoint: Path) -> None:
    (checkpoint / "config.json").unlink()
    assert_refused(checkpoint, str(checkpoint / "config.json"), "does not exist")


@pytest.mark.parametrize("eos", ["x", [1, "x"], 1.5, {"a": 1}, [[1]]], ids=str)
def test_an_end_of_sequence_token_that_is_none(checkpoint: Path, eos: Any) -> None:
    change_json(checkpoint / "generation_config.json", eos_token_id=eos)
    assert_refused(checkpoint, "generation_config.json: eos_token_id must be a token id")


@pytest.mark.parametrize(
    ("eos", "ids"), [(3, {3}), ([3, 4], {3, 4}), (None, set()), ([96, 97, -1], {96})]
)
def test_end_of_sequence_tokens_within_the_vocabulary_count(
    checkpoint: Path, eos: Any, ids: set[int]
) -> None:
    change_json(checkpoint / "generation_config.json", eos_token_id=eos)
    assert load(checkpoint).llm_engine.eos_token_ids == ids


_config = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 100) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


@given(st.data())
@settings(max_examples=60)
def test_any_value_in_the_config_loads_or_is_a_checkpoint_error(
    good: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Through the whole engine: what parses must also build."""
    directory = tmp_path_factory.mktemp("config")
    for path in good.iterdir():
        (directory / path.name).symlink_to(path)
    raw = json.loads((good / "config.json").read_text())
    change = data.draw(st.dictionaries(st.sampled_from(sorted(raw)), _config, max_size=2))
    (directory / "config.json").unlink()
    (directory / "config.json").write_text(json.dumps({**raw, **change}))
    try:
        generated(LLM(directory, dtype="float32", num_gpu_blocks_override=100, block_size=16))
    except CheckpointError:
        pass
    except ValueError as error:  # the model is now too short for the prompt, or for the cache
        assert re.search("max_model_len|longest|positions", str(error))


@given(st.data())
@settings(max_examples=150)
def test_any_damage_to_a_file_loads_or_is_a_checkpoint_error(
    good: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    contents = bytearray((good / WEIGHTS).read_bytes())
    header_size = 8 + int.from_bytes(contents[:8], "little")
    if data.draw(st.booleans()):
        del contents[data.draw(st.integers(0, len(contents) - 1)) :]
    for _ in range(data.draw(st.integers(0, 4))):
        place = data.draw(st.integers(0, 8) | st.integers(0, header_size - 1))
        if place < len(contents):
            contents[place] = data.draw(st.integers(0, 255))
    directory = tmp_path_factory.mktemp("damaged")
    shutil.copy(good / "config.json", directory)
    (directory / WEIGHTS).write_bytes(contents)
    try:
        load(directory)
    except CheckpointError as error:
        assert str(directory / WEIGHTS) in str(error)
