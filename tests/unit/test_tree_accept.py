"""The verification rule of trees keeps the target's distribution, and these tests would notice if it did not.

Shape legend: B independent trees, N nodes with the root, R siblings, V vocabulary.
"""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from redraft.decode.accept import accept_chains, accept_siblings, accept_trees, draw_siblings, follow_tree
from redraft.decode.tree import Topology
from redraft.sampling import draw, warp
from redraft.settings.sampler import Sampler

TOYS = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("toys.py"))))
misfit, target_logits, toy_drafts, toy_pair = TOYS.misfit, TOYS.target_logits, TOYS.toy_drafts, TOYS.toy_pair
right_accepts, right_residual, each_sampler = TOYS.right_accepts, TOYS.right_residual, TOYS.each_sampler
V, DRAWS, MANY = TOYS.V, TOYS.DRAWS, TOYS.MANY

# Three first choices; two and one after the first two of them: every kind of branch and of leaf.
TREE = Topology([0, 0, 0, 1, 1, 2])
PARENTS, CPU = (0, 1, 2), torch.device("cpu")
Rule = Callable[..., tuple[Tensor, Tensor]]
Propose = Callable[[Tensor, Tensor], Tensor]


def likeliest(draft_BV: Tensor, uniforms_BR: Tensor) -> Tensor:
    return draft_BV.topk(uniforms_BR.shape[1], -1).indices


def with_replacement(draft_BV: Tensor, uniforms_BR: Tensor) -> Tensor:
    return torch.stack([draw(draft_BV, u) for u in uniforms_BR.unbind(1)], 1)


def generate_triples(
    target: Tensor, draft: Tensor, rule: Rule, propose: Propose = draw_siblings, draws: int = DRAWS
) -> Tensor:
    """Three tokens [draws, 3] a text: one round of the tree, then plain draws where it fell short."""
    generator = torch.Generator().manual_seed(0)

    def uniforms(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    # The root's token stands for the start of the text.
    ids_BN = torch.full((draws, len(TREE)), V)
    children_NR = TREE.children(CPU)
    for parent in PARENTS:
        children = children_NR[parent][children_NR[parent] >= 0]
        ids_BN[:, children] = propose(draft[ids_BN[:, parent].clamp(min=0)], uniforms(draws, len(children)))
    rows = torch.arange(draws)

    def of(table: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda nodes: table[ids_BN[rows, nodes]]

    node_B, next_B = rule(of(target), of(draft), children_NR, ids_BN, uniforms(draws, len(TREE)))
    depths, parents = torch.tensor(TREE.depths), torch.tensor([0, *TREE.parents])
    deep_B = depths[node_B]
    first_B = torch.where(deep_B == 2, parents[node_B], node_B)
    tokens = torch.stack([ids_BN[rows, first_B], ids_BN[rows, node_B], next_B], 1)
    tokens[rows, deep_B] = next_B
    return TOYS.continued(target, tokens, deep_B + 1, generator)


def fixed(target_of: Callable, draft_of: Callable, children: Tensor, ids: Tensor, uniforms: Tensor) -> tuple:
    """The rule of greedy drafts: the target draws its own token at every node that it comes to."""
    rows = torch.arange(len(ids))
    # A node's draw may share its uniform with other nodes' of the same depth: at most one of them is visited.
    own = torch.stack([draw(target_of(rows * 0 + n), uniforms[:, d]) for n, d in enumerate(TREE.depths)], 1)
    # The rule decides about one tree at a time, and many of them are alike: each case is decided once.
    cases, case_B = torch.cat([own, ids[:, 1:]], 1).unique(dim=0, return_inverse=True)
    decided = []
    for case in cases.tolist():
        path, token = follow_tree(case[: len(TREE)].__getitem__, TREE.by_token(case[len(TREE) :]))
        decided.append((path[-1] if path else 0, token))
    return tuple(torch.tensor(decided)[case_B].unbind(1))


def right_forget(d: Tensor, x: Tensor) -> Tensor:
    left = d.scatter(1, x[:, None], 0.0)
    return left / left.sum(-1, keepdim=True).clamp(min=1e-30)


def normal_residual(t: Tensor, d: Tensor, dx: Tensor) -> Tensor:
    return TOYS.normalised(right_residual(t, d, dx))


def by_hand(
    accepts: Callable[..., Tensor] = right_accepts,
    residual: Callable[..., Tensor] = normal_residual,
    forget: Callable[..., Tensor] = right_forget,
    last: Callable[..., Tensor] | None = None,
    point_mass: bool = False,
) -> Rule:
    """The rule written out node by node, with its parts open to sabotage; ``last`` makes the final draw's weights."""

    def rule(target_of: Rule, draft_of: Rule, children: Tensor, ids: Tensor, uniforms: Tensor) -> tuple:
        rows = torch.arange(len(ids))
        node = torch.zeros_like(rows)
        t, d = target_of(node), draft_of(node)
        for n in range(1, ids.shape[1]):
            x = ids[:, n].clamp(min=0)
            here = (node == TREE.parents[n - 1]) & (ids[:, n] >= 0)
            proposal = torch.nn.functional.one_hot(x, V).to(d) if point_mass else d
            tx, dx = (probs.gather(1, x[:, None]).squeeze(1).double() for probs in (t, proposal))
            ok = here & accepts(uniforms[:, n - 1], tx, dx)
            lost = (here & ~ok & (dx > 0))[:, None]
            t, d = (
                torch.where(lost, residual(t, proposal, dx), t),
                torch.where(lost, forget(d, x), d),
            )
            node = torch.where(ok, n, node)
            t, d = torch.where(ok[:, None], target_of(node), t), torch.where(ok[:, None], draft_of(node), d)
        weights = t if last is None else last(t, target_of(node))
        return node, draw(weights, uniforms[:, -1])

    return rule


@pytest.mark.parametrize("kind", ["good", "wrong", "overconfident", "uniform", "disjoint"])
@each_sampler
def test_sampled_drafts_follow_the_target_exactly(sampler: Sampler, kind: str) -> None:
    target, draft = toy_pair(sampler, kind)
    assert misfit(generate_triples(target, draft, accept_trees), target) < 4


@pytest.mark.parametrize("kind", ["good", "wrong", "disjoint"])
@each_sampler
def test_greedy_drafts_follow_the_target_exactly(sampler: Sampler, kind: str) -> None:
    target, draft = toy_pair(sampler, kind)
    assert misfit(generate_triples(target, draft, fixed, likeliest), target) < 4


@pytest.mark.parametrize("kind", ["good", "wrong", "overconfident"])
def test_the_rules_written_out_by_hand_pass_too(kind: str) -> None:
    """So the sabotaged rules below fail for their sabotaged part alone. Of sampled drafts the texts are the same."""
    sampler = Sampler(0.9, 4)
    target, draft = toy_pair(sampler, kind)
    ours, theirs = (generate_triples(target, draft, rule, draws=MANY) for rule in (accept_trees, by_hand()))
    assert float((ours != theirs).any(1).float().mean()) < 1e-3
    assert misfit(theirs, target) < 4
    # Rejection against point masses one sibling after another, as the papers put it, is the fixed rule in law.
    assert misfit(generate_triples(target, draft, by_hand(point_mass=True), likeliest, MANY), target) < 4


SABOTAGE: dict[str, tuple[Rule, Propose]] = {
    "the draft is not renormalised after a rejected sibling": (
        by_hand(forget=lambda d, x: d.scatter(1, x[:, None], 0.0)),
        draw_siblings,
    ),
    "the draft keeps the rejected sibling": (by_hand(forget=lambda d, x: d), draw_siblings),
    "the residual is not updated between siblings": (by_hand(residual=lambda t, d, dx: t), draw_siblings),
    "the residual is not normalised between siblings": (by_hand(residual=right_residual), draw_siblings),
    "the residual is the absolute difference": (
        by_hand(residual=lambda t, d, dx: TOYS.normalised((t - d).abs())),
        draw_siblings,
    ),
    "the last draw forgets the rejections": (by_hand(last=lambda t, fresh: fresh), draw_siblings),
    "everything is accepted": (by_hand(accepts=lambda u, tx, dx: u < 2), draw_siblings),
    "accepts with the target's probability alone": (by_hand(accepts=lambda u, tx, dx: u < tx), draw_siblings),
    "accepts with the ratio upside down": (by_hand(accepts=lambda u, tx, dx: u < dx / tx), draw_siblings),
    "accepts a quarter too readily": (by_hand(accepts=lambda u, tx, dx: u < 1.25 * tx / dx), draw_siblings),
    "the likeliest siblings verified as draws": (accept_trees, likeliest),
    "point masses: the target is not renormalised": (
        by_hand(residual=right_residual, point_mass=True),
        likeliest,
    ),
    "point masses: the target keeps the rejected sibling": (
        by_hand(residual=lambda t, d, dx: t, point_mass=True),
        likeliest,
    ),
    "point masses: the last draw forgets the rejections": (
        by_hand(last=lambda t, fresh: fresh, point_mass=True),
        likeliest,
    ),
}


@pytest.mark.parametrize("name", SABOTAGE)
def test_the_statistic_notices_a_broken_rule(name: str) -> None:
    """A rule may be broken and yet nearly right for one draft; it must fail for at least one of three."""
    sampler = Sampler(1.0)
    target, (rule, propose) = warp(target_logits(), sampler), SABOTAGE[name]
    drafts = [toy_drafts(sampler)[kind] for kind in ("wrong", "good", "overconfident")]
    assert any(misfit(generate_triples(target, draft, rule, propose, MANY), target) > 8 for draft in drafts)


@pytest.mark.parametrize("kind", ["good", "overconfident"])
def test_siblings_drawn_with_replacement_are_no_harm(kind: str) -> None:
    """A repeated sibling counts as impossible, and one that differs is a draw from the draft without the first."""
    target, draft = toy_pair(Sampler(1.0), kind)
    assert misfit(generate_triples(target, draft, accept_trees, with_replacement), target) < 4


@pytest.mark.parametrize("kind", ["good", "wrong", "overconfident"])
def test_a_tree_that_is_a_chain_decides_as_a_chain(kind: str) -> None:
    sampler, generator = Sampler(0.9, 4), torch.Generator().manual_seed(2)
    target, draft = toy_pair(sampler, kind)
    ids_BN = torch.cat([torch.full((500, 1), V), torch.randint(V, (500, 3), generator=generator)], 1)
    uniforms, rows = torch.rand(500, 4, generator=generator, dtype=torch.float64), torch.arange(500)
    expected = accept_chains(target[ids_BN], draft[ids_BN[:, :3]], ids_BN[:, 1:], uniforms)
    found = accept_trees(
        lambda nodes: target[ids_BN[rows, nodes]],
        lambda nodes: draft[ids_BN[rows, nodes]],
        Topology([0, 1, 2]).children(CPU),
        ids_BN,
        uniforms,
    )
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))
    assert len(set(expected[0].tolist())) > 1


def test_siblings_are_drawn_without_replacement_in_the_right_order() -> None:
    """Ordered pairs (x, y) come with probability draft(x) * draft(y) / (1 - draft(x))."""
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    uniforms = torch.rand(DRAWS, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ids = draw_siblings(probs.expand(DRAWS, V), uniforms)
    seen = torch.bincount(ids[:, 0] * V + ids[:, 1], minlength=V * V).double().view(V, V)
    expected = DRAWS * probs[:, None] * probs[None] / (1 - probs[:, None])
    expected.fill_diagonal_(0)
    assert seen[expected == 0].sum() == 0
    some = expected > 0
    assert float(((seen - expected)[some] ** 2 / expected[some]).sum()) < 11 + 4 * 22**0.5


def test_a_row_with_too_few_tokens_gives_too_few_siblings() -> None:
    probs = torch.tensor([[0.0, 0.7, 0.0, 0.3], [0.0, 0.0, 1.0, 0.0]])
    ids = draw_siblings(probs, torch.full((2, 3), 0.5, dtype=torch.float64))
    assert ids.tolist() == [[1, 3, -1], [2, -1, -1]]


def test_impossible_and_missing_siblings_teach_nothing() -> None:
    target, draft = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.0, 0.5, 0.5]])
    rank, left = accept_siblings(target, draft, torch.tensor([[0, -1]]), torch.zeros(1, 2))
    assert rank.tolist() == [-1] and torch.equal(left, target)
    rank, _ = accept_siblings(target, draft, torch.tensor([[0, 2]]), torch.tensor([[0.0, 0.4]]))
    assert rank.tolist() == [1]


def test_equal_rows_up_to_rounding_fall_back_to_the_target() -> None:
    target, draft = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.5000002, 0.5000002]])
    last = torch.nextafter(torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64))
    rank, left = accept_siblings(target, draft, torch.tensor([[0]]), last)
    assert rank.tolist() == [-1] and torch.equal(left, target)


@pytest.mark.parametrize(
    ("own", "path", "following"),
    [
        ([7, 0, 0, 0, 0], [1, 3], 0),
        ([7, 9, 0, 0, 0], [1], 9),
        ([8, 1, 5, 0, 0], [2], 5),
        ([8, 1, 6, 0, 3], [2, 4], 3),
        ([9, 1, 6, 0, 3], [], 9),
    ],
)
def test_the_path_that_is_followed(own: list[int], path: list[int], following: int) -> None:
    """Tokens 7 and 8 below the root, 0 below 7, 6 below 8; ``own`` are the target's choices at the five nodes."""
    children = Topology([0, 0, 1, 2]).by_token([7, 8, 0, 6])
    assert follow_tree(own.__getitem__, children) == (path, following)


def test_greedy_agrees_with_the_sampled_rule_on_one_hot_targets() -> None:
    target, draft = warp(target_logits(), Sampler()), toy_drafts(Sampler(1.0))["good"]
    expected = generate_triples(target, draft, fixed, likeliest)
    assert torch.equal(generate_triples(target, draft, accept_trees), expected)
