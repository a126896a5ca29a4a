"""How long weights take from disk to the first step, phase by phase.

    timing = time_loading("data/models/merchant-chat", cold=True)
    timing.seconds["disk_read"], timing.cached_share

The engine maps the files and copies from there, so that reading and copying overlap. Here each
phase is over before the next one begins. `write_layers` writes a checkpoint of any shape to
measure with, and `scale_loading` carries two measurements over to another size.
"""

import ctypes
import json
import mmap
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tqdm.auto import tqdm

from course_lib.engine.config import EngineConfig
from course_lib.engine.kv_cache import run_largest_step
from course_lib.model.attention import choose_backend
from course_lib.model.config import ModelConfig, parse_config
from course_lib.model.decoder import Decoder
from course_lib.model.weights import INDEX_FILE, check_weights, load_weights
from course_lib.validation import number, whole_number

#: The phases, in their order. `device_copy` is left out where there is no GPU.
LOAD_PHASES = ("disk_read", "host_copy", "device_copy", "warm_up")

# Rows of the embedding table that `write_layers` keeps.
_VOCABULARY = 256

_CHUNK_BYTES = 16 * 2**20


@dataclass(frozen=True)
class LoadTiming:
    """One load of a checkpoint.

    Args:
        gb: of its files.
        cached_share: of them, that the page cache held before: 0 is cold, 1 is warm.
        seconds: of each phase.
        device: where the weights lay at the end.
    """

    gb: float
    cached_share: float
    seconds: Mapping[str, float]
    device: str


def time_phases(
    phases: Mapping[str, Callable[[], Any]],
    synchronize: Callable[[], Any],
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Run the phases one after another, and return the seconds that each took.

    The end of one is the start of the next, and the first starts when the device has nothing to do.

    Args:
        phases: what to call, by name, in order.
        synchronize: returns when the device has done all it was asked for.
        clock: returns seconds.
    """
    moments = []
    for run in (lambda: None, *phases.values()):
        run()
        synchronize()
        moments.append(clock())
    return {name: end - start for name, (start, end) in zip(phases, pairwise(moments), strict=True)}


def time_loading(
    folder: str | Path,
    *,
    cold: bool,
    timer: Callable[..., Mapping[str, float]] = time_phases,
    progress: bool = False,
) -> LoadTiming:
    """Load a checkpoint phase by phase, and forget it again.

    `disk_read` brings the files into the page cache, `host_copy` from there into the memory of this
    process, `device_copy` from there to the GPU, `warm_up` runs the first step.

    Args:
        folder: a checkpoint.
        cold: take its files out of the page cache before.
        timer: in place of `time_phases`.
        progress: show which phase it is in.

    Raises:
        CheckpointError: there is no checkpoint there, or a damaged one.
    """
    config = ModelConfig.from_pretrained(folder)
    files = check_weights(config, folder)
    paths = sorted(set(files.values()))
    if cold:
        for path in paths:
            drop_from_page_cache(path)
    sizes = [path.stat().st_size for path in paths]
    cached_share = float(np.average([share_in_page_cache(path) for path in paths], weights=sizes))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    attention = choose_backend(None, device, dtype)
    first_step = EngineConfig(folder, max_num_batched_tokens=16, max_num_seqs=1)
    made: list[Decoder] = []

    def host_copy() -> None:
        made.append(Decoder(config, 64, dtype, torch.device("cpu"), attention.ops))
        load_weights(made[0], files)

    phases: dict[str, Callable[[], Any]] = {
        "disk_read": lambda: _read(paths),
        "host_copy": host_copy,
        "device_copy": lambda: _move(made[0], device),
        "warm_up": lambda: run_largest_step(made[0], attention, first_step, 64),
    }
    if device.type == "cpu":
        del phases["device_copy"]
    with tqdm(total=len(phases), unit="phase", disable=not progress, leave=False) as bar:
        seconds = timer(
            {name: _shown(name, run, bar) for name, run in phases.items()},
            torch.cuda.synchronize if device.type == "cuda" else _nothing_to_wait_for,
        )
    return LoadTiming(sum(sizes) / 1e9, cached_share, dict(seconds), str(device))


def _shown(name: str, run: Callable[[], Any], bar: Any) -> Callable[[], None]:
    def shown() -> None:
        bar.set_description(name)
        run()
        bar.update()

    return shown


def _nothing_to_wait_for() -> None:
    """A CPU is done when the call returns."""


def _move(decoder: Decoder, device: torch.device) -> None:
    decoder.to(device, non_blocking=True)
    decoder.rope = decoder.rope.to(device)


def _read(paths: list[Path]) -> None:
    """Read files to their end into one buffer that is used again and again."""
    buffer = bytearray(_CHUNK_BYTES)
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def drop_from_page_cache(path: str | Path) -> None:
    """Ask the system to forget a file's pages; on a disk that it may not, it does nothing.

    `share_in_page_cache` says whether it did.
    """
    with open(path, "rb") as file:
        os.fsync(file.fileno())  # a page that is not on the disk yet cannot be forgotten
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def share_in_page_cache(path: str | Path) -> float:
    """The share of a file's pages that are in memory, which is what Linux's `mincore` says.

    Raises:
        OSError: the file is empty, or the system does not say.
    """
    size = os.path.getsize(path)
    with (
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as pages,
    ):
        found = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        first = ctypes.c_char.from_buffer(pages)
        system = ctypes.CDLL(None, use_errno=True)
        failed = system.mincore(
            ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(size), found
        )
        del first  # it keeps the file mapped
        if failed:
            raise OSError(ctypes.get_errno(), "the system does not say what it caches", str(path))
    return float((np.frombuffer(bytes(found), np.uint8) & 1).mean())


def layers_that_fit(config: Mapping[str, Any], folder: str | Path, at_most_gb: float) -> int:
    """Layers of a shape that can be written to a folder and loaded here.

    They take no more than `at_most_gb`, half of the free disk, and half of the free memory.

    Args:
        config: the `config.json` of the whole model, in BF16.
        folder: where it would be written.
        at_most_gb: of weights.

    Raises:
        OSError: not even one layer fits; the message says what there is.
    """
    disk_gb = shutil.disk_usage(folder).free / 1e9
    memory_gb = _available_memory_gb()
    room_gb = min(number("at_most_gb", at_most_gb, above=0), disk_gb / 2, memory_gb / 2)
    layer_gb = _layer_gb(config)
    layers = min(int(room_gb / layer_gb), config["num_hidden_layers"])
    if layers < 1:
        raise OSError(
            f"one layer has {layer_gb:.2f} GB, and it may take {at_most_gb:g} GB, half of the "
            f"{disk_gb:.1f} GB that are free on the disk, and half of the {memory_gb:.1f} GB of "
            "free memory; free some, or take a smaller shape"
        )
    return layers


def _available_memory_gb() -> float:
    """What programs can have: free memory, and the page cache's on systems that say so."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        (kib,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
        return int(kib) * 1024 / 1e9
    except (OSError, ValueError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9


def _layer_gb(config: Mapping[str, Any]) -> float:
    def parameters(layers: int) -> int:
        shape = {**_complete(config), "num_hidden_layers": layers}
        return parse_config(shape, Path()).num_parameters

    return 2 * (parameters(2) - parameters(1)) / 1e9


def _complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """With what a catalogue may leave out, since it changes neither sizes nor times."""
    architecture = f"{config['model_type'].capitalize()}ForCausalLM"
    return {
        "architectures": [architecture], "rms_norm_eps": 1e-5, "rope_theta": 10_000.0, **config,
    }  # fmt: skip


def write_layers(
    config: Mapping[str, Any], folder: str | Path, layers: int, *, progress: bool = False
) -> Path:
    """Write a checkpoint with the first layers of a shape, in BF16, one file a layer.

    The layers are whole. Of the vocabulary 256 tokens are left, and the head is tied to them, so
    that nearly all of the files are layers. The numbers are random.

    Args:
        config: the `config.json` of the whole model.
        folder: where to; it is made if it is not there.
        layers: how many.
        progress: show how many are written.

    Returns:
        The folder, which an engine can serve by token ids.
    """
    whole_number("layers", layers, at_most=config["num_hidden_layers"])
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stored = {
        **_complete(config), "num_hidden_layers": layers, "vocab_size": _VOCABULARY,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(stored, indent=1), encoding="utf-8")
    shapes = parse_config(stored, folder).tensor_shapes()
    weight_map = {name: _file_of(name) for name in shapes}
    generator = torch.Generator().manual_seed(0)
    numbers = (0.02 * torch.randn(2**22, generator=generator)).to(torch.bfloat16)
    names = sorted(set(weight_map.values()))
    for file in tqdm(names, "writing", unit="file", disable=not progress, leave=False):
        tensors = {
            name: numbers.repeat(-(-int(np.prod(shape)) // len(numbers)))[: int(np.prod(shape))]
            .view(shape).clone()
            for name, shape in shapes.items()
            if weight_map[name] == file
        }  # fmt: skip
        save_file(tensors, folder / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=1), encoding="utf-8")
    return folder


def _file_of(name: str) -> str:
    """`model.layers.7.…` is in a file of layer 7, all else in one of its own."""
    parts = name.split(".")
    return f"layer-{int(parts[2]):03}.safetensors" if parts[1] == "layers" else "rest.safetensors"


def scale_loading(
    small_gb: float,
    small_s: Mapping[str, float],
    large_gb: float,
    large_s: Mapping[str, float],
    weights_gb: float,
) -> dict[str, float]:
    """Seconds of each phase for another size: a fixed part, and a part for each GB.

    Two measurements give both. A phase whose fixed part would be negative has none, and goes with
    the larger measurement's seconds per GB. One that took no longer with more GB takes what the
    larger measurement took, whatever the size.

    Args:
        small_gb: size of the smaller measurement.
        small_s: its phases.
        large_gb: size of the larger one.
        large_s: its phases, of the same names.
        weights_gb: the size that is asked for.

    Raises:
        ValueError: a size is not above 0, the larger one is not larger, or the phases differ.
    """
    number("small_gb", small_gb, above=0)
    number("large_gb", large_gb, above=small_gb)
    number("weights_gb", weights_gb, above=0)
    if set(small_s) != set(large_s):
        raise ValueError(f"the phases differ: {sorted(small_s)} and {sorted(large_s)}")
    scaled = {}
    for name, larger_s in large_s.items():
        per_gb_s = (larger_s - small_s[name]) / (large_gb - small_gb)
        fixed_s = larger_s - per_gb_s * large_gb
        if per_gb_s <= 0:
            per_gb_s, fixed_s = 0.0, larger_s
        elif fixed_s < 0:
            per_gb_s, fixed_s = larger_s / large_gb, 0.0
        scaled[name] = fixed_s + per_gb_s * weights_gb
    return scaled
