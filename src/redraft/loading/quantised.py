"""Quantised checkpoints: which can be computed here, and whether what is computed is what engines serve.

Weights are unpacked when the checkpoint is opened, by the library of its format, so that everything else meets an
ordinary model. Where only weights are quantised that is the served model, up to the rounding of the number format.
Where activations or the cache are rounded too, it is not: the text must come from the server then. See docs/targets.md.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

from redraft.errors import UserError

PACKAGES = {
    "compressed-tensors": ("compressed_tensors",),
    "bitsandbytes": ("bitsandbytes", "accelerate"),
    "fp8": ("accelerate",),
    "mxfp4": ("accelerate",),
}

PACKED = re.compile(r"(_scale|_scale_inv|_zero_point|_packed|_shape|\.(SCB|absmax|quant_map))$")


@dataclass(frozen=True)
class Plan:
    """How to open a checkpoint: arguments for ``from_pretrained``, whether to unpack behind it, what is rounded."""

    arguments: dict[str, Any] = field(default_factory=dict)
    method: str | None = None
    unpack: bool = False
    rounds: str | None = None


def plan(config: Any, spec: str) -> Plan:
    """How to open the checkpoint with this config. Raises ``UserError`` where it cannot be computed here."""
    asked = [getattr(place, "quantization_config", None) for place in (config, config.get_text_config())]
    if not any(asked):
        return Plan()
    found: Any = asked[0] or asked[1]
    settings: dict[str, Any] = found if isinstance(found, dict) else found.to_dict()
    method = str(settings.get("quant_method") or "")
    if settings.get("load_in_4bit") or settings.get("load_in_8bit") or "bitsandbytes" in method:
        method = "bitsandbytes"
    if method not in PACKAGES:
        raise UserError(
            f"{spec} is quantised with {method or 'a method that its config does not name'}, which cannot be computed "
            "here; give the unquantised checkpoint (its answers may still come from a server of the quantised one, "
            "--server)"
        )
    absent = [name for name in PACKAGES[method] if importlib.util.find_spec(name) is None]
    if absent:
        names = " ".join(name.replace("_", "-") for name in absent)
        raise UserError(f"{spec} is quantised with {method}: pip install {names}, or give the unquantised checkpoint")
    if unknown := _beside_weights(settings):
        raise UserError(
            f"{spec} is quantised with {method} and {unknown}, which is not unpacked here; give the "
            "unquantised checkpoint"
        )
    match method:
        case "bitsandbytes":
            eight = bool(settings.get("load_in_8bit"))
            return Plan({}, method, unpack=True, rounds="input activations" if eight else None)
        case "fp8":
            how: Any = transformers.FineGrainedFP8Config(dequantize=True)
            return Plan({"quantization_config": how}, "fp8 blocks", rounds="input activations")
        case "mxfp4":
            return Plan({"quantization_config": transformers.Mxfp4Config(dequantize=True)}, method)
    how = transformers.CompressedTensorsConfig
    # An unknown argument would be taken without a word, so the older name is used where the newer one is not there.
    newer = "dequantize" in inspect.signature(how).parameters
    how = how(**{"dequantize": True} if newer else {"run_compressed": False})
    groups = (settings.get("config_groups") or {}).values()
    rounded = [name for name in ("input_activations", "output_activations") if any(g.get(name) for g in groups)]
    rounded += ["the key and value cache"] if settings.get("kv_cache_scheme") else []
    return Plan({"quantization_config": how}, method, rounds=" and ".join(rounded).replace("_", " ") or None)


def _beside_weights(settings: dict[str, Any]) -> str | None:
    """What a config asks for besides packed weights, in words: transforms in the forward pass, sparse storage, ..."""
    sparse = (settings.get("sparsity_config") or {}).get("format") or "dense"
    status = settings.get("quantization_status") or "compressed"
    if (settings.get("transform_config") or {}).get("config_groups"):
        return "transform_config"
    if sparse != "dense":
        return f"sparsity_config {sparse}"
    return None if status == "compressed" else f"quantization_status {status}"


def plain(model: Any, method: str, dtype: torch.dtype, spec: str) -> Any:
    """The model as an ordinary one: in ``dtype``, and with nothing in its config that a saved copy would be read by.

    Raises ``UserError`` where the library of the format has left something packed.
    """
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.element_size() > 1 and not PACKED.search(name):
            continue
        if isinstance(model.get_submodule(name.rpartition(".")[0]), torch.nn.Linear | torch.nn.Embedding):
            raise UserError(
                f"{spec} is quantised with {method}, and this release of transformers does not unpack {name}; "
                "upgrade transformers, or give the unquantised checkpoint"
            )
    for config in (model.config, model.config.get_text_config()):
        if hasattr(config, "quantization_config"):
            del config.quantization_config
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        if name in model.__dict__:
            delattr(model, name)
    return model.to(dtype)
