"""Makes command-line flags from the settings models."""

from __future__ import annotations

import argparse
from typing import Any

from pydantic.fields import FieldInfo

from stagemesh.settings.base import Base


def add_flags(parser: argparse.ArgumentParser, cls: type[Base], *, leave_out: tuple[str, ...] = ()) -> None:
    """Adds one flag for each field of `cls`. A flag that is not given does not appear in the namespace."""
    for name, field in cls.model_fields.items():
        if name in leave_out:
            continue
        parser.add_argument(
            *spellings(name, field),
            dest=name,
            default=argparse.SUPPRESS,
            required=field.is_required(),
            help=_help(field),
            # Pydantic checks types and bounds, so that a value from any source gets the same check and message.
            **{"action": argparse.BooleanOptionalAction} if field.annotation is bool else {"metavar": "X"},
        )


def spellings(name: str, field: FieldInfo) -> list[str]:
    """Returns all spellings of a field's flag: the short ones, then `--field-name`."""
    extra: Any = field.json_schema_extra or {}
    return [*extra.get("flags", []), "--" + name.replace("_", "-")]


def given(namespace: argparse.Namespace, cls: type[Base]) -> dict[str, Any]:
    """Returns the settings that the command line gave."""
    return {name: value for name, value in vars(namespace).items() if name in cls.model_fields}


def _help(field: FieldInfo) -> str:
    text = (field.description or "").replace("\n", " ").replace("%", "%%")
    if field.annotation is not bool and not field.is_required() and field.default not in (None, ""):
        default = ",".join(map(str, field.default)) if isinstance(field.default, list) else field.default
        text += f" [{default}]"
    return text
