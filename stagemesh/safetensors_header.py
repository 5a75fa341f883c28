"""Reads and checks the header of a safetensors file, without torch: its tensors, and their places.

The format: https://github.com/huggingface/safetensors#format (8 bytes of header length, a JSON header, then the data).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from stagemesh.errors import CheckpointError

BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "U64": 64, "I32": 32, "U32": 32, "I16": 16, "U16": 16,
    "I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
MAX_HEADER_BYTES = 100_000_000
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
    """Reads the header's JSON, unparsed. Raises CheckpointError if the file is cut or cannot be read."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(f"{path} is truncated: {size} bytes, its header says {length}; {AGAIN}")
            return file.read(length)
    except OSError as e:
        raise CheckpointError(f"cannot read {path}: {e.strerror}") from e


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Reads the tensors of one file, by name.

    Raises CheckpointError if the header is cut or broken, or if data would end past the end of the file.
    """
    raw = read_raw_header(path)
    try:
        header = json.loads(raw)
    except ValueError as e:
        raise CheckpointError(f"{path}: broken safetensors header ({e}); {AGAIN}") from e
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: broken safetensors header (not an object); {AGAIN}")
    header.pop("__metadata__", None)
    data = 8 + len(raw)
    tensors = {}
    for name, entry in header.items():
        try:
            start, end = entry["data_offsets"]
            wanted = (math.prod(entry["shape"]) * BITS[entry["dtype"]] + 7) // 8
            tensor = StoredTensor(entry["dtype"], tuple(entry["shape"]), data + start, end - start)
        except (KeyError, TypeError, ValueError) as e:
            raise CheckpointError(f"{path}: tensor {name}: broken header entry; {AGAIN}") from e
        if tensor.nbytes != wanted:
            raise CheckpointError(
                f"{path}: tensor {name}: shape {entry['shape']} needs {wanted} bytes, not {tensor.nbytes}; {AGAIN}"
            )
        tensors[name] = tensor
    size, needed = path.stat().st_size, max((t.offset + t.nbytes for t in tensors.values()), default=data)
    if needed > size:
        raise CheckpointError(f"{path} is cut short: it has {size} bytes of {needed} (truncated); {AGAIN}")
    return tensors
