"""EAGLE-3 drafts written by SpecForge itself, with the logits of its own training-time test.

    PYTHONPATH=<unpacked package> TORCHDYNAMO_DISABLE=1 python make_specforge.py OUT

A draft is built from a config file as the trainer builds it, put into the form of a training checkpoint, and exported
by the package's two exporters. What the exported folder computes is asked of the package's model, loaded from that
folder. The loss kernels want a GPU; they are left out, and the draft's own forward is not touched.
"""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import json
import sys
import tempfile
import types
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import common
import torch
from torch import Tensor

VERSION = importlib.metadata.version("specforge")
KEPT = 40

CONFIG: dict[str, Any] = {
    **{name: value for name, value in common.SHAPE.items() if name != "tie_word_embeddings"},
    "architectures": ["LlamaForCausalLMEagle3"],
    "model_type": "llama",
    "num_hidden_layers": 1,
    "hidden_act": "silu",
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "draft_vocab_size": KEPT,
}

# What redraft says of a draft that it does not take, and the drafts of which it asks who trained them.
REFUSED = {"state": "training_state.pt", "attention-bias": "bias", "layers-2": "num_hidden_layers"}
ASKED = ("norm-output-true", "norm-output-false", "fc-norm")

# The package reads all of these keys of a yarn config without defaults.
YARN = common.ROPES["yarn"] | {"mscale": 1.0, "mscale_all_dim": 0.0}


def without_triton() -> None:
    """Let the loss module be imported where there is no Triton; none of its kernels is run here."""

    class Anything(types.ModuleType):
        __spec__ = importlib.machinery.ModuleSpec("triton", None)

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return lambda function=None, **_: function

    if importlib.util.find_spec("triton") is None:
        triton, language = Anything("triton"), Anything("triton.language")
        triton.language = language
        sys.modules |= {"triton": triton, "triton.language": language}


def mapping(folder: Path) -> Path:
    """The vocabulary map as the package makes it from counted tokens, in its own file."""
    from specforge.data.preprocessing import generate_vocab_mapping_file

    counts = {i: (i * 37) % 101 + 1 for i in range(common.VOCABULARY)}
    tokens = torch.tensor([i for i, count in counts.items() for _ in range(count)])
    rows = {"input_ids": list(tokens.split(1)), "loss_mask": list(torch.ones_like(tokens).split(1))}
    return Path(generate_vocab_mapping_file(rows, common.VOCABULARY, KEPT, str(folder), "map"))


def from_target(target: Path, size: int) -> dict[str, Any]:
    """The config that the trainer makes where none is given."""
    from specforge.algorithms.eagle3.providers import algorithm_providers
    from specforge.training.model_loading import resolve_draft_config

    provider = algorithm_providers().model.draft_config
    provider = replace(provider, target_defaults=replace(provider.target_defaults, draft_vocab_size=size))
    names = ("draft_model_config", "draft_checkpoint_path", "cache_dir", "draft_num_hidden_layers", "draft_block_size")
    model = SimpleNamespace(target_model_path=str(target), trust_remote_code=False, **dict.fromkeys(names))
    found = resolve_draft_config(
        SimpleNamespace(model=model, training=SimpleNamespace(strategy="eagle3")), provider=provider
    )
    return found.to_dict()


def trained(config: Path, target: Path, map_file: Path | None, own: bool) -> Any:
    """A draft as the trainer starts it, with weights that are nobody's."""
    from specforge.modeling.auto import AutoDraftModel, AutoDraftModelConfig

    model = AutoDraftModel.from_config(AutoDraftModelConfig.from_file(str(config)))
    if not own:
        model.load_embedding(str(target))
        model.freeze_embedding()
    if map_file is not None:
        model.load_vocab_mapping(str(map_file))
    common.randomise(model, 13, keep=() if own else ("embed_tokens",))
    return model.to(torch.bfloat16)  # the type that training runs in by default


def export(model: Any, config: Path, target: Path, folder: Path, how: str) -> None:
    """Save the draft as the trainer saves it, and export that ("hf", "sglang") or leave it ("state")."""
    from specforge.export.to_hf import export_to_hf
    from specforge.export.to_sglang import export_to_sglang

    own = model.embed_tokens.weight.requires_grad
    state = {name: value for name, value in model.state_dict().items() if own or "embed" not in name}
    with tempfile.TemporaryDirectory() as place:
        saved = Path(place) / "run-step1"
        saved.mkdir()
        torch.save({"draft_state_dict": state, "strategy": "eagle3", "global_step": 1}, saved / "training_state.pt")
        if how == "state":
            saved.rename(folder)
            (folder / "config.json").write_text(config.read_text())
        elif how == "hf":
            export_to_hf(str(saved), str(config), str(folder), embedding_source=None if own else str(target))
        else:
            export_to_sglang(str(saved), str(config), str(folder))


def reloaded(folder: Path, target: Path, own: bool) -> Any:
    """The exported draft in a new model, as the trainer takes one up again: its embedding from the target or the file.

    ``AutoDraftModel.from_pretrained`` alone is no reader: it leaves the tables of angles as memory that nobody set.
    """
    from specforge.modeling.auto import AutoDraftModel, AutoDraftModelConfig
    from specforge.training.model_loading import warm_start_draft_model

    config = AutoDraftModelConfig.from_file(str(folder / "config.json"))
    model = AutoDraftModel.from_config(config)
    if not own:
        model.load_embedding(str(target))
    warm_start_draft_model(model, str(folder), draft_config=config, strategy="eagle3", allow_missing_embedding=True)
    return model.float()


def forward(model: Any, ids: Tensor, taps: Tensor) -> Tensor:
    """Logits [3, T, D] of the training-time test, teacher-forced."""
    from specforge.algorithms.eagle3.model import OnlineEagle3Model

    test = OnlineEagle3Model(model, length=common.STEPS, attention_backend="sdpa")
    test._acc_and_loss = lambda **_: (torch.zeros(()),) * 7
    length = len(taps) + common.STEPS
    following, features = common.padded(ids, taps, length)
    with torch.no_grad(), common.Heard(model.lm_head) as heard:
        test(
            input_ids=following,
            attention_mask=torch.ones(1, length, dtype=torch.bool),
            target=torch.zeros(1, length, common.VOCABULARY),
            loss_mask=torch.ones(1, length, 1),
            hidden_states=features,
        )
    return heard.steps()


def as_served(model: Any, ids: Tensor, taps: Tensor) -> Tensor | None:
    """The same with the angles that engines take from the config, where the package takes others."""
    from specforge.modeling.draft import llama3_eagle

    attention, rope = model.midlayer.self_attn, model.config.rope_parameters
    share, original = rope.get("partial_rotary_factor", 1.0), llama3_eagle.apply_rotary_pos_emb
    if share == 1.0 and rope["rope_type"] != "dynamic":
        return None

    def rotate(query: Tensor, key: Tensor, cosines: Tensor, *rest: Any, **more: Any) -> tuple[Tensor, ...]:
        turned = original(query[..., :width], key[..., :width], cosines, *rest, **more)
        return tuple(torch.cat([new, old[..., width:]], -1) for new, old in zip(turned, (query, key), strict=True))

    width, own = int(attention.head_dim * share), attention.rotary_emb
    attention.rotary_emb = llama3_eagle.LlamaRotaryEmbedding(width, own.max_position_embeddings, rope["rope_theta"])
    llama3_eagle.apply_rotary_pos_emb = rotate
    try:
        return forward(model, ids, taps)
    finally:
        attention.rotary_emb, llama3_eagle.apply_rotary_pos_emb = own, original


def write(out: Path, case: str, target: Path, config: dict[str, Any], how: str, note: str, map_file: Path) -> None:
    """One case: a draft by this config, exported in this way."""

    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "config.json"
        path.write_text(json.dumps(config, indent=2))
        reduced = config.get("draft_vocab_size") not in (None, common.VOCABULARY)
        own = case in ("embedding", "target-width")
        model = trained(path, target, map_file if reduced else None, own)
        folder = common.new_case(out, "specforge", VERSION, case)
        export(model, path, target, folder / "checkpoint", how)
    model = model.float() if how == "state" else reloaded(folder / "checkpoint", target, own)
    ids, taps = common.inputs(model.fc.in_features)
    aux = (config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    layers = [1, common.LAYERS // 2 - 1, common.LAYERS - 4] if aux is None else aux
    kept = {key: value for key, value in config.items() if key not in CONFIG or CONFIG[key] != value}
    about = {
        "trainer": "specforge",
        "version": VERSION,
        "options": {"export": how, "config": kept},
        # Ids count outputs of layers from zero.
        "taps": [k + 1 for k in layers],
        "target": target.name,
        "notes": note,
    }
    if case in REFUSED:
        about["refused"] = REFUSED[case]
    if case in ASKED:
        about["ask"] = "specforge"
    common.tidy(folder / "checkpoint", target)
    vocabulary = torch.arange(model.lm_head.out_features) + model.d2t
    logits, served = forward(model.eval(), ids, taps), as_served(model, ids, taps)
    both = (logits, None) if served is None else (served, logits)
    common.finish_case(folder, about, ids, taps, both[0], vocabulary, model.embed_tokens.weight, both[1])
    print(case, flush=True)


def cases(out: Path) -> dict[str, tuple[str, dict[str, Any], str, str]]:
    """By case: the target's name, what the config has otherwise, the exporter, and a note."""
    wide, ids = {"target_hidden_size": 48}, {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 2, 6]}}
    made = {
        "hf": ("target", {}, "hf", ""),
        "sglang": ("target", {}, "sglang", ""),
        "hf-full": ("target", {"draft_vocab_size": common.VOCABULARY}, "hf", ""),
        "sglang-full": ("target", {"draft_vocab_size": None}, "sglang", ""),
        "generated": ("target", from_target(out / "target", KEPT), "hf", ""),
        "generated-llama3": ("target-llama3", from_target(out / "target-llama3", KEPT), "sglang", ""),
        "norm-output-true": ("target", {"norm_output": True}, "sglang", "in this release: a norm before the head"),
        "norm-output-false": ("target", {"norm_output": False}, "sglang", "in this release: no norm before the head"),
        "fc-norm": ("target", {"fc_norm": True, "norm_output": True}, "hf", "its config for EAGLE-3.1"),
        "target-width": ("target-wide", wide, "hf", "the draft's own embedding, of its own width"),
        "head-dim": ("target", {"head_dim": 16}, "sglang", ""),
        "attention-bias": ("target", {"attention_bias": True}, "sglang", "the package makes no biases"),
        "layers-2": ("target", {"num_hidden_layers": 2}, "sglang", "the package makes one layer whatever it says"),
        "embedding": ("target", {}, "hf", "an embedding that was trained"),
        "taps": ("target", ids, "hf", ""),
        "state": ("target", {}, "state", "a training checkpoint that was not exported"),
    }
    ropes = common.ROPES | {"yarn": YARN}
    told = {
        "dynamic": "logits_trainer: the package stretches the base as for 20 positions more than the longest text has",
        "partial": "logits_trainer: the package turns the whole head",
    }
    for name, rope in ropes.items():
        made[f"rope-{name}"] = ("target", {"rope_parameters": rope}, "sglang", told.get(name, ""))
    scaling = {key: value for key, value in ropes["llama3"].items() if key != "rope_theta"}
    made["rope-scaling"] = ("target", {"rope_theta": 100.0, "rope_scaling": scaling}, "hf", "")
    return made


def others(out: Path) -> None:
    """Drafts of the package's other kinds, untrained."""
    from specforge.modeling.auto import AutoDraftModel, AutoDraftModelConfig

    dflash = {"dflash_config": {"target_layer_ids": [1, 4], "mask_token_id": 0}, "block_size": 4}
    for name in ("PEagleDraftModel", "DFlashDraftModel"):
        config = CONFIG | {"architectures": [name], "num_hidden_layers": 2, "num_target_layers": common.LAYERS}
        config |= {} if name == "PEagleDraftModel" else dflash | {"model_type": "qwen3", "attention_bias": False}
        folder = common.new_case(out, "specforge", VERSION, name)
        with tempfile.TemporaryDirectory() as place:
            path = Path(place) / "config.json"
            path.write_text(json.dumps(config))
            AutoDraftModel.from_config(AutoDraftModelConfig.from_file(str(path))).save_pretrained(folder / "checkpoint")
        common.tidy(folder / "checkpoint", out / "target")
        about = {"trainer": "specforge", "version": VERSION, "options": {"architecture": name}}
        common.refused_case(folder, about | {"refused": name})
        print(name, flush=True)


def main() -> None:
    out, only = Path(sys.argv[1]).absolute(), sys.argv[2:]
    out.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    without_triton()
    common.make_target(out)
    common.make_target(out, "target-wide", hidden_size=48, head_dim=12)
    common.make_target(out, "target-llama3", rope_parameters=common.ROPES["llama3"])
    with tempfile.TemporaryDirectory() as place:
        map_file = mapping(Path(place))
        for case, (target, changes, how, note) in cases(out).items():
            if only and case not in only:
                continue
            config = changes if case.startswith("generated") else CONFIG | changes
            if "rope_parameters" in changes and not case.startswith("generated"):
                config = {key: value for key, value in config.items() if key not in ("rope_theta", "rope_scaling")}
            write(out, case, out / target, config, how, note, map_file)
    if not only or "others" in only:
        others(out)


if __name__ == "__main__":
    main()
