"""`config.json` becomes a `ModelConfig`, or a `CheckpointError` that names file, field and what was
expected; nothing in it gives another error.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from course_lib.model.config import CheckpointError, ModelConfig, RopeScaling, parse_config
from tests.checkpoints import FAMILIES, random_model

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
QWEN = {
    **LLAMA,
    "architectures": ["Qwen3ForCausalLM"],
    "use_sliding_window": True,
    "sliding_window": 8,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def parsed(**fields: Any) -> ModelConfig:
    return parse_config({**LLAMA, **fields}, Path("there"))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_config_lists_exactly_the_tensors_of_the_model_of_transformers(
    family: str, tmp_path: Path
) -> None:
    model = random_model(family)
    model.config.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**raw, "architectures": [type(model).__name__]})
    )
    config = ModelConfig.from_pretrained(tmp_path)
    want = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert config.tensor_shapes() == want
    assert config.num_parameters == model.num_parameters()


def test_older_files_have_other_names_for_the_same() -> None:
    config = parsed(
        torch_dtype="bfloat16",
        rope_theta=500.0,
        rope_scaling={**LLAMA3_ROPE, "type": "llama3", "rope_type": None},
    )
    assert config.dtype == "bfloat16"
    assert config.rope_theta == 500.0
    assert config.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 64)


def test_what_a_file_leaves_out_has_the_defaults_of_transformers() -> None:
    config = parsed(num_key_value_heads=None)
    theirs = AutoConfig.for_model("llama", **LLAMA)
    assert config.num_kv_heads == config.num_heads
    assert config.head_dim == theirs.head_dim == 12
    assert config.max_position_embeddings == theirs.max_position_embeddings
    assert config.rms_norm_eps == theirs.rms_norm_eps
    assert config.tie_word_embeddings is theirs.tie_word_embeddings is False
    assert (config.rope_theta, config.rope_scaling) == (10000.0, None)
    assert not (config.qkv_bias or config.o_bias or config.mlp_bias)


def test_kv_bytes_count_keys_and_values_of_all_layers() -> None:
    assert parsed(head_dim=20).kv_bytes_per_token(2) == 2 * 3 * 2 * 20 * 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not supported.*Qwen3"),
        ({"architectures": None}, "architecture missing is not supported"),
        ({"architectures": []}, "architecture missing is not supported"),
        ({"architectures": "LlamaForCausalLM"}, "architectures must be a list.*'Llama"),
        ({"architectures": [["x"]]}, r"architecture \['x'\] is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; expected 'silu'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized with 'awq'"),
        ({"quantization_config": {"bits": 4}}, "quantized with 'unknown'"),
        ({"quantization_config": "awq"}, "quantization_config must be an object, found 'awq'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "'yarn' is not supported.*llama3"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4}}, "rope scaling 'dynamic'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor must be a positive.*None"),
        ({"rope_parameters": [1]}, r"rope_parameters must be an object, found \[1\]"),
        ({"rope_scaling": {**LLAMA3_ROPE, "high_freq_factor": 1.0}}, "high_freq_factor must be a"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor must be a positive number"),
        ({"rope_theta": -1}, "rope_theta must be a positive number, found -1"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor other than 1"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 must be a multiple of.*3"),
        ({"head_dim": 7}, "head_dim must be even for rotary, found 7"),
        ({"hidden_size": 3}, "head_dim must be even for rotary, found 0"),
        ({"vocab_size": None}, "vocab_size must be a positive integer.*None"),
        ({"vocab_size": 0}, "vocab_size must be a positive integer.*found 0"),
        ({"hidden_size": "48"}, "hidden_size must be a positive integer.*'48'"),
        ({"hidden_size": True}, "hidden_size must be a positive integer.*True"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be.*up to 10000.*1000000000"),
        ({"max_position_embeddings": -1}, "max_position_embeddings must be a positive"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps must be a positive number, found 'tiny'"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps must be a positive number, found nan"),
        ({"rms_norm_eps": math.inf}, "rms_norm_eps must be a positive number, found inf"),
        ({"rope_theta": 10**400}, "rope_theta must be a positive number, found 1000"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false, found 'no'"),
        ({"mlp_bias": 1}, "mlp_bias must be true or false, found 1"),
        ({"dtype": "int8"}, "dtype must be float64.*found 'int8'"),
        ({"torch_dtype": 16}, "torch_dtype must be the name of a floating type, found 16"),
        ({**QWEN, "sliding_window": -3}, "sliding_window must be a positive integer.*-3"),
        ({**QWEN, "sliding_window": "x"}, "sliding_window must be a positive integer.*'x'"),
        ({**QWEN, "max_window_layers": "x"}, "max_window_layers must be an integer, found 'x'"),
        ({**QWEN, "layer_types": ["full_attention"]}, "layer_types must have 3 entries.*found 1"),
        ({**QWEN, "layer_types": ["x"] * 3}, "layer_types must be of 'full_attention' and"),
        ({**QWEN, "layer_types": 3}, "layer_types must be a list, found 3"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 1.5}, "sliding_window must"),
    ],
    ids=str,
)
def test_what_cannot_be_served_is_refused_by_file_field_and_expectation(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=rf"^there/config\.json: .*{message}"):
        parsed(**fields)


@pytest.mark.parametrize(
    "contents",
    [b"", b"{", b"[1]", b"null", b"\xff\xfe\x00", b'{"a": 1}}', b"[" * 10**5, b"9" * 5000],
    ids=lambda contents: str(contents[:10]),
)
def test_a_file_that_holds_no_json_object_is_named(tmp_path: Path, contents: bytes) -> None:
    (tmp_path / "config.json").write_bytes(contents)
    with pytest.raises(CheckpointError, match=r"config\.json (is not readable JSON|must hold)"):
        ModelConfig.from_pretrained(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json does not exist; expected a Hugging"):
        ModelConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json is not readable"):
        ModelConfig.from_pretrained(tmp_path)


_FIELDS = [
    *LLAMA,
    "quantization_config",
    "hidden_act",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "partial_rotary_factor",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
    "dtype",
    "torch_dtype",
]
_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-2, 64)
    | st.floats()
    | st.text(max_size=3)
    | st.sampled_from(["linear", "llama3", "default", "sliding_attention", "float16", 10**400]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*LLAMA3_ROPE, "type", "rope_theta", "x"]), inner)
    ),
    max_leaves=6,
)


@given(
    st.sampled_from([LLAMA, QWEN, {**LLAMA, "architectures": ["MistralForCausalLM"]}]),
    st.dictionaries(st.sampled_from(_FIELDS), _JSON, min_size=1, max_size=4),
)
def test_random_values_give_a_config_or_a_checkpoint_error(
    base: dict[str, Any], fields: dict[str, Any]
) -> None:
    try:
        config = parse_config({**base, **fields}, Path("there"))
    except CheckpointError as refused:
        assert str(refused).startswith("there/config.json: ")
    else:
        assert config.num_heads % config.num_kv_heads == config.head_dim % 2 == 0
        assert len(config.sliding_windows) == config.num_layers
