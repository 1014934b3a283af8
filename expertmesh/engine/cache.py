"""Pages of the latent cache: who holds which, and which beginnings of texts are already computed. No torch.

A page holds `page_size` tokens of all layers. A full page is named by a hash over its tokens and the page before it,
so that equal beginnings find each other; a page that nobody holds keeps its content until it is needed.
"""

import struct
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from hashlib import blake2b


def hash_page(before: bytes, tokens: Sequence[int]) -> bytes:
    """Name of a full page after `before`. 128 bits: a collision would serve another user's text."""
    return blake2b(struct.pack(f"<{len(tokens)}q", *tokens), digest_size=16, key=before).digest()


class PageCache:
    """Allocation, sharing and reuse of pages. Pages are whole numbers from 0 on."""

    def __init__(self, pages: int, page_size: int, prefix_cache: bool = True) -> None:
        self.pages, self.page_size, self.prefix_cache = pages, page_size, prefix_cache
        self._holders = [0] * pages
        # The next to be given away first.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(pages))
        self._page_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    @property
    def free(self) -> int:
        return len(self._free)

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def allocate(self, count: int) -> list[int] | None:
        """This many pages, or None and no change where there are fewer."""
        if count > len(self._free):
            return None
        taken = []
        for _ in range(count):
            page, _none = self._free.popitem(last=False)
            self._forget(page)
            self._holders[page] = 1
            taken.append(page)
        return taken

    def release(self, pages: Sequence[int]) -> None:
        """Give pages back. The last of a text goes first when pages are needed: beginnings are worth more. Before all
        of them go pages without a name, which nobody can find: their memory was touched lately, and is there."""
        for page in reversed(pages):
            if self._holders[page] < 1:
                raise RuntimeError(f"page {page} is released more often than it was taken")
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._free[page] = None
                if page not in self._hash_of:
                    self._free.move_to_end(page, last=False)

    def match(self, tokens: Sequence[int]) -> tuple[list[int], list[bytes]]:
        """Pages that hold the longest known beginning of these tokens, taken for the caller, and their hashes.

        Never all tokens: at least one row must be computed, for its logits.
        """
        pages: list[int] = []
        hashes: list[bytes] = []
        for name in self.names(tokens):
            page = self._page_of.get(name)
            if page is None:
                break
            self._holders[page] += 1
            self._free.pop(page, None)
            pages.append(page)
            hashes.append(name)
        return pages, hashes

    def names(self, tokens: Sequence[int]) -> Iterator[bytes]:
        """Of the pages that may hold the beginning of these tokens, one after the other."""
        before = b""
        for start in range(0, len(tokens) - self.page_size if self.prefix_cache else 0, self.page_size):
            before = hash_page(before, tokens[start : start + self.page_size])
            yield before

    def known(self, names: Sequence[bytes]) -> int:
        """How many of these pages are here, from the first on."""
        return next((i for i, name in enumerate(names) if name not in self._page_of), len(names))

    def register(self, page: int, name: bytes) -> None:
        """This page is full and may be shared under this name; the first page of a name keeps it."""
        if self.prefix_cache and name not in self._page_of and page not in self._hash_of:
            self._page_of[name] = page
            self._hash_of[page] = name

    def _forget(self, page: int) -> None:
        name = self._hash_of.pop(page, None)
        if name is not None:
            del self._page_of[name]
