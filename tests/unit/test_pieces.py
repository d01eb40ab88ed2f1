"""Tensors made piece by piece are the tensors they stand for, wherever they are hashed, written or compared."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from redraft.artifact import check_tensors, holds_tensors, tensors_bytes, tensors_hash, write_tensors
from redraft.drafts.merging import joined
from redraft.errors import UserError
from redraft.pieces import Pieced, Table, in_rows, pieces, table


class Rows(Pieced):
    """Some tensors, each made ``rows`` rows at a time."""

    def __init__(self, state: dict[str, Tensor], rows: int) -> None:
        self.state, self.rows = state, rows

    def table(self, name: str) -> Table | Tensor:
        tensor = self.state[name]
        if not tensor.ndim:
            return tensor
        return Table(tensor.dtype, tensor.shape, lambda: iter(tensor.split(self.rows)))

    def __iter__(self):
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


@pytest.fixture
def state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "weight": torch.randn(37, 5).bfloat16(),
        "turned": torch.randn(6, 11).T,
        "map": torch.arange(19),
        "mask": torch.arange(23) % 3 == 0,
        "one": torch.tensor(2.5),
    }


@pytest.mark.parametrize("rows", [1, 4, 1000])
def test_hash_size_and_file_are_those_of_whole_tensors(state, rows, tmp_path: Path) -> None:
    made = Rows(state, rows)
    assert all(torch.equal(made[name], state[name]) for name in state)
    assert tensors_hash(made) == tensors_hash(state) and tensors_bytes(made) == tensors_bytes(state)
    write_tensors(tmp_path / "whole", state)
    write_tensors(tmp_path / "pieces", made)
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "pieces").read_bytes()
    assert all(torch.equal(load_file(tmp_path / "pieces")[name], state[name]) for name in state)
    assert holds_tensors(tmp_path / "whole", made)


def test_a_number_that_differs_in_the_last_piece_is_seen(state, tmp_path: Path) -> None:
    write_tensors(tmp_path / "file", state)
    for name, place in (("weight", (36, 4)), ("map", (18,)), ("mask", (22,))):
        other = state | {name: state[name].clone()}
        other[name][place] = 1 - other[name][place].long()
        assert not holds_tensors(tmp_path / "file", Rows(other, 4))
        assert tensors_hash(Rows(other, 4)) != tensors_hash(Rows(state, 4))
    broken = state | {"weight": state["weight"].clone()}
    broken["weight"][36, 4] = float("nan")
    with pytest.raises(UserError, match="weight holds NaN"):
        check_tensors(Rows(broken, 4), Rows(broken, 4), "here")


def test_a_tensor_of_fewer_numbers_than_it_says_is_not_written(state, tmp_path: Path) -> None:
    class Short(Rows):
        def table(self, name: str) -> Table | Tensor:
            tensor = self.state[name]
            return Table(tensor.dtype, tensor.shape, lambda: iter([tensor[:-1]])) if tensor.ndim else tensor

    with pytest.raises(RuntimeError, match="map"):
        write_tensors(tmp_path / "file", Short({"map": state["map"]}, 4))
    assert not list(tmp_path.iterdir())


def test_pieces_of_whole_tensors_keep_the_order(state) -> None:
    for name, tensor in state.items():
        assert torch.equal(torch.cat(list(pieces(tensor))), tensor.reshape(-1))
        if tensor.ndim:
            assert torch.equal(torch.cat(list(in_rows(tensor))), tensor)
        assert table(state, name) is tensor


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kinds", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)])
def test_a_joined_matrix_is_their_concatenation(axis: int, kinds: tuple[torch.dtype, torch.dtype]) -> None:
    left, right = torch.randn(14, 6).to(kinds[0]), torch.randn(*((3, 6), (14, 3))[axis]).to(kinds[1])
    for side in (left, Table(left.dtype, left.shape, lambda: iter(left.split(4)))):
        found = joined(side, right, axis)
        wanted = torch.cat([left, right], axis)
        assert found.dtype == wanted.dtype and all(piece.dtype == wanted.dtype for piece in found.make())
        assert found.shape == wanted.shape and found.nbytes == wanted.nbytes and torch.equal(found.whole(), wanted)
