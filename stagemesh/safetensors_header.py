"""Reads and checks the header of a safetensors file, without torch: its tensors, and their places.

The format: https://github.com/huggingface/safetensors#format (8 bytes of header length, a JSON header, then the data).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from stagemesh.errors import CheckpointError
from stagemesh.hub.substitute import BEGIN_BYTES, in_its_place

BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "U64": 64, "I32": 32, "U32": 32, "I16": 16, "U16": 16,
    "I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
MAX_HEADER_BYTES = 100_000_000
LENGTH_BYTES = 8
"""Bytes of the header's length."""
AGAIN = "the download is incomplete or damaged: fetch the file again"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Type, shape and place of a tensor in its file."""

    dtype: str
    """Element type by its name in the format, such as BF16."""
    shape: tuple[int, ...]
    offset: int
    """Byte in the file where its data starts."""
    nbytes: int

    @property
    def parameters(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def read_raw_header(path: Path) -> bytes:
    """Reads the header's JSON, unparsed. Raises CheckpointError if the file is cut, cannot be read or is another."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = header_length(file.read(BEGIN_BYTES), size, path)
            file.seek(LENGTH_BYTES)
            return file.read(length)
    except OSError as e:
        raise CheckpointError(f"cannot read {path}: {e.strerror}") from e


def header_length(begin: bytes, size: int, where: object) -> int:
    """Returns the length of the JSON header, in bytes.

    Args:
        begin: the first BEGIN_BYTES of the file, or all of a shorter one.
        size: bytes of the file.
        where: its path or address, for errors.

    Raises:
        CheckpointError: the file is cut, or is no safetensors file.
    """
    length = int.from_bytes(begin[:LENGTH_BYTES], "little")
    if size >= LENGTH_BYTES and length <= min(size - LENGTH_BYTES, MAX_HEADER_BYTES):
        return length
    if other := in_its_place(begin):
        raise CheckpointError(f"{where} is {other}")
    raise CheckpointError(f"{where} is truncated: {size} bytes, its header says {length}; {AGAIN}")


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Reads the tensors of one file, by name.

    Raises CheckpointError if the header is cut or broken, or if data would end past the end of the file.
    """
    return parse_header(read_raw_header(path), path.stat().st_size, path)


def parse_header(raw: bytes, size: int, where: object) -> dict[str, StoredTensor]:
    """Parses the JSON header of a file of `size` bytes at `where`. Raises CheckpointError, as `read_header` does."""
    try:
        header = json.loads(raw)
    except ValueError as e:
        raise CheckpointError(f"{where}: broken safetensors header ({e}); {AGAIN}") from e
    if not isinstance(header, dict):
        raise CheckpointError(f"{where}: broken safetensors header (not an object); {AGAIN}")
    header.pop("__metadata__", None)
    data = LENGTH_BYTES + len(raw)
    tensors = {}
    for name, entry in header.items():
        try:
            start, end = entry["data_offsets"]
            wanted = (math.prod(entry["shape"]) * BITS[entry["dtype"]] + 7) // 8
            tensor = StoredTensor(entry["dtype"], tuple(entry["shape"]), data + start, end - start)
        except (KeyError, TypeError, ValueError) as e:
            raise CheckpointError(f"{where}: tensor {name}: broken header entry; {AGAIN}") from e
        if tensor.nbytes != wanted:
            raise CheckpointError(
                f"{where}: tensor {name}: shape {entry['shape']} needs {wanted} bytes, not {tensor.nbytes}; {AGAIN}"
            )
        tensors[name] = tensor
    needed = max((t.offset + t.nbytes for t in tensors.values()), default=data)
    if needed > size:
        raise CheckpointError(f"{where} is cut short: it has {size} bytes of {needed} (truncated); {AGAIN}")
    return tensors
