"""The process that describes a model: `python -m stagemesh.stage_worker.native.description.process PARENT_PID`.

It ends when its parent does. It reads {"model_dir": ..., "tensors": names or null} as JSON from stdin. It writes a
description to stdout, or {"reason": ...}.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stagemesh.errors import CheckpointError, UnsupportedModel
from stagemesh.process import die_with_parent

from ...model.parts.describe import describe
from ...model.parts.model import to_json
from ...model.parts.reading.explain import NotKnown
from ...model.plain import hf
from ..program.operations import NoKernel
from .probe import Differs, prove


def answer(model_dir: str | Path, tensors: Sequence[str] | None) -> str:
    """Describes a model in this process. Returns the answer as JSON."""
    config = hf.load_config(model_dir)
    with hf.kept_attention():
        try:
            description = describe(config, tensors)
            prove(config, description)
            return json.dumps(to_json(description))
        except (NotKnown, NoKernel, Differs, UnsupportedModel, CheckpointError) as e:
            return json.dumps({"reason": str(e)})  # If that is an error, the plain shard raises it.


def main() -> int:
    """Answers one request."""
    die_with_parent(int(sys.argv[1]))
    request: dict[str, Any] = json.load(sys.stdin)
    sys.stdout.write(answer(request["model_dir"], request["tensors"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
