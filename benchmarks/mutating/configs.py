"""Mutations of config.json: each key that a reader knows, with what every kind of value there must come to.

The rules are this script's own, by what each key means in the trainers' and engines' code; where a key's absence or
another value leaves a choice, a refusal is allowed too.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from mutating.base import (
    BEYOND,
    DEEP,
    DEEP_OBJECT,
    DIGITS,
    EITHER,
    GONE,
    INFINITY,
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
from mutating.sources import Source

IDS = "eagle_aux_hidden_state_layer_ids"

# Values of the wrong kind or out of range, by the kind of the key.
NO_NUMBER = (True, NAN, INFINITY, BEYOND, [1], {"a": 1}, DEEP, DEEP_OBJECT, DIGITS, -1)
BAD: dict[str, tuple[Any, ...]] = {
    "whole": (*NO_NUMBER, "32", 1.5, 0, 1 << 62),
    "number": (*NO_NUMBER, "0.1", 1e300, -1e-5),
    "flag": (0, 1, "false", "true", [], {"a": 1}, 1.0, NAN, DEEP),
    "text": (0, True, ["silu"], {"a": 1}, 1.5, NAN, DEEP),
    "ids": (2, "2, 4, 5", [1, "2", 3], [1.0, 2.0, 3.0], [True, 2, 3], {"a": 1}, [[1]], [1, None, 3], DEEP, NAN),
    "kinds": ("full_attention", 1, True, {"a": 1}, [1], [["full_attention"]], ["chunked_attention"], DEEP, NAN),
    "object": ("x", 1, True, [1], DEEP, NAN),
    "rope": ("x", 1, True, [1], DEEP, NAN, 0, "", [], False),
    "names": ("LlamaForCausalLM", 1, {"a": 1}, [["x"]], ["NoSuchModel"], DEEP, NAN),
}
ANYTHING = (None, True, "x", 7, [1], {"a": 1}, NAN, BEYOND, -1, GONE)


@dataclass(frozen=True)
class Rule:
    """A key: the kind of its values, what its absence (or null) comes to, good values with what each comes to, and
    what a bad one does."""

    kind: str
    absent: Expect
    good: tuple[tuple[Any, Expect], ...] = ()
    bad: Expect = REFUSE


def rules(source: Source) -> dict[Path_, Rule]:
    """The rules of all keys of this config, those of absent keys included."""
    raw = source.raw
    place: Path_ = ("transformer_layer_config",) if "speculators_model_type" in raw else ()
    keys = {(*place, name): rule for name, rule in {**_sizes(source), **_layer(source), **_windows(source)}.items()}
    keys |= {(*place, *path): rule for path, rule in _rope(source, found(raw, place) if place else raw).items()}
    eagle = _eagle3(source) if source.family == "eagle3" else {("bias",): Rule("flag", EITHER)}
    return keys | eagle | _format(source)


def _sizes(source: Source) -> dict[str, Rule]:
    fields = source.fields
    layers = fields["num_layers"]
    twice = {
        name: Rule("whole", EITHER, ((fields[name] * 2, REFUSE), (float(fields[name]), EITHER)))
        for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    }
    rows = fields["target_vocab_size"]
    # The tensors tell how many layers there are; a count may be the target's.
    return twice | {
        "vocab_size": Rule("whole", EITHER, ((rows + 1, EITHER), (rows - 1, EITHER), (rows * 2, REFUSE))),
        "num_hidden_layers": Rule("whole", EITHER, ((layers + 1, EITHER), (32, EITHER), (1 << 15, EITHER))),
        "rms_norm_eps": Rule("number", may_become(rms_norm_eps=1e-6), ((3e-2, becomes(rms_norm_eps=3e-2)),)),
        "max_position_embeddings": Rule("whole", EITHER, ((512, EITHER), (131072, EITHER))),
    }


def _layer(source: Source) -> dict[str, Rule]:
    """What else describes a layer. Automodel's config is its target's: kinds of layers there are not the draft's."""
    targets = source.trainer == "automodel"
    other = EITHER if targets else REFUSE
    kinds = (("gemma3", other), ("qwen3", EITHER if source.fields["qk_norm"] else other))
    return {
        "attention_bias": Rule("flag", EITHER, ((not source.fields["attention_bias"], EITHER),)),
        "qkv_bias": Rule("flag", EITHER, ((not source.fields["attention_bias"], EITHER),)),
        "mlp_bias": Rule("flag", SAME, ((True, REFUSE), (False, SAME))),
        "hidden_act": Rule("text", SAME, (("silu", SAME), ("gelu", REFUSE), ("relu2", REFUSE))),
        "model_type": Rule("text", EITHER, kinds),
        "quantization_config": Rule("object", SAME, (({"bits": 4, "quant_method": "gptq"}, REFUSE),)),
        "logit_scale": Rule("number", SAME, ((0.5, REFUSE), (1.0, SAME))),
        "residual_multiplier": Rule("number", SAME, ((0.22, REFUSE),)),
        "attention_multiplier": Rule("number", SAME, ((0.5, REFUSE),)),
        "final_logit_softcapping": Rule("number", SAME, ((30.0, REFUSE),)),
    }


def _windows(source: Source) -> dict[str, Rule]:
    layers, windows = source.fields["num_layers"], tuple(source.fields["windows"])
    slides, full = ["sliding_attention"] * layers, ["full_attention"] * layers
    if source.trainer == "automodel":
        kinds: tuple[tuple[Any, Expect], ...] = ((slides, SAME), (full, SAME))
        return {
            "layer_types": Rule("kinds", SAME, kinds, bad=EITHER),
            "sliding_window": Rule("whole", EITHER, (), EITHER),
        }
    if not any(windows):
        return {
            "layer_types": Rule("kinds", SAME, ((full, SAME), (slides + full, REFUSE))),
            "sliding_window": Rule("whole", SAME, ((3, SAME),), bad=EITHER),
            "use_sliding_window": Rule("flag", SAME, ((True, SAME), (False, SAME)), bad=EITHER),
        }
    wide = max(windows)
    mixed = tuple(3 if window else 0 for window in windows)
    return {
        "layer_types": Rule(
            "kinds",
            may_become(windows=()),
            ((full, becomes(windows=())), (slides, becomes(windows=(wide,) * layers)), (slides * 2, REFUSE)),
        ),
        "sliding_window": Rule("whole", REFUSE, ((3, becomes(windows=mixed)),)),
        "use_sliding_window": Rule("flag", SAME, ((False, REFUSE), (True, SAME))),
    }


# -- angles ------------------------------------------------------------------------------------------------------------
NEW = {
    "rope_theta": 777.0,
    "factor": 3.0,
    "low_freq_factor": 0.5,
    "high_freq_factor": 9.0,
    "original_max_position_embeddings": 48,
    "beta_fast": 3.0,
    "beta_slow": 0.5,
    "attention_factor": 0.7,
}
NEEDED = {"linear": ["factor"], "dynamic": ["factor"], "yarn": ["factor"], "llama3": list(NEW)[1:5]}


def _rope(source: Source, raw: dict[str, Any]) -> dict[Path_, Rule]:
    """The two forms of rotary settings. With both in a file a change of one makes them differ: a choice."""
    rope = dict(source.fields["rope_parameters"])
    kind = rope.get("rope_type", "default")
    forms = [form for form in ("rope_parameters", "rope_scaling") if found(raw, (form,))]
    tops = [key for key in ("rope_theta",) if raw.get(key) is not None]
    partial = source.family == "eagle3"

    def other(several: bool, **changes: Any) -> Expect:
        new = {key: value for key, value in (rope | changes).items() if value is not None}
        if not several:
            return Expect(False, (Change({"rope_parameters": new}),))
        return Expect(True, (Change({"rope_parameters": new}), Change()), ("rope",))

    def gone(several: bool, **changes: Any) -> Expect:
        """What is left out of one form may still stand in the other; where another value is taken, that is told."""
        if several:
            return Expect(True, (Change(), *other(False, **changes).reads))
        return Expect(True, other(False, **changes).reads)

    keys: dict[Path_, Rule] = {}
    for form in forms:
        several = len(forms) > 1
        theta = raw.get("rope_theta") or 10000.0
        told = () if raw.get("rope_theta") else ("rope",)
        nothing = Expect(True, (Change({"rope_parameters": {"rope_theta": theta}}),), told)
        keys[form,] = Rule("rope", EITHER if several else nothing, (({"full_attention": dict(rope)}, REFUSE),))
        for name, value in NEW.items():
            matters = (
                name in (*NEEDED.get(kind, []), "rope_theta") or kind == "yarn" and not name.endswith("freq_factor")
            )
            if not matters or (name == "rope_theta" and form == "rope_scaling"):
                continue
            twice = several or (name == "rope_theta" and bool(tops))
            absent = REFUSE if name in NEEDED.get(kind, []) and not several else gone(twice, **{name: None})
            if name == "rope_theta":
                absent = gone(twice, rope_theta=10000.0)
            whole = name.startswith("original")
            keys[form, name] = Rule("whole" if whole else "number", absent, ((value, other(twice, **{name: value})),))
        lost = Expect(True, (Change({"rope_parameters": {"rope_theta": rope["rope_theta"]}}),), ("rope",))
        plain = lost if kind != "default" else SAME
        kinds = (("banana", REFUSE), ("longrope", REFUSE), *([("linear", REFUSE)] if kind == "default" else []))
        keys[form, "rope_type"] = Rule("text", EITHER if several else plain, kinds)
        half = other(several, partial_rotary_factor=0.5) if partial else REFUSE
        keys[form, "partial_rotary_factor"] = Rule("number", gone(several, partial_rotary_factor=None), ((0.5, half),))
    if tops:
        several = bool(found(raw, ("rope_parameters", "rope_theta")))
        keys["rope_theta",] = Rule(
            "number", gone(several, rope_theta=10000.0), ((777.0, other(several, rope_theta=777.0)),)
        )
    elif not forms:
        keys["rope_theta",] = Rule("number", EITHER, ((777.0, other(False, rope_theta=777.0)),))
    if kind == "default":
        scaled = {"rope_type": "linear", "factor": 4.0}
        keys["rope_scaling",] = Rule(
            "rope", EITHER, ((scaled, Expect(True, other(False, **scaled).reads)), ({}, EITHER))
        )
    return keys


# -- what EAGLE-3 has alone --------------------------------------------------------------------------------------------
def _eagle3(source: Source) -> dict[Path_, Rule]:
    raw, fields = source.raw, source.fields
    known = any(raw.get(key) is not None for key in ("norm_before_residual", "norm_before_fc", "use_aux_norm"))
    told = source.trainer in ("speculators", "automodel", "modelopt") or known or "trainer" in source.options
    usual = source.trainer == "speculators"
    residual = fields["norm_before_residual"]
    if source.trainer == "specforge":
        carried = Rule(
            "flag", may_become(head_norm=True), ((True, becomes(head_norm=True)), (False, becomes(head_norm=False)))
        )
    elif told:
        outputs = tuple((value, becomes(norm_output=value)) for value in (True, False))
        carried = Rule("flag", may_become(norm_output=False), outputs)
    else:
        carried = Rule("flag", SAME, ((True, REFUSE), (False, REFUSE)))
    keys = {
        ("norm_before_residual",): Rule(
            "flag",
            may_become(norm_before_residual=usual),
            ((not residual, becomes(norm_before_residual=not residual)),),
        ),
        ("norm_output",): carried,
        ("draft_vocab_size",): Rule("whole", EITHER, ((fields["draft_vocab_size"] - 1, REFUSE),)),
        ("target_hidden_size",): Rule("whole", EITHER, ((fields["target_hidden_size"] * 2, REFUSE),)),
        ("parallel_drafting",): Rule("flag", SAME, ((True, REFUSE), (False, SAME)), bad=EITHER),
        ("eagle_config", "use_aux_hidden_state"): Rule("flag", SAME, ((False, REFUSE),), bad=EITHER),
        ("eagle_config", "use_last_layernorm"): Rule("flag", SAME, ((False, REFUSE),), bad=EITHER),
        ("eagle_config", "parallel_draft_step"): Rule("whole", SAME, ((3, REFUSE),), bad=EITHER),
        ("eagle_config",): Rule("object", EITHER),
    }
    for key in ("norm_before_fc", "fc_norm", "use_aux_norm"):
        name = "fc_norm" if key == "use_aux_norm" else key
        # Two keys say the same; false under one of them takes nothing from what the other says.
        twin = {"fc_norm": "use_aux_norm", "use_aux_norm": "fc_norm"}.get(key, "")
        # So does one within eagle_config, which overrules the one on top.
        inner = found(raw, ("eagle_config", key)) is not None
        other = EITHER if (fields[name] and raw.get(twin)) or inner else REFUSE
        keys[key,] = Rule("flag", EITHER, ((not fields[name], other),))
    return keys | _taps(source, raw, list(fields["taps"]))


def _taps(source: Source, raw: dict[str, Any], taps: list[int]) -> dict[Path_, Rule]:
    """The ids of features: on top after so many layers, in ``eagle_config`` one less. Given ones overrule both."""
    top, nested = raw.get(IDS), found(raw, ("eagle_config", IDS))
    layers, given = source.facts.layers, "taps" in source.options
    usual = [2, layers // 2, layers - 3]
    others = [0, *(k + 1 for k in taps[1:])] if taps[0] else [1, *taps[1:]]
    wrong: list[tuple[Any, Expect]] = [
        ([*taps, layers], REFUSE),
        (taps[::-1], REFUSE),
        ([taps[0], *taps[:-1]], REFUSE),
        ([*taps[:-1], layers + 4], REFUSE),
        ([-7, *taps[1:]], REFUSE),
    ]
    if given:
        return {(IDS,): Rule("ids", SAME, ((others, SAME),), bad=EITHER)}
    absent = SAME if nested else may_become(taps=usual) if len(taps) == len(usual) else REFUSE
    keys = {(IDS,): Rule("ids", absent, ((others, becomes(taps=others)), *wrong))}
    inner = ("eagle_config", IDS)
    if top:
        keys[inner] = Rule("ids", SAME, (([k - 1 for k in taps], SAME), ([k + 1 for k in taps], EITHER)))
    elif nested:
        keys["eagle_config",] = Rule("object", may_become(taps=usual))
        below = tuple(([k - 1 for k in value], expect) for value, expect in wrong[:4])
        lower = [k - 1 for k in others]
        keys[inner] = Rule("ids", may_become(taps=usual), ((lower, becomes(taps=others)), *below))
        keys[IDS,] = Rule("ids", SAME, ((others, becomes(taps=others)), *wrong))
    return keys


def _format(source: Source) -> dict[Path_, Rule]:
    """What tells the format, and whose code would be run."""
    speculators = "speculators_model_type" in source.raw
    named = EITHER if speculators else REFUSE
    # Without a name the tensors may tell what it is.
    unnamed = EITHER if speculators or source.family == "eagle3" else REFUSE
    code = {"AutoModelForCausalLM": "modeling_draft.Draft"}
    keys = {
        ("architectures",): Rule("names", unnamed, ((["LlamaForCausalLMMedusa"], named), ([], unnamed)), bad=named),
        ("auto_map",): Rule("object", SAME, ((code, REFUSE), ({}, SAME))),
    }
    if speculators:
        keys["speculators_model_type",] = Rule("text", REFUSE, (("dflash", REFUSE), ("peagle", REFUSE)))
        keys["transformer_layer_config",] = Rule("object", REFUSE, (({}, REFUSE),))
        keys["speculators_config",] = Rule("object", EITHER, (({}, EITHER),), bad=EITHER)
    else:
        keys["speculators_model_type",] = Rule("text", SAME, (("eagle3", REFUSE), ("dflash", REFUSE)))
    return keys


# -- drawing one -------------------------------------------------------------------------------------------------------
def _word(path: Path_) -> tuple[str, ...]:
    """What a refusal may call the key: by its name, or that of what it stands in."""
    return (path[-1], *path[:1])


# What a change of a key is told by elsewhere: the tensors that it contradicts.
ALSO = {
    "hidden_size": ("fc.weight", "hidden", "width"),
    "num_attention_heads": ("heads", "q_proj", "k_proj"),
    "num_key_value_heads": ("key heads", "k_proj"),
    "head_dim": ("heads", "q_proj"),
    "intermediate_size": ("mlp",),
    "vocab_size": ("vocabulary",),
    "draft_vocab_size": ("lm_head", "architectures", "draft vocabulary", "d2t"),
    "target_hidden_size": ("features", "fc.weight"),
    "num_hidden_layers": ("layers",),
    "attention_bias": ("bias",),
    "qkv_bias": ("bias",),
    "use_aux_norm": ("fc_norm", "norm_before_fc"),
    "norm_before_fc": ("input_norm", "fc_norm"),
    "fc_norm": ("norm_before_fc", "fc_norm"),
    IDS: ("taps", "feature", "fc.weight"),
    "eagle_config": ("taps", "feature"),
    "speculators_model_type": ("speculator", "architectures", "num_attention_heads", "transformer_layer_config"),
    "transformer_layer_config": ("num_attention_heads", "hidden_size"),
    "model_type": ("q_norm",),
    "use_sliding_window": ("layer_types",),
    "sliding_window": ("layer_types",),
    "norm_before_residual": ("norm_output",),
    "factor": ("rope",),
    "parallel_drafting": ("P-EAGLE",),
    "rope_type": ("rope_parameters", "rope_scaling"),
}


def _key(source: Source, rng: random.Random, kinds: tuple[str, ...]) -> tuple[Path_, Rule]:
    """A key, more often one that stands in the file."""
    known = {path: rule for path, rule in rules(source).items() if not kinds or rule.kind in kinds}
    there = [path for path in known if found(source.raw, path) is not None]
    path = rng.choice(there) if there and rng.random() < 0.75 else rng.choice(list(known))
    return path, known[path]


def _put(kind: str, source: Source, path: Path_, value: Any, expect: Expect) -> Mutation:
    names = (
        *_word(path),
        *(("rope",) if any("rope" in key for key in path) else ()),
        *ALSO.get(path[-1], ()),
        *(("config.json",) if value in (DEEP, DEEP_OBJECT, DIGITS) else ()),
    )
    what = f"{'.'.join(path)}: {shown(found(source.raw, path))} -> {shown(value)}"
    return Mutation(kind, what, rewritten("config.json", path, value), names, expect)


def absent(source: Source, rng: random.Random) -> Mutation:
    path, rule = _key(source, rng, ())
    value = rng.choice([GONE, None])
    expect = rule.absent
    if found(source.raw, path) is None and value is GONE:
        expect = SAME
    return _put("config: key removed or null", source, path, value, expect)


def wrong_type(source: Source, rng: random.Random) -> Mutation:
    path, rule = _key(source, rng, ())
    value = rng.choice(BAD[rule.kind])
    expect = rule.bad
    # What is beyond Python's JSON is refused in whatever key it stands; a very deep value may be.
    if value is DIGITS:
        expect = REFUSE
    return _put("config: wrong type or range", source, path, value, expect)


def other_value(source: Source, rng: random.Random) -> Mutation:
    while True:
        path, rule = _key(source, rng, ())
        if rule.good:
            value, expect = rng.choice(rule.good)
            return _put("config: another value", source, path, value, expect)


FREE = (
    *("transformers_version", "torch_dtype", "bos_token_id", "pad_token_id", "initializer_range", "attention_dropout"),
    *("use_cache", "a_key_of_tomorrow", "pretraining_tp", "_name_or_path", "tie_word_embeddings", "is_decoder"),
    *("id2label", "speculators_version", "embed_requires_grad", "rope_interleaved", "num_experts", "draft_model_type"),
)


def free_key(source: Source, rng: random.Random) -> Mutation:
    """A key that no reader of the draft computes with."""
    key, value = rng.choice(FREE), rng.choice(ANYTHING)
    return _put("config: key of no effect", source, (key,), value, SAME)


def twice(source: Source, rng: random.Random) -> Mutation:
    """A key that stands twice on the top level, with two values; readers take the last, who wrote it the first."""
    flat = [
        key for key, value in source.raw.items() if isinstance(value, int | float | str) and (key,) in rules(source)
    ]
    key = rng.choice(flat or ["architectures"])
    value = source.raw[key]
    other = rng.choice([7, True, "x", None]) if rng.random() < 0.7 else value
    expect = EITHER if other == value and type(other) is type(value) else REFUSE
    return Mutation(
        "config: key twice", f"{key} twice, {shown(other)} first", doubled("config.json", key, other), (key,), expect
    )


def whole_file(source: Source, rng: random.Random) -> Mutation:
    """A config that is no JSON object, or none that can be read."""
    text = (source.folder / "config.json").read_bytes()
    kinds: dict[str, bytes] = {
        "empty": b"",
        "cut in half": text[: len(text) // 2],
        "a list": b"[1]",
        "a number": b"7",
        "null": b"null",
        "a text": b'"config"',
        "an empty object": b"{}",
        "no UTF-8": text.replace(b'"', b"\xff", 1),
        "UTF-16": text.decode().encode("utf-16"),
        "with a byte order mark": b"\xef\xbb\xbf" + text,
        "with a comma too many": text.rstrip().removesuffix(b"}") + b",}",
        "with words behind it": text + b"and more",
        "a null byte": text + b"\x00",
        "nested 100,000 deep": b"[" * 100_000,
        "an object nested 100,000 deep": b'{"a":' * 100_000,
    }
    name = rng.choice(list(kinds))
    expect = EITHER if name == "with a byte order mark" else REFUSE
    apply = lambda folder: (folder / "config.json").write_bytes(kinds[name]) and None  # noqa: E731
    return Mutation("config: whole file", f"config.json is {name}", apply, ("config.json",), expect)


MAKERS: tuple[Callable[[Source, random.Random], Mutation], ...] = (
    *(absent, absent, wrong_type, wrong_type, wrong_type, other_value, other_value, other_value),
    *(free_key, twice, whole_file),
)


def drawn(source: Source, rng: random.Random) -> Iterator[Mutation]:
    """Mutations without end."""
    while True:
        yield rng.choice(MAKERS)(source, rng)
