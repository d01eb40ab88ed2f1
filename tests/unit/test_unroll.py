"""The unroll of a draft over stored responses, and the simulated chain against decoding."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from redraft.acceptance.simulate import row_alphas, simulate_greedy_chain, tau_of
from redraft.data.store import Row
from redraft.decode.engine import ChainDecoder
from redraft.drafts.eagle.unroll import collate, supervised, unroll
from redraft.drafts.eagle3 import Eagle3Draft
from redraft.drafts.groups import attach_private
from redraft.features import FeatureStore
from redraft.rows import anchors
from redraft.target import Target

RIG = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("training_rig.py"))))
# Nothing below changes the target, its answers or their features: they are made once.
target, rows, draft, store = RIG.target, RIG.rows, RIG.draft, RIG.store


@pytest.mark.parametrize("kind", ["dense", "split", "merged"])
def test_the_simulated_chain_is_the_decoded_one(kind, target, rows, store, draft):
    rows = rows[:12]
    torch.nn.init.normal_(draft.midlayer.mlp.down_proj.weight, std=0.2)
    if kind != "dense":
        draft = attach_private(draft, 16)
        torch.nn.init.normal_(draft.midlayer.mlp.private.down_proj.weight, std=0.2)
    if kind == "merged":
        draft = draft.merged()
    # A head fitted to the rows, so that rounds accept something.
    fit(draft, target, rows, store)
    simulated = simulate_greedy_chain(draft, target, rows, store, gamma=4)
    decoder = ChainDecoder(target, draft, gamma=4)
    runs = {row.key: decoder.generate(row.prompt_ids, 24).rounds for row in rows}
    # A simulation knows nothing behind the end token, where verification may go on accepting for nobody.
    decoded = {key: [min(found.accepted, len(found.kept)) for found in rounds] for key, rounds in runs.items()}
    assert simulated == decoded
    assert max(max(a) for a in simulated.values() if a) >= 2
    assert tau_of(simulated, rows) > 1.2


def fit(draft: Eagle3Draft, target: Target, rows: list[Row], store: FeatureStore, steps: int = 60) -> None:
    draft.train()
    batch = collate(rows, store, 3)
    optimizer = torch.optim.Adam(draft.parameters(), lr=5e-3)
    inside = supervised(draft, batch)
    place = torch.full((target.vocab_size,), -1)
    place[draft.vocabulary()] = torch.arange(draft.config.draft_vocab_size)
    for _ in range(steps):
        loss = torch.zeros(())
        for step, states in enumerate(unroll(draft, target.embedding, batch, 3)):
            keep = inside[:, step]
            logits = draft.logits(states[keep])
            loss = loss + torch.nn.functional.cross_entropy(logits, place[batch.future_MJ[keep, step]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_an_unroll_does_not_depend_on_what_a_row_is_packed_with(target, rows, store, draft):
    together = [s for s in unroll(draft, target.embedding, collate(rows, store, 3), 3)]
    at = 0
    for row in rows:
        if not anchors(row):
            continue
        alone = unroll(draft, target.embedding, collate([row], store, 3), 3)
        for step, states in enumerate(alone):
            torch.testing.assert_close(together[step][at : at + anchors(row)], states, atol=1e-5, rtol=1e-4)
        at += anchors(row)


@pytest.mark.parametrize("share", [0.7, 0.3, 0.0])
def test_an_unroll_goes_on_with_the_anchors_that_are_wanted(target, rows, store, draft, share):
    batch = collate(rows, store, 4)
    whole = list(unroll(draft, target.embedding, batch, 4))
    generator = torch.Generator().manual_seed(3)
    drafting = unroll(draft, target.embedding, batch, 4)
    next(drafting)
    going = torch.arange(len(whole[0]))
    for expected in whole[1:]:
        keep = torch.rand(len(going), generator=generator) < share
        keep[-1] = True
        going = going[keep]
        torch.testing.assert_close(drafting.send(keep), expected[going], atol=1e-5, rtol=1e-4)


def test_tokens_outside_the_vocabulary_end_supervision(target, rows, store, draft):
    batch = collate(rows, store, 3)
    inside = supervised(draft, batch)
    future = batch.future_MJ
    sayable = (future >= 0) & (future < 120)
    assert torch.equal(inside[:, 0], sayable[:, 0])
    assert torch.equal(inside[:, 2], sayable.all(1))


def test_alpha_of_a_row_counts_what_the_draft_cannot_say(target, rows, store, draft):
    row = next(r for r in rows if anchors(r))
    taps, hidden = store.get(row)
    states = next(unroll(draft, target.embedding, collate([row], store, 1), 1))
    full = torch.zeros(anchors(row), target.vocab_size)
    full[:, draft.vocabulary()] = draft.logits(states).softmax(-1).detach()
    expected = torch.minimum(target.logits(hidden).softmax(-1), full).sum(-1).mean()
    torch.testing.assert_close(torch.tensor(row_alphas(draft, target, [row], store)[0]), expected)
