"""Renders a conversation with the checkpoint's chat template, as transformers does, without importing it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from stagemesh.errors import CheckpointError, InvalidRequest
from stagemesh.generation import read_json
from stagemesh.hub.substitute import in_its_place


class _Generation(Extension):
    """The tag `{% generation %}`, which marks the assistant's words for training. Its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as an instance's set

    def parse(self, parser: Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # jinja2's own filter escapes HTML characters, which would change the prompt.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> ImmutableSandboxedEnvironment:
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    env.filters["tojson"] = _tojson
    env.globals["raise_exception"] = _raise_exception
    env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return env


class ChatTemplate:
    """A compiled template with the special tokens that it may use."""

    def __init__(
        self, source: str, special_tokens: Mapping[str, str], origin: str = "the checkpoint's chat template"
    ) -> None:
        """`special_tokens`: `bos_token`, `eos_token`, ... as text. `origin`: the file, for messages.

        Raises CheckpointError for a bad template.
        """
        try:
            self._template = _environment().from_string(source)
        # jinja2 finds some errors only when Python compiles what it made, such as a `break` outside of a loop.
        except (jinja2.TemplateError, SyntaxError, RecursionError, MemoryError) as e:
            line = f" in line {e.lineno}" if isinstance(e, jinja2.TemplateSyntaxError) else ""
            raise CheckpointError(f"{origin} is not valid{line}: {e}; correct it, or fetch the file again") from e
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        extra: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt as text. `extra`: further variables for the template.

        Raises InvalidRequest when the template refuses these messages.
        """
        names: dict[str, Any] = {
            "tools": None,
            "documents": None,
            **self._special_tokens,
            **(extra or {}),
            "messages": [dict(m) for m in messages],
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._template.render(names)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as e:
            raise InvalidRequest(f"the model's chat template refused the messages: {e}", param="messages") from e


def load_template(model_dir: Path, special_tokens: Mapping[str, str]) -> ChatTemplate | None:
    """The template of the checkpoint in `model_dir`; None when it has none.

    A file (chat_template.jinja, chat_template.json) overrides the entry in tokenizer_config.json. Of several named
    templates, `default` is taken. Raises CheckpointError.
    """
    file = model_dir / "chat_template.jinja"
    try:
        with contextlib.suppress(FileNotFoundError):
            text = file.read_text(encoding="utf-8")
            if other := in_its_place(text.encode()):
                raise CheckpointError(f"{file} is {other}")
            return ChatTemplate(text, special_tokens, str(file))
    except (OSError, UnicodeDecodeError) as e:
        raise CheckpointError(f"{file}: cannot be read: {e}; fetch the file again") from e
    for name in ("chat_template.json", "tokenizer_config.json"):
        value, origin = read_json(model_dir / name).get("chat_template"), f"{model_dir / name}: chat_template"
        if isinstance(value, list) and all(isinstance(named, dict) for named in value):
            value = next((named.get("template") for named in value if named.get("name") == "default"), None)
        if isinstance(value, str):
            return ChatTemplate(value, special_tokens, origin)
        if value is not None:
            raise CheckpointError(
                f"{origin} must be a text, or a list of objects with `name` and `template`; correct it"
            )
    return None
