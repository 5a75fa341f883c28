"""Log-probabilities in OpenAI's two formats."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from stagemesh.gateway.api.request import TokenLogprob
from stagemesh.gateway.text.tokenizer import Tokenizer

FLOOR = -9999.0
"""Stands for minus infinity, which JSON does not have. The number is vLLM's."""


class CompletionLogprobs:
    """Makes the `logprobs` objects of one completion choice, piece by piece. Offsets continue over the pieces."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def piece(self, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        """The object for the next `entries`."""
        name = self._tokenizer.token_text
        tokens, values, tops, offsets = [], [], [], []
        for entry in entries:
            text = name(entry.token)
            top: dict[str, float] = {}
            for token, logprob in entry.top:
                top.setdefault(name(token), _finite(logprob))
            top.setdefault(text, _finite(entry.logprob))
            tokens.append(text)
            values.append(_finite(entry.logprob))
            tops.append(top)
            offsets.append(self._offset)
            if entry.token not in self._skipped:
                self._offset += len(self._decoder.decode(self._tokenizer.token_bytes(entry.token)))
        return {"text_offset": offsets, "token_logprobs": values, "tokens": tokens, "top_logprobs": tops}


def chat_logprobs(tokenizer: Tokenizer, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
    """The `logprobs` object of a chat choice."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": tokenizer.token_text(token),
            "logprob": _finite(logprob),
            "bytes": list(tokenizer.token_bytes(token)),
        }

    content = [
        {**one(entry.token, entry.logprob), "top_logprobs": [one(token, value) for token, value in entry.top]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def _finite(logprob: float) -> float:
    # NaN fails this comparison, too.
    return logprob if logprob > FLOOR else FLOOR
