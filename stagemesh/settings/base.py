"""Base of all blocks of settings: frozen pydantic models with field docstrings as help."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Base(BaseModel):
    """A frozen model that refuses unknown keys. The docstring below a field is its description."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        protected_namespaces=(),
        # A process only validates its own settings, so the validators of other settings need not be built.
        defer_build=True,
    )


def flags(*short: str) -> dict[str, Any]:
    """Returns a field's `json_schema_extra` with more spellings on the command line than `--field-name`."""
    return {"flags": list(short)}


def whole_numbers(value: Any) -> Any:
    """Converts `"2,1"` and `2` to a list such as `[2, 1]`: a command line or an environment variable gives these."""
    if isinstance(value, int):
        return [value]
    if isinstance(value, str):
        try:
            return [int(part) for part in value.split(",") if part.strip()]
        except ValueError:
            raise ValueError(f"{value!r} is not a comma-separated list of whole numbers, such as 5,7") from None
    return value


def shared(source: Base, target: type[Base]) -> dict[str, Any]:
    """Returns the values of `source` in all blocks that `target` has, too. A new option of a block is included."""
    blocks = [block for block in target.__mro__ if issubclass(block, Base) and isinstance(source, block)]
    return {name: getattr(source, name) for block in blocks for name in block.model_fields}
