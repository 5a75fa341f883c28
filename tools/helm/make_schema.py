"""Writes `helm/stagemesh/values.schema.json` from the settings models, so that Helm refuses a wrong setting.

    python tools/helm/make_schema.py [--check]

With --check nothing is written. The exit status is 1 if the committed file differs from the new one.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from values_model import ChartValues

SCHEMA = Path(__file__).resolve().parents[2] / "helm" / "stagemesh" / "values.schema.json"
DIALECT = "http://json-schema.org/draft-07/schema#"
"""The newest dialect that every Helm 3 supports."""


def schema() -> dict[str, Any]:
    """Makes the JSON schema of the chart's values."""
    made = _plain(ChartValues.model_json_schema(by_alias=True))
    # Draft 7 calls these definitions, and allows no other key beside a $ref.
    definitions = made.pop("$defs")
    return {"$schema": DIALECT, **made, "definitions": definitions}


def _plain(node: Any, *, names: bool = False) -> Any:
    """Returns `node` without pydantic's additions for Python. `names`: its keys are the user's, not JSON schema's."""
    if isinstance(node, list):
        return [_plain(item) for item in node]
    if not isinstance(node, dict):
        return node
    if not names and "$ref" in node:
        reference = {"$ref": node["$ref"].replace("#/$defs/", "#/definitions/")}
        return (
            {"description": _one_line(node["description"]), "allOf": [reference]}
            if "description" in node
            else reference
        )
    out = {}
    for key, value in node.items():
        if not names and (key in ("title", "flags") or (key == "default" and isinstance(value, dict))):
            continue
        out[key] = _plain(value, names=not names and key in ("properties", "$defs"))
        if not names and key == "description":
            out[key] = _one_line(value)
    return out


def _one_line(text: str) -> str:
    return " ".join(text.split())


def main() -> int:
    """Writes or checks the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 when the file is out of date")
    wanted = json.dumps(schema(), indent=2) + "\n"
    if parser.parse_args().check:
        if not SCHEMA.exists() or SCHEMA.read_text() != wanted:
            print(f"{SCHEMA.name} is not what the settings say: run python tools/helm/make_schema.py", file=sys.stderr)
            return 1
        return 0
    SCHEMA.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
