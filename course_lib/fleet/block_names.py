"""Names of the KV blocks of simulated requests.

The engine names a full block by a hash over all its tokens. What a simulation computes is a few
long runs of equal tokens, so here one hash is made for each run, and a block is named by the run in
which it ends and by its place. As in the engine, equal names mean equal tokens from the first on.
"""

from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from itertools import groupby

from course_lib.traces.trace import Segment


def contents_of(token_ids: Sequence[int]) -> list[Segment]:
    """Tokens as runs of equal ones."""
    return [Segment(token, len(list(run))) for token, run in groupby(token_ids)]


def block_names(contents: Iterable[Segment], block_size: int) -> list[bytes]:
    """Names of the full blocks of a request.

    Args:
        contents: its prompt, and the reply that it will get.
        block_size: tokens in a block.
    """
    names: list[bytes] = []
    digest, end = b"", 0
    for content, tokens in _merged(contents):
        start, end = end, end + tokens
        digest = blake2b(digest + b"%d %d" % (start, content), digest_size=32).digest()
        names += [digest + b"%d" % place for place in range(len(names), end // block_size)]
    return names


def _merged(contents: Iterable[Segment]) -> Iterator[Segment]:
    """Nobody can tell where a segment ends if the same content follows, or that one is empty."""
    filled = (segment for segment in contents if segment.tokens)
    for content, segments in groupby(filled, key=lambda segment: segment.content):
        yield Segment(content, sum(segment.tokens for segment in segments))
