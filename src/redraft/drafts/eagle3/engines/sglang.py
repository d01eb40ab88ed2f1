"""How SGLang 0.5.23 reads an Eagle3 checkpoint.

Facts from its ``models/llama_eagle3.py``, ``models/llama.py``, ``layers/rotary_embedding``,
``speculative/eagle_worker_v2.py`` and ``model_executor/model_runner_components/spec_aux_hidden_state.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from redraft.drafts.eagle.angles import Rules
from redraft.drafts.eagle.look import Look
from redraft.drafts.eagle3.engines import common
from redraft.drafts.formats.meaning import Reading, TensorFacts
from redraft.target import Facts

RULES = Rules(dynamic="stretched", attention="attn_factor", zero_scales=True, truncate=False)
WINDOW = "SGLang's flag --speculative-draft-window-size sets one for all layers"
KEY = "eagle_aux_hidden_state_layer_ids"


def read(config: Mapping[str, Any], tensors: Mapping[str, TensorFacts], target: Facts) -> Reading:
    look = Look("SGLang 0.5.23", config, tensors, target)
    if "LlamaForCausalLMEagle3" not in (config.get("architectures") or ()):
        look.stop(f"architectures {config.get('architectures')} are not known, LlamaForCausalLMEagle3 is")
    if config.get("model_type") != "llama":
        look.stop(f"model_type {config.get('model_type')!r} is not read as that of a draft's layers")
    if look.reading.stops:
        return look.reading
    look.sizes("llama")
    top, inner, whose = look.top, look.inner, "SGLang's default"
    look.fixed("norm_before_residual", False, "SGLang's model", top("norm_before_residual"))
    look.switch("norm_before_fc", False, whose, inner("norm_before_fc"), top("norm_before_fc"))
    look.switch("fc_norm", False, whose, *((top(k)) for k in ("fc_norm", "use_aux_norm") if config.get(k)))
    look.switch("norm_output", False, whose, top("norm_output"))
    look.fixed("head_norm", True, "SGLang's model", top("head_norm"))
    look.switch("fc_bias", False, whose, top("bias"))
    look.take("target_hidden_size", look.meaning["hidden_size"], "hidden_size", top("target_hidden_size"))
    _attention(look)
    look.rope(RULES, lost="partial_rotary_factor")
    _features(look)
    _vocabulary(look)
    look.renamed(("midlayer.", "layers.0."), ("aux_norm_low", "fc_norm.0"), ("aux_norm_mid", "fc_norm.1"))
    look.renamed(("aux_norm_high", "fc_norm.2"), ("model.", ""))
    look.embedding("target", "target")
    needed = common.wanted(look.meaning, "hidden_norm")
    if "d2t" not in look.tensors and "d2t" in needed:
        del needed["d2t"]
        look.silent("d2t is not in the file: the draft's tokens count as the first ids of the vocabulary")
    if config.get("draft_vocab_size") is None:
        needed.pop("lm_head.weight", None)
    later = [f"layers.{n}.input_layernorm.weight" for n in range(1, int(look.meaning["num_layers"]))]
    look.check(needed, "keeps what it was made with", "left out", (*common.TRAINER_TENSORS, "d2t", *later))
    if look.meaning["max_position_embeddings"] < target.context:
        look.silent(f"texts beyond the draft's {look.meaning['max_position_embeddings']} positions have no angles")
    return look.reading


def _attention(look: Look) -> None:
    """Queries, keys and values have no bias, whatever the file says; the output projection has the config's."""
    told = bool(look.raw.get("attention_bias") or look.raw.get("bias"))
    look.fixed("attention_bias", False, "SGLang's model", look.top("attention_bias"))
    look.reading.take("output_bias", told, "read" if told else "defaulted", "config.json: attention_bias or bias")
    look.fixed("qk_norm", False, "SGLang's model")
    windows = look.windows()
    look.reading.take("windows", (0,) * len(windows), "defaulted", "SGLang's model")
    if any(windows):
        look.silent(f"sliding windows of the file are ignored; {WINDOW}")
        look.reading.mends["windows"] = WINDOW


def _features(look: Look) -> None:
    """Ids of ``eagle_config`` alone, each one less than the layers passed."""
    if not look.ids("eagle_config", look.eagle, KEY, 1):
        look.usual_taps("SGLang's default")
        if look.raw.get(KEY) and tuple(look.raw[KEY]) != look.meaning["taps"]:
            look.reading.take("eagle_aux_hidden_state_layer_ids", look.raw[KEY], "dropped", "config.json")
            look.silent(f"feature ids on top of the config, {look.raw[KEY]}, are ignored")
    look.reach(1, look.target.layers - 1, "features")
    number = look.raw.get("num_aux_hidden_states") or len(look.eagle.get(KEY) or ()) or 3
    common.number_of_features(look, number, "SGLang")
    common.fused_width(look, "SGLang")


def _vocabulary(look: Look) -> None:
    if "draft_vocab_size" not in look.raw:
        look.stop("draft_vocab_size is not in the config, without which it does not start")
    common.vocabulary(look, "null: the target's head")
    common.same_vocabulary(look, look.target)
    if look.raw.get("tie_word_embeddings"):
        look.stop("tie_word_embeddings true: the embedding would be the head")
