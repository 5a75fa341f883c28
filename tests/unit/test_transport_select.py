"""Which transport is opened, and what is said about it."""

from __future__ import annotations

import importlib
import logging
from types import ModuleType

import pytest

from stagemesh.errors import ConfigError, TransportError
from stagemesh.transport import open_transport


@pytest.fixture
def without_ucxx(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def import_module(name: str, package: str | None = None) -> ModuleType:
        if name.startswith("ucxx"):
            raise ModuleNotFoundError("No module named 'ucxx'")
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", import_module)


@pytest.mark.usefixtures("without_ucxx")
def test_auto_without_ucxx_is_tcp_with_a_warning_that_says_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        transport = open_transport("auto")
    assert transport.name == "tcp"
    assert "ucxx is not installed" in caplog.text
    assert "stagemesh[ucx-cu12]" in caplog.text
    transport.close()


@pytest.mark.usefixtures("without_ucxx")
def test_ucx_by_name_without_ucxx_is_an_error() -> None:
    with pytest.raises(TransportError, match="ucxx is not installed"):
        open_transport("ucx")


def test_auto_with_ucx_that_cannot_start_says_why(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("ucxx", reason="ucxx is not installed: UCX is NOT tested")
    with caplog.at_level(logging.WARNING):
        transport = open_transport("auto", ucx_options={"TLS": "nosuch"})
    assert transport.name == "tcp"
    assert "nosuch" in caplog.text
    transport.close()


def test_auto_with_ucxx_is_ucx_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("ucxx", reason="ucxx is not installed: UCX is NOT tested")
    transport = open_transport("auto")
    assert transport.name == "ucx"
    assert not caplog.records
    transport.close()


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="carrier-pigeon"):
        open_transport("carrier-pigeon")


def test_a_port_in_use_is_named() -> None:
    first = open_transport("tcp")
    with pytest.raises(TransportError, match=r"127\.0\.0\.1"):
        open_transport("tcp", port=getattr(first, "port"))  # noqa: B009
    first.close()
