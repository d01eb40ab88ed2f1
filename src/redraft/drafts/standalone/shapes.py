"""Shapes of standalone drafts, and how a new one starts.

A shape is a Hugging Face Llama config with the target's vocabulary, special tokens, rotary positions and context.
Its size is asked for as a named preset, as a share of the target's cost of a step, or as parameters. The cost of a
step is counted in parameters that one token multiplies (all but the embedding table, plus the head): at batch 1 a
step costs what it reads.

Shape legend: V vocabulary, S width of the target's table, H width of the draft.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from redraft.drafts.base import heads_of, rope_of
from redraft.drafts.standalone.module import StandaloneDraft, untrained
from redraft.errors import UserError

# Layers, width, inner width of the MLP, heads. "goel": the 115M drafter of Llama 2 Chat 7B (arXiv 2403.00858).
PRESETS: dict[str, tuple[int, int, int, int]] = {"goel": (4, 1024, 2816, 8)}

# A draft step is a chain of layers, and each has a latency of its own: few and wide, as the paper's, before fewer.
DEPTHS = (4, 3, 2, 1)
WIDEST_HEAD = 128
MOST_INNER = 4
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


def shape_for(target: Any, size: str | float = "1/10", layers: int | None = None, tied: bool | None = None) -> Any:
    """A ``LlamaConfig`` for ``target``, the largest that the request allows.

    ``size`` is a preset's name, a share of the target's parameters per token (``"1/10"``, ``0.1``) or a count of
    parameters per token (``"15M"``, ``15000000``). ``layers`` fixes the depth; ``tied`` shares the embedding table
    with the head (by default as the target does), which saves memory and no time. Raises ``UserError`` for a request
    that cannot be read or that no shape meets.
    """
    if isinstance(size, str) and size.lower() in PRESETS:
        depth, width, inner, heads = PRESETS[size.lower()]
        return _config(target, layers or depth, width, inner, heads, tied)
    budget, head = _budget(target, size), min(WIDEST_HEAD, heads_of(target.config)["head_dim"])
    for depth in (layers,) if layers else DEPTHS:
        if found := _widest(target, depth, head, budget, tied):
            return found
    least = parameters_of(_config(target, layers or 1, head, 2 * head, 1, tied))
    raise UserError(
        f"no shape meets a size of {size} ({budget / 1e6:.3g}M parameters a token): over the target's vocabulary of "
        f"{target.vocab_size} even {layers or 1} layer(s) of width {head} take {least / 1e6:.3g}M, "
        f"which is 1/{max(1, target.parameters_per_token // least)} of the target's; ask for more"
    )


def parameters_of(config: Any) -> int:
    """Parameters that one token of a Llama shape multiplies, as :attr:`StandaloneDraft.parameters_per_token`."""
    width, heads = config.hidden_size, config.num_attention_heads + config.num_key_value_heads
    layer = 2 * width * config.head_dim * heads + 3 * width * config.intermediate_size + 2 * width
    return config.num_hidden_layers * layer + width + config.vocab_size * width


def _budget(target: Any, size: str | float) -> float:
    """Parameters per token that ``size`` allows. Raises ``UserError`` when it cannot be read or is no reduction."""
    text = str(size).strip().lower()
    whole = target.parameters_per_token
    fraction = re.fullmatch(r"(\d+)\s*/\s*(\d+)", text)
    count = re.fullmatch(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)([kmb]?)", text)
    if fraction and int(fraction[2]):
        budget = whole * int(fraction[1]) / int(fraction[2])
    elif count:
        value = float(count[1]) * UNITS[count[2]]
        budget = value if value > 1 else whole * value
    else:
        raise UserError(
            f"the size {size!r} is neither a share of the target (1/10), nor a number of parameters (15M), "
            f"nor one of: {', '.join(PRESETS)}"
        )
    if not 0 < budget < whole:
        raise UserError(f"a draft of size {size} is not smaller than its target ({whole / 1e6:.4g}M parameters)")
    return budget


def _widest(target: Any, depth: int, head: int, budget: float, tied: bool | None) -> Any:
    """The widest shape of this depth within the budget, its MLP widened by what is left; ``None`` if there is none."""
    step, found = min(32, head), None
    for heads in range(1, 1 + max(1, target.hidden_size // head)):
        inner = max(step, round(heads * head * 8 / 3 / step) * step)
        config = _config(target, depth, heads * head, inner, heads, tied)
        if parameters_of(config) > budget:
            break
        found = config
    if found is not None:
        room = int((budget - parameters_of(found)) // (3 * depth * found.hidden_size * step)) * step
        widened = min(found.intermediate_size + room, MOST_INNER * found.hidden_size)
        found.intermediate_size = max(found.intermediate_size, widened)
    return found


def _config(target: Any, layers: int, width: int, inner: int, heads: int, tied: bool | None) -> Any:
    from transformers import LlamaConfig

    source = target.config
    return LlamaConfig(
        vocab_size=target.vocab_size,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=width // heads,
        max_position_embeddings=target.context,
        rms_norm_eps=float(getattr(source, "rms_norm_eps", 1e-5)),
        tie_word_embeddings=bool(source.tie_word_embeddings if tied is None else tied),
        rope_parameters=rope_of(source),
        **{name: getattr(source, name) for name in SPECIAL},
    )


# -- starts ----------------------------------------------------------------------------------------------------------
def fresh_standalone(
    target: Any,
    shape: Any = None,
    seed: int = 0,
    embeddings: str = "target",
    tied: bool | None = None,
    layers: Sequence[int] = (),
) -> StandaloneDraft:
    """A new draft of a shape (:func:`shape_for`; by default a tenth of the target) in float32.

    ``embeddings``: ``"target"`` starts table and head from the target's, projected where widths differ;
    ``"random"`` from nothing. ``layers`` names layers of the target, from 0, of which copies make up the draft (a
    depth-pruned start); its shape is then the target's own with fewer layers, and ``shape`` is not asked. ``tied``
    overrules the shape's. Raises ``UserError`` for a request that cannot be.
    """
    for k in layers:
        if not 0 <= k < target.layers:
            raise UserError(f"the target has layers 0 to {target.layers - 1}, not {k}")
    config = copy.deepcopy(target.config if layers else shape if shape is not None else shape_for(target))
    if layers:
        config.num_hidden_layers = len(layers)
        if kinds := getattr(config, "layer_types", None):
            config.layer_types = [kinds[k] for k in layers]
    if config.vocab_size != target.vocab_size:
        raise UserError(f"the shape has a vocabulary of {config.vocab_size}, the target one of {target.vocab_size}")
    config.tie_word_embeddings = config.tie_word_embeddings if tied is None else tied
    draft = StandaloneDraft(untrained(config, seed), target.tokenizer)
    model = draft.model
    with torch.no_grad():
        for new, old in enumerate(layers):
            model.base_model.layers[new].load_state_dict(target.backbone.layers[old].state_dict())
        if layers:
            model.base_model.norm.load_state_dict(target.norm.state_dict())
        if embeddings == "target":
            table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
            std = float(getattr(config, "initializer_range", 0.02))
            table.copy_(projected(target.embedding.weight, table.shape[1], std))
            if head is not table:
                head.copy_(projected(target.head.weight, head.shape[1], std))
    # The target's special tokens, so that engines end the draft's answers where they end the target's.
    for name in SPECIAL:
        setattr(model.generation_config, name, getattr(target.generation, name, None))
    return draft.bind(target).to(target.device)


def projected(table_VS: Tensor, width: int, std: float) -> Tensor:
    """A table [V, H] of another width: its best approximation of that rank (the first right singular vectors).

    It is scaled to a standard deviation of ``std``, as a model that is trained from nothing expects; a narrower table
    fills the first columns. A table of the same width is taken as it is.
    """
    table = table_VS.detach().double()
    if table.shape[1] == width:
        return table.float()
    # Eigenvectors of the small square matrix, in ascending order, are the singular vectors of the long one.
    vectors = torch.linalg.eigh(table.T @ table).eigenvectors.flip(1)
    # The sign of a singular vector is arbitrary: fixed, so that every machine starts alike.
    sums = vectors.sum(0)
    kept = table @ (vectors * torch.where(sums < 0, -1.0, 1.0))[:, :width]
    kept = kept * (std / kept.square().mean().sqrt())
    return torch.nn.functional.pad(kept, (0, width - kept.shape[1])).float()
