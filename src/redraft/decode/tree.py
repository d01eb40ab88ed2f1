"""Shapes of a proposal: chains, trees given as paths, and trees that grow where the draft is confident.

A shape says what may be proposed; a :class:`Topology` is what was proposed in one round: its nodes' parents and all
that follows from them (depths, masks, children). Node 0 is the root, the last verified token; the proposals are
nodes 1 to N - 1 in an order in which parents come before children and siblings by rank.

Shape legend: N nodes, the root included; R most children of a node.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Topology:
    """The tree of one round. ``parents[i]`` is the parent of node i + 1 and smaller than it; 0 is the root."""

    def __init__(self, parents: Sequence[int]) -> None:
        self.parents = list(parents)
        self.depths = [0]
        for node, parent in enumerate(self.parents, 1):
            if not 0 <= parent < node:
                raise ValueError(f"node {node} cannot hang on node {parent}")
            self.depths.append(self.depths[parent] + 1)
        self.depth = max(self.depths)

    def __len__(self) -> int:
        return len(self.depths)

    def path(self, node: int) -> list[int]:
        """The nodes from the top down to ``node``, without the root."""
        path = list[int]()
        while node:
            path.append(node)
            node = self.parents[node - 1]
        return path[::-1]

    def leaf(self, node: int) -> bool:
        return node not in self.parents

    def mask(self, device: torch.device) -> Tensor:
        """Who sees whom [N, N], boolean: a node sees its ancestors, the root included, and itself."""
        nodes = torch.arange(len(self), device=device)
        parents = torch.tensor([0, *self.parents], device=device)
        mask_NN, seen = torch.zeros(len(self), len(self), dtype=torch.bool, device=device), nodes
        for _ in range(self.depth + 1):
            mask_NN[nodes, seen] = True
            seen = parents[seen]
        return mask_NN

    def children(self, device: torch.device) -> Tensor:
        """Children [N, R] of every node by rank, padded with -1."""
        lists: list[list[int]] = [[] for _ in range(len(self))]
        for node, parent in enumerate(self.parents, 1):
            lists[parent].append(node)
        widest = max(1, *map(len, lists))
        return torch.tensor([found + [-1] * (widest - len(found)) for found in lists], device=device)

    def by_token(self, tokens: Sequence[int]) -> list[dict[int, int]]:
        """For every node, its children by their token; ``tokens`` are those of nodes 1 to N - 1."""
        found: list[dict[int, int]] = [{} for _ in range(len(self))]
        for node, (parent, token) in enumerate(zip(self.parents, tokens, strict=True), 1):
            found[parent].setdefault(token, node)
        return found
