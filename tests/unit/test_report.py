"""The report on results made up here: nothing in this file is a measurement."""

from __future__ import annotations

import base64
import copy
import hashlib
import html
import json
import re
import runpy
from pathlib import Path

import pytest
from rich.console import Console

from redraft.errors import UserError
from redraft.reports import build_report, headline_png, sections, tables
from redraft.reports import format as form
from redraft.reports.load import BenchResult, CurvePoint, read_bench, read_curve
from redraft.reports.plots import COLOURS, training_svgs

DATA = runpy.run_path(str(Path(__file__).parents[1] / "report_data.py"))


@pytest.fixture
def made_up(tmp_path: Path) -> dict[str, Path]:
    return DATA["fabricate"](tmp_path)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("page")
    made_up = DATA["fabricate"](folder)
    out = build_report(
        [made_up["bench.json"]],
        folder / "report.html",
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
    assert not re.search(r"<link|<img|<iframe|@import|url\((?!#)|\bsrc=|\bfetch\(|XMLHttpRequest|import\(", page)
    assert "A made-up &lt;report&gt;" in page and "&lt;made up&gt;" in page
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page


def test_its_policy_allows_its_own_script_and_nothing_else(page: str) -> None:
    (script,) = re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy and f"script-src 'sha256-{digest}'" in policy[1] and policy[1].startswith("default-src 'none'")
    assert page.index(policy[0]) < page.index("<script>")
    assert not re.search(r"\son\w+=", re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL))


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
    cost = sections.round_costs(result)["aligned"]
    assert cost["draft"] == pytest.approx(0.011 / 0.04)
    assert cost["c"] == pytest.approx(0.011 / 0.04 / 5)
    assert cost["verify"] == pytest.approx(0.043 / 0.04)
    assert cost["ideal"] == pytest.approx(2.58 / (1 + 0.275))
    assert cost["round_ms"] == pytest.approx(56.1 + 900 / 930)
    assert cost["total"] == pytest.approx(cost["round_ms"] / 40)


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
        (lambda d: d["drafts"]["aligned"]["alpha"].update(low=float("nan")), r"aligned\.alpha.*one end"),
        (lambda d: d.update(per_prompt=[{"id": "a", "drafts": {"aligned": {"rounds": {}}}}]), r"per_prompt.*rounds"),
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


def test_passwords_that_older_results_kept_are_not_on_the_page(made_up: dict[str, Path], tmp_path: Path) -> None:
    argv = [
        "redraft",
        "bench",
        "--server",
        "new=http://me:hush@host:8000/v1?key=hush2",
        "x=serve --api-key hush3 {port}",
    ]
    path = _edit(made_up, lambda d: d["provenance"].update(argv=argv))
    page = build_report([path], tmp_path / "page.html").read_text()
    assert "hush" not in page and "http://***@host:8000/v1?***" in page and "--api-key *** {port}" in page


def test_an_interval_over_one_prompt_is_not_shown() -> None:
    assert form.bounds(form.Interval(value=2.0, low=2.0, high=2.0)) == ""
    assert form.bounds(form.Interval(value=2.0, low=1.5, high=2.25)) == "1.50 to 2.25"


def test_broken_files_are_named_with_their_line(made_up: dict[str, Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text('{"schema":\n "redraft.bench/1",\n oops}')
    with pytest.raises(UserError, match=r"broken\.json is not JSON: line 3"):
        build_report([broken], tmp_path / "no.html")
    with pytest.raises(UserError, match=r"absent\.json does not exist"):
        build_report([tmp_path / "absent.json"], tmp_path / "no.html")
    broken.write_text("[1, 2]")
    with pytest.raises(UserError, match=r"broken\.json must hold a JSON object, not a list"):
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
    with pytest.raises(UserError, match=r"curve\.jsonl:2: not JSON"):
        read_curve(path)
    path.write_text('{"step": 1}\n')
    with pytest.raises(UserError, match=r"curve\.jsonl:1: loss"):
        read_curve(path)
    path.write_text('{"step": 2, "loss": 3.0}\n{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    assert [(p.step, p.loss) for p in read_curve(path)] == [(1, 2.0), (2, 1.0)]


def test_the_curve_begins_with_the_draft_as_it_was(made_up: dict[str, Path], tmp_path: Path) -> None:
    """Step 0 stands in the run's state, not among the lines of the steps; it is in the picture and in the table."""
    path, state = tmp_path / "curve.jsonl", tmp_path / "state.json"
    path.write_text('{"step": 4, "loss": 2.0, "tokens": 9, "heldout_tau": 1.8}\n')
    state.write_text(json.dumps({"state": {"history": [[0, 1.25], [4, 1.8]]}}))
    assert [(p.step, p.loss, p.heldout_tau) for p in read_curve(path)] == [(0, None, 1.25), (4, 2.0, 1.8)]
    page = build_report([made_up["bench.json"]], tmp_path / "r.html", path).read_text()
    assert re.search(r"<td>0</td><td>0</td><td>0.0 s</td><td>\u2013</td><td>1.25</td>", page)
    assert "before training" in page
    # A figure of another kind says nothing of tau; a file that is no state is told of.
    path.write_text('{"step": 4, "loss": 2.0, "heldout_loss": 1.8}\n')
    assert [p.step for p in read_curve(path)] == [4]
    path.write_text('{"step": 4, "loss": 2.0, "heldout_tau": 1.8}\n')
    state.write_text("[]")
    with pytest.raises(UserError, match=r"state\.json must hold a JSON object"):
        read_curve(path)


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


def test_a_gain_that_is_the_same_everywhere_has_no_empty_interval(made_up: dict[str, Path], tmp_path: Path) -> None:
    def edit(data: dict) -> None:
        data["gains"]["aligned over stale"]["tau"] = {"value": 0.0, "low": 0.0, "high": 0.0}

    page = build_report([_edit(made_up, edit)], tmp_path / "r.html").read_text()
    assert "aligned over stale: acceptance length higher by 0.00</p>" in page
    assert "times the tokens a second (95% interval " in page and not re.search(r"\(95% interval\s*\)", page)


def test_plain_decoding_in_another_type_says_what_its_speed_up_is_over(
    made_up: dict[str, Path], tmp_path: Path
) -> None:
    """Its rate is over a few prompts and so is the ratio: the rates of the table alone give another number."""
    said = "lain bfloat16: on the few prompts that chose the data type, and over float32 on the same ones"

    def edit(data: dict) -> None:
        data["plain"] = {
            "float32": {"tokens_per_second": {"value": 500.0, "low": 400.0, "high": 600.0}},
            "bfloat16": {
                "tokens_per_second": {"value": 300.0, "low": 290.0, "high": 310.0},
                "relative": {"value": 0.8, "low": 0.7, "high": 0.9},
            },
            "fastest": "float32",
        }

    assert said not in _print(tables.bench_table(json.loads(made_up["bench.json"].read_text())))
    path = _edit(made_up, edit)
    assert f"P{said}." in build_report([path], tmp_path / "r.html").read_text()
    assert f"p{said}" in _print(tables.bench_table(json.loads(path.read_text())))


@pytest.mark.parametrize(("steps", "drawn"), [(1, "<use"), (2, "<path")])
def test_a_training_of_one_step_is_a_dot_and_of_more_a_line(steps: int, drawn: str) -> None:
    points = [CurvePoint(step=step, loss=1.0, tokens=10 * step) for step in range(1, steps + 1)]
    picture = training_svgs(points, None)[0]
    shown = re.findall(rf"(<use|<path)\b[^>]*style=\"fill: [^>]*stroke: {COLOURS['aligned']}", picture)
    assert shown == [drawn]


def _print(renderable: object) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))
    console.print(renderable)
    return console.export_text()


def test_terminal_tables(made_up: dict[str, Path]) -> None:
    bench = _print(tables.bench_table(json.loads(made_up["bench.json"].read_text())))
    for figure in ("aligned", "2.58 (2.51 to 2.65)", "1.71× (1.65 to 1.77)", "plain float32", "0.70×", "22 of 24"):
        assert figure in bench
    positions = _print(tables.acceptance_table(json.loads(made_up["bench.json"].read_text())))
    assert "0.71" in positions and "0.47" in positions
    costs = _print(tables.ledger_table(json.loads(made_up["ledger.json"].read_text())))
    assert "135,000" in costs and "16.9 TFLOP" in costs and "2.1 GB" in costs
    summary = _print(tables.summary_table(json.loads(made_up["summary.json"].read_text())))
    assert "2.60" in summary and "92% of the gain" in summary and "8.2 minutes" in summary
    probe = _print(tables.probe_panel("stale", {"tau": "1.43 [1.20, 1.60]"}, "try"))
    assert "stale" in probe and "1.43 [1.20, 1.60]" in probe


# -- what newer results add ------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of a result with every addition, a hostile trace and server levels among them; nobody changes them."""
    result = DATA["rich_bench"]()
    result["traces"].append(DATA["hostile_trace"]())
    result["server"] = DATA["server"]()
    return DATA["fabricate"](tmp_path_factory.mktemp("rich"), result)


@pytest.fixture(scope="module")
def rich_page(rich: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_report([rich["bench.json"]], tmp_path_factory.mktemp("rich") / "r.html").read_text(encoding="utf-8")


def part(page: str, key: str) -> str:
    """The text of one part of the page, without tags, from its heading to the next of the same level."""
    start = page.index(f'id="r0-{key}"')
    end = page.find("<h2", start)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<svg.*?</svg>|<[^>]*>", " ", page[start:end], flags=re.DOTALL)))


def test_sections_of_a_full_result(rich_page: str) -> None:
    expected = {
        "tasks": (
            "gsm8k",
            "mt-bench",
            "humaneval",
            "2.46 to 2.70",
            "1.63 to 1.79",
            "23.8 to 26.2",
            "Every prompt (24)",
        ),
        "acceptance": ("rounds that reach it", "0.710", "0.469"),
        "time": ("took 0.34% of the decoding", "57.1", "2.02×", "MBSU by time", "MBSU by bytes", "0.106", "1.69×"),
        "server": ("under way", "plain", "aligned", "16", "254.6", "1.68×", "0.388", "timed out after 60 s"),
        "quality": ("5", "8", "0.625", "score the same on every task"),
        "divergence": ("24", "20", "4", "16.7%", "0.016", "0.031"),
    }
    for key, figures in expected.items():
        text = part(rich_page, key)
        for figure in figures:
            assert figure in text, (key, figure, text[:400])
    assert "Proposal picked by measurement: chain of 5, 1.71 times expected" in rich_page
    for key in (*expected, "tokens", "drafts"):
        assert f'<a href="#r0-{key}">' in rich_page


def test_every_picture_speaks(rich_page: str) -> None:
    pictures = re.findall(r"<svg.*?</svg>", rich_page, flags=re.DOTALL)
    assert len(pictures) == 2 + 2 + 2 + 1 + 2 + 1
    spoken = [re.search(r'role="img" aria-label="([^"]*)"', picture) for picture in pictures]
    assert all(spoken)
    assert any("gsm8k: stale 1.43, aligned 2.58" in found[1] for found in spoken if found)


@pytest.mark.usefixtures("no_pictures")
def test_the_arithmetic_that_a_result_was_made_with_is_said() -> None:
    record = {"instructions": "AVX2", "limits": {"torch": "avx2", "onednn": "AVX2", "mkl": None}}
    record |= {"chosen": {"cpu": {"dtype": "float32", "gflops": {"bfloat16": 0.91, "float32": 104.2}}}}
    words = "AVX2, torch held to avx2, onednn held to AVX2, float32 chosen (GFLOP/s: 0.91 in bfloat16, 104 in float32)"
    assert dict(sections.facts({"arithmetic": record}))["arithmetic"] == words
    assert dict(sections.facts({"arithmetic": {"instructions": "AVX512", "limits": {}}}))["arithmetic"] == "AVX512"
    assert "arithmetic" not in dict(sections.facts({"machine": {"cpu": "of before"}}))


def test_a_draft_in_another_type_and_a_slow_one_are_told_on_the_page(made_up: dict[str, Path], tmp_path: Path) -> None:
    result = json.loads(made_up["bench.json"].read_text())
    result["drafts"]["aligned"]["dtype"] = "float32"
    result["drafts"]["stale"]["speedup"] = {"value": 0.85, "low": 0.8, "high": 0.9}
    path = tmp_path / "other.json"
    path.write_text(json.dumps(result))
    page = build_report([path], tmp_path / "page.html").read_text()
    assert "stale is slower than plain decoding: 0.85" in page and "(95% interval 0.80 to 0.90)" in page
    assert "aligned in float32" in page and "data type that is fastest for it" in page
    old = build_report([made_up["bench.json"]], tmp_path / "old.html").read_text()
    assert "aligned in" not in old and "data type that is fastest" not in old


def test_scores_that_differ_are_said_so(tmp_path: Path) -> None:
    result = DATA["rich_bench"]()
    result["drafts"]["stale"]["quality"]["gsm8k"]["correct"] = 4
    page = build_report([DATA["fabricate"](tmp_path, result)["bench.json"]], tmp_path / "r.html").read_text()
    assert "Scores differ on gsm8k with stale (4 of 8, plain 5)" in part(page, "quality")
    result["drafts"]["stale"]["quality"]["gsm8k"] |= {"correct": 5, "changed": 2}
    page = build_report([DATA["fabricate"](tmp_path, result)["bench.json"]], tmp_path / "r.html").read_text()
    assert "same on every task, though 2 verdicts changed" in part(page, "quality")


@pytest.mark.usefixtures("no_pictures")
def test_a_divergence_that_is_no_near_tie_is_counted_apart(tmp_path: Path) -> None:
    result = DATA["rich_bench"]()
    result["drafts"]["aligned"]["divergence"] |= {"identical": 15, "near_ties": 6}
    page = build_report([DATA["fabricate"](tmp_path, result)["bench.json"]], tmp_path / "r.html").read_text()
    assert "aligned 24 15 6 3 37.5%" in part(page, "divergence")


def test_no_plain_baseline(tmp_path: Path) -> None:
    """A server without a plain baseline: no speed-up, rounds in milliseconds, and without timing no round at all."""
    result = DATA["rich_bench"]()
    del result["plain"], result["gains"], result["setup"]["gamma"]
    result["setup"]["server"] = "vLLM 0.32, one replica"
    for figures in result["drafts"].values():
        for key in ("speedup", "ideal_speedup", "mbsu", "by_task"):
            del figures[key]
    page = build_report([DATA["fabricate"](tmp_path, result)["bench.json"]], tmp_path / "r.html").read_text()
    assert "No plain baseline was measured" in page and "vLLM 0.32, one replica" in page
    assert "in milliseconds" in part(page, "time") and "57.1" in part(page, "time")
    assert "measured" not in part(page, "time")
    shown = re.sub(r"<script>.*?</script>|<style>.*?</style>", "", page, flags=re.DOTALL)
    assert "None" not in shown and "speed-up over" not in shown
    for figures in result["drafts"].values():
        del figures["time"], figures["tokens_per_second"]
    paths = DATA["fabricate"](tmp_path, result)
    page = build_report([paths["bench.json"]], tmp_path / "r.html").read_text()
    assert 'id="r0-time"' not in page and 'id="r0-drafts"' in page
    assert headline_png(paths["bench.json"], tmp_path / "h.png").read_bytes().startswith(b"\x89PNG")
    assert "stale" in _print(tables.bench_table(result)) and "chain of 5" in _print(tables.bench_table(result))


def test_several_results_in_one_page(made_up: dict[str, Path], rich: dict[str, Path], tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text(json.dumps(DATA["bench"]()))
    page = build_report([rich["bench.json"], other], tmp_path / "two.html").read_text(encoding="utf-8")
    for link in ('<a href="#r0">', '<a href="#r1">', 'id="r0"', 'id="r1"', 'id="r1-drafts"'):
        assert link in page
    assert "All results" in page
    identifiers = re.findall(r'\sid="([^"]+)"', page)
    assert len(identifiers) == len(set(identifiers))


def test_every_link_leads_somewhere(rich_page: str) -> None:
    identifiers = set(re.findall(r'\sid="([^"]+)"', rich_page))
    assert set(re.findall(r'href="#([^"]+)"', rich_page)) <= identifiers


def test_terminal_table_by_task(rich: dict[str, Path], made_up: dict[str, Path]) -> None:
    table = tables.task_table(DATA["rich_bench"]())
    assert table is not None
    text = _print(table)
    assert "mt-bench" in text and "2.58 (2.46 to 2.70)" in text
    assert tables.task_table(DATA["bench"]()) is None


def test_additions_of_another_shape_are_refused_by_name(tmp_path: Path) -> None:
    def spoil(edit) -> str:
        result = DATA["rich_bench"]()
        edit(result)
        with pytest.raises(UserError) as caught:
            read_bench(DATA["fabricate"](tmp_path, result)["bench.json"])
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "traces.0.drafts.stale" in spoil(lambda r: r["traces"][0]["drafts"]["stale"]["tokens"].pop())
    assert "prefill and rounds gave" in spoil(lambda r: r["traces"][0]["drafts"]["stale"]["tokens"].append("x"))
    assert "by_task.gsm8k.tau_pooled" in spoil(lambda r: r["drafts"]["stale"]["by_task"]["gsm8k"].pop("tau_pooled"))
    assert "server.levels" in spoil(lambda r: r.update(server={"levels": []}))
    assert "quality.gsm8k.scored" in spoil(lambda r: r["drafts"]["stale"]["quality"]["gsm8k"].update(scored=-1))
