"""One reader's look at an EAGLE checkpoint: every value with the word that it comes from, and what is wrong with it.

Readers of checkpoints differ in where they look for a value, in what they take when it is absent, and in what becomes
of tensors that they have no place for. What they share stands here; each reader is a function of a family's
``engines``, written after the reader's own code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import LlamaConfig, Qwen3Config

from redraft.drafts.eagle.angles import Rules, angles, merged
from redraft.drafts.formats.meaning import Reading, TensorFacts
from redraft.target import Facts

# Fields of the draft's config and the keys of a Hugging Face config.
SIZES = {
    "target_vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "rms_norm_eps",
    "num_layers": "num_hidden_layers",
}
DEFAULTS = {"llama": LlamaConfig, "qwen3": Qwen3Config}

# A place where a value may stand: what it is called, the part of the config, the key.
Place = tuple[str, Mapping[str, Any], str]

LATER_NORM = "input_layernorm"


class Look:
    """A reader's look. ``layer`` is the part of ``config`` that describes the decoder layers, called ``place``."""

    def __init__(
        self,
        reader: str,
        config: Mapping[str, Any],
        tensors: Mapping[str, TensorFacts],
        target: Facts,
        layer: Mapping[str, Any] | None = None,
        place: str = "config.json",
    ) -> None:
        self.reading = Reading(reader)
        self.raw, self.tensors, self.target = config, dict(tensors), target
        self.layer, self.place = config if layer is None else layer, place
        eagle = config.get("eagle_config")
        self.eagle: Mapping[str, Any] = eagle if isinstance(eagle, Mapping) else {}

    @property
    def meaning(self) -> dict[str, Any]:
        return self.reading.meaning

    def stop(self, why: str) -> None:
        self.reading.stops.append(why)

    def silent(self, what: str) -> None:
        self.reading.silent.append(what)

    # -- values ----------------------------------------------------------------------------------------------------
    def top(self, key: str) -> Place:
        return ("config.json", self.raw, key)

    def inner(self, key: str) -> Place:
        return ("eagle_config", self.eagle, key)

    def beside(self, key: str) -> Place:
        """A key of the part that describes the layers."""
        return (self.place, self.layer, key)

    def take(self, what: str, default: Any, whose: str, *places: Place) -> Any:
        """The first value that is there and not null, else ``default`` on the word of ``whose``."""
        for label, part, key in places:
            if part.get(key) is not None:
                self.reading.take(what, part[key], "read", f"{label}: {key}")
                return part[key]
        self.reading.take(what, default, "defaulted", whose)
        return default

    def switch(self, what: str, default: bool, whose: str, *places: Place) -> bool:
        """As :meth:`take`, for a value that is used as true or false."""
        value = self.take(what, default, whose, *places)
        self.meaning[what] = bool(value)
        if not isinstance(value, bool):
            self.silent(f"{what} {value!r} counts as {str(bool(value)).lower()}")
        return bool(value)

    def fixed(self, what: str, value: Any, whose: str, *ignored: Place) -> None:
        """A value that no key changes; a key of the file that says another is dropped, which is told."""
        self.reading.take(what, value, "defaulted", whose)
        for label, part, key in ignored:
            told = part.get(key)
            if told is not None and bool(told) != bool(value):
                self.reading.take(what, told, "dropped", f"{label}: {key}")
                self.silent(f"{key} {told!r} is ignored")

    def sizes(self, kind: str | None) -> None:
        """The sizes of the layers; what is absent is what transformers' config of ``kind`` has, or a fault."""
        usual = DEFAULTS[kind]().to_dict() if kind in DEFAULTS else {}
        for what, key in SIZES.items():
            value = self.layer.get(key)
            if value is not None:
                self.reading.take(what, value, "read", f"{self.place}: {key}")
            elif key == "num_key_value_heads" and usual and kind == "llama":
                self.reading.take(what, self.meaning["num_attention_heads"], "derived", "num_attention_heads")
            elif key == "head_dim" and self.reading.stops:
                continue  # a size that it follows from is not there, which is told
            elif key == "head_dim" and (usual.get(key) is None or kind == "llama"):
                width = int(self.meaning["hidden_size"]) // int(self.meaning["num_attention_heads"])
                self.reading.take(what, width, "derived", "hidden_size / num_attention_heads")
            elif usual.get(key) is not None:
                self.reading.take(what, usual[key], "defaulted", f"transformers' default of a {kind} config")
            else:
                self.stop(f"{self.place} has no {key}")
        if str(self.layer.get("hidden_act") or "silu") != "silu":
            self.stop(f"hidden_act {self.layer['hidden_act']!r} is not computed")

    def rope(self, rules: Rules, theta: float = 10000.0, lost: str = "") -> None:
        """The angles in their one form. ``lost`` names a key that this reader looks for beside the settings alone."""
        try:
            rope = merged(self.layer, theta)
            if lost and lost in rope and self.layer.get(lost) is None:
                self.silent(f"{lost} is looked for beside the rotary settings, not inside them")
                del rope[lost]
            width, length = int(self.meaning["head_dim"]), int(self.meaning["max_position_embeddings"])
            found = angles(rope, width, length, rules)
            told = angles(rope, width, length)
        except KeyError as error:
            self.stop(f"the rotary settings have no {error.args[0]}, without which it computes no angles")
            return
        except ValueError as error:
            self.stop(f"{error} is not computed" if str(error).startswith("rope_type") else str(error))
            return
        stands = any(self.layer.get(key) for key in ("rope_theta", "rope_parameters", "rope_scaling"))
        word = f"{self.place}: rotary settings" if stands else "transformers' default"
        self.reading.take("rope_parameters", found, "read" if stands else "defaulted", word)
        if found != told:
            changed = [key for key in found.keys() | told.keys() if found.get(key) != told.get(key)]
            self.silent(f"the angles are not those that the settings tell: {', '.join(sorted(changed))} differ")

    def windows(self) -> tuple[int, ...]:
        """The windows that ``layer_types`` and ``sliding_window`` give, one a layer."""
        layers, kinds = int(self.meaning.get("num_layers", 1)), self.layer.get("layer_types")
        if not kinds:
            return (0,) * layers
        if not isinstance(kinds, list) or len(kinds) < layers:
            self.stop(f"layer_types {kinds!r} are not one for each of {layers} layers")
            return (0,) * layers
        width = self.layer.get("sliding_window") or 0
        return tuple(int(width) if kind == "sliding_attention" else 0 for kind in kinds[:layers])

    # -- features --------------------------------------------------------------------------------------------------
    def ids(self, label: str, part: Mapping[str, Any], key: str, shift: int = 0) -> bool:
        """Take feature ids from there, if they stand there. ``shift`` turns them into layers passed."""
        found = part.get(key)
        if not found:
            return False
        if not isinstance(found, list | tuple) or not all(type(k) is int for k in found):
            self.stop(f"{key} {found!r} is no list of integers")
            return True
        taps = tuple(k + shift for k in found)
        kept = tuple(sorted(set(taps)))
        self.reading.take("taps", kept, "read", f"{label}: {key}" + (f", plus {shift}" if shift else ""))
        if kept != taps:
            self.silent(f"features are collected once each and in layer order: {list(taps)} become {list(kept)}")
        return True

    def usual_taps(self, whose: str) -> None:
        layers = self.target.layers
        self.reading.take("taps", (2, layers // 2, layers - 3), "defaulted", whose)

    def reach(self, first: int, last: int, whose: str) -> None:
        """Complain of features outside layers ``first`` to ``last``."""
        outside = [k for k in self.meaning.get("taps", ()) if not first <= k <= last]
        if outside:
            self.stop(f"{whose} can be read after layers {first} to {last} only, not after {outside}")

    # -- tensors ---------------------------------------------------------------------------------------------------
    def renamed(self, *pairs: tuple[str, str]) -> None:
        """Give the tensors the names that the reader gives them: each start, or part with a leading ``*``, in turn."""
        for old, new in pairs:
            if old.startswith("*"):
                self.tensors = {name.replace(old[1:], new): facts for name, facts in self.tensors.items()}
            else:
                self.tensors = {
                    (new + name[len(old) :] if name.startswith(old) else name): facts
                    for name, facts in self.tensors.items()
                }

    def embedding(self, own: str, shared: str) -> None:
        """``own``: what becomes of a shipped embedding; ``shared``: what is taken where none is shipped."""
        shipped = "embed_tokens.weight" in self.tensors
        if shipped and own == "own":
            self.reading.take("embedding", "own", "read", "embed_tokens.weight")
        elif shipped:
            self.reading.take("embed_tokens.weight", own, "dropped", "embed_tokens.weight")
            self.reading.take("embedding", own, "target", "the target's embedding, whatever the file has")
        else:
            self.reading.take("embedding", shared, "target" if shared == "target" else "defaulted", "no embed_tokens")
        narrow = self.meaning.get("hidden_size") != self.target.hidden_size
        if self.meaning["embedding"] == "target" and narrow:
            self.stop("the target's embedding is of another width than the draft, which needs one of its own")
        elif shipped and own != "own":
            self.silent("the draft's own embedding is replaced with the target's")

    def check(self, wanted: Mapping[str, tuple[int, ...]], absent: str, extra: str, free: tuple[str, ...] = ()) -> None:
        """Lay the tensors beside those that the reader makes room for.

        ``absent`` and ``extra`` say what becomes of one that is not in the file and of one that has no place, each
        "stop" or what the reader does in silence; ``free`` are names that may be there or not.
        """
        for name, shape in wanted.items():
            facts = self.tensors.get(name)
            if facts is None:
                note = f"{name} is not in the file"
                self.stop(note) if absent == "stop" else self.silent(f"{note} and {absent}")
            elif facts.shape != shape:
                self.stop(f"{name} has shape {list(facts.shape)}, {list(shape)} is needed")
            else:
                self.reading.take(name if "." in name else f"{name}.map", list(shape), "read", name)
        for name in self.tensors.keys() - wanted.keys():
            if name in free:
                continue
            dropped = extra != "stop" or name.endswith(".bias")
            self.reading.take(name, list(self.tensors[name].shape), "dropped", "no place for it")
            self.silent(f"{name} is left out") if dropped else self.stop(f"there is no place for {name}")


def layer_tensors(meaning: Mapping[str, Any], fused: bool, later_norm: str = LATER_NORM) -> dict[str, tuple[int, ...]]:
    """Names and shapes of every decoder layer, as ``layers.N.*``; ``fused``: the first reads embedding and state."""
    hidden, inner, width = (int(meaning[k]) for k in ("hidden_size", "intermediate_size", "head_dim"))
    rows = {"q": int(meaning["num_attention_heads"]) * width, "k": int(meaning["num_key_value_heads"]) * width}
    rows["v"] = rows["k"]
    found: dict[str, tuple[int, ...]] = {}
    for number in range(int(meaning["num_layers"])):
        first, start = number == 0, f"layers.{number}."
        read = 2 * hidden if first and fused else hidden
        for letter, out in rows.items():
            found[f"{start}self_attn.{letter}_proj.weight"] = (out, read)
            if meaning["attention_bias"]:
                found[f"{start}self_attn.{letter}_proj.bias"] = (out,)
        found[f"{start}self_attn.o_proj.weight"] = (hidden, rows["q"])
        if meaning["output_bias"]:
            found[f"{start}self_attn.o_proj.bias"] = (hidden,)
        if meaning["qk_norm"]:
            found |= {f"{start}self_attn.{letter}_norm.weight": (width,) for letter in "qk"}
        for name in ("gate", "up"):
            found[f"{start}mlp.{name}_proj.weight"] = (inner, hidden)
        found[f"{start}mlp.down_proj.weight"] = (hidden, inner)
        norms = ["post_attention_layernorm"]
        norms += [later_norm] if not first else ["input_layernorm", "hidden_norm"] if fused else []
        found |= {f"{start}{name}.weight": (hidden,) for name in norms}
    return found


def layer_meaning(config: Any) -> dict[str, Any]:
    """What the decoder layers of a draft with this config mean, in the terms of a :class:`Reading`."""
    fields = [*SIZES, "attention_bias", "qk_norm"]
    rope = dict(config.rope_parameters)
    windows = tuple(config.windows) or (0,) * config.num_layers
    return {name: getattr(config, name) for name in fields} | {
        "output_bias": config.attention_bias if config.output_bias is None else config.output_bias,
        "windows": windows,
        "rope_parameters": angles(
            merged({"rope_parameters": rope, "max_position_embeddings": config.max_position_embeddings}),
            config.head_dim,
            config.max_position_embeddings,
        ),
        "embedding": "own" if config.own_embedding else "target",
    }
