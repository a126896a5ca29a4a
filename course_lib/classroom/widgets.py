"""What the notebooks of one replica let you try: a plan, a batch, the blocks of a KV cache.

Each function returns an `Explorer`, which a notebook shows by naming it in the last line of a cell.
"""

import html
import random
from collections.abc import Callable, Sequence

from course_lib.classroom.explorer import Control, Explorer, View
from course_lib.classroom.plots import plot_block_map, plot_plan, plot_slots
from course_lib.classroom.recording import BlockMap
from course_lib.sizing import catalog
from course_lib.sizing.batching import simulate_slots
from course_lib.sizing.memory import GpuRequirements

CONTEXT_LENS = [512 * 2**power for power in range(9)]  # 512 to 128K tokens
CONCURRENCIES = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]

#: Replies of the batch, few enough to tell them apart.
NUM_REPLIES = 24
SHORT_REPLIES = (4, 6, 8, 10, 12)  # tokens


def sizing_explorer(sizing: Callable[..., GpuRequirements]) -> Explorer:
    """A plan on sliders: how many GPUs each model needs, and what takes the memory of one of them.

    Args:
        sizing: the calculator, with the arguments of `estimate_gpu_requirements`.
    """
    controls = {
        "model": Control("model", list(catalog.models()), "Llama-3.1-8B", "menu"),
        "gpu": Control("GPU", list(catalog.gpus()), "H100_80GB", "menu"),
        "context": Control("conversation (tokens)", CONTEXT_LENS, 2048, form="{:,}"),
        "concurrency": Control("customers at once", CONCURRENCIES, 10, form="{:,}"),
        "weights": Control("weights", ["bf16", "int8", "int4"], "bf16", "menu"),
        "kv": Control("KV cache", ["bf16", "fp8"], "bf16", "menu"),
    }

    def draw(model: str, gpu: str, context: int, concurrency: int, weights: str, kv: str) -> View:
        needs = {
            name: sizing(
                shape.total_params / 1e9,
                shape.num_layers,
                shape.num_kv_heads,
                shape.head_dim,
                context,
                concurrency,
                weight_bytes=catalog.PRECISION_BYTES[weights],
                kv_bytes=catalog.PRECISION_BYTES[kv],
            )
            for name, shape in catalog.models().items()
        }
        plan = f"{concurrency:,} x {context:,} tokens, weights {weights}, KV cache {kv}"
        return View([plot_plan(needs, model, catalog.find_gpu(gpu), plan)])

    return Explorer(controls, draw)


def batching_explorer() -> Explorer:
    """Replies and slots on sliders: which reply is in which slot, static above continuous."""
    controls = {
        "slots": Control("slots", [1, 2, 3, 4, 6, 8, 12], 4),
        "num_long": Control(f"long replies of {NUM_REPLIES}", [0, 1, 2, 4, 8, 16, 24], 4),
        "length": Control("a long reply (tokens)", [10, 20, 40, 80, 160], 40),
        "order": Control("order of arrival", [*range(1, 9)], 1),
    }

    def draw(slots: int, num_long: int, length: int, order: int) -> View:
        rng = random.Random(order)
        lengths = [length] * num_long
        lengths += [rng.choice(SHORT_REPLIES) for _ in range(NUM_REPLIES - num_long)]
        rng.shuffle(lengths)
        steps = {
            name: simulate_slots(lengths, slots, continuous=name == "continuous").token_steps
            for name in ("static", "continuous")
        }
        times = steps["static"] / steps["continuous"]
        text = f"The static batch takes {times:.2f} times as many steps as the continuous one."
        return View([plot_slots(lengths, slots)], text)

    return Explorer(controls, draw)


def block_map_explorer(block_maps: Sequence[BlockMap]) -> Explorer:
    """A run of the engine on a slider, or played: who owns which block after each step.

    Args:
        block_maps: from `record_block_maps`.
    """
    steps = range(len(block_maps))

    def draw(step: int) -> View:
        tables = [
            f"request {html.escape(name)}: {', '.join(map(str, table))}"
            for name, table in block_maps[step].owned.items()
        ]
        text = "<br>".join(["Block tables", *tables] if tables else ["No block tables"])
        return View([plot_block_map(block_maps[step])], text)

    first = steps[min(1, len(steps) - 1)]
    return Explorer({"step": Control("after step", steps, first, "player")}, draw)
