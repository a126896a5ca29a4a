"""How long a step takes: what the fleet simulator has in place of a model runner.

    model = FittedStepTime.fit(samples)  # measured steps, see `fleet.calibration`
    model = RooflineStepTime(find_model("Llama-3-8B"), find_gpu("H100_80GB"))  # from datasheets
    model.seconds(StepWork.of(batch))

Any subclass of `StepTimeModel` with a `seconds` will do.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from course_lib.engine.batch import ScheduledRequest
from course_lib.sizing.catalog import Gpu, ModelShape
from course_lib.sizing.roofline import Phase, Roofline
from course_lib.validation import number

#: 0, 1, 2 ...: how many steps later. Made once for the runs of decodes that are asked for most.
_LATER = np.arange(4096.0)

#: A step whose relative error is so many times the median one is a pause.
OUTLIER = 6.0
FIT_ROUNDS = 4


@dataclass(frozen=True, slots=True)
class StepWork:
    """What one step of a replica computes.

    A request that computes one token is a decode, one that computes more is a prefill.

    Args:
        prefill_tokens: tokens of the prefills.
        prefill_pairs: of a token of theirs and one that it attends to: a chunk of q tokens after s
            computed ones has q * s + q * (q + 1) // 2.
        num_decodes: requests that compute one token.
        context_tokens: tokens of the KV cache that these read, the new one of each included.
        num_prefills: requests that compute more than one token.
    """

    prefill_tokens: int = 0
    prefill_pairs: int = 0
    num_decodes: int = 0
    context_tokens: int = 0
    num_prefills: int = 0

    @classmethod
    def of(cls, scheduled: Iterable[ScheduledRequest]) -> "StepWork":
        """The work of a batch's `scheduled`."""
        prefill_tokens = prefill_pairs = num_decodes = context_tokens = num_prefills = 0
        for entry in scheduled:
            tokens = entry.num_tokens
            if tokens == 1:
                num_decodes += 1
                context_tokens += entry.start + 1
            else:
                num_prefills += 1
                prefill_tokens += tokens
                prefill_pairs += tokens * entry.start + tokens * (tokens + 1) // 2
        return cls(prefill_tokens, prefill_pairs, num_decodes, context_tokens, num_prefills)


class StepTimeModel(ABC):
    """From the work of a step to its duration."""

    @abstractmethod
    def seconds(self, work: StepWork) -> float:
        """The duration of one step, the host's part included."""

    def decode_seconds(
        self, num_decodes: int, context_tokens: int, num_steps: int
    ) -> NDArray[np.float64]:
        """Durations of consecutive steps of nothing but decodes, to the last bit as `seconds`.

        Args:
            num_decodes: requests in each of the steps.
            context_tokens: of the first step; each later one has `num_decodes` more.
            num_steps: how many durations.
        """
        contexts = (context_tokens + later * num_decodes for later in range(num_steps))
        return np.array([self.seconds(StepWork(0, 0, num_decodes, c)) for c in contexts])


@dataclass(frozen=True)
class FittedStepTime(StepTimeModel):
    """Each kind of work costs so much, and so does the step itself.

    Args:
        step_s: of any step.
        batch_s: of a step with more than one token, whose products are of matrices with matrices.
        prefill_token_s: for each token of a prefill.
        prefill_pair_s: for each pair of a prefill's token and one that it attends to.
        prefill_request_s: for each prefill.
        decode_request_s: for each decode.
        context_token_s: for each token of the KV cache that decodes read.

    Raises:
        ValueError: one of them is not a number of at least 0.
    """

    step_s: float = 0.0
    batch_s: float = 0.0
    prefill_token_s: float = 0.0
    prefill_pair_s: float = 0.0
    prefill_request_s: float = 0.0
    decode_request_s: float = 0.0
    context_token_s: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            number(field.name, getattr(self, field.name), at_least=0)

    def seconds(self, work: StepWork) -> float:
        """The sum of all parts."""
        # Decodes first: then a step without prefills adds 0 to what `decode_seconds` computes.
        num_decodes = work.num_decodes
        decodes = self._step_of(num_decodes) + self.context_token_s * work.context_tokens
        if not work.num_prefills:
            return decodes
        if num_decodes < 2:
            decodes += self.batch_s
        return decodes + (
            self.prefill_request_s * work.num_prefills
            + self.prefill_token_s * work.prefill_tokens
            + self.prefill_pair_s * work.prefill_pairs
        )

    def decode_seconds(
        self, num_decodes: int, context_tokens: int, num_steps: int
    ) -> NDArray[np.float64]:
        """As the base class says, in four operations on arrays."""
        durations = _later(num_steps) * num_decodes
        durations += context_tokens
        durations *= self.context_token_s
        durations += self._step_of(num_decodes)
        return durations

    def _step_of(self, num_decodes: int) -> float:
        """Of so many decodes, their contexts aside."""
        step_s = self.step_s + self.batch_s if num_decodes > 1 else self.step_s
        return step_s + self.decode_request_s * num_decodes

    @classmethod
    def fit(cls, samples: Sequence[tuple[StepWork, float]]) -> "FittedStepTime":
        """The coefficients, none below 0, with the least relative errors on measured steps.

        Errors are relative to what is predicted: relative to what was measured, noise would make
        steps look shorter than they are on average. A pause is no property of a step, so steps
        that are missed by far are left out.

        Args:
            samples: the work of a step and the seconds that it took.

        Raises:
            ValueError: there are no samples, or one did not take any time.
        """
        if not samples:
            raise ValueError("a fit needs measured steps, got none")
        seconds = np.array([number("seconds", seconds, above=0) for _, seconds in samples])
        features = np.array([_features(work) for work, _ in samples])
        expected, kept = seconds, np.ones(len(seconds), dtype=bool)
        for _ in range(FIT_ROUNDS):
            weights = 1 / expected[kept]
            coefficients = _non_negative_least_squares(
                features[kept] * weights[:, None], seconds[kept] * weights
            )
            expected = features @ coefficients
            errors = np.abs(seconds / expected - 1)
            kept = errors <= OUTLIER * np.median(errors) + 1e-9
        return cls(*coefficients.tolist())


class RooflineStepTime(StepTimeModel):
    """A model and a GPU of the catalogue: the floor of `sizing.roofline`, or a share of the peaks.

    Args:
        model: its sizes.
        gpu: its peaks.
        gpus: tensor-parallel GPUs.
        weights: how they are stored: "bf16", "fp8", "int4" ...
        kv_bytes: bytes a number of the KV cache.
        overhead_s: of each step, when the GPU waits for the host.
        compute_efficiency: the share of the peak of flops that kernels reach, above 0 to 1.
        bandwidth_efficiency: the share of the memory's bandwidth that they reach. At 1, as by
            default, and without overhead a step takes the least that it can.

    Raises:
        ValueError: a number is out of its range, or the precision is unknown.
    """

    def __init__(
        self,
        model: ModelShape,
        gpu: Gpu,
        gpus: int = 1,
        weights: str = "bf16",
        kv_bytes: float = 2,
        *,
        overhead_s: float = 0.0,
        compute_efficiency: float = 1.0,
        bandwidth_efficiency: float = 1.0,
    ) -> None:
        self.roofline = Roofline(model, gpu, gpus, weights, kv_bytes)
        self.overhead_s = number("overhead_s", overhead_s, at_least=0)
        self.compute_efficiency = number(
            "compute_efficiency", compute_efficiency, above=0, at_most=1
        )
        self.bandwidth_efficiency = number(
            "bandwidth_efficiency", bandwidth_efficiency, above=0, at_most=1
        )

    def seconds(self, work: StepWork) -> float:
        """The larger of compute and memory time, then communication and overhead."""
        phase = self.roofline.step(
            work.prefill_tokens,
            work.prefill_pairs,
            work.num_prefills,
            work.num_decodes,
            work.context_tokens,
        )
        return max(self._parts(phase)) + (phase.communication_s + self.overhead_s)

    def decode_seconds(
        self, num_decodes: int, context_tokens: int, num_steps: int
    ) -> NDArray[np.float64]:
        """As the base class says, for all contexts at once."""
        contexts = _later(num_steps) * num_decodes + context_tokens
        phase = self.roofline.step(0, 0, 0, num_decodes, contexts)  # type: ignore[arg-type]
        durations: NDArray[np.float64] = np.maximum(*self._parts(phase))
        durations += phase.communication_s + self.overhead_s
        return durations

    def _parts(self, phase: Phase) -> tuple[float, float]:
        return (
            phase.compute_s / self.compute_efficiency,
            phase.memory_s / self.bandwidth_efficiency,
        )


def _later(num_steps: int) -> NDArray[np.float64]:
    """0, 1, 2 ...: how many steps later; not to be changed."""
    return _LATER[:num_steps] if num_steps <= len(_LATER) else np.arange(float(num_steps))


def _features(work: StepWork) -> tuple[float, ...]:
    """In the order of the coefficients."""
    tokens, pairs, decodes, context, prefills = astuple(work)
    return (1.0, tokens + decodes > 1, tokens, pairs, prefills, decodes, context)


def _non_negative_least_squares(
    matrix: NDArray[np.float64], target: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The x of at least 0 with the least |matrix @ x - target|.

    It is the ordinary solution over those columns that it uses. There are few, so all choices of
    them are tried.
    """
    num_columns = matrix.shape[1]
    scale = np.maximum(np.abs(matrix).max(axis=0), 1e-300)
    q, r = np.linalg.qr(matrix / scale)
    target = q.T @ target
    best, best_error = np.zeros(num_columns), float(target @ target)
    for size in range(1, num_columns + 1):
        for columns in map(list, combinations(range(num_columns), size)):
            found = np.linalg.lstsq(r[:, columns], target, rcond=None)[0]
            error = float(np.sum((r[:, columns] @ found - target) ** 2))
            if found.min() >= 0 and error < best_error:
                best, best_error = np.zeros(num_columns), error
                best[columns] = found
    return best / scale
