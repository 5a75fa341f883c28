"""All times of fetching files. Whoever fetches makes one object, scaled by its `--time-scale`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from stagemesh.timing import Timing


@dataclass(frozen=True)
class HubTiming(Timing):
    """Times in seconds. How long a request may bring no byte is huggingface_hub's setting, HF_HUB_DOWNLOAD_TIMEOUT."""

    retry_s: float = 1.0
    """Pause before a request that failed is repeated. It doubles up to `retry_most_s`."""
    retry_most_s: float = 8.0
    patience_s: float = 10.0
    """Longest pause that a hub may ask for (Retry-After). A longer one is an error, which says how long."""
    lock_look_s: float = 0.2
    """Interval at which a process that waits for another one's download looks how far that is."""
    told_s: float = 0.1
    """Interval of progress reports."""

    def relations(self) -> Iterator[tuple[bool, str]]:
        """Yields the relations between these times; see `Timing`."""
        yield self.retry_s < self.retry_most_s <= self.patience_s, "retry_s < retry_most_s <= patience_s"
