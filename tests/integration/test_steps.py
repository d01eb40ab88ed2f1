"""The steps behind the commands, run through the command line on a tiny random model: files in, files out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from redraft.adaptation import merged_target
from redraft.adaptation.models import TargetSpec, target_info
from redraft.api.steps import regenerate
from redraft.data.generate import Completion
from redraft.data.store import read_rows
from redraft.drafts.eagle3 import fresh_draft
from redraft.drafts.files import load_draft, save_draft
from redraft.drafts.opening import open_checkpoint
from redraft.loading import load_tokenizer, tokenizer_hash
from redraft.selection.manifest import read_manifest
from redraft.target import Target

WORDS = "the rain in the north is on the river and the stone is in the hand of one man".split()


def furnish(folder: Path, target: Target) -> None:
    """A fine-tuned target, its base, a draft, prompts and the target's responses to them."""
    folder.mkdir()
    target.save(folder / "base")
    generator = torch.Generator().manual_seed(1)
    for weight in target.model.parameters():
        weight.data += 0.02 * torch.randn(weight.shape, generator=generator)
    target.save(folder / "target")
    draft = fresh_draft(target, list(range(4, 100)), seed=0, intermediate=32)
    meta = {"target": {"name": "target", "hash": target.content_hash()}, "method": "scratch"}
    save_draft(folder / "draft", draft, meta | {"tokenizer_hash": tokenizer_hash(target.tokenizer)})
    lines = [{"id": f"p{i}", "messages": [{"role": "user", "content": " ".join(WORDS[i : i + 4])}]} for i in range(12)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    spec = TargetSpec(str(folder / "target"), "float32")
    regenerate(spec, folder / "prompts.jsonl", folder / "responses.jsonl", max_new_tokens=12)


@pytest.fixture
def place(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_target: Callable[..., Target],
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """The working folder, with a copy of what :func:`furnish` makes once."""
    made = tmp_path_factory.getbasetemp() / "steps"
    if not made.exists():
        furnish(made, tiny_target(seed=0, taps=(1, 3, 5)))
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


REGENERATE = "regenerate --target target --prompts prompts.jsonl --max-new-tokens 12 --dtype float32 --out"


def test_a_target_that_cannot_be_opened_leaves_responses_and_failures_as_they_were(place: Path, redraft: Any) -> None:
    responses = place / "responses.jsonl"
    responses.write_bytes(b"".join(responses.read_bytes().splitlines(keepends=True)[:5]))
    (place / "target/model.safetensors").write_bytes((place / "target/model.safetensors").read_bytes() + b"\0")
    before = {path: path.read_bytes() for path in place.glob("responses*")}
    code, _, err = redraft(f"{REGENERATE} responses.jsonl")
    assert code == 2 and "a weight file is damaged" in err
    assert before == {path: path.read_bytes() for path in place.glob("responses*")}


def test_regenerate_goes_on_where_it_stopped(place: Path, redraft: Any) -> None:
    responses = place / "responses.jsonl"
    whole = read_rows(responses)
    assert {row.id for row in whole} == {f"p{i}" for i in range(12)}
    responses.write_bytes(b"".join(responses.read_bytes().splitlines(keepends=True)[:5]))
    code, out, _ = redraft(f"{REGENERATE} responses.jsonl")
    assert code == 0 and "12 responses, 5 of them already there" in out
    assert sorted(read_rows(responses), key=lambda r: r.key) == sorted(whole, key=lambda r: r.key)


MOODY = "{% if mood is defined %}mood {{ mood }}\n{% endif %}on {{ strftime_now('%Y') }}\n"


@pytest.fixture
def moody(place: Path) -> Path:
    """The target's template takes an argument and writes the year."""
    template = place / "target" / "chat_template.jinja"
    template.write_text(MOODY + template.read_text())
    return place


def test_template_arguments_and_the_date_reach_prompts_and_records(moody: Path, redraft: Any) -> None:
    assert redraft(f"{REGENERATE} r.jsonl --template-arg mood=good")[0] == 0
    tokenizer, year = load_tokenizer("target"), json.loads((moody / "r.date.json").read_text())["date"][:4]
    assert {tokenizer.decode(row.prompt_ids)[:18] for row in read_rows(moody / "r.jsonl")} == {
        f"mood good\non {year}\n"
    }
    code, _, error = redraft(f"{REGENERATE} r.jsonl --template-arg mood=bad")
    assert code == 2 and "was made with another prompt" in error
    code, _, error = redraft(f"{REGENERATE} r.jsonl --template-arg moon=full")
    assert code == 2 and "knows no argument 'moon'" in error and error.count("\n") == 1
    bench = "bench --target target --draft draft --prompts prompts.jsonl --limit 2 --max-new-tokens 4 --dtype float32"
    assert redraft(f"{bench} --template-arg mood=3 --out b.json")[0] == 0
    record = json.loads((moody / "b.json").read_text())["provenance"]["template"]
    assert record["arguments"] == {"mood": 3} and record["date"].startswith("20")


@pytest.mark.parametrize(
    "scorer",
    [
        "random",
        "length",
        "rejection --target target --draft draft",
        "shift:metric=l2,layer=3 --target target --base-target base",
        "coverage:base=shift,base.pooling=last --target target --base-target base",
    ],
)
def test_select_from_responses(place: Path, redraft: Any, scorer: str) -> None:
    command = "select --responses responses.jsonl --budget 4 --out m.json --keep kept.jsonl --dtype float32 --scorer"
    code, out, err = redraft(f"{command} {scorer}")
    assert code == 0, err
    manifest = read_manifest(place / "m.json")
    assert len(manifest.selected_keys) == 4 and out.splitlines()[-1].startswith("4 of ")
    assert {row.key for row in read_rows(place / "kept.jsonl")} == set(manifest.selected_keys)


@pytest.mark.parametrize("scorer", ["shift", "rejection", "entropy", "length", "random", "coverage"])
def test_select_from_prompts_alone(place: Path, redraft: Any, scorer: str) -> None:
    command = (
        f"select --prompts prompts.jsonl --scorer {scorer} --target target --base-target base --draft draft --budget 3"
    )
    code, _, err = redraft(f"{command} --dtype float32 --out m.json --keep kept.jsonl")
    assert code == 0, err
    kept = [json.loads(line) for line in (place / "kept.jsonl").read_text().splitlines()]
    assert {item["id"] for item in kept} == set(read_manifest(place / "m.json").selected_keys)
    assert redraft(f"{REGENERATE.replace('prompts.jsonl', 'kept.jsonl')} few.jsonl")[0] == 0
    assert len(read_rows(place / "few.jsonl")) == 3


TRAIN = (
    "train --target target --responses responses.jsonl --heldout 3 --epochs 1 --batch-anchors 40 --dtype float32 "
    "--private-width 8 --setting optimizer=adamw --out run"
)


def test_train_merge_export_and_back(place: Path, redraft: Any) -> None:
    code, out, err = redraft(f"{TRAIN} --draft draft --method eda")
    assert code == 0, err
    assert "held-out tau" in out
    stages = {entry["stage"]: entry for entry in json.loads((place / "run/ledger.json").read_text())["stages"]}
    assert stages["features"]["tokens"] > 0 and stages["train"]["flops"] > 0
    assert (place / "run/private/private.safetensors").stat().st_size < 20_000

    code, _, err = redraft("merge --private run/private --base-draft draft --out merged")
    assert code == 0, err
    merged, _ = load_draft(place / "merged")
    trained, _ = load_draft(place / "run/merged")
    assert merged.config == trained.config and merged.config.private_width == 0
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor.float(), trained.state_dict()[name].float(), rtol=0, atol=0.02)

    exported = "export --draft run/private --base-draft draft --target target --format"
    for name in ("vllm", "plain"):
        code, out, err = redraft(f"{exported} {name} --out {name}")
        assert code == 0, err
        assert "serve with: vllm serve target" in out
        back = open_checkpoint(place / name, target_info("target")).draft
        state = back.state_dict()
        table = state.pop("embed_tokens.weight", None)  # a copy of the target's, which the speculators package asks for
        assert (table is not None) == (name == "vllm")
        for key, tensor in state.items():
            assert torch.equal(tensor, merged.state_dict()[key]), key


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """``no_model()``: from then on a model that is opened is an error."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model was opened")

    return lambda: monkeypatch.setattr("redraft.loading.targets.load_model", refuse)


def test_with_all_features_stored_training_opens_the_head_alone(
    place: Path, redraft: Any, no_model: Callable[[], None]
) -> None:
    """Begun anew on them it ends with the same bits; without one row's, the model is opened as before."""
    command = f"{TRAIN} --draft draft --method eda"
    code, _, err = redraft(command)
    assert code == 0, err
    expected, _ = load_draft(place / "run/merged")
    for done in ("train", "merged", "private"):
        shutil.rmtree(place / "run" / done)
    no_model()
    code, _, err = redraft(command)
    assert code == 0, err
    again, meta = load_draft(place / "run/merged")
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in again.state_dict().items())
    assert meta["target"]["hash"] == read_rows(place / "responses.jsonl")[0].target_hash
    shutil.rmtree(place / "run/features")
    code, out, err = redraft(command)
    assert code != 0 and "the model was opened" in out + err


def test_a_server_answers_for_a_target_of_which_only_the_facts_are_read(
    place: Path, no_model: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Engine:
        def __init__(self, *args: Any, vocab_size: int, **kwargs: Any) -> None:
            assert vocab_size == 128

        def answer(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
            yield from (Completion(request, [9, 2], "stop") for request in requests)

    monkeypatch.setattr("redraft.api.steps.ServerEngine", Engine)
    no_model()
    spec, out = TargetSpec(str(place / "target"), "float32"), place / "served.jsonl"
    report = regenerate(spec, place / "prompts.jsonl", out, max_new_tokens=12, server="http://127.0.0.1:9")
    assert report.new == 12
    (hash,) = {row.target_hash for row in read_rows(place / "served.jsonl")}
    assert hash == read_rows(place / "responses.jsonl")[0].target_hash, "that of the weights, as in process"


def test_train_from_nothing(place: Path, redraft: Any) -> None:
    code, out, err = redraft(f"{TRAIN} --from-nothing --vocabulary 64")
    assert code == 0, err
    draft, meta = load_draft(place / "run/draft")
    assert draft.config.draft_vocab_size == 64
    assert f"{meta['heldout']['tau']['value']:.2f}" in out


def test_probe_bench_and_report(place: Path, redraft: Any) -> None:
    common = "--target target --prompts prompts.jsonl --max-new-tokens 12 --limit 4 --dtype float32"
    code, out, err = redraft(f"probe {common} --gamma 3 --draft draft --base-target base --json probe.json")
    assert code == 0, err
    found = json.loads((place / "probe.json").read_text())
    assert found["prompts"] == 4 and found["reference_tau"]["value"] >= 1
    assert found["verdict"] in out and found["advice"][:30] in " ".join(out.split())

    code, out, err = redraft(f"bench {common} --shape chain:3 --draft one=draft --draft two=draft --out bench.json")
    assert code == 0, err
    result = json.loads((place / "bench.json").read_text())
    assert list(result["drafts"]) == ["one", "two"] and result["setup"]["prompts"] == 4
    assert "two over one" in result["gains"] and "speed-up" in out
    code, _, err = redraft("report bench.json --out page.html")
    assert code == 0, err
    assert "two over one" in (place / "page.html").read_text()


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (f"{TRAIN} --draft draft --method none", "trains nothing"),
        (f"{TRAIN.replace('--heldout 3', '--heldout 99')} --draft draft", "0 are left to train on"),
        (f"{TRAIN} --draft draft --heldout-responses responses.jsonl", "held-out prompts are trained on"),
        (f"{TRAIN} --from-nothing --heldout-responses responses.jsonl", "--heldout"),
        ("export --draft run/private --target target --format vllm --out x", "run/private"),
        ("bench --target target --draft gone --prompts prompts.jsonl --out b.json", "gone"),
        ("select --prompts prompts.jsonl --scorer rejection --target target --out m.json", "give --draft"),
        (
            "select --prompts prompts.jsonl --scorer coverage:base=shift --target target --out m.json",
            "give --base-target",
        ),
        ("select --prompts prompts.jsonl --scorer entropy --out m.json", "give --target"),
        ("select --responses responses.jsonl --scorer shift:metric=l1 --out m.json", "shift metric 'l1'"),
        ("regenerate --target draft --prompts prompts.jsonl --out r.jsonl", "draft"),
    ],
)
def test_mistakes(place: Path, redraft: Any, command: str, says: str) -> None:
    code, _, err = redraft(command)
    assert code == 2
    last = err.splitlines()[-1]
    assert last.startswith("redraft: error: ") and says in last


def test_an_export_names_the_merged_target_where_that_is_an_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merged_target, "split_adapter", lambda target, adapter: ("base", target))
    line = 'vllm serve maths --speculative-config \'{"model": "maths-draft"}\''
    assert merged_target.served(line, "maths") == line.replace("serve maths", "serve merged-target")
    assert merged_target.merging("maths")[0].startswith("redraft merge-target --target base --adapter maths")


def test_a_private_part_needs_its_base_and_a_public_draft_a_target(place: Path, redraft: Any) -> None:
    assert redraft(f"{TRAIN} --draft draft --method fc")[0] == 0
    code, _, err = redraft("export --draft run/private --target target --format vllm --out x")
    assert code == 2 and "--base-draft" in err
    assert redraft("export --draft draft --target target --format plain --out public")[0] == 0
    code, _, err = redraft("merge --private run/private --base-draft public --out x")
    assert code == 2 and "--target" in err
    draft = open_checkpoint("public", target_info("target")).draft
    assert draft.config.draft_vocab_size == 96
