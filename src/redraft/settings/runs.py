"""Settings that several commands have, and those of whole runs: adapt and distill, and what train shares with them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

from redraft.errors import UserError
from redraft.settings import texts, training
from redraft.settings.base import AUTO, DtypeName, Settings, setting
from redraft.settings.sampler import Sampler, asked_samplers, samplers_of

PROMPT_FORMS = "JSONL, ShareGPT, Alpaca, text lines, or datasets:NAME"
SHARED_DRAFT = "shared draft, when the draft is a private part"
OWN_PROMPTS = f"prompts of its domain ({PROMPT_FORMS}); self:400 lets the target write 400 questions itself"
FIFTH = "by default what makes it a fifth of the draft"


class OnTarget(Settings):
    """Settings of a command that opens the target."""

    target: str = setting(..., "fine-tuned target: folder, hub id, or folder of a PEFT adapter", reads="model")
    adapter: str | None = setting(None, "PEFT adapter to merge into --target", reads="model")
    template_arg: dict[str, Any] = setting({}, "argument of its chat template, as enable_thinking=false; repeatable")
    dtype: DtypeName = setting(AUTO, "data type of the target: bfloat16, float32, or auto, the faster one here")
    device: str = setting("cpu", "torch device: cpu, cuda, cuda:1 or another; auto: all accelerators, by layers")
    seed: int = setting(0, "seed of everything random", lt=2**62)


class Sampled(OnTarget):
    """How the target draws."""

    temperature: float = setting(0.0, "0 is greedy")
    top_p: float = setting(1.0, "nucleus of sampling")
    top_k: int = setting(0, "likeliest tokens to sample from; 0 is all")

    @property
    def sampler(self) -> Sampler:
        """Raises ``UserError`` for values out of range and for filters of a greedy choice."""
        return asked_samplers([self.temperature], self.top_p, self.top_k)[0]


class Answered(OnTarget):
    """How the target, or a server of it, answers prompts."""

    top_p: float = setting(1.0, "nucleus of sampled answers")
    max_new_tokens: int = setting(256, "longest answer, in tokens", gt=1)
    server: texts.Addresses = setting(
        (), "OpenAI-compatible server of the target, several with commas; key: REDRAFT_API_KEY; repeatable"
    )
    server_model: str | None = setting(None, "the target's name on the server")
    batch_size: int = setting(64, "sequences decoded together, or requests under way at each --server", gt=0)

    def conflicts(self) -> Iterator[str]:
        if self.server_model and not self.server:
            yield "--server-model names the target on a server; give --server too, or leave it out"


class AnsweredRun(Answered):
    """A run that begins with the target's answers and ends with exports."""

    out: Path = setting(..., "run directory; a stopped run resumes from it")
    prompts: str | None = setting(None, f"prompts that the target answers ({PROMPT_FORMS})", reads="prompts")
    responses: str | None = setting(None, "log of served responses, as text or ids, instead of --prompts", reads="file")
    temperatures: tuple[float, ...] = setting((0.0,), "sampling temperature of the answers; repeatable")
    heldout_prompts: int = setting(24, "prompts kept back for early stopping", gt=0)
    exports: texts.FormatNames = setting((), "format to export, several with commas: {formats}; repeatable")

    def conflicts(self) -> Iterator[str]:
        yield from super().conflicts()
        if (self.prompts is None) == (self.responses is None):
            yield "give --prompts for the target to answer, or --responses with a log of served ones: one of the two"


# -- whole runs --------------------------------------------------------------------------------------------------------
class Adapting(OnTarget):
    """What is trained of an old draft, and how: of ``redraft adapt`` and ``redraft train``."""

    LIFTED: ClassVar[tuple[str, ...]] = ("train", "setting")

    method: training.MethodName = setting("lora", "which parts of the draft are trained: {methods}")
    private_width: int | None = setting(None, f"inner width of the private expert; {FIFTH}", gt=0)
    rank: int | None = setting(None, f"rank of the low-rank updates; {FIFTH}", gt=0)
    private: training.PrivateBlock = setting(
        {}, "any other size of the private part, as alpha=8 (bits with full); repeatable"
    )
    loss: training.LossName = setting("kl", "training loss: {losses}")
    gamma: int = setting(5, "drafted tokens a round", gt=0)

    @property
    def private_size(self) -> training.PrivateSize:
        """The sizes of the private part. Raises ``UserError`` for some that no draft can have together."""
        return training.PrivateSize(**{"width": self.private_width, "rank": self.rank, **self.private})


def adaptation(method_name: str) -> dict[str, Any]:
    """Training settings of an old draft where nobody says otherwise: those of the studies (docs/studies).

    A few hundred answers want many small steps; a new draft, with its millions of tokens, keeps the larger ones of
    :class:`~redraft.settings.training.TrainConfig`.
    """
    return {"epochs": 6.0, "batch_anchors": 768, "learning_rate": training.method(method_name).learning_rate}


class AdaptConfig(Adapting, AnsweredRun):
    """What ``redraft adapt`` does. Every field is a flag of the same name and a key of the YAML file."""

    COMMAND: ClassVar[str] = "adapt"
    ONCE: ClassVar[dict[str, dict[str, str]]] = {
        "train": {"loss": "loss", "gamma": "gamma", "seed": "seed"},
        "private": {"private_width": "width", "rank": "rank"},
    }

    draft: str = setting(..., "old draft: folder in any format, or hub id", reads="model")
    prompts: texts.PromptsName | None = setting(None, OWN_PROMPTS, reads="prompts")
    base_target: str | None = setting(None, "target that the old draft was made for, for scorer shift", reads="model")
    eval_prompts: str | None = setting(None, "prompts to measure on; else held out from --prompts", reads="prompts")
    start: texts.StartName = setting("vocabulary", "what training starts from: {starts}; joined by + where several")
    replay: int = setting(0, "passes over the states where the trained draft's rounds end early", ge=0)
    scorer: texts.ScorerName = setting("rejection", "how samples are scored: {scorers}; or NAME:KEY=VALUE,KEY=VALUE")
    budget: texts.BudgetText = setting("100%", 'what selection keeps: "25%", "400" rows or "60k tokens"')
    select_on: Literal["responses", "prompts"] = setting(
        "responses", "what is scored; prompts that are not kept stay unanswered"
    )
    general: str | None = setting(None, "general responses, mixed in for the speed on other text", reads="file")
    general_share: float = setting(0.0, "their share of all response tokens", ge=0, lt=1)
    states: Path | None = setting(
        None, "folder that --server writes hidden states into: features come from there, and the target is not opened"
    )
    bench_prompts: int = setting(24, "prompts of the final benchmark; 0 leaves it out, and the page", ge=0)
    bench_tokens: int = setting(128, "longest response in the benchmark, in tokens", gt=1)
    exports: texts.FormatNames = setting(("vllm",), "format to export, several with commas: {formats}; repeatable")
    train: training.TrainBlock = setting({}, "training setting that differs from the method's, as epochs=4; repeatable")

    @property
    def self_prompts(self) -> int:
        """How many questions the target writes itself; 0 for a prompt file. Raises ``UserError``."""
        return texts.self_prompts(self.prompts)

    def train_config(self) -> training.TrainConfig:
        """The method's training settings, with those that were given."""
        own = {"loss": self.loss, "gamma": self.gamma, "seed": self.seed}
        return training.TrainConfig(**{**adaptation(self.method), **own, **self.train})

    def blocks(self) -> dict[str, Any]:
        return {"train": self.train_config(), "private": self.private_size}

    def conflicts(self) -> Iterator[str]:
        yield from super().conflicts()
        if self.responses and (self.server or self.eval_prompts):
            yield "--responses takes served text as it is; --server and --eval-prompts go with --prompts"
        if self.states is not None:
            yield from self._without_layers()
        if self.top_p != 1 and not any(self.temperatures):
            yield "--top-p filters what is sampled, and all --temperatures are 0; raise one, or leave it out"
        if self.responses and self.select_on == "prompts":
            yield "--select-on prompts saves generation, and --responses are written already; leave it out"
        whole = texts.parse_budget(self.budget).whole
        if whole and self.select_on == "prompts":
            yield "--select-on prompts has nothing to choose: a budget of 100% answers them all; give less"
        if whole and self.scorer != type(self).model_fields["scorer"].default:
            yield f"scorer {self.scorer} has nothing to choose: the budget is 100%; give --budget, say 50%"
        if (self.general is None) != (self.general_share == 0):
            yield "--general and --general-share go together: the responses, and their share of all tokens"
        try:
            training.check_bits(self.method, self.private_size)
        except UserError as error:
            yield str(error)
        samplers_of(self.temperatures, self.top_p)

    def _without_layers(self) -> Iterator[str]:
        """What cannot be where the target's layers are at its server alone."""
        if not self.server:
            yield "--states is the folder of a server's hidden states; give --server too, or leave it out"
        if self.bench_prompts:
            yield (
                "--states leaves the target unopened, and the final benchmark would open it; give --bench-prompts 0, "
                "and measure with redraft bench --server"
            )
        if self.self_prompts:
            yield "--states leaves the target unopened, so it cannot write questions here; give --prompts FILE"

    def check_needs(self) -> None:
        """Ask the scorer and the start for what they need, which imports them. Raises ``UserError``."""
        if "base_target" in texts.parse_scorer(self.scorer).needs and self.base_target is None:
            raise UserError(f"scorer {self.scorer} compares the target with its base; give --base-target")
        if "base_target" in texts.start_needs(self.start) and self.base_target is None:
            raise UserError(f"start {self.start} compares the target with its base; give --base-target")


class DistillConfig(AnsweredRun):
    """What ``redraft distill`` does. Every field is a flag of the same name and a key of the YAML file."""

    COMMAND: ClassVar[str] = "distill"
    ONCE: ClassVar[dict[str, dict[str, str]]] = {
        "align": {name: name for name in ("loss", "gamma", "text_share", "seed")},
        "pretrain": {"seed": "seed"},
    }
    LIFTED: ClassVar[tuple[str, ...]] = ("align", "pretrain")

    # the drafter
    draft: str | None = setting(None, "drafter to align as it is, instead of pretraining a new one", reads="model")
    size: str = setting("1/10", "size of a new one: a share of the target (1/10), parameters (15M), or goel")
    layers: int | None = setting(None, "how many layers a new one has", gt=0)
    embeddings: Literal["target", "random"] = setting("target", "what its embeddings start from: target or random")
    tied: bool | None = setting(None, "one table for embedding and head")
    from_layers: tuple[int, ...] = setting((), "layer of the target that it starts from, counted from 0; repeatable")
    private_width: int = setting(0, "train only private experts of this width beside the MLPs of --draft", ge=0)
    # pretraining
    text: tuple[str, ...] = setting((), "text: file, folder, datasets:NAME:CONFIG@SPLIT; repeatable", reads="prompts")
    text_field: str = setting("text", "field of JSON lines and data sets that holds the text")
    heldout_text: str | None = setting(None, "held-out text; by default a share of --text", reads="prompts")
    heldout_share: float = setting(0.01, "share of --text that is held out", gt=0, lt=1)
    pretrain: training.PretrainBlock = setting({}, "pretraining setting, such as tokens=5e6; repeatable")
    # responses
    temperatures: tuple[float, ...] = setting((0.0, 0.3, 0.7, 1.0), "sampling temperature of the answers; repeatable")
    top_p: float = setting(0.95, "nucleus of sampled answers")
    server_only: bool = setting(False, "the target's weights are not here: only config and tokenizer are")
    # alignment
    loss: training.LossName = setting("tvdpp", "training loss: {losses}")
    teacher: Literal["states", "tops", "tokens"] = setting(
        "states", "what the target is known by: states (logits), tops (a server's log-probabilities) or tokens"
    )
    top_logprobs: int = setting(20, "likeliest tokens asked of the server for teacher tops", gt=0)
    text_share: float = setting(0.1, "share of plain text in alignment", ge=0, lt=1)
    store_states: bool = setting(True, "keep the target's states on disk over the epochs")
    align: training.AlignBlock = setting({}, "alignment setting, such as epochs=4; repeatable")
    gamma: int = setting(3, "drafted tokens a round", gt=0)
    exports: texts.FormatNames = setting(("hf",), "format to export, several with commas: {formats}; repeatable")
    # what a source of responses asks for and distillation has no use for
    eval_prompts: ClassVar[None] = None
    bench_prompts: ClassVar[int] = 0
    self_prompts: ClassVar[int] = 0

    def conflicts(self) -> Iterator[str]:
        yield from super().conflicts()
        if not self.text and (self.draft is None or self.text_share > 0):
            yield "give --text to pretrain on and to mix in (with --draft and --text-share 0 none is needed)"
        if self.private_width and self.draft is None:
            yield "private experts stand beside the MLPs of a trained drafter; give it with --draft"
        if self.server_only and self.teacher == "states":
            yield (
                "a server gives no logits to distil from; give the target's weights, or train with --teacher tops "
                "(its top log-probabilities) or --teacher tokens (its answers alone)"
            )
        if self.teacher == "tops" and not self.server or self.server_only and not (self.server or self.responses):
            yield "name the --server that answers and gives log-probabilities"
        if self.server_only and (self.embeddings == "target" or self.from_layers) and self.draft is None:
            yield "without the target's weights a new drafter starts with --embeddings random and no layers"
        samplers_of(self.temperatures, self.top_p)

    def pretrain_config(self) -> training.PretrainConfig:
        """The settings of pretraining."""
        return training.PretrainConfig(**{"seed": self.seed, "precision": self.dtype, **self.pretrain})

    def align_config(self) -> training.DistilConfig:
        """The settings of alignment."""
        own = {"loss": self.loss, "gamma": self.gamma, "text_share": self.text_share, "seed": self.seed}
        return training.DistilConfig(**{**own, "precision": self.dtype, **self.align})

    def blocks(self) -> dict[str, Any]:
        return {"pretrain": self.pretrain_config(), "align": self.align_config()}
