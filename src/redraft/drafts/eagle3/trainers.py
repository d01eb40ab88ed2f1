"""Who wrote an Eagle3 checkpoint, and what its keys mean on that trainer's word.

All trainers write nearly the same tensors, and several read one key of the config in ways of their own. What is known
here was read in their code: SafeAILab's EAGLE, SpecForge 0.2 and main, speculators 0.5 to 0.9, nvidia-modelopt 0.47,
nemo-automodel 0.7, AngelSlim 0.5.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from redraft.drafts.formats.meaning import Reading
from redraft.drafts.formats.reading import Checkpoint
from redraft.errors import UserError
from redraft.settings.base import known_name
from redraft.values import Values


@dataclass(frozen=True)
class Trainer:
    """One trainer's word.

    ``name`` is what ``--trainer`` takes and ``title`` what tables call it. ``norm_output`` says what that key means:
    "carried", the next step takes the state behind the norm, or "head", logits are of the state behind the norm, which
    is so where the key is absent. ``residual`` is taken where ``norm_before_residual`` is absent. ``target_layer`` says
    that the config is the target's with a few keys changed: layer count, kind of layer, windows and experts in it are
    the target's own and mean nothing for the draft. ``reads_part`` is whether its own layer turns a part of a head
    where the config says so. ``one_layer``: its drafts are one layer without biases, whatever the config says. ``base``
    is the rotary base that it trains with where it does not read the config's. ``differs`` says in words what its own
    forward does otherwise than engines.
    """

    name: str
    title: str
    norm_output: str = "carried"
    residual: bool = False
    target_layer: bool = False
    reads_part: bool = True
    one_layer: bool = False
    differs: str = ""
    base: float | None = None


TRAINERS: dict[str, Trainer] = {
    trainer.name: trainer
    for trainer in (
        Trainer("speculators", "speculators", residual=True, reads_part=False),
        Trainer("specforge", "SpecForge up to 0.3", norm_output="head", reads_part=False, one_layer=True),
        Trainer("specforge-main", "SpecForge since September 2026", reads_part=False, one_layer=True),
        Trainer(
            "modelopt",
            "nvidia-modelopt",
            reads_part=False,
            differs="nvidia-modelopt's own layer norms the state twice, by input_layernorm and hidden_norm; engines "
            "norm it once, by hidden_norm, which is taken",
        ),
        Trainer("automodel", "NeMo Automodel", target_layer=True),
        Trainer("angelslim", "AngelSlim", reads_part=False, one_layer=True, base=10000.0),
        Trainer("safeailab", "SafeAILab's EAGLE", reads_part=False, one_layer=True, base=10000.0),
        Trainer("plain", "the plain format"),
    )
}

# By what the files of each are told.
AUTOMODEL = "LlamaEagle3DraftModel"
ANGELSLIM = "Eagle3LlamaForCausalLM"
MODELOPT_KEYS = ("next_layer_regular", "use_input_layernorm_in_first_layer", "use_mtp_layernorm")
# Keys that vLLM reads, and that no trainer writes whose ``norm_output`` means anything else.
ENGINE_KEYS = ("norm_before_residual", "norm_before_fc", "use_aux_norm")

# SafeAILab's own trainer leaves the target's name in the config; its drafts are told by their tensors.
TARGETS_NAME = "LlamaForCausalLM"
TOLD_BY = ("fc.weight", "midlayer.hidden_norm.weight")
FEW = (1, 2, 3, 4)  # layers of a draft; with more a checkpoint of that name is a language model
ANGELSLIM_IDS = "aux_hidden_states_layer_ids"

ARCHITECTURES = (
    "LlamaForCausalLMEagle3",
    ANGELSLIM,
    "Eagle3Speculator",
    "Eagle3DraftModel",
    AUTOMODEL,
    "Eagle3Qwen3ForCausalLM",
)


def is_speculators(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of the speculators format."""
    return "speculators_model_type" in config


def trainer_of(checkpoint: Checkpoint, asked: str | None = None) -> Trainer:
    """Who wrote the checkpoint; ``asked`` overrules what the files tell. Raises ``UserError``.

    That is raised where a key stands in the config that two trainers read in different ways, and nothing tells which
    of them wrote it.
    """
    config, names = checkpoint.config, checkpoint.architectures
    if asked is not None:
        known_name("trainer", asked, TRAINERS)
        if (asked == "speculators") != is_speculators(config):
            raise UserError(
                f"{checkpoint.path} is {'' if is_speculators(config) else 'not '}of the speculators format "
                f"(speculators_model_type), which trainer {asked} does not write; leave out --trainer"
            )
        return TRAINERS[asked]
    if is_speculators(config):
        return TRAINERS["speculators"]
    # The key alone tells it where the draft was given an engine's name, unless layers are described, which are then its
    # own: Automodel's would be dropped.
    keyed = isinstance(config.get("parallel_drafting"), bool) and not config.get("layer_types")
    if AUTOMODEL in names or keyed:
        return TRAINERS["automodel"]
    eagle = config.get("eagle_config")
    if isinstance(eagle, Mapping) and any(key in eagle for key in MODELOPT_KEYS):
        return TRAINERS["modelopt"]
    engines = any(config.get(key) is not None for key in ENGINE_KEYS)
    if config.get("norm_output") is not None and not engines:
        raise UserError(
            f"{checkpoint.path} has norm_output {config['norm_output']!r}, which SpecForge up to 0.3 takes for a norm "
            "before the head, and its code since September 2026, vLLM and SGLang for the state that the next step "
            "takes, and nothing tells who wrote it; name the one that trained it with --trainer specforge, "
            "specforge-main or plain"
        )
    if ANGELSLIM in names:
        return TRAINERS["angelslim"]
    return TRAINERS["plain" if is_own(names) else "safeailab"]


def note_angles(trainer: Trainer, values: Values, rope: Mapping[str, Any], reading: Reading) -> None:
    """Note where a trainer turns by other angles than ``rope``, those of its config, which engines take."""
    base, theta, share = trainer.base, rope.get("rope_theta", 10000.0), rope.get("partial_rotary_factor")
    if base and theta != base:
        reading.notes.append(
            f"{trainer.title} trains with rope base {base:g} whatever the config says; {theta:g} was taken, as engines "
            "do: where acceptance is low, set rope_theta to what the draft was trained with"
        )
    if trainer.name == "modelopt" and _put_in_at_export(values):
        word = "config.json: rope_scaling, which nvidia-modelopt puts in at export"
        reading.entries.append(replace(reading.entries.pop(), word=word))
        reading.notes.append(
            f"nvidia-modelopt's exporter put in the {rope.get('rope_type')} angles (eagle_export_rope_scaling), the "
            "draft was trained with plain ones; they are taken, as engines do: where acceptance is low, delete "
            "rope_scaling from the config"
        )
    if share not in (None, 1.0) and not trainer.reads_part:
        reading.notes.append(
            f"partial_rotary_factor {share}: {trainer.title}'s own layer turns the whole head, engines this share of "
            "it, which is taken"
        )


def _put_in_at_export(values: Values) -> bool:
    """Whether nvidia-modelopt's exporter put in the rotary settings: those of a training name their base too."""
    found = values.get("rope_scaling")
    kind = isinstance(found, Mapping) and (found.get("rope_type") or found.get("type"))
    return kind not in (None, False, "default") and "rope_theta" not in found


def title(trainer: Trainer, config: Mapping[str, Any]) -> str:
    """What a table calls the trainer, with the version where the file tells it."""
    version = config.get("speculators_version") if trainer.name == "speculators" else None
    return f"{trainer.title} {version}" if isinstance(version, str) and version else trainer.title


def refuse_switches(eagle: Mapping[str, Any]) -> list[str]:
    """The switches of ``eagle_config`` under which neither our layer nor that of engines computes the draft."""
    return [f"{key} {eagle[key]!r}" for key, usual in SWITCHES.items() if eagle.get(key) not in (None, usual)]


# What our layer, and that of engines, does whatever ``eagle_config`` says.
SWITCHES: dict[str, Any] = {
    "use_aux_hidden_state": True,
    "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True,
    "use_mtp_layernorm": False,
    "parallel_draft_step": 1,
}


def is_own(names: Collection[str]) -> bool:
    """Whether an architecture is one of those whose drafts are read here."""
    return bool(set(names) & set(ARCHITECTURES))
