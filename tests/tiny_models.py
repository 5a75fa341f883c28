"""Tiny seeded checkpoints of real architectures, and what transformers itself makes of them.

Each has a byte-level tokenizer (256 bytes and four special tokens) and a chat template, so a server can serve it.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from stagemesh.stage_worker.model.checkpoint import Checkpoint
from stagemesh.stage_worker.model.quantized.weights import Weights
from stagemesh.stage_worker.native import ops
from stagemesh.stage_worker.native.description.cache import NotDescribed, describe
from stagemesh.stage_worker.native.description.process import answer

BOS, EOS, PAD, END_OF_TURN = 256, 257, 258, 259
VOCAB_SIZE = 260
SPECIAL = {BOS: "<bos>", EOS: "<eos>", PAD: "<pad>", END_OF_TURN: "<end_of_turn>"}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<end_of_turn>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen2": ("Qwen2", {}),
    "mistral_sw": ("Mistral", {"sliding_window": 40, "head_dim": 16}),
    "gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": 40, "query_pre_attn_scalar": 16}),
    "gpt_neox": ("GPTNeoX", {"rotary_pct": 0.5}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "phi3": ("Phi3", {}),
    "olmo2": ("Olmo2", {}),
    "deepseek_v3": (
        "DeepseekV3",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 24,
            "kv_lora_rank": 32,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 24,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 2,
        },
    ),
    "gpt_oss": ("GptOss", {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 40}),
}
"""family -> (prefix of transformers' class names, settings beside the common ones)"""


def make_checkpoint(family: str, out_dir: str | Path, seed: int = 0, **config_overrides: Any) -> Path:
    """Write a seeded fp32 checkpoint with tokenizer to `out_dir` and return that."""
    name, settings = FAMILIES[family]
    config_class = getattr(transformers, f"{name}Config")
    config = config_class(**{**_COMMON, **settings, **config_overrides})
    return save_checkpoint(getattr(transformers, f"{name}ForCausalLM"), config, out_dir, seed)


def save_checkpoint(model_class: Any, config: Any, out_dir: str | Path, seed: int = 0) -> Path:
    """Write a seeded model of this class and config, with tokenizer, to `out_dir`."""
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    config.dtype = torch.float32
    torch.manual_seed(seed)
    model = model_class(config)
    roughen(model)
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(out)
    _write_tokenizer(out)
    generation = {"bos_token_id": BOS, "eos_token_id": [EOS, END_OF_TURN], "pad_token_id": PAD}
    (out / "generation_config.json").write_text(json.dumps(generation))
    if ops.library() is not None:
        with contextlib.suppress(NotDescribed):
            # A rank finds it in the cache. It would start a process that imports transformers.
            describe(out, Weights(Checkpoint(out)).names, answer)
    return out


def roughen(model: PreTrainedModel, scale: float = 1.0) -> None:
    """Weights large enough that tokens depend on all of the context, norms and biases that are not their defaults.

    The embedding is small beside what the layers add, or a tied head would only repeat the last token.
    """
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            if parameter.ndim > 1:
                strength = 0.3 if parameter is embedding else 1.5
                parameter.copy_(noise * strength * scale * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(noise * 0.1)
        learned = {parameter.data_ptr() for parameter in model.parameters()}
        for stored in model.state_dict().values():
            if stored.data_ptr() not in learned and stored.is_floating_point():
                stored.add_(torch.randn_like(stored) * 0.1)


def _write_tokenizer(out: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([SPECIAL[index] for index in sorted(SPECIAL)])
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[BOS],
        "eos_token": SPECIAL[EOS],
        "pad_token": SPECIAL[PAD],
        "chat_template": CHAT_TEMPLATE,
        "model_max_length": 1024,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings))


@lru_cache(maxsize=4)
def whole_model(model_dir: str) -> PreTrainedModel:
    """The unsplit model under transformers, fp32, plain attention."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


@dataclass(frozen=True)
class ClearPrompt:
    """A prompt, the whole model's greedy tokens, and the smallest gap between first and second logit on the way."""

    prompt_ids: list[int]
    tokens: list[int]
    margin: float


def greedy(model: PreTrainedModel, prompt_ids: Sequence[int], max_tokens: int) -> ClearPrompt:
    """transformers' own `generate`, EOS off."""
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_tokens,
        eos_token_id=None,
        pad_token_id=PAD,
        output_logits=True,
        return_dict_in_generate=True,
    )
    model.generation_config = settings
    prompt = torch.tensor([list(prompt_ids)])
    with torch.inference_mode():
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
    tops = torch.stack([logits[0].float().topk(2).values for logits in out.logits])
    margin = float((tops[:, 0] - tops[:, 1]).min())
    return ClearPrompt(list(prompt_ids), out.sequences[0, len(prompt_ids) :].tolist(), margin)


def reference_greedy(model_dir: str | Path, prompt_ids: Sequence[int], max_tokens: int) -> list[int]:
    """The greedy tokens of the unsplit model."""
    return greedy(whole_model(str(model_dir)), prompt_ids, max_tokens).tokens


def clear_prompts(
    model_dir: str | Path, lengths: Sequence[int], max_tokens: int, *, seed: int = 0, min_margin: float = 0.003
) -> list[ClearPrompt]:
    """One random prompt of each length whose greedy path never comes near a tie, so rounding cannot change a token."""
    model = whole_model(str(model_dir))
    generator = torch.Generator().manual_seed(seed)
    found = []
    for length in lengths:
        for _ in range(50):
            prompt = torch.randint(0, 256, (length,), generator=generator).tolist()
            candidate = greedy(model, prompt, max_tokens)
            if candidate.margin >= min_margin:
                break
        else:
            raise AssertionError(f"no prompt of {length} tokens with a margin of {min_margin} in 50 tries, seed {seed}")
        found.append(candidate)
    return found


def split_weights(folder: Path, file_of: Callable[[str], str]) -> Path:
    """Distributes the tensors of a checkpoint's single file over files that an index names. Returns the folder."""
    single = folder / "model.safetensors"
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(single).items():
        files.setdefault(file_of(name), {})[name] = tensor
    single.unlink()
    for file, tensors in files.items():
        save_file(tensors, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, tensors in files.items() for name in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def by_layer(name: str) -> str:
    """A file for each decoder layer, for `split_weights`; one for the embedding, one for norm and head."""
    layer = re.search(r"\.layers\.(\d+)\.", name)
    part = f"layer-{layer[1]}" if layer else "embedding" if "embed" in name and "out" not in name else "head"
    return f"{part}.safetensors"
