"""The frozen target: a Hugging Face causal LM with taps of its residual stream and a cache that rolls back.

Feature k is the residual stream after k decoder layers, which transformers calls ``hidden_states[k]``; feature
``FINAL`` is the state after the final norm, which the head reads, and which transformers calls ``hidden_states[-1]``.
Only the tapped layers' outputs are kept alive.

Shape legend: B batch, T new tokens, C cached tokens, H hidden size, K taps, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from redraft.compat import cache_argument
from redraft.errors import UserError
from redraft.prepack import prepack
from redraft.sampling import scale_logits

# The tap of the final-norm state. It counts no layers, so that it means the same in a target of any depth.
FINAL = -1


class FixedLayer(CacheLayerMixin):
    """Keys and values of one layer in buffers that are allocated once; rolling back only moves ``length``."""

    is_sliding = False
    is_croppable = True

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads, _, width = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_empty(batch, heads, self.capacity, width)
        self.values = value_states.new_empty(batch, heads, self.capacity, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        end = self.length + key_states.shape[2]
        if end > self.capacity:
            raise ValueError(f"cache of {self.capacity} tokens cannot hold {end}")
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.capacity


class KeyValueCache(Cache):
    """A fixed-capacity cache over all layers of the target, with exact roll-back."""

    def __init__(self, layers: int, capacity: int) -> None:
        super().__init__(layers=[FixedLayer(capacity) for _ in range(layers)])
        self.capacity = capacity

    @property
    def length(self) -> int:
        return self.layers[0].length

    def rollback(self, length: int) -> None:
        """Forget every position from ``length`` on. The kept keys and values are not touched."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot roll a cache of {self.length} tokens back to {length}")
        for layer in self.layers:
            layer.length = length

    def spread(self, rows: int, capacity: int) -> KeyValueCache:
        """A new cache of ``rows`` sequences with room for ``capacity`` tokens, which all begin with this one's."""
        wider = KeyValueCache(len(self.layers), capacity)
        for layer, source in zip(wider.layers, self.layers, strict=True):
            kept = slice(0, source.length)
            layer.update(
                source.keys[:, :, kept].expand(rows, -1, -1, -1), source.values[:, :, kept].expand(rows, -1, -1, -1)
            )
        return wider

    def compact(self, start: int, kept: Sequence[int]) -> None:
        """Of the positions from ``start`` on keep these, counted from ``start``, ascending, moved side by side.

        After a tree pass this leaves what a pass over the accepted path alone would have left: a key carries its
        position in the sequence, not its place in the buffer.
        """
        rows = list(kept)
        if any(one >= two for one, two in zip(rows, rows[1:], strict=False)):
            raise ValueError(f"rows to keep must ascend, not {rows}")
        if rows and not 0 <= rows[0] <= rows[-1] < self.length - start:
            raise ValueError(f"cannot keep rows {rows} of {self.length - start}")
        # What stands in its place already stays untouched.
        stay = sum(1 for place, row in enumerate(rows) if place == row)
        moved = rows[stay:]
        if moved:
            first, end = start + stay, start + len(rows)
            source = torch.tensor(moved, device=self.layers[0].keys.device) + start
            for layer in self.layers:
                layer.keys[:, :, first:end] = layer.keys.index_select(2, source)
                layer.values[:, :, first:end] = layer.values.index_select(2, source)
        self.rollback(start + len(rows))


@dataclass
class TargetStep:
    """What one forward pass gives: final-norm states [B, T, H] and the taps side by side [B, T, K*H]."""

    hidden_BTH: Tensor
    taps_BTKH: Tensor | None


class Target:
    """A frozen causal LM behind the few calls that decoding, training and regeneration need."""

    def __init__(self, model: Any, tokenizer: Any = None, name: str = "", taps: Sequence[int] | None = None) -> None:
        self.model = prepack(model.eval().requires_grad_(False))
        self.tokenizer = tokenizer
        self.name = name
        self.backbone: Any = model.base_model
        self.head: Any = model.get_output_embeddings()
        self.embedding: Any = model.get_input_embeddings()
        self.config: Any = model.config
        if not hasattr(self.backbone, "layers") or not hasattr(self.backbone, "norm"):
            raise UserError(
                f"{type(model).__name__} is not a dense decoder with .layers and .norm; "
                "use a Llama-, Qwen-, Mistral- or similarly shaped causal LM"
            )
        self.layers = len(self.backbone.layers)
        self.taps = tuple(taps) if taps is not None else default_taps(self.layers)
        self._caught: dict[int, Tensor] = {}
        self._hooks: list[Any] = []
        self.tap(self.taps)

    # -- shape facts -------------------------------------------------------------------------------------------
    @property
    def hidden_size(self) -> int:
        return int(self.config.hidden_size)

    @property
    def vocab_size(self) -> int:
        return int(self.head.weight.shape[0])

    @property
    def context(self) -> int:
        return int(self.config.max_position_embeddings)

    @property
    def dtype(self) -> torch.dtype:
        return self.head.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def parameters_per_token(self) -> int:
        """Parameters that one token's forward pass multiplies: all but the embedding table, plus the head."""
        body = sum(p.numel() for p in self.backbone.parameters()) - self.embedding.weight.numel()
        return body + self.head.weight.numel()

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end a response: those of the generation config, the config and the tokenizer."""
        found: list[Any] = []
        generation = getattr(self.model, "generation_config", None)
        for value in (getattr(generation, "eos_token_id", None), self.config.eos_token_id):
            found.extend(value if isinstance(value, (list, tuple)) else [value])
        if self.tokenizer is not None:
            found.append(self.tokenizer.eos_token_id)
        return tuple(sorted({int(i) for i in found if i is not None}))

    # -- taps --------------------------------------------------------------------------------------------------
    def tap(self, taps: Sequence[int]) -> None:
        """Choose the tapped depths, or ``FINAL``. Raises ``UserError`` when one does not exist in this model."""
        for k in taps:
            if k != FINAL and not 0 <= k <= self.layers:
                raise UserError(f"tap {k} does not exist: the target has {self.layers} layers")
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.taps = tuple(taps)
        for k in sorted({*taps} - {FINAL}):
            if k == 0:
                hook = self.backbone.layers[0].register_forward_pre_hook(_catch_input(self._caught), with_kwargs=True)
            else:
                hook = self.backbone.layers[k - 1].register_forward_hook(_catch_output(self._caught, k))
            self._hooks.append(hook)

    # -- forward -----------------------------------------------------------------------------------------------
    def new_cache(self, capacity: int) -> KeyValueCache:
        return KeyValueCache(self.layers, capacity)

    @torch.inference_mode()
    def forward(
        self,
        ids_BT: Tensor,
        cache: KeyValueCache | None = None,
        positions_BT: Tensor | None = None,
        mask_B1TC: Tensor | None = None,
        taps: bool = True,
    ) -> TargetStep:
        """Run the decoder over new tokens, after those in ``cache`` where one is given.

        ``mask_B1TC`` is boolean, true where a query may look, over cached and new tokens; without it the plain
        causal mask holds. No logits are computed here: ask :meth:`logits` for the positions that matter.
        """
        self._caught.clear()
        hidden = self.backbone(
            input_ids=ids_BT,
            attention_mask=mask_B1TC,
            position_ids=positions_BT,
            **cache_argument(self.backbone, cache),
        ).last_hidden_state
        self._caught[FINAL] = hidden
        fused = None
        if taps:
            # A draft that reads no features gets them with a width of nothing.
            fused = torch.cat([self._caught[k] for k in self.taps] or [hidden[..., :0]], -1)
        self._caught.clear()
        return TargetStep(hidden, fused)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of final-norm states [..., H], with the model's own scaling and soft cap."""
        return self.scale_logits(self.head(hidden))

    def scale_logits(self, logits: Tensor) -> Tensor:
        return scale_logits(logits, self.config)

    # -- identity ----------------------------------------------------------------------------------------------
    def content_hash(self) -> str:
        """A fingerprint of the weights: names, shapes and up to 4,096 evenly spaced values of every tensor.

        A full hash of a 70B model costs minutes at every start; fine-tuning and adapters move every tensor that
        they touch densely, so a spread sample tells two models apart.
        """
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            flat = tensor.detach().reshape(-1)
            step = max(1, flat.numel() // 4096)
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(flat[::step].to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def save(self, folder: str | Path) -> None:
        """Write an ordinary checkpoint (adapter merged in), so that a serving engine can load this target."""
        self.model.save_pretrained(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)


# Hooks know where to put what they catch, and not whose hooks they are: a target that refers to itself would keep its
# weights in memory until the next garbage collection.
def _catch_input(caught: dict[int, Tensor]) -> Callable[..., None]:
    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught[0] = args[0] if args else kwargs["hidden_states"]

    return catch


def _catch_output(caught: dict[int, Tensor], k: int) -> Callable[..., None]:
    def catch(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        caught[k] = output[0] if isinstance(output, tuple) else output

    return catch


def default_taps(layers: int) -> tuple[int, int, int]:
    """EAGLE-3's low, middle and high features (arXiv 2503.01840): after 2, n // 2 and n - 3 layers."""
    return (min(2, layers), layers // 2, max(layers - 3, 0))
