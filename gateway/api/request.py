"""What the API layers hand to the engine, and what comes back: the gateway's own vocabulary.

The HTTP and gRPC front ends turn a client's request into one `GenerationRequest`; the engine answers with `Delta`s per
choice. Neither knows the other's protocol.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Literal, Protocol

from stagemesh.protos.v1 import types_pb2

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Sampling:
    """How the tokens of every choice are drawn. Defaults are vLLM's."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    logprobs: bool = False
    """Whether the log-probability of each token that comes is wanted."""
    top_logprobs: int = 0
    """How many of the likeliest tokens' log-probabilities are wanted beside it."""
    logit_bias: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of one token that came, and the likeliest at its position, likeliest first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


Logged = tuple[int, TokenLogprob | None]
"""A token of an answer, and its log-probability where that was asked for."""


@dataclass(frozen=True)
class GenerationRequest:
    """One request, checked and tokenized: `n` choices of at most `max_tokens` tokens each."""

    request_id: str
    prompt: tuple[int, ...]
    """Token ids, at least one."""
    sampling: Sampling
    max_tokens: int
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    """Ids that end a choice: the checkpoint's EOS ids (unless `ignore_eos`) and the client's."""
    min_tokens: int = 0
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    deadline_s: float | None = None
    """Seconds from submission until the request ends with DeadlineExceeded; None takes the gateway's bound."""
    log: tuple[tuple[Logged, ...], ...] = ()
    """Of each choice, what was promised before: the answer goes on behind it. Empty: nothing was."""
    seen: tuple[int, ...] = ()
    """Of each choice, how many of those tokens the client has: they are not told again."""


@dataclass
class Delta:
    """New output of one choice."""

    choice: int
    text: str
    """Text that is final: never the start of a stop string, never part of a UTF-8 character."""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """The stop string or stop id that ended it; None for EOS."""


class Stream(Protocol):
    """One running request. Iterating yields batches of deltas as steps come back; ends when every choice has ended.

    Iterating raises StageLost, DeadlineExceeded, NumericalError or InternalError where the request failed.
    A reader that is slow gets larger batches: the engine merges, its memory is bounded by max_tokens.
    """

    request: GenerationRequest

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that the prefix cache held; 0 until the request starts."""

    def __aiter__(self) -> AsyncIterator[list[Delta]]: ...

    def cancel(self) -> None:
        """Ends the request; its pages are freed on every stage. Safe to call twice, and after the end."""


@dataclass(frozen=True)
class ModelCard:
    """What clients may know of the served model."""

    name: str
    max_model_len: int
    vocab_size: int
    created: int


class Engine(Protocol):
    """What the front ends need of the engine."""

    @property
    def model(self) -> ModelCard | None:
        """The served model; None until a pipeline was published."""

    @property
    def tokenizer(self) -> object | None:
        """The `gateway.tokenizer.Tokenizer` of the served model; None until a pipeline was published."""

    @property
    def mesh(self) -> types_pb2.MeshView:
        """The mesh as the coordinator told it last."""

    def submit(self, request: GenerationRequest) -> Stream:
        """Queues a request. Raises QueueFull, Unavailable, or PromptTooLong."""

    def cancel(self, request_id: str) -> bool:
        """Cancels by name; False when it is not running."""

    def ready(self) -> tuple[bool, str]:
        """Whether a token has crossed every stage and a pipeline serves; else why not."""

    def describe(self) -> dict[str, object]:
        """The mesh as this gateway sees it, JSON-ready: MeshView's JSON form, and `gateway` with its own figures."""
