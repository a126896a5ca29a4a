"""Which replica was sent which beginnings of prompts: what a router knows without asking.

`PrefixHistory` is a tree of chunks of tokens. Each node stands for all tokens from the root to it
and names the replicas that were sent a prompt which begins so. It does not see what a replica
evicts; instead it forgets in the same order, least recently used first and ends before beginnings,
once a replica was sent more than its cache holds. `RecentPrompts` tells which beginnings come most.
"""

from array import array
from collections import Counter, OrderedDict, deque
from collections.abc import Sequence, Set

#: A prompt, cut into the bytes of its full chunks.
Chunks = list[bytes]


def cut(prompt_token_ids: Sequence[int], chunk_tokens: int) -> Chunks:
    """The prompt's full chunks; what is left at its end is in none."""
    data = array("q", prompt_token_ids)
    size = chunk_tokens * data.itemsize
    whole = data.tobytes()
    return [whole[end - size : end] for end in range(size, len(whole) + 1, size)]


class _Node:
    __slots__ = ("children", "chunk", "holders", "parent")

    def __init__(self, parent: "_Node | None", chunk: bytes) -> None:
        self.parent = parent
        self.chunk = chunk
        self.children: dict[bytes, _Node] = {}
        self.holders: set[str] = set()


class PrefixHistory:
    """Who holds which beginnings, by name. A replica that holds one holds all shorter ones."""

    def __init__(self) -> None:
        self._root = _Node(None, b"")
        # For each replica the nodes it holds, the least recently used first. A node is used after
        # those that follow it, so the first one always is an end.
        self._held: dict[str, OrderedDict[_Node, None]] = {}

    def longest_match(self, chunks: Chunks, names: Set[str]) -> tuple[int, Set[str]]:
        """How many chunks, from the first on, any of these replicas holds, and which ones do."""
        node, count = self._root, 0
        for chunk in chunks:
            child = node.children.get(chunk)
            if child is None or child.holders.isdisjoint(names):
                break
            node, count = child, count + 1
        return count, node.holders & names

    def add(self, chunks: Chunks, name: str, max_chunks: int) -> None:
        """The replica holds this prompt now, and of all prompts at most so many chunks."""
        held = self._held.setdefault(name, OrderedDict())
        path = []
        node = self._root
        for chunk in chunks:
            child = node.children.get(chunk)
            if child is None:
                child = node.children[chunk] = _Node(node, chunk)
            child.holders.add(name)
            path.append(child)
            node = child
        for node in reversed(path):
            held[node] = None
            held.move_to_end(node)
        while len(held) > max_chunks:
            node, _ = held.popitem(last=False)
            self._drop(node, name)

    def num_chunks(self, name: str) -> int:
        """How many the replica holds."""
        return len(self._held.get(name, ()))

    def forget(self, name: str) -> None:
        """The replica holds nothing any more."""
        for node in self._held.pop(name, ()):
            self._drop(node, name)

    @staticmethod
    def _drop(node: _Node, name: str) -> None:
        node.holders.discard(name)
        if not node.holders:  # then nobody holds what follows it either
            assert node.parent is not None
            del node.parent.children[node.chunk]


class RecentPrompts:
    """The prompts that came last.

    Args:
        max_prompts: so many are kept.
    """

    def __init__(self, max_prompts: int) -> None:
        self._prompts: deque[Chunks] = deque(maxlen=max_prompts)

    def add(self, chunks: Chunks) -> None:
        """A request came with this prompt."""
        self._prompts.append(chunks)

    def most_common(self, count: int) -> list[list[int]]:
        """Beginnings that at least two of the prompts share, the most frequent first.

        Of equally frequent ones the longest comes first, and no beginning of one that came before
        is named again. At most `count`.
        """
        prefixes: dict[tuple[int, bytes], int] = {}  # a prefix and a chunk make a longer prefix
        uses: Counter[int] = Counter()
        for chunks in self._prompts:
            prefix = 0
            for chunk in chunks:
                prefix = prefixes.setdefault((prefix, chunk), len(prefixes) + 1)
                uses[prefix] += 1
        made_of = {prefix: step for step, prefix in prefixes.items()}
        lengths = {0: 0}
        for prefix, (shorter, _) in made_of.items():
            lengths[prefix] = lengths[shorter] + 1

        found: list[list[int]] = []
        named: set[int] = set()
        for prefix in sorted(uses, key=lambda p: (-uses[p], -lengths[p])):
            if len(found) == count or uses[prefix] < 2:
                break
            if prefix in named:
                continue
            chunks = []
            while prefix:
                named.add(prefix)
                prefix, chunk = made_of[prefix]
                chunks.append(chunk)
            found.append(array("q", b"".join(reversed(chunks))).tolist())
        return found
