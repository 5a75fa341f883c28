"""`stagemesh download` against a hub on this machine: what is fetched, and what is said when it cannot be."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub_server import Hub, running_hub
from tiny_models import by_layer, make_checkpoint, split_weights

REPO = "org/tiny"
SHARDS = {f"layer-{n}.safetensors" for n in range(6)} | {"embedding.safetensors", "head.safetensors"}
LAYER = "layer-1.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a file for each layer."""
    return split_weights(make_checkpoint("llama", tmp_path_factory.mktemp("model")), by_layer)


@pytest.fixture
def hub(model: Path) -> Iterator[Hub]:
    with running_hub() as hub:
        hub.add(REPO, model)
        yield hub


class Download:
    """Runs the command, with a cache of its own."""

    def __init__(self, hub: Hub, home: Path) -> None:
        self.hub, self.home = hub, home

    def start(self, *args: str, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "stagemesh.cli.main", "download", *args],
            env={**os.environ, **self.hub.env(self.home), **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*args, **env)
        out, err = process.communicate(timeout=90)
        print(f"{args} {env}: status {process.returncode}\n{out}{err}")
        return subprocess.CompletedProcess(args, process.returncode, out, err)

    def fails(self, *args: str, status: int = 2, **env: str) -> str:
        """Runs it, asserts that it says one thing, and returns that."""
        done = self(*args, **env)
        assert done.returncode == status
        assert "Traceback" not in done.stderr
        *_, line = done.stderr.splitlines()
        assert line.startswith("stagemesh download: ")
        return line

    @property
    def snapshot(self) -> Path:
        """Folder of the only commit."""
        (folder,) = (self.home / "hub" / "models--org--tiny" / "snapshots").iterdir()
        return folder

    def names(self) -> set[str]:
        return {path.name for path in self.snapshot.iterdir()}


@pytest.fixture
def download(hub: Hub, tmp_path: Path) -> Download:
    return Download(hub, tmp_path / "home")


def wait_for(what: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_it_fetches_what_the_layers_need_once(download: Download, hub: Hub, model: Path) -> None:
    done = download(REPO, "--layers", "0-1")
    assert done.returncode == 0
    wanted = {"layer-0.safetensors", LAYER, "embedding.safetensors"}
    assert download.names() & SHARDS == wanted
    size = sum((model / name).stat().st_size for name in wanted)
    assert "layers 0-1 of 6 need 3 files" in done.stdout
    assert f"({size} bytes) were fetched" in done.stdout
    assert done.stdout.splitlines()[-1] == str(download.snapshot)
    for name in download.names():
        assert (download.snapshot / name).read_bytes() == (model / name).read_bytes()
    assert "tokenizer.json" in download.names()

    hub.requests.clear()
    assert "(0 bytes) were fetched" in download(REPO, "--layers", "0-1").stdout
    assert [request.path for request in hub.requests] == ["/api/models/org/tiny/revision/main"]
    last = download(REPO, "--layers", "5").stdout
    assert "layers 5-5 of 6 need 2 files" in last
    assert download.names() & SHARDS == wanted | {"layer-5.safetensors", "head.safetensors"}
    download(REPO)
    assert download.names() & SHARDS == SHARDS
    assert hub.fetched(LAYER) == 0, "it is there"
    assert (download.home / "hub" / "models--org--tiny" / "refs" / "main").read_text() == download.snapshot.name


def test_the_cache_is_shared_with_huggingface_hub(download: Download, hub: Hub, model: Path, tmp_path: Path) -> None:
    """Each finds what the other fetched."""
    assert download(REPO, "--layers", "1").returncode == 0
    code = (
        "import sys; from huggingface_hub import hf_hub_download\nfor name in sys.argv[1:]: print(hf_hub_download({}))"
    )
    theirs = [sys.executable, "-c", code.format(f"'{REPO}', name, local_files_only=True"), LAYER]
    env = {**os.environ, **hub.env(download.home)}
    found = subprocess.run(theirs, env=env, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(download.snapshot / LAYER)

    other = Download(hub, tmp_path / "other")
    theirs = [sys.executable, "-c", code.format(f"'{REPO}', name"), *(path.name for path in model.iterdir())]
    subprocess.run(theirs, env={**os.environ, **hub.env(other.home)}, check=True, capture_output=True)
    assert "(0 bytes) were fetched" in other(REPO, HF_HUB_OFFLINE="1").stdout
    assert "(0 bytes) were fetched" in other(REPO).stdout


def test_two_at_once_fetch_each_file_once(download: Download, hub: Hub, model: Path) -> None:
    hub.held[LAYER] = threading.Event()
    first = download.start(REPO, "--layers", "1")
    wait_for(lambda: hub.fetched(LAYER) > 0)
    second = download.start(REPO, "--layers", "1-2")
    wait_for(lambda: hub.fetched("layer-2.safetensors") > 0)
    hub.held[LAYER].set()
    for process in (first, second):
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert hub.fetched(LAYER) == (model / LAYER).stat().st_size


def test_a_broken_connection_is_taken_up_where_it_broke(download: Download, hub: Hub, model: Path) -> None:
    hub.break_after[LAYER] = [30_000, 20_000]
    assert download(REPO, "--layers", "1").returncode == 0
    assert hub.fetched(LAYER) == (model / LAYER).stat().st_size
    ranges = [request.range for request in hub.requests if request.is_file and request.range]
    assert ranges == ["bytes=30000-", "bytes=50000-"]
    assert (download.snapshot / LAYER).read_bytes() == (model / LAYER).read_bytes()


def test_a_server_without_ranges_sends_the_file_again(download: Download, hub: Hub, model: Path) -> None:
    hub.ranges = False
    hub.break_after[LAYER] = [30_000]
    assert download(REPO, "--layers", "1").returncode == 0
    assert (download.snapshot / LAYER).read_bytes() == (model / LAYER).read_bytes()


@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_download_goes_on_where_it_was(download: Download, hub: Hub, model: Path, sig: signal.Signals) -> None:
    size = (model / LAYER).stat().st_size
    hub.held[LAYER] = threading.Event()
    process = download.start(REPO, "--layers", "1")
    blobs = download.home / "hub" / "models--org--tiny" / "blobs"
    wait_for(lambda: any(path.stat().st_size == size // 2 for path in blobs.glob("*.incomplete")))
    process.send_signal(sig)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert LAYER not in download.names()
    del hub.held[LAYER]
    assert download(REPO, "--layers", "1").returncode == 0
    assert hub.requests[-1].range == f"bytes={size // 2}-"
    assert (download.snapshot / LAYER).read_bytes() == (model / LAYER).read_bytes()
    assert not list(blobs.glob("*.incomplete"))


def test_a_file_that_is_not_the_hubs_gets_no_place(download: Download, hub: Hub) -> None:
    """As from a proxy that answers with something of its own; the size may be right."""
    hub.changed[LAYER] = lambda data: data[:-1] + bytes([data[-1] ^ 1])
    said = download.fails(REPO, "--layers", "1")
    assert f"{LAYER}: its content does not have the checksum" in said
    assert LAYER not in download.names()
    hub.changed[LAYER] = lambda data: data + b"more"
    assert "is longer than" in download.fails(REPO, "--layers", "1")
    hub.changed["config.json"] = lambda data: data.replace(b"llama", b"qwen2")
    shutil.rmtree(download.home)
    assert "config.json: its content does not have the checksum" in download.fails(REPO)
    hub.changed.clear()
    assert download(REPO, "--layers", "1").returncode == 0


def test_a_damaged_file_of_the_cache_is_fetched_again(download: Download, hub: Hub, model: Path) -> None:
    download(REPO, "--layers", "1")
    os.truncate(download.snapshot / LAYER, 1000)
    assert f"({(model / LAYER).stat().st_size} bytes) were fetched" in download(REPO, "--layers", "1").stdout
    assert (download.snapshot / LAYER).read_bytes() == (model / LAYER).read_bytes()


def test_a_stall_ends_and_is_taken_up(download: Download, hub: Hub) -> None:
    """The server sends half, and then nothing: the time-out is huggingface_hub's."""
    hub.held[LAYER] = threading.Event()
    process = download.start(REPO, "--layers", "1", HF_HUB_DOWNLOAD_TIMEOUT="1")
    wait_for(lambda: any(request.range.endswith("-") for request in hub.requests))
    hub.held[LAYER].set()
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_offline_only_the_cache_counts(download: Download, hub: Hub) -> None:
    said = download.fails(REPO, HF_HUB_OFFLINE="1")
    assert "org/tiny@main: it is not in the cache" in said
    assert "stagemesh download org/tiny@main" in said
    assert not hub.requests
    download(REPO, "--layers", "0-2")
    hub.requests.clear()
    assert "(0 bytes) were fetched" in download(REPO, "--layers", "1", HF_HUB_OFFLINE="1").stdout
    said = download.fails(REPO, HF_HUB_OFFLINE="1")
    assert "head.safetensors is not in the cache" in said
    assert "HF_HUB_OFFLINE is set" in said
    assert not hub.requests


def test_a_hub_that_is_away_is_not_needed_for_what_is_there(download: Download) -> None:
    download(REPO, "--layers", "1")
    away = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    done = download(REPO, "--layers", "1", **away)
    assert done.returncode == 0
    assert "going on with org/tiny@" in done.stderr
    said = download.fails("org/other", status=1, **away)
    assert "cannot get the list of files of org/other@main from http://127.0.0.1:9" in said
    assert "check network, proxy and HF_ENDPOINT" in said
    assert "there is no folder org/other here" in said


def test_a_moved_branch_is_another_commit(download: Download, hub: Hub, model: Path, tmp_path: Path) -> None:
    before = hub.refs[REPO, "main"]
    download(REPO, "--layers", "1")
    later = shutil.copytree(model, tmp_path / "later")
    (later / "generation_config.json").write_text("{}")
    hub.add(REPO, later)
    hub.requests.clear()
    assert "(0 bytes) were fetched" in download(f"{REPO}@{before}", "--layers", "1").stdout
    assert not hub.requests, "what a commit holds is known"
    done = download(REPO, "--layers", "1")
    assert "(0 bytes) were fetched" in done.stdout, "the weights are the same"
    assert hub.fetched("generation_config.json") == 2
    assert done.stdout.splitlines()[-1].endswith(hub.refs[REPO, "main"])


TOKEN = "hf_aTokenThatNobodyShouldSee"


@pytest.mark.parametrize("kind", ["secret", "gated"])
def test_private_and_gated_models_need_a_token(download: Download, hub: Hub, kind: str) -> None:
    getattr(hub, kind)[REPO] = TOKEN
    without = download.fails(REPO)
    other = download.fails(REPO, HF_TOKEN="hf_anotherToken")
    assert "no token is set (HF_TOKEN)" in without
    assert "the token that is set (HF_TOKEN) has no access" in other
    if kind == "gated":
        assert f"org/tiny is gated: accept its conditions at {hub.endpoint}/org/tiny" in without
    else:
        assert f"no model org/tiny at {hub.endpoint} that you may see" in without
    done = download(REPO, "--layers", "1", HF_TOKEN=TOKEN)
    assert done.returncode == 0
    assert TOKEN not in done.stdout + done.stderr
    tokens = {request.token for request in hub.requests if request.path.startswith("/cdn/")}
    assert tokens == {""}, "another host must not get it"


def test_what_cannot_be_fetched_is_said_in_one_line(download: Download, hub: Hub, model: Path, tmp_path: Path) -> None:
    assert "there is no folder org/none here, and no model org/none" in download.fails("org/none")
    assert "has no revision 'v9'" in download.fails(f"{REPO}@v9")
    assert "has no revision 'v9'" in download.fails(REPO, "--revision", "v9")
    assert "the model has 6 layers" in download.fails(REPO, "--layers", "4-6")
    assert "the model has 6 layers" in download.fails(REPO, "--layers", "3-2")
    assert "the model has 6 layers" in download.fails(REPO, "--layers", "a")
    assert "is not the id of a model on a hub" in download.fails(str(model))
    assert "is not an address" in download.fails(REPO, HF_ENDPOINT="localhost")
    hub.status["/api/"] = 429
    assert "too many requests: try again in 77 s" in download.fails("org/new", status=1)
    hub.status["/api/"] = 403
    assert "status 403, access is refused: no token is set" in download.fails(REPO)
    hub.status["/api/"] = 200
    assert "does not answer as a hub" in download.fails(REPO)
    hub.status.clear()
    hub.status[LAYER] = 429
    assert f"{LAYER} of org/tiny@" in (said := download.fails(REPO, "--layers", "1", status=1))
    assert "status 429, too many requests" in said


def test_a_repository_without_clear_weights_is_refused(
    download: Download, hub: Hub, model: Path, tmp_path: Path
) -> None:
    both = shutil.copytree(model, tmp_path / "both")
    (both / "model.safetensors").write_bytes(b"x")
    hub.add("org/both", both)
    assert "it is not clear which weights are meant" in download.fails("org/both")
    none = shutil.copytree(model, tmp_path / "none", ignore=shutil.ignore_patterns("*.safetensors*"))
    (none / "pytorch_model.bin").write_bytes(b"x")
    hub.add("org/none", none)
    assert "has neither model.safetensors nor model.safetensors.index.json" in download.fails("org/none")
    less = shutil.copytree(model, tmp_path / "less", ignore=shutil.ignore_patterns(LAYER))
    hub.add("org/less", less)
    assert f"has no file {LAYER}" in download.fails("org/less")
    out = shutil.copytree(model, tmp_path / "out")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = "../../../head.safetensors"
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    hub.add("org/out", out)
    assert "no weight_map in it with files of this folder" in download.fails("org/out")


def test_a_mirror_that_tells_names_alone(download: Download, hub: Hub, model: Path) -> None:
    hub.tells_sizes = False
    assert "layers 1-1 of 6 need 1 files" in download(REPO, "--layers", "1").stdout
    assert (download.snapshot / LAYER).read_bytes() == (model / LAYER).read_bytes()
    hub.changed["layer-2.safetensors"] = lambda data: data[:-1] + b"x"
    assert "does not have the checksum" in download.fails(REPO, "--layers", "2")


def test_one_file_with_all_weights(download: Download, hub: Hub, tmp_path: Path) -> None:
    single = make_checkpoint("llama", tmp_path / "single")
    hub.add(REPO, single)
    assert "layers 1-1 of 6 need 1 files" in download(REPO, "--layers", "1").stdout
    assert (download.snapshot / "model.safetensors").exists()


def test_no_room_is_said_before_anything_is_fetched(download: Download, hub: Hub, tmp_path: Path) -> None:
    """A file system of 1 MiB would need root; so the hub tells a size that no disk has."""
    hub.sizes[LAYER] = 1 << 60
    said = download.fails(REPO, "--layers", "1")
    assert "1 files of org/tiny@" in said
    assert "need 1073741824.00 GiB in " in said
    assert "set HF_HOME to a larger disk" in said
    assert not hub.fetched(LAYER)


def test_a_cache_that_cannot_be_written(download: Download, tmp_path: Path) -> None:
    download.home.mkdir()
    (download.home / "hub").write_text("a file in its place")
    assert f"cannot write to {download.home / 'hub'}" in download.fails(REPO)


def test_another_cache_folder(download: Download, tmp_path: Path) -> None:
    done = download(REPO, "--layers", "1", "--cache-dir", str(tmp_path / "cache"))
    assert done.stdout.splitlines()[-1].startswith(str(tmp_path / "cache" / "models--org--tiny" / "snapshots"))
    assert (tmp_path / "cache" / "models--org--tiny" / "blobs").is_dir()
