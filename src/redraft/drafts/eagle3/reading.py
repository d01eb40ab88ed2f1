"""Reading Eagle3 checkpoints of other hands: the speculators format and the plain one, as each trainer writes them.

Strict: every missing, extra, misshaped or non-finite tensor is named, and an option that our draft does not compute
is refused by its name rather than dropped. Each value is entered in a :class:`Reading` with where it comes from.

Shape legend: H hidden size, K taps, F hidden size of the target, D draft vocabulary, V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from redraft.artifact import check_tensors
from redraft.drafts.eagle3.maps import beside, check_vocabulary_map, read_maps
from redraft.drafts.eagle3.module import Eagle3Config, Eagle3Draft
from redraft.drafts.eagle3.trainers import (
    ANGELSLIM_IDS,
    ARCHITECTURES,
    FEW,
    MODELOPT_KEYS,
    SWITCHES,
    TARGETS_NAME,
    TOLD_BY,
    Trainer,
    is_own,
    is_speculators,
    note_angles,
    refuse_switches,
    title,
    trainer_of,
)
from redraft.drafts.formats import others
from redraft.drafts.formats.embeddings import compare
from redraft.drafts.formats.layers import QUANTISED, LayerReader, by_our_names
from redraft.drafts.formats.meaning import Reading, TensorFacts
from redraft.drafts.formats.reading import (
    Checkpoint,
    build_untrained,
    facts_of,
    note_adapter,
    note_dropped,
    read_state,
    refuse_code,
)
from redraft.drafts.formats.rows import MAPS, fit_rows, padded
from redraft.errors import UserError
from redraft.target import Facts, default_taps
from redraft.values import Values

__all__ = ["ARCHITECTURES", "check_state", "check_taps", "check_vocabulary_map", "read", "read_maps", "recognises"]

EMBEDDING = "embed_tokens.weight"
IDS = "eagle_aux_hidden_state_layer_ids"

# What the speculators package keeps beside the draft while it trains.
LEFT_OVER = ("verifier_norm.weight", "verifier_lm_head.weight")

# Keys that are read here: of the part of a config.json that describes the layers, of the whole, and of eagle_config.
LAYER = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps"),
    *("max_position_embeddings", "attention_bias", "qkv_bias", "model_type", "hidden_act", "mlp_bias", "layer_types"),
    *("sliding_window", "use_sliding_window", "rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor"),
    *("vocab_size", "num_hidden_layers", "num_aux_hidden_states", "bias", "quantization_config"),
)
WHOLE = (
    *("draft_vocab_size", "target_hidden_size", "num_aux_hidden_states", IDS, ANGELSLIM_IDS, "eagle_config"),
    *("norm_before_residual", "norm_before_fc", "fc_norm", "use_aux_norm", "norm_output", "quantization_config"),
    *("transformer_layer_config", "speculators_config", "speculators_model_type", "speculators_version"),
)
EAGLE = (IDS, "layer_ids", "norm_before_fc", "parallel_draft_heads_num_layers", *SWITCHES, *MODELOPT_KEYS)


def recognises(checkpoint: Checkpoint) -> bool:
    """By the names of the architecture, or by the tensors where these are the target's or there are none."""
    if is_speculators(checkpoint.config) or is_own(checkpoint.architectures):
        return True
    config, named = checkpoint.config, checkpoint.architectures
    if not config or (named and TARGETS_NAME not in named):
        return False
    reduced = config.get("draft_vocab_size") is not None
    small = "hidden_size" in config and config.get("num_hidden_layers", 1) in FEW
    if not (reduced or small):
        return False
    held = set(TOLD_BY) & set(read_state(checkpoint.folder, []))
    # A language model has no draft vocabulary: with one, a tensor that is missing is to be told as a draft's.
    return held == set(TOLD_BY) or (reduced and bool(held))


def read(
    checkpoint: Checkpoint,
    target: Facts | None,
    notes: list[str],
    taps: tuple[int, ...] | None = None,
    trainer: str | None = None,
    values: bool = True,
) -> tuple[Eagle3Draft, dict[str, Any]]:
    """The draft and its metadata; ``taps`` overrules the feature ids and ``trainer`` who wrote the file.

    Without ``values`` the numbers are not looked at.

    Without a ``target`` the file must tell what else is the target's. Raises ``UserError``.
    """
    return Eagle3Reader(checkpoint, target, notes, taps, trainer).draft(values)


def check_taps(taps: tuple[int, ...]) -> None:
    """Engines collect features in layer order and once each, so ids must ascend strictly. Raises ``UserError``."""
    if not taps or any(after <= before for before, after in zip(taps, taps[1:], strict=False)):
        raise UserError(f"taps {list(taps)} do not ascend strictly; engines read each layer once and in layer order")


def check_state(state: Mapping[str, Tensor], draft: Eagle3Draft, where: Any) -> None:
    """Raise ``UserError`` for maps that tell no set of target ids, and for rotary settings that tell no angles."""
    check_vocabulary_map(state, draft.config, where)
    if not draft.rotary.usable:
        raise UserError(f"{where}: rotary settings that tell no angles: {draft.config.rope_parameters}")


class Eagle3Reader:
    """What one checkpoint means on the word of the trainer that wrote it."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        target: Facts | None,
        notes: list[str],
        taps: tuple[int, ...] | None,
        trainer: str | None,
    ) -> None:
        raw, path = checkpoint.config, checkpoint.path
        kind = raw.get("speculators_model_type")
        if is_speculators(raw) and kind != "eagle3":
            what, help = others.of_name([str(kind)]) or ("another kind of draft", others.AS_IT_IS)
            raise UserError(f"{path} is a {kind} speculator, {what}; only eagle3 can be imported: {help}")
        if (found := others.of_config(raw)) is not None:
            raise UserError(f"{path} describes {found[0]}, which is not read; {found[1]}")
        self.checkpoint, self.target, self.asked = checkpoint, target, taps
        self.raw = Values(raw, path)
        self.trainer: Trainer = trainer_of(checkpoint, trainer)
        self.reading = Reading(title(self.trainer, raw), notes=notes)
        refuse_code(checkpoint, self.reading)
        layer = self.raw.part("transformer_layer_config") if is_speculators(raw) else self.raw
        if layer is None:
            raise UserError(f"{path} has no transformer_layer_config; download it again")
        self.values = layer
        self.eagle = Values({}, path) if raw.get("eagle_config") is None else self.raw.part("eagle_config")
        self.state = self._state()
        self.tensors: dict[str, TensorFacts] = facts_of(self.state)
        self.layer = LayerReader(layer, self.tensors, self.reading)
        note_adapter(checkpoint.folder, self.reading)

    # -- the tensors ---------------------------------------------------------------------------------------------
    def _state(self) -> dict[str, Tensor]:
        folder = self.checkpoint.folder
        state = read_state(folder, self.reading.notes)
        for name in [name for name in LEFT_OVER if name in state and is_speculators(self.raw.values)]:
            del state[name]
            self.reading.take(name, None, "dropped", "the teacher's, which speculators trains with")
        if (found := others.of_tensors(state)) is not None:
            raise UserError(f"{folder} has {found[0]}, which is not read; {found[1]}")
        return beside(folder, state, self.reading.notes)

    def draft(self, values: bool = True) -> tuple[Eagle3Draft, dict[str, Any]]:
        """The draft with its tensors, and what its record says; without ``values`` no numbers are looked at.

        Raises ``UserError``.
        """
        checkpoint, reading = self.checkpoint, self.reading
        config = self.config()
        config = self._vocabulary(config)
        state = by_our_names(self.state, config.num_layers)
        for number in range(config.num_layers - 1):
            self._one_norm(state, f"later.{number}.")
        config = self._embedding(config, state, values)
        if self.target is not None:
            config.check_fit(self.target)
        check_taps(config.taps)
        draft = build_untrained(lambda: Eagle3Draft.untrained(config), checkpoint.path)
        check_tensors(state, draft.state_dict(), checkpoint.folder, values)
        check_state(state, draft, checkpoint.folder)
        draft.fill(state)
        self._dropped()
        kind = "speculators" if is_speculators(self.raw.values) else "plain"
        return draft, {"format": kind, "trainer": self.trainer.name, "verifier": self._taught_by(), "reading": reading}

    def _taught_by(self) -> Any:
        """The teacher that the file names, where its trainer wrote it: an export names whom it is to be served with."""
        named: Any = self.raw.values if self.raw.get("speculators_version") else None
        for key in ("speculators_config", "verifier", "name_or_path"):
            named = named.get(key) if isinstance(named, Mapping) else None
        return named

    def _dropped(self) -> None:
        """Enter what stands in the config, in whichever part, and is not used."""
        whole = self.raw is self.values
        note_dropped(self.raw, (*WHOLE, *LAYER) if whole else WHOLE, self.reading)
        if not whole:
            note_dropped(self.values, LAYER, self.reading)
        if self.eagle is not None:
            note_dropped(self.eagle, EAGLE, self.reading)

    def _one_norm(self, state: dict[str, Tensor], layer: str) -> None:
        """The norm before a further layer under its one name: vLLM calls it input_layernorm, SGLang hidden_norm."""
        usual, other = f"{layer}input_layernorm.weight", f"{layer}hidden_norm.weight"
        if other not in state:
            return
        found = state.pop(other)
        if usual not in state:
            state[usual] = found
            self.reading.notes.append(f"{other} is the norm before that layer, which vLLM looks for as input_layernorm")
        elif not torch.equal(state[usual], found):
            raise UserError(
                f"{self.checkpoint.folder} has two norms before layer {layer}, of which vLLM takes input_layernorm and "
                "SGLang hidden_norm; keep the one that it was trained with"
            )

    # -- the config ----------------------------------------------------------------------------------------------
    def config(self) -> Eagle3Config:
        """The draft's config as the file means it; own embedding and maps follow later. Raises ``UserError``."""
        self.layer.refuse(self._faults())
        fields = self.layer.sizes()
        targets = self.target.layers if self.target is not None else None
        fixed = self.trainer.one_layer or self.trainer.target_layer
        layers = self.layer.layers(targets, self.trainer.title if fixed else "")
        norms = True if self.speculated == "qwen3" else None
        fields |= self.layer.attention(norms, self.trainer.one_layer or self.trainer.name == "plain")
        fields |= {"num_layers": layers, "windows": () if self.trainer.target_layer else self.layer.windows(layers)}
        fields["rope_parameters"] = self._rope(fields)
        taps = self._taps()
        wide = self._states(fields["hidden_size"], taps)
        rows = self._rows()
        return Eagle3Config(
            **fields,
            **self._switches(),
            fc_bias=self._fc_bias(fields["hidden_size"]),
            target_hidden_size=wide,
            target_vocab_size=rows,
            draft_vocab_size=self._said(rows),
            taps=taps,
        )

    @property
    def speculated(self) -> str | None:
        """The kind of layer where the speculators format names it; Qwen3's is its default from version 0.8 on."""
        if not is_speculators(self.raw.values):
            return None
        held = "midlayer.self_attn.q_norm.weight" in self.tensors
        return self.values.text("model_type") or ("qwen3" if held else "llama")

    def _faults(self) -> list[str]:
        """What the file asks for and nobody computes here."""
        # Engines give the key to the output projection, to fc, or to both: the tensors tell.
        biased = {"fc.bias", "midlayer.self_attn.o_proj.bias"} & self.tensors.keys()
        faults = [f"bias {self.values.get('bias')!r}"] if self.values.get("bias") and not biased else []
        faults += refuse_switches(self.eagle.values if self.eagle else {})
        kinds = None if self.trainer.target_layer else ("llama", "eagle3", "qwen3")
        if self.raw is not self.values and self.raw.get("quantization_config"):
            faults.append(QUANTISED)
        faults = self.layer.faults(kinds, faults)
        held = "midlayer.self_attn.q_norm.weight" in self.tensors
        if not self.trainer.target_layer and self.values.get("model_type") == "qwen3" and not held:
            faults.append("model_type 'qwen3' without norms of queries and keys (midlayer.self_attn.q_norm.weight)")
        return faults

    def _rope(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        rope = self.layer.rope(fields["max_position_embeddings"])
        note_angles(self.trainer, self.values, rope, self.reading)
        return rope

    def _switches(self) -> dict[str, Any]:
        """The norms' switches on the trainer's word. Raises ``UserError``."""
        eagle = self.eagle or Values({}, self.checkpoint.path)
        found: dict[str, bool] = {}
        given = {key: self.raw.flag(key) for key in ("norm_before_residual", "fc_norm", "use_aux_norm", "norm_output")}
        before = self._either("norm_before_fc", eagle)
        found["norm_before_fc"] = bool(before)
        found["fc_norm"] = bool(given["fc_norm"] or given["use_aux_norm"])
        if found["norm_before_fc"] and found["fc_norm"]:
            raise UserError(
                f"{self.checkpoint.path} asks for norm_before_fc and fc_norm at once; no trainer makes such a draft"
            )
        residual = given["norm_before_residual"]
        found["norm_before_residual"] = self.trainer.residual if residual is None else residual
        if residual is None and self.trainer.residual:
            self.reading.notes.append("norm_before_residual is not in the config; taken as true, as vLLM does")
        output = given["norm_output"]
        if self.trainer.norm_output == "head":
            found["norm_output"], found["head_norm"] = False, output is not False
            if output is False:
                self.reading.notes.append(
                    "norm_output false: SpecForge up to 0.3 trains without the norm before the head"
                )
        else:
            found["norm_output"] = bool(output)
        keys = {"head_norm": "norm_output", "fc_norm": "use_aux_norm" if given["use_aux_norm"] else "fc_norm"}
        for name, value in found.items():
            key = keys.get(name, name)
            present = self.raw.get(key) is not None or (key == "norm_before_fc" and eagle.get(key) is not None)
            word = self.raw.word(key) if present else f"the default of {self.reading.reader}"
            self.reading.take(name, value, "read" if present else "defaulted", word)
        if self.trainer.differs:
            self.reading.notes.append(self.trainer.differs)
        return found

    def _either(self, key: str, eagle: Values) -> bool | None:
        nested, top = eagle.flag(key), self.raw.flag(key)
        return top if nested is None else nested

    def _fc_bias(self, hidden: int) -> bool:
        """A bias in ``fc`` is told by the tensor alone; no config has a key for it."""
        found = self.tensors.get("fc.bias")
        if found is None or found.shape != (hidden,):
            return False
        self.reading.take("fc_bias", True, "derived", "the tensor fc.bias")
        self.reading.notes.append("fc has a bias, which engines have no place for")
        return True

    # -- what is read of the target ------------------------------------------------------------------------------
    def _states(self, hidden: int, taps: tuple[int, ...]) -> int:
        """The width of the target's states."""
        told = self.raw.whole("target_hidden_size")
        if told is not None:
            self.reading.take("target_hidden_size", told, "read", self.raw.word("target_hidden_size"))
            return told
        fused = self.tensors.get("fc.weight")
        wide = fused.shape[1] if fused is not None and len(fused.shape) == 2 else 0
        if self.asked is None and not self._ids_told and wide % hidden == 0 and wide // hidden not in (0, len(taps)):
            raise UserError(
                f"{self.checkpoint.path} names no feature ids, and fc.weight reads {wide // hidden} features of "
                f"{hidden}; say which layers they are of with --taps"
            )
        self.reading.take("target_hidden_size", hidden, "defaulted", "hidden_size, as all trainers do")
        return hidden

    @property
    def _ids_told(self) -> bool:
        return bool(self.raw.get(IDS) or self.raw.get(ANGELSLIM_IDS) or (self.eagle and self.eagle.get(IDS)))

    def _taps(self) -> tuple[int, ...]:
        """Feature ids, each "after k layers". Raises ``UserError`` when they are no list of integers.

        The ids on top are those of vLLM and mean that. The ids in ``eagle_config`` are those of SGLang and of the
        trainers that write them, and mean the output of layer k, counted from zero: one less.
        """
        path, notes = self.checkpoint.path, self.reading.notes
        top, nested = self.raw.whole_list(IDS, -1 << 31), (self.eagle or self.raw).whole_list(IDS, -1 << 31)
        nested = nested if self.eagle else None
        if self.asked is not None:
            self.reading.take("taps", tuple(self.asked), "read", "--taps")
            return tuple(self.asked)
        if min(top or [0]) < 0 or min(nested or [0]) < -1:
            raise UserError(f"{path} has feature ids below the first layer, {top or nested}; engines never give these")
        if top:
            if nested and [k + 1 for k in nested] != top:
                notes.append(f"the feature ids {top} (vLLM) and {nested} (SGLang, one less) disagree; {top} was taken")
            self.reading.take("taps", tuple(top), "read", self.raw.word(IDS))
            return tuple(top)
        if nested:
            if self.trainer.name != "modelopt":
                notes.append(
                    f"the feature ids {nested} are outputs of layers counted from zero; taken as one more each"
                )
            taken = tuple(k + 1 for k in nested)
            self.reading.take("taps", taken, "read", f"config.json: eagle_config.{IDS}, counted from zero")
            return taken
        slim = self.raw.whole_list(ANGELSLIM_IDS)
        if slim:
            taken = tuple(k + 1 for k in slim)
            self.reading.take("taps", taken, "read", f"{self.raw.word(ANGELSLIM_IDS)}, counted from zero")
            return taken
        if self.eagle and self.eagle.get("layer_ids"):
            raise UserError(
                f"{path} has its feature ids in eagle_config.layer_ids alone, which hands count differently; write "
                "them as eagle_aux_hidden_state_layer_ids, each the number of layers passed, or give --taps"
            )
        if self.target is None:
            raise UserError(f"{path} names no feature ids; give --target, whose default they are, or --taps")
        usual = default_taps(self.target.layers)
        if top is not None or nested is not None:
            notes.append(f"the list of feature ids is empty; taken as the default {list(usual)}")
        elif self.trainer.name == "automodel":
            notes.append(
                f"NeMo Automodel does not write which layers a draft reads; taken as its default {list(usual)}: give "
                "--taps where it was trained with others (aux_layer_ids, one more each)"
            )
        self.reading.take("taps", usual, "defaulted", f"the default for a target of {self.target.layers} layers")
        return usual

    # -- vocabularies --------------------------------------------------------------------------------------------
    def _rows(self) -> int:
        """Rows of the draft's table of tokens."""
        told = self.values.whole("vocab_size")
        if told is not None:
            self.reading.take("target_vocab_size", told, "read", self.values.word("vocab_size"))
            return told
        for name in ("t2d", EMBEDDING):
            if name in self.tensors and self.tensors[name].shape:
                self.reading.take("target_vocab_size", self.tensors[name].shape[0], "derived", f"the length of {name}")
                return self.tensors[name].shape[0]
        if self.target is None:
            raise UserError(f"{self.checkpoint.path} has no vocab_size; add it, or give --target")
        self.reading.take("target_vocab_size", self.target.vocab_size, "target", "the target's head")
        return self.target.vocab_size

    def _said(self, rows: int) -> int:
        """The draft vocabulary: the rows of its head."""
        told = self.raw.whole("draft_vocab_size")
        if told is not None:
            self.reading.take("draft_vocab_size", told, "read", self.raw.word("draft_vocab_size"))
            return told
        head = self.tensors.get("lm_head.weight")
        found = head.shape[0] if head is not None and head.shape else rows
        self.reading.take("draft_vocab_size", found, "derived", "the shape of lm_head.weight")
        return found

    def _vocabulary(self, config: Eagle3Config) -> Eagle3Config:
        """The config on the target's number of rows, with the maps of the state in their form. ``UserError``."""
        where, notes = self.checkpoint.folder, self.reading.notes
        rows, wanted = config.target_vocab_size, self.target.vocab_size if self.target else config.target_vocab_size
        if rows != wanted and padded(rows, wanted):
            for name in (EMBEDDING, "t2d"):
                length = self.state[name].shape[:1] if name in self.state else (rows,)
                if length not in ((rows,), (wanted,)):
                    raise UserError(f"{where}: {name} has {length} rows and vocab_size is {rows}; mend the config")
            said = fit_rows(self.state, config.draft_vocab_size, rows, wanted, where, notes)
            config = replace(config, target_vocab_size=wanted, draft_vocab_size=said)
            self.reading.take("target_vocab_size", wanted, "target", "the target's head")
            self.reading.take("draft_vocab_size", said, "derived", "lm_head.weight and the target's head")
        self.state = read_maps(self.state, config, where, notes)
        for name in MAPS:
            if name in self.state:
                how = "read" if name in self.tensors else "derived"
                told = "the file" if how == "read" else next(other for other in MAPS if other != name)
                self.reading.take(name, f"{len(self.state[name])} rows", how, told)  # type: ignore[arg-type]
        return config

    def _embedding(self, config: Eagle3Config, state: dict[str, Tensor], values: bool) -> Eagle3Config:
        """The config with an embedding of its own where the file has one, and a note on whose it is."""
        if EMBEDDING not in state:
            self.reading.take("embedding", "target", "target", "the file has none")
            return config
        compare(state[EMBEDDING], self.target, self.reading, values)
        return replace(config, own_embedding=True)
