"""The interface between the APIs and the engine.

HTTP and gRPC turn a client's request into one `GenerationRequest`. The engine answers with `Delta`s of each choice.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Literal, Protocol

from stagemesh.protos.v1 import types_pb2

from ..text.tokenizer import Tokenizer

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of one sampled token, and of the likeliest tokens at its position in descending order."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


Logged = tuple[int, TokenLogprob | None]
"""A token of an answer, and its log-probability if that is wanted."""


@dataclass(frozen=True)
class GenerationRequest:
    """A checked and tokenized request for `n` choices of at most `max_tokens` tokens each."""

    request_id: str
    prompt: tuple[int, ...]
    """Token ids, at least one."""
    sampling: types_pb2.SamplingParams
    """Parameters for the last stage's sampler."""
    max_tokens: int
    deadline_s: float
    """Seconds until the request ends with DeadlineExceeded."""
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    """Token ids that end a choice: the checkpoint's EOS ids, unless they are ignored, and the client's."""
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    log: tuple[tuple[Logged, ...], ...] = ()
    """Tokens of each choice that an earlier stream of this request already has. The answer continues after them."""
    seen: tuple[int, ...] = ()
    """Number of those tokens, of each choice, that the client has received. They are not sent again."""


@dataclass
class Delta:
    """New output of one choice."""

    choice: int
    text: str
    """Final text: never the beginning of a stop string, never a part of a UTF-8 character."""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """The stop string or stop id that ended the choice. None for EOS."""


class Stream(Protocol):
    """A running request. Iteration yields batches of deltas, and ends when every choice has ended.

    Iteration raises StageLost, DeadlineExceeded, NumericalError or InternalError when the request fails. A slow reader
    gets larger batches: the engine merges deltas, in memory that is bounded by max_tokens.
    """

    request: GenerationRequest

    @property
    def cached_tokens(self) -> int:
        """Number of prompt tokens that the prefix cache held. 0 until the request starts."""

    def __aiter__(self) -> AsyncIterator[list[Delta]]: ...

    def cancel(self) -> None:
        """Ends the request and frees its pages on every stage. It may be called twice, and after the end."""


@dataclass(frozen=True)
class ServedModel:
    """Properties of the served model that the APIs need."""

    name: str
    max_model_len: int
    vocab_size: int
    created: int
    tokenizer: Tokenizer


class Engine(Protocol):
    """The engine's interface for the APIs."""

    @property
    def model(self) -> ServedModel | None:
        """The served model. None until a pipeline was published."""

    @property
    def mesh(self) -> types_pb2.MeshView:
        """The mesh as the coordinator reported it last."""

    def submit(self, request: GenerationRequest) -> Stream:
        """Queues a request. Raises QueueFull, Unavailable, or InvalidRequest."""

    def cancel(self, request_id: str) -> bool:
        """Cancels a request by its id. Returns False if it is not running."""

    def ready(self) -> tuple[bool, str]:
        """(whether a pipeline serves and a token has crossed all of its stages, else why not)."""

    def describe(self) -> dict[str, object]:
        """The JSON of /mesh: the JSON form of `mesh`, and `gateway` with this gateway's own figures."""
