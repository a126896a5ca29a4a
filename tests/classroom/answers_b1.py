"""Answers to the exercises of B1: right ones in several styles, and wrong ones of typical kinds."""

import dataclasses
import math

from course_lib.sizing import catalog
from course_lib.sizing.memory import GpuOption, GpuRequirements, KvCapacity
from course_lib.sizing.mig import MigFit


def sizing_straight(
    model_params_b,
    num_layers,
    num_kv_heads,
    head_dim,
    context_len,
    target_concurrency,
    weight_bytes=2,
    kv_bytes=2,
    overhead_factor=1.15,
):
    """Right: one line after another."""
    for name, value in list(locals().items()):
        if value <= 0:
            raise ValueError(f"{name} must be above 0, got {value}")
    if overhead_factor < 1:
        raise ValueError(f"overhead_factor must be at least 1, got {overhead_factor}")
    weights = model_params_b * weight_bytes
    kv_per_token = 2 * num_layers * num_kv_heads * head_dim * kv_bytes
    kv = kv_per_token * context_len * target_concurrency / 1e9
    total = (weights + kv) * overhead_factor
    options = {}
    for name, gpu in catalog.gpus().items():
        options[name] = GpuOption(gpu.usable_gb, math.ceil(total / gpu.usable_gb))
    return GpuRequirements(weights, kv, total, options)


@dataclasses.dataclass
class MyOption:
    memory_gb: float
    needed: int


@dataclasses.dataclass
class MyRequirements:
    weights_gb: float
    kv_cache_gb: float
    total_with_overhead_gb: float
    gpu_options: dict


def sizing_in_bytes(
    model_params_b,
    num_layers,
    num_kv_heads,
    head_dim,
    context_len,
    target_concurrency,
    weight_bytes=2,
    kv_bytes=2,
    overhead_factor=1.15,
):
    """Right: in bytes, with dataclasses of its own, GPUs counted one by one, in another order."""
    limits = {
        "model_params_b": model_params_b,
        "num_layers": num_layers,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "context_len": context_len,
        "target_concurrency": target_concurrency,
        "weight_bytes": weight_bytes,
        "kv_bytes": kv_bytes,
        "overhead_factor": overhead_factor - 0.999999,
    }
    bad = [name for name, value in limits.items() if not value > 0]
    if bad:
        raise ValueError(f"too small: {', '.join(bad)}")
    weight_total = model_params_b * 1e9 * weight_bytes
    numbers = num_layers * num_kv_heads * head_dim * context_len * target_concurrency
    cache_total = (numbers + numbers) * kv_bytes
    everything = overhead_factor * weight_total + overhead_factor * cache_total

    def count(usable_bytes):
        gpus = 1
        while gpus * usable_bytes < everything:
            gpus += 1
        return gpus

    options = {
        gpu.name: MyOption(gpu.usable_gb, count(gpu.usable_gb * 1e9))
        for gpu in sorted(catalog.gpus().values(), key=lambda gpu: -gpu.memory_gb)
    }
    return MyRequirements(weight_total / 1e9, cache_total / 1e9, everything / 1e9, options)


def _sizing(p, weights, kv, total=None, count=math.ceil, memory="usable_gb"):
    """The calculator with something changed; `p` are the arguments."""
    for name, value in p.items():
        if value <= 0 or (name == "overhead_factor" and value < 1):
            raise ValueError(f"{name} must be larger, got {value}")
    total = (weights + kv) * p["overhead_factor"] if total is None else total
    options = {
        name: GpuOption(getattr(gpu, memory), count(total / getattr(gpu, memory)))
        for name, gpu in catalog.gpus().items()
    }
    return GpuRequirements(weights, kv, total, options)


def _complete(plan):
    return {"weight_bytes": 2, "kv_bytes": 2, "overhead_factor": 1.15} | plan


def _right(p):
    weights = p["model_params_b"] * p["weight_bytes"]
    kv = 2 * p["num_layers"] * p["num_kv_heads"] * p["head_dim"]
    return weights, kv * p["context_len"] * p["target_concurrency"] * p["kv_bytes"] / 1e9


def sizing_keys_only(**plan):
    weights, kv = _right(p := _complete(plan))
    return _sizing(p, weights, kv / 2)


def sizing_one_request(**plan):
    weights, kv = _right(p := _complete(plan))
    return _sizing(p, weights, kv / p["target_concurrency"])


def sizing_bits(**plan):
    weights, kv = _right(p := _complete(plan))
    return _sizing(p, weights / 8, kv / 8)


def sizing_gib(**plan):
    weights, kv = _right(p := _complete(plan))
    return _sizing(p, weights, kv * 1e9 / 2**30)


def sizing_without_overhead(**plan):
    weights, kv = _right(p := _complete(plan))
    return _sizing(p, weights, kv, total=weights + kv)


def sizing_overhead_on_weights(**plan):
    weights, kv = _right(p := _complete(plan))
    return _sizing(p, weights, kv, total=weights * p["overhead_factor"] + kv)


def sizing_rounds(**plan):
    p = _complete(plan)
    return _sizing(p, *_right(p), count=lambda gpus: max(1, round(gpus)))


def sizing_rounds_down(**plan):
    p = _complete(plan)
    return _sizing(p, *_right(p), count=int)


def sizing_fills_the_gpu(**plan):
    p = _complete(plan)
    return _sizing(p, *_right(p), memory="memory_gb")


def sizing_kv_in_the_precision_of_weights(**plan):
    weights, kv = _right(p := _complete(plan))
    return _sizing(p, weights, kv / p["kv_bytes"] * p["weight_bytes"])


def sizing_takes_anything(**plan):
    p = _complete(plan)
    return _sizing({**dict.fromkeys(p, 1), "overhead_factor": p["overhead_factor"]}, *_right(p))


def sizing_other_defaults(**plan):
    p = {"weight_bytes": 1, "kv_bytes": 2, "overhead_factor": 1.15} | plan
    return _sizing(p, *_right(p))


def sizing_one_gpu_only(**plan):
    p = _complete(plan)
    needs = _sizing(p, *_right(p))
    return dataclasses.replace(needs, gpu_options={"H100_80GB": needs.gpu_options["H100_80GB"]})


def sizing_constant(**plan):
    return sizing_straight(8, 32, 8, 128, 4096, 8)


def sizing_bare_tuple(**plan):
    return dataclasses.astuple(sizing_straight(**plan))


def mig_sorted(required_gb, gpu):
    """Right: sort what fits."""
    usable = gpu.usable_gb / gpu.memory_gb
    fitting = [p for p in gpu.mig if required_gb <= p.memory_gb * usable]
    if not fitting:
        return None
    best = sorted(fitting, key=lambda p: (-p.max_instances, p.memory_gb))[0]
    return MigFit(
        profile=best,
        usable_gb=best.memory_gb * usable,
        fits=True,
        replicas_per_gpu=best.max_instances,
        bandwidth_gb_s=gpu.bandwidth_gb_s * best.memory_slices / 8,
    )


def mig_one_by_one(required_gb, gpu):
    """Right: keep the best so far."""
    best = None
    for profile in gpu.mig:
        usable = profile.memory_gb * gpu.usable_gb / gpu.memory_gb
        if usable < required_gb:
            continue
        share = profile.memory_slices / 8
        fit = MigFit(profile, usable, True, profile.max_instances, share * gpu.bandwidth_gb_s)
        more = best is None or fit.replicas_per_gpu > best.replicas_per_gpu
        if more or (
            fit.replicas_per_gpu == best.replicas_per_gpu and fit.usable_gb < best.usable_gb
        ):
            best = fit
    return best


def mig_nominal_memory(required_gb, gpu):
    return mig_sorted(required_gb, dataclasses.replace(gpu, usable_gb=gpu.memory_gb))


def mig_first_that_fits(required_gb, gpu):
    for profile in gpu.mig:
        fit = mig_sorted(required_gb, dataclasses.replace(gpu, mig=(profile,)))
        if fit:
            return fit
    return None


def mig_largest_slice(required_gb, gpu):
    largest = max(gpu.mig, key=lambda p: p.memory_gb, default=None)
    return mig_sorted(required_gb, dataclasses.replace(gpu, mig=(largest,) if largest else ()))


def mig_sevenths(required_gb, gpu):
    fit = mig_sorted(required_gb, gpu)
    return fit and dataclasses.replace(fit, replicas_per_gpu=7 // fit.profile.compute_slices)


def mig_whole_bandwidth(required_gb, gpu):
    fit = mig_sorted(required_gb, gpu)
    return fit and dataclasses.replace(fit, bandwidth_gb_s=gpu.bandwidth_gb_s)


def mig_bandwidth_in_sevenths(required_gb, gpu):
    fit = mig_sorted(required_gb, gpu)
    share = fit.profile.compute_slices / 7 if fit else 0
    return fit and dataclasses.replace(fit, bandwidth_gb_s=gpu.bandwidth_gb_s * share)


def mig_never_gives_up(required_gb, gpu):
    return mig_sorted(required_gb, gpu) or mig_sorted(0, gpu)


def mig_raises(required_gb, gpu):
    fit = mig_sorted(required_gb, gpu)
    if fit is None:
        raise ValueError("nothing fits")
    return fit


def mig_strictly_smaller(required_gb, gpu):
    return mig_sorted(required_gb + 1e-3, gpu)


def mig_name_only(required_gb, gpu):
    fit = mig_sorted(required_gb, gpu)
    return fit and fit.profile.name


def mig_by_packing(required_gb, gpu):
    """As if memory could be cut anywhere: the smallest slice is always the best."""
    fit = mig_sorted(required_gb, gpu)
    return fit and dataclasses.replace(fit, replicas_per_gpu=int(gpu.usable_gb // required_gb))


def capacity_straight(
    model,
    memory_gb,
    gpu_memory_utilization=0.9,
    *,
    gpus=1,
    weight_bytes=2,
    kv_bytes=2,
    tokens_per_block=16,
    activations_gb=0.0,
):
    """Right: as the text has it."""
    if gpu_memory_utilization <= 0 or gpu_memory_utilization > 1:
        raise ValueError("gpu_memory_utilization must be above 0 and at most 1")
    budget = memory_gb * gpu_memory_utilization * gpus
    weights = model.total_params * weight_bytes / 1e9
    activations = gpus * activations_gb
    left = budget - weights - activations
    if left < 0:
        left = 0
    block_bytes = model.kv_bytes_per_token(kv_bytes) * tokens_per_block
    blocks = math.floor(left * 1e9 / block_bytes)
    return KvCapacity(budget, weights, activations, left, blocks, blocks * tokens_per_block)


def capacity_on_each_gpu(model, memory_gb, gpu_memory_utilization=0.9, **options):
    """Right: what one GPU has left for its part of every block."""
    o = {"gpus": 1, "weight_bytes": 2, "kv_bytes": 2, "tokens_per_block": 16, "activations_gb": 0.0}
    o |= options
    if not 0 < gpu_memory_utilization <= 1:
        raise ValueError(f"gpu_memory_utilization={gpu_memory_utilization} is no share")
    mine = memory_gb * gpu_memory_utilization
    weights = model.total_params / 1e9 * o["weight_bytes"]
    left = max(0.0, mine - weights / o["gpus"] - o["activations_gb"])
    numbers = 2 * model.num_layers * model.num_kv_heads * model.head_dim * o["tokens_per_block"]
    blocks = int(left * 1e9 / (numbers * o["kv_bytes"] / o["gpus"]))
    return KvCapacity(
        budget_gb=mine * o["gpus"],
        weights_gb=weights,
        activations_gb=o["activations_gb"] * o["gpus"],
        kv_cache_gb=left * o["gpus"],
        blocks=blocks,
        tokens=blocks * o["tokens_per_block"],
    )


def capacity_all_memory(model, memory_gb, gpu_memory_utilization=0.9, **options):
    if not 0 < gpu_memory_utilization <= 1:
        raise ValueError("gpu_memory_utilization")
    return capacity_straight(model, memory_gb, 1.0, **options)


def capacity_query_heads(model, memory_gb, *args, **options):
    model = dataclasses.replace(model, num_kv_heads=model.num_heads)
    return capacity_straight(model, memory_gb, *args, **options)


def capacity_keys_only(model, memory_gb, *args, **options):
    options["kv_bytes"] = options.get("kv_bytes", 2) / 2
    return capacity_straight(model, memory_gb, *args, **options)


def capacity_below_zero(model, memory_gb, *args, **options):
    got = capacity_straight(model, memory_gb, *args, **options)
    left = got.budget_gb - got.weights_gb - got.activations_gb
    return dataclasses.replace(got, kv_cache_gb=left)


def capacity_without_activations(model, memory_gb, *args, **options):
    return capacity_straight(model, memory_gb, *args, **{**options, "activations_gb": 0})


def capacity_weights_on_every_gpu(model, memory_gb, *args, **options):
    options["weight_bytes"] = options.get("weight_bytes", 2) * options.get("gpus", 1)
    return capacity_straight(model, memory_gb, *args, **options)


def capacity_of_parts_of_blocks(model, memory_gb, *args, **options):
    got = capacity_straight(model, memory_gb, *args, **options)
    token_bytes = model.kv_bytes_per_token(options.get("kv_bytes", 2))
    return dataclasses.replace(got, tokens=int(got.kv_cache_gb * 1e9 // token_bytes))


def capacity_rounds_up(model, memory_gb, *args, **options):
    got = capacity_straight(model, memory_gb, *args, **options)
    size = options.get("tokens_per_block", 16)
    return dataclasses.replace(got, blocks=got.blocks + 1, tokens=got.tokens + size)


def capacity_gib(model, memory_gb, *args, **options):
    got = capacity_straight(model, memory_gb, *args, **options)
    blocks = int(got.blocks * 2**30 / 1e9)
    return dataclasses.replace(got, blocks=blocks, tokens=blocks * 16)


def capacity_takes_anything(model, memory_gb, gpu_memory_utilization=0.9, **options):
    if not 0 < gpu_memory_utilization <= 1:
        gpu_memory_utilization = 0.9
    return capacity_straight(model, memory_gb, gpu_memory_utilization, **options)


def capacity_tokens_only(model, memory_gb, *args, **options):
    return capacity_straight(model, memory_gb, *args, **options).tokens


RIGHT = {
    "B1.1": [sizing_straight, sizing_in_bytes],
    "B1.2": [mig_sorted, mig_one_by_one],
    "B1.3": [capacity_straight, capacity_on_each_gpu],
}
WRONG = {
    "B1.1": [
        sizing_keys_only,
        sizing_one_request,
        sizing_bits,
        sizing_gib,
        sizing_without_overhead,
        sizing_overhead_on_weights,
        sizing_rounds,
        sizing_rounds_down,
        sizing_fills_the_gpu,
        sizing_kv_in_the_precision_of_weights,
        sizing_takes_anything,
        sizing_other_defaults,
        sizing_one_gpu_only,
        sizing_constant,
        sizing_bare_tuple,
    ],
    "B1.2": [
        mig_nominal_memory,
        mig_first_that_fits,
        mig_largest_slice,
        mig_sevenths,
        mig_whole_bandwidth,
        mig_bandwidth_in_sevenths,
        mig_never_gives_up,
        mig_raises,
        mig_strictly_smaller,
        mig_name_only,
        mig_by_packing,
    ],
    "B1.3": [
        capacity_all_memory,
        capacity_query_heads,
        capacity_keys_only,
        capacity_below_zero,
        capacity_without_activations,
        capacity_weights_on_every_gpu,
        capacity_of_parts_of_blocks,
        capacity_rounds_up,
        capacity_gib,
        capacity_takes_anything,
        capacity_tokens_only,
    ],
}
