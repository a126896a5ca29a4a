"""Which slice of a GPU a small model fits, and how many replicas that makes.

Multi-Instance GPU cuts an A100, H100 or H200 into at most seven instances that do not share memory,
cache or compute. It helps only where weights and KV cache fit the slice; `mig_fits` says for each
profile whether they do. GPUs without MIG have no profiles, so for them the answer is empty.
"""

from dataclasses import dataclass

from course_lib.sizing.catalog import Gpu, MigProfile
from course_lib.validation import number


@dataclass(frozen=True)
class MigFit:
    """A profile, and whether a replica fits an instance of it."""

    profile: MigProfile
    usable_gb: float
    fits: bool
    replicas_per_gpu: int  # 0 where it does not fit
    bandwidth_gb_s: float  # the instance's share of the GPU's


def mig_fits(required_gb: float, gpu: Gpu) -> tuple[MigFit, ...]:
    """Try a replica of `required_gb` (weights, KV cache and overhead) in every profile of a GPU.

    Of an instance the same share counts as usable as of the whole GPU.

    Raises:
        ValueError: `required_gb` is not a number above 0.
    """
    number("required_gb", required_gb, above=0)
    fits = []
    for profile in gpu.mig:
        usable_gb = profile.memory_gb * gpu.usable_gb / gpu.memory_gb
        does_fit = required_gb <= usable_gb
        fits.append(
            MigFit(
                profile,
                usable_gb,
                does_fit,
                profile.max_instances if does_fit else 0,
                gpu.bandwidth_gb_s * profile.memory_slices / 8,
            )
        )
    return tuple(fits)


def best_mig_fit(required_gb: float, gpu: Gpu) -> MigFit | None:
    """The fit with the most replicas, of those the one with the least memory; None if none fits.

    Raises:
        ValueError: as `mig_fits`.
    """
    fits = [fit for fit in mig_fits(required_gb, gpu) if fit.fits]
    return max(fits, key=lambda fit: (fit.replicas_per_gpu, -fit.usable_gb), default=None)
