"""What a layer costs on a worker: seconds of a step, and bytes of memory with KV for the longest sequence.

The roofline of Williams et al. (2009): a part of a step takes the longer of streaming its weights and computing.
A decode step is what is balanced: it is most of a model's life, and a prefill chunk divides the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stagemesh.checkpoint import ELEMENT_BYTES, CheckpointInfo
from stagemesh.protos.v1.coordinator_pb2 import RegisterRequest
from stagemesh.protos.v1.types_pb2 import RunLimits

# Assumed of a rank that measured nothing.
NOMINAL_FLOPS_PER_S, NOMINAL_BYTES_PER_S = 2e11, 1e10
# Rates this close are one kind: a measurement repeats no better, and a partition should not follow its noise.
SAME_KIND = 1.25
FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Kind:
    """Workers that are equal as far as cost goes: one TP group of equal ranks."""

    tp_size: int
    memory_bytes: int
    """Per rank; 0: unknown, everything fits."""
    flops_per_s: float
    bytes_per_s: float

    @property
    def speed(self) -> float:
        """Bytes of weights the group streams per second: what orders workers."""
        return self.tp_size * self.bytes_per_s


def kinds(workers: Sequence[RegisterRequest]) -> list[Kind]:
    """The kind of each worker: rates within `SAME_KIND` of the slowest of a group are taken as that slowest one's.

    Workers on devices of one name are as fast as the fastest of them measured: what one measured beside the start of
    the others says more about the start than about the device.
    """
    devices = [worker.device for worker in workers]
    best: dict[tuple[str, str], tuple[float, float]] = {}
    for d in devices:
        flops_per_s, bytes_per_s = best.get((d.kind, d.name), (0.0, 0.0))
        best[d.kind, d.name] = max(flops_per_s, d.flops_per_s), max(bytes_per_s, d.bytes_per_s)
    rates = [best[d.kind, d.name] if d.name else (d.flops_per_s, d.bytes_per_s) for d in devices]

    def grouped(rates: list[float], nominal: float) -> dict[float, float]:
        of: dict[float, float] = {}
        floor = 0.0
        for rate in sorted(set(rates)):
            value = rate if rate > 0 else nominal
            if not floor or value > floor * SAME_KIND:
                floor = value
            of[rate] = floor
        return of

    flops = grouped([rate[0] for rate in rates], NOMINAL_FLOPS_PER_S)
    stream = grouped([rate[1] for rate in rates], NOMINAL_BYTES_PER_S)
    return [
        Kind(w.tp_size, w.device.memory_bytes, flops[rate[0]], stream[rate[1]])
        for w, rate in zip(workers, rates, strict=True)
    ]


class CostModel:
    """Costs of the layers and of the two ends (embedding; norm, head and sampler) of one model under some limits."""

    def __init__(
        self, info: CheckpointInfo, limits: RunLimits, dtype: str, draft: CheckpointInfo | None = None
    ) -> None:
        """`draft`: a model of the same dtype that the last stage holds whole beside its layers.

        Its time is not counted: where many sequences run and balance matters, nobody guesses.
        """
        self.info = info
        self.draft = draft
        self.limits = limits
        self.element_bytes = ELEMENT_BYTES[dtype]
        self.rows = max(1, limits.max_num_seqs // max(1, limits.steps_in_flight))
        self._layer_parameters = np.array([part.parameters for part in info.layers], dtype=np.float64)
        self._layer_flops = np.array([part.flops_per_token for part in info.layers], dtype=np.float64)

    def layer_seconds(self, kind: Kind, rows: int | None = None) -> FloatArray:
        """Seconds [layers] of a step of `rows` tokens; default: a full decode step."""
        streaming = self._layer_parameters * self.element_bytes / kind.bytes_per_s
        computing = self._layer_flops * (rows or self.rows) / kind.flops_per_s
        return np.maximum(streaming, computing) / kind.tp_size

    def embedding_seconds(self, kind: Kind, rows: int | None = None) -> float:
        """Seconds of looking up `rows` embeddings: only the rows' own vectors are read."""
        return (rows or self.rows) * self.info.hidden_size * self.element_bytes / kind.bytes_per_s

    def head_seconds(self, kind: Kind, rows: int | None = None) -> float:
        """Seconds of norm and head over `rows` sampled rows."""
        head = self.info.head
        streaming = head.parameters * self.element_bytes / kind.bytes_per_s
        return max(streaming, head.flops_per_token * (rows or self.rows) / kind.flops_per_s) / kind.tp_size

    def stage_seconds(self, kind: Kind, first: int, last: int) -> float:
        """Seconds of a decode step on the stage that holds layers [first, last)."""
        seconds = float(self.layer_seconds(kind)[first:last].sum())
        seconds += self.embedding_seconds(kind) if first == 0 else 0.0
        return seconds + (self.head_seconds(kind) if last == self.info.num_layers else 0.0)

    def kv_bytes_per_token(self, kind: Kind) -> int:
        """KV bytes of one token in one layer on one rank; fewer KV heads than ranks are replicated."""
        per_head = -(-self.info.kv_elements_per_token // max(1, self.info.num_kv_heads))
        return -(-self.info.num_kv_heads // kind.tp_size) * per_head * self.element_bytes

    def layer_memory(self, kind: Kind, max_model_len: int | None = None) -> FloatArray:
        """Bytes [layers] on one rank: its share of the weights, and KV pages of one longest sequence."""
        tokens = self._kv_tokens(max_model_len)
        return self._layer_parameters * self.element_bytes / kind.tp_size + self.kv_bytes_per_token(kind) * tokens

    def _kv_tokens(self, max_model_len: int | None) -> int:
        """Positions of the pages that there have to be at the least."""
        page = self.limits.page_size
        tokens = -(-(max_model_len or self.limits.max_model_len) // page) * page
        return max(tokens, self.limits.num_pages * page)

    def draft_memory(self, max_model_len: int | None = None) -> float:
        """Bytes of the draft model and its KV pages on rank 0 of the last stage."""
        if self.draft is None:
            return 0.0
        kv = self.draft.num_layers * self.draft.kv_elements_per_token * self._kv_tokens(max_model_len)
        return float((self.draft.total_parameters + kv) * self.element_bytes)

    def embedding_memory(self) -> float:
        """Bytes of the embedding on one rank: replicated."""
        return float(self.info.embedding.parameters * self.element_bytes)

    def head_memory(self, kind: Kind, max_model_len: int | None = None) -> float:
        """Bytes of norm and head on one rank, of one step's logits in float32, and of a draft model."""
        logits = self.limits.max_num_seqs * self.info.vocab_size * 4
        head = self.info.head.parameters * self.element_bytes / kind.tp_size
        return head + logits + self.draft_memory(max_model_len)

    def fixed_memory(self) -> float:
        """Bytes every rank needs beside weights and KV: activation buffers of the steps in flight and of compute."""
        buffers = self.limits.steps_in_flight + 4
        return float(buffers * self.limits.max_num_batched_tokens * self.info.hidden_size * self.element_bytes)

    def stage_memory(self, kind: Kind, first: int, last: int, max_model_len: int | None = None) -> float:
        """Bytes on one rank of the stage that holds layers [first, last)."""
        total = float(self.layer_memory(kind, max_model_len)[first:last].sum()) + self.fixed_memory()
        total += self.embedding_memory() if first == 0 else 0.0
        return total + (self.head_memory(kind, max_model_len) if last == self.info.num_layers else 0.0)

    def fits(self, kind: Kind, first: int, last: int, max_model_len: int | None = None) -> bool:
        """Whether layers [first, last) fit one rank; a worker that does not know its memory decides itself."""
        return not kind.memory_bytes or self.stage_memory(kind, first, last, max_model_len) <= kind.memory_bytes
