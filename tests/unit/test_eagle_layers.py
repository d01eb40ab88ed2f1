"""Every option of the EAGLE layers against a reference that computes whole texts anew, with dense masks.

The reference knows no cache, no packing and no unroll: a round from anchor t that has drafted j tokens is the text of
positions 0 to t + j, whose first t + 1 states are the target's and whose others are the draft's own.

Shape legend: T positions of a text, H draft width, F fused taps, M anchors.
"""

from __future__ import annotations

import json
import math
import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from redraft.drafts import layers
from redraft.drafts.eagle.proposer import EagleProposer, StaticProposer
from redraft.drafts.eagle.unroll import collate, unroll
from redraft.drafts.eagle1 import Eagle1Draft
from redraft.drafts.eagle3 import Eagle3Draft
from redraft.drafts.files import load_draft, save_draft
from redraft.drafts.groups import attach_low_rank, attach_private, group_of, prepare
from redraft.errors import UserError
from redraft.settings.training import PrivateSize

TINY = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "tiny_drafts.py")))
FAMILIES = {"eagle3": (Eagle3Draft, TINY.EAGLE3), "eagle1": (Eagle1Draft, TINY.EAGLE1)}
CASES = [("eagle3", name) for name in TINY.VARIANTS] + [("eagle1", name) for name in TINY.EAGLE1_VARIANTS]
each_case = pytest.mark.parametrize(("family", "name"), CASES, ids=[f"{f} {n}" for f, n in CASES])
GAMMA = 5


def made(family: str, name: str) -> Any:
    """A draft with random weights everywhere, bound to a target that is an embedding and a head."""
    build, config = FAMILIES[family]
    options = (TINY.VARIANTS if family == "eagle3" else TINY.EAGLE1_VARIANTS)[name]
    draft, generator = build(replace(config, **options)), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter_name, parameter in draft.named_parameters():
            parameter.normal_(std=0.2, generator=generator)
            if "norm" in parameter_name:
                parameter.add_(1)
    draft.bind(target())
    return draft


def target() -> Any:
    generator = torch.Generator().manual_seed(2)
    table = torch.nn.Embedding.from_pretrained(torch.randn(40, 16, generator=generator))
    head = torch.nn.Linear(16, 40, bias=False)
    with torch.no_grad():
        head.weight.normal_(generator=generator)
    return SimpleNamespace(
        embedding=table, head=head, scale_logits=lambda x: x, device=torch.device("cpu"), dtype=torch.float32
    )


# -- the reference -----------------------------------------------------------------------------------------------------
class Reference:
    """The draft's own tensors and config; every number is computed here."""

    def __init__(self, draft: Any) -> None:
        self.state, self.config, self.draft = dict(draft.state_dict()), draft.config, draft

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps).rsqrt() * self.state[f"{name}.weight"]

    def linear(self, x: Tensor, name: str) -> Tensor:
        bias = self.state.get(f"{name}.bias")
        return x @ self.state[f"{name}.weight"].T + (0 if bias is None else bias)

    def turn(self, x_TAW: Tensor) -> Tensor:
        """As complex numbers: of the numbers that turn, each of the first half is joined with one of the second."""
        rope = self.config.rope_parameters
        width = int(self.config.head_dim * rope.get("partial_rotary_factor", 1.0))
        half = width // 2
        frequency = rope["rope_theta"] ** (-torch.arange(half).float() * 2 / width)
        angle_T1h = torch.outer(torch.arange(len(x_TAW)).float(), frequency)[:, None]
        pairs = torch.complex(x_TAW[..., :half], x_TAW[..., half:width]) * torch.polar(torch.ones(()), angle_T1h)
        return torch.cat([pairs.real, pairs.imag, x_TAW[..., width:]], -1)

    def layer(self, number: int, x: Tensor, residual: Tensor) -> Tensor:
        config, name = self.config, "midlayer" if not number else f"later.{number - 1}"
        at, width, length = f"{name}.self_attn", config.head_dim, len(x)
        query = self.linear(x, f"{at}.q_proj").view(length, -1, width)
        key = self.linear(x, f"{at}.k_proj").view(length, -1, width)
        value = self.linear(x, f"{at}.v_proj").view(length, -1, width)
        if config.qk_norm:
            query, key = self.norm(query, f"{at}.q_norm"), self.norm(key, f"{at}.k_norm")
        query, key = self.turn(query), self.turn(key)
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = torch.einsum("qaw,kaw->aqk", query, key) / math.sqrt(width)
        back = torch.arange(length)[:, None] - torch.arange(length)
        window = (config.windows or (0,) * config.num_layers)[number]
        seen = (back >= 0) & (back < window) if window else back >= 0
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        states = residual + self.linear(torch.einsum("aqk,kaw->qaw", weights, value).flatten(1), f"{at}.o_proj")
        x = self.norm(states, f"{name}.post_attention_layernorm")
        gate, up = self.linear(x, f"{name}.mlp.gate_proj"), self.linear(x, f"{name}.mlp.up_proj")
        return states + self.linear(gate * gate.sigmoid() * up, f"{name}.mlp.down_proj")

    def states(self, embeds: Tensor, states: Tensor) -> Tensor:
        """Pre-norm states [T, H] of a whole text."""
        if self.draft.family == "eagle1":
            x = residual = self.linear(torch.cat([embeds, states], -1), "fc")
        else:
            normed = self.norm(states, "midlayer.hidden_norm")
            residual = normed if self.config.norm_before_residual else states
            x = torch.cat([self.norm(embeds, "midlayer.input_layernorm"), normed], -1)
        for number in range(self.config.num_layers):
            residual = self.layer(number, x, residual)
            if number + 1 < self.config.num_layers:
                x = self.norm(residual, f"later.{number}.input_layernorm")
        return residual

    def fused(self, taps: Tensor) -> Tensor:
        if self.draft.family == "eagle1":
            return taps
        if self.config.norm_before_fc:
            taps = self.norm(taps, "input_norm")
        if self.config.fc_norm:
            taps = torch.cat([self.norm(part, f"fc_norm.{i}") for i, part in enumerate(taps.chunk(3, -1))], -1)
        return self.linear(taps, "fc")

    def chain(self, ids: Tensor, taps: Tensor, guesses: list[int]) -> Tensor:
        """The state [H] behind a round's guesses; ``ids`` are x_1 ... x_{t+1} beside the taps h_0 ... h_t."""
        states, end = self.fused(taps), len(taps)
        for drafted in range(len(guesses) + 1):
            told = torch.cat([ids, torch.tensor(guesses[:drafted], dtype=torch.long)])
            table = self.state.get("embed_tokens.weight", target().embedding.weight)
            found = self.states(table[told], states)
            own = found[end - 1 :]
            if self.draft.family == "eagle3" and self.config.norm_output:
                own = self.norm(own, "norm")
            states = torch.cat([self.fused(taps), own])
        return found[-1]

    def logits(self, state: Tensor) -> Tensor:
        if self.draft.family == "eagle1":
            return target().head(state)
        return self.linear(self.norm(state, "norm") if self.config.head_norm else state, "lm_head")

    def best(self, ids: Tensor, taps: Tensor, guesses: list[int]) -> int:
        return int(self.draft.vocabulary()[self.logits(self.chain(ids, taps, guesses)).argmax()])


def text(draft: Any, pairs: int, seed: int = 3) -> tuple[Tensor, Tensor]:
    """Tokens x_0 ... x_pairs and the taps of all but the last."""
    generator = torch.Generator().manual_seed(seed)
    width = len(draft.config.taps) * draft.config.target_hidden_size
    return torch.randint(0, 40, (pairs + 1,), generator=generator), torch.randn(pairs, width, generator=generator)


# -- what is computed --------------------------------------------------------------------------------------------------
@each_case
@torch.no_grad()
def test_chains_are_the_reference_s_round_after_round(family: str, name: str) -> None:
    """Also behind a round of which nothing was kept, and with prompts shorter and longer than the windows."""
    draft = made(family, name)
    reference, (ids, taps) = Reference(draft), text(draft, 24)
    for proposer in (EagleProposer(draft, target(), 40), StaticProposer(draft, target(), 40, GAMMA)):
        fed = 0
        for pairs in (1, 2, 9, 1, 6, 3):
            new = ids[fed + bool(fed) : fed + pairs + 1]
            found = proposer.propose(new, taps[fed : fed + pairs], GAMMA, lambda logits: logits.argmax(-1)).tolist()
            fed += pairs
            expected: list[int] = []
            for _ in range(GAMMA):
                expected.append(reference.best(ids[1 : fed + 1], taps[:fed], expected))
            assert found == expected
        proposer.rollback(0)
        again = proposer.propose(ids[:12], taps[:11], GAMMA, lambda logits: logits.argmax(-1)).tolist()
        assert again[0] == reference.best(ids[1:12], taps[:11], [])


@each_case
@torch.no_grad()
def test_every_node_of_a_tree_is_its_path_in_the_reference(family: str, name: str) -> None:
    draft = made(family, name)
    reference, (ids, taps) = Reference(draft), text(draft, 8)
    proposer = EagleProposer(draft, target(), 48)
    root = proposer.feed(ids, taps)
    torch.testing.assert_close(root[0], reference.chain(ids[1:], taps, []), atol=2e-5, rtol=1e-4)
    paths: list[list[int]] = []
    level, states = [([], root[0])], root
    for depth, children in enumerate((3, 2, 2, 1), 1):
        above = [path for path, _ in level for _ in range(children)]
        parents = torch.stack([state for _, state in level for _ in range(children)])
        tokens = torch.arange(len(above)) * 7 % 40
        new = [[*path, int(token)] for path, token in zip(above, tokens, strict=True)]
        everyone = [*paths, *new]
        mask = torch.tensor([[True] * 8 + [path[: len(node)] == node for node in everyone] for path in new])
        states = proposer.expand(tokens, parents, depth, mask)
        paths, level = everyone, list(zip(new, states, strict=True))
        for path, state in level:
            torch.testing.assert_close(state, reference.chain(ids[1:], taps, path), atol=2e-5, rtol=1e-4)


def answered(draft: Any) -> tuple[list[Any], Any]:
    """Three rows of different lengths and their features: a prompt shorter than the windows, one longer, and none."""
    rows = []
    for i, (prompt, response) in enumerate(((2, 9), (11, 7), (1, 12))):
        ids = text(draft, prompt + response, seed=10 + i)[0].tolist()
        rows.append(SimpleNamespace(key=f"r{i}", prompt_ids=ids[:prompt], response_ids=ids[prompt : prompt + response]))
    known = {row.key: text(draft, len(row.prompt_ids) + len(row.response_ids), seed=i)[1] for i, row in enumerate(rows)}

    def get(row: Any) -> tuple[Tensor, Tensor]:
        pairs, count = len(row.prompt_ids) + len(row.response_ids) - 2, len(row.response_ids) - 1
        return known[row.key][:pairs], torch.zeros(count, 16)

    return rows, SimpleNamespace(get=get)


@each_case
@torch.no_grad()
def test_an_unroll_holds_the_rounds_from_every_anchor(family: str, name: str) -> None:
    """Whole, and with the anchors of later steps cut down as a walk does."""
    draft = made(family, name)
    reference, (rows, features) = Reference(draft), answered(draft)
    batch = collate(rows, features, 4)
    whole = list(unroll(draft, target().embedding, batch, 4))
    at = 0
    for row in rows:
        ids, first = torch.tensor([*row.prompt_ids, *row.response_ids]), len(row.prompt_ids) - 1
        taps = features.get(row)[0]
        for anchor in range(first, len(taps)):
            for step in range(min(4, len(ids) - anchor - 1)):
                guesses = ids[anchor + 2 : anchor + 2 + step].tolist()
                expected = reference.chain(ids[1 : anchor + 2], taps[: anchor + 1], guesses)
                torch.testing.assert_close(whole[step][at], expected, atol=3e-5, rtol=1e-4)
            at += 1
    assert at == len(whole[0])
    drafting, generator = unroll(draft, target().embedding, batch, 4), torch.Generator().manual_seed(3)
    going = torch.arange(len(next(drafting)))
    for expected in whole[1:]:
        keep = torch.rand(len(going), generator=generator) < 0.5
        keep[-1] = True
        going = going[keep]
        torch.testing.assert_close(drafting.send(keep), expected[going], atol=1e-5, rtol=1e-4)


@each_case
def test_every_parameter_learns(family: str, name: str) -> None:
    draft = made(family, name)
    rows, features = answered(draft)
    states = list(unroll(draft, target().embedding, collate(rows, features, 3), 3))
    sum(draft.logits(state).square().mean() for state in states).backward()
    unused = {"norm.weight"} if not getattr(draft.config, "head_norm", True) and not draft.config.norm_output else set()
    assert {n for n, p in draft.named_parameters() if p.grad is None or not bool(p.grad.any())} == unused
    assert all(bool(p.grad.isfinite().all()) for p in draft.parameters() if p.grad is not None)


# -- its parts ---------------------------------------------------------------------------------------------------------
def answer(draft: Any) -> Tensor:
    ids, taps = text(draft, 9)
    proposer, drafted = EagleProposer(draft, target(), 40), []
    with torch.no_grad():
        state = proposer.feed(ids, taps)
        for depth in range(1, 4):
            drafted.append(draft.logits(state))
            state = proposer.expand(torch.tensor([depth]), state, depth)
    return torch.cat(drafted)


@each_case
def test_private_parts_sit_on_every_layer_and_merge(family: str, name: str, tmp_path: Path) -> None:
    draft = made(family, name)
    before, layers = answer(draft), draft.config.num_layers
    split = attach_low_rank(attach_private(draft, 8, seed=1), 2, seed=1)
    assert torch.equal(answer(split), before)
    assert sum(".private.down_proj" in n for n, _ in split.named_parameters()) == layers
    assert sum(".q_proj.low_rank.outer" in n for n, _ in split.named_parameters()) == layers
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter_name, parameter in split.named_parameters():
            if parameter_name.endswith(("private.down_proj.weight", "low_rank.outer")):
                parameter.normal_(std=0.2, generator=generator)
    changed = answer(split)
    assert not torch.allclose(changed, before, atol=1e-3)
    merged = split.merged()
    assert merged.config == replace(draft.config, intermediate_size=draft.config.intermediate_size + 8)
    torch.testing.assert_close(answer(merged), changed, atol=2e-4, rtol=1e-3)
    save_draft(tmp_path / "draft", merged, {"target": "t", "base_draft": "b"})
    back = load_draft(tmp_path / "draft")[0].bind(target())
    assert back.config == merged.config
    assert all(torch.equal(tensor, merged.state_dict()[key]) for key, tensor in back.state_dict().items())
    # Tensors of a file begin anywhere, and on some processors products of such have other last bits.
    torch.testing.assert_close(answer(back), answer(merged), atol=1e-5, rtol=1e-5)


@each_case
def test_groups_hold_the_parts_of_all_layers(family: str, name: str) -> None:
    draft = made(family, name)
    groups = {n: group_of(draft, n) for n, _ in draft.named_parameters()}
    for parameter, group in groups.items():
        if "norm" in parameter:
            assert group == ("fc" if parameter.startswith(("input_norm", "fc_norm")) else "norms")
        elif "self_attn" in parameter:
            assert group == "attention"
        elif ".mlp." in parameter:
            assert group == "shared"
        elif parameter.startswith("fc."):
            assert group == "fc"
    full, names = prepare(draft, "full", PrivateSize())
    assert names == [n for n, g in groups.items() if g != "embed"]
    assert full.parameters_per_token >= sum(p.numel() for n, p in full.named_parameters() if n in names)


def test_a_window_that_holds_the_whole_text_changes_nothing() -> None:
    wide = made("eagle3", "deep")
    narrow = wide.rebuilt(replace(wide.config, windows=(40, 40)), wide.state_dict())
    assert torch.equal(answer(narrow), answer(wide.rebuilt(replace(wide.config, windows=()), wide.state_dict())))
    assert not torch.allclose(answer(narrow), answer(wide), atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("window", [1, 2, 7, 9, 30])
def test_blocks_of_a_long_text_see_what_the_whole_would(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(5)
    query, key, value = (torch.randn(2, heads, 23, 6, generator=generator) for heads in (4, 2, 2))
    back = torch.arange(23)[:, None] - torch.arange(23)
    scores = query @ key.repeat_interleave(2, 1).mT / math.sqrt(6)
    weights = scores.masked_fill((back < 0) | (back >= window), -torch.inf).softmax(-1)
    monkeypatch.setattr(layers, "BLOCK", 8)
    found = layers.attend_causally(query, key, value, window)
    torch.testing.assert_close(found, weights @ value.repeat_interleave(2, 1))


# -- rotary angles -----------------------------------------------------------------------------------------------------
def plain(width: int, theta: float) -> Tensor:
    return theta ** (-torch.arange(width // 2).double() * 2 / width)


def ramp(width: int, theta: float, length: int) -> Tensor:
    """YaRN's share of the stretched angle: 1 where a dimension turns less than once within the trained length, 0 from
    32 turns on, and straight in the dimension's number between (arXiv 2309.00071, section 3.2)."""

    def place(turns: float) -> float:
        return width * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(place(32)), 0), min(math.ceil(place(1)), width - 1)
    return ((torch.arange(width // 2).double() - low) / max(high - low, 0.001)).clamp(0, 1)


def llama3(frequency: Tensor) -> Tensor:
    """Stretched by 8 below one turn in 32 positions, untouched above four, in between in the share of turns."""
    share = ((32 * frequency / (2 * math.pi) - 1) / 3).clamp(0, 1)
    return frequency * (share + (1 - share) / 8)


KINDS: dict[str, tuple[dict[str, Any], int, Tensor, float]] = {
    "default": ({"rope_theta": 1e4}, 8, plain(8, 1e4), 1.0),
    "part of a head": ({"rope_theta": 1e4, "partial_rotary_factor": 0.5}, 16, plain(8, 1e4), 1.0),
    "linear": ({"rope_theta": 1e4, "rope_type": "linear", "factor": 4.0}, 8, plain(8, 1e4) / 4, 1.0),
    "dynamic": ({"rope_theta": 1e4, "rope_type": "dynamic", "factor": 4.0}, 8, plain(8, 1e4), 1.0),
    "llama3": (TINY.LLAMA3, 8, llama3(plain(8, 500000.0)), 1.0),
    "part of a llama3 head": (TINY.LLAMA3 | {"partial_rotary_factor": 0.5}, 16, llama3(plain(8, 500000.0)), 1.0),
    "yarn": (
        TINY.YARN,
        8,
        plain(8, 1e6) * (1 - ramp(8, 1e6, 32) + ramp(8, 1e6, 32) / 2),
        0.1 * math.log(2) + 1,
    ),
    "longrope": (
        {
            "rope_theta": 1e4,
            "rope_type": "longrope",
            "short_factor": [1.0, 2.0, 3.0, 4.0],
            "long_factor": [9.0] * 4,
            "original_max_position_embeddings": 32,
        },
        8,
        plain(8, 1e4) / torch.tensor([1.0, 2.0, 3.0, 4.0]),
        math.sqrt(1 + math.log(2) / math.log(32)),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_angles_are_those_of_their_kind(kind: str) -> None:
    """As written down here, at any length that was asked for before."""
    rope, head, frequency, scale = KINDS[kind]
    rotary = layers.Rotary({"rope_type": "default"} | rope, head, 64)
    rotary(torch.tensor([900]))
    cosines, sines = rotary(torch.arange(40))
    angles = torch.outer(torch.arange(40).double(), frequency).repeat(1, 2)
    torch.testing.assert_close(cosines.double(), angles.cos() * scale, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(sines.double(), angles.sin() * scale, atol=2e-5, rtol=1e-5)
    turned = layers.rotate(torch.ones(40, 1, head), cosines, sines)
    assert torch.equal(turned[..., 2 * len(frequency) :], torch.ones(40, 1, head - 2 * len(frequency)))


# -- what no draft can be ----------------------------------------------------------------------------------------------
BAD: dict[str, dict[str, Any]] = {
    "num_layers": {"num_layers": 0},
    "hidden_size": {"hidden_size": 16.0},
    "head_dim": {"head_dim": True},
    "num_key_value_heads": {"num_key_value_heads": 3},
    "rms_norm_eps": {"rms_norm_eps": float("nan")},
    "qk_norm": {"qk_norm": 1},
    "output_bias": {"output_bias": "no"},
    "windows": {"windows": (4, 4)},
    "max_position_embeddings": {"max_position_embeddings": -1},
    "taps": {"taps": (1.0,)},
}
BAD_ROPE: dict[str, Any] = {
    "base below zero": {"rope_theta": -1.0},
    "base not a number": {"rope_theta": float("nan")},
    "no base": {},
    "text for a base": {"rope_theta": "1e4"},
    "unknown kind": {"rope_theta": 1e4, "rope_type": "proportional"},
    "no factor": {"rope_theta": 1e4, "rope_type": "linear"},
    "endless factor": {"rope_theta": 1e4, "rope_type": "yarn", "factor": float("inf")},
    "more than the head": {"rope_theta": 1e4, "partial_rotary_factor": 1.5},
    "an odd part": {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
    "no table": [1e4],
}


@pytest.mark.parametrize(
    ("name", "values"),
    [*BAD.items(), *((f"rope_parameters: {why}", {"rope_parameters": rope}) for why, rope in BAD_ROPE.items())],
)
def test_a_config_that_is_none_is_refused_by_the_value(name: str, values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"a draft cannot have {name.split(':')[0]} "):
        replace(TINY.EAGLE3, **values)


def test_one_shape_has_one_config() -> None:
    assert replace(TINY.EAGLE3, windows=(0,), output_bias=False) == TINY.EAGLE3
    assert set(TINY.EAGLE3.to_dict()) & set(TINY.EAGLE3.LATER) == set()
    for options in TINY.VARIANTS.values():
        config = replace(TINY.EAGLE3, **options)
        assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config
