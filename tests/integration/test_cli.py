"""The command line: help, errors of users, and what it hands to the library."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.markup import render
from typer.main import get_command

from redraft.cli import main
from redraft.cli.generate import CHOICES
from redraft.errors import UserError
from redraft.registries import EXPORTERS, LOSSES, SCORERS
from redraft.settings.base import read
from redraft.settings.runs import AdaptConfig
from redraft.settings.steps import BenchSettings, TrainSettings
from redraft.settings.training import METHODS

SERVERS = ["bench", "--target", "./no", "--prompts", "p", "--out", "b.json", "--server"]
REGENERATE = ["regenerate", "--target", "./no", "--prompts", "p", "--out", "o.jsonl"]
TRAIN = ["train", "--target", "./no", "--from-nothing", "--responses", "r", "--out", "o"]
BENCH = ["bench", "--target", "./no", "--draft", "a", "--prompts", "p", "--out", "b"]
COMMANDS = sorted(get_command(main.app).commands)


@pytest.fixture
def redraft(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """``redraft("report", "x.json")`` -> (exit code, standard output, standard error)."""
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("TERM", "dumb")

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["redraft", *arguments])
        with pytest.raises(SystemExit) as caught:
            main.main()
        captured = capsys.readouterr()
        code = caught.value.code
        return (0 if code is None else int(code)), captured.out, captured.err

    return run


def test_help_names_every_command_and_imports_no_model_library() -> None:
    script = (
        "import sys\n"
        "from redraft.cli.main import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit:\n    pass\n"
        "print('heavy:', sorted({'torch', 'transformers', 'matplotlib', 'numpy'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "heavy: []" in done.stdout
    assert re.findall(r"^\W{0,2}([a-z]+) ", done.stdout, flags=re.M)[-len(COMMANDS) :] or done.stdout
    for command in COMMANDS:
        assert command in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_has_examples_of_the_command(redraft: Any, command: str) -> None:
    code, out, _ = redraft(command, "--help")
    assert code == 0
    shown = out[out.index("Examples") :]
    assert f"redraft {command}" in shown
    options = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", out[: out.index("Examples")]))
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", shown)) <= options
    assert not any(place in out for place in CHOICES), "a list of choices was not filled in"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_shown_as_it_was_written(command: str) -> None:
    """Brackets in a help text are markup and would swallow what stands in them."""
    for parameter in get_command(main.app).commands[command].params:
        text = getattr(parameter, "help", None) or ""
        assert render(text).plain == text, f"{parameter.name}: {text}"


@pytest.mark.parametrize(
    ("command", "names"),
    [("select", SCORERS.names()), ("train", LOSSES.names()), ("export", EXPORTERS.names()), ("adapt", LOSSES.names())],
)
def test_choices_in_help_come_from_the_registries(redraft: Any, command: str, names: list[str]) -> None:
    _, out, _ = redraft(command, "--help")
    assert ", ".join(names) in " ".join(out.split())


def test_version(redraft: Any) -> None:
    code, out, _ = redraft("--version")
    assert code == 0 and re.fullmatch(r"redraft \d+\.\d+\.\d+\S*\n", out)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["report", "absent.json"], "absent.json does not exist"),
        (["select", "--responses", "r.jsonl", "--scorer", "magic", "--out", "m.json"], "unknown scorer 'magic'"),
        (["select", "--responses", "r.jsonl", "--budget", "lots", "--out", "m.json"], "budget 'lots'"),
        (["select", "--out", "m.json", "--scorer", "random"], "--prompts"),
        (["select", "--responses", "r.jsonl", "--out", "m.json"], "r.jsonl does not exist"),
        (["select", "--responses", "absent.jsonl", "--scorer", "random", "--out", "m.json"], "absent.jsonl"),
        (["train", "--target", "t", "--draft", "d", "--responses", "r", "--out", "o", "--method", "x"], "method 'x'"),
        (["train", "--target", "t", "--from-nothing", "--responses", "r", "--out", "o", "--loss", "x"], "loss 'x'"),
        (["train", "--target", "t", "--responses", "r", "--out", "o"], "--from-nothing"),
        (
            ["train", "--target", "t", "--responses", "r", "--out", "o", "--setting", "lr=1"],
            "unknown setting lr in setting",
        ),
        (["train", "--target", "t", "--responses", "r", "--out", "o", "--setting", "clip=x"], "a number"),
        (
            ["export", "--draft", "d", "--target", "./no", "--format", "onnx", "--out", "o"],
            "unknown export format 'onnx'",
        ),
        (["export", "--draft", "d", "--target", "./no", "--format", "vllm", "--out", "o"], "./no does not exist"),
        (["merge", "--private", "./p", "--base-draft", "./b", "--out", "o"], "./p"),
        (
            ["bench", "--target", "./no", "--draft", "a", "--draft", "x/a", "--prompts", "p", "--out", "b"],
            "are called a",
        ),
        (["bench", "--target", "./no", "--draft", "=a", "--prompts", "p", "--out", "b"], "NAME=FOLDER"),
        ([*BENCH, "--top-p", "2"], "top-p"),
        ([*BENCH, "--concurrency", "2"], "are for servers; give --server"),
        ([*SERVERS, "new=http://h:1", "--shape", "tree:3x2x8"], "servers draft as they were started"),
        ([*SERVERS, "new=http://me:hush@h:1"], "REDRAFT_API_KEY"),
        ([*SERVERS, "new=me:hush@h:1"], "is not understood"),
        ([*REGENERATE, "--server", "http://h:1/v1?key=hush"], "REDRAFT_API_KEY"),
        ([*REGENERATE, "--server-model", "m"], "give --server too"),
        ([*REGENERATE, "--top-p", "0.9"], "greedy and leaves nothing to filter"),
        ([*TRAIN, "--epochs", "2", "--setting", "epochs=3"], "epochs is 2 and setting epochs is 3: two values"),
        ([*TRAIN, "--gamma", "3", "--setting", "gamma=7"], "gamma is 3 and setting gamma is 7: two values"),
        (
            [*BENCH, "--temperature", "-1"],
            "temperature",
        ),
        (
            [*BENCH, "--top-p", "0.9"],
            "greedy and leaves nothing to filter",
        ),
        (
            [*BENCH, "--shape", "[[0,0]]"],
            "without its parent [0]",
        ),
        ([*BENCH, "--static", "--shape", "tree:3x2x8"], "--static records the steps of a chain, not of tree:3x2x8"),
        ([*BENCH, "--static", "--shape", "auto"], "--static records the steps of a chain, not of auto"),
        (
            [*BENCH, "--shape", "tree:5"],
            "tree:5x10x60",
        ),
        (
            [
                "bench",
                "--target",
                "./no",
                "--draft",
                "a",
                "--prompts",
                "p",
                "--out",
                "b",
                "--shape",
                "tree:5x10x60",
                "--temperature",
                "1",
            ],
            "choose greedy drafts",
        ),
        (["bench", "--target", "./no", "--draft", "a", "--suite", "x", "--out", "b"], "unknown suite 'x'"),
        (["bench", "--target", "./no", "--draft", "a", "--out", "b"], "nothing to measure on"),
        (["bench", "--target", "./no", "--prompts", "p", "--out", "b"], "--server"),
        (["probe", "--target", "./no", "--draft", "d", "--prompts", "absent.jsonl"], "absent.jsonl"),
        (["export", "--draft", "./d", "--target", "./no", "--format", "plain", "--out", "o"], "./no"),
        (["regenerate", "--target", "./no", "--prompts", "p", "--out", "o", "--temperature", "-1"], "temperature"),
        (["regenerate", "--target", "./no", "--prompts", "absent.jsonl", "--out", "o"], "absent.jsonl"),
        (["adapt", "--target", "t"], "draft"),
        (["adapt", "--config", "absent.yaml"], "absent.yaml does not exist"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    redraft: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = redraft(*arguments)
    assert code == 2
    assert err.startswith("redraft: error: ") and err.count("\n") == 1
    assert says in err
    assert "Traceback" not in out + err
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_a_wrong_option_is_exit_code_2(redraft: Any) -> None:
    code, _, err = redraft("report", "x.json", "--colour")
    assert code == 2 and "--colour" in err and "Traceback" not in err


@pytest.mark.parametrize(("command", "word"), [("check --draft x", "DRAFT"), ("study --config=x", "FILE")])
def test_what_stands_without_a_flag_is_said_to_who_gives_it_with_one(redraft: Any, command: str, word: str) -> None:
    name, flag = command.replace("=", " ").split()[:2]
    said = f"redraft: error: {name} takes {word} without a flag, not as {flag}: redraft {name} {word}\n"
    assert redraft(*command.split()) == (2, "", said)
    assert re.search(rf"redraft {name} \[OPTIONS\] \[?{word}\b", redraft(name, "--help")[1])  # old typers: no brackets


def test_a_line_break_in_a_message_stays_one_line(redraft: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise UserError("first\nsecond")

    monkeypatch.setattr("redraft.api.runs.build_report", fail)
    code, _, err = redraft("report", __file__)
    assert (code, err) == (2, "redraft: error: first\\nsecond\n")


def test_an_interrupt_is_exit_code_130(redraft: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def press(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("redraft.api.runs.build_report", press)
    code, _, err = redraft("report", __file__)
    assert code == 130 and "interrupted" in err and "Traceback" not in err


def test_named_drafts() -> None:
    def drafts(*given: str) -> dict[str, str]:
        return BenchSettings(target="t", prompts="p", out="o", draft=given).drafts

    assert drafts("stale=old", "run/merged/") == {"stale": "old", "merged": "run/merged/"}
    with pytest.raises(UserError, match="two contestants are called plain"):
        drafts("plain=x")


def test_settings_take_the_types_of_the_config() -> None:
    def trained(**given: str) -> dict[str, Any]:
        return TrainSettings(target="t", responses="r", out="o", draft="d", setting=given).setting

    assert trained(batch_anchors="5e3", seed="7") == {"batch_anchors": 5000, "seed": 7}
    for name, text in (("batch_anchors", "5.5"), ("batch_anchors", "1e-3"), ("seed", "many")):
        with pytest.raises(UserError, match=f"setting {name} must be a whole number, not"):
            trained(**{name: text})
    found = trained(clip="0.5", batch_anchors="64", optimizer="adamw")
    assert found == {"clip": 0.5, "batch_anchors": 64, "optimizer": "adamw"}


def test_a_file_of_settings_is_read_as_people_mean_it(tmp_path: Path) -> None:
    """YAML takes 4e-3 for a text: the optimizer would have met it in the middle of a run. And ``on`` is a word."""
    paths = {"target": "t", "draft": "d", "prompts": "p", "out": "o"}
    (tmp_path / "a.yaml").write_text(
        "target: t\ndraft: d\nprompts: p\nout: o\nprivate: {on: [q_proj]}\nbatch-size: 3\n"
    )
    found = read(AdaptConfig, tmp_path / "a.yaml")
    assert found.private_size.on == ("q_proj",) and found.batch_size == 3
    for text, words in (
        ("on: 1\n1: 2\n", "`name: value` lines"),
        ("a: 1\na: 2\n", "there twice"),
        ("[", "is not YAML: while parsing a flow node expected the node content, but found '<stream end>' at line 1"),
        ("target: \ndraft: d\nprompts: p\nout:\n", "target is missing; out is missing"),
    ):
        (tmp_path / "a.yaml").write_text(text)
        with pytest.raises(UserError, match=words):
            read(AdaptConfig, tmp_path / "a.yaml")
    with pytest.raises(UserError, match="is a folder; put the file itself"):
        read(AdaptConfig, tmp_path)
    train = AdaptConfig(**{**paths, "train": {"learning_rate": "4e-3", "batch_anchors": 5e3}}).train_config()
    assert train.learning_rate == 4e-3 and train.batch_anchors == 5000 and type(train.batch_anchors) is int
    assert AdaptConfig(**{**paths, "private": {"on": ["q_proj"], "alpha": 32}}).private_size.on == ("q_proj",)
    assert AdaptConfig(**{**paths, "private": {"alpha": None}}).private_size.alpha is None
    for wrong in ({"epochs": "many"}, {"epochs": True}, {"seed": 0.5}, {"optimizer": 3}, {"clip": None}, {"clip": [1]}):
        with pytest.raises(UserError, match=f"train {next(iter(wrong))} must be "):
            AdaptConfig(**{**paths, "train": wrong}).train_config()
    assert AdaptConfig(**{**paths, "train": {"seed": 2**53 + 1}}).train_config().seed == 2**53 + 1
    for empty in ({"patience": -1}, {"evaluate_every": 0}, {"epochs": "inf"}, {"epochs": 0}, {"learning_rate": -1}):
        with pytest.raises(UserError, match=f"train {next(iter(empty))} must be "):
            AdaptConfig(**{**paths, "train": empty}).train_config()
    for value in (False, "false", "False"):
        assert AdaptConfig(**{**paths, "private": {"aim": value}}).private_size.aim is False
    with pytest.raises(UserError, match="private aim must be true or false, not 0"):
        AdaptConfig(**{**paths, "private": {"aim": 0}})
    with pytest.raises(UserError, match=r"private on must be a list, written \[a, b\], not 7"):
        AdaptConfig(**{**paths, "private": {"on": 7}})


@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_as_it_was_measured_unless_told_otherwise(name: str) -> None:
    paths = {"target": "t", "draft": "d", "prompts": "p", "out": "o", "method": name}
    found = AdaptConfig(**paths).train_config()
    assert (found.epochs, found.batch_anchors, found.learning_rate) == (6, 768, METHODS[name].learning_rate)
    given = AdaptConfig(**{**paths, "train": {"learning_rate": 1e-4, "epochs": 2}}).train_config()
    assert (given.epochs, given.batch_anchors, given.learning_rate) == (2, 768, 1e-4)
    assert METHODS["full"].learning_rate < METHODS["lora"].learning_rate


def test_every_setting_of_adapt_is_a_flag_and_only_given_ones_are_handed_on(
    redraft: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, out, _ = redraft("adapt", "--help")
    for name in AdaptConfig.model_fields:
        assert f"--{name.replace('_', '-')}" in out
    # The defaults are those of the settings, which a file may set too.
    shown = re.sub(r"[\s│]+", " ", out)
    for name in ("method", "start", "budget", "bench_prompts"):
        assert f"default: ({AdaptConfig.model_fields[name].default})" in shown
    assert "Undefined" not in out
    seen: dict[str, Any] = {}

    def stop(config: AdaptConfig, *_: Any) -> None:
        seen.update(config.model_dump(exclude_unset=True))
        raise UserError("far enough")

    monkeypatch.setattr("redraft.api.runs.AdaptRun", stop)
    settings = tmp_path / "adapt.yaml"
    settings.write_text("target: my-model\ndraft: old\nprompts: self:30\nout: run\nmethod: fc\ngamma: 3\n")
    flags = ["--method", "eda", "--temperatures", "0", "--temperatures", "0.7", "--train", "epochs=2"]
    code, _, err = redraft("adapt", "--config", str(settings), *flags)
    assert code == 2 and "far enough" in err
    assert seen["method"] == "eda" and seen["gamma"] == 3 and seen["temperatures"] == (0.0, 0.7)
    assert seen["train"] == {"epochs": 2.0} and "loss" not in seen and "seed" not in seen


def test_report_writes_page_and_picture(redraft: Any, tmp_path: Path) -> None:
    interval = {"value": 2.0, "low": 1.9, "high": 2.1}
    draft = {
        "tau_pooled": interval,
        "tokens_per_second": interval,
        "speedup": interval,
        "time": {"draft": 1, "verify": 2, "other": 0.1},
        "rounds": 10,
        "tokens": 20,
    }
    setup = {"target": "made up", "sampler": "greedy", "gamma": 5, "prompts": 2, "max_new_tokens": 16}
    plain = {"float32": {"tokens_per_second": interval}, "fastest": "float32"}
    result = {"schema": "redraft.bench/1", "setup": setup, "plain": plain, "drafts": {"only": draft}}
    (tmp_path / "bench.json").write_text(json.dumps(result))
    out, png = tmp_path / "page.html", tmp_path / "head.png"
    code, said, _ = redraft("report", str(tmp_path / "bench.json"), "--out", str(out), "--png", str(png))
    assert code == 0 and str(out) in said
    assert "made up" in out.read_text() and png.read_bytes().startswith(b"\x89PNG")


# -- what a command writes over, and shows -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    "arguments",
    [
        ["select", "--responses", "rows.jsonl", "--scorer", "length", "--out", "s.json", "--keep", "rows.jsonl"],
        ["select", "--responses", "rows.jsonl", "--scorer", "length", "--budget", "1", "--out", "./rows.jsonl"],
        ["regenerate", "--target", "./no", "--prompts", "rows.jsonl", "--out", "rows.jsonl"],
        ["report", "rows.jsonl", "--out", "rows.jsonl"],
        ["select", "--responses", "rows.jsonl", "--scorer", "length", "--out", "new.json", "--keep", "new.json"],
    ],
)  # fmt: skip
def test_what_a_command_reads_is_not_written_over(
    redraft: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"prompt": "a"}\n')
    code, out, err = redraft(*arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1 and "which would be overwritten; name another file to write" in err
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    assert Path("rows.jsonl").read_text() == '{"prompt": "a"}\n'


@pytest.mark.parametrize(
    "arguments",
    [
        [*SERVERS, "new=http://127.0.0.1:9/v1?key=hush-hush-hush"],
        [*SERVERS, "new=http://me:hush-hush-hush@127.0.0.1:9"],
        [*SERVERS, "new=serve --api-key hush-hush-hush --port {port}"],
        [*REGENERATE, "--server", "http://127.0.0.1:9/v1?key=hush-hush-hush"],
        [*REGENERATE, "--server", "http://me:hush-hush-hush@127.0.0.1:9"],
    ],
)
def test_keys_are_not_said_back(redraft: Any, arguments: list[str]) -> None:
    code, out, err = redraft(*arguments)
    assert code == 2 and "***" in out + err
    assert "hush" not in out + err


def test_the_plan_knows_the_texts_of_a_settings_file(redraft: Any, tmp_path: Path) -> None:
    file = tmp_path / "distill.yaml"
    file.write_text(f"target: ./no\ntext: [corpus.txt]\nprompts: p.jsonl\nout: {tmp_path / 'run'}\n")
    code, out, _ = redraft("distill", "--config", str(file))
    assert code == 2 and "text corpus.txt;" in out
