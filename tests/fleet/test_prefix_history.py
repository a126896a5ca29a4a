from hypothesis import given
from hypothesis import strategies as st

from course_lib.fleet.prefix_history import PrefixHistory, RecentPrompts, cut

# Few words, so that prompts often begin alike.
words = st.lists(st.sampled_from([b"a", b"b", b"c"]), max_size=5)
names = st.sampled_from(["r0", "r1", "r2"])
sent = st.lists(st.tuples(words, names), max_size=25)


def beginnings(chunks):
    return [tuple(chunks[:end]) for end in range(1, len(chunks) + 1)]


class Model:
    """What PrefixHistory says it does, with a flat table of beginnings and when they were used."""

    def __init__(self):
        self.held = {}
        self.time = 0

    def add(self, chunks, name, max_chunks):
        held = self.held.setdefault(name, {})
        for prefix in reversed(beginnings(chunks)):  # ends are older than beginnings
            self.time += 1
            held[prefix] = self.time
        for prefix in sorted(held, key=held.get)[: max(0, len(held) - max_chunks)]:
            del held[prefix]

    def longest_match(self, chunks, names):
        for prefix in reversed(beginnings(chunks)):
            who = {name for name in names if prefix in self.held.get(name, {})}
            if who:
                return len(prefix), who
        return 0, set()


@given(sent, words, st.sets(names), st.integers(0, 6), st.none() | names)
def test_the_longest_match_is_that_of_brute_force(sent, prompt, asked, max_chunks, gone):
    history, model = PrefixHistory(), Model()
    for chunks, name in sent:
        history.add(chunks, name, max_chunks)
        model.add(chunks, name, max_chunks)
    if gone is not None:
        history.forget(gone)
        model.held.pop(gone, None)
    assert history.longest_match(prompt, asked) == model.longest_match(prompt, asked)
    for name in ("r0", "r1", "r2"):
        assert history.num_chunks(name) == len(model.held.get(name, {})) <= max_chunks


@given(sent, st.integers(0, 6))
def test_nothing_is_kept_of_replicas_that_have_left(sent, max_chunks):
    history = PrefixHistory()
    for chunks, name in sent:
        history.add(chunks, name, max_chunks)
    for name in ("r0", "r1", "r2"):
        history.forget(name)
    assert not history._root.children
    assert not history._held


@given(st.lists(words, max_size=20), st.integers(0, 20))
def test_common_beginnings_are_those_that_prompts_share(prompts, count):
    recent = RecentPrompts(100)
    cut_prompts = [cut([ord(word) for word in chunks], 1) for chunks in prompts]
    for chunks in cut_prompts:
        recent.add(chunks)
    found = [tuple(chr(token) for token in prefix) for prefix in recent.most_common(count)]
    assert len(found) <= count
    texts = ["".join(word.decode() for word in chunks) for chunks in prompts]
    uses = [sum(text.startswith("".join(prefix)) for text in texts) for prefix in found]
    assert all(number >= 2 for number in uses)
    assert uses == sorted(uses, reverse=True)
    shared = {
        text[:end]
        for text in texts
        for end in range(1, len(text) + 1)
        if sum(other.startswith(text[:end]) for other in texts) >= 2
    }
    if len(found) < count:  # then all that is shared has been named, or begins what was
        assert all(any("".join(f).startswith(prefix) for f in found) for prefix in shared)
    for place, prefix in enumerate(found):
        assert not any(earlier[: len(prefix)] == prefix for earlier in found[:place])


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=20), st.integers(1, 7))
def test_a_prompt_is_cut_into_full_chunks_that_are_equal_where_the_tokens_are(ids, size):
    chunks = cut(ids, size)
    assert len(chunks) == len(ids) // size
    for place, chunk in enumerate(chunks):
        assert [chunk] == cut(ids[place * size : (place + 1) * size], size)
