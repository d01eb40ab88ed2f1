"""A pass of a target of which one layer at a time is in memory: slow, and right for models of any size.

transformers and accelerate leave the weights in the checkpoint's own files and read each module's when it runs. For a
few rows, to compare what somebody else says of them with.

Shape legend: T tokens, K taps, H hidden size.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from redraft.errors import UserError
from redraft.loading import quantised
from redraft.loading.checkpoint import check_code, check_folder, config_at
from redraft.loading.places import locate, one_line, quiet
from redraft.target.facts import final_norm, model_class, text_decoder


def states_by_layers(
    spec: str, dtype: torch.dtype, texts: Sequence[Sequence[int]], depths: Sequence[int]
) -> list[tuple[list[Tensor], Tensor]]:
    """For every text of token ids: the residual stream [T, H] after each of ``depths`` layers, and the state [T, H]
    after the final norm.

    Raises ``UserError`` where the checkpoint cannot be read so: quantised ones cannot.
    """
    with quiet(), tempfile.TemporaryDirectory(prefix="redraft-layers-") as room:
        place, notes = locate(spec), list[str]()
        check_folder(place, spec)
        config = config_at(place, spec)
        check_code(config, spec, notes)
        if quantised.plan(config, spec).method is not None:
            raise UserError(f"{spec} is quantised, and its layers cannot be read one at a time")
        with one_line(spec):
            model = model_class(config).from_pretrained(
                **place, trust_remote_code=False, dtype=dtype, device_map={"": "disk"}, offload_folder=room
            )
        decoder, caught = text_decoder(model), dict[Any, Tensor]()

        def keep(name: Any) -> Any:
            def hook(module: Any, given: Any, output: Any) -> None:
                caught[name] = (output[0] if isinstance(output, tuple) else output).detach()

            return hook

        decoder.get_input_embeddings().register_forward_hook(keep(0))
        for depth in {*depths} - {0}:
            decoder.layers[depth - 1].register_forward_hook(keep(depth))
        final_norm(decoder).register_forward_hook(keep("final"))
        found = []
        for ids in texts:
            with torch.inference_mode():
                model(torch.tensor([list(ids)]), use_cache=False)
            found.append(([caught[depth][0].clone() for depth in depths], caught["final"][0].clone()))
        return found
