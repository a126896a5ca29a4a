"""The oracle of B2.3: a block pool by contents, and the histories that are played on it.

`_Model` knows by the rules of the notebook what may be found, shared and evicted, and never hands
out a block itself. `_Game` makes each call on the student's pool and compares with it. Stories show
one rule each; random histories come after them.
"""

import random
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

from matplotlib.figure import Figure

from course_lib.classroom.checks import Mismatch, compare
from course_lib.classroom.plots.differences import plot_pool
from course_lib.classroom.stands import BlockPoolStand, stand_beside
from course_lib.engine.request import Request

Content = tuple[str | None, str | None, tuple[int, ...]]


@dataclass
class _Model:
    """A pool by contents: what each block holds, and in which order the free ones are reused.

    It hands out no blocks itself. It says which ones may be handed out, and takes over what the
    student's pool did.
    """

    num_blocks: int
    block_size: int
    reuse: bool
    empty: set[int] = field(default_factory=set)
    cached_free: list[int] = field(default_factory=list)  # the first is evicted first
    owners: dict[int, list[str]] = field(default_factory=dict)
    content_of: dict[int, Content] = field(default_factory=dict)
    block_of: dict[Content, int] = field(default_factory=dict)
    named: dict[str, int] = field(default_factory=dict)  # blocks of a request that were considered
    undecided: bool = False  # the rules leave open what comes next

    def __post_init__(self) -> None:
        self.empty = set(range(1, self.num_blocks))

    @property
    def num_free(self) -> int:
        return len(self.empty) + len(self.cached_free)

    @property
    def usage(self) -> float:
        return 1 - self.num_free / (self.num_blocks - 1)

    def content(self, request: Request, index: int) -> Content:
        tokens = tuple(request.token_ids[: (index + 1) * self.block_size])
        return (request.lora_name, request.cache_salt, tokens)

    def hits(self, request: Request) -> list[int]:
        blocks: list[int] = []
        while self.reuse and (len(blocks) + 1) * self.block_size < request.num_tokens:
            block = self.block_of.get(self.content(request, len(blocks)))
            if block is None:
                break
            blocks.append(block)
        return blocks

    def missing(self, request: Request, num_tokens: int, hits: Sequence[int]) -> int:
        """Free blocks that it takes: new ones, and hits that nobody owns."""
        there = len(request.block_ids) + len(hits)
        taken_back = sum(1 for block in hits if block not in self.owners)
        return max(0, -(-num_tokens // self.block_size) - there) + taken_back

    def next_blocks(self, count: int, hits: Sequence[int]) -> tuple[set[int], set[int]]:
        """Those that may be handed out next, empty ones, and those that must be, evicted ones."""
        evictable = [block for block in self.cached_free if block not in hits]
        return self.empty, set(evictable[: max(0, count - len(self.empty))])

    def take(self, request: Request, hits: Sequence[int], new: Sequence[int], total: int) -> None:
        """Book an allocation that the pool has made."""
        name = request.request_id
        for block in hits:
            if block in self.cached_free:
                self.cached_free.remove(block)
            self.owners.setdefault(block, []).append(name)
        for block in new:
            if block in self.cached_free:
                self.cached_free.remove(block)
                del self.block_of[self.content_of.pop(block)]
            self.empty.discard(block)
            self.owners[block] = [name]
        first = self.named.get(name, len(hits))
        full = min(total, request.num_tokens) // self.block_size
        for index in range(first, full if self.reuse else 0):
            content, block = self.content(request, index), request.block_ids[index]
            if content not in self.block_of:
                self.block_of[content], self.content_of[block] = block, content
        self.named[name] = max(first, full)

    def leave(self, request: Request, blocks: Sequence[int]) -> None:
        """Book that the request gave up its blocks."""
        for block in reversed(blocks):
            self.owners[block].remove(request.request_id)
            if not self.owners[block]:
                del self.owners[block]
                if block in self.content_of:
                    self.cached_free.append(block)
                else:
                    self.empty.add(block)
        self.named.pop(request.request_id, None)

    def is_undecided(self, running: Sequence[Request]) -> bool:
        """Whether a running request holds a copy of something that was evicted since.

        The rules do not say whether the copy gets the name then.
        """
        return self.reuse and any(
            self.content(request, index) not in self.block_of
            for request in running
            for index in range(self.named.get(request.request_id, 0))
        )


class _Game:
    """Plays a history on the student's pool and on the model, and compares after every call."""

    def __init__(
        self, answer: Callable[..., Any], usable_blocks: int, block_size: int, reuse: bool = True
    ) -> None:
        stand = stand_beside(answer, BlockPoolStand)
        self.pool = stand(usable_blocks + 1, block_size, enable_prefix_caching=reuse)
        self.model = _Model(usable_blocks + 1, block_size, reuse)
        self.block_size = block_size
        self.guessed = False
        self.setting = f"{usable_blocks} blocks of {block_size} tokens" + (
            "" if reuse else ", enable_prefix_caching=False"
        )
        self.log: list[str] = []
        self.requests: dict[str, Request] = {}
        self.running: list[Request] = []
        self.num_probes = 0
        for name, value in (("num_blocks", usable_blocks + 1), ("block_size", block_size)):
            compare(self.pool.look(name), value, f"the pool's {name}")

    # What a scheduler does

    def request(self, tokens: Sequence[int], **keys: str) -> Request:
        """A new request. Its tokens are digits, so that messages can show them."""
        name = "abcdefghijklmnopqrstuvwxyz"[len(self.requests)]
        request = Request(name, list(tokens), **keys)  # type: ignore[arg-type]
        self.requests[name] = request
        self.log.append(f"{name} has {self._spelled(request)}")
        return request

    def start(self, request: Request, num_new: int | None = None) -> bool:
        """Look up a waiting request and give it room, for all of it or for a first chunk."""
        hits = self.match(request)
        self._can_admit(request, hits)
        rest = request.num_tokens - len(hits) * self.block_size
        if self.allocate(request, min(rest, num_new or rest), hits):
            self.running.append(request)
            return True
        return False

    def go_on(
        self, request: Request, sampled: Sequence[int] = (), drafts: int = 0, accepted: int = 0
    ) -> bool:
        """Compute what is known, and optionally guesses; then come the tokens sampled.

        Of the guesses the first `accepted` are right, so they are among the tokens sampled.
        """
        num_new = request.num_tokens + drafts - request.num_computed_tokens
        self.guessed |= drafts > 0
        if not self.allocate(request, num_new):
            return False
        request.num_computed_tokens -= drafts - accepted
        request.token_ids += sampled
        return True

    def leave(self, request: Request) -> None:
        """The end, or a preemption: all blocks are given up."""
        blocks = list(request.block_ids)
        self.log.append(f"free({request.request_id})")
        self._call("free", request)
        self.model.leave(request, blocks)
        request.num_computed_tokens = 0
        if request in self.running:
            self.running.remove(request)
        if list(request.block_ids):
            self._differs(
                f"{self.log[-1]} left the block_ids of {request.request_id} at {request.block_ids}",
                "At its end, free empties request.block_ids: the blocks are no longer its own.",
            )
        self._compare_usage(
            "A block is free when its last owner is gone: lower its reference count, and put it "
            "into the free list if the count is 0."
        )
        self._look()

    def reset(self) -> None:
        """Forget all contents; nobody runs."""
        self.log.append("reset_prefix_cache()")
        self._call("reset_prefix_cache")
        self.model.empty |= set(self.model.cached_free)
        self.model.cached_free, self.model.block_of, self.model.content_of = [], {}, {}
        self._look()

    def match(self, request: Request, quietly: bool = False) -> list[int]:
        """Look up a request."""
        expected, ids = self.model.hits(request), list(request.block_ids)
        got = self._call("match_prefix", request)
        outcome = f"match_prefix for {self._spelled(request)}"
        if not isinstance(got, list | tuple):
            self._differs(f"{outcome} gave {got!r}", "match_prefix returns a list of block ids.")
        if list(got) != expected:
            self._differs(
                f"{outcome}: expected {expected}, got {list(got)}",
                self._why_other_hits(request, list(got), expected),
            )
        if list(request.block_ids) != ids:
            self._differs(f"{outcome} changed its block_ids", "match_prefix only looks.")
        if not quietly:
            self.log.append(f"match_prefix({request.request_id}) = {expected}")
        return expected

    def allocate(self, request: Request, num_new: int, hits: Sequence[int] = ()) -> bool:
        """Give room for so many tokens; whether there was enough."""
        total = request.num_computed_tokens + len(hits) * self.block_size + num_new
        needed = self.model.missing(request, total, hits)
        fits, free = needed <= self.model.num_free, self.model.num_free
        before = list(request.block_ids)
        call = f"allocate({request.request_id}, {num_new}" + (f", {list(hits)})" if hits else ")")
        self.log.append(call)
        got = self._call("allocate", request, num_new, list(hits))
        if got is None or bool(got) != fits:
            self._differs(
                f"{call}: expected {fits}, got {got!r}; {free} blocks are free",
                f"It takes {needed} free blocks to hold {total} tokens, hits on blocks that nobody "
                "owns included. True if they are there, else False.",
            )
        self.log[-1] = f"{call} = " + (f"True, block_ids {request.block_ids}" if fits else "False")
        if fits:
            self._compare_new_blocks(request, before, list(hits), total)
            request.num_computed_tokens = total
            self.model.undecided |= self.model.is_undecided([*self.running, request])
        elif list(request.block_ids) != before:
            self._differs(
                f"{call} failed, but block_ids went from {before} to {request.block_ids}", _FIRST
            )
        self._compare_usage(
            "Owned are the blocks in the block tables, each counted once, the null block never."
            if fits
            else _FIRST
        )
        self._look()
        return fits

    # Comparing

    def _call(self, method: str, request: Request | None = None, *arguments: Any) -> Any:
        """A call to the student's pool; if it raises, the message tells what went before."""
        try:
            if request is None:
                return self.pool.call(method)
            keys = (request.lora_name, request.cache_salt)
            state = (request.token_ids, request.num_computed_tokens, *keys)
            got, block_ids = self.pool.call_for(method, request.request_id, state, *arguments)
            request.block_ids = list(block_ids)
            return got
        except NotImplementedError:
            raise
        except Exception as error:
            if type(error).__module__.startswith("course_lib.classroom"):
                raise  # out of time, or not the student's own
            frame = traceback.extract_tb(error.__traceback__)[-1]
            hint = "If there is no room, return False." if method == "allocate" else None
            self._differs(
                f"{method} raised {type(error).__name__}: {error} (at `{frame.line}`)", hint
            )

    def _differs(self, what: str, hint: str | None) -> NoReturn:
        calls = self.log if len(self.log) <= 14 else ["...", *self.log[-14:]]
        message = f"{what}\nCalls before, with {self.setting}: {'; '.join(calls)}"
        raise Mismatch(message, hint, self._picture())

    def _picture(self) -> Callable[[], Figure]:
        """Of the pool as it is now: the blocks by the rules, the tables as they came."""
        model, size = self.model, self.block_size
        contents = {block: tokens[-size:] for block, (_, _, tokens) in model.content_of.items()}
        for request in self.requests.values():
            for index, block in enumerate(request.block_ids):
                tokens = request.token_ids[: request.num_computed_tokens]
                contents.setdefault(block, tuple(tokens[index * size : (index + 1) * size]))
        return partial(
            plot_pool,
            {block: "".join(map(str, tokens)) for block, tokens in contents.items()},
            {block: list(who) for block, who in model.owners.items()},
            list(model.cached_free),
            model.num_blocks,
            {name: list(request.block_ids) for name, request in self.requests.items()},
            self.log[-1] if self.log else "it was made",
        )

    def _why_other_hits(self, request: Request, got: list[int], expected: list[int]) -> str:
        most = (request.num_tokens - 1) // self.block_size
        if not self.model.reuse:
            return "Without enable_prefix_caching nothing is ever found: return []."
        if len(got) > most:
            return (
                "At least the last token must be computed, for there to be something to sample "
                f"from: look at (num_tokens - 1) // block_size blocks, here {most}."
            )
        wrong = next(
            (i for i, pair in enumerate(zip(got, expected, strict=False)) if pair[0] != pair[1]),
            min(len(got), len(expected)),
        )
        if wrong < len(got):
            return self._why_wrong_hit(request, got[wrong], wrong)
        if expected[wrong] in self.model.cached_free:
            return (
                f"Block {expected[wrong]} is free but still holds this. It keeps its name until it "
                "is handed out again."
            )
        guesses = ", also one in which a guess turned out right" if self.guessed else ""
        return (
            f"Block {expected[wrong]} holds this, too. A lookup goes on until the first miss, and "
            f"allocate names every block that is full by now{guesses}, also while it is in use."
        )

    def _why_wrong_hit(self, request: Request, block: int, index: int) -> str:
        asked = self.model.content(request, index)
        held = self.model.content_of.get(block)
        if held is None:
            for owner in self.requests.values():
                if block not in owner.block_ids[index : index + 1]:
                    continue
                if self.model.content(owner, index) == asked:
                    certain = min(owner.num_computed_tokens, owner.num_tokens)
                    if certain < (index + 1) * self.block_size:
                        return f"Block {block} is not full yet. Name what this step fills, no more."
                    return (
                        f"Block {block} is a copy. A name that another block has already stays "
                        "there, and the copy gets none."
                    )
            return (
                f"Block {block} does not hold that (any more). When a block is handed out anew, "
                "forget its hash and its entry in cached_blocks. A block with a guess has no name."
            )
        if held[:2] != asked[:2]:
            return "Requests with another LoRA adapter or salt share nothing."
        if len(held[2]) > len(asked[2]):
            return "Stop at the first block that is not found."
        return "Equal tokens are not enough: all that stands before the block counts as well."

    def _can_admit(self, request: Request, hits: list[int]) -> None:
        needed = self.model.missing(request, request.num_tokens, hits)
        expected = needed <= self.model.num_free
        got = self._call("can_admit", request, list(hits))
        if bool(got) != expected or got is None:
            self._differs(
                f"can_admit({request.request_id}, {hits}): expected {expected}, got {got!r}; "
                f"{self.model.num_free} blocks are free",
                f"All {request.num_tokens} known tokens must fit: {needed} free blocks. A hit on a "
                "block that nobody owns takes it off the free list, so it counts; a hit on an "
                "owned block costs nothing.",
            )

    def _compare_new_blocks(
        self, request: Request, before: list[int], hits: list[int], total: int
    ) -> None:
        ids, call = list(request.block_ids), self.log[-1]
        kept = before + hits
        if ids[: len(kept)] != kept:
            self._differs(
                f"{call}: expected block_ids to begin with {kept}",
                "First the blocks that the request has, then the prefix blocks, then new ones.",
            )
        expected = max(len(kept), -(-total // self.block_size))
        if len(ids) != expected:
            self._differs(
                f"{call}: {total} tokens need {expected} blocks, got {len(ids)}",
                "ceil(tokens / block_size): one that is exactly full needs no block behind it, and "
                "one token more does. Do not count the blocks it has already twice.",
            )
        new = ids[len(kept) :]
        empty, evicted = self.model.next_blocks(len(new), hits)
        for block in new:
            if ids.count(block) > 1 or block not in empty | evicted:
                self._differs(
                    f"{call}: block {block} was handed out", self._why_not(block, ids, len(new))
                )
        self.model.take(request, hits, new, total)

    def _why_not(self, block: int, ids: list[int], count: int) -> str:
        if block == 0:
            return "Block 0 is the null block, which padding points to. It is never handed out."
        if block in self.model.owners or ids.count(block) > 1:
            return (
                "It is somebody's own. A block is free only when its reference count is 0; a hit "
                "raises the count, each free lowers it by one."
            )
        if block not in self.model.cached_free:
            return f"There are blocks 1 to {self.model.num_blocks - 1}."
        if len(self.model.empty) >= count:
            return (
                f"It can still be found by its name, and {sorted(self.model.empty)} hold nothing "
                "that can be reused: those come first."
            )
        return (
            "Evict what was freed longest ago first, and of one request the last block first: "
            f"now in the order {self.model.cached_free}. A block that was taken back and freed "
            "again is the latest."
        )

    def _compare_usage(self, hint: str) -> None:
        got, usable = self.pool.look("usage"), self.model.num_blocks - 1
        try:
            compare(got, self.model.usage, "usage")
        except Mismatch:
            self._differs(
                f"usage after {self.log[-1]}: expected {self.model.usage:.4g} "
                f"({len(self.model.owners)} of {usable} blocks have an owner), got {got!r}",
                hint,
            )

    def _look(self) -> None:
        """Look up every sequence so far and one token more: is it found, as far as it is there?"""
        if self.model.undecided:
            return
        for request in list(self.requests.values())[-8:]:
            self.num_probes += 1
            probe = Request(f"probe {self.num_probes}", [*request.token_ids, 0])
            probe.lora_name, probe.cache_salt = request.lora_name, request.cache_salt
            self.match(probe, quietly=True)

    def _spelled(self, request: Request) -> str:
        """The tokens as digits with a gap after each block, and the extra keys."""
        size, tokens = self.block_size, request.token_ids
        blocks = ("".join(map(str, tokens[i : i + size])) for i in range(0, len(tokens), size))
        keys = {"lora_name": request.lora_name, "cache_salt": request.cache_salt}
        return " ".join(blocks) + "".join(f" ({key} {v})" for key, v in keys.items() if v)


_FIRST = "A call that fails changes nothing. Count what is needed first, then change things."


def _digits(text: str) -> list[int]:
    return [int(digit) for digit in text if digit != " "]


def verify_block_pool(answer: Callable[..., Any], rng: random.Random) -> None:
    """A few short stories, one for each rule, then long random histories."""
    for story in _STORIES:
        story(answer, rng)
    for number in range(60):
        _random_history(answer, rng, reuse=number % 6 < 5)


def _boundaries(answer: Callable[..., Any], rng: random.Random) -> None:
    """Whole and begun blocks, at once and token by token."""
    for num_tokens in (1, 3, 4, 5, 8, 9, 12):
        game = _Game(answer, 3, 4)
        assert game.start(game.request([1] * num_tokens))
    game = _Game(answer, 3, 4)
    a = game.request(_digits("12"))
    game.start(a)
    for token in range(3, 10):
        a.token_ids.append(token)
        game.go_on(a)
    game.leave(a)


def _lookups(answer: Callable[..., Any], rng: random.Random) -> None:
    """Found as far as it is the same; never all of it; by what stands before, not by tokens."""
    game = _Game(answer, 12, 4)
    a = game.request(_digits("1111 2222 3333 4"))
    game.start(a)
    for text in ("1111 2222 3333 5", "1111 2222 3333", "1111 2222 3", "1111", "11", "2222 2222 3"):
        game.match(game.request(_digits(text)))
    game.leave(a)
    for text in ("1111 2222 3333 5", "1111 2222 3333", "1111 2222 9999 4"):
        b = game.request(_digits(text))
        game.start(b)
        game.leave(b)


def _chunks(answer: Callable[..., Any], rng: random.Random) -> None:
    """Only what is filled by now can be found."""
    game = _Game(answer, 8, 4)
    a = game.request(_digits("1111 2222 33"))
    game.start(a, 3)
    for num_new in (1, 3, 1):
        game.allocate(a, num_new)
    game.go_on(a, sampled=[3])
    game.go_on(a, sampled=[3])
    game.go_on(a, sampled=[4])
    b = game.request(_digits("1111 2222 3333 5"))
    game.start(b)
    game.leave(a)
    game.leave(b)


def _sharing(answer: Callable[..., Any], rng: random.Random) -> None:
    """A shared block stays as long as one owner is there, and costs nothing."""
    game = _Game(answer, 5, 4)
    a, b = game.request(_digits("1111 2222 3")), game.request(_digits("1111 2222 4"))
    game.start(a)
    game.start(b)
    game.leave(a)
    c = game.request(_digits("5555 6666 7777"))
    assert not game.start(c, 12) and game.start(c, 8)  # two free: the others are still b's
    game.leave(b)
    game.leave(c)
    game.start(game.request(_digits("1111 2222 8")))


def _eviction(answer: Callable[..., Any], rng: random.Random) -> None:
    """What holds nothing first, then the least recently used, tails before beginnings."""
    game = _Game(answer, 6, 4)
    a, b = game.request(_digits("1111 2222")), game.request(_digits("3333 4444 55"))
    game.start(a)
    game.start(b)
    game.leave(a)
    game.leave(b)  # now two blocks are empty, and 2222, 1111, 4444, 3333 are cached
    again = game.request(_digits("1111 9"))
    game.start(again)
    game.leave(again)  # 1111 is the latest now
    for text in ("66", "77", "8888 88", "99"):
        game.start(game.request(_digits(text)))


def _tail_first(answer: Callable[..., Any], rng: random.Random) -> None:
    game = _Game(answer, 4, 4)
    a = game.request(_digits("1111 2222 3333 4444"))
    game.start(a)
    game.leave(a)
    for text in ("5", "6", "7"):
        game.start(game.request(_digits(text)))


def _failure(answer: Callable[..., Any], rng: random.Random) -> None:
    """Too much for what is free, with hits on free and on owned blocks and without hits."""
    game = _Game(answer, 4, 4)
    a, b = game.request(_digits("1111 2222")), game.request(_digits("33"))
    game.start(a)
    game.start(b)
    game.leave(a)
    c = game.request(_digits("1111 2222 4444 5555"))
    assert not game.start(c)  # two hits and two more, but three are free
    assert not game.allocate(b, 15)
    assert game.start(c, 4)
    assert not game.go_on(c)
    game.leave(b)
    assert game.go_on(c)
    game.leave(c)


def _first_miss(answer: Callable[..., Any], rng: random.Random) -> None:
    """A copy of a block has no name, and what comes after a gap is not found."""
    game = _Game(answer, 6, 4)
    a, b = game.request(_digits("1111 2222")), game.request(_digits("1111 2222"))
    game.start(a)
    game.start(b)  # computes 2222 again, since the last token must be
    b.token_ids += _digits("3333")
    game.go_on(b)
    game.leave(a)
    game.leave(b)
    game.start(game.request(_digits("5555 6666 7777 8")))  # evicts 2222
    game.match(game.request(_digits("1111 2222 3333 4")))


def _tenants(answer: Callable[..., Any], rng: random.Random) -> None:
    game = _Game(answer, 12, 4)
    tokens = _digits("1111 2222 3")
    for keys in ({"cache_salt": "x"}, {"lora_name": "x"}, {}, {"cache_salt": "y"}):
        request = game.request(tokens, **keys)
        game.start(request)
        game.leave(request)


def _guesses(answer: Callable[..., Any], rng: random.Random) -> None:
    """A block with a guessed token has no name; it gets one when the guess was right."""
    game = _Game(answer, 8, 4)
    a = game.request(_digits("1111 2"))
    game.start(a)
    a.token_ids.append(2)
    game.go_on(a, sampled=_digits("9"), drafts=3)  # all wrong
    game.go_on(a, sampled=_digits("22334"), drafts=4, accepted=4)
    game.go_on(a, sampled=[5])
    game.leave(a)


def _preemption(answer: Callable[..., Any], rng: random.Random) -> None:
    """A request comes back with its reply so far; then it is gone, and freed once more."""
    game = _Game(answer, 4, 4)
    a = game.request(_digits("1111 2"))
    game.leave(a)  # has nothing yet
    game.start(a)
    for token in _digits("2223"):
        a.token_ids.append(token)
        game.go_on(a)
    game.leave(a)
    b = game.request(_digits("5555 6666"))
    game.start(b)
    game.leave(b)
    game.start(a)
    game.leave(a)
    game.leave(a)


def _forgetting(answer: Callable[..., Any], rng: random.Random) -> None:
    game = _Game(answer, 4, 4)
    a, b = game.request(_digits("1111 2222 3")), game.request(_digits("1111 4"))
    game.start(a)
    game.leave(a)
    game.reset()
    game.start(b)
    game.start(a, 8)
    game.leave(b)
    game.leave(a)


def _without_reuse(answer: Callable[..., Any], rng: random.Random) -> None:
    game = _Game(answer, 4, 4, reuse=False)
    a, b = game.request(_digits("1111 2222 3")), game.request(_digits("1111 2222 3"))
    game.start(a)
    assert not game.start(b)
    game.leave(a)
    game.start(b)
    game.leave(b)


_STORIES = (
    _boundaries,
    _lookups,
    _chunks,
    _sharing,
    _tail_first,
    _eviction,
    _failure,
    _first_miss,
    _tenants,
    _guesses,
    _preemption,
    _forgetting,
    _without_reuse,
)


def _random_history(answer: Callable[..., Any], rng: random.Random, reuse: bool) -> None:
    """Requests with beginnings in common arrive, run, are preempted, end; the pool is small."""
    size = rng.choice((1, 2, 4))
    game = _Game(answer, rng.randint(3, 12), size, reuse)
    beginnings = [[rng.randint(1, 9) for _ in range(4 * size)] for _ in range(2)]
    waiting: list[Request] = []
    for _ in range(40):
        if game.model.undecided:
            return
        what = rng.random()
        if what < 0.3 and len(game.requests) < 20:
            waiting.append(_random_request(game, rng, beginnings))
        elif what < 0.55 and waiting:
            request = waiting.pop(0)
            if not game.start(request, rng.choice((None, None, 1, size, 2 * size + 1))):
                waiting.append(request)
        elif what < 0.85 and game.running:
            _random_step(game, rng, rng.choice(game.running))
        elif game.running:
            request = rng.choice(game.running)
            game.leave(request)
            if rng.random() < 0.5:
                waiting.append(request)  # preempted, to come back
        elif rng.random() < 0.1:
            game.reset()


def _random_request(
    game: _Game, rng: random.Random, beginnings: Sequence[Sequence[int]]
) -> Request:
    shared = rng.choice(beginnings)[: rng.randint(0, 4) * game.block_size]
    own = [rng.randint(1, 9) for _ in range(rng.randint(0 if shared else 1, 2 * game.block_size))]
    keys = {"cache_salt": "x"} if rng.random() < 0.15 else {}
    return game.request([*shared, *own], **keys)


def _random_step(game: _Game, rng: random.Random, request: Request) -> None:
    left = request.num_tokens - request.num_computed_tokens
    if left > 1 and rng.random() < 0.5:
        game.allocate(request, rng.randint(1, left - 1))  # a chunk: nothing is sampled yet
        return
    if left == 0:  # the prompt is through, and its first token was sampled
        request.token_ids.append(rng.randint(1, 9))
    drafts = rng.choice((0, 0, 1, 3))
    accepted = rng.randint(0, drafts)
    sampled = [rng.randint(1, 9) for _ in range(accepted + 1)]
    game.go_on(request, sampled, drafts, accepted)
