"""How long prompts and replies are: a number, a uniform distribution, or a measured one.

The measured ones are those of chats at Azure. They are kept as quantiles and not as a formula,
because people and programs send prompts of certain lengths again and again: a quarter of Azure's
have 1,020 to 1,190 tokens, and no bell curve has such steps.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from course_lib.validation import number, whole_number

#: Fixed, or (lowest, highest) of a uniform distribution, both included. In tokens.
Lengths = int | tuple[int, int]


@dataclass(frozen=True)
class Quantiles:
    """A measured distribution.

    Args:
        points: (share of all that are at most so long, tokens), from share 0 to share 1. Lengths
            between two points are equally likely.

    Raises:
        ValueError: the points do not go up from 0 to 1, or a length is below 1.
    """

    points: tuple[tuple[float, int], ...]

    def __post_init__(self) -> None:
        before_share, before_tokens = 0.0, 1
        for share, tokens in self.points:
            number("share of a quantile", share, at_least=before_share, at_most=1)
            whole_number(f"tokens at share {share:g}", tokens, at_least=before_tokens)
            before_share, before_tokens = share, tokens
        if not self.points or self.points[0][0] != 0 or self.points[-1][0] != 1:
            raise ValueError("the points of quantiles must begin at share 0 and end at share 1")


#: Quantiles of the 19,366 chats in AzureLLMInferenceTrace_conv.csv of 2023, CC-BY, at
#: https://github.com/Azure/AzurePublicDataset; described in Patel et al., Splitwise, ISCA 2024.
AZURE_CHAT_PROMPTS = Quantiles(
    ((0, 2), (0.01, 29), (0.05, 181), (0.1, 207), (0.15, 372), (0.2, 387), (0.3, 403),
     (0.35, 414), (0.4, 703), (0.45, 984), (0.5, 1020), (0.6, 1071), (0.7, 1130), (0.8, 1315),
     (0.85, 1876), (0.9, 2734), (0.92, 4073), (0.95, 4083), (0.99, 4142), (0.999, 6179),
     (1, 14050))
)  # fmt: skip
AZURE_CHAT_REPLIES = Quantiles(
    ((0, 7), (0.01, 16), (0.05, 41), (0.1, 54), (0.2, 77), (0.3, 91), (0.4, 103), (0.5, 129),
     (0.6, 177), (0.65, 217), (0.67, 371), (0.7, 384), (0.8, 400), (0.9, 424), (0.95, 451),
     (0.99, 601), (0.999, 954), (1, 1000))
)  # fmt: skip


def check_lengths(name: str, lengths: Lengths) -> None:
    """Refuse what is no length of at least 1 token.

    Raises:
        ValueError: it is none, or the limits are in the wrong order.
    """
    if isinstance(lengths, tuple) and len(lengths) == 2:
        low = whole_number(f"{name}[0]", lengths[0])
        whole_number(f"{name}[1]", lengths[1], at_least=low)
    else:
        whole_number(name, lengths)


def draw_lengths(
    rng: np.random.Generator, name: str, lengths: Lengths | Quantiles, count: int
) -> NDArray[np.int64]:
    """So many lengths, in tokens.

    Raises:
        ValueError: `lengths`, which the message calls `name`, is none of the three kinds.
    """
    if isinstance(lengths, Quantiles):
        shares, tokens = zip(*lengths.points, strict=True)
        return np.rint(np.interp(rng.random(count), shares, tokens)).astype(np.int64)
    check_lengths(name, lengths)
    low, high = lengths if isinstance(lengths, tuple) else (lengths, lengths)
    return rng.integers(low, high, count, endpoint=True)
