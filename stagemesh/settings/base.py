"""What all blocks of settings are: frozen pydantic models whose fields bring their own help."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Base(BaseModel):
    """Unknown keys are refused. The docstring below a field is its description."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        protected_namespaces=(),
        # A process validates its own settings and no other's: the others' validators are never built.
        defer_build=True,
    )


def flags(*short: str) -> dict[str, Any]:
    """For a field's `json_schema_extra`: spellings on the command line beside `--field-name`."""
    return {"flags": list(short)}


def whole_numbers(value: Any) -> Any:
    """`"2,1"` and `2` as well as `[2, 1]`: what a command line, a YAML file and an environment variable can say."""
    if isinstance(value, int):
        return [value]
    if isinstance(value, str):
        try:
            return [int(part) for part in value.split(",") if part.strip()]
        except ValueError:
            raise ValueError(f"{value!r} is not a comma-separated list of whole numbers, such as 5,7") from None
    return value


def shared(source: Base, target: type[Base]) -> dict[str, Any]:
    """Values of `source` in the blocks that `target` has, too. Whole blocks: a new option is handed on by itself."""
    blocks = [block for block in target.__mro__ if issubclass(block, Base) and isinstance(source, block)]
    return {name: getattr(source, name) for block in blocks for name in block.model_fields}
