"""Oracles of notebook B1, sizing: exact fractions on fresh plans, GPUs and models."""

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

from course_lib.classroom.checks import Exercise, Mismatch, compare
from course_lib.sizing import catalog
from course_lib.sizing.catalog import Gpu, MigProfile, ModelShape

GB = 10**9
Plan = dict[str, Any]
Slips = Sequence[tuple[Any, str]]  # the value that a known mistake gives, and the hint for it


def verify_sizing(answer: Callable[..., Any], rng: random.Random) -> None:
    """Against the formulas in exact fractions, for every GPU of the catalogue; then bad input."""
    for plan in _plans(rng):
        where = f"estimate_gpu_requirements({_spelled(plan)})"
        _compare_requirements(answer(**plan), plan, where)
    good = next(_plans(rng))
    for name in _COMPLETE:
        for bad in (0, -2) if name != "overhead_factor" else (0, 0.9):
            plan = {**good, name: bad}
            _refuses(answer, plan, name, f"estimate_gpu_requirements({_spelled(plan)})")


_COMPLETE: Plan = {
    "model_params_b": 8,
    "num_layers": 32,
    "num_kv_heads": 8,
    "head_dim": 128,
    "context_len": 4096,
    "target_concurrency": 8,
    "weight_bytes": 2,
    "kv_bytes": 2,
    "overhead_factor": 1.15,
}


def _plans(rng: random.Random) -> Iterator[Plan]:
    """Three plans with the defaults, then random ones; none near a whole number of GPUs.

    In the first no two factors are the same, so that a missing one is seen from the result.
    """
    basic = {name: _COMPLETE[name] for name in list(_COMPLETE)[:6]}
    small = {"model_params_b": 7.6, "num_layers": 28, "num_kv_heads": 4, "target_concurrency": 10}
    large = {"model_params_b": 70, "num_layers": 80, "context_len": 8192, "target_concurrency": 4}
    yield {**basic, **small}
    yield basic
    yield {**basic, **large}
    made = 0
    while made < 40:
        plan = {
            "model_params_b": rng.choice((rng.randint(1, 400), rng.randint(1, 99) / 10)),
            "num_layers": rng.randint(3, 100),
            "num_kv_heads": rng.randint(3, 40),
            "head_dim": rng.choice((48, 64, 80, 96, 128, 256)),
            "context_len": rng.randint(200, 40_000),
            "target_concurrency": rng.randint(3, 300),
            "weight_bytes": rng.choice((0.5, 1, 2, 4)),
            "kv_bytes": rng.choice((1, 2, 4)),
            "overhead_factor": rng.randint(105, 160) / 100,
        }
        total = _exact(plan)[2]
        gpus_used = [total / _fraction(gpu.usable_gb) for gpu in catalog.gpus().values()]
        if all(abs(used - round(used)) > Fraction(1, 10**6) for used in gpus_used):
            made += 1
            yield plan


def _exact(plan: Plan) -> tuple[Fraction, Fraction, Fraction]:
    """Weights, KV cache and total of a plan, in GB."""
    p = {name: _fraction(value) for name, value in {**_COMPLETE, **plan}.items()}
    weights = p["model_params_b"] * p["weight_bytes"]
    numbers = 2 * p["num_layers"] * p["num_kv_heads"] * p["head_dim"]
    kv = numbers * p["context_len"] * p["target_concurrency"] * p["kv_bytes"] / GB
    return weights, kv, (weights + kv) * p["overhead_factor"]


def _compare_requirements(got: Any, plan: Plan, where: str) -> None:
    weights, kv, total = _exact(plan)
    p = {**_COMPLETE, **plan}
    _require_fields(
        got, ("weights_gb", "kv_cache_gb", "total_with_overhead_gb", "gpu_options"), where
    )
    billions = "model_params_b counts billions, and 1 GB is a billion bytes: they cancel."
    _compare(
        got.weights_gb,
        weights,
        f"weights_gb of {where}",
        [
            (weights / 8, "weight_bytes is in bytes already; there are no bits to convert."),
            (p["model_params_b"], "Each parameter takes weight_bytes bytes."),
            (
                weights * _fraction(p["overhead_factor"]),
                "The overhead comes once, at the end, on weights and KV cache together.",
            ),
            (weights * GB / 2**30, _GIB),
            (weights / GB, f"{billions} No division by 1e9 is left."),
            (weights * GB, f"{billions} The result is in GB, not in bytes."),
        ],
        "weights_gb = parameters in billions x bytes of one.",
    )
    _compare(
        got.kv_cache_gb,
        kv,
        f"kv_cache_gb of {where}",
        [
            (
                kv / _fraction(p["kv_bytes"]) * _fraction(p["weight_bytes"]),
                "The KV cache has a precision of its own: kv_bytes, not weight_bytes.",
            ),
            (kv / 2, "Half is missing: a key and a value a token, and kv_bytes bytes a number."),
            (
                kv / p["target_concurrency"],
                "target_concurrency requests are there at once, each with its own context.",
            ),
            (kv / 8, "kv_bytes is in bytes already; there are no bits to convert."),
            (kv / p["kv_bytes"], "Each number of the cache takes kv_bytes bytes."),
            (kv / p["num_layers"], "Every layer keeps keys and values of its own."),
            (kv / p["num_kv_heads"], "Every KV head keeps keys and values of its own."),
            (kv / p["head_dim"], "A key has head_dim numbers."),
            (kv / p["context_len"], "The cache grows with the context: times context_len."),
            (kv * GB / 2**30, _GIB),
            (kv * GB, "The result is in GB, and 1 GB is 1e9 bytes."),
        ],
        "kv_cache_gb = 2 x layers x KV heads x head_dim x context x concurrency x kv_bytes / 1e9.",
    )
    factor = _fraction(p["overhead_factor"])
    both = "The overhead is on both, weights and KV cache."
    _compare(
        got.total_with_overhead_gb,
        total,
        f"total_with_overhead_gb of {where}",
        [
            (weights + kv, "The overhead is missing: (weights + KV cache) x overhead_factor."),
            (weights * factor + kv, f"{both} Here it is on the weights only."),
            (weights + kv * factor, f"{both} Here it is on the KV cache only."),
            (weights + kv + factor, "overhead_factor 1.15 means 15 % on top: multiply by it."),
        ],
        "total_with_overhead_gb = (weights_gb + kv_cache_gb) x overhead_factor.",
    )
    _compare_options(got.gpu_options, total, where)


_GIB = "1 GB is 1e9 bytes; 2**30 bytes are a GiB, which is 7 % more."


def _compare_options(got: Any, total: Fraction, where: str) -> None:
    gpus = catalog.gpus()
    if not isinstance(got, Mapping):
        raise Mismatch(f"gpu_options of {where}: expected a dict by GPU name, got {got!r}")
    if set(got) != set(gpus):
        missing = sorted(set(gpus) - set(got)) or "none"
        unknown = sorted(set(got) - set(gpus), key=str) or "none"
        raise Mismatch(
            f"gpu_options of {where}: GPUs missing: {missing}; not in the catalogue: {unknown}",
            "One entry for every GPU of catalog.gpus(), under the catalogue's name.",
        )
    for name, gpu in gpus.items():
        at = f"gpu_options[{name!r}] of {where}"
        _require_fields(got[name], ("memory_gb", "needed"), at)
        usable = _fraction(gpu.usable_gb)
        _compare(
            got[name].memory_gb,
            usable,
            f"memory_gb of {at}",
            [
                (gpu.memory_gb, _USABLE),
            ],
            "memory_gb is usable_gb of the catalogue.",
        )
        count = total / usable
        _compare(
            got[name].needed,
            math.ceil(count),
            f"needed of {at}",
            [
                (0, "At least one GPU, however small the model."),
                (count, "There is no 0.6 of a GPU: round up, with math.ceil."),
                (
                    max(1, math.floor(count)),
                    "Rounding down leaves too little memory. Round up, with math.ceil.",
                ),
                (
                    max(1, round(count)),
                    "round() may round down, and then it does not fit. Use math.ceil.",
                ),
                (math.ceil(total / _fraction(gpu.memory_gb)), _USABLE),
            ],
            "needed = total / usable_gb, rounded up.",
        )


_USABLE = "A plan may fill usable_gb of a GPU, not all of its memory_gb."


def verify_best_mig_fit(answer: Callable[..., Any], rng: random.Random) -> None:
    """Against a search over all profiles, on real GPUs and on made-up ones."""
    h100 = catalog.gpus().get("H100_80GB")
    cases: list[tuple[float, Gpu]] = []
    for gpu in catalog.gpus().values():
        cases += [(rng.uniform(0.5, gpu.memory_gb), gpu) for _ in range(4)]
        cases.append((gpu.memory_gb * 1.5, gpu))
    if h100 is not None:
        cases.append((9.5, h100))  # fills a 1g.10gb to the last byte
    basis = next(iter(catalog.gpus().values()))
    for _ in range(60):
        gpu = _made_up_gpu(basis, rng)
        required = rng.uniform(0.02, 1.05) * gpu.memory_gb
        cases.append((round(required, 3) + 0.0001, gpu))  # off every boundary
    few = (MigProfile("7g.96gb", 7, 8, 96.0, 1), MigProfile("4g.48gb", 4, 4, 48.0, 1))
    cases.append((10.0, replace(basis, name="made-up", memory_gb=96.0, usable_gb=90.0, mig=few)))
    for required, gpu in cases:
        slices = ", ".join(m.name for m in gpu.mig) or "no MIG"
        where = (
            f"best_mig_fit({required:.4f}, {gpu.name}: {gpu.usable_gb:g} of {gpu.memory_gb:g} GB "
            f"usable; {slices})"
        )
        _compare_fit(answer(required, gpu), required, gpu, where)


def _made_up_gpu(basis: Gpu, rng: random.Random) -> Gpu:
    memory, table = rng.choice((40, 64, 96, 120, 192)), [*_SLICES]
    rng.shuffle(table)
    profiles = tuple(
        MigProfile(f"{compute}g.{memory * eighths // 8}gb", compute, eighths, gb, count)
        for compute, eighths, count in table[: rng.randint(3, 6)]
        for gb in [float(memory * eighths // 8)]
    )
    return replace(
        basis,
        name="made-up",
        memory_gb=float(memory),
        usable_gb=float(memory - rng.randint(2, 8)),
        bandwidth_gb_s=float(rng.randint(5, 60) * 100),
        mig=profiles,
    )


#: Compute sevenths, memory eighths and instances per GPU (NVIDIA MIG User Guide).
_SLICES = ((1, 1, 7), (1, 2, 4), (2, 2, 3), (3, 4, 2), (4, 4, 1), (7, 8, 1))


def _compare_fit(got: Any, required: float, gpu: Gpu, where: str) -> None:
    usable = {m: _fraction(m.memory_gb) * _fraction(gpu.usable_gb) for m in gpu.mig}
    usable = {m: gb / _fraction(gpu.memory_gb) for m, gb in usable.items()}
    fitting = [m for m in gpu.mig if _fraction(required) <= usable[m]]
    if not fitting:
        if got is not None:
            raise Mismatch(
                f"{where}: expected None, got {got!r}",
                "A GPU may have no profiles, and a replica may be larger than every slice: None.",
            )
        return
    best = min(fitting, key=lambda m: (-m.max_instances, m.memory_gb))
    _require_fields(
        got, ("profile", "usable_gb", "fits", "replicas_per_gpu", "bandwidth_gb_s"), where
    )
    chosen = getattr(got.profile, "name", got.profile)
    if chosen != best.name:
        if required == usable[best]:
            hint = "A replica that fills a slice to the last byte fits: required_gb <= usable_gb."
        elif chosen in {m.name for m in gpu.mig} - {m.name for m in fitting}:
            hint = "It does not fit there. Usable is the same share of a slice as of the GPU."
        elif chosen in {m.name for m in fitting if m.max_instances == best.max_instances}:
            hint = "Of profiles with the same number of replicas take the one with least memory."
        else:
            hint = "Of the profiles that fit take the one with the highest max_instances."
        raise Mismatch(f"{where}: expected the profile {best.name}, got {chosen!r}", hint)
    _compare(
        got.usable_gb,
        usable[best],
        f"usable_gb of {where}",
        [
            (
                best.memory_gb,
                "Of a slice, too, not all is usable: times gpu.usable_gb / gpu.memory_gb.",
            ),
        ],
        "usable_gb = profile.memory_gb x gpu.usable_gb / gpu.memory_gb.",
    )
    compare(got.fits, True, f"fits of {where}")
    _compare(
        got.replicas_per_gpu,
        best.max_instances,
        f"replicas_per_gpu of {where}",
        [
            (
                7 // best.compute_slices,
                "Memory comes in eighths, so 7 // compute_slices can be too many.",
            ),
        ],
        "One replica in each instance: max_instances of the profile.",
    )
    bandwidth = _fraction(gpu.bandwidth_gb_s)
    _compare(
        got.bandwidth_gb_s,
        bandwidth * best.memory_slices / 8,
        f"bandwidth_gb_s of {where}",
        [
            (bandwidth, "An instance has its share of the bandwidth, not all of it."),
            (
                bandwidth * best.compute_slices / 7,
                "Bandwidth goes with memory, in eighths; the sevenths are compute.",
            ),
        ],
        "bandwidth_gb_s = gpu.bandwidth_gb_s x memory_slices / 8.",
    )


def verify_kv_capacity(answer: Callable[..., Any], rng: random.Random) -> None:
    """Against whole bytes and blocks, on models of the catalogue and on made-up ones."""
    known: Sequence[ModelShape] = list(catalog.models().values())
    largest = max(known, key=lambda model: model.total_params)
    _compare_capacity(answer, known[0], 80.0, {})
    _compare_capacity(answer, largest, 24.0, {"gpu_memory_utilization": 0.8})  # nothing is left
    done = 0
    while done < 40:
        model = replace(
            rng.choice(known),
            name="made-up",
            num_layers=rng.randint(4, 90),
            num_kv_heads=rng.choice((2, 3, 4, 8)),
            num_heads=rng.choice((16, 24, 48)),
            head_dim=rng.choice((48, 64, 80, 128)),
        )
        options = {
            "gpu_memory_utilization": rng.randint(50, 98) / 100,
            "gpus": rng.choice((1, 2, 3, 4, 8)),
            "weight_bytes": rng.choice((0.5, 1, 2)),
            "kv_bytes": rng.choice((1, 2, 4)),
            "tokens_per_block": rng.choice((8, 16, 32, 64)),
            "activations_gb": rng.randint(1, 30) / 10,
        }
        done += _compare_capacity(answer, model, float(rng.choice((24, 40, 48, 80, 141))), options)
    for bad in (0, -0.5, 1.2):
        call = f"kv_capacity(model, 80, gpu_memory_utilization={bad})"
        bad_plan = {"model": known[0], "memory_gb": 80.0, "gpu_memory_utilization": bad}
        _refuses(answer, bad_plan, "gpu_memory_utilization", call)


_CAPACITY_DEFAULTS = {
    "gpu_memory_utilization": 0.9,
    "gpus": 1,
    "weight_bytes": 2,
    "kv_bytes": 2,
    "tokens_per_block": 16,
    "activations_gb": 0.0,
}


def _compare_capacity(
    answer: Callable[..., Any], model: ModelShape, memory_gb: float, options: Plan
) -> bool:
    """Whether the case was used: not if it is so near a whole block that rounding would decide."""
    p = {name: _fraction(v) for name, v in {**_CAPACITY_DEFAULTS, **options}.items()}
    budget = _fraction(memory_gb) * p["gpu_memory_utilization"] * p["gpus"]
    weights = model.total_params * p["weight_bytes"] / GB
    activations = p["activations_gb"] * p["gpus"]
    left = max(Fraction(0), budget - weights - activations)
    numbers = 2 * model.num_layers * model.head_dim * p["tokens_per_block"] * p["kv_bytes"]
    exact = left * GB / (numbers * model.num_kv_heads)
    blocks = math.floor(exact)
    if left and abs(exact - round(exact)) < Fraction(1, 10**4):
        return False
    where = (
        f"kv_capacity({model.total_params / GB:.3g}B parameters, {model.num_layers} layers, "
        f"{model.num_kv_heads} KV heads of {model.head_dim}; memory_gb={memory_gb:g}"
        + (f", {_spelled(options)})" if options else ")")
    )
    got = answer(model, memory_gb, **options)
    fields = ("budget_gb", "weights_gb", "activations_gb", "kv_cache_gb", "blocks", "tokens")
    _require_fields(got, fields, where)
    _compare(
        got.budget_gb,
        budget,
        f"budget_gb of {where}",
        [
            (
                _fraction(memory_gb) * p["gpus"],
                "The engine may take only gpu_memory_utilization of the memory.",
            ),
            (budget / p["gpus"], "Each of the GPUs adds its memory."),
        ],
        "budget_gb = memory_gb x gpu_memory_utilization x gpus.",
    )
    _compare(
        got.weights_gb,
        weights,
        f"weights_gb of {where}",
        [
            (
                weights * p["gpus"],
                "Tensor-parallel GPUs share one set of weights; each holds a part.",
            ),
            (weights * GB, "total_params counts parameters, not billions: divide by 1e9."),
            (weights / p["weight_bytes"], "Each parameter takes weight_bytes bytes."),
        ],
        "weights_gb = total_params x weight_bytes / 1e9.",
    )
    _compare(
        got.activations_gb,
        activations,
        f"activations_gb of {where}",
        [
            (p["activations_gb"], "activations_gb is for each GPU: times gpus."),
        ],
        "activations_gb = activations_gb of one GPU x gpus.",
    )
    _compare(
        got.kv_cache_gb,
        left,
        f"kv_cache_gb of {where}",
        [
            (
                budget - weights - activations,
                "If nothing is left, the KV cache has 0 GB, not less.",
            ),
            (budget - weights, "The activations need room, too."),
            (budget - activations, "The weights need room, too."),
        ],
        "kv_cache_gb = budget - weights - activations, and never below 0.",
    )
    _compare(
        got.blocks,
        blocks,
        f"blocks of {where}",
        [
            (exact, "Only whole blocks count: round down."),
            (math.ceil(exact), "A block that fits only in part cannot be used: round down."),
            (
                math.floor(exact * model.num_kv_heads / model.num_heads),
                "The cache keeps KV heads. Several query heads share one of them.",
            ),
            (math.floor(exact * 2), "A block has keys and values: 2 x layers x ..."),
            (math.floor(exact * 2**30 / GB), _GIB),
            (math.floor(exact * p["tokens_per_block"]), "A block holds tokens_per_block tokens."),
        ],
        "blocks = bytes left // bytes of a block, and a block holds tokens_per_block tokens.",
    )
    _compare(
        got.tokens,
        blocks * p["tokens_per_block"],
        f"tokens of {where}",
        [
            (exact * p["tokens_per_block"], "Tokens of an unfinished block do not count."),
        ],
        "tokens = blocks x tokens_per_block.",
    )
    return True


def _compare(got: Any, expected: Any, where: str, slips: Slips, hint: str) -> None:
    """As `compare`, for a number; a known mistake gets the hint that fits it."""
    exact = Fraction(expected)
    number = int(exact) if exact.denominator == 1 else float(exact)
    try:
        compare(got, number, where)
    except Mismatch as error:
        for value, hint_that_fits in slips:
            if _is_close(got, value):
                raise Mismatch(str(error), hint_that_fits) from None
        raise Mismatch(str(error), hint) from None


def _is_close(got: Any, value: Any) -> bool:
    try:
        return math.isclose(float(got), float(value), rel_tol=1e-6)
    except (TypeError, ValueError, OverflowError):
        return False


def _require_fields(got: Any, names: Sequence[str], where: str) -> None:
    for name in names:
        if not hasattr(got, name):
            raise Mismatch(
                f"{where} returned {got!r}, which has no {name!r}",
                f"Return the dataclass that the text names; its fields are {', '.join(names)}.",
            )


def _refuses(answer: Callable[..., Any], arguments: Plan, name: str, call: str) -> None:
    """Bad input must raise a ValueError that names the argument."""
    hint = f"Check first: `if ...: raise ValueError(f'{name} must be ..., got {{{name}}}')`."
    try:
        got = answer(**arguments)
    except ValueError as error:
        if name not in str(error):
            raise Mismatch(
                f"{call}: the ValueError says {str(error)!r}, which does not name {name}", hint
            ) from None
    else:
        raise Mismatch(
            f"{call}: expected a ValueError that names {name}, got a {type(got).__name__}", hint
        )


def _fraction(value: Any) -> Fraction:
    """The decimal number that was written: 1.15 is 115/100."""
    return Fraction(str(value))


def _spelled(arguments: Plan) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())


EXERCISES = (
    Exercise(
        id="B1.1",
        title="the sizing calculator",
        points=4,
        verify=verify_sizing,
        reference="course_lib.sizing.memory:estimate_gpu_requirements",
        hints=(
            "Four steps: weights in GB, KV cache in GB, the total with overhead, and for each GPU "
            "the total divided by what is usable of it, rounded up.",
            "Billions of parameters times bytes is GB at once. The KV cache is a product of seven "
            "numbers and a 2, in bytes; divide it by 1e9.",
            "gpu_options = {name: GpuOption(gpu.usable_gb, math.ceil(total / gpu.usable_gb)) "
            "for name, gpu in catalog.gpus().items()}",
            "For bad input put the arguments into a dict and go through it: "
            "`for name, value in sizes.items(): if value <= 0: raise ValueError(...)` with the "
            "name in the message. overhead_factor is bad below 1.",
        ),
        part="sizing",
    ),
    Exercise(
        id="B1.2",
        title="the best MIG slice",
        points=2,
        verify=verify_best_mig_fit,
        reference="course_lib.sizing.mig:best_mig_fit",
        hints=(
            "Go through gpu.mig and keep the profiles whose usable memory is enough. If there are "
            "none, return None.",
            "usable = profile.memory_gb * gpu.usable_gb / gpu.memory_gb, and it fits if "
            "required_gb <= usable.",
            "Sort those that fit by (-profile.max_instances, profile.memory_gb) and take the "
            "first.",
            "MigFit(profile, usable, True, profile.max_instances, "
            "gpu.bandwidth_gb_s * profile.memory_slices / 8)",
        ),
    ),
    Exercise(
        id="B1.3",
        title="what is left for the KV cache",
        points=3,
        verify=verify_kv_capacity,
        reference="course_lib.sizing.memory:kv_capacity",
        hints=(
            "Start from the budget of all GPUs together. Take off the weights once, and the "
            "activations of each GPU. What is left is the KV cache.",
            "A block takes model.kv_bytes_per_token(kv_bytes) * tokens_per_block bytes.",
            "blocks = int(left_gb * 1e9 // block_bytes), tokens = blocks * tokens_per_block, and "
            "left_gb = max(0, budget - weights - activations).",
        ),
    ),
)
