"""The pool of KV blocks against a plain account of who holds what."""

from __future__ import annotations

import pytest
from hypothesis import settings as bounds
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from miaotui.engine.decode.blocks import BlockHasher, BlockPool

_BLOCKS = 6


def test_blocks_are_given_out_once() -> None:
    pool = BlockPool(3)
    taken = pool.take(3)
    assert sorted(taken) == [0, 1, 2]
    with pytest.raises(MemoryError):
        pool.take(1)
    pool.give_back(taken)
    with pytest.raises(ValueError, match="not in use"):
        pool.give_back(taken[:1])
    with pytest.raises(ValueError, match="holds nothing"):
        BlockPool(0)


def test_what_was_used_last_stays_longest_and_beginnings_longer_than_ends() -> None:
    pool = BlockPool(4)
    first = pool.take(2)
    pool.publish(first[0], b"a")
    pool.publish(first[1], b"ab")
    second = pool.take(2)
    pool.publish(second[0], b"c")
    pool.publish(second[1], b"cd")
    pool.give_back(second)
    pool.give_back(first)
    assert (pool.used, pool.cached, pool.available) == (0, 4, 4)
    pool.share(pool.find([b"c"], 1))
    pool.take(1)
    assert pool.find([b"a", b"ab"], 2) == first
    pool.take(1)
    assert pool.find([b"a", b"ab"], 2) == first[:1]
    assert pool.find([b"c", b"cd"], 2) == second[:1]


def test_only_a_known_beginning_is_found() -> None:
    pool = BlockPool(4)
    blocks = pool.take(3)
    pool.publish(blocks[0], b"a")
    pool.publish(blocks[2], b"abc")
    assert pool.find([b"a", b"ab", b"abc"], 3) == blocks[:1]
    assert pool.find([b"a"], 0) == []


def test_digests_depend_on_all_before_and_on_the_pool() -> None:
    hasher = BlockHasher()
    first = hasher.digest(b"", b"tokens")
    assert hasher.digest(b"", b"tokens") == first
    assert len({first, hasher.digest(first, b"tokens"), hasher.digest(b"", b"others")}) == 3
    assert BlockHasher().digest(b"", b"tokens") != first


class Account(RuleBasedStateMachine):
    """Holders as lists of blocks; contents as what was published and not yet taken anew."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(_BLOCKS)
        self.holders: list[list[int]] = []
        self.published: dict[bytes, int] = {}
        self.names = 0

    def users(self, block: int) -> int:
        return sum(holder.count(block) for holder in self.holders)

    @rule(count=st.integers(1, 4))
    def take(self, count: int) -> None:
        free = sum(not self.users(block) for block in range(_BLOCKS))
        assert self.pool.available == free
        if count > free:
            with pytest.raises(MemoryError):
                self.pool.take(count)
            return
        taken = self.pool.take(count)
        assert len(set(taken)) == count
        assert not any(self.users(block) for block in taken)
        self.published = {n: b for n, b in self.published.items() if b not in taken}
        self.holders.append(taken)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(self.holders))
        self.holders.remove(holder)
        self.pool.give_back(holder)

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), known=st.booleans())
    def publish(self, data: st.DataObject, known: bool) -> None:
        block = data.draw(st.sampled_from(data.draw(st.sampled_from(self.holders))))
        self.names += 1
        name = next(iter(self.published), b"") if known else b"%d" % self.names
        self.pool.publish(block, name)
        if name not in self.published and block not in self.published.values():
            self.published[name] = block

    @precondition(lambda self: self.published)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.published)))
        found = self.pool.find([name, b"unknown"], 2)
        assert found == [self.published[name]]
        assert self.pool.idle(found) == (self.users(found[0]) == 0)
        self.pool.share(found)
        self.holders.append(found)

    @rule()
    def clear(self) -> None:
        if self.names % 5 == 4:
            self.pool.clear()
            self.holders.clear()
            self.published.clear()

    @invariant()
    def agrees(self) -> None:
        used = {block for holder in self.holders for block in holder}
        assert self.pool.used == len(used)
        assert self.pool.cached == sum(b not in used for b in self.published.values())
        for name, block in self.published.items():
            assert self.pool.find([name], 1) == [block]


TestAccount = Account.TestCase
TestAccount.settings = bounds(max_examples=60, stateful_step_count=40, deadline=None)
