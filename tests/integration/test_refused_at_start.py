"""What no restart can change is said once, by name, with exit status 2: before any worker loads weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from services import service

from stagemesh.settings.model import DEMO_MODEL


def checkpoint(folder: Path) -> Path:
    """A checkpoint to damage. Its weights are a link to the shipped ones."""
    folder.mkdir()
    for path in DEMO_MODEL.iterdir():
        if path.suffix == ".safetensors":
            (folder / path.name).symlink_to(path)
        else:
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def change(name: str, **told: object) -> Callable[[Path], None]:
    """Damage: these keys of a JSON file have these values."""

    def damage(folder: Path) -> None:
        file = folder / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **told}))

    return damage


def cut(name: str) -> Callable[[Path], None]:
    """Damage: the file ends in its middle."""

    def damage(folder: Path) -> None:
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])

    return damage


def template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}")


def run(*args: str, env: dict[str, str] | None = None) -> tuple[subprocess.CompletedProcess[str], float]:
    """Runs a `stagemesh` command that should refuse. Also returns the seconds that it took."""
    command = [sys.executable, "-m", "stagemesh.cli.main", *args]
    began = time.monotonic()
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, **(env or {})}
    )
    took_s = time.monotonic() - began
    print(f"{' '.join(args)}: status {done.returncode} after {took_s:.1f} s\n{done.stderr}")
    return done, took_s


@pytest.mark.parametrize(
    ("damage", "file", "says", "who"),
    [
        (cut("tokenizer.json"), "tokenizer.json", "no tokenizer can be made of it", "gateway"),
        (change("tokenizer_config.json", eos_token=3), "tokenizer_config.json", "eos_token must be a text", "gateway"),
        (template, "chat_template.jinja", "is not valid", "gateway"),
        (
            change("generation_config.json", eos_token_id="3"),
            "generation_config.json",
            "eos_token_id must be a token id below vocab_size 768",
            "coordinator",
        ),
        (
            change("generation_config.json", top_p=7),
            "generation_config.json",
            "top_p must be at least 0",
            "coordinator",
        ),
    ],
    ids=["tokenizer", "tokenizer config", "template", "eos", "top_p"],
)
def test_serve_refuses_a_broken_checkpoint(
    tmp_path: Path, damage: Callable[[Path], None], file: str, says: str, who: str
) -> None:
    model = checkpoint(tmp_path / "model")
    damage(model)
    done, _ = run("serve", str(model), "-pp", "2", "--port", "0")
    assert done.returncode == 2
    assert done.stderr.count(says) == 1, "it is said once"
    (line,) = (line for line in done.stderr.splitlines() if says in line)
    assert line.startswith(f"stagemesh {who}: {model / file}")
    assert "listens on" not in done.stderr.replace("coordinator listens on", ""), "no worker has begun"
    assert "MiB" not in done.stderr, "and none has loaded"
    assert "starting it again" not in done.stderr
    assert "Traceback" not in done.stderr


def test_a_gateway_alone_refuses_it(tmp_path: Path) -> None:
    """With --model at once, and without it when the coordinator says which folder it is."""
    model = checkpoint(tmp_path / "model")
    cut("tokenizer.json")(model)
    says = f"stagemesh gateway: {model / 'tokenizer.json'}: no tokenizer can be made of it"
    ports = ("--port", "0", "--grpc-port", "0")
    done, _ = run("gateway", "--coordinator", "127.0.0.1:1", "--model", str(model), *ports)
    assert (done.returncode, done.stderr.count(says)) == (2, 1)
    with service(tmp_path, "coordinator", "--model", str(model), "--port", "0") as coordinator:
        done, _ = run("gateway", "--coordinator", f"127.0.0.1:{coordinator.ports['port']}", *ports)
    assert (done.returncode, done.stderr.count(says)) == (2, 1)


def test_workers_that_refuse_their_settings_are_not_started_again_and_again() -> None:
    """They listen before their ranks import what they need, such as a plugin that is not there."""
    done, took_s = run("serve", "--port", "0", "--device", "cpu", env={"STAGEMESH_PLUGINS": "no_such_plugin"})
    assert done.returncode == 2
    assert took_s < 60
    assert "No module named 'no_such_plugin'" in done.stderr
    assert "the worker stage-0 cannot serve; its message is above" in done.stderr
    assert "starting it again" not in done.stderr
