"""Tree decoding is lossless, drafts what its shape says, and leaves its caches as if it had never gone astray."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from redraft.decode import tree as tree_module
from redraft.decode.accept import accept_trees
from redraft.decode.auto import make_decoder
from redraft.decode.engine import ChainDecoder, PlainDecoder
from redraft.decode.requests import Generation, Round
from redraft.decode.tree import Proposal, Topology, TreeDecoder, TreeMask
from redraft.drafts.eagle.proposer import DraftCache
from redraft.drafts.eagle3 import fresh_draft
from redraft.errors import UserError
from redraft.settings.sampler import Sampler
from redraft.settings.shapes import ChainShape, DynamicTree, StaticTree
from redraft.target import Target

TOYS = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("toys.py"))))
make_draft, prompts = TOYS.make_draft, TOYS.prompts

STATIC = StaticTree(((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 0, 0, 0)))
DYNAMIC = DynamicTree(depth=4, top_k=3, nodes=12)
SHAPES = {"static": STATIC, "dynamic": DYNAMIC}


@pytest.fixture(scope="module")
def answered(tiny_target) -> Callable[[str], tuple[Target, list[Generation]]]:
    """``answered(architecture)`` -> a target and its own greedy answers to two prompts."""
    return TOYS.plain_answers(tiny_target, 2, 21)


# Scores tell how a dynamic tree grows; a greedy static one asks for likeliest tokens alone, and those of the
# overconfident draft are the fresh one's.
GREEDY = [(kind, shape) for kind in TOYS.KINDS for shape in SHAPES if (kind, shape) != ("overconfident", "static")]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(("kind", "shape"), GREEDY)
def test_greedy_output_is_plain_decoding_token_for_token(kind, architecture, shape, answered):
    target, answers = answered(architecture)
    tree = TreeDecoder(target, make_draft(kind, target), SHAPES[shape])
    for prompt, expected in zip(prompts(2), answers, strict=True):
        got = tree.generate(prompt, 21)
        assert got.ids == expected.ids
        assert got.finish_reason == expected.finish_reason
        assert sum(len(r.kept) for r in got.rounds) == len(got.ids) - 1


def test_the_default_tree_at_the_end_of_the_context(tiny_target):
    """Sixty nodes a round up to the last position that the target has."""
    target = tiny_target("llama", max_position_embeddings=64)
    prompt = prompts(9)[8] * 4
    decoder = TreeDecoder(target, make_draft("fresh", target), DynamicTree())
    got, room = decoder.generate(prompt, 64 - len(prompt)), 64 - len(prompt) - 1
    assert got.ids == PlainDecoder(target).generate(prompt, 64 - len(prompt)).ids
    for record in got.rounds:
        assert record.depth == min(5, room)
        assert len(record.proposed) == min(60, 10 + 100 * (record.depth - 1))
        room -= len(record.kept)


class Oracle:
    """Stands in for a tree decoder's drafting: hides the true continuation among wrong tokens, at changing places."""

    def __init__(self, decoder: TreeDecoder, truth: list[int], spare: int) -> None:
        self.truth, self.spare, decoder.propose = truth, spare, self.propose

    def propose(self, request):
        tokens, parents, parent, done = [], [], 0, len(request.ids)
        for deep in range(min(3, request.room)):
            right = (self.truth[done + deep :] + [self.spare])[0]
            siblings = [(right + 1 + i) % 100 for i in range(3)]
            siblings[(done + deep) % 3] = right
            tokens += siblings
            parents += [parent] * 3
            parent = len(tokens) - 2 + (done + deep) % 3
        return Proposal(tokens, Topology(parents))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_whole_paths_are_accepted_and_the_output_is_still_lossless(architecture, tiny_target):
    """Without this the greedy test could pass with an engine that never accepts or that spoils its cache."""
    target, prompt = tiny_target(architecture, **TOYS.SMALL), prompts(1)[0]
    expected = PlainDecoder(target).generate(prompt, 41)
    decoder = TreeDecoder(target, make_draft("fresh", target), STATIC)
    decoder.proposals = 9
    Oracle(decoder, expected.ids, spare=4)
    got = decoder.generate(prompt, 41)
    assert got.ids == expected.ids
    whole = [r for r in got.rounds if r.accepted == 3]
    assert len(whole) >= len(got.rounds) - 1
    assert all(r.full and r.depth == 3 and len(r.kept) <= 4 for r in whole)


@pytest.mark.parametrize("sampler", [Sampler(), Sampler(0.8, 20, 0.9)], ids=lambda s: s.describe())
@pytest.mark.parametrize("greedy_drafts", [False, True])
def test_a_tree_that_is_a_chain_goes_through_the_same_rounds(sampler, greedy_drafts, tiny_target):
    target = tiny_target("llama", **TOYS.SMALL)
    shape = StaticTree(tuple((0,) * i for i in range(1, 5)))
    for kind in ("fresh", "overconfident"):
        draft = make_draft(kind, target)
        chain = ChainDecoder(target, draft, 4, sampler, greedy_drafts=greedy_drafts)
        tree = TreeDecoder(target, draft, shape, sampler, greedy_drafts)
        for seed, prompt in enumerate(prompts(2)):
            one, two = chain.generate(prompt, 25, seed), tree.generate(prompt, 25, seed)
            assert one.ids == two.ids
            assert [_facts(r) for r in one.rounds] == [_facts(r) for r in two.rounds]


def _facts(record: Round) -> tuple:
    return record.proposed, record.accepted, record.kept, record.depth, record.full


@pytest.mark.parametrize("shape", [ChainShape(3), STATIC, DYNAMIC], ids=lambda s: s.describe())
@pytest.mark.parametrize("sampler", [Sampler(1.0), Sampler(0.7, 12), Sampler(1.3, 0, 0.6)], ids=lambda s: s.describe())
def test_greedy_drafts_give_the_very_tokens_of_plain_sampling(sampler, shape, tiny_target):
    """The target spends one uniform a token, as it does alone: not only the distribution is the same."""
    # Few words, so that poor drafts are right often enough.
    target = tiny_target("llama", vocab_size=20, **TOYS.SMALL)
    plain, accepted = PlainDecoder(target, sampler), 0
    expected = [plain.generate([5, 9, 4 + seed], 21, seed).ids for seed in range(3)]
    for kind in ("fresh", "overconfident"):
        decoder = make_decoder(target, make_draft(kind, target), shape, sampler, greedy_drafts=True)
        for seed in range(3):
            got = decoder.generate([5, 9, 4 + seed], 21, seed)
            assert got.ids == expected[seed]
            accepted += sum(r.accepted for r in got.rounds)
    assert accepted > 0


@pytest.mark.parametrize(
    ("kind", "sampler"),
    [("fresh", Sampler(1.0)), ("wrong", Sampler(0.7, 12)), ("overconfident", Sampler(1.3, 0, 0.6))],
    ids=lambda x: x if isinstance(x, str) else x.describe(),
)
def test_sampled_output_follows_the_target(kind, sampler, tiny_target):
    """Joint distribution of the second and third token, from trees of sampled drafts."""
    target = tiny_target("llama", num_hidden_layers=2)
    shape = StaticTree(((0,), (1,), (2,), (0, 0), (0, 1), (1, 0)))
    decoder = TreeDecoder(target, make_draft(kind, target), shape, sampler)
    assert TOYS.pairs_misfit(decoder, [5, 9, 70], 600) < 4.5


def test_sampled_output_of_a_broken_rule_does_not(monkeypatch, tiny_target):
    """The same test with an engine that believes every sibling to have been drawn with certainty."""
    target = tiny_target("llama", num_hidden_layers=2)
    shape = StaticTree(((0,), (1,), (2,), (0, 0), (0, 1), (1, 0)))
    decoder = TreeDecoder(target, make_draft("fresh", target), shape, Sampler(1.0))

    def broken(target_of, draft_of, children, ids, uniforms):
        return accept_trees(target_of, lambda nodes: draft_of(nodes).pow(3), children, ids, uniforms)

    monkeypatch.setattr(tree_module, "accept_trees", broken)
    assert TOYS.pairs_misfit(decoder, [5, 9, 70], 900) > 8


# -- what is drafted ---------------------------------------------------------------------------------------------------
class Recomputed:
    """The draft's confidence after any path of tokens, every path computed alone, from the start, causally."""

    def __init__(self, decoder: TreeDecoder, ids: torch.Tensor, taps: torch.Tensor) -> None:
        self.decoder, self.ids, self.taps = decoder, ids, taps

    def __call__(self, path: tuple[int, ...]) -> torch.Tensor:
        draft, embedding = self.decoder.draft, self.decoder.target.embedding
        cache = DraftCache(draft, len(self.ids) + len(path))
        positions = torch.arange(len(self.ids))
        states = draft(draft.embed(self.ids, embedding), draft.fuse(self.taps), positions, cache.extend(positions))
        for token in path:
            position = torch.tensor([cache.length])
            embeds = draft.embed(torch.tensor([token]), embedding)
            states = draft(embeds, draft.carry(states[-1:]), position, cache.extend(position))
        return draft.logits(states[-1:])[0].log_softmax(-1)

    def best(self, path: tuple[int, ...], count: int) -> list[tuple[int, float]]:
        values, index = self(path).topk(count)
        return list(zip(self.decoder.vocabulary[index].tolist(), values.tolist(), strict=True))


def drafted(decoder: TreeDecoder, depth: int) -> tuple[Proposal, Recomputed]:
    """What the decoder proposes after a prompt, and the independent account of its draft."""
    prompt = prompts(4)[3]
    request = decoder.prefill(prompt, depth + 1)
    proposal = decoder.propose(request)
    assert request.proposer.verified == len(prompt)
    return proposal, Recomputed(decoder, request.new_ids_T[1:], request.new_taps_T)


def words(proposal: Proposal) -> list[tuple[int, ...]]:
    """The token path of every node."""
    tree = proposal.tree
    return [tuple(proposal.tokens[n - 1] for n in tree.path(node)) for node in range(1, len(tree))]


@torch.inference_mode()
@pytest.mark.parametrize("depth", [1, 3, 9])
def test_a_static_tree_holds_the_likeliest_tokens_of_every_branch(depth, tiny_target):
    target = tiny_target("llama")
    decoder = TreeDecoder(target, make_draft("random", target), STATIC)
    proposal, account = drafted(decoder, depth)
    expected = []
    names: dict[tuple[int, ...], tuple[int, ...]] = {(): ()}
    for path in (p for p in STATIC.paths if len(p) <= depth):
        parent = names[path[:-1]]
        names[path] = (*parent, account.best(parent, path[-1] + 1)[-1][0])
        expected.append(names[path])
    assert words(proposal) == expected


@torch.inference_mode()
@pytest.mark.parametrize(
    "shape", [DYNAMIC, DynamicTree(5, 10, 60), DynamicTree(3, 2, 50), DynamicTree(1, 4, 2)], ids=str
)
def test_a_dynamic_tree_is_that_of_eagle_2(shape, tiny_target):
    """The same tree from a plain account in lists: expand the best of each level, keep the best of all."""
    target = tiny_target("llama")
    proposal, account = drafted(TreeDecoder(target, make_draft("random", target), shape), 9)
    frontier: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    candidates: list[tuple[float, tuple[int, ...]]] = []
    for _ in range(shape.depth):
        level = [
            (score + more, (*path, token))
            for score, path in frontier
            for token, more in account.best(path, shape.top_k)
        ]
        candidates += level
        frontier = sorted(level, reverse=True)[: shape.top_k]
    best = sorted(candidates, reverse=True)[: shape.nodes]
    assert set(words(proposal)) == {path for _, path in best}
    assert len(proposal.tokens) == min(shape.nodes, len(candidates))


@torch.inference_mode()
def test_a_draft_of_fewer_tokens_than_siblings(tiny_target):
    """Three words to choose from, ten asked for; and a sampler that leaves two of them."""
    target = tiny_target("llama")
    draft = fresh_draft(target, [10, 20, 30], seed=1)
    expected = PlainDecoder(target).generate([5, 6], 12).ids
    for shape in (DynamicTree(3, 10, 60), StaticTree(tuple((i,) for i in range(10)) + ((9, 0), (1, 0)))):
        got = TreeDecoder(target, draft, shape).generate([5, 6], 12)
        assert got.ids == expected
        assert all(set(r.proposed) <= {10, 20, 30} for r in got.rounds)
        assert len(got.rounds[0].proposed) == (3 + 9 + 27 if isinstance(shape, DynamicTree) else 4)
    sampled = TreeDecoder(target, draft, shape, Sampler(1.0, top_k=2)).generate([5, 6], 12)
    assert {len(r.proposed) for r in sampled.rounds[:-1]} == {3}


# -- the pieces --------------------------------------------------------------------------------------------------------
def test_a_mask_forgets_the_block_before() -> None:
    mask = TreeMask(3, 9, torch.device("cpu"))
    first = torch.eye(3, dtype=torch.bool)
    assert torch.equal(mask.over(2, first), torch.cat([torch.ones(3, 2, dtype=torch.bool), first], 1))
    second = torch.zeros(2, 4, dtype=torch.bool)
    expected = torch.cat([torch.ones(2, 4, dtype=torch.bool), second], 1)
    assert torch.equal(mask.over(4, second), expected)


def test_a_round_knows_whether_its_last_token_is_a_bonus() -> None:
    assert Round([1, 2], 2, [1, 2, 3], 0.0, 0.0).full
    assert not Round([1, 2], 1, [1, 3], 0.0, 0.0).full
    assert Round([1, 2], 1, [1, 3], 0.0, 0.0).depth == 2
    assert Round([1, 2, 3], 1, [2, 5], 0.0, 0.0, depth=2, full=True).full


def test_sampled_drafts_in_a_dynamic_tree_are_refused(tiny_target):
    target = tiny_target("llama")
    draft = make_draft("fresh", target)
    with pytest.raises(UserError, match="greedy drafts"):
        make_decoder(target, draft, DYNAMIC, Sampler(1.0))
    assert isinstance(make_decoder(target, draft, DYNAMIC, Sampler(1.0), greedy_drafts=True), TreeDecoder)
    assert isinstance(make_decoder(target, draft, DYNAMIC), TreeDecoder)
    assert isinstance(make_decoder(target, draft, ChainShape(2), measure_overlap=True), ChainDecoder)
    with pytest.raises(UserError, match="alpha"):
        make_decoder(target, draft, STATIC, measure_overlap=True)
