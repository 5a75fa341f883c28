"""Parts of tensors, read to where they belong: the bytes of the file, whatever the cut, the rows and the dtype."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from stagemesh.errors import CheckpointError
from stagemesh.stage_worker.model.checkpoint import Checkpoint
from stagemesh.stage_worker.model.cut import WHOLE, Cut

SHAPES: dict[str, tuple[int, ...]] = {
    "scalar": (), "vector": (77,), "matrix": (12, 35), "experts": (3, 8, 10), "large": (1500, 1024),
    "wide": (2, 1_500_000), "empty": (0, 4),
}  # fmt: skip
"""`large` is more than one block of a read in fp32, and a row of `wide` is."""
CUTS = [
    ("scalar", WHOLE), ("vector", WHOLE), ("vector", Cut(0, ((5, 9), (40, 77)))), ("matrix", WHOLE),
    ("matrix", Cut(0, ((3, 7),))), ("matrix", Cut(0, ((0, 2), (6, 8), (11, 12)))), ("matrix", Cut(1, ((0, 35),))),
    ("matrix", Cut(1, ((1, 5), (30, 34)))), ("experts", WHOLE), ("experts", Cut(0, ((1, 3),))),
    ("experts", Cut(1, ((0, 2), (4, 6)))), ("experts", Cut(2, ((5, 10),))), ("experts", Cut(2, ((1, 2), (6, 9)))),
    ("large", WHOLE), ("large", Cut(0, ((10, 1490),))), ("large", Cut(1, ((0, 100), (512, 1000)))),
    ("wide", Cut(1, ((7, 1_400_000),))), ("empty", WHOLE),
]  # fmt: skip


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16, torch.int8], ids=str)
def stored(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, torch.Tensor]]:
    folder, generator = tmp_path_factory.mktemp("stored"), torch.Generator().manual_seed(1)
    tensors = {
        name: torch.randint(-100, 100, shape, generator=generator).to(request.param) for name, shape in SHAPES.items()
    }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder, tensors


@pytest.mark.parametrize(("name", "cut"), CUTS, ids=[f"{name} {cut.dim} {cut.ranges}" for name, cut in CUTS])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16], ids=["as stored", "fp32", "fp16"])
def test_a_part_is_the_same_as_of_the_whole_tensor(
    stored: tuple[Path, dict[str, torch.Tensor]], name: str, cut: Cut, dtype: torch.dtype | None
) -> None:
    folder, tensors = stored
    checkpoint, expected = Checkpoint(folder), cut.apply(tensors[name])
    out = torch.full(expected.shape, 111, dtype=dtype or expected.dtype)
    checkpoint.read_into(out, name, cut)
    assert torch.equal(out, expected.to(out.dtype))
    assert checkpoint.tensor_bytes_read == expected.nbytes
    assert torch.equal(checkpoint.read(name, cut), expected)


@pytest.mark.parametrize(
    ("name", "cut"), CUTS[1:-1], ids=[f"{name} {cut.dim} {cut.ranges}" for name, cut in CUTS[1:-1]]
)
def test_rows_of_a_part_are_read_from_any_row_on(
    stored: tuple[Path, dict[str, torch.Tensor]], name: str, cut: Cut
) -> None:
    folder, tensors = stored
    checkpoint, part = Checkpoint(folder), cut.apply(tensors[name])
    for start in {0, 1, len(part) // 2, len(part) - 1}:
        for count in {1, len(part) - start}:
            expected = part[start : start + count]
            out = torch.empty_like(expected)
            checkpoint.read_into(out, name, cut, start)
            assert torch.equal(out, expected), (start, count)


def test_other_bytes_than_the_part_are_left_alone(stored: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, tensors = stored
    into = torch.full((4, 8, 10), 111, dtype=tensors["experts"].dtype)
    Checkpoint(folder).read_into(into[1:3], "experts", Cut(0, ((1, 3),)))
    assert torch.equal(into[1:3], tensors["experts"][1:])
    assert torch.equal(into[[0, 3]], torch.full((2, 8, 10), 111, dtype=into.dtype))


@pytest.mark.parametrize("cut", [Cut(0, ((0, 13),)), Cut(1, ((30, 36),))])
def test_a_tensor_that_is_smaller_than_the_cut_is_named(stored: tuple[Path, dict[str, torch.Tensor]], cut: Cut) -> None:
    with pytest.raises(CheckpointError, match=r"'matrix' has shape \[12, 35\], too small"):
        Checkpoint(stored[0]).read("matrix", cut)
