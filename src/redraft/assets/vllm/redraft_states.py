"""A connector for vLLM that writes the hidden states of every request into a file, on any device.

vLLM's speculative method ``extract_hidden_states`` keeps the chosen layers' states of every position in blocks of a
cache of its own. When a request has ended, its blocks are copied into ``FOLDER/<request>.safetensors``:
``hidden_states`` [tokens, layers, width] and ``token_ids`` [tokens], of the prompt, and with the request's
``include_output_tokens`` of the answer too but for its last token, which was never an input. A file is there whole or
not at all. The name stands in the answer as ``kv_transfer_params.hidden_states_path``.

For a server's own environment: this file needs vLLM and nothing of redraft. vLLM's example connector does the same on
CUDA devices, and what either writes is read alike. ``redraft adapt --help`` and docs/servers.md say how it is started.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import save_file
from vllm.config import get_layers_from_vllm_config
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata, SupportsHMA
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

FOLDER = "shared_storage_path"


@dataclass
class Ended:
    """A request that has ended: where its states go, whose they are, and the blocks that hold them."""

    request: str
    path: str
    token_ids: list[int]
    blocks: list[int]


@dataclass
class Words(KVConnectorMetadata):
    """What the scheduler tells the worker in one step."""

    ended: list[Ended] = field(default_factory=list)


class RedraftStates(KVConnectorBase_V1, SupportsHMA):
    """Writes, and loads nothing. One instance serves the scheduler, another the worker."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any = None) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        self.folder = vllm_config.kv_transfer_config.get_from_extra_config(FOLDER, "")
        if not self.folder:
            raise ValueError(f"name the folder for the states: kv_connector_extra_config {{{FOLDER!r}: ...}}")
        os.makedirs(self.folder, exist_ok=True)
        groups = getattr(kv_cache_config, "kv_cache_groups", None) or []
        kinds = [type(group.kv_cache_spec).__name__ for group in groups]
        self.group = kinds.index("HiddenStateCacheSpec") if "HiddenStateCacheSpec" in kinds else 0
        self.ended: list[Ended] = []
        self.cache: torch.Tensor | None = None

    # -- the scheduler -----------------------------------------------------------------------------------------
    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        pass

    def build_connector_meta(self, scheduler_output: Any) -> Words:
        told, self.ended = Words(self.ended), []
        return told

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """The blocks stay as they are until the worker has copied them."""
        asked = request.kv_transfer_params or {}
        ids = list(request.prompt_token_ids or ())
        if asked.get("include_output_tokens"):
            ids = list(request.all_token_ids)[:-1]
        if not ids or not block_ids:
            return False, None
        path = os.path.join(self.folder, f"{request.request_id}.safetensors")
        self.ended.append(Ended(request.request_id, path, ids, list(block_ids)))
        return True, {"hidden_states_path": path}

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, block_ids[self.group]) if self.group < len(block_ids) else (False, None)

    # -- the worker --------------------------------------------------------------------------------------------
    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        from vllm.model_executor.models.extract_hidden_states import CacheOnlyAttentionLayer

        layers = get_layers_from_vllm_config(self._vllm_config, CacheOnlyAttentionLayer, list(kv_caches))
        if len(layers) != 1:
            raise ValueError("states are there with the speculative method extract_hidden_states alone")
        self.cache = kv_caches[next(iter(layers))]

    def start_load_kv(self, *_: Any, **__: Any) -> None:
        pass

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(self, *_: Any, **__: Any) -> None:
        pass

    def wait_for_save(self) -> None:
        pass

    def get_finished_count(self) -> int:
        """One worker writes, however many share the model."""
        return 1

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        written = set()
        if self.has_connector_metadata():
            for one in self._get_connector_metadata().ended:
                if get_tensor_model_parallel_rank() == 0:
                    self.write(one)
                    written.add(one.request)
        return written or None, None

    def write(self, one: Ended) -> None:
        """Copy a request's states out of its blocks [blocks, layers, block size, width]."""
        assert self.cache is not None
        blocks = torch.tensor(one.blocks, device=self.cache.device)
        states = self.cache[blocks].transpose(1, 2).flatten(0, 1)[: len(one.token_ids)].contiguous().cpu()
        ids = torch.tensor(one.token_ids[: len(states)])
        new = f"{one.path}.{os.getpid()}.new"
        save_file({"hidden_states": states, "token_ids": ids}, new)
        os.replace(new, one.path)

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        """The layers of a token lie beside each other, under the name that every version knows."""
        return "NHD"
