"""Reads single tensors, or slices of them, from a folder of safetensors files.

This reader replaces `safetensors.safe_open`, which maps the file. Truncation of a mapped file kills the process, and a
mapped view reports no progress. Here every read is a `pread` into our own memory, counted and checked.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import BinaryIO, cast

import torch
from typing_extensions import Buffer

from stagemesh.checkpoint import FOREIGN, LAYER, read_configs, weight_map
from stagemesh.errors import CheckpointError
from stagemesh.models.quantization import refuse_quantized
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
}
_READ_BYTES = 32 << 20
_HARMLESS = r"\brotary_emb\.\w+$|(^|\.)(masked_bias|position_ids)$|(attn|attention)\.bias$"
"""Names of tensors that earlier releases of transformers stored, and that are computed: angles, masks, positions."""

log = logging.getLogger(__name__)


class Checkpoint:
    """A folder with `model.safetensors`, or an index and its files. A file's header is read with its first tensor."""

    def __init__(self, model_dir: str | Path) -> None:
        """Raises CheckpointError if it is not clear which files are meant, UnsupportedModel for quantized weights."""
        self.model_dir = Path(model_dir)
        self.tensor_bytes_read = 0
        """Bytes of tensor data read so far, without the parts of rows that were not requested."""
        self._headers: dict[Path, dict[str, StoredTensor]] = {}
        self._files = weight_map(self.model_dir)
        self._configs = read_configs(self.model_dir)
        refuse_quantized(self.model_dir, self._configs, dict.fromkeys(self._files).items())

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
        self, used: Collection[str], known: Collection[str], layers: Collection[int], ignored: str = ""
    ) -> None:
        """Checks what a shard makes of its part of the checkpoint: a tensor that it does not use is never just ignored.

        Args:
            used: the tensors that the shard reads.
            known: the tensors that it or other stages use.
            layers: the decoder layers that it reads.
            ignored: a pattern of further names that are harmless.

        Raises:
            UnsupportedModel: a tensor that it reads is quantized.
            CheckpointError: it would not use a tensor of its layers, or of a module from which it reads others.
        """
        refuse_quantized(self.model_dir, self._configs, ((name, self.info(name)) for name in used))
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

    def _header(self, path: Path) -> dict[str, StoredTensor]:
        if path not in self._headers:
            self._headers[path] = read_header(path)
        return self._headers[path]


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
