"""Good checkpoints of many hands: what mutations start from, each with what it means before it is changed.

The trainers' own from the tests' cases, exports of ours in every format, EAGLE-1 and drafts of our own format with
their private parts, and a language model as a standalone draft.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from trainers.compare import Lender
from transformers import LlamaConfig

from mutating.answers import Input
from redraft.drafts.files import save_draft
from redraft.drafts.opening import OpenDraft, open_checkpoint
from redraft.errors import UserError
from redraft.loading import read_facts
from redraft.registries import EXPORTERS, FAMILIES
from redraft.target import Facts

ARTIFACTS = Path(__file__).parents[2] / "tests" / "artifacts"
TRAINERS = ARTIFACTS / "trainers"

# Drafts that are written in every format: two kinds of norms, several layers with windows, q and k norms, biases.
EXPORTED = (
    "specforge-0.2.0-fc-norm",
    "speculators-0.9.0-layers-3-windows",
    "speculators-0.9.0-qwen3-layers-2-window",
    "modelopt-0.47.0-all",
    "safeailab-1.2.1-eagle1",
)


@dataclass
class Source:
    """A good checkpoint in ``folder``. ``fields`` and ``state`` are its config and tensors as the package names them,
    private parts merged; ``raw`` is its JSON file."""

    name: str
    folder: Path
    facts: Facts
    lender: Any
    given: Input
    options: dict[str, Any] = field(default_factory=dict)
    base: Path | None = None
    family: str = ""
    fields: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)
    trainer: str = ""

    @property
    def json(self) -> str:
        """The name of its JSON file."""
        return "redraft.json" if (self.folder / "redraft.json").is_file() else "config.json"

    @property
    def raw(self) -> dict[str, Any]:
        values: dict[str, Any] = json.loads((self.folder / self.json).read_text())
        return values

    @property
    def own(self) -> bool:
        """Whether it is of the package's own format."""
        return self.json == "redraft.json"

    @property
    def weights(self) -> Path:
        """Its one file of tensors."""
        return next(p for p in sorted(self.folder.iterdir()) if p.suffix in (".safetensors", ".bin"))

    def opened(self, folder: Path | None = None) -> OpenDraft:
        """Open it, or what became of it in ``folder``, as every command does."""
        return open_checkpoint(folder or self.folder, self.facts, self.base, **self.options)

    def learnt(self) -> Source:
        """With what it means, as it is opened now."""
        opened = self.opened()
        draft = opened.draft.float().merged()
        self.family, self.fields = draft.family, fields_of(draft)
        self.state = {name: tensor.clone() for name, tensor in draft.state_dict().items()}
        self.trainer = str(opened.meta.get("trainer") or "")
        return self


def fields_of(draft: Any) -> dict[str, Any]:
    """The fields of a draft's config, also those that its file would leave out."""
    found = {name: getattr(draft.config, name) for name in type(draft.config).__dataclass_fields__}
    return found | {"taps": list(draft.taps)}


def _borrowed(facts: Facts) -> tuple[Any, Input]:
    """A lender of drawn tables for a target of which there are only facts, and the input on it."""
    generator = torch.Generator().manual_seed(5)
    shape = (facts.vocab_size, facts.hidden_size)
    tables = [torch.randn(*shape, generator=generator) for _ in range(2)]
    given = Input.drawn(facts.layers, *tables)

    class Drawn:
        embedding = nn.Embedding.from_pretrained(tables[0])
        head = nn.Linear(*reversed(shape), bias=False).requires_grad_(False)

        def scale_logits(self, logits: Tensor) -> Tensor:
            return logits

    Drawn.head.weight.copy_(tables[1])
    return Drawn(), given


def _trainers(wanted: tuple[str, ...] | None) -> Iterator[Source]:
    """The cases of the tests that come in, with their targets."""
    targets: dict[str, tuple[Facts, Any, Input]] = {}
    for path in sorted(TRAINERS.glob("*/case.json")):
        case, folder = json.loads(path.read_text()), path.parent
        if "refused" in case or (wanted is not None and folder.name not in wanted):
            continue
        target = TRAINERS / case["target"]
        if case["target"] not in targets:
            facts, lender = read_facts(str(target), tokenizer=False), Lender(target)
            tables = lender.embedding.weight.detach(), lender.head.weight.detach()
            targets[case["target"]] = facts, lender, Input.drawn(facts.layers, *tables)
        options = dict(case.get("given", {})) | ({"trainer": case["ask"]} if "ask" in case else {})
        source = Source(folder.name, folder / "checkpoint", *targets[case["target"]], options)
        try:
            yield source.learnt()
        except UserError:
            continue  # the test of the cases says so


def _artifacts() -> Iterator[Source]:
    """Drafts of the own format as earlier versions wrote them, and their private parts."""
    for name in ("schema1", "eagle1", "coarse"):
        config = json.loads((ARTIFACTS / name / "draft" / "redraft.json").read_text())["config"]
        sizes = {
            "hidden_size": config["hidden_size"],
            "num_hidden_layers": 12,
            "vocab_size": config["target_vocab_size"],
        }
        facts = Facts("", LlamaConfig(**sizes, num_attention_heads=1, max_position_embeddings=512))
        made = (facts, *_borrowed(facts))
        yield Source(f"{name} draft", ARTIFACTS / name / "draft", *made).learnt()
        yield Source(f"{name} private", ARTIFACTS / name / "private", *made, base=ARTIFACTS / name / "draft").learnt()


def sources(scratch: Path, wanted: tuple[str, ...] | None = None) -> list[Source]:
    """All good checkpoints; what has to be written first lies in ``scratch``. ``wanted`` names trainers' cases, others
    are left out."""
    found = list(_trainers(wanted))
    for source in [source for source in found if source.name in EXPORTED]:
        draft = source.opened().draft
        place = scratch / "own" / source.name
        save_draft(place, draft, {})
        more = [Source(f"{source.name} as redraft", place, source.facts, source.lender, source.given)]
        for name in FAMILIES.get(draft.family).writers:
            place = scratch / name / source.name
            try:
                EXPORTERS.get(name)(draft, place, source.facts)
            except UserError:
                continue  # a draft that this engine does not compute
            if (place / "config.json").is_file():
                more.append(Source(f"{source.name} as {name}", place, source.facts, source.lender, source.given))
        for one in more:
            try:
                found.append(one.learnt())
            except UserError as error:
                # SpecForge's own key has two readings; its name settles it.
                if "--trainer" not in str(error):
                    raise
                one.options = {"trainer": "specforge"}
                found.append(one.learnt())
    return [*found, *_artifacts(), _language_model()]


def _language_model() -> Source:
    """A small Llama with its tokenizer, as a standalone draft of itself."""
    folder = ARTIFACTS / "run" / "target"
    facts = read_facts(str(folder))
    source = Source("language model", folder, facts, *_borrowed(facts), family="standalone")
    source.fields, source.state = source.raw, load_file(source.weights)
    return source


def copied(source: Source, place: Path) -> Path:
    """The source's folder anew in ``place``, whose tensors lie in one file of safetensors or of torch's older kind."""
    shutil.copytree(source.folder, place)
    return place
