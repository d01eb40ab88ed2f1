"""A warm start does no harm: the fine-tuned target teaches, head rows stay with their tokens, and what is not better on
held-out answers is not what comes out."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from redraft.adaptation.adapt import AdaptRun
from redraft.adaptation.cards import run_card
from redraft.adaptation.models import open_draft
from redraft.data.store import Row
from redraft.decode.engine import PlainDecoder
from redraft.drafts.eagle3 import Eagle3Draft, fresh_draft
from redraft.drafts.files import load_draft, load_private, save_draft, save_private
from redraft.errors import UserError
from redraft.features import FeatureStore
from redraft.loading import tokenizer_hash
from redraft.registries import EXPORTERS, STARTS
from redraft.reports.card import model_card
from redraft.settings.runs import AdaptConfig
from redraft.settings.training import TrainConfig
from redraft.starts.apply import Start, StartContext, StartResult
from redraft.starts.vocabulary import refresh_vocabulary
from redraft.target import Target

IDS = [2, *range(10, 60)]
WORDS = "one two three four five six seven eight nine ten apples pears boxes cost each are there how many".split()


@pytest.fixture(scope="module")
def base(tiny_target: Callable[..., Target]) -> Target:
    return tiny_target(taps=(1, 3, 5))


@pytest.fixture(scope="module")
def tuned(base: Target) -> Target:
    """The base with every weight moved: embedding, layers, norm and head."""
    model, generator = copy.deepcopy(base.model), torch.Generator().manual_seed(1)
    for weight in model.parameters():
        weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
    return Target(model, base.tokenizer, name="tuned", taps=(1, 3, 5))


@pytest.fixture(scope="module")
def rows(tuned: Target) -> list[Row]:
    """The tuned target's own greedy answers."""
    plain, found = PlainDecoder(tuned), []
    for number in range(8):
        prompt = [4 + number, 9, 30 + number]
        done = plain.generate(prompt, 16)
        row = Row(f"p{number}", prompt, done.ids, 0.0, 0, 1.0, 0, done.finish_reason, tuned.content_hash())
        found += [row] if len(done.ids) > 2 else []
    return found


@pytest.fixture(scope="module")
def store(tuned: Target, rows: list[Row], tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    made = FeatureStore(tmp_path_factory.mktemp("warm") / "features", {"target": "tuned"})
    made.build(tuned, rows)
    return made


@pytest.fixture
def world(tmp_path: Path, base: Target, tuned: Target) -> Path:
    """``target`` (tuned), ``draft`` made for the base, ``prompts.jsonl``."""
    tuned.save(tmp_path / "target")
    draft, meta = fresh_draft(base, range(0, 60), seed=1), {"tokenizer_hash": tokenizer_hash(base.tokenizer)}
    save_draft(tmp_path / "draft", draft, meta | {"target": {"name": "base", "hash": base.content_hash()}})
    asked = [f"{' '.join(WORDS[i % 9 : i % 9 + 5])} {i}" for i in range(20)]
    lines = [json.dumps({"id": f"p{i}", "messages": [{"role": "user", "content": t}]}) for i, t in enumerate(asked)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def adapted(world: Path, say: Callable[[str], None] = print, **changes: Any) -> AdaptRun:
    """A whole run on the world."""
    values: dict[str, Any] = {
        "target": str(world / "target"),
        "draft": str(world / "draft"),
        "prompts": str(world / "prompts.jsonl"),
        "out": world / "run",
        "dtype": "float32",
        "max_new_tokens": 16,
        "bench_tokens": 8,
        "bench_prompts": 2,
        "heldout_prompts": 6,
        "rank": 4,
        "gamma": 3,
        "train": {"epochs": 1, "batch_anchors": 128},
        "exports": ("vllm",),
    }
    run = AdaptRun(AdaptConfig(**values | changes), say)
    run.run()
    return run


# -- the teacher -------------------------------------------------------------------------------------------------------
def of_the_base(base: Target, folder: Path) -> Path:
    """A draft as other trainers leave it behind: its config names the base, and it ships the base's embedding."""
    plain = fresh_draft(base, IDS, seed=3)
    draft = Eagle3Draft(replace(plain.config, own_embedding=True), plain.vocabulary())
    table = {"embed_tokens.weight": base.embedding.weight.detach().clone()}
    draft.load_state_dict(plain.state_dict() | table)
    EXPORTERS.get("vllm")(draft, folder, base)
    return folder


def test_the_fine_tuned_target_teaches_whatever_the_checkpoint_names_and_ships(
    base: Target, tuned: Target, rows: list[Row], store: FeatureStore, tmp_path: Path
) -> None:
    opened = open_draft(of_the_base(base, tmp_path / "old"), tuned)
    objective = opened.draft.objective(tuned, TrainConfig())
    ids = opened.draft.vocabulary()
    for row in rows:
        taught = objective.teacher_logits(objective.collate([row], store))
        spoken = torch.tensor([row.prompt_ids + row.response_ids])
        place = slice(len(row.prompt_ids), spoken.shape[1] - 1)
        with torch.no_grad():
            own, old = (model.model(spoken).logits[0, place][:, ids] for model in (tuned, base))
        torch.testing.assert_close(taught, own, rtol=0, atol=1e-4)
        assert (taught - old).abs().max() > 0.1, "the two targets cannot be told apart here"


def test_an_embedding_that_is_not_the_targets_is_kept_and_said(base: Target, tuned: Target, tmp_path: Path) -> None:
    """The draft computes with the table that it was trained with, and nobody takes it for the target's."""
    folder, some = of_the_base(base, tmp_path / "old"), torch.arange(20)
    kept, own = open_draft(folder, tuned), open_draft(folder, base)
    assert torch.equal(kept.draft.embed(some, tuned.embedding), base.embedding(some))
    assert any("keeps the embedding that it ships" in note for note in kept.meta["notes"])
    assert not any("embedding" in note for note in own.meta["notes"])


def test_an_adapted_draft_names_the_target_that_taught_it(world: Path, base: Target, tuned: Target) -> None:
    run = adapted(world)
    record = json.loads((run.folder / "merged" / "redraft.json").read_text())
    assert record["target"]["hash"] == tuned.content_hash() != base.content_hash()
    config = json.loads((run.folder / "export-vllm" / "config.json").read_text())
    assert config["speculators_config"]["verifier"]["name_or_path"] == str(world / "target")
    # And so says its card, with what was measured.
    bench = json.loads((run.folder / "bench.json").read_text())["drafts"]["aligned"]["tau_pooled"]
    for name in ("export-vllm", "merged", "private"):
        card = (run.folder / name / "README.md").read_text()
        assert tuned.content_hash() in card and f"| `aligned` | {bench['value']:.2f} |" in card, name
    card = (run.folder / "export-vllm" / "README.md").read_text()
    assert "vllm serve" in card and "- answers: 12" in card and "`prompts.jsonl`" in card and "Not measured" not in card


# -- the vocabulary ----------------------------------------------------------------------------------------------------
def rows_by_token(draft: Any) -> dict[int, bytes]:
    """The head's row of each token that the draft can say."""
    weight = draft.lm_head.weight.detach().to(torch.bfloat16).view(torch.int16).numpy()
    return {int(token): weight[place].tobytes() for place, token in enumerate(draft.vocabulary())}


def test_a_refreshed_map_takes_the_rows_of_kept_tokens_along(world: Path) -> None:
    """From the old draft to the folder that an engine gets; a frozen head has no other way to change."""
    run = adapted(world, method="fc", start="vocabulary")
    old, new = (rows_by_token(load_draft(path)[0]) for path in (world / "draft", run.folder / "merged"))
    kept = old.keys() & new.keys()
    assert kept and new.keys() - old.keys(), "the map has to change here"
    assert all(new[token] == old[token] for token in kept)
    state = load_file(run.folder / "export-vllm" / "model.safetensors")
    ids = (torch.arange(len(state["d2t"])) + state["d2t"]).tolist()
    served = dict(zip(ids, state["lm_head.weight"].view(torch.int16).numpy(), strict=True))
    assert served.keys() == new.keys() and all(served[token].tobytes() == row for token, row in new.items())


def test_new_rows_are_the_fine_tuned_targets(base: Target, tuned: Target) -> None:
    """Not those of the model that the draft was made for, of which there is no trace at hand."""
    draft = fresh_draft(base, IDS, seed=1)
    text = [Row("a", [4], [5, *range(80, 100), 2], 0.0, 0, 1.0, 0, "stop", "hash")]
    found = refresh_vocabulary(draft, StartContext(tuned, rows=text))
    ids = found.draft.vocabulary().tolist()
    made = found.draft.lm_head.weight[[ids.index(token) for token in found.added]]
    of_tuned, of_base = (target.head.weight[list(found.added)] for target in (tuned, base))
    assert (made - of_tuned).norm() < (made - of_base).norm()


def test_a_private_part_is_not_put_over_a_draft_of_another_map(base: Target, tmp_path: Path) -> None:
    """The same weights under other ids are another draft."""
    draft = fresh_draft(base, IDS, seed=1)
    other = copy.deepcopy(draft)
    other.set_vocabulary(torch.tensor([2, *range(20, 70)]))
    assert torch.equal(other.lm_head.weight, draft.lm_head.weight)
    save_private(tmp_path / "part", draft, ["fc.weight"], draft.base_hash(), {})
    load_private(tmp_path / "part", draft, draft.base_hash())
    with pytest.raises(UserError, match="belongs to the base draft"):
        load_private(tmp_path / "part", other, other.base_hash())


def test_stored_features_know_no_map(base: Target, tuned: Target, rows: list[Row], store: FeatureStore) -> None:
    """Drafts of different maps learn from the same files, each taught at its own ids."""
    taught = {}
    for name, ids in {"one": IDS, "other": list(range(0, 100, 2))}.items():
        objective = fresh_draft(base, ids, seed=1).objective(tuned, TrainConfig())
        logits = objective.teacher_logits(objective.collate([rows[0]], store))
        taught[name] = dict(zip(ids, logits.T, strict=True))
    shared = taught["one"].keys() & taught["other"].keys()
    assert len(shared) > 20
    for token in shared:
        torch.testing.assert_close(taught["one"][token], taught["other"][token], rtol=0, atol=1e-5)


def test_a_run_does_not_go_on_with_a_draft_of_another_map(world: Path, base: Target) -> None:
    run = adapted(world, exports=())
    (run.folder / "train.json").unlink()
    draft, meta = load_draft(world / "draft")
    draft.set_vocabulary(torch.arange(1, 61))
    save_draft(world / "draft", draft, meta)
    with pytest.raises(UserError, match="another old draft"):
        adapted(world, exports=())


# -- never worse -------------------------------------------------------------------------------------------------------
def harm(draft: Any, context: StartContext) -> StartResult:
    """A start that ruins the draft: the head's rows change places."""
    ruined = copy.deepcopy(draft)
    ruined.lm_head.weight.data = ruined.lm_head.weight.data.roll(7, 0)
    return StartResult(ruined, ("lm_head.weight",))


@pytest.fixture
def harmful() -> Any:
    """The start ``harm``, for the time of a test."""
    STARTS.register("harm")(Start(frozenset(), "ruins the draft", harm))
    yield
    del STARTS._entries["harm"]


@pytest.mark.parametrize("method", ["none", "fc"])
def test_what_is_worse_on_held_out_answers_is_not_what_comes_out(world: Path, harmful: Any, method: str) -> None:
    said: list[str] = []
    run = adapted(world, said.append, method=method, start="harm")
    old, _ = load_draft(world / "draft")
    merged, record = load_draft(run.folder / "merged")
    assert record["guard"]["kept"] == "old" and record["guard"]["new"] <= record["guard"]["old"]
    state = old.state_dict()
    assert all(torch.equal(x, state[name].to(x.dtype)) for name, x in merged.state_dict().items())
    served = load_file(run.folder / "export-vllm" / "model.safetensors")
    assert torch.equal(served["lm_head.weight"], state["lm_head.weight"].to(torch.bfloat16))
    assert not (run.folder / "private").exists() and any("the old draft is kept" in line for line in said)
    drafts = json.loads((run.folder / "bench.json").read_text())["drafts"]
    assert list(drafts) == ["stale"], "the draft that was kept is not measured twice"
    assert "this is the base draft, unchanged" in (run.folder / "merged" / "README.md").read_text()
    assert record["method"] is None, "it is not this run's method that made it"


def test_what_is_better_comes_out_and_both_figures_are_kept(world: Path) -> None:
    run = adapted(world, start="vocabulary", exports=())
    guard = load_draft(run.folder / "merged")[1]["guard"]
    assert guard["kept"] == "new" and guard["new"] > guard["old"] and guard["prompts"] == 6 and guard["gamma"] == 3
    card = model_card(run_card(run.folder, "merged", run.aligned, run.target))
    assert f"tau {guard['old']:.3f} before, {guard['new']:.3f} after" in card
