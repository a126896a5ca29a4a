"""Where the repository keeps its models, catalogues and measurements."""

from pathlib import Path

#: The folder `data/` of the clone that this package runs from.
DATA_DIR = Path(__file__).resolve().parent.parent / "data"

#: The model that ships and that commands use unless told otherwise.
DEFAULT_MODEL = DATA_DIR / "models" / "merchant-chat"


def model_directories() -> list[Path]:
    """Checkpoints under `data/models`, sorted by name."""
    return sorted(path.parent for path in (DATA_DIR / "models").glob("*/config.json"))
