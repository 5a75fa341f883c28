"""Measures what `--quantization` costs the shipped model: perplexity, and how often another token is likeliest.

    python -m benchmarks.quantization [--tokens 20000] [--seed 1]

The text comes from the program that made the training text (`tools/demo_model`), with another seed. Only the tokens of
answers count, as in training. Each method runs over the same conversations in this process, as a stage of all layers.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from benchmarks.common.results import RESULTS, machine_line, origin, save
from stagemesh.checkpoint import inspect
from stagemesh.settings.model import DEMO_MODEL
from stagemesh.stage_worker.kv.pool import KvPool
from stagemesh.stage_worker.model.batch import StepBatch
from stagemesh.stage_worker.model.choose import load_shard
from stagemesh.stage_worker.model.parallel import TensorParallel
from stagemesh.stage_worker.model.spec import ShardSpec
from tools.demo_model.chat import document

METHODS = ("", "int8", "fp8", "int4")
PAGE = 16


@dataclass
class Drift:
    """Sums over all tokens of answers."""

    tokens: int = 0
    loss: float = 0.0
    divergence: float = 0.0
    """Kullback-Leibler divergence from the weights as they are, in nats."""
    same: int = 0
    """Number of tokens after which the same one is likeliest."""

    @property
    def perplexity(self) -> float:
        """Perplexity on the text."""
        return math.exp(self.loss / self.tokens)


@dataclass(frozen=True)
class Conversation:
    """Token ids, and the positions of those that belong to answers."""

    ids: list[int]
    answers: list[int]


def conversations(tokens: int, seed: int) -> Iterator[Conversation]:
    """Yields conversations, until there are so many tokens of answers."""
    tokenizer = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
    begin, end = tokenizer.token_to_id("<|assistant|>"), tokenizer.token_to_id("<|end|>")
    rng, made = random.Random(seed), 0
    while made < tokens:
        ids: list[int] = tokenizer.encode(document(rng), add_special_tokens=False).ids[:512]
        answers, inside = [], False
        for position, token in enumerate(ids):
            if inside:
                answers.append(position)
            inside = token == begin or (inside and token != end)
        made += len(answers)
        if answers:
            yield Conversation(ids, answers)


def log_probabilities(texts: list[Conversation], method: str) -> Iterator[torch.Tensor]:
    """Yields log-probabilities [A, V] of the A tokens of each conversation's answers."""
    layers = inspect(DEMO_MODEL).num_layers
    spec = ShardSpec(str(DEMO_MODEL), 0, layers, page_size=PAGE, quantization=method)  # type: ignore[arg-type]
    shard = load_shard(spec, TensorParallel())
    pages = -(-max(len(text.ids) for text in texts) // PAGE)
    shard.bind_kv(KvPool(shard.kv_layers, pages, PAGE, shard.dtype, shard.device))
    for text in texts:
        table, before = list(range(pages)), torch.tensor(text.answers) - 1
        batch = StepBatch([0], [len(text.ids)], [table], PAGE, torch.tensor(text.ids), logit_rows=before)
        yield shard.forward(batch).log_softmax(-1)


def compare(texts: list[Conversation], method: str, as_stored: list[torch.Tensor]) -> Drift:
    """Runs conversations through a method. `as_stored`: their log-probabilities without quantization."""
    drift = Drift()
    for text, found, stored in zip(texts, log_probabilities(texts, method), as_stored, strict=True):
        following = torch.tensor(text.ids)[text.answers]
        drift.tokens += len(following)
        drift.loss -= float(found.gather(1, following[:, None]).double().sum())
        drift.divergence += float((stored.exp() * (stored - found)).double().sum())
        drift.same += int((stored.argmax(1) == found.argmax(1)).sum())
    return drift


def main() -> None:
    """Measures all methods, and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    texts = list(conversations(args.tokens, args.seed))
    as_stored = list(log_probabilities(texts, ""))
    found = {method or "as stored (bf16)": compare(texts, method, as_stored) for method in METHODS}
    base = next(iter(found.values()))
    whole = origin(f"quantization --tokens {args.tokens} --seed {args.seed}")
    lines = [
        "# What quantization costs the shipped model",
        "",
        f"- Written by `{whole['command']}` on {whole['date']}.",
        machine_line(whole["machine"]),
        "",
        f"{base.tokens:,} tokens of answers in {len(texts):,} new conversations of the kind that the model was trained "
        "on. Activations are in bf16. The model has 1.8 M parameters, in rows of 128 to 416.",
        "",
        "| `--quantization` | perplexity | against bf16 | KL divergence, nats a token | same likeliest token |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {method} | {drift.perplexity:.4f} | {100 * (drift.perplexity / base.perplexity - 1):+.2f} % "
        f"| {drift.divergence / drift.tokens:.5f} | {100 * drift.same / drift.tokens:.2f} % |"
        for method, drift in found.items()
    ]
    rows = {
        method: {
            "perplexity": drift.perplexity,
            "divergence": drift.divergence / drift.tokens,
            "same": drift.same / drift.tokens,
        }
        for method, drift in found.items()
    }
    save(
        RESULTS / "quantization", {**whole, "tokens": base.tokens, "conversations": len(texts), "methods": rows}, lines
    )


if __name__ == "__main__":
    main()
