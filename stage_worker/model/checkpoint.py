"""Reads single tensors, or slices of them, from a folder of safetensors files.

This reader replaces `safetensors.safe_open`, which maps the file. Truncation of a mapped file kills the process, and a
mapped view reports no progress. Here every read is a `pread` into our own memory, counted and checked.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, cast

import torch
from typing_extensions import Buffer

from stagemesh.errors import CheckpointError
from stagemesh.safetensors_header import StoredTensor, read_header

from .cut import WHOLE, Cut

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


class Checkpoint:
    """A folder with `model.safetensors`, or an index and its files. A file's header is read with its first tensor."""

    def __init__(self, model_dir: str | Path) -> None:
        self.model_dir = Path(model_dir)
        self.tensor_bytes_read = 0
        """Bytes of tensor data read so far, without the parts of rows that were not requested."""
        self._headers: dict[Path, dict[str, StoredTensor]] = {}
        self._files = self._find_files()

    @property
    def names(self) -> list[str]:
        """Names of all tensors that the checkpoint lists."""
        return list(self._files)

    def info(self, name: str) -> StoredTensor:
        """Returns dtype, shape and place of one tensor.

        Raises:
            CheckpointError: its file is missing or damaged, or the index is wrong.
        """
        path = self._files[name]
        header = self._header(path)
        if name not in header:
            raise CheckpointError(f"tensor {name!r} should be in {path} but is not: download the checkpoint again")
        return header[name]

    def dtype(self, name: str) -> torch.dtype:
        """Returns the dtype of one tensor. Raises CheckpointError for a dtype that torch does not have."""
        stored = self.info(name).dtype
        if stored not in _DTYPES:
            raise CheckpointError(
                f"tensor {name!r} in {self._files[name]} is of type {stored}, which cannot be read: convert it"
            )
        return _DTYPES[stored]

    def lacking(self, missing: Sequence[str]) -> CheckpointError:
        """Returns the error to raise if these tensors are missing."""
        return CheckpointError(
            f"{self.model_dir} lacks {len(missing)} tensor(s) of this stage, the first is {missing[0]!r}: "
            "download the checkpoint again, or check that config.json belongs to it"
        )

    def check_shape(self, name: str, expected: Sequence[int], found: Sequence[int] | None = None) -> None:
        """Raises CheckpointError if a tensor's shape (or `found`, its shape after conversion) is not `expected`."""
        found = self.info(name).shape if found is None else found
        if tuple(found) != tuple(expected):
            raise CheckpointError(
                f"tensor {name!r} in {self._files[name]} has shape {list(found)}, config.json asks for "
                f"{list(expected)}: the files are of different models or revisions"
            )

    def place(self, name: str) -> tuple[str, int]:
        """Returns a sort key by which files are read in order, front to back."""
        return str(self._files[name]), self.info(name).offset

    def read(self, name: str, cut: Cut = WHOLE) -> torch.Tensor:
        """Reads one tensor, or a part of it, into new memory.

        Raises:
            CheckpointError: the file ends early or cannot be read.
        """
        shape = self.info(name).shape
        if cut.dim is not None and cut.ranges[-1][1] > shape[cut.dim]:
            raise CheckpointError(f"tensor {name!r} has shape {list(shape)}, too small for its model's config")
        with _open(self._files[name]) as file:
            if cut.dim is None:
                return self._read_rows(file.fileno(), name, 0, shape[0] if shape else 1)
            if cut.dim == 0:
                pieces = [self._read_rows(file.fileno(), name, start, stop) for start, stop in cut.ranges]
            else:
                pieces = [self._read_columns(file.fileno(), name, cut.dim, start, stop) for start, stop in cut.ranges]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=cut.dim)

    def _read_rows(self, fd: int, name: str, start: int, stop: int, count: bool = True) -> torch.Tensor:
        info = self.info(name)
        shape = (stop - start, *info.shape[1:]) if info.shape else ()
        row_bytes = info.nbytes // info.shape[0] if info.shape and info.shape[0] else info.nbytes
        out = torch.empty(shape, dtype=self.dtype(name))
        if out.numel() == 0:
            return out
        memory = memoryview(cast(Buffer, out.reshape(-1).view(torch.uint8).numpy()))
        done, base = 0, info.offset + start * row_bytes
        while done < len(memory):
            got = os.preadv(fd, [memory[done : done + _READ_BYTES]], base + done)
            if got == 0:
                raise CheckpointError(f"{self._files[name]} ends inside tensor {name!r}: download the checkpoint again")
            done += got
            if count:
                self.tensor_bytes_read += got
        return out

    def _read_columns(self, fd: int, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        """Reads a slice along an inner dimension. Whole rows are read block by block; the slice is kept and counted."""
        info = self.info(name)
        out = torch.empty(Cut(dim, ((start, stop),)).shape(info.shape), dtype=self.dtype(name))
        rows = info.shape[0]
        block = max(1, _READ_BYTES // max(1, info.nbytes // max(1, rows)))
        for begin in range(0, rows, block):
            end = min(rows, begin + block)
            out[begin:end] = self._read_rows(fd, name, begin, end, count=False).narrow(dim, start, stop - start)
        self.tensor_bytes_read += out.nbytes
        return out

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

    def _header(self, path: Path) -> dict[str, StoredTensor]:
        if path not in self._headers:
            self._headers[path] = read_header(path)
        return self._headers[path]


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
