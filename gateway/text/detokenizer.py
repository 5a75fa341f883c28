"""Turns one choice's tokens into text as they come. The text has whole characters only, and ends at a stop string.

It uses tokenizers' `DecodeStream`, which decodes each token after its predecessor, so that the text is the same as if
all were decoded at once. Four cases need more than that. Tokens without text (skipped special tokens, ids outside the
vocabulary) are left out, since the stream would decode a run of them again and again. Bytes that never become a
character are given up as U+FFFD. The prompt's tokens that are decoded before the output begin with a whole character:
a byte-fallback decoder turns all bytes in a row into U+FFFD if one of them is wrong. If the prompt ends within a
character, its last bytes are decoded with the first token of the output.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import islice

from tokenizers.decoders import DecodeStream

from .stops import StopMatcher
from .tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
CONTEXT = 8
"""Number of prompt tokens that are decoded before the output. Four hold any character; some decoders look further
back."""
LOOK_BACK = 256
"""Largest number of prompt tokens to look at for those. Special tokens, which are skipped, may be behind them."""
CONTINUES = re.compile(rb"[\x80-\xbf]")
"""Bytes of UTF-8 with which no character begins."""
MAX_CHARACTER_BYTES = 4
MAX_HELD = 32
"""Most tokens to hold without a whole character before their bytes are given up. A character has at most four bytes."""


class Detokenizer:
    """The text of one choice."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        stop: Sequence[str] = (),
        skip_special_tokens: bool = True,
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        """As in vLLM, stop strings are not looked for in the text of the first `min_tokens` tokens."""
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._stops = StopMatcher(stop, include_stop) if stop else None
        self._min_tokens = min_tokens
        self._count = 0
        self._context: list[int] = []
        """Tokens of the last whole characters. The next tokens are decoded after them."""
        self._held: list[int] = []
        """Tokens since then, which do not form a whole character yet."""
        self._borrowed = ""
        """How the unfinished bytes at the prompt's end are decoded. They are the prompt's text, not the output's."""
        self._prime(self._last_tokens(prompt_ids))
        self._stream = DecodeStream(ids=self._context, skip_special_tokens=skip_special_tokens)
        if tokenizer.raw is not None:
            for token in self._held:
                self._stream.step(tokenizer.raw, token)

    def push(self, token: int) -> tuple[str, str | None]:
        """Adds `token`. Returns (new final text, the stop string that was found or None). Do not call it after a stop
        string."""
        self._count += 1
        text = self._text_with(token)
        if not text or self._stops is None or self._count <= self._min_tokens:
            return text, None
        return self._stops.push(text)

    def finish(self) -> str:
        """The text that was held back: the beginning of a stop string, an unfinished character as U+FFFD."""
        text = self._flush() if self._held else ""
        if self._stops is None:
            return text
        return self._stops.push(text)[0] + self._stops.finish()

    def _text_with(self, token: int) -> str:
        """The characters that `token` completes."""
        raw = self._tokenizer.raw
        if raw is None or self._tokenizer.is_silent(token, self._skip):
            return ""
        self._held.append(token)
        try:
            text = self._stream.step(raw, token)
        except Exception:  # noqa: BLE001 - tokenizers raises bare Exception
            # "Invalid prefix": a byte-fallback decoder changes a whole run of bytes when one of them is wrong. What
            # was sent cannot be changed; the stream continues from here.
            text = self._decode(self._held)
            self._stream = DecodeStream(ids=self._held, skip_special_tokens=self._skip)
        if text is None:
            return self._flush() if len(self._held) > MAX_HELD else ""
        self._context, self._held = self._held, []
        return self._own(text)

    def _flush(self) -> str:
        """The text of the held tokens, without waiting for their last character."""
        before, both = self._decode(self._context), self._decode(self._context + self._held)
        text = both[len(before) :] if both.startswith(before) else self._decode(self._held)
        self._held = []
        # The flushed tokens are no context: a stream that begins with an unfinished character repeats it. But the next
        # token is no longer the first, whose space some decoders strip.
        self._context = self._context or self._tokenizer.anchor
        self._stream = DecodeStream(ids=self._context, skip_special_tokens=self._skip)
        return self._own(text)

    def _own(self, text: str) -> str:
        """`text` without the part that belongs to the prompt."""
        if self._borrowed:
            shared = 0
            while shared < min(len(text), len(self._borrowed)) and text[shared] == self._borrowed[shared]:
                shared += 1
            text, self._borrowed = text[shared:], ""
        return text

    def _last_tokens(self, prompt_ids: Sequence[int]) -> list[int]:
        """The last tokens of the prompt that have text, from the beginning of a character on."""
        last = reversed(prompt_ids[-LOOK_BACK:])
        spoken = (t for t in last if not self._tokenizer.is_silent(t, self._skip))
        found = list(islice(spoken, CONTEXT))
        for token in islice(spoken, MAX_CHARACTER_BYTES):
            if not CONTINUES.match(self._tokenizer.token_bytes(found[-1])):
                break
            found.append(token)
        return found[::-1]

    def _prime(self, prompt: list[int]) -> None:
        """Splits the prompt's last tokens into those of whole characters and those of an unfinished one."""
        ends = (end for end in range(len(prompt), 0, -1) if not self._decode(prompt[:end]).endswith(REPLACEMENT))
        end = next(ends, 0)
        self._context, self._held = prompt[:end], prompt[end:]
        self._borrowed = self._decode(self._held)

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)
