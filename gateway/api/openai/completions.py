"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from stagemesh.errors import InvalidRequest
from stagemesh.gateway.api.build import build, encode, served
from stagemesh.gateway.api.request import ModelCard, TokenLogprob
from stagemesh.gateway.text.tokenizer import Tokenizer

from .call import Api, Call
from .errors import from_validation
from .logprobs import CompletionLogprobs
from .protocol import CompletionRequest, prompts_of

MAX_PROMPTS = 1024


class CompletionCall(Call):
    """One completion call with one or several prompts."""

    object_whole = object_chunk = "text_completion"
    id_prefix = "cmpl-"

    def __init__(self, body: CompletionRequest, model: ModelCard, tokenizer: Tokenizer) -> None:
        super().__init__(body, model, tokenizer)
        self.echoed: list[str] = []
        """The text of each prompt, with `echo`; else empty."""
        self._logprobs: dict[int, CompletionLogprobs] = {}

    @classmethod
    async def parse(cls, api: Api, data: bytes) -> CompletionCall:
        """Parses a body. Raises InvalidRequest, NotFound, Unavailable."""
        try:
            body = CompletionRequest.model_validate_json(data)
        except ValidationError as e:
            raise from_validation(e) from None
        model, tokenizer = served(api.engine, body.model)
        body.check_supported()
        prompts = prompts_of(body.prompt)
        if len(prompts) > MAX_PROMPTS:
            raise InvalidRequest(f"prompt may hold at most {MAX_PROMPTS} prompts, not {len(prompts)}", param="prompt")
        call = cls(body, model, tokenizer)
        params = body.to_params()
        requests = []
        for name, prompt in zip(call.request_ids(len(prompts)), prompts, strict=True):
            if isinstance(prompt, str) and prompt:
                add = body.add_special_tokens is not False
                ids: Sequence[int] = await encode(tokenizer, model, prompt, add_special_tokens=add)
            else:
                ids = [] if isinstance(prompt, str) else prompt
            requests.append(
                build(
                    name,
                    ids,
                    params,
                    model,
                    tokenizer,
                    request_timeout_s=api.settings.request_timeout,
                    fill_context=False,
                )
            )
            if body.echo:
                call.echoed.append(prompt if isinstance(prompt, str) else tokenizer.decode(prompt))
        call.requests = requests
        return call

    def content(self, index: int, text: str) -> dict[str, Any]:
        """The text behind the echoed prompt, and the prompt's ids."""
        return {"text": self._echo(index) + text, **self._prompt_ids(index)}

    def opening(self, index: int) -> dict[str, Any] | None:
        """The chunk with the echoed prompt or its ids, if either is wanted."""
        if not self.echoed and not self.body.return_token_ids:
            return None
        no_tokens: dict[str, Any] = {"token_ids": []} if self.body.return_token_ids else {}
        return {**self.piece(index, self._echo(index)), **no_tokens, **self._prompt_ids(index)}

    def piece(self, index: int, text: str) -> dict[str, Any]:
        """The new text."""
        return {"index": index, "text": text, "logprobs": None, "finish_reason": None, "stop_reason": None}

    def logprobs(self, index: int, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        """The object in a completion's format, whose offsets continue."""
        if index not in self._logprobs:
            self._logprobs[index] = CompletionLogprobs(self.tokenizer, self.requests[0].skip_special_tokens)
        return self._logprobs[index].piece(entries)

    def _echo(self, index: int) -> str:
        return self.echoed[index // self.requests[0].n] if self.echoed else ""

    def _prompt_ids(self, index: int) -> dict[str, Any]:
        if not self.body.return_token_ids:
            return {}
        return {"prompt_token_ids": list(self.requests[index // self.requests[0].n].prompt)}
