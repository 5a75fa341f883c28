"""Reads the quantized weights of a checkpoint, each into the one form of `Packed`, and only a rank's share of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from stagemesh.errors import CheckpointError, UnsupportedModel
from stagemesh.models.quantization import Format, quantization_of
from stagemesh.models.quantized_tensors import format_of, quantized_weights, refuse_unnamed, shape_of

from ..checkpoint import Checkpoint
from ..cut import Range
from . import awq, bitsandbytes, fp4, gptq, pack_quantized, scaled, torchao
from .packed import BITS, Packed
from .stored import Share, Stored

_READERS: Mapping[Format, Callable[[Stored, Share], Packed]] = {
    "scaled": scaled.read,
    "pack-quantized": pack_quantized.read,
    "gptq": gptq.read,
    "awq": awq.read,
    "fp4": fp4.read,
    "mxfp4": fp4.read_stack,
    "bnb-4bit": bitsandbytes.read,
    "bnb-int8": scaled.read_bitsandbytes,
    "torchao": torchao.read,
}


class QuantizedReader:
    """The quantized weights of one checkpoint. There are none if its configuration names no quantization.

    Weights have the names that they would have without quantization, such as `model.layers.0.mlp.up_proj.weight`.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Raises UnsupportedModel if they are quantized in a way that is not known."""
        self._checkpoint = checkpoint
        names = set(checkpoint.names)
        self.quantization = quantization_of(checkpoint.model_dir, checkpoint.configs)
        """How the weights are quantized, or None."""
        self._parts: dict[str, dict[str, str]] = {}
        if self.quantization is None:
            refuse_unnamed(checkpoint.model_dir, ((name, None) for name in checkpoint.names))
        else:
            self._parts = quantized_weights(names)
        parts = {name for own in self._parts.values() for name in own.values()}
        self.names = sorted((names - parts) | self._parts.keys())
        """Names of all weights and other tensors. The tensors of a quantized weight are not among them."""
        self._stored: dict[str, Stored] = {}

    def is_quantized(self, weight: str) -> bool:
        """Whether a weight is stored quantized."""
        return weight in self._parts

    def tensors_of(self, weight: str) -> tuple[str, ...]:
        """Returns the tensors in the files that make up a weight: itself, if it is not quantized."""
        return tuple(self._parts[weight].values()) if weight in self._parts else (weight,)

    def zero_biases(self, weights: Collection[str], known: Collection[str]) -> set[str]:
        """Returns biases of zeros that belong to these weights, and that the model does not have.

        Early releases of AutoGPTQ stored one for every linear (vLLM leaves them out, too). Raises CheckpointError.
        """
        stored = set(self.names)
        biases = {f"{weight.removesuffix('.weight')}.bias" for weight in weights if self.is_quantized(weight)}
        extra = (biases & stored) - set(known)
        return {bias for bias in extra if not self._checkpoint.read(bias).any()}

    def shape(self, weight: str) -> tuple[int, ...]:
        """Returns the shape [n, k] of a quantized weight, or [experts, n, k] of a stack. Raises CheckpointError."""
        return self._of(weight).shape

    def reads_columns(self, weight: str) -> bool:
        """Whether a weight is stored with inputs as rows, so that all rows of some columns lie together."""
        return "qweight" in self._parts[weight]

    def packed(self, weight: str, rows: Range | None = None, columns: Range | None = None, expert: int = 0) -> Packed:
        """Reads a quantized weight, or rows and columns of it, or of one expert of a stack.

        Ask for all rows at once of a weight that `reads_columns`: for some of them, nearly as much of the file is read.

        Raises:
            CheckpointError: its tensors are missing, damaged, or do not fit together.
            UnsupportedModel: columns with 4 bits begin or end within a byte.
        """
        stored = self._of(weight)
        share = Share(rows or (0, stored.n), columns or (0, stored.k), expert)
        if share.rows[1] > stored.n or share.columns[1] > stored.k or expert >= (*stored.shape, 1, 1)[0]:
            raise CheckpointError(f"weight {weight!r} has shape {list(stored.shape)}, too small for its model's config")
        assert self.quantization is not None
        try:
            packed = _READERS[format_of(self.quantization, stored.parts)](stored, share)
        except (KeyError, IndexError, ValueError, TypeError) as e:
            raise stored.wrong(f"cannot be read ({e!r})") from e
        if BITS[packed.kind] == 4 and (share.columns[0] | share.columns[1]) & 1:
            raise UnsupportedModel(
                f"{weight}: inputs {share.columns[0]} to {share.columns[1]} are no whole bytes of {packed.kind} weights"
                ": use another tensor parallel size"
            )
        return packed.contiguous()

    def _of(self, weight: str) -> Stored:
        if weight not in self._stored:
            quantization, parts = self.quantization, self._parts[weight]
            assert quantization is not None
            format_of(quantization, parts)
            found = Stored(self._checkpoint, quantization, weight, parts, ())
            try:
                infos = {part: self._checkpoint.info(name) for part, name in parts.items()}
                shape = shape_of(quantization, weight, infos)
                if "quant_state" in parts:
                    shape = bitsandbytes.shape(self._checkpoint, parts["quant_state"])
                elif "weight_shape" in parts and len(shape) == 2:
                    shape = tuple(self._checkpoint.read(parts["weight_shape"]).tolist())
            except (KeyError, IndexError, ValueError, TypeError) as e:
                raise found.wrong(f"lacks some of its tensors, or they do not fit together ({e!r})") from e
            self._stored[weight] = Stored(self._checkpoint, quantization, weight, parts, shape)
        return self._stored[weight]
