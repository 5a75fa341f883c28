"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stagemesh.errors import InvalidRequest
from stagemesh.gateway.api.build import encode
from stagemesh.gateway.api.request import ServedModel, TokenLogprob

from .call import Call
from .logprobs import CompletionLogprobs
from .protocol import CompletionRequest, prompts_of

MAX_PROMPTS = 1024


class CompletionCall(Call[CompletionRequest]):
    """One completion call with one or several prompts."""

    body_type = CompletionRequest
    object_whole = object_chunk = "text_completion"
    id_prefix = "cmpl-"
    fill_context = False

    def __init__(self, body: CompletionRequest, model: ServedModel) -> None:
        super().__init__(body, model)
        self._given: list[str | list[int]] = []
        self._logprobs: dict[int, CompletionLogprobs] = {}

    async def prompts(self) -> list[Sequence[int]]:
        """Token ids of each prompt."""
        self._given = given = prompts_of(self.body.prompt)
        if len(given) > MAX_PROMPTS:
            raise InvalidRequest(f"prompt may hold at most {MAX_PROMPTS} prompts, not {len(given)}", param="prompt")
        add = self.body.add_special_tokens is not False
        return [
            await encode(self.model, prompt, add_special_tokens=add) if isinstance(prompt, str) else prompt
            for prompt in given
        ]

    def content(self, index: int, text: str) -> dict[str, Any]:
        """The text after the echoed prompt, and the prompt's ids."""
        return {"text": self._echo(index) + text, **self.prompt_ids(index)}

    def opening(self, index: int) -> dict[str, Any] | None:
        """The chunk with the echoed prompt or its ids, if either is wanted."""
        if not self.body.echo and not self.body.return_token_ids:
            return None
        no_tokens: dict[str, Any] = {"token_ids": []} if self.body.return_token_ids else {}
        return {**self.piece(index, self._echo(index)), **no_tokens, **self.prompt_ids(index)}

    def piece(self, index: int, text: str) -> dict[str, Any]:
        """The new text."""
        return {"index": index, "text": text, "logprobs": None, "finish_reason": None, "stop_reason": None}

    def logprobs(self, index: int, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        """The object in a completion's format. Its offsets continue from piece to piece."""
        if index not in self._logprobs:
            skip = self.requests[0].skip_special_tokens
            self._logprobs[index] = CompletionLogprobs(self.model.tokenizer, skip)
        return self._logprobs[index].piece(entries)

    def _echo(self, index: int) -> str:
        """The text of a choice's prompt, if it is wanted."""
        if not self.body.echo:
            return ""
        prompt = self._given[index // self.requests[0].n]
        return prompt if isinstance(prompt, str) else self.model.tokenizer.decode(prompt)
