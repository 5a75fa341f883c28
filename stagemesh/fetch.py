"""Requests to a gateway's HTTP port, for commands that are not OpenAI clients."""

from __future__ import annotations

import contextlib
import json
import re
import urllib.error
import urllib.request
from typing import Any

from stagemesh.errors import InvalidRequest, Unavailable


def fetch_json(url: str, timeout_s: float, *, api_key: str | None = None, post: bool = False) -> Any:
    """Returns the JSON answer to a GET, or to a POST without a body.

    Raises:
        Unavailable: nothing answers, or the server answers with an error.
        InvalidRequest: the server refuses this request with status 400.
    """
    # The key is sent as UTF-8. urllib encodes headers as Latin-1, so each byte becomes one character here.
    headers = {"Authorization": f"Bearer {api_key}".encode().decode("latin-1")} if api_key else {}
    request = urllib.request.Request(url, b"" if post else None, headers, method="POST" if post else "GET")
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            return json.load(response)
    except urllib.error.HTTPError as e:
        with e:
            said = error_message(e.read()) or e.reason
        if e.code == 404:
            said += " (is the gateway of an older release?)"
        raise (InvalidRequest if e.code == 400 else Unavailable)(f"{url} answers {e.code}: {said}") from e
    except (OSError, ValueError) as e:
        raise Unavailable(f"no gateway answers at {url}: {e}; name its address with --url") from e


def error_message(body: bytes) -> str:
    """Returns the message of an error in OpenAI's format at the end of an answer, else the end of the answer."""
    text = body.decode(errors="replace")
    found = re.search(r'\{"error":\s*\{"message":\s*("(?:[^"\\]|\\.)*")', text)
    with contextlib.suppress(ValueError):  # Another server's answer may not be JSON.
        return str(json.loads(found[1])) if found else text[-300:]
    return text[-300:]
