"""Sliders of the notebooks, made of ipywidgets (7.7 or later).

Each function returns one widget, which a notebook shows by naming it in the last line of a cell.
The picture in it is an image that is drawn anew when a slider moves, so it needs no front end but
the widgets' own.
"""

import io
from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets
from matplotlib.figure import Figure

from course_lib.classroom.plots import plot_block_map, plot_memory
from course_lib.classroom.recording import BlockMap
from course_lib.sizing import catalog
from course_lib.sizing.memory import GpuRequirements

CONTEXT_LENS = [512 * 2**power for power in range(9)]  # 512 to 128K tokens
CONCURRENCIES = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]


def sizing_explorer(sizing: Callable[..., GpuRequirements]) -> ipywidgets.Widget:
    """A plan on sliders: model, GPU, context, customers and precisions; the memory it takes.

    Args:
        sizing: the calculator, with the arguments of `estimate_gpu_requirements`.
    """
    controls = {
        "model": _dropdown("model", list(catalog.models()), "Llama-3.1-8B"),
        "gpu": _dropdown("GPU", list(catalog.gpus()), "H100_80GB"),
        "context": _slider("tokens each", CONTEXT_LENS, 2048),
        "concurrency": _slider("customers", CONCURRENCIES, 10),
        "weights": _dropdown("weights", ["bf16", "int8", "int4"], "bf16"),
        "kv": _dropdown("KV cache", ["bf16", "fp8"], "bf16"),
    }
    picture = ipywidgets.Image(format="png")

    def draw(_: Any = None) -> None:
        chosen = {name: control.value for name, control in controls.items()}
        model = catalog.find_model(chosen["model"])
        needs = sizing(
            model.total_params / 1e9,
            model.num_layers,
            model.num_kv_heads,
            model.head_dim,
            chosen["context"],
            chosen["concurrency"],
            weight_bytes=catalog.PRECISION_BYTES[chosen["weights"]],
            kv_bytes=catalog.PRECISION_BYTES[chosen["kv"]],
        )
        title = f"{model.name}, {chosen['concurrency']} x {chosen['context']} tokens"
        picture.value = _png(plot_memory(needs, catalog.find_gpu(chosen["gpu"]), title))

    for control in controls.values():
        control.observe(draw, names="value")
    draw()
    boxes = list(controls.values())
    rows = [ipywidgets.HBox(boxes[first : first + 2]) for first in range(0, len(boxes), 2)]
    return ipywidgets.VBox([*rows, picture])


def block_map_explorer(block_maps: Sequence[BlockMap]) -> ipywidgets.Widget:
    """A run of the engine on a slider, or played: who owns which block after each step.

    Args:
        block_maps: from `record_block_maps`.
    """
    last = len(block_maps) - 1
    slider = ipywidgets.IntSlider(
        description="step", max=last, value=min(1, last), continuous_update=False
    )
    play = ipywidgets.Play(max=last, value=slider.value, interval=600)
    ipywidgets.jslink((play, "value"), (slider, "value"))
    picture = ipywidgets.Image(format="png")

    def draw(_: Any = None) -> None:
        picture.value = _png(plot_block_map(block_maps[slider.value]))

    slider.observe(draw, names="value")
    draw()
    return ipywidgets.VBox([ipywidgets.HBox([play, slider]), picture])


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _dropdown(label: str, options: list[str], value: str) -> ipywidgets.Dropdown:
    value = value if value in options else options[0]
    return ipywidgets.Dropdown(description=label, options=options, value=value)


def _slider(label: str, options: Sequence[float], value: float) -> ipywidgets.SelectionSlider:
    return ipywidgets.SelectionSlider(
        description=label, options=options, value=value, continuous_update=False
    )
