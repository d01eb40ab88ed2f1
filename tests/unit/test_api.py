"""The Python API: what `import redraft` offers, its names and defaults, opened objects, results that print well."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import redraft
from redraft.drafts.eagle3 import fresh_draft
from redraft.drafts.files import load_draft, save_draft
from redraft.loading import tokenizer_hash
from redraft.settings.base import Settings
from redraft.settings.steps import (
    BenchSettings,
    ExportSettings,
    MergeSettings,
    ProbeSettings,
    RegenerateSettings,
    ReportSettings,
    SelectSettings,
    TrainSettings,
)
from redraft.settings.studies import StudySettings
from redraft.shown import Shown, lines
from redraft.target import Target

SOURCE = Path(redraft.__file__).parents[1]
FUNCTIONS = (
    "adapt bench export import_draft merge open_draft open_target probe regenerate report select study train".split()
)


# -- the front door ----------------------------------------------------------------------------------------------------
def test_import_loads_nothing_and_lists_what_there_is() -> None:
    script = (
        "import sys, redraft\n"
        "names = dir(redraft)\n"
        "heavy = {'torch', 'transformers', 'pydantic', 'rich', 'redraft.errors'} & set(sys.modules)\n"
        "print(*names); print('heavy:', heavy or 'none')\n"
    )
    environment = {"PYTHONPATH": str(SOURCE), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert set(FUNCTIONS) <= set(done.stdout.splitlines()[0].split()) and "heavy: none" in done.stdout


def test_every_name_is_there_and_stays_there() -> None:
    """A room of the package that is imported later must not take the place of a function of its name."""
    for name in [*dir(redraft), *dir(redraft)]:
        assert getattr(redraft, name) is not None
    assert all(inspect.isfunction(getattr(redraft, name)) for name in FUNCTIONS)
    with pytest.raises(AttributeError, match="no attribute 'probes'"):
        redraft.probes  # noqa: B018


def test_every_function_says_what_it_does_with_an_example() -> None:
    for name in FUNCTIONS:
        told = inspect.getdoc(getattr(redraft, name)) or ""
        assert f"redraft.{name}(" in told and told[0].isupper(), name
        hints = inspect.get_annotations(getattr(redraft, name))
        assert "return" in hints and set(inspect.signature(getattr(redraft, name)).parameters) <= set(hints), name


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("probe", ProbeSettings),
        ("regenerate", RegenerateSettings),
        ("select", SelectSettings),
        ("train", TrainSettings),
        ("merge", MergeSettings),
        ("export", ExportSettings),
        ("bench", BenchSettings),
        ("report", ReportSettings),
        ("study", StudySettings),
    ],
)
def test_keywords_are_named_and_begin_as_the_settings_of_the_command(name: str, kind: type[Settings]) -> None:
    own = {"say", "settings", "drafts", "servers", "private"}  # what a function has that no flag is
    for keyword, parameter in inspect.signature(getattr(redraft, name)).parameters.items():
        if keyword in own:
            continue
        field = kind.model_fields[keyword]
        if parameter.default is not inspect.Parameter.empty and not field.is_required():
            default = field.get_default(call_default_factory=True)
            assert parameter.default == (str(default) if isinstance(default, Path) else default or parameter.default)


# -- opened objects ----------------------------------------------------------------------------------------------------
@dataclass
class World:
    """A target and a draft, as files and opened, with prompts and answers."""

    folder: Path
    target: Target
    draft: Any
    prompts: Path
    responses: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_target: Callable[..., Target]) -> World:
    folder = tmp_path_factory.mktemp("api")
    target = tiny_target(seed=0, taps=(1, 3, 5))
    target.save(folder / "target")
    draft = fresh_draft(target, list(range(4, 60)), seed=0, intermediate=32)
    save_draft(folder / "draft", draft, {"tokenizer_hash": tokenizer_hash(target.tokenizer), "method": "scratch"})
    talks = [{"id": f"p{i}", "messages": [{"role": "user", "content": f"the rain is {i}"}]} for i in range(16)]
    prompts = folder / "prompts.jsonl"
    prompts.write_text("\n".join(map(json.dumps, talks)))
    opened = redraft.open_target(folder / "target", dtype="float32")
    redraft.regenerate(opened, prompts, folder / "responses.jsonl", max_new_tokens=12)
    return World(folder, opened, redraft.open_draft(folder / "draft", opened), prompts, folder / "responses.jsonl")


def test_names_and_opened_objects_are_the_same(world: World, tmp_path: Path) -> None:
    named = redraft.TargetSpec(str(world.folder / "target"), "float32")
    ways = [
        (named, world.folder / "draft"),
        (world.target, world.draft),
        (str(named.name), str(world.folder / "draft")),
    ]
    taus = []
    for target, draft in ways[:2]:
        found = redraft.probe(target, draft, world.prompts, limit=4, gamma=3, max_new_tokens=12, say=None)
        taus.append(found.tau)
    assert taus[0] == taus[1]
    for number, (target, draft) in enumerate(ways):
        redraft.export(draft, target, "plain", tmp_path / str(number))  # no copy of the embedding in it
    files = [(tmp_path / str(number) / "model.safetensors").read_bytes() for number in range(3)]
    assert files[0] == files[2] and len(files[1]) * 2 == pytest.approx(len(files[0]), rel=0.1), "opened: in bfloat16"


def test_a_spec_of_an_opened_target_opens_the_same_again(world: World) -> None:
    spec = redraft.TargetSpec.of(world.target)
    assert spec.open() is world.target and spec.open("float32") is world.target
    other = spec.open("bfloat16")
    assert other is not world.target and other.name == world.target.name
    assert redraft.TargetSpec.of(spec) is spec


def test_training_leaves_an_opened_draft_as_it_was_and_takes_a_loss_by_autograd(world: World, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in world.draft.draft.state_dict().items()}
    settings = {"epochs": 1, "batch_anchors": 40, "optimizer": "adamw", "loss": "tv"}
    trained = redraft.train(
        world.target, world.responses, tmp_path / "run", draft=world.draft, heldout=4, private={"rank": 2}, **settings
    )
    assert trained.start_tau is not None and trained.tau >= trained.start_tau
    assert all((tensor == before[name]).all() for name, tensor in world.draft.draft.state_dict().items())
    again = redraft.open_draft(trained.draft, world.target)
    assert again.meta["method"] == "lora" and again.source == str(trained.draft)
    merged = redraft.merge(trained.private, world.folder / "draft", tmp_path / "merged", scale=0.5)
    assert load_draft(merged.folder)[1]["merged_from"]["scale"] == 0.5
    assert str(merged).startswith(f"{merged.folder}: ")


def test_adapt_takes_opened_objects_a_mapping_and_keywords(world: World, tmp_path: Path) -> None:
    config = {"heldout-prompts": 3, "bench_prompts": 2, "bench_tokens": 8, "max_new_tokens": 12, "gamma": 4}
    run = redraft.adapt(
        world.target,
        world.draft,
        tmp_path / "run",
        config=config,
        gamma=3,
        prompts=str(world.prompts),
        method="fc",
        train={"epochs": 1},
        say=lambda text: None,
    )
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (stored["gamma"], stored["bench_prompts"], stored["dtype"]) == (3, 2, "float32")
    assert run.page is not None and run.page.is_file() and set(run.exports) == {"vllm"} and run.private is not None
    assert "acceptance by position" in str(run) and f"draft: {run.draft}" in str(run)


# -- mistakes ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda w, to: redraft.probe(w.target, w.draft, w.prompts, limit=1), "limit must be 2 or more, not 1"),
        (lambda w, to: redraft.export(w.draft, w.target, "vlm", to), "unknown export format 'vlm' .did you mean vllm"),
        (lambda w, to: redraft.bench(w.target, w.draft, to, prompts=w.prompts, shape="chan:3"), "chan:3"),
        (lambda w, to: redraft.bench(w.target, None, to, prompts=w.prompts), "give --draft"),
        (lambda w, to: redraft.select(to, responses=w.responses), "give --target"),
        (lambda w, to: redraft.train(w.target, w.responses, to, draft=w.draft, lose="kl"), "lose"),
        (lambda w, to: redraft.adapt(w.target, w.draft, to, prompts="p", epoch=3), "unknown setting epoch"),
        (lambda w, to: redraft.adapt(w.target, w.draft, to, config={"prompts": "p", "los": "kl"}), "los"),
        (lambda w, to: redraft.regenerate(w.target, w.prompts, to / "r", top_p=0.9), "leaves nothing to filter"),
        (lambda w, to: redraft.open_draft(None, w.target), "None is no draft; name its folder"),
        (lambda w, to: redraft.select(to, responses=w.responses, scorer=None), "give --target"),
        (lambda w, to: redraft.adapt(config=[1]), "config must be a YAML file or a mapping of settings, not .1."),
        (lambda w, to: redraft.report(None, to), "results 0 must be a path, not None"),
        (lambda w, to: redraft.study({"name": "s"}, to), "config must be the YAML file of a study, not {'name': 's'}"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_done(world: World, tmp_path: Path, call: Any, says: str) -> None:
    with pytest.raises(redraft.UserError, match=says) as caught:
        call(world, tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


# -- results -----------------------------------------------------------------------------------------------------------
def test_results_print_and_show_in_a_notebook(world: World, tmp_path: Path) -> None:
    drafts = {"stale": world.draft, "again": world.folder / "draft"}
    found = redraft.bench(
        world.target, drafts, tmp_path / "b.json", prompts=world.prompts, limit=2, shape="chain:2", max_new_tokens=8
    )
    assert list(found.figures["drafts"]) == ["stale", "again"]
    text, page = str(found), found._repr_html_()
    assert "speed-up" in text and "again" in text and "\x1b" not in text
    assert page.startswith("<pre") and "speed-up" in page and "style=" in page
    shown = redraft.report(found, tmp_path / "page.html")
    assert str(shown) == str(tmp_path / "page.html") and Path(shown).is_file()
    assert shown._repr_html_().startswith("<iframe srcdoc=") and "&lt;html" in shown._repr_html_()
    chosen = redraft.select(tmp_path / "s.json", responses=world.responses, scorer="length", budget="5")
    assert str(chosen).startswith("5 of ")
    assert str(world.draft).endswith("parameters") and "eagle3 draft" in str(world.draft)


def test_long_lines_are_not_broken() -> None:
    class Long(Shown):
        def __rich__(self) -> Any:
            return lines("x" * 300, "[bold]y[/bold]")

    assert str(Long()).splitlines() == ["x" * 300, "[bold]y[/bold]"]
    with pytest.raises(NotImplementedError):
        str(Shown())
