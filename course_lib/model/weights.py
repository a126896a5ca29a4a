"""What a checkpoint holds: safetensors files into the decoder's parameters.

`check_weights` compares every tensor's name and shape with what the config implies, reading only
file headers, before any memory is taken. So a checkpoint that is truncated, incomplete or of
another shape fails in a moment, with a sentence that names the file, the tensor and the
expectation. `load_weights` then copies.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from course_lib.model.config import CheckpointError, ModelConfig, read_json

INDEX_FILE = "model.safetensors.index.json"


#: Checkpoint tensors that the decoder stores as the rows of one fused parameter, in this order.
_FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


def load_weights(decoder: nn.Module, files: dict[str, Path]) -> None:
    """Fill the decoder's parameters.

    Args:
        decoder: of the config that the files were checked against.
        files: the result of `check_weights`.

    Raises:
        CheckpointError: a file is damaged behind its header.
    """
    targets = _targets(decoder)
    for path in sorted(set(files.values())):
        with _opened(path) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
                if name in targets and files[name] == path:
                    targets[name].copy_(tensors.get_tensor(name))


def fill_with_random_weights(decoder: nn.Module) -> None:
    """Small random numbers, always the same ones on a device: to measure, not to read."""
    for parameter in decoder.parameters():
        generator = torch.Generator(parameter.device).manual_seed(0)
        parameter.data.normal_(0.0, 0.02, generator=generator)


def _targets(decoder: nn.Module) -> dict[str, torch.Tensor]:
    """Checkpoint name -> the parameter, or the rows of a fused one, that it goes into."""
    targets: dict[str, torch.Tensor] = {}
    for name, parameter in decoder.named_parameters():
        stem, _, kind = name.rpartition(".")
        parent, _, leaf = stem.rpartition(".")
        if leaf not in _FUSED:
            targets[name] = parameter.data
            continue
        sizes = decoder.get_submodule(stem).row_sizes
        for part, rows in zip(_FUSED[leaf], parameter.data.split(sizes), strict=True):
            targets[f"{parent}.{part}.{kind}"] = rows
    return targets


def check_weights(config: ModelConfig, directory: str | Path) -> dict[str, Path]:
    """Compare the headers of the safetensors files with the config, before memory is taken.

    Returns:
        The file of each tensor.

    Raises:
        CheckpointError: a file or tensor is missing, damaged, superfluous or of a wrong shape.
    """
    directory, shapes = Path(directory), config.tensor_shapes()
    files = _locate(directory)
    for name, shape in shapes.items():
        if name not in files:
            raise CheckpointError(
                f"{_source(directory)} lacks the tensor {name}; expected shape {list(shape)}"
            )
    _check(shapes, files, config)
    return files


def _source(directory: Path) -> Path:
    """What says which tensors there are: the index of a sharded checkpoint, or its only file."""
    index = directory / INDEX_FILE
    return index if index.exists() else directory / "model.safetensors"


def _locate(directory: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it, by the index of a sharded checkpoint or the file."""
    path = _source(directory)
    if path.name == INDEX_FILE:
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(file, str) for file in weight_map.values()
        ):
            raise CheckpointError(f"{path}: expected a 'weight_map' of tensor names to file names")
        return {name: directory / file for name, file in weight_map.items()}
    if not path.exists():
        raise CheckpointError(
            f"{directory} holds neither model.safetensors nor {INDEX_FILE}; "
            "expected safetensors weights"
        )
    with _opened(path) as tensors:
        return dict.fromkeys(tensors.keys(), path)


def _check(
    shapes: dict[str, tuple[int, ...]],
    files: dict[str, Path],
    config: ModelConfig,
) -> None:
    for path in sorted(set(files.values())):
        with _opened(path) as tensors:
            present = set(tensors.keys())
            for name in (n for n, file in files.items() if file == path):
                if name not in present:
                    raise CheckpointError(f"{path} lacks the tensor {name} that the index promises")
                if name in shapes:
                    _check_tensor(path, name, tensors.get_slice(name), shapes[name])
                elif not _harmless(name, config):
                    raise CheckpointError(
                        f"{path} holds an unexpected tensor {name}; config.json describes a "
                        f"{config.architecture} without it"
                    )


def _check_tensor(path: Path, name: str, tensor: Any, shape: tuple[int, ...]) -> None:
    if tuple(tensor.get_shape()) != shape:
        raise CheckpointError(
            f"{path}: tensor {name} has shape {list(tensor.get_shape())}, expected {list(shape)} "
            "from config.json"
        )
    if tensor.get_dtype() not in ("F64", "F32", "F16", "BF16"):
        raise CheckpointError(
            f"{path}: tensor {name} has dtype {tensor.get_dtype()}, expected a floating type"
        )


def _harmless(name: str, config: ModelConfig) -> bool:
    """Tensors that some exporters add and that change nothing."""
    tied_head = config.tie_word_embeddings and name == "lm_head.weight"
    return tied_head or name.endswith("rotary_emb.inv_freq")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.exists():
        raise CheckpointError(f"{path} does not exist, but {INDEX_FILE} names it")
    try:
        with safe_open(path, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged or truncated ({error}); expected a complete safetensors file, "
            "so download or copy it again"
        ) from None
