"""The block pool: a stateful test against a plain model, and its rules one by one."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fxlm.runtime.block_pool import BlockPool


class PoolMachine(RuleBasedStateMachine):
    """Holders take, share, index and give back blocks in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(9, 2)
        self.held: list[list[int]] = []
        self.content: dict[int, bytes] = {}  # what the test knows to be indexed

    @rule(count=st.integers(1, 4))
    def allocate(self, count: int) -> None:
        if count <= self.pool.num_available:
            blocks = self.pool.allocate(count)
            assert len(set(blocks)) == count
            assert 0 not in blocks
            assert not {b for holder in self.held for b in holder} & set(blocks)
            for block in blocks:
                self.content.pop(block, None)
            self.held.append(blocks)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        blocks = data.draw(st.sampled_from(self.held))
        self.pool.share(blocks)
        self.held.append(list(blocks))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        number = data.draw(st.integers(0, len(self.held) - 1))
        self.pool.free(self.held.pop(number))

    @precondition(lambda self: self.held)
    @rule(data=st.data(), token=st.integers(0, 5))
    def commit(self, data: st.DataObject, token: int) -> None:
        block = data.draw(st.sampled_from(data.draw(st.sampled_from(self.held))))
        digest = self.pool.digest(self.pool.root(""), [token, token])
        known = self.pool.find(digest)
        self.pool.commit(block, digest)
        if known is not None:
            assert self.pool.find(digest) == known
        elif block not in self.content:
            assert self.pool.find(digest) == block
            self.content[block] = digest

    @rule(token=st.integers(0, 5))
    def revive(self, token: int) -> None:
        block = self.pool.find(self.pool.digest(self.pool.root(""), [token, token]))
        if block is not None:
            self.pool.share([block])
            self.held.append([block])

    @rule()
    def clear(self) -> None:
        self.pool.clear_cache()
        self.content.clear()

    @invariant()
    def books(self) -> None:
        self.pool.check(self.held)
        for block, digest in self.content.items():
            assert self.pool.find(digest) == block


PoolMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestPool = PoolMachine.TestCase


def chain(pool: BlockPool, tokens: list[int], salt: str = "") -> list[bytes]:
    digests = [pool.root(salt)]
    for begin in range(0, len(tokens), pool.block_size):
        digests.append(pool.digest(digests[-1], tokens[begin : begin + pool.block_size]))
    return digests[1:]


def test_digests_depend_on_everything_before_and_on_the_salt_and_the_key() -> None:
    pool = BlockPool(4, 2, key=b"k")
    one, two = chain(pool, [1, 2, 3, 4]), chain(pool, [9, 2, 3, 4])
    assert one == chain(BlockPool(4, 2, key=b"k"), [1, 2, 3, 4])
    assert len({*one, *two}) == 4
    assert not set(one) & set(chain(pool, [1, 2, 3, 4], "tenant"))
    assert not set(one) & set(chain(BlockPool(4, 2, key=b"other"), [1, 2, 3, 4]))
    assert not set(one) & set(chain(BlockPool(4, 2), [1, 2, 3, 4]))


def test_the_least_recently_used_goes_first_and_ends_before_beginnings() -> None:
    pool = BlockPool(5, 1)
    first, second = pool.allocate(2), pool.allocate(2)
    digests = chain(pool, [1, 2, 3, 4])
    for block, digest in zip(first + second, digests, strict=True):
        pool.commit(block, digest)
    pool.free(first)
    pool.free(second)
    evicted = [pool.allocate(1)[0] for _ in range(4)]
    assert evicted == [first[1], first[0], second[1], second[0]]
    assert all(pool.find(digest) is None for digest in digests)


def test_blocks_without_content_go_before_cached_ones() -> None:
    pool = BlockPool(4, 1)
    blocks = pool.allocate(2)
    pool.commit(blocks[0], pool.root("x"))
    pool.free(blocks)
    pool.allocate(2)
    assert pool.find(pool.root("x")) == blocks[0]


def test_double_free_and_sharing_a_free_block_are_caught() -> None:
    pool = BlockPool(4, 1)
    blocks = pool.allocate(1)
    pool.free(blocks)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(blocks)
    with pytest.raises(KeyError):
        pool.share(blocks)
    with pytest.raises(AssertionError):
        pool.allocate(4)


def test_check_sees_a_leak() -> None:
    pool = BlockPool(4, 1)
    pool.allocate(1)
    with pytest.raises(AssertionError):
        pool.check([])


def test_without_caching_nothing_is_found() -> None:
    pool = BlockPool(4, 1, enable_caching=False)
    blocks = pool.allocate(1)
    pool.commit(blocks[0], pool.root("x"))
    pool.free(blocks)
    assert pool.find(pool.root("x")) is None
    assert pool.num_cached == 0
