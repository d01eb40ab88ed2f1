"""``redraft distill`` on a tiny target: all stages, resumption, a given drafter, servers alone, and refusals."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken
from typer.testing import CliRunner

from redraft.adaptation.distill import DistillRun
from redraft.adaptation.models import open_any
from redraft.cli.main import app
from redraft.data.store import read_rows
from redraft.drafts.files import META_FILE
from redraft.errors import UserError
from redraft.loading import load_target, read_facts
from redraft.settings.base import read
from redraft.settings.runs import DistillConfig
from redraft.target import Facts, Target
from redraft.training.loop import Checkpoint

HERE = Path(__file__).parents[1]
shared = runpy.run_path(str(HERE / "tiny_models.py"))
Server = runpy.run_path(str(HERE / "unit" / "test_logprobs.py"))["Server"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a target, text, prompts and settings."""
    folder = tmp_path_factory.mktemp("distill")
    Target(shared["build_model"](num_hidden_layers=2), shared["build_tokenizer"]()).save(folder / "target")
    (folder / "text.txt").write_text("".join(f"{i} he sat there and then he sat\n" for i in range(3000)))
    lines = [json.dumps({"messages": [{"role": "user", "content": f"tell me of {i * 37} and {i}"}]}) for i in range(30)]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    return folder


def settings(place: Path, out: Path, **more: Any) -> dict[str, Any]:
    values = {
        "target": str(place / "target"),
        "out": out,
        "text": (str(place / "text.txt"),),
        "prompts": str(place / "prompts.jsonl"),
        "size": "0.9",
        "heldout_share": 0.4,
        "layers": 1,
        "temperatures": (0.0, 0.7),
        "max_new_tokens": 8,
        "heldout_prompts": 6,
        "dtype": "float32",
        "pretrain": {"tokens": 1024, "length": 32, "batch_tokens": 128, "heldout_tokens": 64, "precision": "float32"},
        "align": {"epochs": 1.0, "batch_anchors": 96, "text_length": 32, "precision": "float32", "evaluate_every": 2},
    }
    return values | more


def run(values: dict[str, Any]) -> tuple[DistillRun, dict[str, Any], list[str]]:
    said: list[str] = []
    job = DistillRun(read(DistillConfig, None, values), said.append)
    return job, job.run(), said


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_target(str(folder), torch.bfloat16).model.state_dict()


def test_all_stages_and_a_stop_in_each(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, record, said = run(settings(place, tmp_path / "whole"))
    folder = tmp_path / "whole"
    assert record["pretrain"]["best"] < record["pretrain"]["start"]
    assert record["align"]["best"] >= record["align"]["start"] >= 1
    assert record["parameters_per_token"] <= 0.9 * record["target_parameters_per_token"]
    assert any("held-out perplexity" in line for line in said) and any("block efficiency" in line for line in said)
    meta = json.loads((folder / "draft" / META_FILE).read_text())
    assert meta["family"] == "standalone" and meta["method"] == "full"
    assert {row.temperature for row in read_rows(folder / "responses.jsonl")} == {0.0, 0.7}
    assert {row.top_p for row in read_rows(folder / "responses.jsonl") if row.temperature} == {0.95}
    plain = load_target(str(folder / "export-hf"), torch.bfloat16)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(plain.model(input_ids=ids).logits, job.aligned.model(input_ids=ids).logits)
    stages = [stage["stage"] for stage in json.loads((folder / "ledger.json").read_text())["stages"]]
    assert stages == ["survey", "pretrain", "regenerate", "regenerate held-out", "align", "export hf"], (
        "the states of the responses were kept while they were written"
    )

    save, saves = Checkpoint.save, []

    def dying(self: Checkpoint, *arguments: Any) -> None:
        save(self, *arguments)
        saves.append(self.folder.name)
        if saves.count(self.folder.name) == 2:
            raise KeyboardInterrupt

    values = settings(place, tmp_path / "stopped")
    for stage in ("pretrain", "align"):
        monkeypatch.setattr(Checkpoint, "save", dying)
        with pytest.raises(KeyboardInterrupt):
            run(values)
        assert saves[-1] == stage
    monkeypatch.setattr(Checkpoint, "save", save)
    run(values)
    found, expected = tensors(tmp_path / "stopped" / "draft"), tensors(folder / "draft")
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    with pytest.raises(UserError, match="belongs to a run with another align loss, loss"):
        run(settings(place, tmp_path / "stopped", loss="kl", align=values["align"]))


def test_a_given_drafter_gets_private_experts(place: Path, tmp_path: Path) -> None:
    """Only they are trained; the whole loads as a plain checkpoint with wider MLPs, the part on its base."""
    sibling = shared["build_model"](seed=3, num_hidden_layers=1)
    Target(sibling, shared["build_tokenizer"]()).save(tmp_path / "sibling")
    values = settings(
        place, tmp_path / "run", draft=str(tmp_path / "sibling"), private_width=8, text=(), text_share=0.0
    )
    values |= {
        "teacher": "tokens",
        "loss": "kl",
        "store_states": False,
        "align": {**values["align"], "learning_rate": 0.1},
    }
    values["align"]["patience"] = 0
    job, record, _ = run(values)
    assert record["pretrain"] is None
    found = tensors(tmp_path / "run" / "draft")
    old = {name: value.to(torch.bfloat16) for name, value in sibling.state_dict().items()}
    assert torch.equal(found["model.embed_tokens.weight"], old["model.embed_tokens.weight"])
    wide = found["model.layers.0.mlp.gate_proj.weight"]
    assert wide.shape[0] == 64 + 8 and torch.equal(wide[:64], old["model.layers.0.mlp.gate_proj.weight"])
    both = open_any(tmp_path / "run" / "private", job.facts, tmp_path / "sibling").draft
    assert both.config.private_width == 8


def test_a_server_alone(place: Path, tmp_path: Path) -> None:
    """Config and tokenizer are here, answers and their log-probabilities come from the server."""

    fake = runpy.run_path(str(HERE / "unit" / "fake_server.py"))["FakeServer"]()
    both = Server()
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in (place / "target").iterdir():
        if file.suffix == ".json" or file.suffix == ".jinja":
            (bare / file.name).write_bytes(file.read_bytes())
    values = settings(place, tmp_path / "run", target=str(bare), server_only=True, server=fake.url, embeddings="random")
    values |= {"teacher": "tokens", "loss": "kl", "batch_size": 2, "exports": ()}
    job, record, _ = run(values)
    assert record["align"]["steps"] > 0 and type(job.facts) is Facts
    assert not list((tmp_path / "run").glob("features*"))
    rows = read_rows(tmp_path / "run" / "responses.jsonl")
    assert rows[0].target_hash.startswith("served-")
    job.config.__dict__["server"] = both.url  # the same responses, scored by a server that can
    job.config.__dict__["teacher"] = "tops"
    teacher = job.teacher(rows[:4])
    first = teacher.of(rows[:4], torch.device("cpu"))(torch.arange(2))
    assert first.isfinite().sum(-1).tolist() == [2, 2]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"server_only": True, "server": "http://x"}, "a server gives no logits to distil from"),
        ({"server_only": True, "teacher": "tokens", "embeddings": "random"}, "name the --server"),
        ({"teacher": "tops"}, "name the --server"),
        ({"server_only": True, "server": "http://x", "teacher": "tokens"}, "--embeddings random"),
        ({"text": ()}, "give --text to pretrain on"),
        ({"responses": "log.jsonl"}, "give --prompts for the target to answer"),
        ({"private_width": 8}, "give it with --draft"),
        ({"loss": "mse"}, "unknown loss"),
        ({"teacher": "gold"}, "teacher must be 'states', 'tops' or 'tokens'"),
        ({"pretrain": {"token": 5}}, "unknown setting token .* in pretrain"),
        ({"align": {"epochs": "many"}}, "align epochs must be a number, not 'many'"),
        ({"gamma": 0}, "gamma must be above 0, not 0; see `redraft distill --help`"),
        ({"size": "1/100000"}, "no shape meets"),
    ],
)
def test_bad_settings_are_one_line(place: Path, tmp_path: Path, more: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        run(settings(place, tmp_path / "run", **more))


def test_yaml_and_flags(place: Path, tmp_path: Path) -> None:
    values = settings(place, tmp_path / "run", text=[str(place / "text.txt")], temperatures=[0.0])
    values["out"] = str(values["out"])
    values["pretrain"] = {"learning_rate": "3e-4", "tokens": 1e6}
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps({key.replace("_", "-"): value for key, value in values.items()}))
    parsed = read(DistillConfig, path, {"pretrain": {"length": 64}, "loss": "tv"})
    made = parsed.pretrain_config()
    assert (made.learning_rate, made.tokens, made.length, parsed.loss) == (3e-4, 1_000_000, 64, "tv")


def test_text_that_is_bad_is_met_before_anything_is_spent(place: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"good\n" * 9 + b"\xff\n")
    with pytest.raises(UserError, match=r"bad\.txt is not UTF-8 text at byte 45"):
        run(settings(place, tmp_path / "run", text=(str(place / "text.txt"), str(tmp_path / "bad.txt"))))
    assert not (tmp_path / "run" / "pretrain").exists()


def test_another_tokenizer_is_refused(place: Path, tmp_path: Path) -> None:
    tokenizer = shared["build_tokenizer"]()
    tokenizer.add_tokens([AddedToken("he", special=True)])
    Target(shared["build_model"](num_hidden_layers=1), tokenizer).save(tmp_path / "other")
    with pytest.raises(UserError, match="another tokenizer than the target"):
        run(settings(place, tmp_path / "run", draft=str(tmp_path / "other")))


def test_a_served_target_has_the_shape_of_the_real_one(place: Path) -> None:
    served, real = read_facts(str(place / "target")), load_target(str(place / "target"))
    assert served.parameters_per_token == real.parameters_per_token and served.vocab_size == real.vocab_size
    assert served.eos_ids == real.eos_ids and served.device == torch.device("cpu")


def test_the_command_takes_its_settings_as_flags(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(DistillRun, "run", lambda self: seen.append(self.config))
    flags = ["--target", str(place / "target"), "--out", str(tmp_path / "run"), "--text", str(place / "text.txt")]
    flags += ["--prompts", str(place / "prompts.jsonl"), "--pretrain", "tokens=5000", "--align", "epochs=2", "--untied"]
    result = CliRunner().invoke(app, ["distill", *flags, "--temperatures", "0.3", "--temperatures", "1"])
    assert result.exit_code == 0, result.output
    assert (seen[0].tied, seen[0].temperatures, seen[0].align["epochs"]) == (False, (0.3, 1.0), 2.0)
    assert seen[0].pretrain_config().tokens == 5000


# -- losses side by side -----------------------------------------------------------------------------------------------
def test_losses_are_compared_on_identical_data(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell starts from the pretrained drafter and sees the same rows; finished cells are not trained again."""
    values = settings(place, tmp_path / "run")
    values["align"] |= {"learning_rate": 0.02, "epochs": 4.0}  # fast enough to be better than the start
    run(values)
    tasks = tmp_path / "tasks.jsonl"
    lines = [json.dumps({"messages": [{"role": "user", "content": f"why is {i} so?"}]}) for i in range(5)]
    tasks.write_text("\n".join(lines))
    script = runpy.run_path(str(HERE.parent / "runs" / "drafter_losses.py"))
    monkeypatch.setitem(
        script["main"].__globals__, "TASKS", {"questions": f"{tasks}@3", "all": f"{place / 'prompts.jsonl'}@4"}
    )
    arguments = [
        "--run",
        str(tmp_path / "run"),
        "--work",
        str(tmp_path / "work"),
        "--out",
        str(tmp_path / "result.json"),
    ]
    monkeypatch.setattr("sys.argv", ["x", *arguments, "--losses", "kl,tvdpp", "--seeds", "0,1", "--tokens", "8"])
    script["main"]()
    result = json.loads((tmp_path / "result.json").read_text())
    cells = {(cell["loss"], cell["seed"]): cell for cell in result["cells"]}
    assert cells.keys() == {("pretrained", 0), ("kl", 0), ("kl", 1), ("tvdpp", 0), ("tvdpp", 1)}
    starts = {cell["start"] for key, cell in cells.items() if key[0] != "pretrained"}
    assert len(starts) == 1, "all start from the same weights"
    assert cells["kl", 0]["tokens"] == cells["tvdpp", 0]["tokens"]
    trained = [tensors(tmp_path / "work" / name / "draft") for name in ("kl-0", "kl-1", "tvdpp-0")]
    assert not any(torch.equal(trained[0]["lm_head.weight"], other["lm_head.weight"]) for other in trained[1:])
    for cell in cells.values():
        for task, rounds in cell["rounds"].items():
            for name in ("greedy", "sampled"):
                counted = result["tokens"][task][name]
                assert all(1 <= n <= t for n, t in zip(rounds[name]["3"], counted, strict=True))
                assert sum(rounds[name]["5"]) <= sum(rounds[name]["3"]) + 1e-9, "longer chains need no more rounds"
    monkeypatch.setattr(script["main"].__globals__["distil"], "__code__", (lambda *_: 1 / 0).__code__)
    before = (tmp_path / "result.json").read_text()
    script["main"]()
    assert json.loads((tmp_path / "result.json").read_text())["cells"] == json.loads(before)["cells"]
    assert "| `tvdpp` |" in script["tables"](result) and "MBSU" in script["tables"](result)


def test_the_comparison_takes_the_runs_own_alignment(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same loss, seed and rows are one training, whichever of the two commands comes first."""
    job, _, _ = run(settings(place, tmp_path / "run"))
    tasks = tmp_path / "tasks.jsonl"
    lines = [json.dumps({"messages": [{"role": "user", "content": f"why is {i} so?"}]}) for i in range(5)]
    tasks.write_text("\n".join(lines))
    script = runpy.run_path(str(HERE.parent / "runs" / "drafter_losses.py"))
    monkeypatch.setitem(script["main"].__globals__, "TASKS", {"questions": str(tasks)})
    arguments = ["x", "--run", str(tmp_path / "run"), "--work", str(tmp_path / "work"), "--tokens", "8"]
    arguments += ["--out", str(tmp_path / "result.json"), "--losses", f"{job.config.loss},ce", "--seeds", "0"]
    monkeypatch.setattr("sys.argv", arguments)
    script["main"]()
    assert not (tmp_path / "work" / f"{job.config.loss}-0" / "train").exists(), "nothing is trained twice"
    assert (tmp_path / "work" / "ce-0" / "train").exists()
    found, own = tensors(tmp_path / "work" / f"{job.config.loss}-0" / "draft"), tensors(tmp_path / "run" / "draft")
    assert all(torch.equal(found[name], value) for name, value in own.items())
