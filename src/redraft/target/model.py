"""The frozen target: a Hugging Face causal LM with taps of its residual stream and a cache that rolls back.

Feature k is the residual stream after k decoder layers, which transformers calls ``hidden_states[k]``; feature
``FINAL`` is the state after the final norm, which the head reads, and which transformers calls ``hidden_states[-1]``.
Only the tapped layers' outputs are kept alive.

A model with images or sound besides (``Gemma3ForConditionalGeneration`` and its like) is read as its text part. What
of ours equals the model's own passes is found out when it is first asked for (:mod:`redraft.target.paths`).

Shape legend: B batch, T new tokens, C cached tokens, H hidden size, K taps, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from redraft.arithmetic import prepack
from redraft.artifact import let_others_read
from redraft.errors import UserError
from redraft.target.cache import KeyValueCache, MaskPlan, OwnCache, cache_argument
from redraft.target.facts import (
    Facts,
    Head,
    final_norm,
    parameters_per_token,
    plain_embedding,
    tensors_fingerprint,
    text_decoder,
)
from redraft.target.paths import Paths, find_paths

# The tap of the final-norm state. It counts no layers, so that it means the same in a target of any depth.
FINAL = -1


@dataclass
class TargetStep:
    """What one forward pass gives: final-norm states [B, T, H] and the taps side by side [B, T, K*H]."""

    hidden_BTH: Tensor
    taps_BTKH: Tensor | None


class Target(Head):
    """A frozen causal LM behind the few calls that decoding, training and regeneration need."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        name: str = "",
        taps: Sequence[int] | None = None,
        notes: Sequence[str] = (),
        rounding: str | None = None,
    ) -> None:
        """``notes`` and ``rounding`` as :class:`~redraft.target.Facts` has them.

        Raises ``UserError`` for a model that is no stack of decoder layers with a final norm and a head.
        """
        self.model = prepack(model.eval().requires_grad_(False))
        self.backbone: Any = text_decoder(model)
        generation = getattr(model, "generation_config", None)
        super().__init__(
            Facts(name, model.config, tokenizer, generation=generation, notes=tuple(notes), rounding=rounding),
            plain_embedding(self.backbone.get_input_embeddings()),
            final_norm(self.backbone),
            model.get_output_embeddings(),
        )
        if getattr(self.config, "attn_logit_softcapping", None) and self.backbone.config._attn_implementation == "sdpa":
            # Older releases of transformers run Gemma 2 so, and leave its soft cap out without a word.
            self.backbone.set_attn_implementation("eager")
        self.taps = tuple(taps) if taps is not None else new_taps(self.layers)
        self._caught: dict[int, Tensor] = {}
        self._hooks: list[Any] = []
        self.tap(self.taps)

    def __repr__(self) -> str:
        return f"Target({self.name!r}, {type(self.model).__name__} in {str(self.dtype).removeprefix('torch.')})"

    @property
    def layers(self) -> int:
        return len(self.backbone.layers)

    @cached_property
    def parameters_per_token(self) -> int:
        """See :attr:`redraft.target.Facts.parameters_per_token`."""
        return parameters_per_token(self.model)

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

    # -- what of ours equals the model's own -------------------------------------------------------------------
    @cached_property
    def paths(self) -> Paths:
        """Which passes of ours are the model's own, tried once. Raises ``UserError`` where not even a plain one is."""
        return find_paths(self)

    def verdict(self) -> str:
        """One line: what this target is, and which passes of ours are its own. Raises ``UserError`` as ``paths``."""
        kind = str(self.dtype).removeprefix("torch.")
        return f"{type(self.model).__name__} of {self.layers} layers in {kind}; {self.paths.verdict()}"

    def require(self, path: str) -> None:
        """Raise ``UserError`` unless ``path`` (``masked``, ``slots``) equals the model's own passes."""
        if not getattr(self.paths, path):
            what = {"masked": "trees and steps of fixed shapes", "slots": "batched decoding"}[path]
            raise UserError(
                f"{type(self.model).__name__} does not give its own text under masks of ours ({self.paths.why}), so "
                f"{what} would not be lossless here; decode with a chain (--shape chain:3), or measure a --server"
            )

    # -- forward -----------------------------------------------------------------------------------------------
    def new_cache(self, capacity: int) -> KeyValueCache | OwnCache:
        """An empty cache with room for ``capacity`` tokens: buffers of ours, or else the model's own.

        Raises ``UserError`` for a model whose cached passes are not its own text in either.
        """
        if self.paths.cached:
            return self.new_buffers(capacity)
        if not self.paths.own_cache:
            raise UserError(
                f"{type(self.model).__name__} cannot be decoded step by step in this process ({self.paths.why}); "
                "measure it through a --server"
            )
        return OwnCache(self.config, self.text_states)

    def new_buffers(self, capacity: int) -> KeyValueCache:
        """Buffers of ours, for who has asked ``paths`` whether they may be used."""
        return KeyValueCache(self.layers, capacity)

    @cached_property
    def mask_plan(self) -> MaskPlan | None:
        """How this model takes masks of ours; nothing where it takes none."""
        return MaskPlan.of(self.backbone.config)

    def text_states(self, ids_BT: Tensor, cache: Any, mask: Any = None, positions_BT: Tensor | None = None) -> Tensor:
        """Final-norm states [B, T, H] of the model's text part, called as transformers calls it."""
        return self.backbone(
            input_ids=ids_BT,
            attention_mask=mask,
            position_ids=positions_BT,
            **cache_argument(self.backbone, cache),
        ).last_hidden_state

    @torch.inference_mode()
    def forward(
        self,
        ids_BT: Tensor,
        cache: Any = None,
        positions_BT: Tensor | None = None,
        mask_B1TC: Tensor | None = None,
        taps: bool = True,
    ) -> TargetStep:
        """Run the decoder over new tokens, after those in ``cache`` where one is given.

        ``mask_B1TC`` is boolean, true where a query may look, over cached and new tokens; windows are added to it.
        Without it the model makes its own causal masks. No logits are computed here: ask :meth:`logits` for the
        positions that matter. Raises ``UserError`` where tapped layers keep more than a vector a token.
        """
        self._caught.clear()
        mask: Any = mask_B1TC
        if mask_B1TC is not None:
            plan = self.mask_plan
            if plan is None or positions_BT is None or cache is None:
                raise ValueError("a mask needs positions, a cache, and a model whose kinds of layers are known")
            mask = plan.masks(mask_B1TC, positions_BT, cache.key_positions, self.dtype)
        inner = cache
        if isinstance(cache, OwnCache):
            cache.begin(ids_BT)
            inner = cache.inner
        hidden = self.text_states(ids_BT, inner, mask, positions_BT)
        self._caught[FINAL] = hidden
        fused = None
        if taps:
            # A draft that reads no features gets them with a width of nothing.
            fused = torch.cat([self._tapped(k, hidden) for k in self.taps] or [hidden[..., :0]], -1)
        self._caught.clear()
        return TargetStep(hidden, fused)

    def _tapped(self, k: int, hidden_BTH: Tensor) -> Tensor:
        """What was caught after k layers [B, T, H]. Raises ``UserError`` where a layer keeps more than one vector."""
        caught = self._caught[k].to(hidden_BTH.device)  # layers may be on several devices
        if caught.shape != hidden_BTH.shape:
            raise UserError(
                f"{type(self.model).__name__} has states {list(caught.shape)} after layer {k}, where one vector a "
                "token is needed, so no draft can read them; distill a language model of its own"
            )
        return caught

    # -- identity ----------------------------------------------------------------------------------------------
    def content_hash(self) -> str:
        """A fingerprint of the weights: :func:`redraft.target.facts.tensors_fingerprint`."""
        return tensors_fingerprint(self.model.state_dict())

    def save(self, folder: str | Path) -> None:
        """Write an ordinary checkpoint (adapter merged in), so that a serving engine can load this target."""
        self.model.save_pretrained(folder)
        let_others_read(*Path(folder).glob("*.safetensors"))
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
    """EAGLE-3's low, middle and high features (arXiv 2503.01840): after 2, n // 2 and n - 3 layers.

    Engines read these where a checkpoint names none.
    """
    return (min(2, layers), layers // 2, max(layers - 3, 0))


def new_taps(layers: int) -> tuple[int, ...]:
    """Features of a new draft: the default ones, or, where these name a layer twice (6 layers or fewer), others.

    Engines read each layer once, so a draft with a layer twice could be trained and never served.
    """
    usual = default_taps(layers)
    if usual[0] < usual[1] < usual[2]:
        return usual
    return (1, layers // 2, layers - 1) if layers > 3 else tuple(range(min(3, layers + 1)))
