"""A change told in a few bits a weight: what comes back, what it costs, and what is refused."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from redraft import artifact
from redraft.data.store import Row
from redraft.drafts import files
from redraft.drafts.eagle3 import Eagle3Draft, fresh_draft
from redraft.drafts.scaling import coarse_change, coarsen, told
from redraft.errors import UserError
from redraft.settings.training import METHODS, MOST_BITS, PrivateSize, check_bits
from redraft.starts.apply import StartContext
from redraft.starts.vocabulary import refresh_vocabulary


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Numbers that bfloat16 holds exactly, as a stored draft's do."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16).float()


@pytest.mark.parametrize("bits", range(1, MOST_BITS + 1))
@pytest.mark.parametrize("columns", [1, 7, 16])
def test_codes_tell_the_nearest_of_evenly_spaced_levels(bits: int, columns: int) -> None:
    known, change = random(9, columns), 0.01 * random(9, columns, seed=1)
    found = coarsen(known + change, known, bits)
    assert found.codes.dtype == torch.uint8 and found.codes.shape == (9, -(-columns * bits // 8))
    back = told(found, known) - known
    levels = (torch.arange(2**bits) + 0.5 - 2 ** (bits - 1)) * found.step[:, None]
    distance = (levels[:, None, :] - change[:, :, None]).abs()
    # What is left is the distance to the nearest level, but for the rounding of the sum.
    torch.testing.assert_close((back - change).abs(), distance.amin(-1), atol=2e-6, rtol=1e-4)


def test_more_bits_tell_more_and_a_bit_is_the_sign_times_the_mean() -> None:
    known, change = random(12, 256), 0.01 * random(12, 256, seed=1)
    left = [
        float((told(coarsen(known + change, known, b), known) - known - change).square().mean()) for b in range(1, 9)
    ]
    assert all(2 * more < fewer for fewer, more in zip(left, left[1:], strict=False))
    # Of Gaussian numbers four levels leave 0.119 of the square (Max 1960), two 1 - 2 / pi.
    square = float(change.square().mean())
    assert left[0] / square == pytest.approx(1 - 2 / torch.pi, abs=0.03)
    assert left[1] / square == pytest.approx(0.119, abs=0.02)
    one = told(coarsen(known + change, known, 1), known) - known
    torch.testing.assert_close(one, change.sign() * change.abs().mean(1, keepdim=True), atol=1e-6, rtol=1e-4)


def test_rows_that_the_known_matrix_lacks_are_kept_whole_and_no_change_is_no_change() -> None:
    known = random(6, 8)
    source = torch.tensor([3, -1, 0, -1, 5])
    matrix = known[source.clamp(min=0)].clone()
    matrix[source < 0] = random(2, 8, seed=2)
    back = told(coarsen(matrix, known, 2, source), known)
    assert torch.equal(back, matrix)
    with pytest.raises(ValueError, match="cannot be told"):
        coarsen(random(5, 8), known, 2)
    with pytest.raises(ValueError, match="9 bits"):
        coarsen(known, known, 9)


@pytest.fixture
def pair(tiny_target) -> tuple[Eagle3Draft, Eagle3Draft, list[str]]:
    """A base draft, one trained from it with some other words, and what was trained."""
    target = tiny_target("llama")
    base = fresh_draft(target, range(0, 120), seed=1).to(torch.bfloat16)
    rows = [Row("p", [1], list(range(20, 128)), 0.0, 0, 1.0, 0, "length", "hash")]
    report = refresh_vocabulary(copy.deepcopy(base).float(), StartContext(target, rows=rows))
    renewed = report.draft
    assert report.changed
    with torch.no_grad():
        for seed, parameter in enumerate(renewed.parameters()):
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    return base, renewed, sorted({*report.changed, *(name for name, _ in renewed.named_parameters())})


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_private_part_of_few_bits_is_the_draft_that_was_measured(bits: int, pair, tmp_path: Path) -> None:
    base, trained, names = pair
    rounded, parts = coarse_change(trained, base, names, bits)
    assert {p.dtype for p in rounded.parameters()} == {torch.bfloat16}
    base_hash = artifact.tensors_hash(base.state_dict())
    files.save_private(tmp_path / "part", rounded, names, base_hash, {}, base.state_dict(), parts)
    back, meta = files.load_private(tmp_path / "part", base, base_hash)
    assert artifact.tensors_hash(back.state_dict()) == artifact.tensors_hash(rounded.state_dict())
    assert meta["coarse"]["fc.weight"] == {"bits": bits, "columns": base.fc.in_features}
    # Onto the same base in float32, as tools open it, it is the same draft once it is stored.
    wide, _ = files.load_private(tmp_path / "part", copy.deepcopy(base).float(), base_hash)
    assert artifact.tensors_hash(wide.to(torch.bfloat16).state_dict()) == artifact.tensors_hash(rounded.state_dict())
    # Vectors and new rows are as they were trained.
    assert torch.equal(rounded.norm.weight, trained.norm.weight.to(torch.bfloat16))
    new = [
        row for row, token in enumerate(trained.vocabulary().tolist()) if token not in set(base.vocabulary().tolist())
    ]
    assert new and torch.equal(rounded.lm_head.weight[new], trained.lm_head.weight[new].to(torch.bfloat16))
    matrices = sum(p.numel() for p in base.parameters() if p.ndim == 2)
    whole = sum(t.numel() * t.element_size() for t in load_file(tmp_path / "part" / files.PRIVATE_FILE).values())
    assert whole < matrices * bits / 8 + 0.35 * 2 * matrices < 2 * matrices


def test_a_damaged_part_of_few_bits_is_one_line(pair, tmp_path: Path) -> None:
    base, trained, names = pair
    rounded, parts = coarse_change(trained, base, names, 2)
    files.save_private(tmp_path / "part", rounded, names, "base", {}, base.state_dict(), parts)
    path, meta = tmp_path / "part" / files.PRIVATE_FILE, tmp_path / "part" / files.META_FILE
    whole = load_file(path)
    for name, change in (("fc.weight.codes", None), ("fc.weight.step", whole["fc.weight.step"][:3])):
        state = dict(whole)
        del state[name]
        if change is not None:
            state[name] = change.clone()
        save_file(state, path, metadata={"format": "pt"})
        meta.write_text(json.dumps(json.loads(meta.read_text()) | {"content_hash": artifact.tensors_hash(state)}))
        with pytest.raises(UserError, match=r"does not tell fc.weight .*save the private part again") as found:
            files.load_private(tmp_path / "part", base, "base")
        assert "\n" not in str(found.value)


def test_a_head_of_new_rows_alone_needs_no_codes(tiny_target) -> None:
    target = tiny_target("llama")
    base = fresh_draft(target, range(0, 120), seed=1).to(torch.bfloat16)
    rows = [Row("p", [1], list(range(20, 128)), 0.0, 0, 1.0, 0, "length", "hash")]
    report = refresh_vocabulary(copy.deepcopy(base).float(), StartContext(target, rows=rows))
    renewed = report.draft
    assert "lm_head.weight" in report.changed
    assert coarse_change(renewed, base, ["lm_head.weight", "fc.weight"], 2)[1] == {}
    with pytest.raises(UserError, match="no fc.weight of this shape"):
        coarse_change(renewed, torch.nn.Linear(2, 2), ["fc.weight"], 2)


@pytest.mark.parametrize("name", METHODS)
def test_bits_are_for_methods_that_change_the_drafts_own_matrices(name: str) -> None:
    check_bits(name, PrivateSize())
    if name in ("full", "fc", "head"):
        check_bits(name, PrivateSize(bits=2))
        return
    with pytest.raises(UserError, match=re.escape(f"(full, fc, head), not for {name};")):
        check_bits(name, PrivateSize(bits=2))


def test_bits_that_cannot_be() -> None:
    with pytest.raises(UserError, match="bits must be 8 or less, not 9"):
        PrivateSize(bits=9)
