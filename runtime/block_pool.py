"""The blocks of the KV cache: who holds them, what they hold, which goes next.

Here: reference counts, free and cached blocks, the prefix cache's index. Not here: tensors
(``worker``) and which sequence gets blocks (``scheduler``).

A block is in exactly one of three states::

    free     nobody holds it, its content means nothing
    used     held by one or more sequences (reference count > 0); may be indexed too
    cached   nobody holds it, its content is indexed; goes to whoever needs a block, oldest first
"""

import hashlib
import secrets
import struct
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

# Block 0 is never handed out: block tables are padded with it.
PADDING_BLOCK = 0


class BlockPool:
    """A fixed number of blocks of ``block_size`` tokens.

    Args:
        num_blocks: all blocks, block 0 included.
        block_size: tokens a block.
        enable_caching: False makes `find` miss always.
        key: secret of the hashes; random when None, so that nobody outside the process can make
            two different prefixes collide.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        enable_caching: bool = True,
        key: bytes | None = None,
    ) -> None:
        assert num_blocks >= 2, num_blocks
        assert block_size >= 1, block_size
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_caching = enable_caching
        self.refs = [0] * num_blocks
        self._digests: list[bytes | None] = [None] * num_blocks
        self._index: dict[bytes, int] = {}
        self._free = list(range(num_blocks - 1, PADDING_BLOCK, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first
        secret = secrets.token_bytes(32) if key is None else key
        self._keyed = hashlib.sha256(struct.pack("<Q", len(secret)) + secret)

    # --- counts

    @property
    def num_usable(self) -> int:
        """Blocks that can ever be handed out."""
        return self.num_blocks - 1

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` could hand out now, cached ones included."""
        return len(self._free) + len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_usable - self.num_available

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def usage(self) -> float:
        """Share of the blocks held by sequences, 0..1."""
        return self.num_used / self.num_usable

    # --- holding

    def allocate(self, count: int) -> list[int]:
        """Hand out ``count`` blocks with one reference each; evicts the oldest cached ones."""
        assert count <= self.num_available, (count, self.num_available)
        blocks = []
        for _ in range(count):
            block = self._free.pop() if self._free else self._evict()
            self.refs[block] = 1
            blocks.append(block)
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Add one reference to each block, used or cached."""
        for block in blocks:
            if self.refs[block] == 0:
                del self._cached[block]  # KeyError: the block is free, sharing it is our bug
            self.refs[block] += 1

    def free(self, blocks: Sequence[int]) -> None:
        """Drop one reference of each block.

        Blocks come in the order of the sequence and go back last first: the end of a prefix is
        evicted before its beginning, which other sequences are likelier to share.
        """
        refs = self.refs
        for block in reversed(blocks):
            assert refs[block] > 0, f"block {block} freed twice"
            refs[block] -= 1
            if refs[block] == 0:
                if self._digests[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        self._forget(block)
        return block

    def _forget(self, block: int) -> None:
        digest = self._digests[block]
        assert digest is not None, block
        del self._index[digest]
        self._digests[block] = None

    # --- prefix cache

    def root(self, salt: str) -> bytes:
        """Parent digest of a sequence's first block."""
        return self._hash(b"root", salt.encode())

    def digest(self, parent: bytes, tokens: Sequence[int]) -> bytes:
        """Digest of a full block: of its tokens and of everything before them."""
        assert len(tokens) == self.block_size, (len(tokens), self.block_size)
        return self._hash(parent, array("q", tokens).tobytes())

    def _hash(self, *fields: bytes) -> bytes:
        state = self._keyed.copy()
        for field in fields:
            state.update(struct.pack("<Q", len(field)) + field)
        return state.digest()

    def find(self, digest: bytes) -> int | None:
        """The block that holds this content, without taking a reference."""
        return self._index.get(digest)

    def commit(self, block: int, digest: bytes) -> None:
        """Index a full block whose content is (or will be, by the next step) in the cache.

        When another block has the same content already, that one stays indexed.
        """
        assert self.refs[block] > 0, f"block {block} is not held"
        if not self.enable_caching or digest in self._index or self._digests[block] is not None:
            return
        self._index[digest] = block
        self._digests[block] = digest

    def clear_cache(self) -> None:
        """Forget every indexed content (after the weights changed)."""
        for block in list(self._index.values()):
            self._forget(block)
        self._free.extend(self._cached)
        self._cached.clear()

    # --- integrity

    def check(self, held: Iterable[Sequence[int]] | None = None) -> None:
        """Assert free + used + cached == all; with ``held``, also every reference count.

        Args:
            held: the blocks of every sequence that holds any.
        """
        free, cached = set(self._free), set(self._cached)
        used = {block for block in range(1, self.num_blocks) if self.refs[block] > 0}
        assert len(free) == len(self._free), "a block is free twice"
        assert len(free | cached | used) == len(free) + len(cached) + len(used)
        assert len(free) + len(cached) + len(used) == self.num_usable, (free, cached, used)
        assert self.refs[PADDING_BLOCK] == 0, self.refs[PADDING_BLOCK]
        assert PADDING_BLOCK not in free | cached
        assert min(self.refs) >= 0, self.refs
        digests = {b: d for b, d in enumerate(self._digests) if d is not None}
        assert digests == {block: digest for digest, block in self._index.items()}
        assert cached <= digests.keys(), cached - digests.keys()
        assert not (free & digests.keys()), free & digests.keys()
        if held is not None:
            counts = Counter(block for blocks in held for block in blocks)
            actual = {block: self.refs[block] for block in used}
            assert actual == counts, (actual, counts)
