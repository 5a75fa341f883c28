"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from stagemesh.gateway.api.build import build, render_chat, served
from stagemesh.gateway.api.request import TokenLogprob

from .call import Api, Call
from .errors import from_validation
from .logprobs import chat_logprobs
from .protocol import ChatCompletionRequest
from .run import Choice


class ChatCall(Call):
    """One chat call."""

    object_whole = "chat.completion"
    object_chunk = "chat.completion.chunk"
    id_prefix = "chatcmpl-"

    @classmethod
    async def parse(cls, api: Api, data: bytes) -> ChatCall:
        """Parses a body. Raises InvalidRequest, NotFound, Unavailable."""
        try:
            body = ChatCompletionRequest.model_validate_json(data)
        except ValidationError as e:
            raise from_validation(e) from None
        model, tokenizer = served(api.engine, body.model)
        body.check_supported()
        prompt = await render_chat(
            tokenizer,
            model,
            body.turns(),
            add_generation_prompt=body.add_generation_prompt is not False,
            add_special_tokens=bool(body.add_special_tokens),
            extra=body.chat_template_kwargs,
        )
        call = cls(body, model, tokenizer)
        call.requests = [
            build(
                call.id,
                prompt,
                body.to_params(),
                model,
                tokenizer,
                request_timeout_s=api.settings.request_timeout,
                fill_context=True,
            )
        ]
        return call

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The whole answer."""
        told = super().whole(choices)
        if self.body.return_token_ids:
            told["prompt_token_ids"] = list(self.requests[0].prompt)
        return told

    def content(self, index: int, text: str) -> dict[str, Any]:
        """The message."""
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def opening(self, index: int) -> dict[str, Any]:
        """The chunk with the role."""
        made = self._choice(index, {"role": "assistant", "content": ""})
        if self.body.return_token_ids:
            made["prompt_token_ids"] = list(self.requests[0].prompt)
        return made

    def piece(self, index: int, text: str) -> dict[str, Any]:
        """The new content, if there is any."""
        return self._choice(index, {"content": text} if text else {})

    def logprobs(self, index: int, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        """The object in a chat's format."""
        return chat_logprobs(self.tokenizer, entries)

    @staticmethod
    def _choice(index: int, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
