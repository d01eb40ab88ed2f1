"""How vLLM 0.32 and 0.33 read an Eagle3 checkpoint, in the speculators format and in the plain one.

Their model code is the same; of 0.33's two runners the second, the default where Triton is, looks for feature ids under
another key, and 0.33 raises a short ``max_position_embeddings`` for more kinds of drafts. Facts from
``models/llama_eagle3.py``, ``models/qwen3_eagle3.py``, ``models/llama.py``, ``transformers_utils/configs``,
``v1/worker/gpu_model_runner.py`` and ``v1/worker/gpu/spec_decode/eagle``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from redraft.drafts.eagle.angles import Rules
from redraft.drafts.eagle.look import Look
from redraft.drafts.eagle3.engines import common
from redraft.drafts.formats.meaning import Reading, TensorFacts
from redraft.target import Facts

LLAMA = {"LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "Eagle3Qwen2_5vlForCausalLM", "Eagle3Qwen3vlForCausalLM"}
QWEN3 = {"Eagle3Qwen3ForCausalLM"}
RULES = Rules(factors_by="table")

# Types whose angles do not depend on the length, so that vLLM raises it to the target's.
FREE = ("default", "linear", "llama3")


def read(version: str, config: Mapping[str, Any], tensors: Mapping[str, TensorFacts], target: Facts) -> Reading:
    """``version`` is "0.32" or "0.33"."""
    speculators, layer = "speculators_model_type" in config, config.get("transformer_layer_config")
    place = "transformer_layer_config" if speculators else "config.json"
    look = Look(f"vLLM {version}", config, tensors, target, layer if isinstance(layer, Mapping) else None, place)
    if speculators and not isinstance(layer, Mapping):
        look.stop("transformer_layer_config is not there")
        return look.reading
    kind = _kind(look, speculators)
    if kind is None:
        return look.reading
    look.sizes(None if speculators else kind)
    if look.reading.stops:
        return look.reading
    _switches(look, speculators)
    _attention(look, kind)
    look.rope(RULES, 10000.0 if kind == "llama" else 1000000.0)
    _features(look, kind, version)
    common.vocabulary(look, "vLLM's default: the whole vocabulary")
    common.same_vocabulary(look, target)
    if look.layer.get("logit_scale") not in (None, 1.0):
        look.silent(f"logits are multiplied by logit_scale {look.layer['logit_scale']!r}")
    look.renamed(("*midlayer.", "layers.0."))
    look.embedding("own", "target")
    _tensors(look)
    _length(look, version)
    return look.reading


def _kind(look: Look, speculators: bool) -> str | None:
    """Which of vLLM's two classes runs the draft."""
    if speculators:
        if look.raw["speculators_model_type"] != "eagle3":
            look.stop(f"speculators_model_type {look.raw['speculators_model_type']!r} is no eagle3")
            return None
        if look.raw.get("model_type"):
            look.stop(f"model_type {look.raw['model_type']!r} on top hides that this is the speculators format")
        kind = look.layer.get("model_type", "llama")
        if kind not in ("llama", "qwen3"):
            look.stop(f"layers of model_type {kind!r} are not computed, llama and qwen3 are")
            return None
        return str(kind)
    named = set(look.raw.get("architectures") or ())
    kind = "llama" if named & LLAMA else "qwen3" if named & QWEN3 else None
    if kind is None:
        look.stop(f"architectures {sorted(named)} are not known")
    elif look.raw.get("model_type") not in ("llama", "qwen3"):
        look.stop(f"model_type {look.raw.get('model_type')!r} is not read as that of the draft's layers")
    return kind


def _switches(look: Look, speculators: bool) -> None:
    top, layer, inner, whose = look.top, look.beside, look.inner, "vLLM's default"
    look.switch("norm_before_residual", speculators, f"{whose} of this format", top("norm_before_residual"))
    if speculators:
        look.switch("norm_before_fc", False, whose, top("norm_before_fc"))
    else:
        look.switch("norm_before_fc", False, whose, inner("norm_before_fc"), top("norm_before_fc"))
    for name in ("fc_norm", "norm_output"):
        look.switch(name, False, whose, top(name))
    if look.raw.get("use_aux_norm") and not look.meaning["fc_norm"]:
        look.silent("use_aux_norm is ignored")
    look.fixed("head_norm", True, "vLLM's model", top("head_norm"))
    look.fixed("fc_bias", False, "vLLM's model")
    look.take("target_hidden_size", look.meaning["hidden_size"], "hidden_size", top("target_hidden_size"))
    if look.eagle.get("use_aux_hidden_state") is False:
        look.stop("eagle_config.use_aux_hidden_state false: the last state alone is read, and no fc")
    if layer("mlp_bias")[1].get("mlp_bias"):
        look.stop("mlp_bias true: biases of the MLP that the draft does not have")


def _attention(look: Look, kind: str) -> None:
    bias = look.switch("attention_bias", False, "vLLM's default", look.beside("attention_bias"))
    if kind == "llama":
        more = bool(look.layer.get("bias"))
        word = "config: bias" if more and not bias else "attention_bias"
        look.reading.take("output_bias", bias or more, "derived", word)
        look.fixed("qk_norm", False, "vLLM's llama class")
    else:
        look.fixed("output_bias", False, "vLLM's qwen3 class")
        look.fixed("qk_norm", True, "vLLM's qwen3 class")
    windows = look.windows()
    if kind == "qwen3" and look.place == "config.json" and not look.layer.get("use_sliding_window") and any(windows):
        windows = (0,) * len(windows)
        look.silent("sliding_window is dropped where use_sliding_window is not true")
    look.reading.take("windows", windows, "read" if any(windows) else "defaulted", f"{look.place}: layer_types")
    served = lent_window(look, windows)
    if len(set(served)) > 1:
        look.stop(f"all layers of a draft must keep their keys alike, and these see {served} positions")


def lent_window(look: Look, windows: Sequence[int]) -> list[int]:
    """The window that each layer is served with; a note where those that see all positions get the target's."""
    wide = _targets_window(look.target)
    if wide and 0 in windows:
        look.reading.notes.append(
            f"vLLM gives layers that see all positions the target's own window of {wide}: of longer texts the draft "
            "sees the last positions alone, and less may be accepted"
        )
    return [window or wide for window in windows]


def _targets_window(target: Facts) -> int:
    """The window that vLLM puts on layers without one of their own: that of a target all of whose layers have it.

    0 where there is none, or none that a text could outgrow.
    """
    kinds, window = (getattr(target.config, key, None) for key in ("layer_types", "sliding_window"))
    uniform = kinds is None or all(kind == "sliding_attention" for kind in kinds)
    return int(window) if uniform and window and window < target.context else 0


def _features(look: Look, kind: str, version: str) -> None:
    key, found = "eagle_aux_hidden_state_layer_ids", False
    second = "layer_ids" if version == "0.33" else key
    found = look.ids("config.json", look.raw, key) or look.ids("eagle_config", look.eagle, second)
    if not found:
        look.usual_taps("vLLM's default")
    other = look.eagle.get(key if version == "0.33" else "layer_ids")
    if other and not look.raw.get(key):
        runner = "the older runner" if version == "0.33" else "0.33's newer runner"
        look.silent(f"{runner} reads the feature ids {other} of eagle_config, the other {list(look.meaning['taps'])}")
    look.reach(0, look.target.layers, "features")
    if "target_hidden_size" not in look.meaning or not look.meaning.get("taps"):
        return
    number = look.layer.get("num_aux_layers") if kind == "qwen3" else None
    number = number or look.layer.get("num_aux_hidden_states")
    if number is None:
        listed = look.eagle.get(key) or (look.raw.get(key) if kind == "qwen3" else None)
        number = len(listed) if listed else 3
    common.number_of_features(look, number, "vLLM")


def _tensors(look: Look) -> None:
    """Names without a place are refused, but for biases and for the maps."""
    full = look.meaning["draft_vocab_size"] == look.target.vocab_size
    needed = common.wanted(look.meaning)
    if "d2t" not in look.tensors and not full:
        look.silent("d2t is not in the file and counts as zero throughout: the first ids of the vocabulary alone")
        needed.pop("d2t", None)
    if full and "d2t" in look.tensors:
        look.stop("d2t has no place where the vocabulary is whole")
    if "lm_head.weight" not in look.tensors and full:
        look.silent("lm_head.weight is not in the file: the target's head is taken")
        needed.pop("lm_head.weight", None)
    free = ["t2d", "mask_hidden"]
    free += [f"layers.{n}.hidden_norm.weight" for n in range(1, int(look.meaning["num_layers"]))]
    look.check(needed, "keeps whatever its memory holds", "stop", tuple(free))


def _length(look: Look, version: str) -> None:
    length, context = look.meaning["max_position_embeddings"], look.target.context
    kind = look.meaning.get("rope_parameters", {}).get("rope_type", "default")
    if length < context and kind not in FREE:
        look.silent(f"the draft's {length} positions shorten the served length to that")
    elif length < context:
        raised = f"max_position_embeddings {length} is raised to the target's {context}"
        look.silent(
            raised if version == "0.33" else f"{raised} in some builds, and texts beyond it have no angles else"
        )
