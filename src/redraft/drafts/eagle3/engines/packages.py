"""How packages that train drafts read an Eagle3 checkpoint: speculators 0.9, SpecForge 0.2, ModelOpt 0.47.

Facts from speculators' ``model.py``, ``models/eagle3`` and ``models/utils.py``, SpecForge's ``modeling/draft``,
``training/model_loading.py`` and ``algorithms/model_providers.py``, and ModelOpt's ``export/plugins``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from redraft.drafts.eagle.angles import Rules
from redraft.drafts.eagle.look import Look
from redraft.drafts.eagle3.engines import common
from redraft.drafts.formats.meaning import Reading, TensorFacts
from redraft.target import Facts

KEY = "eagle_aux_hidden_state_layer_ids"
SPECFORGE_RULES = Rules(
    partial=False,
    dynamic="table",
    attention=None,
    zero_scales=True,
    truncate=False,
    kinds=("default", "linear", "dynamic", "yarn", "llama3"),
    bare_yarn=False,
)


# -- speculators -----------------------------------------------------------------------------------------------------
def speculators(config: Mapping[str, Any], tensors: Mapping[str, TensorFacts], target: Facts) -> Reading:
    """speculators 0.9's ``from_pretrained``."""
    layer = config.get("transformer_layer_config")
    place = "transformer_layer_config"
    look = Look("speculators 0.9", config, tensors, target, layer if isinstance(layer, Mapping) else {}, place)
    if config.get("speculators_model_type") != "eagle3" or not look.layer:
        look.stop(
            "this is not the speculators format: no speculators_model_type eagle3 with a transformer_layer_config"
        )
        return look.reading
    kind = str(look.layer.get("model_type", "qwen3"))
    if kind not in ("llama", "qwen3"):
        look.stop(f"layers of model_type {kind!r} are not those of an Eagle3 draft there")
        return look.reading
    look.sizes(kind)
    for name in ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output"):
        look.switch(name, False, "speculators' default", look.top(name))
    if look.meaning["norm_before_fc"] and look.meaning["fc_norm"]:
        look.stop("norm_before_fc and fc_norm exclude each other")
    look.fixed("head_norm", True, "speculators' model", look.top("head_norm"))
    look.fixed("fc_bias", False, "speculators' model")
    look.reading.take(
        "target_hidden_size", look.meaning["hidden_size"], "derived", "hidden_size, whatever the file has"
    )
    bias = look.switch("attention_bias", False, "speculators' default", look.beside("attention_bias"))
    stands = any(name.endswith("o_proj.bias") for name in look.tensors)
    look.reading.take("output_bias", bias and stands, "derived", "attention_bias; one that is not there is zero")
    look.fixed("qk_norm", kind == "qwen3", f"speculators' {kind} layers")
    _windows(look, kind)
    look.rope(Rules(partial=False), 10000.0)
    if not look.ids("config.json", config, KEY):
        look.usual_taps("speculators' default")
    look.reach(0, target.layers, "features")
    common.vocabulary(look, "speculators' default")
    if config.get("draft_vocab_size") is None:
        look.reading.take("draft_vocab_size", 32000, "defaulted", "speculators' default")
    look.embedding("own", "zeros")
    if look.meaning["embedding"] == "zeros":
        look.silent("embed_tokens is not in the file: the embedding is zero throughout and is never filled in")
    needed = common.wanted(look.meaning, maps=look.meaning["draft_vocab_size"] != look.meaning["target_vocab_size"])
    look.check(needed, "holds whatever its memory holds", "left out", common.TRAINER_TENSORS)
    return look.reading


def _windows(look: Look, kind: str) -> None:
    windows = look.windows()
    if kind == "qwen3" and any(windows) and not look.layer.get("use_sliding_window"):
        windows = (0,) * len(windows)
        look.silent("sliding_window is dropped where use_sliding_window is not true")
    look.reading.take("windows", windows, "read" if any(windows) else "defaulted", f"{look.place}: layer_types")


# -- SpecForge -------------------------------------------------------------------------------------------------------
def specforge(config: Mapping[str, Any], tensors: Mapping[str, TensorFacts], target: Facts) -> Reading:
    """SpecForge 0.2's warm start (``model.draft_checkpoint_path``), as strict as it is."""
    look = Look("SpecForge 0.2", config, tensors, target)
    if list(config.get("architectures") or ()) != ["LlamaForCausalLMEagle3"]:
        look.stop(f"architectures {config.get('architectures')} are not the one that it knows, LlamaForCausalLMEagle3")
        return look.reading
    if config.get("model_type") not in (None, "llama"):
        look.stop(f"model_type {config['model_type']!r} is no llama")
    look.sizes("llama")
    if look.meaning["num_layers"] != 1:
        look.reading.take("num_layers", look.meaning["num_layers"], "dropped", "config.json: num_hidden_layers")
        look.reading.take("num_layers", 1, "defaulted", "SpecForge's model")
    top, ours = look.top, "SpecForge's model"
    for name in ("norm_before_residual", "norm_before_fc"):
        look.fixed(name, False, ours, top(name), look.inner(name))
    look.switch("fc_norm", False, "SpecForge's default", top("fc_norm"))
    # Its key of this name says whether there is a norm before the head; the state is always handed on before it.
    look.switch("head_norm", True, "SpecForge's default", top("norm_output"))
    look.fixed("norm_output", False, ours)
    if config.get("norm_output") is False:
        look.silent("norm_output false means there that no norm stands before the head")
    elif config.get("norm_output"):
        look.silent(
            "norm_output true means there that a norm stands before the head, not that the state is handed on behind it"
        )
    for name in ("fc_bias", "attention_bias", "output_bias", "qk_norm"):
        look.fixed(name, False, ours, *([top(name)] if name == "attention_bias" else []))
    look.reading.take("windows", (0,) * int(look.meaning["num_layers"]), "defaulted", ours)
    if any(look.windows()):
        look.silent("sliding windows of the file are ignored")
    look.take("target_hidden_size", look.meaning["hidden_size"], "hidden_size", top("target_hidden_size"))
    look.rope(SPECFORGE_RULES)
    if not look.ids("eagle_config", look.eagle, KEY, 1):
        look.usual_taps("SpecForge's default")
    if len(look.meaning["taps"]) != 3 or min(look.meaning["taps"]) < 1:
        look.stop("exactly three features are collected, each behind a layer")
    common.vocabulary(look, "SpecForge's default: the whole vocabulary")
    look.renamed(("midlayer.", "layers.0."))
    if any(name.startswith("layers.0.") for name in tensors):
        look.stop("tensors of the layer must be called midlayer, not layers.0")
    look.embedding("own", "target")
    look.check(common.wanted(look.meaning, maps=True), "stop", "left out", common.TRAINER_TENSORS[1:])
    return look.reading


# -- ModelOpt --------------------------------------------------------------------------------------------------------
def modelopt(config: Mapping[str, Any], tensors: Mapping[str, TensorFacts], target: Facts) -> Reading:
    """nvidia-modelopt 0.47 writes drafts for engines and reads none."""
    look = Look("ModelOpt 0.47", config, tensors, target)
    look.stop("it loads no draft that was exported; it goes on from the whole checkpoint of its own training run")
    return look.reading
