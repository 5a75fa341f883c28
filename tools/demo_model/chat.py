"""The format of the demo model's conversations: special tokens, the chat template, training documents."""

from __future__ import annotations

import random

from .corpus.example import Example
from .corpus.tasks import asked_carelessly, draw, system_prompt

BOS, END, END_OF_TEXT, SYSTEM, USER, ASSISTANT, PAD = range(7)
SPECIAL_TOKENS = ("<|bos|>", "<|end|>", "<|end_of_text|>", "<|system|>", "<|user|>", "<|assistant|>", "<|pad|>")
IGNORED = -100  # A target without a loss.
EOS_IDS = [END, END_OF_TEXT]

# Content may be a string or OpenAI's list of parts. "developer" is OpenAI's newer word for "system".
CHAT_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- set role = 'system' if message['role'] == 'developer' else message['role'] -%}"
    "{%- if role not in ['system', 'user', 'assistant'] -%}"
    "{{- raise_exception('this model knows the roles system, user and assistant, not ' + role) -}}"
    "{%- endif -%}"
    "{{- '<|' + role + '|>' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] | trim -}}"
    "{%- elif message['content'] -%}"
    "{%- for part in message['content'] -%}{{- part['text'] | trim -}}{%- endfor -%}"
    "{%- endif -%}"
    "{{- '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def conversation_text(messages: list[dict[str, str]]) -> str:
    """Returns the text of `CHAT_TEMPLATE` for `messages` without a generation prompt. It is faster, for training."""
    turns = (f"<|{m['role']}|>{m['content'].strip()}<|end|>" for m in messages)
    return SPECIAL_TOKENS[BOS] + "".join(turns)


def messages_of(rng: random.Random, examples: list[Example]) -> list[dict[str, str]]:
    """Makes one conversation that asks `examples` in turn. A third of them begin with a system prompt."""
    messages = [{"role": "system", "content": system_prompt(rng)}] if rng.random() < 0.35 else []
    for example in examples:
        messages.append({"role": "user", "content": asked_carelessly(rng, example)})
        messages.append({"role": "assistant", "content": example.answer})
    return messages


def document(rng: random.Random) -> str:
    """Makes one training document: mostly a conversation of one to five turns, sometimes plain text."""
    if rng.random() < 0.08:
        while not (example := draw(rng)).plain:
            pass
        return f"{SPECIAL_TOKENS[BOS]}{example.plain}{SPECIAL_TOKENS[END_OF_TEXT]}"
    turns = 1 if rng.random() < 0.6 else rng.randint(2, 5)
    return conversation_text(messages_of(rng, [draw(rng) for _ in range(turns)]))
