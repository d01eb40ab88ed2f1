"""Lossless decoding at batch 1 with a tree of proposals, and a tree's acceptance over stored responses.

A round: the draft grows the tree level by level, all nodes of a level in one pass, in which a node sees the verified
prefix, its ancestors and itself; the target verifies all nodes in one pass under the same kind of mask; the
verification rule follows one path; the target's cache is compacted to that path, the draft's own guesses are
forgotten (it is fed the target's real features of the accepted path in the next round). All buffers are allocated
once for the longest sequence.

A static tree's tokens are the draft's likeliest at every node (greedy drafts) or draws without replacement in rank
order (sampled drafts). A dynamic tree's are a function of the context alone, so they are always fixed proposals.

Shape legend: F nodes fed to the draft at once, N nodes of the tree with its root, R most children of a node, H draft
width, D draft vocabulary, V target vocabulary, C cached and new positions, S nodes that the draft feeds itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from redraft.acceptance.simulate import check_own
from redraft.data.store import Row
from redraft.decode.accept import accept_trees, draw_siblings, follow_tree
from redraft.decode.engine import SpeculativeDecoder
from redraft.decode.requests import Request, Round, Uniforms
from redraft.drafts.base import Draft
from redraft.drafts.proposing import TreeProposer
from redraft.errors import UserError
from redraft.features import FeatureSource
from redraft.rows import anchors
from redraft.sampling import warp
from redraft.settings.sampler import Sampler
from redraft.settings.shapes import DynamicTree, Path, StaticTree, check_drafts
from redraft.target import Target


class Topology:
    """The tree of one round, and all that follows from it. ``parents[i]`` is the parent of node i + 1 and smaller than
    it; 0 is the root, the last verified token. Siblings come by rank."""

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


@dataclass
class Proposal:
    """One round's tree: tokens of nodes 1 to N - 1, who hangs on whom, and of sampled drafts the probabilities.

    ``probs`` [., D] holds one row for every node that has children; ``rows[node]`` says which (0 for a leaf).
    """

    tokens: list[int]
    tree: Topology
    probs: Tensor | None = None
    rows: Tensor | None = None


class TreeMask:
    """Masks over a growing prefix that everybody sees and a block of new positions, in one buffer."""

    def __init__(self, rows: int, capacity: int, device: torch.device) -> None:
        self.buffer = torch.ones(rows, capacity, dtype=torch.bool, device=device)
        self.block = (0, 0)

    def over(self, prefix: int, block_TS: Tensor) -> Tensor:
        """The mask [T, prefix + S] whose last S columns are ``block``; valid until the next call."""
        rows, width = block_TS.shape
        self.buffer[:, slice(*self.block)] = True
        self.block = (prefix, prefix + width)
        self.buffer[:rows, prefix : prefix + width] = block_TS
        return self.buffer[:rows, : prefix + width]


class TreeDecoder(SpeculativeDecoder):
    """Speculative decoding with a static or a dynamic tree of drafted tokens a round."""

    def __init__(
        self,
        target: Target,
        draft: Draft,
        shape: StaticTree | DynamicTree,
        sampler: Sampler | None = None,
        greedy_drafts: bool = False,
    ) -> None:
        """Raises ``UserError`` when the draft does not fit the target or grows no trees, for sampled drafts in a
        dynamic tree, and for a target whose text is not its own under a tree's mask."""
        if not draft.grows_trees:
            what, use = f"{draft.family} draft proposes chains", f"use chain:{shape.depth}"
            raise UserError(f"a {what}, not a {shape.describe()}; {use}")
        target.require("masked")
        super().__init__(target, draft, sampler, greedy_drafts)
        check_drafts(shape, self.fixed)
        self.shape = shape
        if isinstance(shape, DynamicTree):
            self.fan = min(shape.top_k, len(self.vocabulary))
            self.proposals, self.guesses = shape.nodes, (shape.depth - 1) * shape.top_k
        else:
            self.fans = shape.fans()
            self.proposals, self.guesses = len(shape.paths), len(self.fans) - 1

    def new_proposer(self, tokens: int) -> TreeProposer:
        device = self.target.device
        self.target_mask = TreeMask(self.proposals + 1, tokens + self.proposals, device)
        self.draft_mask = TreeMask(max(1, self.guesses), tokens + self.guesses, device)
        # Row i + 1: which of this round's fed nodes the i-th one sees. Row 0 is the root, which sees none of them.
        self.seen_SS = torch.zeros(self.guesses + 1, self.guesses, dtype=torch.bool, device=device)
        return super().new_proposer(tokens)

    # -- drafting --------------------------------------------------------------------------------------------------
    def propose(self, request: Request) -> Proposal:
        """Feed the newly verified pairs, then grow the tree, at most as deep as there is room."""
        state_1H = request.proposer.feed(request.new_ids_T, request.new_taps_T)
        depth, self.fed = min(self.shape.depth, request.room), 0
        if isinstance(self.shape, DynamicTree):
            return self.grow_dynamic(state_1H, depth, request.proposer)
        return self.grow_static(state_1H, depth, request.proposer, request.uniforms)

    def expand(
        self, tokens_F: Tensor, parent_states_FH: Tensor, parents_F: Tensor, depth: int, proposer: TreeProposer
    ) -> tuple[Tensor, Tensor]:
        """States [F, H] of guessed nodes at this depth, and their rows [F] in ``seen_SS``; ``parents`` are rows too."""
        new, used = len(tokens_F), self.fed
        slots_F = torch.arange(used, used + new, device=tokens_F.device)
        self.seen_SS[used + 1 : used + 1 + new] = self.seen_SS[parents_F]
        self.seen_SS[slots_F + 1, slots_F] = True
        self.fed += new
        mask = self.draft_mask.over(proposer.verified, self.seen_SS[used + 1 : used + 1 + new, : used + new])
        return proposer.expand(tokens_F, parent_states_FH, depth, mask), slots_F + 1

    def grow_dynamic(self, state_1H: Tensor, depth: int, proposer: TreeProposer) -> Proposal:
        """Expand the best nodes of each level, then keep the best candidates of all levels.

        Candidate c of a level is child c mod fan of the level's fed node c // fan; numbered over all levels from 1.
        """
        assert isinstance(self.shape, DynamicTree)
        fan = self.fan
        states_FH, rows_F = state_1H, torch.zeros(1, dtype=torch.long, device=state_1H.device)
        scores_F, numbers_F = state_1H.new_zeros(1, dtype=torch.float32), rows_F
        tokens, scores, parents, total = list[Tensor](), list[Tensor](), list[Tensor](), 0
        for level in range(1, depth + 1):
            confidence_FR, index_FR = self.draft.logits(states_FH).float().log_softmax(-1).topk(fan, -1)
            scores.append((scores_F.unsqueeze(-1) + confidence_FR).flatten())
            tokens.append(self.vocabulary[index_FR.flatten()])
            parents.append(numbers_F.repeat_interleave(fan))
            if level < depth:
                best_F = scores[-1].sort(descending=True, stable=True).indices[: self.shape.top_k]
                fed_F = best_F // fan
                states_FH, rows_F = self.expand(tokens[-1][best_F], states_FH[fed_F], rows_F[fed_F], level, proposer)
                scores_F, numbers_F = scores[-1][best_F], best_F + total + 1
            total += len(tokens[-1])
        # Stable, so that of equals the parent, which has the smaller number, goes first.
        order = torch.cat(scores).sort(descending=True, stable=True).indices
        keep_N = order[: self.shape.nodes].sort().values
        renumbered = torch.zeros(total + 1, dtype=torch.long, device=keep_N.device)
        renumbered[keep_N + 1] = torch.arange(1, len(keep_N) + 1, device=keep_N.device)
        pair = torch.stack([torch.cat(tokens)[keep_N], renumbered[torch.cat(parents)[keep_N]]])
        kept_tokens, kept_parents = pair.tolist()
        return Proposal(kept_tokens, Topology(kept_parents))

    def grow_static(self, state_1H: Tensor, depth: int, proposer: TreeProposer, uniforms: Uniforms) -> Proposal:
        """Fill the shape's places level by level. Places for which the draft has no token left stay out."""
        device = state_1H.device
        tokens, parents, rows, probs = list[int](), list[int](), [0], list[Tensor]()
        # The level's inner nodes, by path and number, beside the states and the rows of ``seen_SS`` that they have.
        level: list[tuple[Path, int]] = [((), 0)]
        states_FH, rows_F = state_1H, torch.zeros(1, dtype=torch.long, device=device)
        for deep in range(1, depth + 1):
            ids_FR, probs_FD = self.siblings(states_FH, [self.fans[path] for path, _ in level], uniforms)
            first, inner, sources = sum(map(len, probs)), list[tuple[Path, int]](), list[int]()
            probs += [probs_FD] if probs_FD is not None else []
            for i, (path, node) in enumerate(level):
                rows[node] = first + i
                for rank, token in enumerate(ids_FR[i]):
                    tokens.append(token)
                    parents.append(node)
                    rows.append(0)
                    if (*path, rank) in self.fans:
                        inner.append(((*path, rank), len(tokens)))
                        sources.append(i)
            if deep == depth or not inner:
                break
            fed_F = torch.tensor(sources, device=device)
            tokens_F = torch.tensor([tokens[node - 1] for _, node in inner], device=device)
            states_FH, rows_F = self.expand(tokens_F, states_FH[fed_F], rows_F[fed_F], deep, proposer)
            level = inner
        if not probs:
            return Proposal(tokens, Topology(parents))
        return Proposal(tokens, Topology(parents), torch.cat(probs), torch.tensor(rows, device=device))

    def siblings(self, states_FH: Tensor, fans: list[int], uniforms: Uniforms) -> tuple[list[list[int]], Tensor | None]:
        """The children of each node, at most ``fans[i]`` of the i-th, and what sampled ones were drawn from [F, D]."""
        logits_FD = self.draft.logits(states_FH)
        most = min(max(fans), logits_FD.shape[-1])
        if self.fixed:
            index_FR, probs_FD = logits_FD.topk(most, -1).indices, None
        else:
            probs_FD = warp(logits_FD, self.sampler)
            index_FR = draw_siblings(probs_FD, uniforms.take(len(fans) * most).view(len(fans), most))
        ids = torch.where(index_FR >= 0, self.vocabulary[index_FR.clamp(min=0)], -1).tolist()
        return [[token for token in row[:fan] if token >= 0] for row, fan in zip(ids, fans, strict=True)], probs_FD

    # -- verification ----------------------------------------------------------------------------------------------
    def verify(self, request: Request, proposal: Proposal) -> Round:
        """One target pass over the last token and all nodes; keeps the path that the rule accepts."""
        target, tree, cache, before = self.target, proposal.tree, request.cache, request.cache.length
        ids_N = torch.tensor([request.ids[-1], *proposal.tokens], device=target.device)
        positions_N = torch.tensor(tree.depths, device=target.device) + before
        mask_NC = self.target_mask.over(before, tree.mask(target.device))
        step = target.forward(ids_N[None], cache, positions_N[None], mask_NC[None, None])
        assert step.taps_BTKH is not None
        path, following = self.decide(target.logits(step.hidden_BTH[0]), ids_N, proposal, request.uniforms)
        cache.compact(before, [0, *path])
        kept = [*(proposal.tokens[node - 1] for node in path), following]
        request.new_ids_T = torch.tensor(kept, device=target.device)
        request.new_taps_T = step.taps_BTKH[0, [0, *path]]
        full = tree.leaf(path[-1] if path else 0)
        return Round(proposal.tokens, len(path), kept, depth=tree.depth, full=full)

    def decide(self, logits_NV: Tensor, ids_N: Tensor, proposal: Proposal, uniforms: Uniforms) -> tuple[list[int], int]:
        """Accepted nodes from the top and the token after them. Only rows that are visited are looked at."""
        tree = proposal.tree
        if self.fixed:
            return follow_tree(lambda node: self.choose(logits_NV[node], uniforms), tree.by_token(proposal.tokens))
        assert proposal.probs is not None and proposal.rows is not None
        probs, rows = proposal.probs, proposal.rows

        def draft_of(nodes: Tensor) -> Tensor:
            full = logits_NV.new_zeros(len(nodes), logits_NV.shape[-1], dtype=torch.float32)
            full[:, self.vocabulary] = probs[rows[nodes]]
            return full

        node_B, next_B = accept_trees(
            lambda nodes: warp(logits_NV[nodes], self.sampler),
            draft_of,
            tree.children(logits_NV.device),
            ids_N[None],
            uniforms.take(len(tree))[None],
        )
        return tree.path(int(node_B)), int(next_B)


# -- acceptance without a pass of the target -------------------------------------------------------------------------
@torch.inference_mode()
def simulate_tree(
    draft: Draft,
    target: Target,
    rows: Sequence[Row],
    store: FeatureSource,
    shape: StaticTree | DynamicTree,
    max_new_tokens: int,
    progress: Callable[[int], None] | None = None,
) -> dict[str, list[int]]:
    """Accepted draft tokens of every round, by row key; up to the end of the response, as for a chain.

    Fixed proposals are a function of the context alone, and verification follows the target's own token
    (:func:`redraft.decode.accept.follow_tree`). These stand in the response and what the target computed at them in the
    feature store, so the draft is led through the very rounds that decoding would have: exact for greedy responses,
    and for sampled ones the rounds of the decoding that drew them.

    ``rows`` must hold responses of this target, at most ``max_new_tokens`` long; those without an anchor have no round
    and are left out. ``progress`` is told of finished rows. The draft works in the target's type, as it does in
    decoding. Raises ``UserError`` for reference answers.
    """
    decoder = TreeDecoder(target, draft, shape, greedy_drafts=True)
    found: dict[str, list[int]] = {}
    for row in rows:
        check_own(row)
        if anchors(row):
            found[row.key] = _rounds(decoder, row, store, max_new_tokens)
        if progress:
            progress(len(found))
    return found


def _rounds(decoder: TreeDecoder, row: Row, store: FeatureSource, max_new_tokens: int) -> list[int]:
    """Accepted tokens of each round of one response."""
    device, begin = decoder.target.device, len(row.prompt_ids)
    known = [*row.prompt_ids, *row.response_ids]
    ids_T, taps_TKF = torch.tensor(known, device=device), store.get(row)[0].to(device)
    proposer, at = decoder.new_proposer(begin + max_new_tokens + 1), begin + 1
    # Fixed proposals take no uniforms, and no target is run, so that it needs no cache.
    new = ids_T[:at], taps_TKF[: at - 1]
    request = Request(row.prompt_ids, max_new_tokens, Uniforms(0, device), None, proposer, known[begin:at], *new)
    accepted: list[int] = []
    while at < len(known):
        proposal = decoder.propose(request)
        own = [known[at + deep] if at + deep < len(known) else -1 for deep in proposal.tree.depths]
        path, _ = follow_tree(own.__getitem__, proposal.tree.by_token(proposal.tokens))
        accepted.append(len(path))
        fed, at = at, at + len(path) + 1
        request.ids, request.new_ids_T, request.new_taps_T = known[begin:at], ids_T[fed:at], taps_TKF[fed - 1 : at - 1]
    return accepted
