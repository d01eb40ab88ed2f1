"""What follows from the settings: a YAML template, a plan with its costs, checks of places; and merged targets."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import peft
import pytest
import torch
from typer.main import get_command

from redraft.adaptation.merged_target import adapter_note, merge_target_folder, served
from redraft.cli import main
from redraft.cli.commands import COMMANDS
from redraft.cli.generate import PANEL_OF, template
from redraft.cli.plans import check_places, told
from redraft.drafts.formats.base import served_name
from redraft.errors import UserError
from redraft.loading import load_target
from redraft.settings.base import Settings, convert, read, read_yaml
from redraft.settings.runs import AdaptConfig, DistillConfig
from redraft.settings.steps import RegenerateSettings, TrainSettings
from redraft.settings.studies import StudySettings, parse_study
from redraft.settings.training import TrainConfig
from redraft.target import Facts

RUN = Path(__file__).parents[1] / "artifacts" / "run"
KINDS = {kind.COMMAND: kind for kind in COMMANDS}
# What a command cannot do without, or a default with nothing beside it.
NEEDED: dict[str, dict[str, Any]] = {
    "quickstart": {},
    "probe": {"target": "t", "draft": "d"},
    "check": {"target": "t", "draft": "d"},
    "regenerate": {"target": "t", "prompts": "p", "out": "o"},
    "select": {"out": "o", "responses": "r"},
    "vocabulary": {"target": "t", "draft": "d", "responses": "r"},
    "train": {"target": "t", "responses": "r", "out": "o", "draft": "d"},
    "adapt": {"target": "t", "draft": "d", "out": "o", "prompts": "p"},
    "import": {"source": "s", "out": "o"},
    "merge": {"private": "p", "base_draft": "b", "out": "o"},
    "merge-target": {"target": "t", "out": "o"},
    "export": {"target": "t", "draft": "d", "format": "vllm", "out": "o"},
    "distill": {"target": "t", "out": "o", "prompts": "p", "text": ["x"]},
    "bench": {"target": "t", "out": "o", "prompts": "p", "draft": ["d"]},
    "report": {"results": ["r"]},
    "study": {"config": "s.yaml"},
    "watch": {"target": "t", "draft": "d", "prompt": "hello"},
}


@pytest.mark.parametrize("name", sorted({*KINDS} - {"study"}))
def test_a_template_reads_back_as_the_defaults(name: str, tmp_path: Path) -> None:
    kind, needed, file = KINDS[name], NEEDED[name], tmp_path / "all.yaml"
    text = template(kind)
    assert all(name in text for name in kind.model_fields)
    # every setting that is only a comment, without its mark
    lines = [re.sub(r"^# (?=[a-z_]+:( |$)|  [a-z_]+: )", "", line) for line in text.splitlines()]
    file.write_text("\n".join(lines))
    values = read_yaml(file, "settings")
    assert set(values) == set(kind.model_fields)
    file.write_text(json.dumps({**values, **needed}))
    found, plain = read(kind, file), kind(**needed)
    for field in kind.model_fields:
        if field not in found.blocks():
            assert getattr(found, field) == getattr(plain, field)
    assert found.blocks() == plain.blocks()


def test_every_setting_has_a_help_and_a_place_among_the_panels() -> None:
    for kind in COMMANDS:
        for name, field in kind.model_fields.items():
            assert field.description and name in PANEL_OF, f"{kind.COMMAND} {name}"
    shown = {p.rich_help_panel for p in get_command(main.app).commands["adapt"].params if hasattr(p, "rich_help_panel")}
    assert {"Target", "Draft", "Text", "Training", "Measuring", "Output", "Machine"} <= shown


# -- mistakes ----------------------------------------------------------------------------------------------------------
def test_all_mistakes_are_told_at_once() -> None:
    given = {"target": "t", "drfat": "d", "prompts": "p", "out": "o", "gamma": 0, "loss": "kll", "method": "loar"}
    with pytest.raises(UserError) as caught:
        AdaptConfig(**given, budget="lots", train={"epoc": 2, "epochs": "many"}, exports=["vlm"], dtype="float16")
    for said in (
        "unknown setting drfat (did you mean draft?)",
        "draft is missing",
        "gamma must be above 0, not 0",
        "unknown loss 'kll' (did you mean kl?)",
        "unknown method 'loar' (did you mean lora?)",
        "budget 'lots' is not understood",
        "unknown setting epoc (did you mean epochs?) in train",
        "train epochs must be a number, not 'many'",
        "exports: unknown export format 'vlm' (did you mean vllm?)",
        "dtype must be auto, bfloat16 or float32, not 'float16'",
    ):
        assert said in str(caught.value)
    with pytest.raises(UserError) as caught:
        AdaptConfig(target="t", draft="d", out="o", server_model="m", general_share=0.5, scorer="length")
    assert str(caught.value).count("; ") > 4 and "--general and --general-share" in str(caught.value)


@pytest.mark.parametrize("given", ["vllm, sglang", ["vllm,sglang"], ["vllm", "sglang"]])
def test_formats_may_stand_in_one_flag_with_commas(given: Any) -> None:
    assert AdaptConfig(target="t", draft="d", out="o", prompts="p", exports=given).exports == ("vllm", "sglang")


def test_values_are_taken_as_people_write_them() -> None:
    assert (
        convert("4e-3", float) == 0.004
        and convert("5e3", int) == 5000
        and convert("a, b", tuple[str, ...]) == ("a", "b")
    )
    assert convert([1, "2"], tuple[int, ...]) == (1, 2) and convert(None, int | None) is None
    for value, kind in ((True, int), (0, bool), (1.5, int), ("nan", float), (3, tuple[str, ...]), (None, float)):
        with pytest.raises(ValueError, match="must be"):
            convert(value, kind)


@pytest.mark.parametrize("text", ["seed: 0x_", "seed: 0b_", "seed: " + "9" * 5000, "train: " + "[" * 3000 + "]" * 3000])
def test_what_yaml_cannot_read_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match="a.yaml is not YAML"):
        read_yaml(tmp_path / "a.yaml", "settings")


def test_a_path_that_is_none_is_told_in_words() -> None:
    with pytest.raises(UserError, match="^out must be a path, not 5"):
        AdaptConfig(target="t", draft="d", prompts="p", out=5)


def test_a_seed_that_no_generator_takes_is_refused_before_anything_is_spent() -> None:
    with pytest.raises(UserError, match="^seed must be below"):
        AdaptConfig(target="t", draft="d", prompts="p", out="o", seed=10**26)


def test_the_first_line_names_flags() -> None:
    assert list(told(StudySettings(config="s.yaml", list_cells=True))) == ["config s.yaml", "list"]


def test_flags_win_key_by_key(tmp_path: Path, redraft: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.yaml").write_text(
        "target: t\ndraft: d\nprompts: self:30\nout: o\ntrain: {epochs: 4, clip: 3}\n"
        "private: {alpha: 9, on: [q_proj]}\ntemplate_arg: {a: 1, b: x}\n"
    )
    seen: list[Settings] = []
    monkeypatch.setattr("redraft.cli.generate.announce", lambda settings: seen.append(settings) or 1 / 0)
    code, _, _ = redraft(
        f"adapt --config {tmp_path}/a.yaml --train clip=1 --private alpha=2 --train unroll=2 --template-arg a=2"
    )
    assert code == 1
    (found,) = seen
    assert isinstance(found, AdaptConfig)
    assert found.train == {"epochs": 4.0, "clip": 1.0, "unroll": 2}
    assert found.private == {"alpha": 2.0, "on": ("q_proj",)} and found.template_arg == {"a": 2, "b": "x"}
    code, _, err = redraft(f"adapt --config {tmp_path}/a.yaml --gamma 3 --train gamma=4 --loss tv --train loss=kl")
    assert code == 2 and "gamma is 3 and train gamma is 4" in err and "loss is tv and train loss is kl" in err


def test_what_is_not_there_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"target": "./model", "adapter": "a/b/c", "draft": "org/draft", "prompts": "p.jsonl", "out": "o"}
    with pytest.raises(UserError, match=r"^\./model does not .*; a/b/c does not .*; p\.jsonl does not exist") as caught:
        check_places(AdaptConfig(**given))
    assert "org/draft" not in str(caught.value)
    for prompts in ("self:30", "datasets:gsm8k", "p.jsonl"):
        Path("p.jsonl").touch()
        check_places(RegenerateSettings(target="gpt2", prompts=prompts, out="o"))


# -- plans -------------------------------------------------------------------------------------------------------------
@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny target with its draft, prompts and a finished run."""
    shutil.copytree(RUN, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


def stages(said: str) -> dict[str, tuple[float, float]]:
    """Tokens and operations of a plan's stages."""
    found = re.findall(r"^  ([a-z, -]+?) +([\d,]+) tokens +(\S+) FLOPs$", said, re.M)
    return {name: (float(tokens.replace(",", "")), float(flops)) for name, tokens, flops in found}


def test_a_plan_agrees_with_the_ledger_of_the_run(place: Path, redraft: Any) -> None:
    """A token costs what it was booked at; there are at most as many as the plan says, and nothing is written."""
    ledger = {stage["stage"]: stage for stage in json.loads((place / "run" / "ledger.json").read_text())["stages"]}
    before = sorted(place.rglob("*"))
    common = (
        "--target target --draft draft --dtype float32 --out new --train epochs=24 --heldout-prompts 4 "
        "--bench-prompts 4 --budget 75%"
    )
    code, said, err = redraft(
        f"adapt {common} --prompts prompts.jsonl --max-new-tokens 16 --rank 4 --gamma 3 --dry-run"
    )
    assert code == 0, err
    assert sorted(place.rglob("*")) == before
    found = stages(said)
    booked = ledger["regenerate"]["tokens"] + ledger["regenerate held-out"]["tokens"]
    assert booked * 0.3 < found["regenerate"][0] < 3 * booked  # of words that are tokens, not of four characters
    per_token = ledger["regenerate"]["flops"] / ledger["regenerate"]["tokens"]
    assert found["regenerate"][1] / found["regenerate"][0] == pytest.approx(per_token, rel=0.01)
    assert ledger["train"]["tokens"] <= found["train"][0]
    assert found["train"][1] / found["train"][0] == pytest.approx(
        ledger["train"]["flops"] / ledger["train"]["tokens"], rel=0.5
    )
    assert "epochs: 24.0" in said and "learning_rate: 0.004" in said and "nothing was done" in said
    code, _, err = redraft("adapt --target target --draft draft --out new --prompts prompts.jsonl --dry-run")
    assert code == 2 and "too few" in err, "what the run itself would refuse"


@pytest.mark.parametrize(
    ("command", "stage"),
    [
        ("train --target target --draft draft --responses run/responses.jsonl --heldout 4 --out new", "features"),
        ("regenerate --target target --prompts prompts.jsonl --out n --temperature 0 --temperature 1", "regenerate"),
        ("distill --target target --text draft --prompts prompts.jsonl --out new --pretrain tokens=1e6", "pretrain"),
        ("study study.yaml --out new", "train"),
    ],
)  # fmt: skip
def test_plans_of_the_other_commands(place: Path, redraft: Any, command: str, stage: str) -> None:
    entry = {"target": "target", "draft": "draft", "prompts": "prompts.jsonl", "evaluation": "maths:1@8"}
    (place / "study.yaml").write_text(json.dumps({"name": "s", "targets": {"t": entry}, "grid": {"methods": ["fc"]}}))
    before = sorted(place.rglob("*"))
    code, said, err = redraft(f"{command} --dry-run")
    assert code == 0, err
    assert stages(said)[stage][1] > 0 and "peak memory" in said and "disk: " in said
    assert sorted(place.rglob("*")) == before


# -- the target of an adapter ------------------------------------------------------------------------------------------
def test_the_merged_target_computes_as_the_adapter_does(place: Path, redraft: Any) -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    peft.get_peft_model(load_target("target").model, config).save_pretrained(place / "adapter")
    code, said, err = redraft("merge-target --target target --adapter adapter --out whole")
    assert code == 0 and "target: whole" in said, err
    ids = torch.tensor([[1, 5, 9, 7]])
    whole, joined = load_target("whole"), load_target("target", adapter="adapter")
    with torch.no_grad():
        torch.testing.assert_close(whole.model(ids).logits, joined.model(ids).logits)
        assert not torch.allclose(whole.model(ids).logits, load_target("target").model(ids).logits)
    assert whole.tokenizer is not None and whole.content_hash() == joined.content_hash()
    code, said, err = redraft("merge-target --target adapter --out alone")
    assert code == 0 and load_target("alone").content_hash() == whole.content_hash(), err
    code, said, err = redraft("merge-target --target target --out none")
    assert code == 2 and "no adapter" in err
    (place / "whole" / "mine.txt").touch()
    with pytest.raises(UserError, match="holds other files"):
        merge_target_folder("target", "adapter", place / "whole")


def test_serve_lines_name_the_merged_target(place: Path) -> None:
    (place / "adapter").mkdir()
    (place / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "target"}')
    note = "redraft merge-target --target target --adapter adapter --out merged-target"
    assert note in str(adapter_note("target", "adapter"))
    assert "--adapter adapter --out" in str(adapter_note("adapter")) and adapter_note("target") is None
    assert served("vllm serve adapter --x", "adapter") == "vllm serve merged-target --x"
    assert served("vllm serve target", "target") == "vllm serve target"
    assert served("vllm serve 'target + adapter' --x", "target", "adapter") == "vllm serve merged-target --x"
    for name, said in {"target": "target", "adapter": "merged-target", "target + adapter": "merged-target"}.items():
        assert served_name(cast(Facts, SimpleNamespace(name=name))) == said


@pytest.mark.parametrize("command", ["check", "adapt", "config", ""])
def test_help_names_no_type_beside_flags_without_a_value(redraft: Any, command: str) -> None:
    code, said, _ = redraft(f"{command} --help")
    assert code == 0 and "--help" in said and "bool" not in said.lower()
    if command == "check":
        assert "[OPTIONS] DRAFT" in said, "nothing is checked without one"


def test_resolved_blocks_are_those_of_the_run() -> None:
    needed = NEEDED["train"]
    assert TrainSettings(**needed).blocks()["setting"].epochs == 6
    assert TrainSettings(**{**needed, "draft": None}, from_nothing=True).blocks()["setting"] == TrainConfig()
    assert DistillConfig(**NEEDED["distill"], gamma=2).blocks()["align"].gamma == 2
    assert StudySettings(config="s.yaml").blocks() == {}
    with pytest.raises(UserError, match="targets t draft is missing; targets t prompts is missing"):
        parse_study({"name": "n", "targets": {"t": {"target": "t", "evaluation": "e"}}})
