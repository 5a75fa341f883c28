"""Which transport is opened, and what is said about it."""

from __future__ import annotations

import importlib
import logging
from types import ModuleType
from typing import Any

import pytest

from stagemesh.errors import ConfigError, TransportError
from stagemesh.settings.stage import StageSettings
from stagemesh.stage_worker.messages.rank_config import RankConfig
from stagemesh.stage_worker.rank.process import open_transports
from stagemesh.transport import open_transport
from stagemesh.transport.tcp.transport import TcpTransport


@pytest.fixture
def without_ucxx(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def import_module(name: str, package: str | None = None) -> ModuleType:
        if name.startswith("ucxx"):
            raise ModuleNotFoundError("No module named 'ucxx'")
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", import_module)


def opened(**settings: Any) -> list[str]:
    """Names of the transports that a rank with these settings opens."""
    transports = open_transports(RankConfig.of_worker("stage 0", StageSettings(**settings), "cpu")[0])
    for name, transport in transports.items():
        assert transport.name == name
        transport.close()
    return list(transports)


@pytest.mark.usefixtures("without_ucxx")
def test_auto_without_ucxx_is_tcp_with_a_warning_that_says_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert opened(transport="auto") == ["tcp"]
    assert "ucxx is not installed" in caplog.text
    assert "stagemesh[ucx-cu12]" in caplog.text


@pytest.mark.usefixtures("without_ucxx")
def test_ucx_by_name_without_ucxx_is_an_error() -> None:
    with pytest.raises(TransportError, match="ucxx is not installed"):
        opened(transport="ucx")


def test_auto_with_ucx_that_cannot_start_says_why(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("ucxx", reason="ucxx is not installed: UCX is NOT tested")
    with caplog.at_level(logging.WARNING):
        assert opened(transport="auto", ucx_tls="nosuch") == ["tcp"]
    assert "nosuch" in caplog.text


def test_auto_with_ucxx_is_ucx_and_tcp_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("ucxx", reason="ucxx is not installed: UCX is NOT tested")
    assert opened(transport="auto") == ["ucx", "tcp"]
    assert not caplog.records


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="carrier-pigeon"):
        open_transport("carrier-pigeon")


def test_a_port_in_use_is_named() -> None:
    first = TcpTransport()
    with pytest.raises(TransportError, match=r"127\.0\.0\.1"):
        TcpTransport(port=first.port)
    first.close()
