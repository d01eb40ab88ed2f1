"""The decoder layers that a Llama's config and the tensors beside it tell, value by value and on whose word.

A size that stands in the config is taken from there, and the tensors are held to it later; one that does not is read
off the tensors. Nothing is left to defaults but what engines and trainers all default alike.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from redraft.drafts.formats.meaning import Reading, TensorFacts
from redraft.errors import UserError
from redraft.values import LONGEST, Values

FIRST = "midlayer."
LATER = re.compile(r"layers\.([1-9]\d{0,3})\.")
# With as many layers or more in the config and fewer in the file, the count is that of the target.
MANY_LAYERS = 8
BIASED = ("q_proj", "k_proj", "v_proj")
QUANTISED = "quantization_config (give the checkpoint that was quantised)"
USUAL = "the default of transformers' Llama"

# Keys under which a layer is another than ours and engines', with the value that changes nothing.
NEUTRAL: dict[str, Any] = {
    "logit_scale": 1.0,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
    "attention_multiplier": None,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
}

# Keys of rotary settings that are numbers, with what each must be above.
ROPE_NUMBERS = {
    "rope_theta": 0.0,
    "factor": 0.0,
    "low_freq_factor": 0.0,
    "high_freq_factor": 0.0,
    "beta_fast": 0.0,
    "beta_slow": 0.0,
    "attention_factor": 0.0,
    "mscale": -1.0,
    "mscale_all_dim": -1.0,
    "partial_rotary_factor": 0.0,
}
ROPE_LISTS = ("short_factor", "long_factor")
ROPE_VALUES = (*ROPE_NUMBERS, *ROPE_LISTS, "original_max_position_embeddings", "truncate")
# Kinds that are told by a factor; below 1 it would stretch what it is meant to squeeze.
SCALED = ("linear", "dynamic", "yarn", "llama3")


def by_our_names(state: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The state with the layers behind the first by our names; those beyond ``layers`` keep the file's."""
    named: dict[str, Tensor] = {}
    for name, tensor in state.items():
        found = LATER.match(name)
        number = int(found[1]) if found else layers
        named[f"later.{number - 1}.{name[found.end() :]}" if found and number < layers else name] = tensor
    return named


class LayerReader:
    """Reads the layers of one checkpoint.

    ``values`` is the part of the config that describes them, ``tensors`` what the file holds by our names, and
    ``reading`` where each value is noted.
    """

    def __init__(self, values: Values, tensors: Mapping[str, TensorFacts], reading: Reading) -> None:
        self.values, self.tensors, self.reading = values, tensors, reading

    # -- what is not read ----------------------------------------------------------------------------------------
    def refuse(self, faults: Sequence[str]) -> None:
        """Raise ``UserError`` where there are ``faults``: what the file asks for and nobody computes here."""
        if faults:
            raise UserError(f"{self.values.path} asks for what redraft does not compute: {', '.join(faults)}")

    def faults(self, model_types: Sequence[str] | None, more: Sequence[str] = ()) -> list[str]:
        """What is asked for and not computed; ``more`` was found before. ``model_types`` none: any will do."""
        values, found = self.values, list[str]()
        kind = values.text("model_type") or "llama"
        if model_types is not None and kind not in model_types:
            found.append(f"model_type {kind!r}")
        act = values.text("hidden_act") or "silu"
        if act not in ("silu", "swish"):
            found.append(f"hidden_act {act!r}")
        if values.flag("mlp_bias"):
            found.append("mlp_bias True")
        for key, neutral in NEUTRAL.items():
            if values.get(key) not in (None, neutral) or values.get(key) is True:  # true counts as 1
                found.append(f"{key} {values.get(key)!r}")
        if values.get("quantization_config"):
            found.append(QUANTISED)
        return [*found, *more]

    # -- sizes ---------------------------------------------------------------------------------------------------
    def size(self, key: str, tensor: str, axis: int, ours: str = "", most: int | None = None) -> int:
        """The size under ``key``, or that of ``tensor`` along ``axis`` where the config is silent. ``UserError``."""
        given = self.values.whole(key) if most is None else self.values.whole(key, most=most)
        if given is not None:
            self.reading.take(ours or key, given, "read", self.values.word(key))
            return given
        found = self.tensors.get(tensor)
        if found is None or len(found.shape) <= axis:
            raise UserError(
                f"{self.values.path} has no {key}, and there is no {tensor} to tell it; add it to the config"
            )
        self.reading.take(ours or key, found.shape[axis], "derived", f"the shape of {tensor}")
        return found.shape[axis]

    def sizes(self) -> dict[str, Any]:
        """Widths, heads, the norms' epsilon and the longest position. Raises ``UserError``."""
        hidden = self.size("hidden_size", f"{FIRST}self_attn.o_proj.weight", 0)
        fields: dict[str, Any] = {
            "hidden_size": hidden,
            "intermediate_size": self.size("intermediate_size", f"{FIRST}mlp.gate_proj.weight", 0),
            **self.heads(hidden),
        }
        epsilon = self.values.number("rms_norm_eps", most=1.0)
        fields["rms_norm_eps"] = 1e-6 if epsilon is None else epsilon
        longest = self.values.whole("max_position_embeddings", most=LONGEST)
        fields["max_position_embeddings"] = 2048 if longest is None else longest
        for key, given in (("rms_norm_eps", epsilon), ("max_position_embeddings", longest)):
            how = "defaulted" if given is None else "read"
            if given is None:
                self.reading.notes.append(f"{key} is not in the config; taken as {fields[key]}, as transformers' Llama")
            self.reading.take(key, fields[key], how, USUAL if given is None else self.values.word(key))  # type: ignore[arg-type]
        return fields

    def heads(self, hidden: int) -> dict[str, int]:
        """Query heads, key heads and head width. Raises ``UserError`` where they do not go together."""
        values, take = self.values, self.reading.take
        rows = {name: self.tensors.get(f"{FIRST}self_attn.{name}.weight") for name in BIASED}
        queries, keys = (found.shape[0] if found and found.shape else 0 for found in (rows["q_proj"], rows["k_proj"]))
        heads, width = values.whole("num_attention_heads"), values.whole("head_dim")
        if heads is None and (width is None or queries % width):
            raise UserError(f"{values.path} has no num_attention_heads, which no tensor tells; add it to the config")
        told = "derived" if heads is None else "read"
        heads = queries // (width or 1) if heads is None else heads
        word = values.word("num_attention_heads") if told == "read" else "the shape of q_proj and head_dim"
        take("num_attention_heads", heads, told, word)  # type: ignore[arg-type]
        if width is None and queries and queries % heads == 0:
            width = queries // heads
            take("head_dim", width, "derived", "the shape of q_proj and num_attention_heads")
        elif width is None:
            width = hidden // heads
            take("head_dim", width, "derived", "hidden_size and num_attention_heads")
        else:
            take("head_dim", width, "read", values.word("head_dim"))
        key_heads = values.whole("num_key_value_heads")
        if key_heads is None:
            key_heads = max(keys // width, 1) if keys else heads
            take("num_key_value_heads", key_heads, "derived", "the shape of k_proj and head_dim")
        else:
            take("num_key_value_heads", key_heads, "read", values.word("num_key_value_heads"))
        if heads % key_heads or width % 2:
            raise UserError(
                f"{values.path} is not a usable config: {heads} query heads, {key_heads} key heads, each {width} wide; "
                "key heads must divide query heads, and a head's width must be even"
            )
        return {"num_attention_heads": heads, "num_key_value_heads": key_heads, "head_dim": width}

    # -- attention -----------------------------------------------------------------------------------------------
    def attention(self, norms: bool | None, tensors_decide: bool = False) -> dict[str, Any]:
        """Biases, and norms of queries and keys; ``norms`` says whether there are any where that is known.

        A bias follows the config where that says something, else the tensors; where ``tensors_decide``, a file that
        holds none at all is without, whatever its config says.
        """
        values, take = self.values, self.reading.take
        held = {name: f"{FIRST}self_attn.{name}.bias" in self.tensors for name in (*BIASED, "o_proj")}
        both, inputs = values.flag("attention_bias"), values.flag("qkv_bias")
        told = both if inputs is None else inputs
        if tensors_decide and (both or inputs) and not any(held.values()):
            self.reading.notes.append("the config asks for biases of attention, and the file holds none: taken as none")
            both = inputs = told = None
        bias = any(held[name] for name in BIASED) if told is None else told
        key = "attention_bias" if inputs is None else "qkv_bias"
        how = "derived" if told is None else "read"
        take("attention_bias", bias, how, "the tensors" if told is None else values.word(key))  # type: ignore[arg-type]
        fields: dict[str, Any] = {"attention_bias": bias}
        # attention_bias is that of all four; where it is not what was taken for the first three, the tensors decide.
        output = held["o_proj"] if both is None or inputs is not None else both
        if output != bias:
            fields["output_bias"] = output
            take("output_bias", output, "derived", "the tensors")
        present = [f"{FIRST}self_attn.{name}_norm.weight" in self.tensors for name in "qk"]
        fields["qk_norm"] = all(present) if norms is None else norms
        word = values.word("model_type") if norms else "the tensors"
        take("qk_norm", fields["qk_norm"], "derived", word)
        return fields

    def layers(self, targets: int | None = None, decide: str = "") -> int:
        """How many layers there are. The tensors decide where the config's count is the target's, of ``targets``.

        ``decide`` names who writes a count that means nothing. Raises ``UserError`` where both disagree.
        """
        found = {int(m[1]) for name in self.tensors if (m := LATER.match(name))}
        # What is behind a gap is extra.
        held = next(number for number in range(1, len(found) + 2) if number not in found)
        told = self.values.whole("num_hidden_layers", most=1 << 16)
        key, take = self.values.word("num_hidden_layers"), self.reading.take
        if told is None or told == held:
            take("num_layers", held, "read" if told else "derived", key if told else "the names of the tensors")
            return held
        if decide or told > held and (told == targets or told >= MANY_LAYERS):
            take("num_layers", held, "derived", "the names of the tensors")
            take("num_hidden_layers", told, "dropped", f"it is not the draft's{f', says {decide}' * bool(decide)}")
            self.reading.notes.append(f"num_hidden_layers {told} is not the draft's: the file holds {held}")
            return held
        if told < held:
            return told  # the layers beyond are named as extra
        raise UserError(
            f"{self.values.path} asks for num_hidden_layers {told} and the file holds {held}; mend the config, or "
            "download the weights again"
        )

    def windows(self, layers: int) -> tuple[int, ...]:
        """How far back each layer sees, 0 for all; empty where all see all. Raises ``UserError``."""
        values = self.values
        kinds, wide = values.get("layer_types"), values.whole("sliding_window", most=LONGEST)
        if kinds is None:
            if wide is not None and values.flag("use_sliding_window"):
                self.reading.notes.append(f"sliding_window {wide} was left out: no layer_types says which layer has it")
            if wide is not None:
                self.reading.take("sliding_window", wide, "dropped", "no layer_types says which layer has it")
            return ()
        if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
            raise values.refuse("layer_types", "a list of texts")
        strange = sorted(set(kinds) - {"full_attention", "sliding_attention"})
        sliding = "sliding_attention" in kinds
        self.refuse([f"layer_types {kind!r}" for kind in strange])
        if not sliding:
            return ()
        if wide is None or values.flag("use_sliding_window") is False:
            why = "without a sliding_window" if wide is None else "and use_sliding_window False"
            self.refuse([f"layer_types with sliding_attention {why}"])
        if len(kinds) != layers:
            self.refuse([f"layer_types of {len(kinds)} layers, sliding_attention among them, for {layers}"])
        found = tuple(int(wide or 0) if kind == "sliding_attention" else 0 for kind in kinds)
        self.reading.take("windows", found, "read", values.word("layer_types"))
        return found

    # -- rotary angles -------------------------------------------------------------------------------------------
    def rope(self, longest: int, partial: bool = True) -> dict[str, Any]:
        """The rotary settings in transformers' newer form. Raises ``UserError`` where they tell no one set of angles.

        ``partial`` says that a part of a head may turn alone.
        """
        values = self.values
        found = {key: values.get(key) for key in ("rope_parameters", "rope_scaling")}
        places = {key: {} if place is None else place for key, place in found.items()}
        for key, place in places.items():
            if not isinstance(place, dict):
                raise values.refuse(key, "an object of rotary settings")
            if any(isinstance(value, dict) for value in place.values()):
                self.refuse([f"{key} by kinds of layers"])
        rope, scaling = places.values()
        for key in places:
            self._check_rope(Values(places[key], values.path, f"{values.inside}{key}."))
        theta, share = values.number("rope_theta"), values.number("partial_rotary_factor", most=1.0)
        named = [place.get("rope_type") or place.get("type") for place in (rope, scaling)]
        kinds = {str(kind) for kind in named if kind}
        faults = [f"rope_type {kind!r}" for kind in sorted(kinds - {"default", "su"} - set(ROPE_INIT_FUNCTIONS))]
        if len(kinds) > 1:
            faults.append(f"rope_parameters and rope_scaling of different types, {' and '.join(sorted(kinds))}")
        if (
            "rope_theta" in values.values
            and theta is None
            and not (rope.get("rope_theta") or scaling.get("rope_theta"))
        ):
            faults.append("rope_theta None")
        shares = {place["partial_rotary_factor"] for place in (rope, scaling) if place.get("partial_rotary_factor")}
        if not partial and (shares | ({share} if share else set())) - {1.0}:
            faults.append(f"partial_rotary_factor {next(iter(shares), share)}")
        self.refuse(faults)
        return self._merged_rope(rope, scaling, theta, share, longest)

    def _check_rope(self, place: Values) -> None:
        for key, above in ROPE_NUMBERS.items():
            place.number(key, above, 1.0 if key == "partial_rotary_factor" else 1e12)
        place.whole("original_max_position_embeddings", most=LONGEST)
        for key in ("rope_type", "type"):
            place.text(key)
        for key in ROPE_LISTS:
            listed = place.get(key)
            good = isinstance(listed, list) and all(
                type(x) in (int, float) and math.isfinite(x) and x > 0 for x in listed
            )
            if listed is not None and not good:
                raise place.refuse(key, "a list of numbers above 0")
        kind, factor = place.get("rope_type") or place.get("type"), place.get("factor")
        if kind in SCALED and factor is not None and factor < 1:
            raise place.refuse("factor", "a number from 1")
        if kind is None and factor is not None:
            raise place.refuse("rope_type", "the kind of angles that the factor is for")
        low, high = place.get("low_freq_factor"), place.get("high_freq_factor")
        if low is not None and high is not None and low >= high:
            raise place.refuse("low_freq_factor", "a number below high_freq_factor")

    def _merged_rope(
        self, rope: dict[str, Any], scaling: dict[str, Any], theta: float | None, share: float | None, longest: int
    ) -> dict[str, Any]:
        """One set of settings, as transformers merges the two forms: engines read them through it."""
        given: dict[str, Any] = {"max_position_embeddings": longest, "model_type": "llama"}
        for key, place in (("rope_parameters", rope), ("rope_scaling", scaling)):
            if place:
                # Angles of pictures are those of text where there is text alone.
                given[key] = {k: v for k, v in place.items() if v is not None and not k.startswith("mrope_")}
        given |= {k: v for k, v in (("rope_theta", theta), ("partial_rotary_factor", share)) if v is not None}
        try:
            merged = dict(LlamaConfig.from_dict(given).rope_parameters)
        except Exception as error:  # validation raises several kinds; all mean a bad value in the file
            raise UserError(
                f"{self.values.path} is not a usable config: {' '.join(str(error).split())[:200]}"
            ) from error
        merged.pop("type", None)
        kind = merged.get("rope_type", "default")
        merged["rope_type"] = "longrope" if kind == "su" else kind
        if theta is not None and merged.get("rope_theta") != theta:
            self.reading.notes.append(
                f"rope_theta {theta} and that of rope_parameters disagree; {merged['rope_theta']} was taken, as "
                "transformers does"
            )
        told_values = [(k, v) for place in (rope, scaling) for k, v in place.items() if k in ROPE_VALUES]
        overruled = sorted({k for k, v in told_values if v not in (None, merged.get(k))})
        if overruled:
            taken = ", ".join(f"{key} {merged.get(key)}" for key in overruled)
            self.reading.notes.append(
                f"rope_parameters and rope_scaling disagree; {taken} was taken, as transformers does"
            )
        told = [key for key in ("rope_parameters", "rope_scaling", "rope_theta") if self.values.get(key)]
        if not told or "rope_theta" not in {*rope, *scaling, *([] if theta is None else ["rope_theta"])}:
            self.reading.notes.append(
                f"no rope_theta is in the config; taken as {merged.get('rope_theta')}, as transformers' Llama"
            )
        word = ", ".join(map(self.values.word, told)) if told else USUAL
        self.reading.take("rope_parameters", merged, "read" if told else "defaulted", word)
        return merged
