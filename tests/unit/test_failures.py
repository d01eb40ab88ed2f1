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

from redraft.cli import main, plans, quiet
from redraft.cli.failures import trace, unexpected, without_secrets

SRC = str(Path(main.__file__).parents[2])
REPORT = "report absent.json"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REDRAFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr("redraft.api.measuring.build_report", fail)


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
    assert "Traceback" in text and "KeyError" in text and "command: redraft report absent.json" in text
    assert re.search(r"versions: python [\d.]+, .*torch [\d.]+", text)


def test_debug_shows_the_trace(redraft, monkeypatch, cache) -> None:
    fail_with(monkeypatch, KeyError("lost"))
    with pytest.raises(KeyError):
        redraft(f"--debug {REPORT}")
    assert not cache.exists()


def test_debug_shows_where_a_users_mistake_was_found(redraft) -> None:
    code, _, err = redraft(f"--debug {REPORT}")
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
def test_every_command_has_a_first_line() -> None:
    assert set(plans.PLANS) == set(get_command(main.app).commands)


def test_the_first_line_comes_before_anything_heavy_is_loaded(tmp_path) -> None:
    (tmp_path / "p.jsonl").write_text('{"instruction": "a"}\n\n{"instruction": "b"}\n')
    script = (
        "import sys\n"
        "from redraft.cli import common, main, plans\n"
        "say = plans.announce\n"
        "def told(name, given):\n"
        "    say(name, given)\n"
        "    print('heavy:', sorted({'torch', 'transformers', 'matplotlib', 'numpy'} & set(sys.modules)))\n"
        "    raise SystemExit\n"
        "plans.announce = told\n"
        "main.main()\n"
    )
    command = f"regenerate --target t --prompts {tmp_path}/p.jsonl --temperature 0 --temperature 0.5 --out r.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", script, *command.split()],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": SRC},
    )
    first, heavy = done.stdout.splitlines()
    assert heavy == "heavy: []"
    assert first.startswith(f"regenerate: 2 prompts of {tmp_path}/p.jsonl, answered by t at temperature 0.0, 0.5")
    assert "at most 1,024 tokens" in first


def test_settings_of_a_file_count_and_flags_win(tmp_path, capsys) -> None:
    (tmp_path / "c.yaml").write_text(
        "target: from-file\ndraft: old\nprompts: self:30\nselect-on: prompts\nbudget: 50%\n"
    )
    given = {"config": tmp_path / "c.yaml", "target": "from-flag", "draft": None, "out": tmp_path / "run"}
    plans.announce("adapt", given)
    said = capsys.readouterr().out
    assert (
        "30 questions that the target writes itself; select 50%, answer" in said
        and "from-flag with the draft old" in said
    )


def test_lists_of_a_file_are_not_hidden_by_flags_left_out(tmp_path, capsys) -> None:
    """Options that repeat come as an empty tuple where they are not given."""
    (tmp_path / "c.yaml").write_text("target: t\nprompts: p.jsonl\ntext: [corpus, more.txt]\n")
    plans.announce("distill", {"config": tmp_path / "c.yaml", "target": None, "text": (), "out": None})
    assert "pretrained on corpus, more.txt, aligned with t" in capsys.readouterr().out


def test_a_run_that_goes_on_says_what_is_there(tmp_path, capsys) -> None:
    run = tmp_path / "run"
    (run / "train").mkdir(parents=True)
    plans.announce("merge", {"private": "p", "base_draft": "b", "scale": 1.0, "out": run})
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
    plans.announce("regenerate", {"prompts": str(tmp_path / "broken.json"), "out": None, "temperature": [0.0]})
    assert capsys.readouterr().out == ""


# -- silence ---------------------------------------------------------------------------------------------------------
def test_libraries_are_silent_unless_the_user_asks(monkeypatch) -> None:
    for name in quiet.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    monkeypatch.setattr(sys, "warnoptions", [])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet.quiet_libraries()
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
