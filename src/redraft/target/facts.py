"""A target without its layers: facts that need no weights, and the head, which with stored states is all that
training reads.

Shape legend: H hidden size, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from redraft.errors import UserError
from redraft.sampling import scale_logits

# How the hash of a target begins whose weights nobody here has seen: it is that of the config.
SERVED = "served"

NORMS = ("norm", "final_layernorm", "final_layer_norm", "norm_f", "embedding_norm")
# How configs name their experts, and how many of them a token is sent to.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k")
# Parameters of routed experts: a list of modules, or stacked in one tensor [experts, ...].
ROUTED = re.compile(r"(?:^|\.)experts\.(?!router\.|gate\.)")
NUMBERED = re.compile(r"(?:^|\.)experts\.\d+\.")
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
# Rotary types whose angles change once a text is longer than what the model was first trained on.
LENGTH_BOUND_ROPES = ("dynamic", "longrope")


class Facts:
    """A target by its config and tokenizer. :class:`~redraft.target.Head` and :class:`~redraft.target.Target` are
    such facts too, with the weights that they hold.

    ``config`` is that of the text model and ``whole_config`` that of the whole one, ``generation`` its generation
    config, ``notes`` what was noted on opening it, in sentences for the user. ``rounding`` says in words what engines
    round when they serve it and the weights at hand do not, none where both are the same: who generates or measures in
    process must refuse a target that has it.
    """

    def __init__(
        self,
        name: str,
        config: Any,
        tokenizer: Any = None,
        *,
        generation: Any = None,
        notes: tuple[str, ...] = (),
        rounding: str | None = None,
        fingerprint: Callable[[], str] | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        """``config`` is that of the whole model. ``fingerprint`` gives the hash of the weights where there are some;
        ``device`` is where drafts for it belong where there are none."""
        self.name, self.tokenizer, self.generation = name, tokenizer, generation
        self.whole_config: Any = config
        self.config: Any = config.get_text_config(decoder=True)
        self.notes, self.rounding = notes, rounding
        self._fingerprint, self._device = fingerprint, torch.device(device)

    @property
    def facts(self) -> Facts:
        """The facts alone, which hold no weights."""
        return self

    @property
    def architectures(self) -> tuple[str, ...]:
        """Class names of the whole model, as its config lists them; none where it lists none."""
        return tuple(getattr(self.whole_config, "architectures", None) or ())

    @property
    def device(self) -> torch.device:
        """Where the weights are, and the drafts for it belong."""
        return self._device

    @property
    def hidden_size(self) -> int:
        return int(self.config.hidden_size)

    @property
    def layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def vocab_size(self) -> int:
        """Rows of embedding and head."""
        return int(self.config.vocab_size)

    @property
    def context(self) -> int:
        """Tokens of the longest text: what the model was made for, and no more than its angles stay the same for."""
        return context_length(self.config)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end a response: those of the generation config, the config and the tokenizer."""
        found: list[Any] = []
        for source in (self.generation, self.whole_config, self.config, self.tokenizer):
            value = getattr(source, "eos_token_id", None)
            found.extend(value if isinstance(value, (list, tuple)) else [value])
        if wrong := [i for i in found if i is not None and type(i) is not int]:
            raise UserError(f"{self.name} has eos_token_id {wrong[0]!r:.60}; whole numbers are needed, ids of tokens")
        return tuple(sorted({int(i) for i in found if i is not None}))

    @cached_property
    def parameters_per_token(self) -> int:
        """Parameters that one token's forward pass multiplies: all but embedding tables, plus the head.

        Of routed experts as many count as a token is sent to. Counted on a model without numbers.
        """
        return parameters_per_token(empty_model(self.whole_config))

    def content_hash(self) -> str:
        """A fingerprint of the weights (16 hex digits), or ``served-`` and one of the config where they are unknown."""
        if self._fingerprint is not None:
            return self._fingerprint()
        text = json.dumps(self.config.to_dict(), sort_keys=True, default=str)
        return f"{SERVED}-{hashlib.sha256(text.encode()).hexdigest()[:9]}"


class Head(Facts):
    """A frozen target without its layers: what turns states into logits, and tokens into embeddings.

    ``embedding`` is the table as it lies in the file, ``norm`` the norm before the head, ``head`` the output layer.
    """

    def __init__(self, facts: Facts, embedding: Any, norm: Any, head: Any) -> None:
        super().__init__(**_parts(facts), fingerprint=facts.content_hash)
        self.embedding, self.norm, self.head = embedding, norm, head

    @property
    def facts(self) -> Facts:
        """The facts alone, which hold no weights."""
        known = self.content_hash()
        return Facts(**_parts(self), fingerprint=lambda: known, device=self.device)

    @property
    def head_part(self) -> Head:
        """The ends alone: whoever keeps no more than this lets go of the layers."""
        return Head(self.facts, self.embedding, self.norm, self.head)

    @property
    def vocab_size(self) -> int:
        """Rows of the head."""
        return int(self.head.weight.shape[0])

    @property
    def dtype(self) -> torch.dtype:
        return self.head.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of final-norm states [..., H], with the model's own scaling and soft cap."""
        return self.scale_logits(self.head(hidden))

    def scale_logits(self, logits: Tensor) -> Tensor:
        """The head's output with the scaling and soft cap that the config names."""
        return scale_logits(logits, self.config)


def _parts(facts: Facts) -> dict[str, Any]:
    names = ("name", "tokenizer", "generation", "notes", "rounding")
    return {"config": facts.whole_config} | {name: getattr(facts, name) for name in names}


# -- a model's parts -------------------------------------------------------------------------------------------------
def text_decoder(model: Any) -> Any:
    """The stack of decoder layers that reads text: the module itself, or the text part of a larger model.

    Raises ``UserError`` where there is none.
    """
    places = [model.get_decoder(), model.base_model]
    places += [getattr(place, name, None) for place in list(places) for name in ("model", "language_model")]
    for place in places:
        if isinstance(getattr(place, "layers", None), nn.ModuleList) and final_norm(place) is not None:
            return place
    raise UserError(
        f"{type(model).__name__} is not a dense decoder with .layers and .norm; "
        "use a Llama-, Qwen-, Mistral- or similarly shaped causal LM"
    )


def final_norm(decoder: Any) -> Any:
    """The norm between the last layer and the head; none where there is none."""
    return next((getattr(decoder, name) for name in NORMS if hasattr(decoder, name)), None)


def plain_embedding(table: Any) -> Any:
    """The embedding table without a factor that the model puts on what it looks up (Gemma).

    Drafts read the table as it lies in the file: so do their trainers, and the engines that share it with the target.
    """
    if type(table) is nn.Embedding:
        return table
    rows, width = table.weight.shape
    plain = nn.Embedding(rows, width, device="meta")
    plain.weight = table.weight
    return plain.requires_grad_(False)


def context_length(config: Any) -> int:
    """Tokens of the longest text whose rotary angles are those that shorter ones have."""
    longest = int(config.max_position_embeddings)
    for rope in length_bound_ropes(config):
        key = "original_max_position_embeddings"
        # Without it, the config's own length is where the angles begin to change.
        longest = min(longest, int(rope.get(key) or getattr(config, key, None) or longest))
    return longest


def length_bound_ropes(config: Any) -> list[dict[str, Any]]:
    """The rotary settings whose angles follow the length of the text, of all kinds of layers that have some."""
    known = getattr(config, "rope_parameters", None) or {}
    ropes = list(known.values()) if known and all(isinstance(value, dict) for value in known.values()) else [known]
    return [rope for rope in ropes if rope.get("rope_type") in LENGTH_BOUND_ROPES]


def active_parameters(decoder: nn.Module, config: Any) -> int:
    """Parameters of a decoder that one token is multiplied with: none of the tables that it is looked up in, and of
    routed experts as many as the router chooses."""
    tables = {id(module.weight) for module in decoder.modules() if isinstance(module, nn.Embedding)}
    experts, total = _first(config, EXPERTS), 0
    for name, parameter in decoder.named_parameters():
        stacked = parameter.dim() == 3 and parameter.shape[0] == experts > 1 < parameter.shape[1]
        if stacked or (ROUTED.search(name) and (parameter.dim() > 1 or NUMBERED.search(name))):
            total += round(parameter.numel() * _routed_share(config, experts, name))
        elif id(parameter) not in tables:
            total += parameter.numel()
    return total


def _routed_share(config: Any, experts: int, name: str) -> float:
    """Of the routed experts that the parameter ``name`` belongs to, the share that a token is sent to.

    Experts that hand on what they are given (LongCat) have no parameters, and are chosen as often as others.
    """
    layer = LAYER.search(name)
    chosen = _first(config, CHOSEN, int(layer[1]) if layer else 0)
    among = experts + int(getattr(config, "zero_expert_num", None) or 0)
    return min(1.0, chosen / among) if experts and chosen else 1.0


def _first(config: Any, names: tuple[str, ...], layer: int = 0) -> int:
    """The first of these numbers that a config has; of one that has a list, that of the ``layer``."""
    found = next((value for name in names if (value := getattr(config, name, None))), 0)
    return int(found[min(layer, len(found) - 1)] if isinstance(found, list | tuple) else found)


def model_class(config: Any) -> Any:
    """The auto class that opens this config; a model of images whose text part has no class of its own opens whole."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )

    whole = type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if whole else AutoModelForCausalLM


def empty_model(config: Any) -> Any:
    """The model of a config with shapes and names and no numbers."""
    with torch.device("meta"):
        return model_class(config).from_config(config, trust_remote_code=False)


def parameters_per_token(model: Any) -> int:
    """See :attr:`Facts.parameters_per_token`. Raises ``UserError`` for a model that is no stack of layers."""
    decoder = text_decoder(model)
    embedding, head = decoder.get_input_embeddings(), model.get_output_embeddings()
    config = model.config.get_text_config(decoder=True)
    # A table that is no plain module of torch's is none the less the table.
    plain = isinstance(embedding, nn.Embedding)
    return active_parameters(decoder, config) - (0 if plain else embedding.weight.numel()) + head.weight.numel()


def tensors_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A fingerprint of a model's tensors: names, shapes and up to 4,096 evenly spaced values of each (16 hex digits).

    A full hash of a 70B model costs minutes at every start; fine-tuning and adapters move every tensor that they
    touch densely, so a spread sample tells two models apart.
    """
    flat = ((name, t.shape, t.detach().reshape(-1)[:: sampled(t.shape)]) for name, t in sorted(tensors.items()))
    return fingerprint(flat)


def sampled(shape: torch.Size) -> int:
    """Which of a tensor's numbers, in order, are in its fingerprint: the first, and every so manieth after it."""
    return max(1, shape.numel() // 4096)


def fingerprint(tensors: Iterable[tuple[str, torch.Size, Tensor]]) -> str:
    """The fingerprint of tensors by name, shape and sample [4096 or so], in the order of their names."""
    digest = hashlib.sha256()
    for name, shape, sample in tensors:
        digest.update(f"{name}{tuple(shape)}".encode())
        digest.update(sample.to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
