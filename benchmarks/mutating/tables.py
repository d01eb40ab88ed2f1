"""Mutations of tensors: their numbers, shapes, types and names, and the two maps of a reduced vocabulary."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mutating.base import EITHER, REFUSE, SAME, Change, Expect, Mutation
from mutating.sources import Source

State = dict[str, Tensor]
EMBEDDING = "embed_tokens.weight"

LEGACY = ((r"^model\.", ""), (r"^layers\.0\.", "midlayer."), (r"^aux_norm_(low|mid|high)\.", ""))


def held(source: Source) -> State:
    """The tensors of the source's file by the file's names."""
    path = source.weights
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def ours(name: str) -> str:
    """The package's name of a tensor of a file."""
    name = re.sub(r"^layers\.0\.", "midlayer.", re.sub(r"^model\.", "", name))
    return re.sub(r"^layers\.(\d+)\.", lambda m: f"later.{int(m[1]) - 1}.", name)


def saved(state: State, file: str) -> Callable[[Path], None]:
    """Puts these tensors in the file's place."""

    def apply(folder: Path) -> None:
        if file.endswith(".safetensors"):
            save_file(
                {name: tensor.clone().contiguous() for name, tensor in state.items()}, folder / file, {"format": "pt"}
            )
        else:
            torch.save(state, folder / file)

    return apply


def _put(kind: str, what: str, source: Source, state: State, names: tuple[str, ...], expect: Expect) -> Mutation:
    if source.own:
        # Our own file is held to its fingerprint: whatever is not the same again is refused.
        old = held(source)
        same = set(old) == set(state) and all(_equal(old[name], state[name]) for name in old)
        expect, names = SAME if same else REFUSE, (*names, source.weights.name)
    return Mutation(kind, what, saved(state, source.weights.name), names, expect)


def _equal(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)


def _floats(source: Source, state: State) -> list[str]:
    """The tensors that the draft computes with."""
    return [
        name
        for name, tensor in state.items()
        if tensor.is_floating_point() and (source.own or ours(name) in source.state)
    ]


def _said(name: str) -> tuple[str, ...]:
    return (ours(name), name, "layers.", "later.")


def numbers(source: Source, rng: random.Random) -> Mutation:
    """One number that is none."""
    state = held(source)
    name = rng.choice(_floats(source, state))
    value = rng.choice([float("nan"), float("inf"), float("-inf")])
    flat = state[name].clone().reshape(-1)
    flat[rng.randrange(len(flat))] = value
    state[name] = flat.reshape(state[name].shape)
    return _put("tensors: NaN or infinity", f"{value} in {name}", source, state, _said(name), REFUSE)


def shapes(source: Source, rng: random.Random) -> Mutation:
    """Another shape; of square matrices transposed nobody can tell, so the draft must then be that one."""
    state = held(source)
    name = rng.choice(_floats(source, state))
    tensor = state[name]
    ways = {
        "one row less": tensor[1:],
        "one row more": torch.cat([tensor, tensor[:1]]),
        "flattened": tensor.reshape(-1),
        "with a dimension more": tensor[None],
        "transposed": tensor.T if tensor.ndim == 2 else tensor[:, None],
        "empty": tensor[:0],
        "a single number": tensor.reshape(-1)[0],
    }
    way = rng.choice(list(ways))
    state[name] = new = ways[way]
    unseen = new.shape == tensor.shape
    expect = Expect(False, (Change(tensors={ours(name): new}),)) if unseen else REFUSE
    # Of a size that no key tells, the message may name what it was held against.
    names = (*_said(name), "fc.weight", "d2t", "heads", "lm_head", "proj.weight")
    return _put("tensors: another shape", f"{name} {way}", source, state, names, expect)


TYPES = (
    *(torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool, torch.float64, torch.complex64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16),
)


def types(source: Source, rng: random.Random) -> Mutation:
    """Another type of numbers; of the three that drafts have, the rounded numbers are the draft's."""
    state = held(source)
    name = rng.choice(_floats(source, state))
    kind = rng.choice([kind for kind in TYPES if kind != state[name].dtype])
    state[name] = new = state[name].to(kind)
    taken = kind in (torch.float16, torch.bfloat16)
    expect = Expect(False, (Change(tensors={ours(name): new.float()}),)) if taken else REFUSE
    if taken and ours(name) == EMBEDDING:
        expect = Expect(False, (*expect.reads, Change()))  # the target's own table, rounded, is its own
    return _put("tensors: another type", f"{name} as {kind}", source, state, _said(name), expect)


def missing(source: Source, rng: random.Random) -> Mutation:
    """A tensor that is not there; what no config tells is then no part of the draft."""
    state = held(source)
    name = rng.choice(list(state))
    del state[name]
    expect = REFUSE
    if name in ("d2t", "t2d"):
        expect = EITHER if name == "t2d" or "t2d" in state else REFUSE
    elif ours(name) == EMBEDDING:
        same_width = source.fields["hidden_size"] == source.facts.hidden_size
        expect = Expect(True, (Change({"own_embedding": False}, {EMBEDDING: None}),)) if same_width else REFUSE
    elif ours(name) == "fc.bias":
        expect = Expect(True, (Change({"fc_bias": False}, {"fc.bias": None}),))
    elif ours(name) not in source.state and not source.own:
        expect = SAME  # what no reader needs, as the teacher's head
    twin = {"input_layernorm": "hidden_norm", "hidden_norm": "input_layernorm"}
    if ours(name).startswith("later.") and any(name.replace(a, b) in state for a, b in twin.items() if a in name):
        expect = EITHER  # the norm before a further layer, which stands there under both of its names
    names = (*_said(name), "bias", "q_norm", "d2t", "width", "architectures", "proj")
    return _put("tensors: missing", f"{name} left out", source, state, names, expect)


def extra(source: Source, rng: random.Random) -> Mutation:
    """A tensor more."""
    state, hidden = held(source), source.fields["hidden_size"]
    some = next(iter(state))
    bias = torch.linspace(-1, 1, hidden)
    more: dict[str, tuple[Tensor, Expect]] = {
        "strange.weight": (torch.ones(3), REFUSE),
        "lm_head.bias": (torch.ones(source.fields["target_vocab_size"]), REFUSE),
        "norm.bias": (torch.zeros(hidden), REFUSE),
        "layers.7.mlp.up_proj.weight": (torch.ones(4, 4), REFUSE),
        "midlayer.self_attn.rotary_emb.inv_freq": (torch.ones(4), SAME),
        "mask_hidden": (torch.ones(hidden), REFUSE),
        "midlayer.mlp.experts.0.up_proj.weight": (torch.ones(4, 4), REFUSE),
        "fc.weight_scale": (torch.ones(1), REFUSE),
        "midlayer.self_attn.q_proj.lora_A.weight": (torch.ones(2, 2), REFUSE),
        "": (torch.ones(2), REFUSE),
        "fc.weight\nand more": (torch.ones(2), REFUSE),
        f"model.{some.removeprefix('model.')}" if not some.startswith("model.") else some[6:]: (state[some], REFUSE),
    }
    if "fc.bias" not in source.state:
        fc = Expect(source.family == "eagle1", (Change({"fc_bias": True}, {"fc.bias": bias}),))
        more["fc.bias"] = (bias, REFUSE if source.family == "eagle1" else fc)
    if "midlayer.self_attn.q_proj.bias" not in source.state:
        rows = source.state["midlayer.self_attn.q_proj.weight"].shape[0]
        more["midlayer.self_attn.q_proj.bias"] = (torch.ones(rows), REFUSE)
    name = rng.choice(list(more))
    state[name], expect = more[name]
    names = (
        name.split("\n")[0] or "extra",
        ours(name) or "extra",
        ours(some),
        "extra",
        "bias",
        "layers",
        "fingerprint",
    )
    return _put("tensors: extra", f"{name!r} added", source, state, names, expect)


def renamed(source: Source, rng: random.Random) -> Mutation:
    """One under another name, or all under another hand's names, or two that change places."""
    state = held(source)
    way = rng.choice(["one", "prefix", "layers", "swapped"])
    if way == "one":
        name = rng.choice(_floats(source, state))
        new = rng.choice(
            [name.upper(), f"draft.{name}", name.replace("weight", "wieght"), f"{name} ", f"module.{name}"]
        )
        state[new] = state.pop(name)
        return _put("tensors: renamed", f"{name} -> {new}", source, state, (*_said(name), new), REFUSE)
    if way == "swapped":
        names = _floats(source, state)
        pairs = [(a, b) for a in names for b in names if a < b and state[a].shape == state[b].shape]
        left, right = rng.choice(pairs)
        changed = {ours(left): state[right], ours(right): state[left]}
        state[left], state[right] = state[right], state[left]
        expect = Expect(False, (Change(tensors=changed),))
        return _put("tensors: two swapped", f"{left} and {right}", source, state, (left,), expect)
    put = {"prefix": lambda n: f"model.{n}", "layers": lambda n: re.sub(r"^midlayer\.", "layers.0.", n)}[way]
    new_state = {put(name) if not name.startswith("model.") else name: tensor for name, tensor in state.items()}
    return _put("tensors: names of another hand", way, source, new_state, ("model.", "layers."), SAME)


# -- the maps ----------------------------------------------------------------------------------------------------------
def maps(source: Source, rng: random.Random) -> Mutation | None:
    """One change of the maps of a reduced vocabulary; none for a draft that has none."""
    if "d2t" not in source.state:
        return full_maps(source, rng)
    state, rows = held(source), source.fields["target_vocab_size"]
    offsets, marks = source.state["d2t"].long(), source.state["t2d"].bool()
    ids = offsets + torch.arange(len(offsets))
    told, k = "t2d" in state, rng.randrange(1, len(ids) - 1)
    sure = told or int(ids[-1]) + len(ids) > rows
    moved = offsets.clone()
    ways: dict[str, tuple[Tensor | None, Tensor | None, Expect]] = {}

    def way(name: str, d2t: Tensor | None, t2d: Tensor | None, expect: Expect) -> None:
        ways[name] = d2t, t2d, expect

    moved[k] = ids[k - 1] - k
    way("an id twice", moved, None, REFUSE)
    for name, value in {"an id beyond the vocabulary": rows, "an id below zero": -5, "an id of 2^40": 1 << 40}.items():
        moved = offsets.clone()
        moved[k] = value - k
        way(name, moved, None, REFUSE)
    way("descending", ids.flip(0) - torch.arange(len(ids)), None, REFUSE)
    swapped = ids.clone()
    swapped[[k - 1, k]] = swapped[[k, k - 1]]
    way("two ids swapped", swapped - torch.arange(len(ids)), None, REFUSE)
    way("d2t int32", offsets.int(), None, SAME)
    way("d2t int16", offsets.to(torch.int16), None, SAME)
    way("d2t float32", offsets.float(), None, REFUSE)
    way("d2t bool", offsets.bool(), None, REFUSE)
    way("d2t complex", offsets.to(torch.complex64), None, REFUSE)
    way("d2t as target ids", ids, None, SAME if sure else EITHER)
    way("d2t of two dimensions", offsets[None], None, REFUSE)
    way("d2t one entry short", offsets[:-1], None, REFUSE)
    way("d2t one entry long", torch.cat([offsets, offsets[-1:]]), None, REFUSE)
    if told:
        way("t2d uint8", None, marks.to(torch.uint8), SAME)
        way("t2d int64", None, marks.long(), SAME)
        way("t2d float32", None, marks.float(), REFUSE)
        way("t2d of twos", None, marks.to(torch.uint8) * 2, REFUSE)
        way("t2d marks one more", None, marks | (torch.arange(rows) == int((~marks).nonzero()[0])), REFUSE)
        way("t2d marks one less", None, marks & (torch.arange(rows) != int(ids[k])), REFUSE)
        way("t2d one row short", None, marks[:-1], REFUSE)
        way("t2d all false", None, torch.zeros_like(marks), REFUSE)
        way("t2d shifted by one", None, marks.roll(1), REFUSE)
    off = offsets + 1
    if int(ids[-1]) + 1 < rows:
        shifted = torch.isin(torch.arange(rows), ids + 1)
        changed = Change(tensors={"d2t": off, "t2d": shifted})
        way("off by one", off, None, REFUSE if told else Expect(False, (changed,)))
        way("both off by one", off, shifted if told else None, Expect(False, (changed,)))
    name = rng.choice(list(ways))
    d2t, t2d, expect = ways[name]
    for key, table in {"d2t": d2t, "t2d": t2d}.items():
        if table is not None and (key in state or key == "d2t"):
            state[key] = table
    return _put("maps", name, source, state, ("d2t", "t2d"), expect)


def full_maps(source: Source, rng: random.Random) -> Mutation | None:
    """Maps in a file of the full vocabulary: those that change nothing may stand there."""
    if source.family != "eagle3":
        return None
    state, rows = held(source), source.fields["target_vocab_size"]
    zero, ones = torch.zeros(rows, dtype=torch.int64), torch.ones(rows, dtype=torch.bool)
    bent = zero.clone()
    bent[3] = 1
    ways: dict[str, tuple[State, Expect]] = {
        "maps onto itself": ({"d2t": zero, "t2d": ones}, SAME),
        "d2t of zeros": ({"d2t": zero}, SAME),
        "d2t that is none of zeros": ({"d2t": bent}, REFUSE),
        "t2d that leaves one out": ({"t2d": ones & (torch.arange(rows) != 4)}, REFUSE),
        "d2t of zeros, shorter": ({"d2t": zero[:-9]}, REFUSE),
        "d2t of floats": ({"d2t": zero.float()}, REFUSE),
    }
    name = rng.choice(list(ways))
    more, expect = ways[name]
    return _put("maps", f"full vocabulary: {name}", source, state | more, ("d2t", "t2d"), expect)


MAKERS = (numbers, shapes, shapes, types, types, missing, missing, extra, extra, renamed, maps, maps, maps, maps)


def drawn(source: Source, rng: random.Random) -> Iterator[Mutation]:
    """Mutations without end."""
    while True:
        found = rng.choice(MAKERS)(source, rng)
        if found is not None:
            yield found
