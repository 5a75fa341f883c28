"""Turns one choice's tokens into text as they come: whole characters only, and stop strings cut across chunks.

Built on tokenizers' `DecodeStream`, which decodes each token behind its predecessor, so that the text is the same as
if it were decoded whole. Around it stands what a stream of any tokens needs: tokens that give no text (skipped special
ones, ids beyond the vocabulary) stay out of it, since it would decode a run of them again and again; bytes that never
become a character are given up as U+FFFD in the end; and a prompt that ends within a character lends its bytes to the
first one.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream

from .stops import StopMatcher
from .tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
CONTEXT = 8
"""Prompt tokens decoded before the output; four hold any character, the rest is for decoders that look back."""
MAX_HELD = 32
"""Tokens without a whole character after which what there is goes out: no character has more than four bytes."""


class Detokenizer:
    """Text of one choice. The text does not depend on how its tokens are spread over `push` calls."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        stop: Sequence[str] = (),
        skip_special_tokens: bool = True,
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        """`stop` is not looked for in the text of the first `min_tokens` tokens (as in vLLM)."""
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._stops = StopMatcher(stop, include_stop) if stop else None
        self._min_tokens = min_tokens
        self._count = 0
        self._context: list[int] = []
        """Tokens of the last whole characters, behind which the next are decoded."""
        self._held: list[int] = []
        """Tokens since then."""
        self._borrowed = ""
        """What the unfinished bytes at the prompt's end show as: the prompt's text, not the output's."""
        self._prime([t for t in prompt_ids[-CONTEXT:] if not tokenizer.is_silent(t, skip_special_tokens)])
        self._stream = DecodeStream(ids=self._context, skip_special_tokens=skip_special_tokens)
        if tokenizer.raw is not None:
            for token in self._held:
                self._stream.step(tokenizer.raw, token)

    def push(self, tokens: Sequence[int]) -> tuple[str, str | None, int]:
        """Adds `tokens`; returns new final text, the stop string that ended it if one did, and how many were used.

        Tokens behind the one that completed a stop string are not used; nothing may be pushed after it.
        """
        ready: list[str] = []
        for used, token in enumerate(tokens, 1):
            self._count += 1
            text = self._text_with(token)
            if not text:
                continue
            if self._stops is None or self._count <= self._min_tokens:
                ready.append(text)
                continue
            text, stopped_by = self._stops.push(text)
            ready.append(text)
            if stopped_by is not None:
                self._held = []
                return "".join(ready), stopped_by, used
        return "".join(ready), None, len(tokens)

    def finish(self) -> str:
        """What was still held back: the start of a stop string, an unfinished character as U+FFFD."""
        text = self._flush() if self._held else ""
        if self._stops is None:
            return text
        text, stopped_by = self._stops.push(text)
        return text if stopped_by is not None else text + self._stops.finish()

    def _text_with(self, token: int) -> str:
        """Characters that `token` completes."""
        raw = self._tokenizer.raw
        if raw is None or self._tokenizer.is_silent(token, self._skip):
            return ""
        self._held.append(token)
        try:
            text = self._stream.step(raw, token)
        except Exception:  # noqa: BLE001 - tokenizers raises bare Exception
            # "Invalid prefix": a byte-fallback decoder takes back a whole run of bytes when one of them is wrong. What
            # was sent stays sent; the stream goes on from here.
            text = self._decode(self._held)
            self._stream = DecodeStream(ids=self._held, skip_special_tokens=self._skip)
        if text is None:
            return self._flush() if len(self._held) > MAX_HELD else ""
        self._context, self._held = self._held, []
        return self._own(text)

    def _flush(self) -> str:
        """Gives up waiting for the held tokens' last character."""
        before, both = self._decode(self._context), self._decode(self._context + self._held)
        text = both[len(before) :] if both.startswith(before) else self._decode(self._held)
        self._held = []
        # Not behind the flushed tokens: a stream that begins with an unfinished character repeats it.
        self._stream = DecodeStream(ids=self._context, skip_special_tokens=self._skip)
        return self._own(text)

    def _own(self, text: str) -> str:
        """`text` without what belongs to the prompt."""
        if self._borrowed:
            shared = 0
            while shared < min(len(text), len(self._borrowed)) and text[shared] == self._borrowed[shared]:
                shared += 1
            text, self._borrowed = text[shared:], ""
        return text

    def _prime(self, prompt: list[int]) -> None:
        """Splits the prompt's last tokens into whole characters and the tokens of an unfinished one."""
        for end in range(len(prompt), 0, -1):
            before = self._decode(prompt[:end])
            if not before.endswith(REPLACEMENT):
                self._context, self._held = prompt[:end], prompt[end:]
                self._borrowed = self._decode(prompt)[len(before) :]
                return

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)
