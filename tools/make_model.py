"""Writes a Llama checkpoint of seeded random weights with a working tokenizer, in Hugging Face's format.

    python tools/make_model.py --preset 100m --out DIR [--dtype bfloat16] [--shards N] [--seed S]

Benchmarks and tests need a checkpoint that transformers, vLLM and stagemesh can load, without a download. The same
arguments and the same torch build give the same bytes. Linear weights are drawn from N(0, 1/fan_in), so that each layer
keeps the scale of its input at any width, and the greedy choice depends on the whole context.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

BOS, EOS, TURN_START, TURN_END = "<|begin|>", "<|end|>", "<|turn|>", "<|done|>"
SPECIAL_TOKENS = (BOS, EOS, TURN_START, TURN_END)
"""Special tokens with the ids 0, 1, 2, 3. A turn of a chat ends with TURN_END, a second end-of-sequence token."""

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|turn|>' + message['role'] + '\n' + message['content'] + '<|done|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn|>assistant\n' }}{% endif %}"
)

EMBEDDING_STD = 0.1
"""It is small compared with a layer's output, so that attention and MLP decide the output, not the embedding."""


@dataclasses.dataclass(frozen=True)
class LlamaShape:
    """The fields of a Llama `config.json` that a caller may set."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads or (self.hidden_size // self.num_attention_heads) % 2:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be an even multiple of num_attention_heads "
                f"{self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} must be a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )

    @property
    def head_dim(self) -> int:
        """Head size D."""
        return self.hidden_size // self.num_attention_heads


PRESETS: Mapping[str, LlamaShape] = {
    "tiny": LlamaShape(128, 4, 4, 2, 256, 512, 1024),
    "100m": LlamaShape(768, 12, 12, 4, 2048, 16384, 4096),
    "500m": LlamaShape(2048, 10, 16, 4, 5632, 16384, 4096),
}


def make_checkpoint(
    out: str | Path,
    preset: str = "100m",
    *,
    seed: int = 0,
    dtype: str = "bfloat16",
    shards: int = 1,
    **overrides: Any,
) -> Path:
    """Writes the checkpoint of `preset` into `out`. `overrides` replace fields of `LlamaShape`.

    With `shards` > 1 the tensors are divided among that many files, with a `model.safetensors.index.json`.
    Returns `out`. Raises ValueError for an invalid preset, field, dtype or number.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}: one of {', '.join(PRESETS)}")
    unknown = overrides.keys() - {field.name for field in dataclasses.fields(LlamaShape)}
    if unknown:
        raise ValueError(f"unknown config fields: {', '.join(sorted(unknown))}")
    torch_dtype = getattr(torch, dtype, None)
    if not isinstance(torch_dtype, torch.dtype) or not torch_dtype.is_floating_point:
        raise ValueError(f"unknown dtype {dtype!r}: float32, bfloat16 or float16")
    shape = dataclasses.replace(PRESETS[preset], **overrides)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    _write_config(shape, dtype, folder)
    _write_tokenizer(shape, seed, folder)
    _write_weights(shape, torch_dtype, seed, shards, folder)
    return folder


def _write_config(shape: LlamaShape, dtype: str, folder: Path) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": dtype,
        **dataclasses.asdict(shape),
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": 0,
        "eos_token_id": [1, 3],
    }
    _dump(folder / "config.json", config)
    _dump(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": [1, 3], "do_sample": False})


def _write_tokenizer(shape: LlamaShape, seed: int, folder: Path) -> None:
    """Trains a byte-level BPE with exactly `vocab_size` entries. It decodes any encoded text unchanged."""
    smallest = 256 + len(SPECIAL_TOKENS)
    if shape.vocab_size < smallest:
        raise ValueError(f"vocab_size {shape.vocab_size} is below {smallest}: 256 bytes and the special tokens")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=shape.vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_text(seed, words=shape.vocab_size), trainer)
    if tokenizer.get_vocab_size() != shape.vocab_size:
        raise ValueError(f"the text gives only {tokenizer.get_vocab_size()} of {shape.vocab_size} vocabulary entries")
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "model_max_length": shape.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    _dump(folder / "tokenizer_config.json", settings)


def _text(seed: int, words: int) -> Iterator[str]:
    """Yields lines of `words` distinct invented words, each a few times: enough repeated pairs for as many merges."""
    draw = random.Random(seed)
    onsets, vowels, codas = [*"bcdfghjklmnprstvwz", "st", "tr"], "aeiou", ["", "", "n", "r", "s", "l"]
    lexicon: dict[str, None] = {}
    while len(lexicon) < words:
        syllables = draw.randint(2, 4)
        word = "".join(draw.choice(onsets) + draw.choice(vowels) + draw.choice(codas) for _ in range(syllables))
        lexicon[word] = None
    for copies in (1, 2):
        distinct = list(lexicon)
        draw.shuffle(distinct)
        for start in range(0, words, 12):
            yield " " + " ".join(distinct[start : start + 12] * copies)


def _tensors(shape: LlamaShape, dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    """Makes all tensors by checkpoint name, in the order of the layers."""
    generator = torch.Generator().manual_seed(seed)
    hidden, mlp, vocab = shape.hidden_size, shape.intermediate_size, shape.vocab_size
    kv_size = shape.num_key_value_heads * shape.head_dim

    def normal(rows: int, columns: int, std: float) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * std).to(dtype)

    def linear(outputs: int, inputs: int) -> torch.Tensor:
        return normal(outputs, inputs, inputs**-0.5)

    tensors = {"model.embed_tokens.weight": normal(vocab, hidden, EMBEDDING_STD)}
    for layer in range(shape.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        tensors[prefix + "input_layernorm.weight"] = torch.ones(hidden, dtype=dtype)
        tensors[prefix + "self_attn.q_proj.weight"] = linear(hidden, hidden)
        tensors[prefix + "self_attn.k_proj.weight"] = linear(kv_size, hidden)
        tensors[prefix + "self_attn.v_proj.weight"] = linear(kv_size, hidden)
        tensors[prefix + "self_attn.o_proj.weight"] = linear(hidden, hidden)
        tensors[prefix + "post_attention_layernorm.weight"] = torch.ones(hidden, dtype=dtype)
        tensors[prefix + "mlp.gate_proj.weight"] = linear(mlp, hidden)
        tensors[prefix + "mlp.up_proj.weight"] = linear(mlp, hidden)
        tensors[prefix + "mlp.down_proj.weight"] = linear(hidden, mlp)
    tensors["model.norm.weight"] = torch.ones(hidden, dtype=dtype)
    if not shape.tie_word_embeddings:
        tensors["lm_head.weight"] = linear(vocab, hidden)
    return tensors


def _write_weights(shape: LlamaShape, dtype: torch.dtype, seed: int, shards: int, folder: Path) -> None:
    tensors = _tensors(shape, dtype, seed)
    if not 1 <= shards <= len(tensors):
        raise ValueError(f"{shards} shards: there are {len(tensors)} tensors, so 1 to {len(tensors)}")
    for stale in folder.glob("model*.safetensors*"):
        stale.unlink()
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    total_bytes = sum(tensor.nbytes for tensor in tensors.values())
    files: list[dict[str, torch.Tensor]] = [{} for _ in range(shards)]
    written_bytes, shard = 0, 0
    for index, (name, tensor) in enumerate(tensors.items()):
        # The next file begins at its share of the bytes, or earlier so that each remaining file gets a tensor.
        share_reached = written_bytes * shards >= total_bytes * (shard + 1)
        if files[shard] and shard + 1 < shards and (share_reached or len(tensors) - index < shards - shard):
            shard += 1
        files[shard][name] = tensor
        written_bytes += tensor.nbytes
    weight_map: dict[str, str] = {}
    for number, part in enumerate(files, start=1):
        file = f"model-{number:05d}-of-{shards:05d}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    index_file = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    _dump(folder / "model.safetensors.index.json", index_file)


def _dump(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Write a Llama checkpoint of seeded random weights.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--preset", choices=list(PRESETS), default="100m")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--shards", type=int, default=1, help="number of safetensors files")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        make_checkpoint(
            arguments.out, arguments.preset, seed=arguments.seed, dtype=arguments.dtype, shards=arguments.shards
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    written_bytes = sum(file.stat().st_size for file in arguments.out.glob("*.safetensors"))
    print(f"{arguments.out}: {arguments.preset}, {arguments.dtype}, {written_bytes / 1e6:.0f} MB of weights")
    return 0


if __name__ == "__main__":
    sys.exit(main())
