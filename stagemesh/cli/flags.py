"""Makes command-line flags from the settings models."""

from __future__ import annotations

import argparse
from typing import Any

from pydantic.fields import FieldInfo

from stagemesh.settings.base import Base

UNSET = argparse.SUPPRESS


def add_flags(parser: argparse.ArgumentParser, cls: type[Base], *, leave_out: tuple[str, ...] = ()) -> None:
    """Adds one flag for each field of `cls`. A flag that is not given does not appear in the namespace."""
    for name, field in cls.model_fields.items():
        if name in leave_out:
            continue
        parser.add_argument(*spellings(name, field), dest=name, default=UNSET, help=_help(field), **_action(field))


def spellings(name: str, field: FieldInfo) -> list[str]:
    """All spellings of a field's flag: the short ones, then `--field-name`."""
    extra: Any = field.json_schema_extra or {}
    return [*extra.get("flags", []), "--" + name.replace("_", "-")]


def given(namespace: argparse.Namespace, cls: type[Base]) -> dict[str, Any]:
    """The settings that the command line gave."""
    return {name: value for name, value in vars(namespace).items() if name in cls.model_fields}


def _action(field: FieldInfo) -> dict[str, Any]:
    if field.annotation is bool:
        return {"action": argparse.BooleanOptionalAction}
    # Pydantic checks types and bounds, so that a value gets the same check and message wherever it comes from.
    return {"metavar": "X"}


def _help(field: FieldInfo) -> str:
    text = (field.description or "").replace("\n", " ").replace("%", "%%")
    if field.default is not None and field.annotation is not bool and field.default != "":
        default = ",".join(map(str, field.default)) if isinstance(field.default, list) else field.default
        text += f" [{default}]"
    return text
