"""What the command line says first, and what it says when something fails that nobody foresaw."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from redraft.cli import main, plans
from redraft.cli.failures import trace, unexpected, without_secrets
from redraft.settings.base import read
from redraft.settings.runs import AdaptConfig
from redraft.settings.steps import BenchSettings, MergeSettings, QuickstartSettings, RegenerateSettings

SRC = str(Path(main.__file__).parents[2])
REPORT = f"report {__file__}"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REDRAFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr("redraft.api.runs.build_report", fail)


# -- defects ---------------------------------------------------------------------------------------------------------
def test_a_defect_is_one_line_and_its_trace_a_file(redraft, monkeypatch, cache) -> None:
    fail_with(monkeypatch, KeyError("lost\nand more"))
    code, _, err = redraft(REPORT)
    assert code == 1 and "Traceback" not in err
    line = err.splitlines()[-1]
    assert line.startswith("redraft: defect in report: KeyError") and "redraft --debug report" in line
    (file,) = cache.glob("errors/*.txt")
    assert str(file) in line
    text = file.read_text()
    assert "Traceback" in text and "KeyError" in text and f"command: redraft {REPORT}" in text
    assert re.search(r"versions: python [\d.]+, .*torch [\d.]+", text)


def test_debug_shows_the_trace(redraft, monkeypatch, cache) -> None:
    fail_with(monkeypatch, KeyError("lost"))
    with pytest.raises(KeyError):
        redraft(f"--debug {REPORT}")
    assert not cache.exists()


def test_debug_shows_where_a_users_mistake_was_found(redraft) -> None:
    code, _, err = redraft("--debug report absent.json")
    assert code == 2 and "Traceback" in err and "redraft: error: absent.json" in err.splitlines()[-1]


def test_the_trace_lies_in_the_run_directory(redraft, monkeypatch, cache, tmp_path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    for folder in (run, other):
        folder.mkdir()
    (run / "ledger.json").write_text("{}")
    assert str(run / "error.txt") in unexpected(KeyError("x"), "adapt", run)
    assert str(cache) in unexpected(KeyError("x"), "adapt", other) and not list(other.iterdir())


def test_without_any_place_to_write_the_line_is_still_said(monkeypatch, tmp_path, full_disk) -> None:
    full_disk()
    assert "the full trace could not be written" in unexpected(KeyError("x"), "adapt", tmp_path)


def test_no_secret_is_in_a_trace(monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret-1")
    monkeypatch.setattr(sys, "argv", ["redraft", "bench", "--server", "a=http://me:pass@127.0.0.1:8000/v1"])
    text = trace(ValueError("401 for http://me:pass@127.0.0.1:8000 with sk-very-secret-1"))
    assert "pass" not in text and "sk-very" not in text and "http://***@127.0.0.1:8000/v1" in text
    assert without_secrets("user@host and http://127.0.0.1:8000/a@b") == "user@host and http://127.0.0.1:8000/a@b"


# -- what is no defect -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "some/curve.jsonl"), "no room on the disk for some/curve"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "no room on the disk for report.html"),
        (type("SafetensorError", (Exception,), {})("I/O error: No space left on device"), "no room on the disk"),
        (MemoryError(), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
    ],
)
def test_a_full_disk_or_memory_is_one_line_wherever_it_is_met(error, says, redraft, monkeypatch, cache) -> None:
    fail_with(monkeypatch, error)
    code, _, err = redraft(REPORT)
    assert code == 2 and err.splitlines()[-1].startswith(f"redraft: error: {says}") and not cache.exists()


# -- the first line --------------------------------------------------------------------------------------------------
def test_a_first_line_says_what_was_given_and_what_matters_most(tmp_path, capsys) -> None:
    (tmp_path / "p.jsonl").write_text('{"instruction": "a"}\n{"instruction": "b"}\n')
    given = {"target": "t", "draft": ["a=x", "b=y"], "prompts": f"{tmp_path}/p.jsonl", "limit": 1, "out": "b.json"}
    plans.announce(BenchSettings(**given, max_new_tokens=9, greedy_drafts=True))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("bench: target t; ")
    for said in ("draft a=x, b=y", "p.jsonl (2)", "temperature 0.0", "shape chain:5", "limit 1", "greedy-drafts"):
        assert f"{said}; " in line
    assert line.endswith("at most 9 tokens of answers where each prompt asks one question")
    plans.announce(QuickstartSettings())
    assert capsys.readouterr().out == "quickstart: out out/quickstart\n"


def run_alone(*arguments: str) -> tuple[list[str], list[str]]:
    """A command in a process of its own: what it says, and which heavy libraries it loaded."""
    script = (
        "import sys\n"
        "from redraft.cli import main\n"
        "try:\n    main.main()\nexcept SystemExit:\n    pass\n"
        "print('heavy:', sorted({'torch', 'transformers', 'matplotlib', 'numpy', 'safetensors'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": SRC},
    )
    *said, heavy = done.stdout.splitlines()
    return [*said, *done.stderr.splitlines()], [heavy]


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("--help", "quickstart"),
        *((f"{name} --help", f"redraft {name}") for name in sorted(get_command(main.app).commands)),
        ("config adapt", "# batch_size: 64"),
        ("adapt --config bad.yaml", "unknown setting drfat (did you mean draft?); unknown setting epoc (did you mean"),
        ("adapt --config absent.yaml", "absent.yaml does not exist"),
        ("adapt --config gone.yaml --dry-run",
         "gone does not exist; name a file, or datasets:NAME (prompts in gone.yaml)"),
        ("study study.yaml --list", "only | fc | regenerated | shift@50% | kl | ridge | 0"),
        ("bench --target ./no --draft a --prompts absent.jsonl --out b.json", "absent.jsonl does not exist"),
        ("train --target t --draft d --responses no.jsonl --out o --method loro", "did you mean lora?"),
        ("select --responses r.jsonl --scorer shfit --out s.json", "did you mean shift?"),
        ("export --draft d --target t --format vlm --out o", "did you mean vllm?"),
        ("bench --target t --draft d --suite gms8k --out b.json", "did you mean gsm8k?"),
        ("distill --target t --out o --text x --prompts p --loss tvdp", "did you mean tvdpp?"),
        ("regenerate --target t --prompts p.jsonl --temperature 0 --temperature 0.5 --out r.jsonl",
         "prompts p.jsonl (2); out r.jsonl; max-new-tokens 256; temperature 0.0, 0.5; at most 1,024 tokens of answers"),
    ],
)  # fmt: skip
def test_names_settings_paths_and_help_load_nothing_heavy(tmp_path, monkeypatch, command, says) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "bad.yaml").write_text("target: t\ndrfat: d\ndraft: d\nprompts: p\nout: o\ntrain: {epoc: 2}\n")
    (tmp_path / "gone.yaml").write_text("target: t\ndraft: d\nprompts: gone\nout: o\n")
    (tmp_path / "study.yaml").write_text(
        "name: s\ntargets: {only: {target: t, draft: d, base_target: b, prompts: p, evaluation: e}}\n"
        "grid: {methods: [fc], selections: [shift@50%], starts: [ridge]}\n"
    )
    if command.startswith("regenerate"):  # the first line stands before the target is looked for
        (tmp_path / "p.jsonl").write_text('{"instruction": "a"}\n\n{"instruction": "b"}\n')
        command = command.replace("--target t", "--target ./t/u")
    said, heavy = run_alone(*command.split())
    assert says in " ".join(" ".join(said).split())
    assert heavy == ["heavy: []"]


def test_settings_of_a_file_count_and_flags_win(tmp_path, capsys) -> None:
    (tmp_path / "c.yaml").write_text(
        "target: from-file\ndraft: old\nprompts: self:30\nselect-on: prompts\nbudget: 50%\n"
    )
    plans.announce(read(AdaptConfig, tmp_path / "c.yaml", {"target": "from-flag", "out": tmp_path / "run"}))
    said = capsys.readouterr().out
    assert "adapt: target from-flag; " in said and "prompts self:30 (30); " in said and "budget 50%; " in said


def test_a_run_that_goes_on_says_what_is_there(tmp_path, capsys) -> None:
    run = tmp_path / "run"
    (run / "train").mkdir(parents=True)
    plans.announce(MergeSettings(private="p", base_draft="b", out=run))
    assert "holds from before" not in capsys.readouterr().out
    (run / "responses.jsonl").write_text("{}\n" * 12)
    (run / "train" / "state.json").write_text(json.dumps({"state": {"step": 40}, "identity": {"steps": 100}}))
    (run / "ledger.json").write_text(json.dumps({"total": {"seconds": 90}}))
    assert plans.found(run) == (
        f"{run} holds from before: 12 responses, training at step 40 of 100, 1.5 minutes of work; it goes on from there"
    )
    (run / "train.json").write_text("{}")
    assert "training at step" not in plans.found(run)


def test_a_plan_that_cannot_be_made_is_left_out(tmp_path, capsys) -> None:
    (tmp_path / "broken.json").write_text("[1,")
    plans.announce(RegenerateSettings(target="t", prompts=str(tmp_path / "broken.json"), out="r.jsonl"))
    assert capsys.readouterr().out == ""


# -- silence ---------------------------------------------------------------------------------------------------------
def test_libraries_are_silent_unless_the_user_asks(monkeypatch) -> None:
    for name in main.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    monkeypatch.setattr(sys, "warnoptions", [])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        main.quiet_libraries()
        warnings.warn("of a library", FutureWarning, stacklevel=1)
    assert not caught
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "info" and os.environ["TOKENIZERS_PARALLELISM"] == "true"
    assert logging.lastResort is not None and logging.lastResort.level == logging.ERROR


def test_help_is_there_at_once() -> None:
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "redraft.cli.main", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--debug" in done.stdout and time.perf_counter() - began < 20


def test_a_trace_keeps_no_key_of_a_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["redraft", "bench", "--server", "new=serve --api-key hush-hush --port {port}"])
    assert "hush" not in trace(RuntimeError("serve --api-key=hush-hush died"))
