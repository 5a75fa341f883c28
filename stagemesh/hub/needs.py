"""Which files of a repository a process needs. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from stagemesh.checkpoint import EMBEDDING, FOREIGN, INDEX, LAYER

TEXT = (
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""What the gateway reads beside the description: tokenizer and chat template."""
HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output)\.")
FINAL_NORM = re.compile(r"(^|\.)(norm|norm_f|ln_f|final_norm|final_layer_?norm)\.")
FIRST_NORM = re.compile(r"(^|\.)(embed(ding)?s?_(layer_?)?norm|word_embeddings_layernorm)\.")


def description(names: Collection[str]) -> list[str]:
    """Returns the files that describe a model: its configurations, and the index of its weights."""
    return sorted(name for name in names if "/" not in name and (name.endswith("config.json") or name == INDEX))


def text(names: Collection[str]) -> list[str]:
    """Returns the files of tokenizer and chat template."""
    return sorted(set(TEXT) & set(names))


def of_layers(tensors: Mapping[str, str], layers: tuple[int, int], num_layers: int) -> list[str]:
    """Returns the files that hold the tensors of a stage with the layers [first, last).

    The first stage has the embedding, too, and the last one the final norm and the output head, which is the embedding
    if none is stored. A tensor beside the layers whose use is not known is for both.
    """
    first, last = layers
    is_first, is_last = first == 0, last >= num_layers
    tied = not any(HEAD.search(name) for name in tensors)

    def needed(name: str) -> bool:
        if FOREIGN.search(name):
            return False
        if layer := LAYER.search(name):
            return first <= int(layer[1]) < last
        if EMBEDDING.search(name) or FIRST_NORM.search(name):
            return is_first or (is_last and tied)
        if HEAD.search(name) or FINAL_NORM.search(name):
            return is_last
        return is_first or is_last

    return sorted({file for name, file in tensors.items() if needed(name)})
