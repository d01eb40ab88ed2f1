"""Files and places that somebody made to do harm: what computes for ever, fills a memory, or is not ours to replace."""

from __future__ import annotations

import copy
import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from redraft.cli.main import surroundings
from redraft.cli.plans import refuse_overwriting
from redraft.data import template
from redraft.errors import UserError
from redraft.files import atomic_write_bytes
from redraft.inputs import FREELY, read_bytes, within
from redraft.loading.adapters import _check_patterns
from redraft.loading.places import check_files
from redraft.places import at_home, cache_folder
from redraft.settings.steps import BenchSettings, ProbeSettings, ReportSettings

ASK = [{"role": "user", "content": "so?"}]
PLACES = {"target": "t", "draft": "d", "prompts": "p.jsonl"}


# -- time and memory ---------------------------------------------------------------------------------------------------
def test_a_template_that_does_not_end_is_told(tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    loops = "{% for i in range(9999) %}" * 3 + "{% endfor %}" * 3
    tokenizer.chat_template = loops + tokenizer.chat_template
    monkeypatch.setattr(template, "MOST_SECONDS", 0.2)
    with pytest.raises(UserError, match="chat template on conversation a takes more than 0.2 s"):
        template.template_ids(tokenizer, "a", ASK)


def test_a_template_that_writes_without_measure_is_told_before_a_tokenizer_sees_it(
    tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    plain = template.template_ids(tokenizer, "a", ASK)
    monkeypatch.setattr(template, "MOST_TEXT", 1000)
    assert template.template_ids(tokenizer, "a", ASK) == plain
    tokenizer.chat_template = "{% for i in range(1001) %}a{% endfor %}" + tokenizer.chat_template
    with pytest.raises(UserError, match="characters through the chat template, and at most 1,000 are taken"):
        template.template_ids(tokenizer, "a", ASK)


def test_a_pattern_that_does_not_end_is_stopped_and_nothing_else_is() -> None:
    with pytest.raises(UserError, match="the pattern takes more than 0.2 s"), within(0.2, "the pattern"):
        re.fullmatch("(a+)+", "a" * 40 + "b")
    with within(0.2, "the pattern"):
        assert re.fullmatch("(a+)+", "aaa")


def test_a_pattern_of_an_adapter_is_tried_before_it_is_used() -> None:
    class Named:
        def named_modules(self) -> list[tuple[str, None]]:
            return [("model.layers.0.q_proj", None)]

    class Config:
        target_modules = ["q_proj"]
        exclude_modules: str | None = None

    config = Config()
    _check_patterns(config, Named(), "a")
    config.exclude_modules = "["
    with pytest.raises(re.error):  # its caller says in a line that the adapter does not fit
        _check_patterns(config, Named(), "a")


def test_what_is_packed_unpacks_to_so_many_times_its_size_and_no_more(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl.gz"
    path.write_bytes(gzip.compress(b"\n" * (FREELY + 1), 1))
    with pytest.raises(UserError, match=r"p\.jsonl\.gz unpacks to more than 67,108,864 bytes"):
        read_bytes(path)
    path.write_bytes(gzip.compress(b"\n" * FREELY, 1))
    assert len(read_bytes(path)) == FREELY


@pytest.mark.parametrize(
    "settings",
    [
        {"num_hidden_layers": 10**6},
        {"text_config": {"n_layers": 1e9}},
        {"num_labels": 10**9},
        {"vision_config": {"depth": 5000}},
    ],
)
def test_a_config_that_counts_more_parts_than_any_model_has(tmp_path: Path, settings: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="no model has more than"):
        check_files(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 126, "num_experts": 512, "depth": "x"}))
    check_files(tmp_path)


# -- places ------------------------------------------------------------------------------------------------------------
def test_nothing_takes_the_place_of_a_pipe_or_a_device(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="no ordinary file"):
        atomic_write_bytes(tmp_path / "pipe", b"x")
    with pytest.raises(UserError, match="--png is .*pipe, no ordinary file"):
        refuse_overwriting(ReportSettings(results=("b.json",), png=tmp_path / "pipe"))
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("name", ["redraft.json", "draft.safetensors", "config.json"])
def test_a_result_is_not_written_over_a_file_of_a_draft(tmp_path: Path, name: str) -> None:
    for one in ("redraft.json", name):
        (tmp_path / one).write_text("{}")
    settings: dict[str, Any] = {"target": "t", "draft": ("a=d",), "prompts": "p.jsonl"}
    with pytest.raises(UserError, match="a file of a model or a draft"):
        refuse_overwriting(BenchSettings(**settings, out=tmp_path / name))
    refuse_overwriting(BenchSettings(**settings, out=tmp_path / "bench.json"))


@pytest.mark.parametrize("name", ["a\udcff", "a\0b"])
def test_a_name_that_is_no_text(name: str) -> None:
    with pytest.raises(UserError, match="none of UTF-8, or a zero") as caught:
        ProbeSettings(**(PLACES | {"draft": name}))
    assert str(caught.value).isprintable()


def test_an_empty_name_of_a_place_is_a_mistake() -> None:
    with pytest.raises(UserError, match="prompts is empty; name one"):
        ProbeSettings(**(PLACES | {"prompts": ""}))


def test_a_home_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert at_home("~nobody-of-this-name/x") == Path("~nobody-of-this-name/x")
    monkeypatch.delenv("REDRAFT_CACHE", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda place: place)
    assert cache_folder().is_absolute()


# -- streams -----------------------------------------------------------------------------------------------------------
def alone(script: str) -> tuple[int, str]:
    """Exit code and standard error of a shell that calls ``redraft`` as ``"$@"``."""
    call = [sys.executable, "-c", "from redraft.cli.main import main; main()"]
    found = subprocess.run(["sh", "-c", script, "sh", *call], capture_output=True, text=True, timeout=120)
    return found.returncode, found.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a system without a full device")
def test_a_full_standard_output_is_one_line() -> None:
    assert alone('"$@" --version >/dev/full') == (
        2,
        "redraft: error: no room for standard output, where it was sent to; send it elsewhere\n",
    )


def test_closed_streams_and_a_small_alphabet() -> None:
    assert alone('"$@" --version >&-') == (0, "")
    code, said = alone('PYTHONIOENCODING=ascii "$@" report ü.json')
    assert code == 2 and said == "redraft: error: \\xfc.json does not exist; name a file that is there\n"


@pytest.mark.parametrize(("number", "code", "word"), [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated")])
def test_a_signal_while_the_package_is_read_is_one_line(number: str, code: int, word: str) -> None:
    script = (
        "import builtins, os, signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "real = builtins.__import__\n"
        "def stop(name, *more):\n"
        f"    if name == 'typer': os.kill(os.getpid(), signal.{number})\n"
        "    return real(name, *more)\n"
        "from redraft.cli.entry import main\nbuiltins.__import__ = stop\nmain()"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (found.returncode, found.stderr) == (code, f"redraft: {word} before anything was begun\n")


@pytest.mark.parametrize(("width", "taken"), [("1", "20"), ("99999999999999", "1000"), ("90", "90"), ("x", "x")])
def test_a_width_that_no_terminal_has_and_a_screen_for_pictures(
    monkeypatch: pytest.MonkeyPatch, width: str, taken: str
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    monkeypatch.setenv("MPLBACKEND", "none-of-these")
    surroundings()
    assert os.environ["COLUMNS"] == taken and os.environ["MPLBACKEND"] == "agg"


def test_a_working_folder_that_is_gone(tmp_path: Path) -> None:
    code, said = alone(f'mkdir {tmp_path}/gone; cd {tmp_path}/gone; rmdir {tmp_path}/gone; "$@" report b.json')
    assert code == 2 and said.startswith("redraft: error: the folder that this is called in was removed")
