"""What a command will do and about what that costs, before anything is loaded: the plan of ``--dry-run``.

Sizes come from configs and from the headers of weight files; no weights are loaded and nothing is written. Operations
follow the formulas of the cost ledger (:mod:`redraft.provenance`) for answers of the full length, so they are an upper
bound where answers end early. A private part is taken to be a fifth of the draft. Bytes on disk: features are 2 bytes a
number, those of three taps at every token and the last state at answers' tokens; a checkpoint keeps 16 bytes a trained
parameter (weights, their best, two moments); a stored draft has 2 bytes a parameter. Memory is told part by part: see
:meth:`Costs.memory`. Minutes are told on a CPU alone, whose speed in products of many rows is tried for a moment.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from redraft import provenance
from redraft.adaptation.models import split_prompts
from redraft.adaptation.study.targets import read_source
from redraft.arithmetic import EFFICIENCY, MOST_BYTES, choose_dtype, fastest
from redraft.artifact import read_json, read_shapes
from redraft.data.prompts import read_conversations
from redraft.data.store import read_rows
from redraft.drafts.standalone.shapes import parameters_of, shape_for
from redraft.errors import UserError
from redraft.loading import ADAPTER_FILE, adapter_base, config_at, locate, quiet
from redraft.settings.base import AUTO, Settings
from redraft.settings.runs import AdaptConfig, DistillConfig
from redraft.settings.steps import RegenerateSettings, TrainSettings
from redraft.settings.studies import StudySettings, read_study
from redraft.settings.texts import parse_budget, parse_source, self_prompts
from redraft.settings.training import METHODS, SHARE
from redraft.target.facts import Facts, empty_model
from redraft.values import Values

CHARACTERS = 4  # of a token of ordinary English text, where there is no tokenizer to ask
OWN_PROMPT = 60  # tokens of a prompt that is still to be written
TAPS = 3
PROCESS = 400e6  # Python with torch and transformers loaded


@dataclass(frozen=True)
class Text:
    """Answers: how many, tokens of their prompts, and at most so many of their own."""

    rows: float
    prompts: float
    answers: float

    @property
    def tokens(self) -> float:
        return self.prompts + self.answers

    def part(self, share: float) -> Text:
        return Text(self.rows * share, self.prompts * share, self.answers * share)


class Costs:
    """What a plan adds up for one target. Raises ``UserError`` for a config that cannot be read."""

    def __init__(self, target: str, dtype: str, device: str) -> None:
        base = adapter_base(target) if (Path(target) / ADAPTER_FILE).is_file() else target
        with quiet():
            facts = Facts(base, config_at(locate(base), base))
        self.facts, self.active = facts, facts.parameters_per_token
        self.dtype, self.device = choose_dtype(dtype, device), device
        self.item = 2 if self.dtype == "bfloat16" else 4
        whole = sum(weight.numel() for weight in empty_model(facts.whole_config).parameters())
        self.numbers, self.auto = whole, dtype == AUTO and device == "cpu"
        self.working: dict[str, float] = {}
        self.stages: list[tuple[str, float, float]] = []
        self.disk: dict[str, float] = {}

    def forward(self, name: str, tokens: float) -> None:
        """A stage of plain passes of the target."""
        self.stages.append((name, tokens, provenance.forward_flops(self.active, round(tokens))))

    def answer(self, text: Text, batch: int) -> None:
        """The target's answers."""
        self.forward("regenerate", text.tokens)
        self.disk["responses"] = 5 * text.tokens
        config = self.facts.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        together = min(batch, text.rows) * text.tokens / max(1, text.rows)
        self.working["keys and values"] = together * 2 * self.facts.layers * heads * head * self.item

    def train(self, draft: Draft, method: str, config: Any, text: Text, copies: int) -> None:
        """Training of a draft; its stored copies are the private part, the merged draft and ``copies`` exports."""
        groups, full = METHODS[method].groups, METHODS["full"].groups
        trained = draft.parameters * (1 if groups == full else SHARE if groups else 0)
        frozen = 0 if groups == full else draft.parameters
        anchors = config.epochs * max(0, text.answers - text.rows)
        flops = provenance.train_flops(round(trained), round(anchors * config.unroll), frozen)
        self.stages.append(("train", anchors, flops))
        self.disk["features"] = 2 * self.facts.hidden_size * (TAPS * text.tokens + text.answers)
        self.disk |= {"checkpoint": 16 * trained, "drafts": 2 * (trained + draft.parameters * (1 + copies))}
        logits = 3 * 4 * config.batch_anchors * (config.unroll * draft.vocabulary + self.facts.vocab_size)
        activations = min(logits, config.activation_memory * 2**30)
        self.working["training"] = self.disk["features"] + 4 * draft.parameters + 12 * trained + activations

    def memory(self, contest: bool) -> Iterator[tuple[str, float]]:
        """The parts of peak memory in bytes.

        The process itself; the target's weights, on a CPU twice where products use a packed copy; the other data type
        in the same way where a benchmark lets float32 and bfloat16 compete; and what the largest stage works with: keys
        and values of the answers that are decoded together, or features read back, the draft in 4 bytes with 12 more
        where trained, and three copies of a step's logits, the draft's and the target's, or ``activation_memory`` where
        that is less.
        """
        yield "the process with torch", PROCESS
        types = {f"the target in {self.dtype}": self.item, "the target in the type that competes": 6 - self.item}
        for name, item in list(types.items())[: 1 + (self.auto and contest)]:
            packed = self.device == "cpu" and self.numbers * item <= MOST_BYTES
            yield name, self.numbers * item * (2 if packed else 1)
        if self.working:
            yield max(self.working.items(), key=lambda part: part[1])

    def lines(self, contest: bool = False) -> Iterator[str]:
        """The sums, for a reader; ``contest`` says that a benchmark follows."""
        total = sum(flops for _, _, flops in self.stages)
        for name, tokens, flops in [*self.stages, ("in all, at most", sum(t for _, t, _ in self.stages), total)]:
            yield f"  {name:<20}{round(tokens):>16,} tokens{flops:>12.3g} FLOPs"
        if "responses" in self.disk:
            yield "tokens: as if every answer were as long as --max-new-tokens allows; most end earlier"
        yield "disk: " + ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in self.disk.items())
        parts = [(name, size / 1e9) for name, size in self.memory(contest)]
        counted = ", ".join(f"{name} {size:.2g}" for name, size in parts)
        yield f"peak memory: about {sum(size for _, size in parts):.1f} GB ({counted}), and what allocators keep"
        after = ", and those of a benchmark" if contest else ""
        rate = dict(fastest("cpu").gflops).get(self.dtype) if self.device == "cpu" else None
        if rate:
            minutes = total / (rate * 1e9 * EFFICIENCY[self.dtype]) / 60
            speed = f"at this machine's {rate:.0f} GFLOP/s in {self.dtype}"
            yield f"time: at most about {minutes:.1f} minutes {speed}{after}"


@dataclass(frozen=True)
class Draft:
    """A draft by its files: parameters without the embedding, and vocabulary; what is not here counts as nothing."""

    parameters: int
    vocabulary: int

    @classmethod
    def of(cls, place: str | None) -> Draft:
        folder, total, vocabulary = Path(place or "?"), 0, 0
        for path in sorted(folder.glob("*.safetensors")):
            total += sum(math.prod(shape) for name, shape in read_shapes(path).items() if "embed_tokens" not in name)
        for file in filter(Path.is_file, (folder / "redraft.json", folder / "config.json")):
            values = Values(read_json(file, finite=False), file)
            values = values.part("config") or values
            vocabulary = vocabulary or values.whole("draft_vocab_size", 0) or values.whole("vocab_size", 0) or 0
        return cls(total, vocabulary)


def plan(settings: Settings) -> list[str]:
    """The resolved settings of a command and its costs, as lines. Raises ``UserError`` for what cannot be read."""
    shown = settings.model_dump(mode="json") | {name: asdict(block) for name, block in settings.blocks().items()}
    plain = json.loads(json.dumps(shown))  # lists for tuples
    listed = yaml.safe_dump(plain, sort_keys=False, default_flow_style=None, width=118).splitlines()
    costs = COSTS[type(settings)](settings)
    return ["settings:", *(f"  {line}" for line in listed), "costs:", *costs, "nothing was done: --dry-run"]


# -- texts -------------------------------------------------------------------------------------------------------------
def text_of(responses: str | Path | None, prompts: str | None = None, samples: int = 1, longest: int = 0) -> Text:
    """Responses on disk, or the answers that prompts get, ``samples`` each. Raises ``UserError`` for a bad file."""
    if responses is not None:
        rows = read_rows(Path(responses))
        return Text(len(rows), int(rows.prompt_tokens.sum()), int(rows.response_tokens.sum()))
    count = self_prompts(prompts)
    found = [] if count else read_conversations(str(prompts))
    lengths = [sum(len(m["content"]) for m in c.messages) / CHARACTERS for c in found] or [OWN_PROMPT] * count
    return Text(len(lengths), sum(lengths), len(lengths) * longest).part(samples)


# -- commands ----------------------------------------------------------------------------------------------------------
def regenerate_costs(s: RegenerateSettings) -> Iterator[str]:
    costs = Costs(s.target, s.dtype, s.device)
    costs.answer(text_of(None, s.prompts, len(s.temperature), s.max_new_tokens), s.batch_size)
    return costs.lines()


def train_costs(s: TrainSettings) -> Iterator[str]:
    if s.draft is None:
        raise UserError("--dry-run reads the sizes of --draft; a new draft has them when it is made")
    costs, text = Costs(s.target, s.dtype, s.device), text_of(s.responses)
    costs.forward("features", text.tokens)
    kept = text.part(max(0, text.rows - s.heldout) / text.rows) if s.heldout_responses is None else text
    costs.train(Draft.of(s.draft), s.method, s.train_config(), kept, 0)
    return costs.lines()


def adapt_costs(s: AdaptConfig) -> Iterator[str]:
    """Features come from the passes that the answers take."""
    costs = Costs(s.target, s.dtype, s.device)
    text = text_of(s.responses, s.prompts, len(s.temperatures), s.max_new_tokens)
    if s.responses:
        costs.forward("features", text.tokens)
    else:
        costs.answer(text, s.batch_size)
    budget = parse_budget(s.budget)
    whole = {"fraction": 1.0, "rows": text.rows, "tokens": text.answers}[budget.kind]
    left = max(0, text.rows - s.heldout_prompts) / max(1, text.rows)
    if not s.responses and not self_prompts(s.prompts):
        asked = read_conversations(str(s.prompts))
        train, _, _ = split_prompts(asked, s.heldout_prompts, 0 if s.eval_prompts else s.bench_prompts, s.seed)
        left = len(train) / len(asked)
    share = min(1.0, float(budget.amount) / max(1, whole)) * left
    costs.train(Draft.of(s.draft), s.method, s.train_config(), text.part(share), len(s.exports))
    return costs.lines(contest=bool(s.bench_prompts))


def distill_costs(s: DistillConfig) -> Iterator[str]:
    costs, align = Costs(s.target, s.dtype, s.device), s.align_config()
    text = text_of(s.responses, s.prompts, len(s.temperatures), s.max_new_tokens)
    size = Draft.of(s.draft).parameters if s.draft else parameters_of(shape_for(costs.facts, s.size, s.layers, s.tied))
    if s.draft is None:
        tokens = s.pretrain_config().tokens
        costs.stages.append(("pretrain", tokens, provenance.train_flops(size, tokens)))
    if not s.responses:
        costs.answer(text, s.batch_size)
    if s.teacher == "states":
        costs.forward("states", text.tokens * (1 if s.store_states else align.epochs))
        costs.disk["states"] = 2 * costs.facts.hidden_size * text.answers * s.store_states
    trained = align.epochs * text.tokens
    costs.stages.append(("align", trained, provenance.train_flops(size, round(trained))))
    costs.disk |= {"checkpoints": 16 * size, "drafter": 2 * size * (1 + len(s.exports))}
    costs.working["training"] = 16 * size
    return costs.lines()


def study_costs(s: StudySettings) -> Iterator[str]:
    """Every target's answers, and the training of its cells, one after the other."""
    if s.config is None:
        raise UserError("--dry-run needs the YAML file of a study")
    study = read_study(s.config)
    for name, entry in study.targets.items():
        costs, cells = Costs(entry.target, study.dtype, study.device), study.all_cells()
        trained = [cell for cell in cells if cell.target == name and study.trains(cell.method)]
        rows = sum(parse_source(text).count or len(read_source(text)) for text in entry.prompts)
        text = Text(rows, rows * OWN_PROMPT, rows * study.max_new_tokens)
        costs.answer(text.part(len({cell.data for cell in trained})), study.batch_size)
        for cell in trained:
            config = study.train_config(cell.loss, cell.seed, cell.method)
            costs.train(Draft.of(entry.draft), study.method_of(cell.method), config, text, 0)
        yield f"{name}: {rows} prompts, {len(trained)} cells to train"
        yield from costs.lines(contest=study.speed is not None)


COSTS: dict[type[Settings], Callable[[Any], Iterator[str]]] = {
    AdaptConfig: adapt_costs,
    TrainSettings: train_costs,
    RegenerateSettings: regenerate_costs,
    DistillConfig: distill_costs,
    StudySettings: study_costs,
}
