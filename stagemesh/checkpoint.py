"""Reads what a checkpoint says about itself, without torch: config.json and the headers of its safetensors files.

`inspect` counts bytes, parameters and FLOPs of each decoder layer, of the embedding and of the head, for the cost
model. `fingerprint` tells one revision of a checkpoint from another. Both read headers, and of the weights only a few
blocks. File format: https://github.com/huggingface/safetensors#format (8 bytes of header length, JSON header, data).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stagemesh.errors import CheckpointError, UnsupportedModel

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
STORED_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "U64": 64, "I32": 32, "U32": 32, "I16": 16, "U16": 16,
    "I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
STORED_DTYPE = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
MAX_HEADER_BYTES = 100_000_000
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SAMPLE_BYTES, SAMPLES_PER_FILE = 4096, 64
# Families whose configuration class ties the embedding unless config.json says otherwise.
TIED_BY_DEFAULT = ("gemma", "gpt2", "cohere", "starcoder", "opt", "bloom", "falcon", "gpt_bigcode")
# Towers and heads of a checkpoint that are not the decoder served.
FOREIGN = re.compile(r"(^|\.)(vision|visual|audio|image|multi_modal|mm_projector|mtp)")
LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)\.")
EMBEDDING = re.compile(r"(^|\.)(embed_tokens|embed_in|wte|wpe|word_embeddings|tok_embeddings|embed_positions)\b")
HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output)\.weight$")
EXPERT = re.compile(r"\.experts(\.|_)")


@dataclass(frozen=True)
class Part:
    """Size and work of one decoder layer, of the embedding, or of the head."""

    bytes: int = 0
    """As stored in the checkpoint."""
    parameters: int = 0
    flops_per_token: float = 0.0
    """Twice the parameters that take part in a matrix product for one token; of experts, only those it is routed to."""


@dataclass(frozen=True)
class CheckpointInfo:
    """What is known of a checkpoint before any weight is loaded."""

    path: str
    architecture: str
    model_type: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    dtype: str
    """Element type of the weights: "float32", "bfloat16" or "float16"."""
    max_position_embeddings: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    kv_elements_per_token: int
    """Elements of K and V together of one token in one layer, over all KV heads."""
    tied: bool
    """Input embedding and output head are one tensor. The first and the last stage then both hold and count it."""
    layers: tuple[Part, ...]
    embedding: Part
    head: Part
    """Final norm and output head."""
    files: tuple[str, ...] = field(default=())

    @property
    def total_parameters(self) -> int:
        """Parameters of the whole model, a tied embedding once."""
        parts = sum(part.parameters for part in self.layers) + self.embedding.parameters + self.head.parameters
        return parts - (self.vocab_size * self.hidden_size if self.tied else 0)


def read_config(model_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """config.json of a checkpoint. Raises CheckpointError when the folder or the file is missing or broken."""
    folder = Path(model_dir)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such directory; give the folder that holds the checkpoint's config.json")
    config = _read_json(folder / "config.json", "give a Hugging Face checkpoint directory")
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / 'config.json'}: a JSON object is expected; fetch the file again")
    return config


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The decoder's part of a configuration. A multimodal checkpoint has it under `text_config`."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) and nested else config


def weight_files(model_dir: str | os.PathLike[str]) -> list[Path]:
    """The safetensors files of a checkpoint, in name order.

    Raises CheckpointError when there are none, or when the index names one that is missing.
    """
    folder = Path(model_dir)
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    index = folder / INDEX
    if index.is_file():
        content = _read_json(index, "fetch the file again")
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index}: no weight_map in it; fetch the file again")
        names = sorted(set(weight_map.values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{index}: it names {', '.join(missing[:3])}{' and others' if len(missing) > 3 else ''}, "
                f"which {'is' if len(missing) == 1 else 'are'} not in {folder}; fetch the missing files"
            )
        return [folder / name for name in names]
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if found:
        raise CheckpointError(f"{folder}: {found[0]} needs {INDEX} beside it, which is missing; fetch it too")
    raise CheckpointError(
        f"{folder}: no {SINGLE} and no {INDEX}; fetch the weights in safetensors format, "
        "or use --load-format dummy for random weights"
    )


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Tensor name -> {dtype, shape, data_offsets} of one safetensors file.

    Raises CheckpointError when the header is truncated or broken, or when data would end past the end of the file.
    """
    again = "the download is incomplete or damaged: fetch the file again"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(f"{path}: truncated: {size} bytes, header says {length}; {again}")
            raw = file.read(length)
        header = json.loads(raw)
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read: {e.strerror}") from e
    except ValueError as e:
        raise CheckpointError(f"{path}: broken safetensors header ({e}); {again}") from e
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: broken safetensors header (not an object); {again}")
    header.pop("__metadata__", None)
    for name, entry in header.items():
        try:
            start, end = entry["data_offsets"]
            wanted = (math.prod(entry["shape"]) * STORED_BITS[entry["dtype"]] + 7) // 8
        except (KeyError, TypeError, ValueError) as e:
            raise CheckpointError(f"{path}: tensor {name}: broken header entry; {again}") from e
        if end - start != wanted:
            raise CheckpointError(
                f"{path}: tensor {name}: shape {entry['shape']} needs {wanted} bytes, not {end - start}; {again}"
            )
        if 8 + length + end > size:
            raise CheckpointError(
                f"{path}: truncated: tensor {name} ends at byte {8 + length + end}, the file at {size}; {again}"
            )
    return header


def inspect(model_dir: str | os.PathLike[str], load_format: str = "auto") -> CheckpointInfo:
    """What the checkpoint in `model_dir` holds. With load_format "dummy" only config.json is read.

    Raises CheckpointError (file, what is wrong, what to do) and UnsupportedModel.
    """
    config = read_config(model_dir)
    shape = _Shape(config, Path(model_dir) / "config.json")
    if load_format == "dummy":
        return _info(shape, Path(model_dir), shape.dtype or "float32", *_estimated(shape), tied=shape.tied)
    files = weight_files(model_dir)
    tensors: dict[str, dict[str, Any]] = {}
    for path in files:
        tensors.update(read_header(path))
    return _counted(shape, Path(model_dir), files, tensors)


def fingerprint(model_dir: str | os.PathLike[str], load_format: str = "auto") -> str:
    """SHA-256 (hex) that tells one revision of a checkpoint from another. It is the same on every machine.

    The hash covers config.json, tokenizer.json, the index, and of each weight file its header, its size and up to 64
    blocks of 4 KiB, each from the middle of a tensor. With dummy weights it covers config.json alone.
    """
    folder = Path(model_dir)
    read_config(folder)
    digest = hashlib.sha256()

    def add(label: str, data: bytes) -> None:
        digest.update(f"{label}\0{len(data)}\0".encode())
        digest.update(data)

    add("config.json", (folder / "config.json").read_bytes())
    if load_format == "dummy":
        return digest.hexdigest()
    for name in ("tokenizer.json", INDEX):
        if (folder / name).is_file():
            add(name, (folder / name).read_bytes())
    for path in weight_files(folder):
        header = read_header(path)
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            add(path.name, file.read(length) + str(path.stat().st_size).encode())
            middles = sorted(sum(entry["data_offsets"]) // 2 for entry in header.values())
            chosen = middles if len(middles) <= SAMPLES_PER_FILE else middles[:: -(-len(middles) // SAMPLES_PER_FILE)]
            for middle in chosen:
                file.seek(8 + length + max(0, middle - SAMPLE_BYTES // 2))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _read_json(path: Path, advice: str) -> Any:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as e:
        raise CheckpointError(f"{path}: no such file; {advice}") from e
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read: {e.strerror}") from e
    except ValueError as e:
        raise CheckpointError(f"{path}: not valid JSON ({e}); fetch the file again") from e


class _Shape:
    """The numbers of a configuration, whatever name the model's family gives them."""

    def __init__(self, config: Mapping[str, Any], path: Path) -> None:
        self.text = text = text_config(config)
        self._path = path
        if config.get("quantization_config") or text.get("quantization_config"):
            raise UnsupportedModel(
                f"{path}: quantized weights (quantization_config) cannot be served yet; use the checkpoint in "
                "bfloat16, float16 or float32"
            )
        names = config.get("architectures") or text.get("architectures") or []
        self.model_type = str(text.get("model_type") or config.get("model_type") or "")
        self.architecture = str(names[0]) if names else self.model_type
        self.num_layers = self.number("num_hidden_layers", "n_layer", "n_layers", "num_layers")
        self.hidden = self.number("hidden_size", "n_embd", "d_model", "dim")
        self.vocab = self.number("vocab_size")
        self.heads = self.number("num_attention_heads", "n_head", "n_heads")
        self.kv_heads = self.number("num_key_value_heads", "num_kv_heads", "n_head_kv", default=self.heads)
        self.head_dim = self.number("head_dim", default=self.hidden // self.heads)
        self.intermediate = self.number("intermediate_size", "n_inner", "ffn_dim", default=4 * self.hidden)
        self.experts = self.number("num_local_experts", "num_experts", "n_routed_experts", default=0)
        self.experts_used = self.number("num_experts_per_tok", "moe_topk", default=min(2, self.experts))
        self.positions = self.number("max_position_embeddings", "n_positions", "max_seq_len", default=2048)
        tied = text.get("tie_word_embeddings", config.get("tie_word_embeddings"))
        self.tied = bool(tied) if tied is not None else self.model_type.startswith(TIED_BY_DEFAULT)
        stored = next((c[k] for c in (config, text) for k in ("dtype", "torch_dtype") if c.get(k)), None)
        self.dtype = str(stored).removeprefix("torch.") if stored else None
        if self.dtype is not None and self.dtype not in ELEMENT_BYTES:
            raise UnsupportedModel(
                f"{path}: dtype {self.dtype} cannot be served; it must be {', '.join(ELEMENT_BYTES)}: set --dtype "
                "after converting the checkpoint"
            )

    def number(self, *names: str, default: int | None = None) -> int:
        for name in names:
            value = self.text.get(name)
            if isinstance(value, (list, tuple)):  # One number per layer: memory must suffice for the largest.
                value = max((v for v in value if isinstance(v, int)), default=None)
            if value is not None:
                if isinstance(value, bool) or not isinstance(value, int) or value < (1 if default is None else 0):
                    raise CheckpointError(f"{self._path}: {name} is {value!r}, a positive whole number is expected")
                return value
        if default is None:
            raise CheckpointError(
                f"{self._path}: no {names[0]} in it; is this the config of a decoder-only language model?"
            )
        return default

    @property
    def kv_elements(self) -> int:
        """Elements of K and V of one token in one layer. Latent-attention models keep them expanded, of different
        widths."""
        if self.text.get("kv_lora_rank"):
            rope, nope = self.number("qk_rope_head_dim", default=0), self.number("qk_nope_head_dim", default=0)
            return self.heads * (rope + nope + self.number("v_head_dim", default=self.head_dim))
        return 2 * self.kv_heads * self.head_dim


def _estimated(shape: _Shape) -> tuple[list[Part], Part, Part]:
    """Parts by formula: q, k, v, o, and a gated MLP (a plain one for GPT-NeoX and GPT-2) or experts."""
    h, element = shape.hidden, ELEMENT_BYTES[shape.dtype or "float32"]
    attention = h * shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads)
    matrices = 2 if shape.model_type.startswith(("gpt", "opt", "bloom", "phi", "falcon", "starcoder")) else 3
    if shape.model_type == "phi3":
        matrices = 3
    mlp = (
        matrices
        * h
        * (shape.number("moe_intermediate_size", default=shape.intermediate) if shape.experts else shape.intermediate)
    )
    held = attention + (shape.experts * (mlp + h) if shape.experts else mlp) + 2 * h
    used = attention + (shape.experts_used * mlp + shape.experts * h if shape.experts else mlp)
    layer = Part(held * element, held, 2.0 * used)
    table = shape.vocab * h
    return [layer] * shape.num_layers, Part(table * element, table), Part((table + h) * element, table + h, 2.0 * table)


def _counted(
    shape: _Shape, folder: Path, files: list[Path], tensors: Mapping[str, Mapping[str, Any]]
) -> CheckpointInfo:
    """Parts by the tensors in the headers."""
    sums = [[0, 0, 0.0] for _ in range(shape.num_layers + 2)]  # layers, then embedding, then head
    embedding, head, seen, by_dtype = shape.num_layers, shape.num_layers + 1, set(), dict.fromkeys(STORED_DTYPE, 0)
    has_head, table = False, [0, 0]
    for name, entry in tensors.items():
        if FOREIGN.search(name):
            continue
        stored, parameters = entry["data_offsets"][1] - entry["data_offsets"][0], math.prod(entry["shape"])
        if entry["dtype"] in by_dtype:
            by_dtype[entry["dtype"]] += parameters
        matrix = len(entry["shape"]) > 1
        flops = 2.0 * parameters if matrix else 0.0
        layer = LAYER.search(name)
        if layer:
            index = int(layer[1])
            if index >= shape.num_layers:
                continue  # Layers of another head, such as multi-token prediction.
            seen.add(index)
            if EXPERT.search(name) and shape.experts:
                flops *= shape.experts_used / shape.experts
            place = index
        elif EMBEDDING.search(name):
            place, flops = embedding, 0.0
            if entry["shape"][0] >= table[1]:
                table = [stored, parameters]
        else:
            place = head
            has_head = has_head or bool(HEAD.search(name))
        for k, value in enumerate((stored, parameters, flops)):
            sums[place][k] += value
    missing = sorted(set(range(shape.num_layers)) - seen)
    if missing:
        raise CheckpointError(
            f"{folder}: config.json says {shape.num_layers} layers, the weights hold none of layer "
            f"{', '.join(map(str, missing[:5]))}{', ...' if len(missing) > 5 else ''}; fetch the missing files"
        )
    if not has_head:
        for k, value in enumerate((table[0], table[1], 2.0 * table[1])):
            sums[head][k] += value
    parts = [Part(int(b), int(p), f) for b, p, f in sums]
    common = max(by_dtype, key=lambda key: by_dtype[key])
    dtype = shape.dtype or STORED_DTYPE[common]
    names = tuple(path.name for path in files)
    return _info(shape, folder, dtype, parts[:embedding], parts[embedding], parts[head], tied=not has_head, files=names)


def _info(
    shape: _Shape,
    folder: Path,
    dtype: str,
    layers: list[Part],
    embedding: Part,
    head: Part,
    *,
    tied: bool,
    files: tuple[str, ...] = (),
) -> CheckpointInfo:
    return CheckpointInfo(
        path=str(folder),
        architecture=shape.architecture,
        model_type=shape.model_type,
        num_layers=shape.num_layers,
        hidden_size=shape.hidden,
        vocab_size=shape.vocab,
        dtype=dtype,
        max_position_embeddings=shape.positions,
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        kv_elements_per_token=shape.kv_elements,
        tied=tied,
        layers=tuple(layers),
        embedding=embedding,
        head=head,
        files=files,
    )
