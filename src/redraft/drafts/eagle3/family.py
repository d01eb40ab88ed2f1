"""The family ``eagle3``, as the registry holds it, and how its drafts are written, in three formats.

``vllm``: the speculators format, which vLLM loads with every option of an Eagle3 draft; keys and names of tensors
follow the speculators package (0.9). ``plain``: the format of SafeAILab and SpecForge, which vLLM and SGLang load;
``sglang`` is the same files, where SGLang computes them right. ``plain`` writes whatever vLLM loads and warns where
SGLang would compute something else; ``sglang`` refuses there. Facts: vLLM 0.32, SGLang 0.5.23; docs/formats.md.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from redraft.artifact import dtype_name
from redraft.drafts.base import Family
from redraft.drafts.eagle.writing import LayerWriter, in_layers, layer_config, legacy_config, prepare
from redraft.drafts.eagle3.engines import READERS, meaning_of, read_as
from redraft.drafts.eagle3.module import Eagle3Config, Eagle3Draft, fresh_draft
from redraft.drafts.eagle3.reading import ARCHITECTURES, check_state, check_taps, check_vocabulary_map, read, recognises
from redraft.drafts.eagle3.suspects import suspects
from redraft.drafts.formats.base import Format
from redraft.errors import UserError
from redraft.registries import EXPORTERS, FAMILIES
from redraft.target import Facts

EXPORTERS.register("plain")(Format("plain"))


class Eagle3Writer(LayerWriter):
    """The files of one format."""

    def check(self, draft: Eagle3Draft, target: Facts) -> tuple[Eagle3Draft, list[str]]:
        """As of every writer, with a note on what SGLang would not compute of a plain file."""
        config = draft.config
        if self.name == "vllm" and not target.name:
            raise UserError("the export names the target for the engine; give the target's path or model id")
        check_taps(config.taps)
        if config.norm_before_fc and config.fc_norm:
            raise UserError(
                "norm_before_fc and fc_norm exclude each other in every engine; train a draft with one of them"
            )
        dense, notes = prepare(draft, target)
        state = {name: tensor.cpu() for name, tensor in dense.state_dict().items()}
        check_vocabulary_map(state, config, "the draft to be exported")
        limits = "; ".join(sglang_limits(dense.config, target))
        if limits and self.name == "sglang":
            raise UserError(f"SGLang cannot run this draft: {limits}; export it for vLLM instead")
        return dense, notes + ([f"not for SGLang: {limits}"] if limits and self.name == "plain" else [])

    def config(self, draft: Eagle3Draft, target: Facts, tokens: int) -> dict[str, Any]:
        """As of every writer. That of speculators has no top-level ``model_type``: vLLM tells the format by that.

        In the other feature ids stand twice: vLLM reads those on top (after k layers), SGLang adds one.
        """
        config, taps = draft.config, list(draft.config.taps)
        # The four switches are always written: their defaults differ.
        switches = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
        options = {
            "draft_vocab_size": config.draft_vocab_size,
            "target_hidden_size": config.target_hidden_size,
            "eagle_aux_hidden_state_layer_ids": taps,
            **{name: getattr(config, name) for name in switches},
        }
        # Engines assume three features unless told otherwise here.
        number = {"num_aux_hidden_states": len(taps)}
        if self.name != "vllm":
            nested = {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": [k - 1 for k in taps]}
            return legacy_config(draft, "LlamaForCausalLMEagle3") | number | options | {"eagle_config": nested}
        rope, dtype = dict(config.rope_parameters), dtype_name(draft.fc.weight.dtype)
        proposal = {"proposal_type": "greedy", "speculative_tokens": tokens}
        verifier = {"name_or_path": target.name, "architectures": list(target.architectures or ("LlamaForCausalLM",))}
        return {
            "architectures": ["Eagle3Speculator"],
            "speculators_model_type": "eagle3",
            **options,
            "tie_word_embeddings": False,
            "transformer_layer_config": layer_config(draft) | number | {"rope_parameters": rope, "dtype": dtype},
            "speculators_config": {
                "algorithm": "eagle3",
                "default_proposal_method": "greedy",
                "proposal_methods": [proposal | {"verifier_accept_k": 1, "accept_tolerance": 0.0}],
                "verifier": verifier,
            },
        }

    def tensors(self, draft: Eagle3Draft) -> dict[str, Tensor]:
        return in_layers(draft) if self.name == "vllm" else draft.state_dict()


def sglang_limits(config: Eagle3Config, target: Facts) -> list[str]:
    """What SGLang would not compute as the draft does; it says nothing when that happens."""
    fused = len(config.taps) * config.target_hidden_size
    inside = config.taps[0] >= 1 and config.taps[-1] < target.layers
    limits = {
        "norm_before_residual is ignored": config.norm_before_residual,
        "attention biases are dropped": config.attention_bias,
        "the draft's own embeddings are replaced with the target's": config.own_embedding,
        f"features can be read after layers 1 to {target.layers - 1} only": not inside,
        "fc is skipped when its input is as wide as its output": fused == config.hidden_size,
    }
    return [limit for limit, met in limits.items() if met]


FAMILIES.register("eagle3")(
    Family(
        name="eagle3",
        build=lambda config: Eagle3Draft.untrained(Eagle3Config.from_dict(config)),
        fresh=fresh_draft,
        recognises=recognises,
        architectures=ARCHITECTURES,
        read=read,
        suspects=suspects,
        meaning=meaning_of,
        readers={engine: partial(read_as, engine) for engine in READERS},
        options=("taps", "trainer"),
        check_state=check_state,
        writers={
            "vllm": Eagle3Writer("vllm", "eagle3", warns=True),
            "plain": Eagle3Writer("plain", "eagle3", warns=True),
            "sglang": Eagle3Writer("sglang", "EAGLE3"),
        },
        refusal="this draft reads the target's states and is no language model, which {format} is for; export it for "
        "vllm or sglang",
    )
)
