"""The Stage service as gRPC sees it."""

from __future__ import annotations

from typing import Any

import grpc
import grpc.aio
from google.protobuf.message_factory import GetMessageClass

from stagemesh.protos.v1 import stage_pb2

from .service import Agent

SERVICE = stage_pb2.DESCRIPTOR.services_by_name["Stage"]
SERVICE_NAME: str = SERVICE.full_name


def add_to_server(agent: Agent, server: grpc.aio.Server) -> None:
    """Adds the Stage service to a server. Run takes and gives raw bytes: the agent does not parse plans and results."""
    calls: dict[str, Any] = {
        "Assign": agent.assign,
        "Prepare": agent.prepare,
        "OfferLink": agent.offer_link,
        "ConnectLink": agent.connect_link,
        "Activate": agent.activate,
        "Release": agent.release,
    }
    handlers = {"Run": grpc.stream_stream_rpc_method_handler(agent.run)}
    for name, call in calls.items():
        method = SERVICE.methods_by_name[name]
        streams = method.server_streaming
        make = grpc.unary_stream_rpc_method_handler if streams else grpc.unary_unary_rpc_method_handler
        request, response = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
        handlers[name] = make(call, request.FromString, response.SerializeToString)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, handlers),))
