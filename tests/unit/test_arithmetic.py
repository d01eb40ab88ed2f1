"""The data type of a run: chosen by trying, kept by what has begun, and the arithmetic of Muon."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from redraft import arithmetic, provenance
from redraft.adaptation.claim import claim_run, settled
from redraft.adaptation.models import contestants
from redraft.adaptation.quickstart import EFFICIENCY, FEWEST, GIGA_OPERATIONS, QUESTIONS, SECONDS, affordable
from redraft.adaptation.study.run import claim
from redraft.arithmetic import Choice, choose_dtype, fastest, go_on_with
from redraft.errors import UserError
from redraft.settings.base import AUTO, TYPES, read
from redraft.settings.runs import AdaptConfig, DistillConfig
from redraft.settings.studies import parse_study
from redraft.training.loop import stored_precision
from redraft.training.optimizer import InFloat32, make_optimizers, muon_type


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """``machine(bfloat16, float32)`` makes the next trial find these speeds; nothing has been chosen or told yet."""
    monkeypatch.setattr(arithmetic, "_chosen", {})
    monkeypatch.setattr(arithmetic, "_told", set())

    def set_speeds(bfloat16: float, float32: float) -> None:
        fastest.cache_clear()
        monkeypatch.setattr(arithmetic, "trial", lambda: {"bfloat16": bfloat16, "float32": float32})

    fastest.cache_clear()
    yield set_speeds
    fastest.cache_clear()


# -- choosing ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("speeds", "wanted"),
    [((400.0, 90.0), "bfloat16"), ((0.9, 58.0), "float32"), ((60.0, 61.0), "bfloat16"), ((50.0, 61.0), "float32")],
)
def test_the_faster_type_is_chosen_and_a_draw_takes_half_the_memory(speeds, wanted, machine):
    machine(*speeds)
    assert choose_dtype(AUTO, "cpu") == wanted


def test_the_choice_is_said_once_with_its_figures_and_recorded(machine):
    machine(0.875, 58.21)
    said: list[str] = []
    assert "chosen" not in arithmetic.record()
    for _ in range(2):
        choose_dtype(AUTO, "cpu", said.append)
    assert len(said) == 1 and "\n" not in said[0]
    assert all(part in said[0] for part in ("auto", "float32", "58.2", "0.875 in bfloat16"))
    recorded = provenance.collect()["arithmetic"]["chosen"]["cpu"]
    assert recorded == {"dtype": "float32", "gflops": {"bfloat16": 0.875, "float32": 58.21}}
    json.dumps(recorded)


def test_what_is_named_is_taken_and_never_tried(machine, monkeypatch):
    machine(0, 0)
    monkeypatch.setattr(arithmetic, "trial", lambda: pytest.fail("tried"))
    assert [choose_dtype(name, "cpu") for name in TYPES] == list(TYPES)
    with pytest.raises(UserError, match="auto, bfloat16 or float32, not 'float16'"):
        choose_dtype("float16", "cpu")


@pytest.mark.parametrize(("supported", "wanted"), [(True, "bfloat16"), (False, "float32")])
def test_a_gpu_is_asked_and_not_timed(supported, wanted, machine, monkeypatch):
    machine(0, 0)
    asked: list[dict] = []
    monkeypatch.setattr(arithmetic, "trial", lambda: pytest.fail("tried"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **given: asked.append(given) or supported)
    assert choose_dtype(AUTO, "cuda:1") == wanted
    # Older GPUs emulate bfloat16, and torch counts that as support unless it is asked.
    assert asked == [{"including_emulation": False}]


def test_the_trial_gives_a_speed_for_both_types_in_a_moment():
    found = arithmetic.trial()
    assert set(found) == set(TYPES) and all(0.01 < rate < 1e5 for rate in found.values())


def test_the_trial_measures_the_products_that_it_counts(monkeypatch):
    """Half of the time of every product is twice the speed."""
    times = iter(range(10**6))
    monkeypatch.setattr(arithmetic.time, "perf_counter", lambda: next(times) * 0.5)
    monkeypatch.setattr(arithmetic, "_products", lambda weight, rows: None)
    operations = 3 * 2 * arithmetic.ROWS * arithmetic.WIDTH**2
    assert arithmetic.trial() == {name: operations / 0.5 / 1e9 for name in TYPES}


def test_a_record_names_the_level_and_what_the_environment_allows(monkeypatch):
    for name in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS"):
        monkeypatch.delenv(name, raising=False)
    free = arithmetic.record()
    assert free["instructions"] == torch.backends.cpu.get_cpu_capability()
    assert free["limits"] == {"torch": None, "onednn": None, "mkl": None}
    monkeypatch.setenv("DNNL_MAX_CPU_ISA", "AVX2")
    assert arithmetic.record()["limits"]["onednn"] == "AVX2"
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    assert arithmetic.record()["limits"]["onednn"] == "SSE41"


# -- going on ------------------------------------------------------------------------------------------------------
def test_a_run_goes_on_in_the_type_that_it_was_begun_in(machine):
    machine(0.9, 58.0)
    said: list[str] = []
    assert go_on_with(AUTO, "bfloat16", "cpu", said.append) == "bfloat16" and "begun" in said[0]
    assert go_on_with("bfloat16", "bfloat16", "cpu") == "bfloat16"
    assert go_on_with(AUTO, None, "cpu") == "float32"
    with pytest.raises(UserError, match="begun in bfloat16, not in float32"):
        go_on_with("float32", "bfloat16", "cpu")


def adaptation(folder: Path, **more: str):
    return AdaptConfig(**{"target": "t", "draft": "d", "prompts": "p.jsonl", "out": folder} | more)


def test_the_settings_of_an_old_run_directory_stay_what_they_were(machine, tmp_path):
    """Whoever gave no type had bfloat16 before there was a choice."""
    machine(0.9, 58.0)
    file = tmp_path / "config.json"
    assert settled(adaptation(tmp_path), file, None).dtype == "float32"
    file.write_text(json.dumps({"dtype": "bfloat16"}))
    assert settled(adaptation(tmp_path), file, None).dtype == "bfloat16"
    assert settled(adaptation(tmp_path, dtype="float32"), file, None).dtype == "float32"
    file.write_text("{}")
    assert settled(adaptation(tmp_path), file, None).dtype == "bfloat16"


def test_a_study_is_gone_on_with_on_another_machine(machine, tmp_path):
    machine(0.9, 58.0)
    target = {"target": "t", "draft": "d", "prompts": ["p"], "evaluation": {"e": "e"}}
    study = parse_study({"name": "s", "targets": {"a": target}, "grid": {"methods": ["fc"]}})
    assert study.dtype == AUTO and claim(study, tmp_path).dtype == "float32"
    machine(400.0, 90.0)
    assert claim(study, tmp_path).dtype == "float32"
    (tmp_path / "ledger.json").touch()
    with pytest.raises(UserError, match="another dtype"):
        claim(study.model_copy(update={"dtype": "bfloat16"}), tmp_path)
    (tmp_path / "ledger.json").unlink()
    assert claim(study.model_copy(update={"dtype": "bfloat16"}), tmp_path).dtype == "bfloat16", "nothing is there yet"


def distillation(folder: Path, **more: str):
    given = {"target": "t", "draft": "d", "text_share": 0.0, "prompts": "p.jsonl", "out": folder}
    return read(DistillConfig, None, given | more)


def test_what_a_drafter_trains_in_follows_the_target_and_then_the_run(machine, tmp_path):
    machine(0.9, 58.0)
    config = claim_run(distillation(tmp_path / "new"))
    assert (config.dtype, config.pretrain_config().precision, config.align_config().precision) == ("float32",) * 3
    machine(400.0, 90.0)
    again = claim_run(distillation(tmp_path / "new"))
    assert (again.dtype, again.align_config()) == ("float32", config.align_config())
    # An old run: a float32 target, and training in bfloat16, the default of then.
    file = tmp_path / "new" / "config.json"
    stored = json.loads(file.read_text())
    del stored["seal"]
    for name in ("pretrain", "align"):
        stored[name]["precision"] = "bfloat16"
    file.write_text(json.dumps(stored))
    old = claim_run(distillation(tmp_path / "new"))
    assert (old.dtype, old.pretrain_config().precision, old.align_config().precision) == (
        "float32",
        "bfloat16",
        "bfloat16",
    )
    (tmp_path / "new" / "responses.jsonl").touch()
    with pytest.raises(UserError, match="another align precision"):
        claim_run(distillation(tmp_path / "new", align={"precision": "float32"}))


def test_a_training_says_what_it_computes_in(tmp_path):
    assert stored_precision(tmp_path, "bfloat16") is None
    (tmp_path / "state.json").write_text(json.dumps({"state": {"step": 3}}))
    assert stored_precision(tmp_path, "float32") == "float32"
    (tmp_path / "state.json").write_text(json.dumps({"state": {"arithmetic": {"precision": "bfloat16"}}}))
    assert stored_precision(tmp_path, "float32") == "bfloat16"


# -- who competes --------------------------------------------------------------------------------------------------
def test_types_compete_only_where_none_was_named():
    target = SimpleNamespace(dtype=torch.float32, device=torch.device("cpu"))
    assert list(contestants(target, AUTO, lambda name: name)) == ["float32", "bfloat16"]
    assert contestants(target, "float32", pytest.fail) == {"float32": target}
    target.device = torch.device("cuda")
    assert contestants(target, AUTO, pytest.fail) == {"float32": target}


# -- the quickstart's ten minutes ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("speeds", "wanted"),
    [
        ((420.0, 190.0), QUESTIONS),
        ((343.0, 138.0), 288),
        ((2.0, 190.0), 232),
        ((0.6, 110.0), 136),
        ((0.6, 20.0), FEWEST),
    ],
)
def test_a_slower_machine_gets_fewer_questions_and_a_run_keeps_its_own(speeds, wanted, machine, tmp_path):
    machine(*speeds)
    said: list[str] = []
    assert affordable(tmp_path, said.append) == wanted
    assert len(said) == (wanted < QUESTIONS) and all(str(wanted) in line for line in said)
    reached = {"bfloat16": speeds[0], "float32": speeds[1]}[fastest("cpu").dtype] * EFFICIENCY[fastest("cpu").dtype]
    assert wanted == FEWEST or wanted * GIGA_OPERATIONS / QUESTIONS <= SECONDS * reached
    (tmp_path / "run").mkdir()
    (tmp_path / "prompts.jsonl").write_text("{}\n" * 200)
    assert affordable(tmp_path, pytest.fail) == 200


# -- Muon ----------------------------------------------------------------------------------------------------------
def orthogonal_steps(gradient: torch.Tensor) -> torch.Tensor:
    """Five Newton-Schulz steps in float64, with Muon's coefficients."""
    x = gradient.double()
    tall = x.shape[0] > x.shape[1]
    x = (x.T if tall else x) / x.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.T if tall else x).float()


def moved(kind: str, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """How far one step of rate 1 moves a matrix, scaled back, and the gradient that moved it."""
    weight = nn.Parameter(torch.zeros(shape))
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    optimizers = make_optimizers([("w", weight)], "muon", 0.0)
    optimizers.muon = kind
    weight.grad = gradient.clone()
    optimizers.step(1.0)
    return -weight.detach() / (0.2 * max(shape) ** 0.5), gradient


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)], ids=["wide", "tall"])
def test_muon_orthogonalises_in_float32_where_it_is_told_to(shape):
    exact, gradient = moved("float32", shape)
    rounded, _ = moved("bfloat16", shape)
    wanted = orthogonal_steps(gradient)
    assert torch.allclose(exact, wanted, atol=2e-5)
    assert 1e-4 < float((rounded - wanted).abs().max()) < 0.1, "torch's own rounds, and no more than that"


def test_float32_stands_in_for_bfloat16_as_a_copy_and_only_inside():
    given = torch.ones(3)
    with InFloat32():
        for found in (given.bfloat16(), given.to(torch.bfloat16), given.to(dtype=torch.bfloat16)):
            assert found.dtype == torch.float32 and found.data_ptr() != given.data_ptr()
        assert given.to(torch.float64).dtype == torch.float64
    assert given.bfloat16().dtype == torch.bfloat16


@pytest.mark.parametrize(("speeds", "wanted"), [((400.0, 90.0), "bfloat16"), ((0.9, 58.0), "float32")])
def test_muon_takes_what_the_processor_is_faster_in(speeds, wanted, machine):
    machine(*speeds)
    assert muon_type(torch.device("cpu"), "bfloat16") == wanted
    assert muon_type(torch.device("cuda"), "bfloat16") == "bfloat16"
    assert muon_type(torch.device("cuda"), "float32") == muon_type(torch.device("cpu"), "float32") == "float32"


def test_choices_read_well():
    assert Choice("float32", why="tpu is not known").sentence() == "dtype auto: float32 (tpu is not known)"
