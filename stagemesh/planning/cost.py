"""The cost of a layer on a worker: seconds of a step, and bytes of memory with KV for the longest sequence.

The roofline model of Williams et al. (2009): a part of a step takes as long as the longer of streaming its weights and
computing. Decode steps are balanced: most steps are decode steps, and a prefill chunk divides the same way.

A step reads those routed experts that one of its rows uses, each once. With e experts of which a row uses u, m rows use
e * (1 - (1 - u/e)^m) of them on average, if each row draws its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stagemesh.models.size import ELEMENT_BYTES, CheckpointInfo
from stagemesh.protos.v1.types_pb2 import RunLimits

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Kind:
    """Workers of equal cost. Each is one TP group of equal ranks."""

    tp_size: int
    memory_bytes: int
    """Bytes per rank. 0: unknown, everything fits."""
    flops_per_s: float
    bytes_per_s: float
    keeps_latents: bool = False
    """Whether its pages hold the latent, if the model has one. The compiled kernels of CPUs do that."""

    @property
    def speed(self) -> float:
        """Bytes of weights that the group streams per second. Faster workers are placed first."""
        return self.tp_size * self.bytes_per_s


class CostModel:
    """Costs of the layers and of the two ends (embedding; norm, head and sampler) of one model under some limits."""

    def __init__(
        self,
        info: CheckpointInfo,
        limits: RunLimits,
        dtype: str,
        draft: CheckpointInfo | None = None,
        kv_element_bytes: int | None = None,
    ) -> None:
        """Makes the model.

        Args:
            info: the checkpoint.
            limits: the limits of a pipeline.
            dtype: element type of activations, and of weights that are not quantized.
            draft: a model of the same dtype that the last stage holds whole, in addition to its layers. Its time is not
                counted: with many sequences, when balance matters, no tokens are drafted.
            kv_element_bytes: bytes of one element of K or V; default: the dtype's.
        """
        self.info = info
        self.draft = draft
        self.limits = limits
        self.dtype = dtype
        self.element_bytes = ELEMENT_BYTES[dtype]
        self.kv_element_bytes = kv_element_bytes or self.element_bytes
        self.rows = max(1, limits.max_num_seqs // max(1, limits.steps_in_flight))
        """Tokens in a full decode step."""
        parts = [info.embedding, *info.layers, info.head]
        self._always = np.array([part.weight_bytes(self.element_bytes) for part in parts], dtype=np.float64)
        """Bytes [L+2] of weights that every step reads."""
        self._experts = np.array([part.expert_bytes(self.element_bytes) for part in parts], dtype=np.float64)
        """Bytes [L+2] of routed experts."""
        self._flops = np.array([part.flops_per_token for part in parts], dtype=np.float64)

    def experts_read(self, rows: float) -> float:
        """Mean share of a layer's routed experts that a step of `rows` rows reads."""
        if not self.info.experts:
            return 1.0
        return 1.0 - float((1.0 - min(1.0, self.info.experts_used / self.info.experts)) ** rows)

    def seconds(self, kind: Kind, rows: float | None = None, context: float = 0) -> FloatArray:
        """Seconds [L+1] of a decode step in the first 0, 1, ... L layers, with the ends that go with them.

        A stage of layers [first, last) takes the difference. A step reads only its rows' vectors of the embedding.

        Args:
            kind: the workers.
            rows: rows of the step; default: those of a full step.
            context: positions whose K and V each row reads.
        """
        rows = self.rows if rows is None else rows
        read = self._always + self._experts * self.experts_read(rows)
        read[1:-1] += self.kv_bytes_per_token(kind) * kind.tp_size * rows * context
        parts = np.maximum(read / kind.bytes_per_s, self._flops * rows / kind.flops_per_s) / kind.tp_size
        parts[0] = rows * self.info.hidden_size * self.element_bytes / kind.bytes_per_s
        return _up_to_layer(parts)

    def stage_seconds(self, kind: Kind, first: int, last: int, rows: float | None = None, context: float = 0) -> float:
        """Seconds of a decode step on the stage that holds layers [first, last). See `seconds`."""
        upto = self.seconds(kind, rows, context)
        return float(upto[last] - upto[first])

    def kv_bytes_per_token(self, kind: Kind) -> int:
        """KV bytes of one token in one layer on one rank. Fewer KV heads than ranks are replicated."""
        info = self.info
        if info.latent_elements_per_token and kind.keeps_latents:
            return info.latent_elements_per_token * self.kv_element_bytes
        if info.kv_on_every_rank:
            return info.kv_elements_per_token * self.kv_element_bytes
        per_head = -(-info.kv_elements_per_token // max(1, info.num_kv_heads))
        return -(-info.num_kv_heads // kind.tp_size) * per_head * self.kv_element_bytes

    def memory(self, kind: Kind, max_model_len: int | None = None) -> FloatArray:
        """Bytes [L+1] on one rank of the first 0, 1, ... L layers, with the ends that go with them.

        A layer has its share of the weights, and the KV pages of one longest sequence. The embedding is replicated. The
        last stage has norm and head, one step's logits in float32, and on rank 0 the draft model with its pages.
        """
        page = self.limits.page_size
        tokens = -(-(max_model_len or self.limits.max_model_len) // page) * page
        tokens = max(tokens, self.limits.num_pages * page)
        parts = self.weights(kind)
        parts[1:-1] += self.kv_bytes_per_token(kind) * tokens
        parts[-1] += self.limits.max_num_seqs * self.info.vocab_size * 4
        if self.draft is not None:
            kv = self.draft.num_layers * self.draft.kv_elements_per_token * tokens
            parts[-1] += self.draft.total_parameters * self.element_bytes + kv * self.kv_element_bytes
        return _up_to_layer(parts)

    def weights(self, kind: Kind) -> FloatArray:
        """Bytes [L+2] of weights on one rank: of the embedding, which is replicated, the layers and the head."""
        parts = (self._always + self._experts) / kind.tp_size
        parts[0] *= kind.tp_size
        return parts

    def stage_weights(self, kind: Kind, first: int, last: int) -> float:
        """Bytes of weights on one rank of the stage that holds layers [first, last)."""
        upto = _up_to_layer(self.weights(kind))
        return float(upto[last] - upto[first])

    def fixed_memory(self) -> float:
        """Bytes that a rank needs besides weights and KV: activation buffers of the steps in flight and of compute.

        A load needs no more, because it reads each tensor to its place (stage_worker/model/checkpoint.py).
        """
        buffers = self.limits.steps_in_flight + 4
        return float(buffers * self.limits.max_num_batched_tokens * self.info.hidden_size * self.element_bytes)

    def stage_memory(self, kind: Kind, first: int, last: int) -> float:
        """Bytes on one rank of the stage that holds layers [first, last)."""
        upto = self.memory(kind)
        return float(upto[last] - upto[first]) + self.fixed_memory()

    def fits(self, kind: Kind, first: int, last: int) -> bool:
        """Whether layers [first, last) fit one rank. True if the worker's memory is unknown: it decides itself."""
        return not kind.memory_bytes or self.stage_memory(kind, first, last) <= kind.memory_bytes


def _up_to_layer(parts: FloatArray) -> FloatArray:
    """Sums [L+1] over the first 0, 1, ... L layers of `parts` [L+2]: embedding, layers, head.

    The embedding goes with the first layer, the head with the last one.
    """
    layers = parts[1:-1].copy()
    layers[0] += parts[0]
    layers[-1] += parts[-1]
    return np.concatenate(([0.0], np.cumsum(layers)))
