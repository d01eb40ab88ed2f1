"""Mutations of a language model that is a standalone draft: its config.json and its tensors.

The judge's own answer is transformers' Llama, built from the values that the mutation means.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from mutating import files, tables
from mutating.base import (
    EITHER,
    GONE,
    REFUSE,
    SAME,
    Change,
    Expect,
    Mutation,
    becomes,
    found,
    may_become,
    rewritten,
    shown,
)
from mutating.configs import BAD, Rule, whole_file
from mutating.sources import Source


def logits(fields: Mapping[str, Any], tensors: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """What a Llama of this config and these tensors says [T, V] of a text."""
    model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in fields.items() if k not in ("architectures", "dtype")}))
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=True)
    with torch.inference_mode():
        return model.eval()(ids[None]).logits[0]


SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size", "num_hidden_layers")


def rules(source: Source) -> dict[tuple[str, ...], Rule]:
    fields = source.fields
    rope = dict(fields["rope_parameters"])
    new = {**rope, "rope_theta": 777.0}
    keys = {(name,): Rule("whole", REFUSE, ((fields[name] * 2, REFUSE), (fields[name] - 1, REFUSE))) for name in SIZES}
    return keys | {
        ("num_key_value_heads",): Rule("whole", REFUSE, ((4, REFUSE), (3, REFUSE))),
        ("head_dim",): Rule("whole", EITHER, ((8, REFUSE),)),
        ("rms_norm_eps",): Rule("number", may_become(rms_norm_eps=1e-6), ((3e-2, becomes(rms_norm_eps=3e-2)),)),
        ("max_position_embeddings",): Rule("whole", EITHER, ((64, SAME), (4096, SAME))),
        ("attention_bias",): Rule("flag", EITHER, ((True, REFUSE),)),
        ("mlp_bias",): Rule("flag", EITHER, ((True, REFUSE),)),
        ("hidden_act",): Rule(
            "text",
            may_become(hidden_act="silu"),
            (("gelu", Expect(True, becomes(hidden_act="gelu").reads)), ("no_such_act", REFUSE)),
        ),
        ("rope_parameters",): Rule(
            "object", EITHER, ((new, becomes(rope_parameters=new)), ({"rope_type": "banana"}, REFUSE))
        ),
        ("rope_parameters", "rope_theta"): Rule("number", EITHER, ((777.0, becomes(rope_parameters=new)),)),
        ("architectures",): Rule(
            "names", REFUSE, ((["LlamaForCausalLMMedusa"], REFUSE), (["NoSuchForCausalLM"], EITHER))
        ),
        ("model_type",): Rule("text", REFUSE, (("no_such_type", REFUSE), ("mamba", REFUSE))),
        ("auto_map",): Rule(
            "object",
            SAME,
            (({"AutoModelForCausalLM": "modeling_x.Model"}, Expect(True, SAME.reads, ("auto_map",))),),
            bad=EITHER,
        ),
        ("quantization_config",): Rule("object", SAME, (({"quant_method": "no_such_method"}, REFUSE),)),
        ("tie_word_embeddings",): Rule("flag", SAME, ((True, REFUSE),)),
        ("a_key_of_tomorrow",): Rule("free", SAME, ((1, SAME), (None, SAME), ({"a": [1]}, SAME))),
        ("initializer_range",): Rule("free", EITHER, ((0.3, SAME),)),
    }


def config(source: Source, rng: random.Random) -> Mutation:
    """A key removed, null, of the wrong type, or with another value."""
    known = rules(source)
    path = rng.choice(list(known))
    rule, way = known[path], rng.choice(["absent", "bad", "bad", "good", "good"])
    there = found(source.raw, path) is not None
    value, expect, kind = rng.choice([GONE, None]), rule.absent if there else SAME, "key removed or null"
    if value is None:
        expect = Expect(True, rule.absent.reads)
    if way == "bad" and rule.kind in BAD:
        value, kind = rng.choice(BAD[rule.kind]), "wrong type or range"
        expect = rule.bad
    elif way == "good" and rule.good:
        (value, expect), kind = rng.choice(rule.good), "another value"
    what = f"{'.'.join(path)}: {shown(found(source.raw, path))} -> {shown(value)}"
    names = (
        path[-1],
        *path[:1],
        "quantised",
        "layers.",
        "config",
        "tensors",
        "weights",
        "bias" if "bias" in path[-1] else "config",
        *files.about_files(source),
    )
    return Mutation(f"language model: {kind}", what, rewritten("config.json", path, value), names, expect)


def tensors(source: Source, rng: random.Random) -> Mutation:
    """A tensor of other numbers, shape, type or name."""
    state = tables.held(source)
    name = rng.choice(list(state))
    tensor = state[name]
    way = rng.choice(
        ["NaN", "infinity", "shape", "transposed", "missing", "extra", "renamed", "half", "int8", "double"]
    )
    expect = REFUSE
    if way in ("NaN", "infinity"):
        flat = tensor.clone().reshape(-1)
        flat[rng.randrange(len(flat))] = float("nan" if way == "NaN" else "inf")
        state[name] = flat.reshape(tensor.shape)
    elif way == "shape":
        state[name] = torch.cat([tensor, tensor[:1]])
    elif way == "transposed":
        state[name] = new = tensor.T if tensor.ndim == 2 else tensor[None]
        if new.shape == tensor.shape:
            expect = Expect(False, (Change(tensors={name: new}),))
    elif way == "missing":
        del state[name]
    elif way == "extra":
        state["model.layers.0.strange.weight"] = torch.ones(2)
    elif way == "renamed":
        state[f"{name}x"] = state.pop(name)
    else:
        state[name] = new = tensor.to({"half": torch.float16, "int8": torch.int8, "double": torch.float64}[way])
        expect = REFUSE if way == "int8" else Expect(way == "double", (Change(tensors={name: new}),))
    what = f"{name}: {way}"
    names = (name, "strange", name.replace(".weight", ""), "tensors", "finite", "NaN")
    return Mutation("language model: tensors", what, tables.saved(state, source.weights.name), names, expect)


def drawn(source: Source, rng: random.Random) -> Iterator[Mutation]:
    """Mutations without end."""
    makers = (config, config, config, tensors, tensors, files.damaged, files.code, files.named, whole_file)
    while True:
        yield rng.choice(makers)(source, rng)
