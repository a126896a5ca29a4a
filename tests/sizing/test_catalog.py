import json
import subprocess
import sys

import pytest

from course_lib.sizing.catalog import (
    PRECISION_BYTES,
    find_gpu,
    find_model,
    gpus,
    models,
    parse_model,
    read_yaml,
)

# Small shapes in which no two sizes are the same, so that a mix-up shows.
SMALL = {
    "vocab_size": 1000,
    "hidden_size": 96,
    "intermediate_size": 224,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
EXPERTS = {"moe_intermediate_size": 40, "num_experts": 7, "num_experts_per_tok": 3}
TINY_MODELS = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "llama, biases": {"attention_bias": True, "mlp_bias": True},
    "llama, head_dim": {"head_dim": 24},
    "mistral": {"head_dim": 24},
    "phi3": {"pad_token_id": 0},
    "qwen2": {},
    "qwen3": {"head_dim": 24, "tie_word_embeddings": True},
    "qwen3, biases": {"head_dim": 24, "attention_bias": True},
    "gemma2": {"head_dim": 24},
    "gemma3_text": {"head_dim": 24},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 56},
    "qwen2_moe, sparse": {
        **EXPERTS,
        "shared_expert_intermediate_size": 56,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [1],
    },
    "qwen3_moe": {**EXPERTS, "head_dim": 24},
    "qwen3_moe, sparse": {**EXPERTS, "head_dim": 24, "decoder_sparse_step": 3},
}
REAL_MODELS = ["Llama-3-8B", "Llama-3.2-1B", "Qwen2.5-0.5B", "Qwen3-0.6B", "Mixtral-8x7B"]


def parameters_in_transformers(config: dict) -> int:
    """Build the model without memory and count; transformers knows nothing of our arithmetic."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    arguments = {key: value for key, value in config.items() if key != "model_type"}
    built = transformers.AutoConfig.for_model(config["model_type"], **arguments)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(built)
    model.tie_weights()
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("case", TINY_MODELS)
def test_parameters_of_every_family_are_those_of_transformers(case):
    config = {"model_type": case.split(",")[0], **SMALL, **TINY_MODELS[case]}
    shape = parse_model(config, case, case)
    assert shape.is_exact
    assert shape.total_params == parameters_in_transformers(config)


@pytest.mark.parametrize("name", REAL_MODELS)
def test_parameters_of_real_models_are_those_of_transformers(name):
    config = read_yaml("models.yaml")[name]["config"]
    assert find_model(name).total_params == parameters_in_transformers(config)


@pytest.mark.parametrize("name", list(models()))
def test_every_shape_gives_the_parameters_that_its_checkpoint_holds(name):
    assert models()[name].total_params == read_yaml("models.yaml")[name]["published_params"]


def test_a_mixture_of_experts_uses_a_part_of_its_parameters():
    mixtral = find_model("mixtral-8x7b")
    assert round(mixtral.total_params / 1e9, 1) == 46.7
    assert round(mixtral.active_params / 1e9, 1) == 12.9  # as its authors say
    dense = find_model("Mistral-7B")
    assert dense.active_params == dense.total_params


def test_more_tokens_read_more_experts_and_at_last_all():
    model = find_model("Qwen3-30B-A3B")
    head_only = model.total_params - model.embedding_params
    assert model.streamed_params(1) == model.active_params - model.embedding_params
    assert model.streamed_params(1) < model.streamed_params(2) < model.streamed_params(100)
    assert model.streamed_params(10_000) == pytest.approx(head_only)


def test_kv_bytes_count_kv_heads():
    assert find_model("Llama-3-8B").kv_bytes_per_token() == 2 * 32 * 8 * 128 * 2
    assert find_model("Llama-2-7B").kv_bytes_per_token() == 2 * 32 * 32 * 128 * 2
    assert find_model("Llama-3-8B").kv_bytes_per_token(1) == 2 * 32 * 8 * 128


@pytest.mark.parametrize("inside", ["directory", "file"])
def test_a_config_json_is_a_model(tmp_path, inside):
    path = tmp_path / "my-model" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"model_type": "llama", **SMALL}))
    shape = find_model(path if inside == "file" else path.parent)
    assert (shape.name, shape.num_kv_heads, shape.head_dim) == ("my-model", 2, 16)


def test_the_language_model_of_a_multimodal_config_counts():
    text = {"model_type": "gemma3_text", "head_dim": 24, **SMALL}
    nested = parse_model({"model_type": "gemma3", "text_config": text}, "m", "config.json")
    assert nested == parse_model(text, "m", "config.json")


def test_an_unknown_architecture_is_counted_as_a_llama_and_says_so():
    shape = parse_model({"model_type": "brand_new", **SMALL}, "m", "config.json")
    llama = parse_model({"model_type": "llama", **SMALL}, "m", "config.json")
    assert not shape.is_exact
    assert shape.total_params == llama.total_params


def test_experts_under_other_names_count_too():
    config = {
        "model_type": "glm4_moe",
        **SMALL,
        "head_dim": 16,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "first_k_dense_replace": 2,
    }
    shape = parse_model(config, "m", "config.json")
    assert shape.moe_layers == 3
    assert shape.total_params == pytest.approx(parameters_in_transformers(config), rel=0.01)


@pytest.mark.parametrize(
    ("quantization", "precision"),
    [
        (None, "bf16"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "awq", "bits": 4}, "int4"),
        ({"quant_method": "gptq", "bits": 8}, "int8"),
        ({"quant_method": "mxfp4"}, "int4"),
    ],
)
def test_the_stored_precision_is_read(quantization, precision):
    config = {"model_type": "llama", **SMALL, "quantization_config": quantization}
    assert parse_model(config, "m", "config.json").precision == precision


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "hidden_size must be a whole number"),
        ({"num_hidden_layers": -2}, "num_hidden_layers must be a whole number of at least 1"),
        ({"vocab_size": "many"}, "vocab_size must be a whole number"),
        ({"num_key_value_heads": 4}, "must be a multiple of num_key_value_heads 4"),
        ({"num_experts": 4, "num_experts_per_tok": 5}, "must be at most the 4 experts, got 5"),
        ({"kv_lora_rank": 512}, "multi-head latent attention"),
    ],
)
def test_a_config_that_cannot_be_sized_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        parse_model({"model_type": "llama", **SMALL, **change}, "m", "config.json")


def test_bad_names_and_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"unknown GPU 'H100'; known are L4_24GB, A10G_24GB"):
        find_gpu("H100")
    with pytest.raises(ValueError, match=r"unknown model 'gpt-9'; known are Llama-2-7B.*config"):
        find_model("gpt-9")
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        find_model(tmp_path)
    for text, message in (("{", "not readable JSON"), ("[1]", "must hold a JSON object")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            find_model(tmp_path)


def test_names_are_found_in_any_case():
    assert find_gpu("h100_80gb").name == "H100_80GB"
    assert find_model("LLAMA-3-8b").name == "Llama-3-8B"


def test_usable_memory_is_what_plans_go_by():
    usable = {name: gpu.usable_gb for name, gpu in gpus().items()}
    assert usable == {
        "L4_24GB": 22,
        "A10G_24GB": 22,
        "L40S_48GB": 45,
        "A100_40GB": 38,
        "A100_80GB": 76,
        "H100_80GB": 76,
        "H200_141GB": 134,
    }


@pytest.mark.parametrize("name", list(gpus()))
def test_a_gpu_is_consistent_and_names_its_source(name):
    gpu = gpus()[name]
    assert "NVIDIA" in gpu.source
    assert 0.9 < gpu.usable_gb / gpu.memory_gb < 1
    assert f"{gpu.memory_gb:g}GB" in name
    assert set(gpu.tflops) <= set(PRECISION_BYTES)
    assert gpu.tflops["bf16"] == gpu.tflops["fp16"]
    assert ("fp8" in gpu.tflops) == (not name.startswith("A10"))  # Ada and Hopper only


@pytest.mark.parametrize("name", list(gpus()))
def test_mig_slices_share_out_the_gpu(name):
    gpu = gpus()[name]
    assert bool(gpu.mig) == name.startswith(("A100", "H100", "H200"))
    for profile in gpu.mig:
        assert profile.compute_slices * profile.max_instances <= 7
        assert profile.memory_slices * profile.max_instances <= 8


def test_figures_of_the_h100():
    gpu = find_gpu("H100_80GB")
    assert (gpu.bandwidth_gb_s, gpu.tflops["bf16"], gpu.tflops["fp8"]) == (3350, 989, 1978)
    assert (gpu.nvlink_gb_s, gpu.link_gb_s) == (450, 450)
    assert [profile.name for profile in gpu.mig] == [
        "1g.10gb",
        "1g.20gb",
        "2g.20gb",
        "3g.40gb",
        "4g.40gb",
        "7g.80gb",
    ]
    assert find_gpu("L4_24GB").link_gb_s == 31.5


def test_sizing_and_its_users_need_no_pytorch():
    code = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "import course_lib.sizing.report, course_lib.fleet.autoscaler\n"
        "import course_lib.fleet.cold_start, course_lib.serving.lifecycle\n"
        "import course_lib.serving.disaggregation\n"
        "course_lib.sizing.report.size_report('Llama-3-8B', 'H100_80GB', 8192, 4)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
