"""The check names what is wrong: every fault here is really there, in a draft's file or in a server, one at a time."""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import redraft as api
from redraft.adaptation.check.causes import CAUSES
from redraft.adaptation.check.rounds import Round, Rounds, gain
from redraft.adaptation.check.static import cause_of
from redraft.adaptation.check.trials import ground
from redraft.cli.commands import COMMANDS as KINDS
from redraft.data.store import row_key
from redraft.decode.engine import ChainDecoder
from redraft.errors import UserError
from redraft.evaluate.speed import Prompt
from redraft.registries import EXPORTERS, FAMILIES
from redraft.settings.texts import ENGINES

pytest.importorskip("httpx")
pytest.importorskip("prometheus_client")

RIG = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("check_rig.py"))))
TARGET = str(RIG.PAIR / "target")
COMMANDS = {kind.COMMAND for kind in KINDS}


@pytest.fixture(scope="module")
def target() -> Any:
    return RIG.model("target")


@pytest.fixture
def check(target: Any) -> Callable[..., Any]:
    """``check(draft, ...)`` -> the result, on the twelve prompts."""

    def run(draft: Any, **more: Any) -> Any:
        given = {"prompts": RIG.ASKS, "limit": RIG.PROMPTS, "max_new_tokens": RIG.TOKENS, "gamma": RIG.GAMMA}
        given |= more
        if given.get("base_target") == str(RIG.PAIR / "base"):
            given["base_target"] = RIG.model("base")
        return api.check(draft, target, **given)

    return run


@pytest.fixture
def engine() -> Iterator[Callable[..., Any]]:
    started: list[Any] = []

    def make(**fault: Any) -> Any:
        started.append(RIG.Engine(**fault))
        return started[-1]

    yield make
    for one in started:
        one.stop()


# -- planted ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", RIG.FILES)
def test_what_is_wrong_with_a_file_is_named(name: str, check: Any, tmp_path: Path) -> None:
    planted = RIG.FILES[name]
    asked = {"prompts": RIG.other_prompts(tmp_path / "other.jsonl")} if planted.other else {}
    found = check(planted.write(tmp_path / "draft"), **planted.more, **asked)
    assert found.cause == planted.cause, found


@pytest.mark.parametrize("name", RIG.ENGINES)
def test_what_is_wrong_at_a_server_is_named(name: str, check: Any, engine: Any, tmp_path: Path) -> None:
    cause, draft, fault = RIG.served(name, tmp_path / "draft")
    found = check(draft, server=engine(**fault).url)
    assert found.cause == cause, found


def test_enough_causes_are_told_apart() -> None:
    planted = {each.cause for each in RIG.FILES.values()} | {cause for cause, _ in RIG.ENGINES.values()}
    assert len(planted - {None}) >= 20 and planted - {None} <= set(CAUSES)


def test_a_stale_draft_at_a_server_that_does_nothing_wrong_is_stale(check: Any, engine: Any) -> None:
    found = check(RIG.PAIR / "stale", server=engine(name="stale").url)
    assert found.cause == "stale" and len(found.findings) == 1, found
    assert found.there["tau"] == found.here["tau"]


# -- the file alone --------------------------------------------------------------------------------------------------
@pytest.fixture
def plain(tmp_path: Path) -> Callable[..., Path]:
    """``plain(...)`` -> a folder as trainers write it, with these keys of its config.json changed."""

    def write(**changes: Any) -> Path:
        target = RIG.model("target")
        folder = tmp_path / "plain"
        EXPORTERS.get("plain")(RIG.draft_of("aligned", target), folder, target.facts)
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return folder

    return write


def test_two_readings_of_a_file_are_laid_side_by_side(check: Any, plain: Any) -> None:
    folder = plain(norm_before_residual=True)
    found = check(folder, engine="sglang", prompts=None)
    assert found.cause == "norm_side" and found.here is None
    apart = {line.what: (line.ours, line.theirs) for line in found.static.lines if line.differs}
    assert apart["norm_before_residual"] == ("true", "false")
    assert "norm_before_residual" in str(found) and found.findings[0].words in str(found)
    assert json.loads(json.dumps(found.to_dict()))["cause"] == "norm_side"
    assert check(folder, engine="vllm-0.33", prompts=None).cause is None


def test_taps_in_one_list_alone_are_told_to_the_engine_that_reads_the_other(check: Any, plain: Any) -> None:
    folder = plain(eagle_config=None)
    assert check(folder, engine="vllm-0.32", prompts=None).cause is None
    assert check(folder, engine="sglang", prompts=None).cause == "other_layers"


def test_a_file_that_the_engine_does_not_load_is_said_to_be_none(check: Any, plain: Any) -> None:
    found = check(RIG.PAIR / "aligned", engine="vllm-0.33", prompts=None)
    assert found.cause == "refused" and "redraft's own format" in found.findings[0].evidence
    found = check(plain(architectures=["LlamaEagle3DraftModel"]), engine="vllm-0.33", prompts=None)
    assert found.cause == "refused"


def test_a_path_that_changes_the_method_is_noted(check: Any, plain: Any, tmp_path: Path) -> None:
    folder = plain().rename(tmp_path / "my-eagle3-draft")
    assert any("vLLM reads a method out of the eagle3" in note for note in check(folder, prompts=None).notes)


def test_what_an_engine_reads_otherwise_does_no_harm_where_its_server_accepts_as_much(
    check: Any, engine: Any, plain: Any
) -> None:
    found = check(plain(eagle_config=None), engine="sglang", server=engine().url)
    assert found.cause is None and any("accepts what is accepted here" in note for note in found.notes)


def test_how_the_servers_engine_reads_the_file_is_looked_up(check: Any, engine: Any, plain: Any) -> None:
    found = check(plain(norm_before_residual=True), server=engine().url)
    assert found.static.reader == "vLLM 0.33" and not any(line.differs for line in found.static.lines)
    assert found.cause == "norm_side"  # the file says so, and the draft was trained without: both are low, or one is


def test_the_commands_choices_are_those_of_the_families() -> None:
    assert {engine for _, family in FAMILIES.items() for engine in family.readers} == set(ENGINES)


# -- the parts -------------------------------------------------------------------------------------------------------
def test_a_changed_draft_leaves_the_one_it_is_made_of_as_it_was() -> None:
    target = RIG.model("target")
    draft = RIG.draft_of("aligned", target)
    state = {name: tensor.clone() for name, tensor in draft.state_dict().items()}
    config, parts = draft.config, dict(draft.named_modules())
    for suspect in FAMILIES.get("eagle3").suspects(draft, target, (), None):
        assert suspect.draft is not draft and {suspect.cause, suspect.served} <= set(CAUSES)
        shared = {p.data_ptr() for p in draft.parameters()} & {p.data_ptr() for p in suspect.draft.parameters()}
        assert len(shared) >= 10  # no copies of the weights
    assert draft.config == config and dict(draft.named_modules()) == parts
    assert all(torch.equal(tensor, state[name]) for name, tensor in draft.state_dict().items())


def test_rounds_count_in_full_as_engines_count_them() -> None:
    target = RIG.model("target")
    draft = RIG.draft_of("aligned", target)
    prompts = [Prompt("a", RIG.letters_prompt(target, "ABCDEFGH")), Prompt("b", RIG.letters_prompt(target, "LKJIHGFE"))]
    with ground(target, draft, prompts, RIG.GAMMA, 24) as place:
        here = place.rounds(draft)
        assert {row.key: len(row.response_ids) for row in place.rows} == dict.fromkeys(here.by_key, 24 + RIG.GAMMA)
    decoder = ChainDecoder(target, draft, RIG.GAMMA)
    for prompt in prompts:
        done, accepted, produced = decoder.generate(prompt.ids, 24 + RIG.GAMMA + 1), [], 1
        for one in done.rounds:
            if produced < 24:
                accepted.append(one.accepted)
            produced += one.accepted + 1
        assert [one.accepted for one in here.by_key[row_key(prompt.id, 0.0)]] == accepted
    tokens, rounds = here.counts(here.keys)
    assert here.tau().value == pytest.approx(sum(tokens) / sum(rounds))
    assert here.conditional()[0] == pytest.approx(here.accepted()[0] / sum(rounds))


def test_a_gain_must_be_sure_and_much() -> None:
    def rounds(*accepted: list[int]) -> Rounds:
        return Rounds(4, {str(i): [Round(0, a) for a in line] for i, line in enumerate(accepted)})

    keys = [str(i) for i in range(8)]
    low, high = rounds(*[[1, 1, 1]] * 8), rounds(*[[2, 2, 2]] * 8)
    assert gain(high, low, keys) == (1.0, True) and gain(low, high, keys) == (-1.0, False)
    odd = rounds(*[[1, 1, 1]] * 7, [4, 4, 4])  # one prompt alone gains
    assert gain(odd, low, keys)[0] > 0.3 and not gain(odd, low, keys)[1]
    little = rounds(*[[1] * 19 + [2]] * 8)
    assert gain(little, rounds(*[[1] * 20] * 8), keys) == (pytest.approx(0.05), False)


@pytest.mark.parametrize(
    ("ours", "theirs", "cause"),
    [
        ((2, 3, 5), (3, 4, 6), "layers_off_by_one"),
        ((2, 3, 5), (1, 2, 4), "layers_off_by_one"),
        ((2, 3, 5), (5, 3, 2), "layers_in_other_order"),
        ((2, 3, 5), (2, 3, 4), "other_layers"),
        ((2, 3, 5), (3, 4), "other_layers"),
    ],
)
def test_how_lists_of_layers_differ(ours: Any, theirs: Any, cause: str) -> None:
    assert cause_of("taps", ours, theirs) == cause


def test_the_page_has_every_cause_in_its_own_words() -> None:
    page = (RIG.HERE.parents[1] / "docs" / "acceptance.md").read_text()
    for cause in CAUSES.values():
        assert f"| `{cause.id}` | {cause.words} | {cause.shows} |" in page, cause.id


@pytest.mark.parametrize("cause", CAUSES.values(), ids=lambda cause: cause.id)
def test_what_mends_a_cause_is_a_command_or_plain_words(cause: Any) -> None:
    known = {"draft": "d", "target": "t", "prompts": "p", "server": "s", "gamma": "3", "option": "--taps 2,3,5"}
    assert "{" not in cause.mended(**known) and cause.words[0].islower()
    for command in re.findall(r"redraft [a-z-]+", cause.mended(**known)):
        assert command.split()[1] in COMMANDS, command


# -- the command -----------------------------------------------------------------------------------------------------
def test_the_command_prints_the_cause_and_writes_everything(redraft: Any, tmp_path: Path) -> None:
    draft = RIG.FILES["layers one too high"].write(tmp_path / "draft")
    words = ["check", str(draft), "--target", TARGET, "--dtype", "float32", "--prompts", str(RIG.ASKS)]
    code, out, err = redraft([*words, "--limit", "8", "--max-new-tokens", "32", "--json", str(tmp_path / "check.json")])
    assert code == 0, err
    assert CAUSES["layers_off_by_one"].words in out and "--taps 2,3,5" in out
    written = json.loads((tmp_path / "check.json").read_text())
    assert written["schema"] == "redraft.check/1" and written["cause"] == "layers_off_by_one"
    assert written["findings"][0]["mend"].startswith("redraft import")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("check nowhere/at/all --target {target}", "nowhere/at/all does not exist"),
        ("check {draft} --target {target} --for llamafile", "unknown engine 'llamafile'"),
        ("check {draft} --target {target} --server http://127.0.0.1:1", "nothing to ask the server"),
        ("check {draft} --target {target} --server http://127.0.0.1:1 --prompts {asks}", "is it up?"),
        ("check {draft} --target {target} --server-model x --prompts {asks}", "give --server too"),
        ("check {draft} --target {target} --base-target {target}", "is measured on prompts"),
        ("check {draft} --target {target} --prompts {asks} --json {folder}", "a folder; name another"),
        ("check {draft} --target {target} --prompts {asks} --gamma 0", "gamma must be above 0"),
    ],
)
def test_bad_input_is_one_line(words: str, said: str, redraft: Any, tmp_path: Path) -> None:
    places = {"draft": RIG.PAIR / "aligned", "target": TARGET, "asks": RIG.ASKS, "folder": tmp_path}
    code, _, err = redraft(words.format(**places))
    last = err.strip().splitlines()[-1]
    assert code == 2 and said in last and "Traceback" not in err, err


def test_a_draft_of_another_vocabulary_is_of_another_tokenizer(check: Any, plain: Any) -> None:
    assert check(plain(vocab_size=50000), prompts=None).cause == "other_tokenizer"


def test_a_damaged_draft_is_refused_and_not_judged(check: Any, plain: Any) -> None:
    folder = plain()
    (folder / "model.safetensors").write_bytes(b"12345678")
    with pytest.raises(UserError, match=r"model\.safetensors"):
        check(folder, prompts=None)
