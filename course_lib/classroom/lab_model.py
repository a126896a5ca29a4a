"""The model that the labs run: the one that ships, or the one that COURSE_MODEL names.

    COURSE_MODEL=Qwen/Qwen3-0.6B make lab

takes a checkpoint of Hugging Face's hub, or a folder with one, of a family that the engine serves.
The texts of the notebooks are about the model that ships; with another one, numbers differ.
"""

import os
from pathlib import Path

from course_lib.data import DEFAULT_MODEL
from course_lib.model.config import ModelConfig

# What the engine reads of a repository; weights in other formats are not downloaded.
FILES = ["*.json", "*.safetensors", "*.jinja"]


class LabModelError(ValueError):
    """COURSE_MODEL cannot be had. In a notebook it shows its sentence and no traceback."""

    def _render_traceback_(self) -> list[str]:
        return [f"LabModelError: {self}"]


def lab_model() -> Path:
    """The folder of the checkpoint.

    Raises:
        LabModelError: COURSE_MODEL names neither a folder nor a checkpoint that the hub gives us.
        CheckpointError: the engine does not serve its family; the message names those it does.
    """
    name = os.environ.get("COURSE_MODEL")
    if not name:
        return DEFAULT_MODEL
    folder = Path(name).expanduser()
    if not folder.is_dir():
        folder = _from_hub(name)
    ModelConfig.from_pretrained(folder)
    return folder


def _from_hub(name: str) -> Path:
    """The folder into which the hub's checkpoint was downloaded, now or before."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=FILES, etag_timeout=10))
    except (OSError, ValueError) as error:  # the network, the name, or a gate
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise LabModelError(
            f"COURSE_MODEL={name} is not a folder here and could not be had from the hub "
            f"({type(error).__name__}: {first_line}); where the hub can be reached, "
            f"`hf download {name} --local-dir model` gets it, then copy that folder here and set "
            "COURSE_MODEL to its path"
        ) from None
