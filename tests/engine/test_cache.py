"""Pages: allocation, sharing, reuse in the right order, names that depend on all tokens before."""

import struct
from hashlib import blake2b

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from expertmesh.engine.cache import PageCache, hash_page


def store(cache: PageCache, tokens: list[int]) -> list[int]:
    """Pages for these tokens, all full ones offered to others."""
    pages = cache.allocate(cache.pages_for(len(tokens)))
    assert pages is not None
    before = b""
    for index in range(len(tokens) // cache.page_size):
        before = hash_page(before, tokens[index * cache.page_size : (index + 1) * cache.page_size])
        cache.register(pages[index], before)
    return pages


def test_name_of_a_page() -> None:
    """A keyed hash, so that no page has the name of another that ends in the same bytes."""
    first = hash_page(b"", [1, 2])
    assert first == blake2b(struct.pack("<2q", 1, 2), digest_size=16).digest()
    assert len({first, hash_page(b"", [2, 1]), hash_page(first, [1, 2]), hash_page(b"", [1, 2, 0])}) == 4


def test_pages_for() -> None:
    cache = PageCache(10, 4)
    assert [cache.pages_for(n) for n in (0, 1, 4, 5, 8, 9)] == [0, 1, 1, 2, 2, 3]


def test_too_many_pages_change_nothing() -> None:
    cache = PageCache(3, 4)
    assert cache.allocate(4) is None and cache.free == 3
    assert cache.allocate(0) == []
    assert len(cache.allocate(3) or []) == 3 and cache.free == 0


def test_pages_are_given_back_once() -> None:
    cache = PageCache(2, 4)
    pages = cache.allocate(2) or []
    cache.release(pages)
    with pytest.raises(RuntimeError, match="released more often"):
        cache.release(pages[:1])


def test_equal_beginnings_share_full_pages() -> None:
    cache = PageCache(8, 2)
    pages = store(cache, [1, 2, 3, 4, 5])
    found, names = cache.match([1, 2, 3, 4, 9, 9])
    assert found == pages[:2] and len(names) == 2
    assert cache.match([1, 2, 9, 4, 5, 5])[0] == pages[:1]
    assert cache.match([9, 2, 3, 4, 5])[0] == []


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_a_row_is_always_left_to_compute(length: int) -> None:
    cache = PageCache(8, 2)
    store(cache, [1, 2, 3, 4])
    assert len(cache.match([1, 2, 3, 4][:length])[0]) == (length - 1) // 2


def test_released_pages_keep_their_text_until_they_are_needed() -> None:
    cache = PageCache(4, 2)
    pages = store(cache, [1, 2, 3, 4])
    cache.release(pages)
    assert cache.free == 4
    assert cache.match([1, 2, 3, 4, 5])[0] == pages and cache.free == 2
    assert cache.allocate(3) is None
    cache.release(pages)
    cache.allocate(4)
    assert cache.match([1, 2, 3, 4, 5])[0] == []


def test_the_end_of_a_text_is_given_away_before_its_beginning() -> None:
    cache = PageCache(4, 1)
    pages = store(cache, [1, 2, 3])
    cache.release(pages)
    cache.allocate(2)  # the page never used, then the last of the text
    assert cache.match([1, 2, 3, 4])[0] == pages[:2]


def test_the_longest_unused_text_is_given_away_first() -> None:
    cache = PageCache(2, 1)
    old, new = store(cache, [1]), store(cache, [2])
    cache.release(old)
    cache.release(new)
    cache.release(cache.match([1, 5])[0])  # used again: now the newer
    cache.allocate(1)
    assert cache.match([1, 5])[0] == old and cache.match([2, 5])[0] == []


def test_the_first_page_of_a_name_keeps_it() -> None:
    cache = PageCache(4, 2)
    first, second = store(cache, [1, 2]), store(cache, [1, 2])
    assert cache.match([1, 2, 3])[0] == first != second


def test_without_prefix_cache_nothing_is_found() -> None:
    cache = PageCache(4, 2, prefix_cache=False)
    store(cache, [1, 2])
    assert cache.match([1, 2, 3]) == ([], [])


@given(st.lists(st.integers(0, 2), max_size=12), st.lists(st.integers(0, 2), max_size=12), st.integers(1, 4))
def test_match_is_the_common_beginning(known: list[int], asked: list[int], size: int) -> None:
    cache = PageCache(12, size)
    pages = store(cache, known)
    common = 0
    while common < min(len(known), len(asked)) and known[common] == asked[common]:
        common += 1
    expected = min(common, max(0, len(asked) - 1)) // size
    assert cache.match(asked)[0] == pages[:expected]


class CacheMachine(RuleBasedStateMachine):
    """Holders take, share and give back in any order; what a page holds is written down beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = PageCache(6, 2)
        self.held: list[list[int]] = []
        self.content: dict[int, tuple[int, ...]] = {}

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9))
    def take(self, tokens: list[int]) -> None:
        shared, _ = self.cache.match(tokens)
        for index, page in enumerate(shared):
            assert self.content[page] == tuple(tokens[: (index + 1) * 2])
        fresh = self.cache.allocate(self.cache.pages_for(len(tokens)) - len(shared))
        if fresh is None:
            self.cache.release(shared)
            return
        pages, before = shared + fresh, b""
        self.held.append(pages)
        for index in range(len(tokens) // 2):
            before = hash_page(before, tokens[index * 2 : index * 2 + 2])
            if pages[index] in fresh:
                self.content[pages[index]] = tuple(tokens[: (index + 1) * 2])
            self.cache.register(pages[index], before)

    @precondition(lambda self: self.held)
    @rule(number=st.integers(0, 100))
    def give_back(self, number: int) -> None:
        self.cache.release(self.held.pop(number % len(self.held)))

    @invariant()
    def every_page_is_held_or_free(self) -> None:
        assert self.cache.free == 6 - len({page for pages in self.held for page in pages})


TestCacheMachine = CacheMachine.TestCase
