"""What a command will do and about what that costs, before anything is loaded: the plan of ``--dry-run``.

Sizes are read from configs and from the headers of weight files; no weights are loaded and nothing is written. The
operations are counted by the formulas of the cost ledger (:mod:`redraft.provenance`), for answers of the full length,
so that they are an upper bound where answers end early. Bytes:

* a feature is width * 2 bytes; kept are those of the taps at every token, and the last state at answers' tokens;
* a checkpoint keeps 16 bytes a trained parameter: weights, their best, and two moments;
* a draft is stored in 2 bytes a parameter: the merged draft, the private part, each export.

Memory is the target's weights, the draft's in 4 bytes with 12 more where trained, keys and values of the answers that
are decoded together, and logits of a training step (three copies in 4 bytes) on top of half a gigabyte of libraries;
allocators and a benchmark in several data types take more. Minutes are told on a CPU alone, whose speed in products of
many rows is tried for a moment.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from redraft import provenance
from redraft.arithmetic import EFFICIENCY, choose_dtype, fastest
from redraft.artifact import read_json
from redraft.data.prompts import read_conversations
from redraft.data.store import read_rows
from redraft.errors import UserError
from redraft.loading import ADAPTER_FILE, adapter_base, locate, one_line, quiet
from redraft.settings.adapt import AdaptConfig
from redraft.settings.base import Settings
from redraft.settings.budget import parse_budget
from redraft.settings.distill import DistillConfig
from redraft.settings.methods import METHODS, SHARE
from redraft.settings.steps import RegenerateSettings, TrainSettings
from redraft.settings.studies import StudyConfig, StudySettings, read_study
from redraft.settings.texts import self_prompts

# Characters of a token of ordinary English text, where there is no tokenizer to ask.
CHARACTERS = 4
# Tokens of a prompt that the target is still to write.
OWN_PROMPT = 60
LIBRARIES = 500e6
TAPS = 3


@dataclass(frozen=True)
class TargetSize:
    """A target as its config describes it. ``active`` parameters are those that a token multiplies."""

    parameters: int
    active: int
    width: int
    kv: int
    item: int

    @classmethod
    def of(cls, name: str, dtype: str, device: str) -> TargetSize:
        """From the config of a checkpoint or of an adapter's base. Raises ``UserError``."""
        base = adapter_base(name) if (Path(name) / ADAPTER_FILE).is_file() else name
        with quiet(), one_line(f"the config of {base}"), torch.device("meta"):
            config = AutoConfig.from_pretrained(**locate(base))
            model = AutoModelForCausalLM.from_config(config)
        text = config.get_text_config()
        whole = sum(weight.numel() for weight in model.parameters())
        tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
        active = whole - (0 if tied else model.get_input_embeddings().weight.numel())
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        kv = 2 * text.num_hidden_layers * heads * head
        item = 2 if choose_dtype(dtype, device) == "bfloat16" else 4
        return cls(whole, active, text.hidden_size, kv, item)


@dataclass(frozen=True)
class Text:
    """Texts by number: ``rows`` answers, tokens of their prompts and at most so many of their own."""

    rows: int
    prompts: int
    answers: int

    @property
    def tokens(self) -> int:
        return self.prompts + self.answers

    def without(self, rows: int) -> Text:
        """The text less so many rows that are kept back, where there are more."""
        share = max(1, self.rows - rows) / max(1, self.rows)
        return Text(round(self.rows * share), round(self.prompts * share), round(self.answers * share))


@dataclass
class Costs:
    """Lines of a plan. ``stage`` adds one, ``lines`` adds up."""

    stages: list[tuple[str, int, int]] = field(default_factory=list)
    disk: dict[str, float] = field(default_factory=dict)
    memory: float = LIBRARIES
    dtype: str = "auto"
    device: str = "cpu"

    def stage(self, name: str, tokens: float, flops: float) -> None:
        self.stages.append((name, round(tokens), round(flops)))

    def lines(self) -> Iterator[str]:
        for name, tokens, flops in self.stages:
            yield f"  {name:<24}{tokens:>14,} tokens  {flops:>10.3g} FLOPs"
        total = sum(flops for _, _, flops in self.stages)
        yield f"  {'in all':<24}{sum(t for _, t, _ in self.stages):>14,} tokens  {total:>10.3g} FLOPs, at most"
        yield "disk: " + ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in self.disk.items())
        yield f"peak memory: about {self.memory / 1e9:.1f} GB, and more where a benchmark opens several data types"
        if self.device == "cpu":
            kind = choose_dtype(self.dtype, "cpu")
            rate = dict(fastest("cpu").gflops).get(kind)
            if rate:
                minutes = total / (rate * 1e9 * EFFICIENCY[kind]) / 60
                speed = f"at this machine's {rate:.0f} GFLOP/s in {kind}"
                yield f"time: at most about {minutes:.1f} minutes {speed}, and those of a benchmark"


def plan(settings: Settings) -> list[str]:
    """The resolved settings of a command and its costs, as lines. Raises ``UserError`` for what cannot be read."""
    kinds: dict[type[Settings], Any] = {
        AdaptConfig: adapt_costs,
        TrainSettings: train_costs,
        RegenerateSettings: regenerate_costs,
        DistillConfig: distill_costs,
        StudySettings: study_costs,
    }
    shown = settings.model_dump(mode="json")
    if isinstance(settings, AdaptConfig | TrainSettings):
        shown["train" if isinstance(settings, AdaptConfig) else "setting"] = settings.train_config().identity()
    if isinstance(settings, DistillConfig):
        shown |= {"pretrain": settings.pretrain_config().identity(), "align": settings.align_config().identity()}
    costs: Costs = kinds[type(settings)](settings)
    listed = yaml.safe_dump(shown, sort_keys=False, default_flow_style=None, width=120).splitlines()
    return ["settings:", *(f"  {line}" for line in listed), "costs:", *costs.lines(), "nothing was done: --dry-run"]


# -- texts -------------------------------------------------------------------------------------------------------------
def asked(prompts: str, samples: int, longest: int, rows: int | None = None) -> Text:
    """The answers that prompts get. ``rows`` takes so many of them. Raises ``UserError`` for a bad file."""
    if count := self_prompts(prompts):
        lengths = [OWN_PROMPT] * count
    else:
        found = read_conversations(prompts)
        # in a conversation of several turns every turn is asked with all that went before
        lengths = [sum(len(m["content"]) for m in c.messages) // CHARACTERS for c in found]
    lengths = lengths[:rows] if rows is not None else lengths
    return Text(len(lengths) * samples, sum(lengths) * samples, len(lengths) * samples * longest)


def stored(path: str | Path) -> Text:
    """Responses on disk, counted. Raises ``UserError``."""
    rows = list(read_rows(Path(path)))
    return Text(len(rows), sum(len(r.prompt_ids) for r in rows), sum(len(r.response_ids) for r in rows))


# -- commands ----------------------------------------------------------------------------------------------------------
def draft_parameters(place: str) -> int:
    """Parameters of a draft's weight files, from their headers; 0 where they are not here."""
    total = 0
    for path in sorted(Path(place).glob("*.safetensors")):
        with safe_open(path, "pt") as weights:
            shapes = [(name, weights.get_slice(name).get_shape()) for name in weights.keys()]  # noqa: SIM118
        total += sum(math.prod(shape) for name, shape in shapes if "embed_tokens" not in name)
    return total


def _target(settings: Any, costs: Costs) -> TargetSize:
    costs.dtype, costs.device = settings.dtype, settings.device
    size = TargetSize.of(settings.target, settings.dtype, settings.device)
    costs.memory += size.parameters * size.item
    return size


def _answer(costs: Costs, target: TargetSize, text: Text, batch: int) -> None:
    costs.stage("regenerate", text.tokens, provenance.forward_flops(target.active, text.tokens))
    costs.disk["responses"] = 5.0 * text.tokens
    longest = text.tokens / max(1, text.rows)
    costs.memory += min(batch, text.rows) * longest * target.kv * target.item


def _train(costs: Costs, settings: Any, target: TargetSize, text: Text, features: bool) -> None:
    """Features and training of ``text``."""
    config, whole = settings.train_config(), draft_parameters(settings.draft or "")
    method = METHODS[settings.method]
    full = method.fresh or method.groups == METHODS["full"].groups
    trained = 0 if not method.groups else whole if full else SHARE * whole
    frozen = whole - trained if full else whole
    if features:
        costs.stage("features", text.tokens, provenance.forward_flops(target.active, text.tokens))
    costs.disk["features"] = 2.0 * target.width * (TAPS * text.tokens + text.answers)
    anchors = round(config.epochs * max(0, text.answers - text.rows))
    steps = anchors * config.unroll
    costs.stage("train", anchors, provenance.train_flops(round(trained), steps, round(frozen)))
    costs.disk |= {
        "checkpoint": 16 * trained,
        "drafts": 2 * (whole + trained) + 2 * whole * len(getattr(settings, "exports", ())),
    }
    vocabulary = draft_vocabulary(settings.draft or "")
    costs.memory += 4 * whole + 12 * trained + 3 * 4 * config.batch_anchors * config.unroll * vocabulary


def draft_vocabulary(place: str) -> int:
    """The vocabulary that a draft's config names; 32,000 where it is not here."""
    for name in ("redraft.json", "config.json"):
        if (Path(place) / name).is_file():
            found = read_json(Path(place) / name)
            config = found.get("config", found)
            return int(config.get("draft_vocab_size") or config.get("vocab_size") or 32_000)
    return 32_000


def regenerate_costs(s: RegenerateSettings) -> Costs:
    """Answers to prompts."""
    costs = Costs()
    _answer(costs, _target(s, costs), asked(s.prompts, len(s.temperature), s.max_new_tokens), s.batch_size)
    return costs


def train_costs(s: TrainSettings) -> Costs:
    """Features of stored responses, and training on them."""
    costs, text = Costs(), stored(s.responses)
    if s.from_nothing:
        raise UserError("--dry-run of a new draft is not there: its size is known when it is made")
    _train(costs, s, _target(s, costs), text, features=True)
    return costs


def adapt_costs(s: AdaptConfig) -> Costs:
    """Answers, selection and training. Features come from the same passes as the answers."""
    costs = Costs()
    target = _target(s, costs)
    if s.responses is not None:
        text = stored(s.responses)
    else:
        assert s.prompts is not None
        text = asked(s.prompts, len(s.temperatures), s.max_new_tokens)
        _answer(costs, target, text, s.batch_size)
    budget = parse_budget(s.budget)
    kept = float(budget.amount) if budget.kind == "fraction" else 1.0
    if budget.kind == "tokens":
        kept = min(1.0, float(budget.amount) / max(1, text.answers))
    if budget.kind == "rows":
        kept = min(1.0, float(budget.amount) / max(1, text.rows))
    chosen = Text(round(text.rows * kept), round(text.prompts * kept), round(text.answers * kept))
    _train(costs, s, target, chosen.without(s.heldout_prompts), features=s.responses is not None)
    return costs


def distill_costs(s: DistillConfig) -> Costs:
    """Pretraining, answers and alignment of a drafter of its own."""
    costs = Costs()
    target = _target(s, costs)
    text = stored(s.responses) if s.responses else asked(str(s.prompts), len(s.temperatures), s.max_new_tokens)
    drafter = draft_parameters(s.draft) if s.draft else drafter_size(s.size, target.active)
    if s.draft is None:
        tokens = s.pretrain_config().tokens
        costs.stage("pretrain", tokens, provenance.train_flops(drafter, tokens))
    if not s.responses:
        _answer(costs, target, text, s.batch_size)
    align = s.align_config()
    costs.stage("align", align.epochs * text.tokens, provenance.train_flops(drafter, round(align.epochs * text.tokens)))
    if s.teacher == "states":
        times = 1 if s.store_states else math.ceil(align.epochs)
        costs.stage("states", times * text.tokens, provenance.forward_flops(target.active, times * text.tokens))
        costs.disk["states"] = 2.0 * target.width * text.answers if s.store_states else 0.0
    costs.disk |= {"checkpoints": 16.0 * drafter, "drafter": 2.0 * drafter * (1 + len(s.exports))}
    costs.memory += 16 * drafter
    return costs


def drafter_size(size: str, target: int) -> int:
    """Parameters a token of a new drafter: a share of the ``target``'s, or so many. Raises ``UserError``."""
    number, slash, below = size.partition("/")
    try:
        if slash:
            return round(target * int(number) / int(below))
        scale = {"k": 1e3, "m": 1e6, "b": 1e9}.get(size[-1:].lower(), 0)
        value = float(size[:-1]) * scale if scale else float(size)
    except (ValueError, ZeroDivisionError):
        return target // 10  # a preset of its own shape
    return round(value if value > 1 else value * target)


def study_costs(s: StudySettings) -> Costs:
    """Answers and training of every cell, each at the length that the study allows; its own tables cost little."""
    assert s.config is not None
    study: StudyConfig = read_study(s.config)
    costs = Costs(dtype=study.dtype, device=study.device)
    for name, entry in study.targets.items():
        target = TargetSize.of(entry.target, study.dtype, study.device)
        costs.memory = max(costs.memory, LIBRARIES + target.parameters * target.item)
        counts = [source_rows(text) for text in entry.prompts]
        rows = sum(counts)
        tokens = rows * (OWN_PROMPT + study.max_new_tokens)
        cells = [cell for cell in study.all_cells() if cell.target == name and study.trains(cell.method)]
        answered = len({cell.data for cell in cells}) * tokens
        costs.stage(f"answers of {name}", answered, provenance.forward_flops(target.active, answered))
        whole = draft_parameters(entry.draft)
        anchors = round(study.train_config("kl", 0).epochs * rows * study.max_new_tokens) * len(cells)
        flops = provenance.train_flops(round(SHARE * whole), anchors * study.train_config("kl", 0).unroll, whole)
        costs.stage(f"{len(cells)} cells of {name}", anchors, flops)
        costs.disk[f"features of {name}"] = 2.0 * target.width * (TAPS * answered + rows * study.max_new_tokens)
    return costs


def source_rows(text: str) -> int:
    """Prompts of a source of a study: its count, or those of the file. Raises ``UserError``."""
    place, at, count = text.rpartition("@")
    if at and count.isdigit():
        return int(count)
    return len(read_conversations(text)) if Path(text).is_file() else 0
