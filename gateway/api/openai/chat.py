"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stagemesh.gateway.api.build import render_chat
from stagemesh.gateway.api.request import Delta, TokenLogprob

from .call import Call
from .logprobs import chat_logprobs
from .protocol import ChatCompletionRequest, turns


class ChatCall(Call[ChatCompletionRequest]):
    """One chat call."""

    body_type = ChatCompletionRequest
    object_whole = "chat.completion"
    object_chunk = "chat.completion.chunk"
    id_prefix = "chatcmpl-"
    fill_context = True

    async def prompts(self) -> list[Sequence[int]]:
        """The conversation as the chat template writes it."""
        prompt = await render_chat(
            self.model,
            turns(self.body.messages),
            add_generation_prompt=self.body.add_generation_prompt is not False,
            add_special_tokens=bool(self.body.add_special_tokens),
            extra=self.body.chat_template_kwargs,
        )
        return [prompt]

    def whole(self, choices: Sequence[Delta]) -> dict[str, Any]:
        """The whole answer."""
        return {**super().whole(choices), **self.prompt_ids(0)}

    def content(self, index: int, text: str) -> dict[str, Any]:
        """The message."""
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def opening(self, index: int) -> dict[str, Any]:
        """The chunk with the role."""
        return {**self._choice(index, {"role": "assistant", "content": ""}), **self.prompt_ids(index)}

    def piece(self, index: int, text: str) -> dict[str, Any]:
        """The new content, if there is any."""
        return self._choice(index, {"content": text} if text else {})

    def logprobs(self, index: int, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        """The object in a chat's format."""
        return chat_logprobs(self.model.tokenizer, entries)

    @staticmethod
    def _choice(index: int, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
