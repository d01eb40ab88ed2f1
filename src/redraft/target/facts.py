"""What is known of a target without its weights: config, tokenizer with its chat template, hash, end ids, lengths."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from redraft.target.structure import active_parameters, context_length, text_decoder

# How the hash of a target begins whose weights nobody here has seen: it is that of the config.
SERVED = "served"


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
        return tuple(sorted({int(i) for i in found if i is not None}))

    @cached_property
    def parameters_per_token(self) -> int:
        """Parameters that one token's forward pass multiplies: all but the embedding table, plus the head.

        Of routed experts those count that a token is sent to. Counted on a model without numbers.
        """
        return parameters_per_token(empty_model(self.whole_config))

    def content_hash(self) -> str:
        """A fingerprint of the weights (16 hex digits), or ``served-`` and one of the config where they are unknown."""
        if self._fingerprint is not None:
            return self._fingerprint()
        text = json.dumps(self.config.to_dict(), sort_keys=True, default=str)
        return f"{SERVED}-{hashlib.sha256(text.encode()).hexdigest()[:9]}"


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
    return active_parameters(decoder, config) - embedding.weight.numel() + head.weight.numel()


def tensors_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A fingerprint of a model's tensors: names, shapes and up to 4,096 evenly spaced values of each (16 hex digits).

    A full hash of a 70B model costs minutes at every start; fine-tuning and adapters move every tensor that they
    touch densely, so a spread sample tells two models apart.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // 4096)
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(flat[::step].to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
