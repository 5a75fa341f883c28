"""Bad input through the front door of a real mesh: a clear error, and the mesh unharmed."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mesh import Mesh, serve

CHAT = {"model": "stagemesh-demo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
COMPLETION = {"model": "stagemesh-demo", "prompt": "one two", "max_tokens": 4}


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with serve("-pp", "2", "--max-model-len", "256") as running:
        yield running


def post_raw(mesh: Mesh, path: str, body: bytes, **headers: str) -> tuple[int, Any]:
    """Status and JSON body of a POST of bytes as they are."""
    host, port = mesh.url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=30)
    try:
        connection.request("POST", path, body, {"Content-Type": "application/json", **headers})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def post(mesh: Mesh, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    return post_raw(mesh, path, json.dumps(body).encode())


def still_serves(mesh: Mesh) -> None:
    """The mesh answers, and holds no page of the refused request."""
    status, answer = post(mesh, "/v1/completions", COMPLETION)
    assert status == 200, answer
    mesh.check_pages_are_free()


@pytest.mark.parametrize(
    ("path", "change", "status", "says"),
    [
        ("/v1/completions", {"prompt": "word " * 400}, 400, "256"),
        ("/v1/completions", {"prompt": ""}, 400, "prompt"),
        ("/v1/completions", {"prompt": []}, 400, "prompt"),
        ("/v1/completions", {"max_tokens": -1}, 400, "max_tokens"),
        ("/v1/completions", {"max_tokens": 10**9}, 400, "256"),
        ("/v1/completions", {"temperature": "hot"}, 400, "temperature"),
        ("/v1/completions", {"temperature": -1}, 400, "temperature"),
        ("/v1/completions", {"top_p": 0}, 400, "top_p"),
        ("/v1/completions", {"model": "gpt-17"}, 404, "gpt-17"),
        ("/v1/completions", {"prompt": [1, 2, 10**6]}, 400, "1000000"),
        ("/v1/completions", {"n": 0}, 400, "n"),
        ("/v1/chat/completions", {"messages": []}, 400, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "robot"}]}, 400, "messages"),
        ("/v1/chat/completions", {"max_completion_tokens": 0}, 400, "max_completion_tokens"),
    ],
)
def test_a_wrong_request_is_told_what_is_wrong(
    mesh: Mesh, path: str, change: dict[str, Any], status: int, says: str
) -> None:
    base = CHAT if path.endswith("chat/completions") else COMPLETION
    got, answer = post(mesh, path, {**base, **change})
    assert got == status, answer
    assert says in answer["error"]["message"] or says == answer["error"]["param"], answer
    still_serves(mesh)


def test_a_body_that_is_no_json_or_no_utf8(mesh: Mesh) -> None:
    for body in (b"{", b'{"model": "\xff\xfe"}', b"[1]", b""):
        status, answer = post_raw(mesh, "/v1/completions", body)
        assert status == 400, (body, answer)
        assert answer["error"]["message"]
    still_serves(mesh)


def test_a_body_of_50_mb_is_refused_without_being_read(mesh: Mesh) -> None:
    host, port = mesh.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as client:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {50 << 20}\r\n\r\n"
        client.sendall(head.encode() + b"x" * 1000)
        answer = client.recv(65536).decode()
    assert answer.startswith("HTTP/1.1 413"), answer
    still_serves(mesh)


def test_unknown_keys_are_ignored_as_openai_does(mesh: Mesh) -> None:
    status, answer = post(mesh, "/v1/completions", {**COMPLETION, "frobnicate": True})
    assert status == 200, answer


def run_serve(*args: str) -> subprocess.CompletedProcess[str]:
    """`stagemesh serve` that is expected to refuse."""
    command = [sys.executable, "-m", "stagemesh.cli.main", "serve", "--port", "0", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("-pp", "9"), "8"),
        (("-pp", "2", "--layer-partition", "5,7"), "12"),
        (("-tp", "3"), "3"),
        (("/nowhere/model",), "/nowhere/model"),
        (("-pp", "2", "--num-kv-pages", "3"), "--max-model-len"),
        (("--host", "0.0.0.0"), "--insecure"),
        (("--dtype", "float99"), "dtype"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused_at_start(args: tuple[str, ...], says: str) -> None:
    done = run_serve(*args)
    assert done.returncode != 0
    assert says in done.stderr.splitlines()[-1] or says in done.stderr, done.stderr
    assert "Traceback" not in done.stderr, done.stderr


def test_a_port_in_use(mesh: Mesh) -> None:
    done = run_serve("--port", mesh.url.rsplit(":", 1)[1])
    assert done.returncode == 2
    assert "in use" in done.stderr
    still_serves(mesh)


def copy_of(source: Path, target: Path) -> Path:
    """A checkpoint to damage."""
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints with something wrong, made from the shipped one."""
    from safetensors.torch import load_file, save_file

    from stagemesh.settings.model import DEMO_MODEL

    root = tmp_path_factory.mktemp("damaged")
    made = {name: copy_of(DEMO_MODEL, root / name) for name in ("missing", "shape", "truncated", "architecture")}
    tensors = load_file(DEMO_MODEL / "model.safetensors")
    name = "model.layers.5.mlp.up_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != name}, made["missing"] / "model.safetensors")
    save_file({k: v[:-1].clone() if k == name else v for k, v in tensors.items()}, made["shape"] / "model.safetensors")
    whole = (DEMO_MODEL / "model.safetensors").read_bytes()
    (made["truncated"] / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    config = json.loads((DEMO_MODEL / "config.json").read_text())
    config |= {"architectures": ["MambaForCausalLM"], "model_type": "mamba"}
    (made["architecture"] / "config.json").write_text(json.dumps(config))
    return made


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("missing", "model.layers.5.mlp.up_proj.weight"),
        ("shape", "model.layers.5.mlp.up_proj.weight"),
        ("truncated", "model.safetensors"),
        ("architecture", "amba"),
    ],
)
def test_a_damaged_checkpoint_is_refused_with_the_reason(damaged: dict[str, Path], kind: str, says: str) -> None:
    done = run_serve(str(damaged[kind]), "-pp", "2")
    assert done.returncode != 0
    assert says in done.stderr, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
