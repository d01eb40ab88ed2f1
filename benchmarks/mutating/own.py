"""Mutations of redraft.json: what the package's own format says of a draft and of its private part."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path

from mutating.base import (
    DEEP,
    DIGITS,
    EITHER,
    GONE,
    NAN,
    REFUSE,
    SAME,
    Change,
    Expect,
    Mutation,
    Path_,
    becomes,
    doubled,
    found,
    may_become,
    rewritten,
    shown,
)
from mutating.configs import BAD, NEW, Rule
from mutating.sources import Source
from redraft.drafts.eagle1 import Eagle1Config
from redraft.drafts.eagle3 import Eagle3Config

FILE = "redraft.json"
CONFIGS = {"eagle1": Eagle1Config, "eagle3": Eagle3Config}

# Sizes that the tensors must bear out.
SIZES = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "num_layers"),
    *("target_vocab_size", "target_hidden_size", "draft_vocab_size", "private_width"),
)
SWITCHES = ("attention_bias", "own_embedding", "qk_norm", "norm_before_fc", "fc_norm", "fc_bias")


def rules(source: Source) -> dict[Path_, Rule]:
    """The rules of the keys of this file; a field that a file leaves out is at its default."""
    fields, raw = source.fields, source.raw["config"]
    known = {field.name: field for field in dataclasses.fields(CONFIGS[source.family])}
    keys: dict[str, Rule] = {}
    for name, field in known.items():
        value = raw.get(name, fields[name])
        default = field.default if field.default is not dataclasses.MISSING else GONE
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        same = default == value or (
            isinstance(value, list) and list(default or ()) == value if default is not GONE else False
        )
        needed = name in (*SIZES, *SWITCHES, "taps", "low_rank", "low_rank_on", "output_bias", "windows")
        absent = SAME if same else REFUSE if default is GONE or needed else may_become(**{name: default})
        if name in (
            "private_experts",
            "private_active",
            "shared_experts",
            "shared_active",
            "low_rank_alpha",
            "balance",
        ):
            absent = SAME if same else EITHER
        if name in CONFIGS[source.family].ALWAYS:
            absent = REFUSE
        if name in SIZES:
            keys[name] = Rule("whole", absent, ((value * 2 + 1, REFUSE), (1 << 40, REFUSE)))
        elif name in SWITCHES:
            keys[name] = Rule("flag", absent, ((not value, REFUSE),))
        elif name in ("norm_before_residual", "norm_output", "head_norm"):
            keys[name] = Rule("flag", absent, ((not value, becomes(**{name: not value})),))
        elif name in ("private_experts", "private_active", "shared_experts", "shared_active"):
            keys[name] = Rule("whole", absent, ((5, EITHER if not fields["private_width"] else REFUSE),))
        elif name == "low_rank":
            keys[name] = Rule("whole", absent, ((3, EITHER),))
    keys |= {
        "rms_norm_eps": Rule("number", REFUSE, ((3e-2, becomes(rms_norm_eps=3e-2)),)),
        "max_position_embeddings": Rule("whole", REFUSE, ((512, SAME), (1 << 40, REFUSE))),
        "low_rank_on": Rule("texts", SAME if not fields["low_rank_on"] else REFUSE, ((["no.such.layer"], REFUSE),)),
        "low_rank_alpha": Rule("number", EITHER),
        "balance": Rule("number", SAME),
        "rope_parameters": Rule("object", REFUSE, (({"rope_type": "banana", "rope_theta": 5.0}, REFUSE), ({}, REFUSE))),
    }
    bias, layers = (
        fields["attention_bias"] if fields["output_bias"] is None else fields["output_bias"],
        fields["num_layers"],
    )
    keys["output_bias"] = Rule(
        "flag", SAME if fields["output_bias"] is None else REFUSE, ((not bias, REFUSE), (bias, SAME))
    )
    windows = [2, *[0] * (layers - 1)]
    none = SAME if not any(fields["windows"]) else may_become(windows=())
    keys["windows"] = Rule(
        "ids", none, ((windows, becomes(windows=windows)), ([*windows, 3], REFUSE), ([-1] * layers, REFUSE))
    )
    if source.family == "eagle3":
        taps = list(raw["taps"])
        others = [taps[0] + 1, *(k + 2 for k in taps[1:])]
        backwards = may_become(taps=taps[::-1])
        keys["taps"] = Rule(
            "ids", REFUSE, ((others, becomes(taps=others)), (taps[::-1], backwards), ([99, *taps[1:]], REFUSE))
        )
    paths: dict[Path_, Rule] = {("config", name): rule for name, rule in keys.items()}
    rope = {**fields["rope_parameters"]}
    for name in [name for name in NEW if name in rope]:
        changed = becomes(rope_parameters={**rope, name: NEW[name]})
        without = {key: value for key, value in rope.items() if key != name}
        absent = REFUSE if name == "rope_theta" else may_become(rope_parameters=without)
        absent = Expect(True, (*absent.reads, Change()))
        whole = name.startswith("original")
        paths["config", "rope_parameters", name] = Rule("whole" if whole else "number", absent, ((NEW[name], changed),))
    return paths | _top(source)


BAD_OWN = BAD | {"texts": ("fc", 1, [1], [["fc"]], {"fc": 1}, DEEP, NAN), "free": ()}


def _top(source: Source) -> dict[Path_, Rule]:
    """What stands beside the config."""
    private = source.raw["kind"] == "private"
    text = Rule("text", REFUSE, (("0000000000000000", REFUSE),))
    keys: dict[Path_, Rule] = {
        ("schema",): Rule("whole", REFUSE, ((99, REFUSE), (True, REFUSE), (1.0, REFUSE))),
        ("kind",): Rule("text", REFUSE, (("part", REFUSE), ("private" if not private else "draft", REFUSE))),
        ("family",): Rule("text", REFUSE, (("eagle9", REFUSE), ("standalone", REFUSE), ("../x", REFUSE))),
        ("config",): Rule("object", REFUSE, (({}, REFUSE),)),
        ("content_hash",): text,
        ("provenance",): Rule("object", SAME, (({}, SAME), ({"a": 1}, SAME))),
        ("method",): Rule("free", SAME, (("full", SAME),)),
        ("a_key_of_tomorrow",): Rule("free", SAME, ((1, SAME), ({"a": [1]}, SAME))),
        ("config", "a_key_of_tomorrow"): Rule("free", REFUSE, ((1, REFUSE), (None, REFUSE))),
    }
    if private:
        listed = list(source.raw["tensors"])
        keys["base_draft_hash",] = text
        keys["tensors",] = Rule(
            "texts", REFUSE, ((listed[1:], REFUSE), ([*listed, "norm.weight"], REFUSE), ([], REFUSE))
        )
        keys["by_rows",] = Rule("texts", EITHER, ((["fc.weight"], REFUSE), (["no.such"], REFUSE)))
        bent = {name: {**about, "bits": 77} for name, about in source.raw.get("coarse", {}).items()}
        keys["coarse",] = Rule("object", SAME if not bent else REFUSE, ((bent or {"fc.weight": 1}, REFUSE),))
    return keys


def drawn(source: Source, rng: random.Random) -> Iterator[Mutation]:
    """Mutations without end."""
    while True:
        yield rng.choice((changed, changed, changed, changed, twice, whole_file))(source, rng)


def changed(source: Source, rng: random.Random) -> Mutation:
    """A key removed, null, of the wrong type, or with another value."""
    known = rules(source)
    path = rng.choice(list(known))
    rule, way = known[path], rng.choice(["absent", "null", "bad", "good"])
    there = found(source.raw, path) is not None or path == ("config", "low_rank_alpha")
    value, expect, kind = GONE, rule.absent if there else SAME, "key removed or null"
    if way == "null":
        value = None
        expect = Expect(True, (*rule.absent.reads, *(SAME.reads if not there else ())))
    elif way == "bad" and BAD_OWN[rule.kind]:
        value, kind = rng.choice(BAD_OWN[rule.kind]), "wrong type or range"
        # Zero is a width of a private part that there is none of.
        expect = EITHER if value == 0 and type(value) is int and not found(source.raw, path) else rule.bad
    elif way == "good" and rule.good:
        (value, expect), kind = rng.choice(rule.good), "another value"
    names = (
        path[-1],
        FILE,
        "rotary",
        *(("features", "taps") if path[-1] == "taps" else ()),
        source.weights.name,
        "vocabulary",
    )
    names += {"kind": ("artifact", "private part", "draft.safetensors"), "tensors": ("has no", "lacks")}.get(
        path[-1], ()
    )
    what = f"{'.'.join(path)}: {shown(found(source.raw, path))} -> {shown(value)}"
    return Mutation(f"own format: {kind}", what, rewritten(FILE, path, value), (*names, "base draft"), expect)


def twice(source: Source, rng: random.Random) -> Mutation:
    """A key that stands twice with two values."""
    key = rng.choice(["schema", "kind", "family", "content_hash"])
    return Mutation("own format: key twice", f"{key} twice", doubled(FILE, key, "x"), (key,), REFUSE)


def whole_file(source: Source, rng: random.Random) -> Mutation:
    """redraft.json that is no JSON object, or none that can be read."""
    text = (source.folder / FILE).read_bytes()
    ways = {
        "empty": b"",
        "cut in half": text[: len(text) // 2],
        "a list": b"[]",
        "null": b"null",
        "no UTF-8": b"\xff" + text,
    }
    ways |= {"nested deep": b"[" * 100_000, "of 5,000 digits": DIGITS.text.encode(), "an empty object": b"{}"}
    way = rng.choice(list(ways))

    def apply(folder: Path) -> None:
        (folder / FILE).write_bytes(ways[way])

    return Mutation("own format: whole file", f"{FILE} is {way}", apply, (FILE,), REFUSE)
