"""The settings of ``redraft distill``, from flags or one YAML file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from redraft.settings.base import setting
from redraft.settings.common import AnsweredRun
from redraft.settings.sampler import samplers_of
from redraft.settings.texts import FormatName
from redraft.settings.training import AlignBlock, DistilConfig, LossName, PretrainBlock, PretrainConfig


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
    text: tuple[str, ...] = setting(
        (), "plain text: file, folder, datasets:NAME:CONFIG@SPLIT; repeatable", reads="prompts"
    )
    text_field: str = setting("text", "field of JSON lines and data sets that holds the text")
    heldout_text: str | None = setting(None, "held-out text; by default a share of --text", reads="prompts")
    heldout_share: float = setting(0.01, "share of --text that is held out", gt=0, lt=1)
    pretrain: PretrainBlock = setting({}, "pretraining setting, such as tokens=5e6; repeatable")
    # responses
    temperatures: tuple[float, ...] = setting((0.0, 0.3, 0.7, 1.0), "sampling temperature of the answers; repeatable")
    top_p: float = setting(0.95, "nucleus of sampled answers")
    server_only: bool = setting(False, "the target's weights are not here: only config and tokenizer are")
    # alignment
    loss: LossName = setting("tvdpp", "training loss: {losses}")
    teacher: Literal["states", "tops", "tokens"] = setting(
        "states", "what the target is known by: states (logits), tops (a server's log-probabilities) or tokens"
    )
    top_logprobs: int = setting(20, "likeliest tokens asked of the server for teacher tops", gt=0)
    text_share: float = setting(0.1, "share of plain text in alignment", ge=0, lt=1)
    store_states: bool = setting(True, "keep the target's states on disk over the epochs")
    align: AlignBlock = setting({}, "alignment setting, such as epochs=4; repeatable")
    gamma: int = setting(3, "drafted tokens a round", gt=0)
    exports: tuple[FormatName, ...] = setting(("hf",), "format to export: {formats}; repeatable")
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

    def pretrain_config(self) -> PretrainConfig:
        """The settings of pretraining."""
        return PretrainConfig(**{"seed": self.seed, "precision": self.dtype, **self.pretrain})

    def align_config(self) -> DistilConfig:
        """The settings of alignment."""
        own = {"loss": self.loss, "gamma": self.gamma, "text_share": self.text_share, "seed": self.seed}
        return DistilConfig(**{**own, "precision": self.dtype, **self.align})

    def blocks(self) -> dict[str, Any]:
        return {"pretrain": self.pretrain_config(), "align": self.align_config()}
