"""`stagemesh download`: fetches a model of a hub into the cache, or the part of it that some layers need."""

from __future__ import annotations

import argparse
import contextlib
import re
from pathlib import Path
from typing import Any

from stagemesh.checkpoint import inspect
from stagemesh.errors import ConfigError
from stagemesh.hub.checkpoint import open_model
from stagemesh.hub.reference import parse
from stagemesh.hub.timing import HubTiming
from stagemesh.local.progress import Progress

MIB = 2**20


def add_parser(commands: Any) -> None:
    """Adds `download` to the parser."""
    command = commands.add_parser(
        "download",
        help="fetch a model of a hub into the cache, or the part that some layers need",
        description="Fetches a model of a Hugging Face hub into the cache (HF_HOME), where coordinator, stages and "
        "gateway find it: configuration, tokenizer, and the files that hold the layers. HF_ENDPOINT names another hub, "
        "HF_TOKEN a token for private and gated models.",
        allow_abbrev=False,
    )
    command.add_argument("model", metavar="MODEL", help="its id, such as org/name or org/name@revision")
    command.add_argument("--revision", help="branch, tag or commit [main]")
    command.add_argument(
        "--layers", metavar="FIRST-LAST", help="fetch what these decoder layers need, such as 0-11 [all]"
    )
    command.add_argument("--cache-dir", type=Path, help="cache folder [HF_HUB_CACHE, or HF_HOME/hub]")
    command.set_defaults(run=run)


def run(namespace: argparse.Namespace) -> int:
    """Runs `download`. Raises ConfigError, CheckpointError, Unavailable."""
    model = parse(namespace.model, namespace.revision)
    if model is None:
        raise ConfigError(
            f"{namespace.model} is not the id of a model on a hub, such as org/name, or it is a folder here"
        )
    checkpoint = open_model(model, HubTiming(), namespace.cache_dir)
    checkpoint.fetch_text()
    num_layers = inspect(checkpoint.folder, "dummy").num_layers
    first, last = _layers(namespace.layers, num_layers)
    names = checkpoint.layer_files((first, last), num_layers)
    with contextlib.closing(Progress()) as progress:
        brought = checkpoint.fetch_layers(
            (first, last),
            num_layers,
            lambda here, total: progress.show([{"worker_id": str(model), "loaded_bytes": here, "total_bytes": total}]),
        )
    print(
        f"{checkpoint.model}: layers {first}-{last - 1} of {num_layers} need {len(names)} files with "
        f"{checkpoint.size(names) / MIB:.1f} MiB; {brought / MIB:.1f} MiB ({brought} bytes) were fetched\n"
        f"{checkpoint.folder}"
    )
    return 0


def _layers(told: str | None, num_layers: int) -> tuple[int, int]:
    """Returns the range [first, last) that `--layers` names, first and last included. Raises ConfigError."""
    if told is None:
        return 0, num_layers
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", told)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
    if not first <= last < num_layers:
        raise ConfigError(
            f"--layers {told}: the model has {num_layers} layers: give first and last one, such as 0-{num_layers - 1}"
        )
    return first, last + 1
