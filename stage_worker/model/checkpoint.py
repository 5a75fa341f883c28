"""Reads single tensors, or slices of them, from a folder of safetensors files.

This reader replaces `safetensors.safe_open`, which maps the file. Truncation of a mapped file kills the process, and a
mapped view reports no progress. Here every read is a `pread` to where the bytes belong, counted and checked.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, cast

import torch
from typing_extensions import Buffer

from stagemesh.checkpoint import FOREIGN, LAYER, read_configs, weight_map
from stagemesh.errors import CheckpointError
from stagemesh.models.quantized_tensors import refuse_unnamed
from stagemesh.safetensors_header import StoredTensor, read_header

from ..kv.memory import Scratch, zeros
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
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "BOOL": torch.bool,
}
_READ_BYTES = 32 << 20
_BLOCK_BYTES = 4 << 20
"""Size of the buffer for what cannot be read to its place. It fits in a cache."""
_HARMLESS = r"\brotary_emb\.\w+$|(^|\.)(masked_bias|position_ids)$|(attn|attention)\.bias$"
"""Names of tensors that earlier releases of transformers stored, and that are computed: angles, masks, positions."""

log = logging.getLogger(__name__)


class Checkpoint:
    """A folder with `model.safetensors`, or an index and its files. A file's header is read with its first tensor."""

    def __init__(self, model_dir: str | Path) -> None:
        """Raises CheckpointError if it is not clear which files are meant."""
        self.model_dir = Path(model_dir)
        self.tensor_bytes_read = 0
        """Bytes of tensor data read so far, without the parts of rows that were not requested."""
        self._scratch = Scratch()
        self._headers: dict[Path, dict[str, StoredTensor]] = {}
        self._files = weight_map(self.model_dir)
        self.configs = read_configs(self.model_dir)
        """The files that describe the model and its quantization, by name."""

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

    def check_use(
        self,
        used: Collection[str],
        known: Collection[str],
        layers: Collection[int],
        ignored: str = "",
        packed: Collection[str] = (),
    ) -> None:
        """Checks what a shard makes of its part of the checkpoint: a tensor that it does not use is never just ignored.

        Args:
            used: the tensors that the shard reads.
            known: the tensors that it or other stages use.
            layers: the decoder layers that it reads.
            ignored: a pattern of further names that are harmless.
            packed: those of `used` that are tensors of quantized weights.

        Raises:
            UnsupportedModel: another tensor that it reads is quantized.
            CheckpointError: it would not use a tensor of its layers, or of a module from which it reads others.
        """
        refuse_unnamed(self.model_dir, ((name, self.info(name)) for name in used if name not in packed))
        harmless = re.compile(f"{_HARMLESS}|{ignored}" if ignored else _HARMLESS)
        modules = {name.rpartition(".")[0] for name in used}
        unused = []
        for name in sorted(self._files.keys() - known):
            if FOREIGN.search(name) or harmless.search(name):
                continue
            layer = LAYER.search(name)
            if int(layer[1]) in layers if layer else name.rpartition(".")[0] in modules:
                raise CheckpointError(
                    f"{self._files[name]}: config.json describes a model without the tensor {name!r}, so the tokens "
                    "would not be its authors': check that config.json belongs to these weights"
                )
            if not layer:
                unused.append(name)
        if unused:
            log.warning("%s: %d tensors are not used, such as %s", self.model_dir, len(unused), unused[0])

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
        """Reads one tensor, or a part of it, into new memory. Raises CheckpointError, as `read_into` does."""
        out = zeros(cut.shape(self.info(name).shape), self.dtype(name), huge_pages=False)
        self.read_into(out, name, cut)
        return out

    def read_into(
        self, out: torch.Tensor, name: str, cut: Cut = WHOLE, start: int = 0, shape: tuple[int, ...] | None = None
    ) -> None:
        """Fills `out` with rows of one tensor, or of a part of it, from row `start` on.

        `out` is contiguous. It may have another dtype than the file, and be on another device. A read needs no memory
        beside `out` but a buffer of `_BLOCK_BYTES`, or of one row. `shape` is another view of the tensor's elements, of
        which `cut` and `start` then are.

        Raises:
            CheckpointError: the file ends early or cannot be read, or its tensor is smaller than the cut.
        """
        shape = shape or self.info(name).shape or (1,)
        if cut.dim is not None and cut.ranges[-1][1] > shape[cut.dim]:
            raise CheckpointError(f"tensor {name!r} has shape {list(shape)}, too small for its model's config")
        with _open(self._files[name]) as file:
            if cut.dim is not None and 0 < cut.dim == len(shape) - 1:
                first = start * math.prod(shape[1:-1])
                self._read_columns(file.fileno(), name, out.view(-1, out.shape[-1]), first, cut, shape[-1])
            else:
                flat, at = out.view(-1), 0
                for first, count in _runs(shape, cut, start, len(out) if out.dim() else 1):
                    self._read_run(file.fileno(), name, flat[at : at + count], first)
                    at += count
        self.tensor_bytes_read += out.numel() * self.dtype(name).itemsize

    def read_rows(self, out: torch.Tensor, name: str, first: int, cut: Cut = WHOLE) -> None:
        """Fills `out` [m, k] with rows of a tensor from row `first` on. The tensor is seen as a matrix of its last
        dimension. `cut`: of the columns (dimension 1).

        Raises:
            CheckpointError: the file ends early or cannot be read.
        """
        with _open(self._files[name]) as file:
            if cut.dim is None:
                self._read_run(file.fileno(), name, out.view(-1), first * out.shape[1])
            else:
                self._read_columns(file.fileno(), name, out, first, cut, self.info(name).shape[-1])
        self.tensor_bytes_read += out.numel() * self.dtype(name).itemsize

    def _read_run(self, fd: int, name: str, out: torch.Tensor, first: int) -> None:
        """Fills `out` [n] with the elements from `first` on."""
        dtype = self.dtype(name)
        if out.device.type == "cpu" and out.dtype == dtype:
            self._pread(fd, name, out, first)
            return
        step = _BLOCK_BYTES // dtype.itemsize
        for at in range(0, len(out), step):
            part = out[at : at + step]
            block = self._scratch.tensor((len(part),), dtype)
            self._pread(fd, name, block, first + at)
            part.copy_(block)

    def _read_columns(self, fd: int, name: str, out: torch.Tensor, first: int, cut: Cut, width: int) -> None:
        """Fills `out` with the cut's columns of the rows from `first` on. Whole rows of `width` elements are read."""
        dtype = self.dtype(name)
        step = max(1, _BLOCK_BYTES // (width * dtype.itemsize))
        for at in range(0, len(out), step):
            part = out[at : at + step]
            block = self._scratch.tensor((len(part), width), dtype)
            self._pread(fd, name, block.view(-1), (first + at) * width)
            column = 0
            for begin, end in cut.ranges:
                part[:, column : column + end - begin] = block[:, begin:end]
                column += end - begin

    def _pread(self, fd: int, name: str, out: torch.Tensor, first: int) -> None:
        """Fills `out` [n], in memory and of the file's dtype, with the elements from `first` on."""
        if out.numel() == 0:
            return
        memory = memoryview(cast(Buffer, out.view(torch.uint8).numpy()))
        done, base = 0, self.info(name).offset + first * out.itemsize
        while done < len(memory):
            got = os.preadv(fd, [memory[done : done + _READ_BYTES]], base + done)
            if got == 0:
                raise CheckpointError(f"{self._files[name]} ends inside tensor {name!r}: download the checkpoint again")
            done += got

    def _header(self, path: Path) -> dict[str, StoredTensor]:
        if path not in self._headers:
            self._headers[path] = read_header(path)
        return self._headers[path]


def _runs(shape: tuple[int, ...], cut: Cut, start: int, rows: int) -> Iterator[tuple[int, int]]:
    """Yields (first element, number of elements) of the contiguous pieces of rows [start, start + rows) of a part."""
    dim, ranges = (0, ((0, shape[0]),)) if cut.dim is None else (cut.dim, cut.ranges)
    inner = math.prod(shape[dim + 1 :])
    if dim > 0:
        outer = math.prod(shape[1:dim])
        for index in range(start * outer, (start + rows) * outer):
            for first, last in ranges:
                yield (index * shape[dim] + first) * inner, (last - first) * inner
        return
    for first, last in ranges:
        skipped = min(start, last - first)
        count = min(rows, last - first - skipped)
        yield (first + skipped) * inner, count * inner
        start, rows = start - skipped, rows - count


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
