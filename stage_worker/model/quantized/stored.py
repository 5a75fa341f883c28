"""One quantized weight in its checkpoint: the tensors that make it up, and reads of parts of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stagemesh.errors import CheckpointError
from stagemesh.models.quantization import Quantization
from stagemesh.safetensors_header import StoredTensor

from ...kv.memory import zeros
from ..checkpoint import Checkpoint
from ..cut import WHOLE, Cut, Range
from .packed import unpack


@dataclass(frozen=True)
class Share:
    """The part of a weight to read: rows (outputs) and columns (inputs), of one expert if it is a stack."""

    rows: Range
    columns: Range
    expert: int = 0


@dataclass(frozen=True)
class Stored:
    """A weight of n outputs and k inputs, or a stack of them."""

    checkpoint: Checkpoint
    quantization: Quantization
    name: str
    parts: Mapping[str, str]
    """Part -> tensor."""
    shape: tuple[int, ...]
    """[n, k] or [experts, n, k]."""

    @property
    def n(self) -> int:
        """Number of outputs."""
        return self.shape[-2]

    @property
    def k(self) -> int:
        """Number of inputs."""
        return self.shape[-1]

    def tensor(self, *parts: str) -> str:
        """Returns the name of the first of these parts that there is. Raises CheckpointError if there is none."""
        for part in parts:
            if part in self.parts:
                return self.parts[part]
        raise self.wrong(f"has no {' or '.join(parts)}")

    def info(self, *parts: str) -> StoredTensor:
        """Returns type and shape of a part. Raises CheckpointError if it is missing."""
        return self.checkpoint.info(self.tensor(*parts))

    def wrong(self, what: str) -> CheckpointError:
        """Returns the error to raise if the tensors do not fit together."""
        return CheckpointError(
            f"{self.checkpoint.model_dir}: the quantized weight {self.name!r} {what}: check that config.json belongs "
            "to these weights, and that the download is complete"
        )

    def whole(self, *parts: str) -> Tensor:
        """Reads a part as it is."""
        return self.checkpoint.read(self.tensor(*parts))

    def block(self, part: str, shape: tuple[int, int], rows: Range, columns: Range) -> Tensor:
        """Reads rows and columns of a part, which is seen as of this shape. Types of 8 bits come as uint8.

        Raises:
            CheckpointError: it has another number of elements, or cannot be read.
        """
        name = self.tensor(part)
        info, dtype = self.checkpoint.info(name), self.checkpoint.dtype(name)
        if info.parameters != shape[0] * shape[1]:
            raise self.wrong(f"needs a {part} of {list(shape)}, not of {list(info.shape)}")
        out = zeros((rows[1] - rows[0], columns[1] - columns[0]), dtype, huge_pages=False)
        cut = WHOLE if columns == (0, shape[1]) else Cut(1, (columns,))
        self.checkpoint.read_into(out, name, cut, rows[0], shape)
        return out.view(torch.uint8) if dtype.itemsize == 1 else out


def as_scales(stored: Tensor, dtype: str) -> Tensor:
    """Returns scales in fp32, fp16 or bf16. All values of FP8 are in bf16, too.

    Args:
        stored: as `Stored.block` returns them.
        dtype: the name of their type in the file. Bytes are exponents (E8M0 of the MX formats).
    """
    if dtype == "F8_E4M3":
        return stored.view(torch.float8_e4m3fn).to(torch.bfloat16)
    if dtype in ("F8_E8M0", "U8"):
        return stored.view(torch.float8_e8m0fnu).to(torch.bfloat16)
    return stored


def span(group: int, columns: Range) -> Range:
    """Returns the groups that hold these columns."""
    return columns[0] // group, -(-columns[1] // group)


def unpacked_words(words: Tensor, bits: int) -> Tensor:
    """Returns the numbers [n, words * 32 / bits] in rows of int32 words, one a byte, from a word's lowest bits on."""
    found = _as_bytes(words)
    return found if bits == 8 else unpack(found, "int4")


def _as_bytes(words: Tensor) -> Tensor:
    return words.reshape(-1).view(torch.uint8).view(len(words), -1)


def codes_of_words(words: Tensor, bits: int, columns: Range) -> Tensor:
    """Returns the codes of `Packed` for columns of a weight in int32 words along its columns.

    `words` [n, words] begins with the word that holds the first column. With 8 bits, codes become signed.
    """
    per_word = 32 // bits
    first = columns[0] % per_word
    last = first + columns[1] - columns[0]
    codes = _as_bytes(words)[:, first * bits // 8 : last * bits // 8]
    return codes.contiguous() if bits == 4 else codes ^ 128


def midpoint(bits: int) -> float | None:
    """Returns the code of zero if it is the middle of all codes."""
    return 8.0 if bits == 4 else None
