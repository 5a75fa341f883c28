"""Descriptions of models: made once on a machine, whoever asks, and made where nothing can be kept."""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from tiny_models import make_checkpoint

from stagemesh.processes.launcher import LaunchTiming
from stagemesh.stage_worker.native.description.cache import TIMEOUT_S, NotDescribed, describe
from stagemesh.stage_worker.native.description.process import answer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("model"))


class Answerer:
    """Describes, and counts how often it was asked. `begun` and `go_on` are for another thread."""

    def __init__(self) -> None:
        self.asked = 0
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()

    def __call__(self, model_dir: str, names: Sequence[str] | None) -> str:
        self.asked += 1
        self.begun.set()
        assert self.go_on.wait(30)
        return answer(model_dir, names)


def copy(model: Path, folder: Path) -> Path:
    """The same model in another folder, which this process has not described."""
    folder.mkdir()
    (folder / "config.json").write_bytes((model / "config.json").read_bytes())
    return folder


def test_it_is_made_once(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = Answerer()
    first = describe(copy(model, tmp_path / "a"), None, made)
    assert describe(copy(model, tmp_path / "b"), None, made) == first
    assert made.asked == 1


@contextlib.contextmanager
def under_way(folder: Path, made: Answerer) -> Iterator[None]:
    """Another thread describes the model, and goes on when `made` is told to, at the latest at the end."""
    made.go_on.clear()
    first = threading.Thread(target=describe, args=(folder, None, made))
    first.start()
    try:
        assert made.begun.wait(30)
        yield
    finally:
        made.go_on.set()
        first.join(30)


def test_another_one_waits_for_it_and_says_so(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = Answerer()
    with under_way(copy(model, tmp_path / "a"), made):
        describe(copy(model, tmp_path / "b"), None, made, made.go_on.set)
    assert made.asked == 1


def test_the_wait_for_another_one_ends(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = Answerer()
    with under_way(copy(model, tmp_path / "a"), made), pytest.raises(NotDescribed, match="not read in"):
        describe(copy(model, tmp_path / "b"), None, made, timeout_s=0.1)
    assert LaunchTiming().import_s > TIMEOUT_S, "a forkserver that waits would be given up"


def test_another_model_and_one_that_is_kept_do_not_wait(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    kept = describe(model, None, answer)
    other = copy(model, tmp_path / "a")
    (other / "config.json").write_bytes((model / "config.json").read_bytes() + b"\n")
    with under_way(other, Answerer()):
        assert describe(copy(model, tmp_path / "b"), None, answer, timeout_s=0) == kept
        third = copy(model, tmp_path / "c")
        (third / "config.json").write_bytes((model / "config.json").read_bytes() + b"\n\n")
        assert describe(third, None, answer, timeout_s=0) == kept


def test_it_is_made_where_nothing_can_be_kept(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the user's folder nor the one of temporary files is a folder."""
    (tmp_path / "file").touch()
    text = answer(model, None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    assert describe(copy(model, tmp_path / "a"), None, lambda *_: text).parts.hidden == 64


def test_a_damaged_one_is_made_again(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine may have lost power while it was written."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = Answerer()
    first = describe(copy(model, tmp_path / "a"), None, made)
    (kept,) = (tmp_path / "cache").rglob("*.json")
    kept.write_text(kept.read_text()[:100])
    assert describe(copy(model, tmp_path / "b"), None, made) == first
    assert made.asked == 2
