"""Allocates pages: free pages, reference counts, and pages that requests share."""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np


class PageAllocator:
    """`count` pages, numbered from 0. Pure host code.

    A full page may be registered under the digest of all tokens up to its end. It is then kept
    after its last user, for requests that begin with the same tokens, until it is needed: the one
    that was released the longest ago is evicted first.
    """

    def __init__(self, count: int):
        self.count = count
        self._free = list(range(count - 1, -1, -1))
        self._users = [0] * count
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()  # registered, without users

    @property
    def available(self) -> int:
        return len(self._free) + len(self._unused)

    def find(self, digests: Iterable[bytes]) -> list[int]:
        """The pages of the longest run of known digests from the first on."""
        pages: list[int] = []
        for digest in digests:
            if digest not in self._page_of:
                break
            pages.append(self._page_of[digest])
        return pages

    def retain(self, pages: Sequence[int]) -> None:
        """One more user of each."""
        for page in pages:
            self._users[page] += 1
            self._unused.pop(page, None)

    def allocate(self, count: int) -> list[int] | None:
        """So many pages with one user each; None, without a change, if there are too few."""
        if count > self.available:
            return None
        pages = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        self.retain(pages)
        return pages

    def release(self, pages: Sequence[int]) -> None:
        """One user less of each; the last ones of a row are evicted first."""
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page] == 0:
                if page in self._digest_of:
                    self._unused[page] = None
                else:
                    self._free.append(page)

    def register(self, page: int, digest: bytes) -> None:
        """Shares a full page from now on, unless another one has its tokens already."""
        if digest not in self._page_of and page not in self._digest_of:
            self._page_of[digest] = page
            self._digest_of[page] = digest

    def _evict(self) -> int:
        page, _ = self._unused.popitem(last=False)
        del self._page_of[self._digest_of.pop(page)]
        return page


def first_digest(adapter: str | None, version: int) -> bytes:
    """The digest of no tokens, with one version of an adapter."""
    return hashlib.sha256(repr((adapter, version)).encode()).digest()


def next_digest(before: bytes, tokens: Sequence[int]) -> bytes:
    """The digest of the tokens of the digest `before` and one more page of tokens after them."""
    return hashlib.sha256(before + np.asarray(tokens, np.int32).tobytes()).digest()
