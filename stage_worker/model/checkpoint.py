"""Reading single tensors, or slices of them, from a folder of safetensors files.

Our own reader rather than `safetensors.safe_open`: that one maps the file, so a file cut short under way kills the
process, and a mapped view tells no progress. Here every read is a `pread` into memory of our own, counted and checked.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import torch
from typing_extensions import Buffer

from stagemesh.errors import CheckpointError
from stagemesh.safetensors_header import read_header

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_READ_BYTES = 32 << 20

Ranges = Sequence[tuple[int, int]]
"""Half-open ranges along one dimension, in ascending order."""


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies in its file."""

    name: str
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Byte in the file where its data starts."""

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


class Checkpoint:
    """A folder with `model.safetensors`, or an index and its files. Headers are read when a tensor of theirs is."""

    def __init__(self, model_dir: str | Path, on_bytes: Callable[[int], None] | None = None) -> None:
        self.model_dir = Path(model_dir)
        self.tensor_bytes_read = 0
        """Bytes of tensor data asked for so far."""
        self._on_bytes = on_bytes
        self._headers: dict[Path, dict[str, TensorInfo]] = {}
        self._files = self._find_files()

    @property
    def names(self) -> list[str]:
        """Every tensor name that the checkpoint claims to hold."""
        return list(self._files)

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and place of one tensor.

        Raises:
            CheckpointError: its file is missing or damaged, or the index lies.
        """
        path = self._files[name]
        header = self._header(path)
        if name not in header:
            raise CheckpointError(f"tensor {name!r} should be in {path} but is not: download the checkpoint again")
        return header[name]

    def require(self, names: Iterable[str]) -> None:
        """Raises CheckpointError when a tensor that this stage needs is not there."""
        missing = [name for name in names if name not in self._files]
        if missing:
            raise self.lacking(missing)

    def lacking(self, missing: Sequence[str]) -> CheckpointError:
        """What to raise when these tensors are not there."""
        return CheckpointError(
            f"{self.model_dir} lacks {len(missing)} tensor(s) of this stage, the first is {missing[0]!r}: "
            "download the checkpoint again, or check that config.json belongs to it"
        )

    def place(self, name: str) -> tuple[str, int]:
        """Sorting by this reads files in order, front to back."""
        info = self.info(name)
        return str(info.path), info.offset

    def read(self, name: str, dim: int | None = None, ranges: Ranges = ()) -> torch.Tensor:
        """One tensor, or its `ranges` along `dim` concatenated, in memory of its own.

        Raises:
            CheckpointError: the file ends early or cannot be read.
        """
        info = self.info(name)
        if dim is not None and ranges[-1][1] > info.shape[dim]:
            raise CheckpointError(f"tensor {name!r} has shape {list(info.shape)}, too small for its model's config")
        with _open(info.path) as file:
            if dim is None:
                return self._read_rows(file.fileno(), info, 0, info.shape[0] if info.shape else 1)
            if dim == 0:
                pieces = [self._read_rows(file.fileno(), info, start, stop) for start, stop in ranges]
            else:
                pieces = [self._read_columns(file.fileno(), info, dim, start, stop) for start, stop in ranges]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=dim)

    def _read_rows(self, fd: int, info: TensorInfo, start: int, stop: int, count: bool = True) -> torch.Tensor:
        shape = (stop - start, *info.shape[1:]) if info.shape else ()
        row_bytes = info.nbytes // info.shape[0] if info.shape and info.shape[0] else info.nbytes
        out = torch.empty(shape, dtype=info.dtype)
        if out.numel() == 0:
            return out
        memory = memoryview(cast(Buffer, out.reshape(-1).view(torch.uint8).numpy()))
        done, base = 0, info.offset + start * row_bytes
        while done < len(memory):
            got = os.preadv(fd, [memory[done : done + _READ_BYTES]], base + done)
            if got == 0:
                raise CheckpointError(f"{info.path} ends inside tensor {info.name!r}: download the checkpoint again")
            done += got
            if count:
                self._count(got)
        return out

    def _read_columns(self, fd: int, info: TensorInfo, dim: int, start: int, stop: int) -> torch.Tensor:
        """A slice along an inner dimension: whole rows are read block by block, the slice is kept (and counted)."""
        shape = list(info.shape)
        shape[dim] = stop - start
        out = torch.empty(shape, dtype=info.dtype)
        rows = info.shape[0]
        block = max(1, _READ_BYTES // max(1, info.nbytes // max(1, rows)))
        for begin in range(0, rows, block):
            end = min(rows, begin + block)
            piece = self._read_rows(fd, info, begin, end, count=False).narrow(dim, start, stop - start)
            out[begin:end] = piece
            self._count(piece.numel() * info.dtype.itemsize)
        return out

    def _count(self, nbytes: int) -> None:
        self.tensor_bytes_read += nbytes
        if self._on_bytes is not None:
            self._on_bytes(nbytes)

    def _find_files(self) -> dict[str, Path]:
        index = self.model_dir / "model.safetensors.index.json"
        if index.is_file():
            weight_map = _read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise CheckpointError(f"{index} has no weight_map: download the checkpoint again")
            return {str(name): self.model_dir / str(file) for name, file in weight_map.items()}
        single = self.model_dir / "model.safetensors"
        if not single.is_file():
            raise CheckpointError(
                f"{self.model_dir} has neither model.safetensors nor model.safetensors.index.json: "
                "stagemesh reads safetensors checkpoints only"
            )
        return dict.fromkeys(self._header(single), single)

    def _header(self, path: Path) -> dict[str, TensorInfo]:
        if path not in self._headers:
            self._headers[path] = {
                name: TensorInfo(name, path, _dtype(path, name, stored.dtype), stored.shape, stored.offset)
                for name, stored in read_header(path).items()
            }
        return self._headers[path]


def wrong_shape(info: TensorInfo, expected: Sequence[int], found: Sequence[int] | None = None) -> CheckpointError:
    """A tensor (or what it was converted to, `found`) is not as config.json says."""
    return CheckpointError(
        f"tensor {info.name!r} in {info.path} has shape {list(found or info.shape)}, config.json asks for "
        f"{list(expected)}: the files are of different models or revisions"
    )


def _dtype(path: Path, name: str, stored: str) -> torch.dtype:
    if stored not in _DTYPES:
        raise CheckpointError(f"tensor {name!r} in {path} is of type {stored}, which cannot be read: convert it")
    return _DTYPES[stored]


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error


def _read_json(path: Path) -> dict[str, object]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return value
