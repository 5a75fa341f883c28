"""Handles OfferLink and ConnectLink: first the receiving end of a link is made, then the sending end connects to it."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from stagemesh.errors import NotFound, StagemeshError, TransportError
from stagemesh.faults import point
from stagemesh.protos.v1 import stage_pb2
from stagemesh.transport.base import Transport

from ..kv.copy import PageFrames, PageReceiver, PageSender
from ..links.link import LinkIdentity, LinkReceiver, LinkSender, sending_rank
from ..messages.control import Kind, failure_of
from ..messages.rank_config import RankConfig
from .assignment import Assignment
from .engine import Engine

log = logging.getLogger(__name__)

TOKEN_CREDITS = 64
"""Number of token frames that may be in flight on a lane. The first stage takes them at once."""
PAGE_CREDITS = 4
"""Number of page frames that may be in flight on a lane."""

End = TypeVar("End", LinkSender, LinkReceiver)


@dataclass
class _Handshake:
    """Sending ends of a link that wait for the other side's answer. Each has its own deadline."""

    ident: int
    senders: list[LinkSender]
    what: str
    transport: str

    @property
    def over(self) -> bool:
        """Whether all ends were answered, or one failed."""
        return any(s.over for s in self.senders) or all(s.up for s in self.senders)

    def answer(self) -> stage_pb2.ConnectLinkResponse:
        """Returns the response. Raises the error of a link that failed."""
        for sender in self.senders:
            if not sender.up:
                raise sender.error or TransportError(f"the {self.what} was closed before it was ready")
        route = ", ".join(sorted({sender.route for sender in self.senders}))
        if route:
            log.info("%s goes over %s: %s", self.what, self.transport, route)
        return stage_pb2.ConnectLinkResponse(route=route)


class LinkCommands:
    """Handlers of OfferLink and ConnectLink. `find` returns the assignment of a key and a stage."""

    def __init__(
        self,
        config: RankConfig,
        engine: Engine,
        device: torch.device,
        find: Callable[[stage_pb2.PipelineKey, int], Assignment],
        timeout_s: float,
    ) -> None:
        self.config = config
        self.engine = engine
        self.device = device
        self._find = find
        self._timeout_s = timeout_s
        self._handshakes: list[_Handshake] = []

    def offer(self, ident: int, request: stage_pb2.OfferLinkRequest) -> stage_pb2.OfferLinkResponse:
        """Makes this rank's receiving end of a link."""
        point("rank.offer_link")
        assignment = self._find(request.key, request.stage)
        if request.tokens and self.config.rank > 0:
            return stage_pb2.OfferLinkResponse()
        transport = self._transport(request.transport)
        secret = secrets.token_bytes(16)
        source = 0
        if not request.tokens:
            source = sending_rank(self.config.rank, len(request.sender_addresses), self.config.size)
        frames = assignment.resources.frames(request.copy.layers) if request.HasField("copy") else None
        link = LinkReceiver(
            transport,
            request.sender_addresses[source],
            _identity(assignment, request, frames, request.nonces[self.config.rank], secret),
            device="cpu" if request.tokens else self.device,
            timeout_s=self._timeout_s,
        )
        if frames is not None:
            assignment.page_receivers[request.copy.index] = PageReceiver(link, frames)
        else:
            _replace(assignment.token_receivers if request.tokens else assignment.receivers, [link])
        return stage_pb2.OfferLinkResponse(receiver_addresses=[transport.address()], secrets=[secret])

    def connect(self, ident: int, request: stage_pb2.ConnectLinkRequest) -> stage_pb2.ConnectLinkResponse | None:
        """Makes sending ends to the receiving ranks that read from this rank.

        The answer comes when the handshakes are over. Steps run during the handshakes.
        """
        point("rank.connect_link")
        copies = request.HasField("copy")
        key = stage_pb2.PipelineKey(pipeline_id=request.key.pipeline_id, epoch=request.copy.from_epoch)
        assignment = self._find(key if copies else request.key, request.stage)
        transport = self._transport(request.transport)
        frames = assignment.resources.frames(request.copy.layers) if copies else None
        receivers = len(request.receiver_addresses)
        mine = [r for r in range(receivers) if sending_rank(r, self.config.size, receivers) == self.config.rank]
        if request.tokens:
            mine = [0] if self.config.rank == 0 else []
        senders = [
            LinkSender(
                transport,
                request.receiver_addresses[r],
                _identity(assignment, request, frames, request.nonces[r], request.secrets[r]),
                timeout_s=self._timeout_s,
            )
            for r in mine
        ]
        if frames is not None:
            (sender,) = senders
            assignment.page_senders[request.key.epoch, request.copy.index] = PageSender(sender, frames)
        else:
            _replace(assignment.token_senders if request.tokens else assignment.senders, senders)
        handshake = _Handshake(
            ident, senders, f"link of stage {assignment.stage} to {request.receiver_id}", transport.name
        )
        if not handshake.over:
            self._handshakes.append(handshake)
            return None
        return handshake.answer()

    def poll(self) -> bool:
        """Answers calls whose handshakes are over. Returns whether there were any."""
        over = [handshake for handshake in self._handshakes if handshake.over]
        for handshake in over:
            self._handshakes.remove(handshake)
            try:
                self.engine.control.send(Kind.REPLY, handshake.ident, handshake.answer())
            except StagemeshError as e:
                self.engine.control.send(Kind.ERROR, handshake.ident, failure_of(e))
        return bool(over)

    def _transport(self, name: str) -> Transport:
        if name not in self.engine.transports:
            raise NotFound(f"transport {name!r} is not open here; open: {', '.join(self.engine.transports)}")
        return self.engine.transports[name]


def _identity(
    assignment: Assignment,
    request: stage_pb2.OfferLinkRequest | stage_pb2.ConnectLinkRequest,
    frames: PageFrames | None,
    nonce: int,
    secret: bytes,
) -> LinkIdentity:
    """Makes the parameters of a link for activations, tokens or pages."""
    limits, shard = assignment.limits, assignment.shard
    if request.tokens:
        carried = 1, torch.int32, TOKEN_CREDITS, limits.max_num_batched_tokens
    elif frames is not None:
        carried = frames.page_bytes, torch.uint8, PAGE_CREDITS, frames.most_pages
    else:
        carried = shard.hidden_size, shard.dtype, limits.steps_in_flight, limits.max_num_batched_tokens
    return LinkIdentity(nonce, request.key.epoch, secret, *carried)


def _replace(ends: list[End], by: list[End]) -> None:
    """Replaces ends of links, and closes the previous ones."""
    for end in ends:
        end.close()
    ends[:] = by
