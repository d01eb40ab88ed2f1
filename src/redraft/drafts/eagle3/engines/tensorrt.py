"""How TensorRT-LLM's PyTorch backend reads an Eagle3 checkpoint in its one-model mode.

Facts from its public repository: ``_torch/models/modeling_speculative.py``, ``_torch/attention_backend/interface.py``,
``_torch/speculative/eagle3.py`` and ``llmapi/llm_args.py``. Feature ids are not in the file for it: they stand in the
speculative config that it is served with, each counted from zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from redraft.drafts.eagle.angles import Rules
from redraft.drafts.eagle.look import Look
from redraft.drafts.eagle3.engines import common
from redraft.drafts.formats.meaning import Reading, TensorFacts
from redraft.target import Facts

RULES = Rules(attention=None, zero_scales=True, truncate=False, kinds=("default", "linear", "yarn", "llama3"))
KEY = "eagle_aux_hidden_state_layer_ids"
ARCHITECTURES = {"LlamaForCausalLMEagle3", "EAGLE3LlamaForCausalLM", "LlamaForCausalLM"}


def read(config: Mapping[str, Any], tensors: Mapping[str, TensorFacts], target: Facts) -> Reading:
    look = Look("TensorRT-LLM", config, tensors, target)
    if not ARCHITECTURES & set(config.get("architectures") or ()):
        look.stop(f"architectures {config.get('architectures')} are not known")
        return look.reading
    if config.get("model_type") != "llama":
        look.stop(f"model_type {config.get('model_type')!r} is not read as that of a draft's layers")
        return look.reading
    look.sizes("llama")
    top, inner, ours = look.top, look.inner, "TensorRT-LLM's model"
    for key in ("attention_bias", "torch_dtype"):
        if config.get(key) is None and config.get("dtype") is None:
            look.stop(f"{key} is not in the config")
    look.fixed("norm_before_residual", False, ours, top("norm_before_residual"))
    look.switch("norm_before_fc", False, "its default", inner("norm_before_fc"))
    if config.get("norm_before_fc") and not look.meaning["norm_before_fc"]:
        look.silent("norm_before_fc is looked for in eagle_config alone")
    look.switch("fc_norm", False, "its default", top("fc_norm"))
    places = [place for place in (inner("return_hidden_post_norm"), top("norm_output")) if place[1].get(place[2])]
    look.switch("norm_output", False, "its default", *places)
    look.fixed("head_norm", True, ours, top("head_norm"))
    look.switch("fc_bias", False, "its default", top("bias"))
    bias = look.switch("attention_bias", False, "its default", top("attention_bias"))
    look.reading.take("output_bias", bias, "derived", "attention_bias")
    look.fixed("qk_norm", False, ours)
    windows = look.windows()
    look.reading.take("windows", (0,) * len(windows), "defaulted", ours)
    if any(windows):
        look.silent("sliding windows of the file are ignored")
    look.take("target_hidden_size", look.meaning["hidden_size"], "hidden_size", top("target_hidden_size"))
    look.rope(RULES, lost="partial_rotary_factor")
    told = _features(look)
    common.vocabulary(look, "its default: the whole vocabulary")
    common.same_vocabulary(look, target)
    look.renamed(("midlayer.", "layers.0."))
    wide = look.meaning["hidden_size"] == look.meaning["target_hidden_size"]
    look.embedding("target" if wide else "own", "target")
    needed = common.wanted(look.meaning | {"taps": told}, "hidden_norm")
    if "lm_head.weight" not in look.tensors:
        look.silent("lm_head.weight is not in the file: the target's head is taken")
        needed.pop("lm_head.weight")
    later = [f"layers.{n}.input_layernorm.weight" for n in range(1, int(look.meaning["num_layers"]))]
    look.check(needed, "stop", "left out", (*common.TRAINER_TENSORS, *later))
    if look.meaning["max_position_embeddings"] < target.context:
        look.silent(f"texts beyond the draft's {look.meaning['max_position_embeddings']} positions have no angles")
    return look.reading


def _features(look: Look) -> tuple[int, ...]:
    """The ids that it collects where the speculative config names none, and those that the file asks for [K]."""
    look.usual_taps("its default; eagle3_layers_to_capture of the speculative config sets others")
    listed = look.eagle.get(KEY) or [k - 1 for k in look.raw.get(KEY) or ()]
    told = tuple(int(k) + 1 for k in listed) or look.meaning["taps"]
    if told != look.meaning["taps"]:
        look.silent(f"feature ids of the file are ignored; serve with eagle3_layers_to_capture {[k - 1 for k in told]}")
    if not all(1 <= k <= look.target.layers for k in told):
        look.stop(f"features are those behind layers 1 to {look.target.layers}, and {list(told)} are asked for")
    if len(told) > 1 and len(told) * look.meaning["target_hidden_size"] == look.meaning["hidden_size"]:
        look.stop("TensorRT-LLM skips fc where its input is as wide as its output")
    return told
