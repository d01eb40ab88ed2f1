"""EAGLE-3 drafts written by the speculators package itself, with the logits of its own model.

    PYTHONPATH=<unpacked package> python make_speculators.py OUT

Any release from 0.5 to 0.9. Where the package has its training command (0.8 on), a draft is made by that command's own
code from its own options; before that the command was a script outside the package, so the layer's config is put
together here as the script did and handed to the model's ``from_training_args``. The package's own forward gives the
logits; of a draft with short windows it is run a second time with the masks of decoding, since its own unroll lets a
later step see more than the window.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import inspect
import json
import shutil
import sys
import tempfile
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import common
import torch
from loguru import logger
from safetensors.torch import save_file
from torch import Tensor

VERSION = importlib.metadata.version("speculators")
HAS_COMMAND = importlib.util.find_spec("speculators.train.cli") is not None
NEWER = tuple(map(int, VERSION.split(".")[:2])) >= (0, 7)
# Flex attention in blocks of this many positions is what the package's masks are made for.
BLOCK = 128
KEPT = 40
# What redraft says of a draft that it does not compute.
REFUSED = {"mlp-bias": "mlp_bias", "gelu": "hidden_act", "gelu-flag": "hidden_act", "taps-order": "ascend"}


def command(target: Path, data: Path, flags: list[str]) -> Any:
    """A draft as the training command would start it."""
    from speculators.model import SpeculatorModel
    from speculators.models.eagle3.rotary_partial import install_partial_neox_rotary
    from speculators.train.cli import build_draft_model, parse_vocab_mappings
    from speculators.train.config import TrainConfig
    from speculators.train.config.resolution import resolve

    flags = ["--verifier-name-or-path", str(target), "--data-path", str(data), "--mask-token-id", "0", *flags]
    args = argparse.Namespace(**resolve(TrainConfig, flags).flatten())
    if not args.draft_mrope_full_head_hack:
        install_partial_neox_rotary()
    d2t, t2d, size = parse_vocab_mappings(args)
    return build_draft_model(args, SpeculatorModel.registry[args.speculator_type], t2d, d2t, size)


def older(target: Path, options: dict[str, Any]) -> Any:
    """A draft by ``from_training_args``, with a config of the layer as the script of these releases made it."""
    from speculators.models.eagle3.core import Eagle3DraftModel
    from speculators.train.vocab_mapping import build_vocab_mappings_from_distribution
    from transformers import AutoConfig, LlamaConfig, Qwen3Config

    verifier = AutoConfig.from_pretrained(target)
    options = dict(options)
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    names += ("hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "head_dim")
    shape = {name: getattr(verifier, name) for name in names}
    shape |= {"num_hidden_layers": options.pop("num_layers", 1), "tie_word_embeddings": False}
    shape |= {"rope_parameters": dict(verifier.rope_parameters)} | options.pop("layer", {})
    layer = {"llama": LlamaConfig, "qwen3": Qwen3Config}[options.pop("draft_arch", "llama")](**shape)
    d2t = t2d = None
    size = options.pop("draft_vocab_size", verifier.vocab_size)
    if size != verifier.vocab_size:
        d2t, t2d = build_vocab_mappings_from_distribution(frequencies(), size, verifier.vocab_size)
    wanted = {"norm_before_residual": True, "ttt_steps": 3, "verifier_name_or_path": str(target)}
    wanted["draft_vocab_size"] = size
    return Eagle3DraftModel.from_training_args(verifier_config=layer, t2d=t2d, d2t=d2t, **(wanted | options))


def frequencies() -> dict[int, int]:
    """How often each id was seen; the most frequent ones are spread over the vocabulary."""
    return {i: (i * 37) % 101 + 1 for i in range(common.VOCABULARY)}


def forward(model: Any, ids: Tensor, taps: Tensor) -> Tensor:
    """Logits [3, T, D] of the model's own forward, teacher-forced."""
    length = BLOCK if model.config.transformer_layer_config._attn_implementation != "eager" else len(taps) + 2
    following, features = common.padded(ids, taps, length)
    taken = inspect.signature(model.forward).parameters
    given: dict[str, Any] = {"ttt_steps": common.STEPS}
    if "document_ids" in taken:
        given["document_ids"] = torch.zeros(1, length, dtype=torch.long)
    if "use_off_policy_tokens" in taken:
        given["use_off_policy_tokens"] = True
    with torch.no_grad(), common.Heard(model.lm_head) as heard:
        model(features, following, **given)
    return heard.steps()


def with_masks(model: Any, ids: Tensor, taps: Tensor, window: int | None) -> Tensor:
    """The same, with dense masks put together here for the later steps of layers that have a window.

    With ``window`` they are those of a decoding engine: the query of step j at anchor t stands at position t + j and
    sees the positions above t + j - window. Without, those of the package's unroll: the first step's mask, and its own
    keys.
    """
    from speculators.models.eagle3 import core

    def extend(mask: Tensor, length: int) -> Tensor:
        step, anchors = mask.shape[-1] // length, torch.arange(length)
        diagonal = anchors[:, None] == anchors
        first, own = mask[0, 0, :, :length] == 0, [diagonal] * step
        if window is not None and not first[-1, 0]:
            first = (anchors[:, None] >= anchors) & (anchors > anchors[:, None] + step - window)
            own = [diagonal & (j > step - window) for j in range(1, step + 1)]
        seen = torch.cat([first, *own], 1)
        return torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))[None, None]

    original, core.extend_dense_mask_for_draft_tokens = core.extend_dense_mask_for_draft_tokens, extend
    try:
        return forward(eager(model), ids, taps)
    finally:
        core.extend_dense_mask_for_draft_tokens = original


def eager(model: Any) -> Any:
    """The same model with dense masks in the place of flex attention's."""
    from speculators.models.attention import create_float_mask

    layer = model.config.transformer_layer_config
    layer._attn_implementation = "eager"
    model._attn_impl, model._create_mask_fn = "eager", create_float_mask
    for module in model.modules():
        if hasattr(module, "config") and hasattr(module.config, "_attn_implementation"):
            module.config._attn_implementation = "eager"
    return model


def turning_a_part(model: Any, rope: dict[str, Any]) -> Any:
    """The same model with the angles that engines take from the config: those of a part of a head."""
    layer = deepcopy(model.config.transformer_layer_config)
    layer.rope_parameters = rope | {"rope_type": "linear", "factor": 1.0}
    model.rotary_emb = type(model.rotary_emb)(layer)
    return model


def save(model: Any, folder: Path, dtype: torch.dtype) -> None:
    """Through the trainer's own checkpoint writer, without its optimiser's file."""
    from speculators.train.checkpointer import SingleGPUCheckpointer

    with tempfile.TemporaryDirectory() as place:
        writer = SingleGPUCheckpointer(place)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        given = {"float_dtype": dtype} if "float_dtype" in inspect.signature(writer.save_checkpoint).parameters else {}
        writer.save_checkpoint(model, optimizer, 0, **given)
        shutil.copytree(Path(place) / "0", folder)
    for state in folder.glob("optimizer*"):
        state.unlink()


def vocabulary(model: Any) -> Tensor:
    rows = torch.arange(model.lm_head.out_features)
    return rows if model.d2t is None else rows + model.d2t


def write(out: Path, case: str, target: Path, model: Any, options: Any, dtype: torch.dtype, own: bool) -> None:
    """Give the model weights, save it, and write what its saved form computes in the package."""
    from speculators.model import SpeculatorModel

    common.randomise(model, 11, keep=() if own else ("embed_tokens",))
    model.to(dtype).float()
    folder = common.new_case(out, "speculators", VERSION, case)
    save(model, folder / "checkpoint", dtype)
    finish(folder, case, target, SpeculatorModel.from_pretrained(folder / "checkpoint").float(), options)
    common.tidy(folder / "checkpoint", target)


def finish(folder: Path, case: str, target: Path, model: Any, options: Any, notes: str = "") -> None:
    model.eval()
    width = model.fc.in_features
    ids, taps = common.inputs(width)
    logits, of_trainer = forward(model, ids, taps), None
    window = model.config.transformer_layer_config
    sliding = [i for i, kind in enumerate(getattr(window, "layer_types", None) or ()) if kind == "sliding_attention"]
    if NEWER and sliding and window.sliding_window < common.LENGTH + common.STEPS:
        same = with_masks(model, ids, taps, None)
        assert torch.allclose(same, logits, atol=1e-5), "dense masks and flex attention differ"
        of_trainer, logits = logits, with_masks(model, ids, taps, window.sliding_window)
        notes += " logits_trainer: in the package's unroll a later step sees its anchor's whole window and its own keys"
    if (rope := window.rope_parameters)["rope_type"] == "default" and "partial_rotary_factor" in rope:
        of_trainer, logits = logits, forward(turning_a_part(model, rope), ids, taps)
        notes += " logits_trainer: the package turns the whole head, since its layer's plain angles know no part"
    about = {
        "trainer": "speculators",
        "version": VERSION,
        "options": options,
        "taps": list(model.config.eagle_aux_hidden_state_layer_ids or ()),
        "target": target.name,
        "notes": notes.strip(),
    }
    if case in REFUSED:
        about["refused"] = REFUSED[case]
    common.finish_case(folder, about, ids, taps, logits, vocabulary(model), model.embed_tokens.weight, of_trainer)


def command_cases(out: Path, data: Path) -> dict[str, tuple[str, list[str]]]:
    """The target's name and the training command's flags, by case."""
    layer = common.SHAPE | {"model_type": "llama", "num_hidden_layers": 1, "rope_parameters": common.PLAIN}
    configs = {
        "bias": layer | {"attention_bias": True},
        "head-dim": layer | {"head_dim": 16},
        "mlp-bias": layer | {"mlp_bias": True},
        "gelu": layer | {"hidden_act": "gelu"},
        "partial": layer | {"rope_parameters": common.ROPES["partial"]},
        "partial-linear": layer | {"rope_parameters": common.ROPES["linear"] | {"partial_rotary_factor": 0.5}},
        "qwen3-bias": layer | {"model_type": "qwen3", "attention_bias": True, "num_hidden_layers": 2},
    }
    configs |= {f"rope-{name}": layer | {"rope_parameters": rope} for name, rope in common.ROPES.items()}
    for name, config in configs.items():
        (data / f"{name}.json").write_text(json.dumps(config))
    reduced, plain = ["--draft-vocab-size", str(KEPT)], ["--no-norm-before-residual", "--no-norm-before-fc"]
    plain += ["--no-norm-output", "--full-attention-indices", "0"]
    window = ["--sliding-window", "6"]
    cases = {
        "default": ("target", []),
        "default-reduced": ("target", reduced),
        "plain": ("target", [*plain, *reduced]),
        "plain-full": ("target", plain),
        "residual": ("target", [*plain[1:], *reduced]),
        "norm-before-fc": ("target", [*reduced, "--no-norm-before-residual", "--no-norm-output"]),
        "norm-output": ("target", [*reduced, "--no-norm-before-residual", "--no-norm-before-fc"]),
        "fc-norm": ("target", [*reduced, "--no-norm-before-fc", "--fc-norm"]),
        "window": ("target", [*reduced, *window]),
        "layers-2": ("target", [*reduced, "--num-layers", "2"]),
        "layers-3-windows": ("target", [*reduced, *window, "--num-layers", "3", "--full-attention-indices", "1"]),
        "qwen3": ("target", [*reduced, "--draft-arch", "qwen3"]),
        "qwen3-layers-2-window": ("target", [*reduced, *window, "--draft-arch", "qwen3", "--num-layers", "2"]),
        "qwen3-target": ("target-qwen3", reduced),
        "qwen3-target-qwen3": ("target-qwen3", [*reduced, "--draft-arch", "qwen3"]),
        "taps": ("target", [*reduced, "--target-layer-ids", "1", "4", "6"]),
        "taps-4": ("target", [*reduced, "--target-layer-ids", "0", "3", "5", "8"]),
        "taps-order": ("target", [*reduced, "--target-layer-ids", "6", "1", "4"]),
        "embedding": ("target", [*reduced, "--embed-requires-grad"]),
        "defaults-unwritten": ("target-defaults", reduced),
        "tied-target": ("target-tied", reduced),
        "float32": ("target", reduced),
        "gelu-flag": ("target", [*reduced, "--draft-hidden-act", "gelu"]),
        "partial-patched": (
            "target",
            ["--draft-config", str(data / "partial.json"), "--no-draft-mrope-full-head-hack"],
        ),
        "partial-linear": (
            "target",
            [*reduced, "--draft-config", str(data / "partial-linear.json"), "--no-draft-mrope-full-head-hack"],
        ),
        "partial-target": ("target-partial", reduced),
    }
    for name in configs:
        if "partial" not in name:
            cases[name] = ("target", [*reduced, "--draft-config", str(data / f"{name}.json")])
    return cases | {f"target-{n}": (f"target-{n}", reduced) for n in common.ROPES if n not in ("partial", "theta")}


def older_cases() -> dict[str, tuple[str, dict[str, Any]]]:
    """The target's name and the options of ``from_training_args``, by case."""
    reduced = {"draft_vocab_size": KEPT}
    cases: dict[str, tuple[str, dict[str, Any]]] = {
        "default": ("target", {}),
        "reduced": ("target", reduced),
        "plain": ("target", reduced | {"norm_before_residual": False}),
        "norm-before-fc": ("target", reduced | {"norm_before_fc": True}),
        "layers-2": ("target", reduced | {"num_layers": 2}),
        "qwen3": ("target", reduced | {"draft_arch": "qwen3"}),
        "qwen3-layers-3": ("target", reduced | {"draft_arch": "qwen3", "num_layers": 3}),
        "taps": ("target", reduced | {"target_layer_ids": [1, 4, 6]}),
        "embedding": ("target", reduced | {"embed_requires_grad": True}),
        "bias": ("target", reduced | {"layer": {"attention_bias": True}}),
        "defaults-unwritten": ("target-defaults", reduced),
        "float32": ("target", reduced),
    }
    cases |= {f"target-{n}": (f"target-{n}", reduced) for n in ("llama3", "yarn")}
    if NEWER:
        window = {"sliding_window": 6, "use_sliding_window": True, "layer_types": ["sliding_attention"]}
        cases |= {
            "fc-norm": ("target", reduced | {"fc_norm": True}),
            "norm-output": ("target", reduced | {"norm_output": True}),
            "taps-4": ("target", reduced | {"target_layer_ids": [0, 3, 5, 8]}),
            "window": ("target", reduced | {"layer": window}),
        }
    return cases


def converted(out: Path, case: str, target: Path, rope: dict[str, Any]) -> None:
    """A draft of other hands, in the plain form and without an embedding, through the package's converter."""
    from speculators.convert.eagle.eagle3_converter import Eagle3Converter
    from speculators.model import SpeculatorModel
    from speculators.utils.loading import load_model_layers

    folder, sizes = common.new_case(out, "speculators", VERSION, case), (common.WIDTH, 48, 8)
    state = common.plain_draft(*sizes, KEPT, frequencies())
    config = common.SHAPE | {"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "num_hidden_layers": 1}
    theta = rope["rope_theta"]
    scaling = None if rope["rope_type"] == "default" else {key: rope[key] for key in rope if key != "rope_theta"}
    config |= {"draft_vocab_size": KEPT, "rope_theta": theta, "rope_scaling": scaling, "hidden_act": "silu"}
    with tempfile.TemporaryDirectory() as place:
        save_file(state, Path(place) / "model.safetensors")
        (Path(place) / "config.json").write_text(json.dumps(config))
        Eagle3Converter().convert(place, folder / "checkpoint", str(target), validate=False)
    model = SpeculatorModel.from_pretrained(folder / "checkpoint").float()
    # Opening a file without an embedding, the package keeps what it made up; an engine takes the target's.
    (embedding,) = load_model_layers(["embed_tokens.weight"], str(target)).values()
    model.embed_tokens.load_state_dict({"weight": embedding})
    finish(folder, case, target, model, {"converted with": {"rope_theta": theta, "rope_scaling": scaling}})
    common.tidy(folder / "checkpoint", target)


def others(out: Path, data: Path) -> None:
    """Drafts of the package's other kinds, as its training command starts them."""
    from speculators.model import SpeculatorModel

    for kind in sorted(set(SpeculatorModel.registry) - {"eagle3", "mtp"}):
        model = command(out / "target", data, ["--speculator-type", kind])
        folder = common.new_case(out, "speculators", VERSION, kind)
        model.save_pretrained(folder / "checkpoint")
        common.tidy(folder / "checkpoint", out / "target")
        about = {"trainer": "speculators", "version": VERSION, "options": ["--speculator-type", kind]}
        common.refused_case(folder, about | {"refused": kind})
        print(kind, flush=True)


def targets(out: Path) -> None:
    common.make_target(out)
    common.make_target(out, "target-qwen3", "qwen3", head_dim=16)
    common.make_target(out, "target-tied", tie_word_embeddings=True)
    # What the classes of a layer's config would have anyway is not written.
    common.make_target(out, "target-defaults", rms_norm_eps=1e-6, max_position_embeddings=2048)
    for name, rope in common.ROPES.items():
        common.make_target(out, f"target-{name}", rope_parameters=rope)


def main() -> None:
    out, only = Path(sys.argv[1]).absolute(), sys.argv[2:]
    out.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    logger.remove()
    targets(out)
    with tempfile.TemporaryDirectory() as place:
        data = Path(place)
        torch.save(frequencies(), data / "token_freq.pt")
        cases: dict[str, tuple[str, Any]] = command_cases(out, data) if HAS_COMMAND else older_cases()
        for case, (target, options) in cases.items():
            if only and case not in only:
                continue
            model = command(out / target, data, options) if HAS_COMMAND else older(out / target, options)
            shown = [flag.replace(place, "") for flag in options] if HAS_COMMAND else options
            dtype = torch.float32 if case == "float32" else torch.bfloat16  # what checkpoints are saved in
            write(out, case, out / target, model, shown, dtype, case == "embedding")
            print(case, flush=True)
        if HAS_COMMAND and (not only or "others" in only):
            others(out, data)
    for name, rope in {"plain": common.PLAIN, "llama3": common.ROPES["llama3"]}.items():
        if not only or f"converted-{name}" in only:
            converted(out, f"converted-{name}", out / "target", rope)


if __name__ == "__main__":
    main()
