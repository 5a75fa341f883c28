"""Sampling on the last stage: penalties, truncation, and noise that depends on (seed, choice, position) alone.

So a sequence draws the same tokens alone, in a batch, over any number of stages, and after it was preempted or moved.
One uniform number per token (splitmix64 of the three counters) selects from the cumulative distribution in id order.

Shapes: R rows that sample (or lines of logits, if drafts are verified), V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from stagemesh.protos.v1 import stage_pb2, types_pb2


@dataclass
class SequenceSampler:
    """Sampling parameters of one sequence, and the history that penalties need."""

    params: types_pb2.SamplingParams
    choice: int
    prompt_len: int
    output_len: int
    """Number of output tokens so far."""
    counts: Tensor | None = None
    """[V] int32: how often each id is in the output; kept only if a penalty needs it."""
    seen: Tensor | None = None
    """[V] bool: whether each id is in prompt or output; kept only if the repetition penalty needs it."""

    @staticmethod
    def open(message: stage_pb2.OpenSequence, vocab_size: int, device: torch.device) -> SequenceSampler:
        """Makes the state of a sequence that starts, or continues after `message.log`."""
        p = message.sampling
        state = SequenceSampler(p, message.choice, message.prompt_len, len(message.log))
        output = torch.tensor(list(message.log), dtype=torch.int64)
        if p.presence_penalty or p.frequency_penalty:
            state.counts = torch.bincount(output, minlength=vocab_size).to(torch.int32).to(device)
        if p.repetition_penalty not in (0.0, 1.0):
            seen = torch.zeros(vocab_size, dtype=torch.bool)
            seen[torch.tensor(list(message.prompt), dtype=torch.int64)] = True
            seen[output] = True
            state.seen = seen.to(device)
        return state

    @property
    def shapes_logits(self) -> bool:
        """Whether the logits are changed before a token is drawn."""
        p = self.params
        return (
            self.counts is not None
            or self.seen is not None
            or len(p.bias_ids) > 0
            or (self.output_len < p.min_tokens and len(p.suppressed_ids) > 0)
        )

    @property
    def remembers(self) -> bool:
        """Whether a drawn token changes how the next one is drawn."""
        p = self.params
        counting = self.output_len < p.min_tokens and len(p.suppressed_ids) > 0
        return self.counts is not None or self.seen is not None or counting

    def shape_logits(self, logits: Tensor) -> None:
        """Applies bias, suppression and penalties to this sequence's logits [V], in place and in vLLM's order."""
        p = self.params
        if p.bias_ids:
            ids = torch.tensor(list(p.bias_ids), device=logits.device)
            logits[ids] += torch.tensor(list(p.bias_values), device=logits.device)
        if self.output_len < p.min_tokens and p.suppressed_ids:
            # A gateway of another release may name ids that the vocabulary does not have.
            drawable = [token for token in p.suppressed_ids if token < len(logits)]
            logits[torch.tensor(drawable, dtype=torch.int64, device=logits.device)] = -torch.inf
        if self.seen is not None:
            penalized = torch.where(logits > 0, logits / p.repetition_penalty, logits * p.repetition_penalty)
            logits.copy_(torch.where(self.seen, penalized, logits))
        if self.counts is not None:
            logits -= self.counts * p.frequency_penalty + (self.counts > 0) * p.presence_penalty

    def advance(self, token: int) -> None:
        """Records a drawn token."""
        self.output_len += 1
        if self.counts is not None:
            self.counts[token] += 1
        if self.seen is not None:
            self.seen[token] = True


@dataclass
class Sampled:
    """Result of one call of `sample`, packed like `StepResult`."""

    tokens: list[int]
    """Drawn tokens, row after row: `counts[i]` of row i."""
    failed: list[bool]
    """Whether each row's logits held NaN or plus infinity. The last token of such a row means nothing."""
    counts: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    """Log-probability of each token; empty if no row wants any."""
    top_counts: list[int] = field(default_factory=list)
    top_ids: list[int] = field(default_factory=list)
    top_logprobs: list[float] = field(default_factory=list)


def sample(
    logits: Tensor,
    states: list[SequenceSampler],
    positions: list[int],
    drafts: Sequence[Sequence[int]] | None = None,
) -> Sampled:
    """Draws the next tokens of R rows. `positions` are the positions of each row's first new token in its sequence.

    `logits` is [R, V] fp32, one line per row. With `drafts` (guesses of each row's new tokens), it has 1 + len(draft)
    lines per row, computed as if the guesses were right. Tokens are drawn as long as the guesses hold, and one more
    after the last right guess. The tokens are the same as without drafts: the noise depends on the position alone.
    """
    if not states:
        return Sampled([], [])
    drafts = drafts or [()] * len(states)
    ends = list(accumulate(1 + len(draft) for draft in drafts))
    first = [end - 1 - len(draft) for end, draft in zip(ends, drafts, strict=True)]
    tokens: list[list[int]] = [[] for _ in states]
    failed = [False] * len(states)
    # All lines of a row are drawn at once. If a drawn token changes how the next one is drawn, they come one by one.
    by_one = [state.remembers for state in states]
    wanted = [(row, at) for row in range(len(states)) for at in range(1 if by_one[row] else 1 + len(drafts[row]))]
    while wanted:
        lines = [first[row] + at for row, at in wanted]
        raw = logits if len(lines) == len(logits) else logits[torch.tensor(lines, device=logits.device)]
        chosen = _choose(raw, [states[row] for row, _ in wanted], [positions[row] + at for row, at in wanted])
        following = []
        for (row, at), (token, usable) in zip(wanted, chosen, strict=True):
            draft, drawn = drafts[row], tokens[row]
            if failed[row] or at != len(drawn) or (drawn and drawn[-1] != draft[at - 1]):
                continue  # This line is after a wrong guess.
            drawn.append(token)
            failed[row] = not usable
            if usable:
                states[row].advance(token)
                if by_one[row] and at < len(draft) and draft[at] == token:
                    following.append((row, at + 1))
        wanted = following
    out = Sampled([token for row in tokens for token in row], failed, [len(row) for row in tokens])
    if any(state.params.logprobs for state in states):
        lines = [first[row] + at for row, drawn in enumerate(tokens) for at in range(len(drawn))]
        _report_logprobs(
            logits, lines, [s for s, count in zip(states, out.counts, strict=True) for _ in range(count)], out
        )
    return out


def _choose(logits: Tensor, states: list[SequenceSampler], positions: list[int]) -> list[tuple[int, bool]]:
    """Returns (token, whether the logits could be used) for each of R lines [V]."""
    tokens, usable = likeliest(logits)
    if any(state.shapes_logits for state in states):
        logits = logits.clone()
        for row, state in enumerate(states):
            if state.shapes_logits:
                state.shape_logits(logits[row])
        tokens, _ = likeliest(logits)
    drawn = [r for r, state in enumerate(states) if state.params.temperature > 0 and usable[r]]
    if drawn:
        rows = torch.tensor(drawn, device=logits.device)
        uniform = uniforms(
            [states[r].params.seed for r in drawn], [states[r].choice for r in drawn], [positions[r] for r in drawn]
        )
        tokens[rows] = _draw(logits[rows], [states[r].params for r in drawn], uniform)
    return list(zip(tokens.tolist(), usable, strict=True))


def likeliest(logits: Tensor) -> tuple[Tensor, list[bool]]:
    """Returns the first likeliest id of each of R lines [V], and whether there is one.

    -inf is a masked id. A line with NaN, with +inf or with -inf alone cannot be sampled: that value is its maximum.
    """
    if logits.device.type != "cpu" or logits.dtype != torch.float32:
        best, tokens = logits.max(dim=-1)
        return tokens, best.isfinite().tolist()
    # numpy's argmax uses vector instructions and torch's does not: it takes a tenth of the time.
    lines = logits.numpy()
    places = lines.argmax(axis=-1)
    return torch.from_numpy(places), np.isfinite(lines[np.arange(len(lines)), places]).tolist()


def uniforms(seeds: list[int], choices: list[int], positions: list[int]) -> Tensor:
    """Returns [R] float64 in [0, 1): splitmix64 (Steele, Lea, Flood 2014) over the three counters, one round each."""
    state = np.array(seeds, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for counter in (np.array(choices, dtype=np.uint64), np.array(positions, dtype=np.uint64)):
            state = _splitmix64(state) ^ counter
        mixed = _splitmix64(state)
    return torch.from_numpy((mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def _splitmix64(state: np.ndarray) -> np.ndarray:
    z = state + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _draw(logits: Tensor, params: list[types_pb2.SamplingParams], uniform: Tensor) -> Tensor:
    """Draws from logits [R, V] by inverse transform in id order, after temperature, top-k, top-p and min-p."""
    device = logits.device
    temperature = torch.tensor([p.temperature for p in params], dtype=torch.float64, device=device)
    # Logits are scaled relative to the row's maximum, in double: a temperature near 0 must not overflow into NaN.
    scaled = (logits.double() - logits.amax(dim=-1, keepdim=True).double()) / temperature[:, None]
    probs = torch.softmax(scaled, dim=-1)
    vocab = logits.shape[-1]
    top_k = torch.tensor([p.top_k or vocab for p in params], device=device)
    top_p = torch.tensor([p.top_p or 1.0 for p in params], dtype=torch.float64, device=device)
    if bool((top_k < vocab).any()) or bool((top_p < 1).any()):
        ordered, ids = probs.sort(dim=-1, descending=True, stable=True)
        ranks = torch.arange(vocab, device=device)[None]
        keep = ranks < top_k[:, None]
        # top-p applies to the ids that top-k left, as in vLLM and transformers. The likeliest token always stays.
        kept = ordered * keep
        before = kept.cumsum(dim=-1) - kept
        keep &= before < top_p[:, None] * kept.sum(dim=-1, keepdim=True)
        keep |= ranks == 0
        probs = probs * torch.zeros_like(keep).scatter(1, ids, keep)
    min_p = torch.tensor([p.min_p for p in params], dtype=torch.float64, device=device)
    if bool((min_p > 0).any()):
        probs = probs * (probs >= min_p[:, None] * probs.amax(dim=-1, keepdim=True))
    cumulative = probs.cumsum(dim=-1)
    target = uniform.to(device)[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    # A target that rounds up to the total would be past the last token with any mass. Take that token.
    last = vocab - 1 - (probs.flip(-1) > 0).int().argmax(dim=-1)
    return torch.minimum(tokens, last)


def _report_logprobs(raw: Tensor, lines: list[int], states: list[SequenceSampler], out: Sampled) -> None:
    """Adds the model's log-probabilities before penalties and temperature, as vLLM reports them."""
    for line, state, token in zip(lines, states, out.tokens, strict=True):
        if not state.params.logprobs:
            out.logprobs.append(0.0)
            out.top_counts.append(0)
            continue
        logprobs = torch.log_softmax(raw[line].float(), dim=-1)
        out.logprobs.append(float(logprobs[token]))
        values, ids = logprobs.topk(min(state.params.top_logprobs, logprobs.shape[-1]))
        out.top_counts.append(len(ids))
        out.top_ids.extend(ids.tolist())
        out.top_logprobs.extend(values.tolist())
