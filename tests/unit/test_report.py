"""The report on results made up here: nothing in this file is a measurement."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from redraft.errors import UserError
from redraft.report import build_report, headline_png, tables
from redraft.report.costs import round_cost
from redraft.report.load import BENCH_SCHEMA, BenchResult, read_curve


def _interval(value: float, half: float) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def _draft(tau: float, speed: float, curve: list[float]) -> dict:
    unconditional = [1.0]
    for chance in curve:
        unconditional.append(unconditional[-1] * chance)
    rounds = round(2400 / tau)
    return {
        "dtype": "bfloat16",
        "parameters": 14_300_000,
        "tau_pooled": _interval(tau, 0.07),
        "tau_macro": _interval(tau + 0.03, 0.09),
        "alpha": _interval(curve[0] - 0.05, 0.012),
        "acceptance_conditional": curve,
        "acceptance_unconditional": unconditional[1:],
        "tokens_per_second": _interval(25 * speed, 1.4),
        "speedup": _interval(speed, 0.06),
        "time": {"draft": rounds * 0.011, "verify": rounds * 0.043, "other": rounds * 0.0021, "prefill": 0.9},
        "rounds": rounds,
        "tokens": 2400,
        "identical_to_plain": 22,
    }


def fabricate(folder: Path) -> dict[str, Path]:
    """A result, a curve, a ledger and a summary with made-up figures, as files."""
    bench = {
        "schema": BENCH_SCHEMA,
        "provenance": {"argv": ["redraft", "bench"], "torch": "2.13.0", "note": "<made up> & not measured"},
        "setup": {
            "target": "made-up target",
            "sampler": "greedy",
            "gamma": 5,
            "shape": "chain",
            "prompts": 24,
            "max_new_tokens": 128,
            "batch": 1,
            "seed": 0,
        },
        "plain": {
            "float32": {"tokens_per_second": _interval(17.5, 0.6)},
            "bfloat16": {"tokens_per_second": _interval(25.0, 0.8)},
            "fastest": "bfloat16",
        },
        "drafts": {
            "stale": _draft(1.43, 0.94, [0.34, 0.22, 0.18, 0.15, 0.12]),
            "aligned": _draft(2.58, 1.71, [0.71, 0.66, 0.62, 0.6, 0.57]),
        },
        "gains": {"aligned over stale": {"tau": _interval(1.15, 0.11), "speed": _interval(1.82, 0.1)}},
        "per_prompt": [],
    }
    stages = [
        {
            "stage": "regenerate",
            "tokens": 45_000,
            "flops": 1.3e13,
            "formula": "2 * target parameters * tokens",
            "seconds": 66.0,
            "peak_memory_bytes": 1_400_000_000,
            "bytes_written": 560_000,
        },
        {
            "stage": "train",
            "tokens": 90_000,
            "flops": 3.9e12,
            "formula": "6 * trained * tokens",
            "seconds": 187.0,
            "peak_memory_bytes": 2_100_000_000,
            "bytes_written": 4_300_000,
        },
    ]
    curve = [{"step": s, "tokens": s * 1500, "seconds": s * 3.1, "loss": 1.2 + 2.4 / (1 + s / 9)} for s in range(60)]
    for point in curve[::10]:
        point["heldout_tau"] = 1.4 + 1.1 * (1 - 1 / (1 + point["step"] / 12))
    paths = {name: folder / name for name in ("bench.json", "ledger.json", "curve.jsonl", "summary.json")}
    paths["bench.json"].write_text(json.dumps(bench))
    paths["ledger.json"].write_text(json.dumps({"stages": stages}))
    paths["curve.jsonl"].write_text("".join(json.dumps(point) + "\n" for point in curve))
    paths["summary.json"].write_text(
        json.dumps(
            {
                "tau": {"stale": 1.4, "aligned": 2.5, "full": 2.6},
                "speedup": {"stale": 0.94, "aligned": 1.71},
                "trained_fraction_of_full": 0.16,
                "minutes": 8.2,
                "provenance": {},
            }
        )
    )
    return paths


@pytest.fixture
def made_up(tmp_path: Path) -> dict[str, Path]:
    return fabricate(tmp_path)


@pytest.fixture
def page(made_up: dict[str, Path], tmp_path: Path) -> str:
    out = build_report(
        [made_up["bench.json"]],
        tmp_path / "report.html",
        made_up["curve.jsonl"],
        made_up["ledger.json"],
        made_up["summary.json"],
        title="A made-up <report>",
    )
    return out.read_text(encoding="utf-8")


def test_page_shows_every_figure(page: str) -> None:
    text = re.sub(r"\s+", " ", page)
    for figure in (
        "1.43",
        "2.58",
        "2.51 to 2.65",
        "1.71×",
        "1.65 to 1.77",
        "0.94×",
        "42.8",
        "22 of 24",
        "14.3 M",
        "17.5",
        "greedy, chain of 5, 24 prompts",
        "92%",
        "16.0%",
        "135,000",
        "2.1 GB",
        "16.9 TFLOP",
        "4 min 13 s",
        "6 * trained * tokens",
        "aligned over stale: acceptance length higher by 1.15",
    ):
        assert figure in text, figure


def test_page_is_self_contained_and_safe(page: str) -> None:
    assert "://" not in page and "//cdn" not in page
    assert not re.search(r"<script|<link|<img|<iframe|@import|url\((?!#)", page)
    assert "A made-up &lt;report&gt;" in page and "&lt;made up&gt;" in page
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page


def test_pictures_take_the_page_colours_and_share_no_identifier(page: str) -> None:
    pictures = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(pictures) == 2 + 2 + 1 + 2
    for picture in pictures:
        assert "currentColor" in picture and "aria-label" in picture
        assert "#000000" not in picture and "#010203" not in picture and "#010204" not in picture
    identifiers = re.findall(r'\sid="([^"]+)"', page)
    assert len(identifiers) == len(set(identifiers))
    assert set(re.findall(r'href="#([^"]+)"', page)) | set(re.findall(r"url\(#([^)]+)\)", page)) <= set(identifiers)


def test_optional_parts_are_left_out(made_up: dict[str, Path], tmp_path: Path) -> None:
    page = build_report([made_up["bench.json"], made_up["bench.json"]], tmp_path / "two.html").read_text()
    assert "What it cost" not in page and "<h2>Training" not in page
    identifiers = re.findall(r'\sid="([^"]+)"', page)
    assert len(identifiers) == len(set(identifiers))


def test_same_inputs_give_the_same_bytes(made_up: dict[str, Path], tmp_path: Path) -> None:
    first = build_report([made_up["bench.json"]], tmp_path / "a.html").read_bytes()
    assert first == build_report([made_up["bench.json"]], tmp_path / "b.html").read_bytes()


def test_round_cost_and_ideal(made_up: dict[str, Path]) -> None:
    result = BenchResult.model_validate(json.loads(made_up["bench.json"].read_text()))
    cost = round_cost(result, result.drafts["aligned"])
    assert cost.draft == pytest.approx(0.011 / 0.04)
    assert cost.c == pytest.approx(0.011 / 0.04 / 5)
    assert cost.verify == pytest.approx(0.043 / 0.04)
    assert cost.ideal == pytest.approx(2.58 / (1 + 0.275))
    assert cost.round_ms == pytest.approx(56.1 + 900 / 930)
    assert cost.total == pytest.approx(cost.round_ms / 40)


def _edit(made_up: dict[str, Path], edit) -> Path:
    data = copy.deepcopy(json.loads(made_up["bench.json"].read_text()))
    edit(data)
    made_up["bench.json"].write_text(json.dumps(data))
    return made_up["bench.json"]


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda d: d.update(schema="redraft.bench/9"), r"bench\.json: schema is 'redraft.bench/9'.*redraft.bench/1"),
        (lambda d: d.pop("schema"), "schema is None"),
        (lambda d: d["drafts"]["aligned"]["tau_pooled"].pop("low"), r"drafts\.aligned\.tau_pooled\.low"),
        (lambda d: d["setup"].update(gamma=0), r"setup\.gamma"),
        (lambda d: d["plain"].update(fastest="float16"), "float16"),
        (lambda d: d.update(drafts={}), "drafts"),
        (lambda d: d["drafts"]["stale"]["time"].update(verify="long"), r"drafts\.stale\.time\.verify"),
    ],
)
def test_another_shape_is_refused_by_name(made_up: dict[str, Path], tmp_path: Path, edit, says: str) -> None:
    path = _edit(made_up, edit)
    with pytest.raises(UserError, match=says) as caught:
        build_report([path], tmp_path / "no.html")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "no.html").exists()


def test_broken_files_are_named_with_their_line(made_up: dict[str, Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text('{"schema":\n "redraft.bench/1",\n oops}')
    with pytest.raises(UserError, match=r"broken\.json: broken JSON at line 3"):
        build_report([broken], tmp_path / "no.html")
    with pytest.raises(UserError, match=r"absent\.json: cannot be read"):
        build_report([tmp_path / "absent.json"], tmp_path / "no.html")
    broken.write_text("[1, 2]")
    with pytest.raises(UserError, match="schema is None"):
        build_report([broken], tmp_path / "no.html")
    with pytest.raises(UserError, match="at least one result"):
        build_report([], tmp_path / "no.html")
    for name in ("ledger", "summary"):
        with pytest.raises(UserError, match=r"broken\.json"):
            build_report([made_up["bench.json"]], tmp_path / "no.html", **{name: broken})


def test_curve_keeps_whole_lines_only(tmp_path: Path) -> None:
    path = tmp_path / "curve.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert [(p.step, p.loss, p.heldout_tau) for p in read_curve(path)] == [(1, 2.0, None)]
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo\n{"step": 3, "loss": 1.0}\n')
    with pytest.raises(UserError, match=r"curve\.jsonl:2: broken JSON"):
        read_curve(path)
    path.write_text('{"step": 1}\n')
    with pytest.raises(UserError, match=r"curve\.jsonl:1: loss"):
        read_curve(path)
    path.write_text('{"step": 2, "loss": 3.0}\n{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    assert [(p.step, p.loss) for p in read_curve(path)] == [(1, 2.0), (2, 1.0)]


def test_headline_png(made_up: dict[str, Path], tmp_path: Path) -> None:
    picture = headline_png(made_up["bench.json"], tmp_path / "headline.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000


def test_figures_that_do_not_exist_are_dashes(made_up: dict[str, Path], tmp_path: Path) -> None:
    def edit(data: dict) -> None:
        draft = data["drafts"]["stale"]
        draft["acceptance_conditional"][4] = None
        draft["alpha"] = None
        draft["identical_to_plain"] = None
        draft["tau_macro"] = {"value": 1.5, "low": float("nan"), "high": float("nan")}

    page = build_report([_edit(made_up, edit)], tmp_path / "r.html").read_text()
    shown = re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL)
    assert shown.count("&ndash;") > 4
    assert not re.search(r"\bnan\b", shown)


def _print(renderable: object) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))
    console.print(renderable)
    return console.export_text()


def test_terminal_tables(made_up: dict[str, Path]) -> None:
    bench = _print(tables.bench_table(json.loads(made_up["bench.json"].read_text())))
    for figure in ("aligned", "2.58 (2.51 to 2.65)", "1.71× (1.65 to 1.77)", "plain float32", "0.70×", "22/24"):
        assert figure in bench
    positions = _print(tables.acceptance_table(json.loads(made_up["bench.json"].read_text())))
    assert "0.71" in positions and "0.47" in positions
    costs = _print(tables.ledger_table(json.loads(made_up["ledger.json"].read_text())))
    assert "135,000" in costs and "16.9 TFLOP" in costs and "2.1 GB" in costs
    summary = _print(tables.summary_table(json.loads(made_up["summary.json"].read_text())))
    assert "2.60" in summary and "92% of the gain" in summary and "8.2 minutes" in summary
    probe = _print(tables.probe_panel("stale: adapt", {"tau": "1.43"}, healthy=False))
    assert "stale: adapt" in probe and "1.43" in probe
