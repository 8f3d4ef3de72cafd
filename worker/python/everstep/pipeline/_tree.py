"""Sums over microbatches that do not depend on who computed which of them.

The leaves are the microbatches 0 .. M-1, a node is its left half plus its right half. Whoever computed some leaves
keeps the nodes that these make up (a run of k leaves: at most 2 log2 k), and nodes from different owners are put
together as soon as both halves are there. Floating-point sums are then the same bits for every division.

    leaf       0   1   2   3   4   5          pipeline A has 0 .. 2, B has 3 .. 5
    level 1     0-1     2-3     4-5           A keeps 0-1 and 2; B keeps 3 and 4-5
    level 2         0-3         (4-5)         together: 2 + 3, then 0-1 + 2-3, then that and 4-5
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

T = TypeVar("T")
Node = tuple[int, int]  # level, index: the leaves index << level .. (index + 1) << level, those that there are


class Tree(Generic[T]):
    """Collects nodes and adds up what belongs together. Not thread-safe."""

    def __init__(self, leaves: int, add: Callable[[T, T], T]) -> None:
        """`add(left, right)`: their sum; may be left, changed in place."""
        self._leaves = leaves
        self._top = (leaves - 1).bit_length()
        self._add = add
        self.nodes: dict[Node, T] = {}

    def put(self, node: Node, value: T) -> None:
        """A node, once. Which order they come in does not matter."""
        level, index = node
        while level < self._top:
            sibling = (level, index ^ 1)
            if sibling[1] << level < self._leaves:  # else this half is all that the parent has
                other = self.nodes.pop(sibling, None)
                if other is None:
                    break
                value = self._add(value, other) if index < sibling[1] else self._add(other, value)
            level, index = level + 1, index >> 1
        self.nodes[level, index] = value

    @property
    def total(self) -> T:
        """Of all leaves. REQUIRES that all have been put."""
        ((node, value),) = self.nodes.items()
        assert node == (self._top, 0), node
        return value


def nodes_of(leaves: Iterable[int], count: int) -> list[Node]:
    """What a tree of `count` leaves keeps when it was given these, in order."""
    tree: Tree[bool] = Tree(count, lambda left, right: True)
    for leaf in leaves:
        tree.put((0, leaf), True)
    return sorted(tree.nodes)
