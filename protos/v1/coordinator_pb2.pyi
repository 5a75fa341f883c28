from stagemesh.protos.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class HeldAssignment(_message.Message):
    __slots__ = ("pipeline_id", "epoch", "stage", "layers", "generation", "active", "fingerprint")
    PIPELINE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    pipeline_id: str
    epoch: int
    stage: int
    layers: _types_pb2.LayerRange
    generation: int
    active: bool
    fingerprint: str
    def __init__(self, pipeline_id: _Optional[str] = ..., epoch: _Optional[int] = ..., stage: _Optional[int] = ..., layers: _Optional[_Union[_types_pb2.LayerRange, _Mapping]] = ..., generation: _Optional[int] = ..., active: bool = ..., fingerprint: _Optional[str] = ...) -> None: ...

class RegisterRequest(_message.Message):
    __slots__ = ("worker_id", "incarnation", "address", "pool", "tp_size", "device", "transports", "held", "protocol", "version", "any_stage")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    POOL_FIELD_NUMBER: _ClassVar[int]
    TP_SIZE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ANY_STAGE_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    incarnation: int
    address: str
    pool: int
    tp_size: int
    device: _types_pb2.DeviceInfo
    transports: _containers.RepeatedCompositeFieldContainer[_types_pb2.TransportEndpoints]
    held: _containers.RepeatedCompositeFieldContainer[HeldAssignment]
    protocol: int
    version: str
    any_stage: bool
    def __init__(self, worker_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., address: _Optional[str] = ..., pool: _Optional[int] = ..., tp_size: _Optional[int] = ..., device: _Optional[_Union[_types_pb2.DeviceInfo, _Mapping]] = ..., transports: _Optional[_Iterable[_Union[_types_pb2.TransportEndpoints, _Mapping]]] = ..., held: _Optional[_Iterable[_Union[HeldAssignment, _Mapping]]] = ..., protocol: _Optional[int] = ..., version: _Optional[str] = ..., any_stage: bool = ...) -> None: ...

class RegisterResponse(_message.Message):
    __slots__ = ("lease_ms", "renew_ms")
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    RENEW_MS_FIELD_NUMBER: _ClassVar[int]
    lease_ms: int
    renew_ms: int
    def __init__(self, lease_ms: _Optional[int] = ..., renew_ms: _Optional[int] = ...) -> None: ...

class KeepAliveRequest(_message.Message):
    __slots__ = ("worker_id", "incarnation", "broken_pipeline", "broken_epoch", "broken_reason", "stale_refused", "late_ms")
    class StaleRefusedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    BROKEN_PIPELINE_FIELD_NUMBER: _ClassVar[int]
    BROKEN_EPOCH_FIELD_NUMBER: _ClassVar[int]
    BROKEN_REASON_FIELD_NUMBER: _ClassVar[int]
    STALE_REFUSED_FIELD_NUMBER: _ClassVar[int]
    LATE_MS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    incarnation: int
    broken_pipeline: str
    broken_epoch: int
    broken_reason: str
    stale_refused: _containers.ScalarMap[str, int]
    late_ms: int
    def __init__(self, worker_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., broken_pipeline: _Optional[str] = ..., broken_epoch: _Optional[int] = ..., broken_reason: _Optional[str] = ..., stale_refused: _Optional[_Mapping[str, int]] = ..., late_ms: _Optional[int] = ...) -> None: ...

class KeepAliveResponse(_message.Message):
    __slots__ = ("known",)
    KNOWN_FIELD_NUMBER: _ClassVar[int]
    known: bool
    def __init__(self, known: bool = ...) -> None: ...

class WatchPipelinesRequest(_message.Message):
    __slots__ = ("gateway_id", "instance", "protocol", "life")
    GATEWAY_ID_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    LIFE_FIELD_NUMBER: _ClassVar[int]
    gateway_id: str
    instance: int
    protocol: int
    life: int
    def __init__(self, gateway_id: _Optional[str] = ..., instance: _Optional[int] = ..., protocol: _Optional[int] = ..., life: _Optional[int] = ...) -> None: ...

class WatchPipelinesResponse(_message.Message):
    __slots__ = ("slot", "pipelines", "mesh")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    PIPELINES_FIELD_NUMBER: _ClassVar[int]
    MESH_FIELD_NUMBER: _ClassVar[int]
    slot: int
    pipelines: _containers.RepeatedCompositeFieldContainer[_types_pb2.PipelineView]
    mesh: _types_pb2.MeshView
    def __init__(self, slot: _Optional[int] = ..., pipelines: _Optional[_Iterable[_Union[_types_pb2.PipelineView, _Mapping]]] = ..., mesh: _Optional[_Union[_types_pb2.MeshView, _Mapping]] = ...) -> None: ...

class DescribeMeshRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeMeshResponse(_message.Message):
    __slots__ = ("mesh",)
    MESH_FIELD_NUMBER: _ClassVar[int]
    mesh: _types_pb2.MeshView
    def __init__(self, mesh: _Optional[_Union[_types_pb2.MeshView, _Mapping]] = ...) -> None: ...

class ReportStuckRequest(_message.Message):
    __slots__ = ("gateway_id", "pipeline_id", "epoch", "reason", "unreachable")
    GATEWAY_ID_FIELD_NUMBER: _ClassVar[int]
    PIPELINE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    UNREACHABLE_FIELD_NUMBER: _ClassVar[int]
    gateway_id: str
    pipeline_id: str
    epoch: int
    reason: str
    unreachable: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, gateway_id: _Optional[str] = ..., pipeline_id: _Optional[str] = ..., epoch: _Optional[int] = ..., reason: _Optional[str] = ..., unreachable: _Optional[_Iterable[str]] = ...) -> None: ...

class ReportStuckResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReportMovedRequest(_message.Message):
    __slots__ = ("gateway_id", "pipeline_id", "epoch", "error")
    GATEWAY_ID_FIELD_NUMBER: _ClassVar[int]
    PIPELINE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    gateway_id: str
    pipeline_id: str
    epoch: int
    error: str
    def __init__(self, gateway_id: _Optional[str] = ..., pipeline_id: _Optional[str] = ..., epoch: _Optional[int] = ..., error: _Optional[str] = ...) -> None: ...

class ReportMovedResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReportStepsRequest(_message.Message):
    __slots__ = ("gateway_id", "pipeline_id", "epoch", "step_us")
    GATEWAY_ID_FIELD_NUMBER: _ClassVar[int]
    PIPELINE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_US_FIELD_NUMBER: _ClassVar[int]
    gateway_id: str
    pipeline_id: str
    epoch: int
    step_us: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, gateway_id: _Optional[str] = ..., pipeline_id: _Optional[str] = ..., epoch: _Optional[int] = ..., step_us: _Optional[_Iterable[int]] = ...) -> None: ...

class ReportStepsResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RepartitionRequest(_message.Message):
    __slots__ = ("counts",)
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    counts: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, counts: _Optional[_Iterable[int]] = ...) -> None: ...

class RepartitionResponse(_message.Message):
    __slots__ = ("counts", "slowest_us", "expected_us")
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    SLOWEST_US_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_US_FIELD_NUMBER: _ClassVar[int]
    counts: _containers.RepeatedScalarFieldContainer[int]
    slowest_us: int
    expected_us: int
    def __init__(self, counts: _Optional[_Iterable[int]] = ..., slowest_us: _Optional[int] = ..., expected_us: _Optional[int] = ...) -> None: ...

class ScaleRequest(_message.Message):
    __slots__ = ("stage", "replicas")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    stage: int
    replicas: int
    def __init__(self, stage: _Optional[int] = ..., replicas: _Optional[int] = ...) -> None: ...

class ScaleResponse(_message.Message):
    __slots__ = ("pipelines",)
    PIPELINES_FIELD_NUMBER: _ClassVar[int]
    pipelines: int
    def __init__(self, pipelines: _Optional[int] = ...) -> None: ...

class ReportLeftRequest(_message.Message):
    __slots__ = ("gateway_id", "pipeline_id")
    GATEWAY_ID_FIELD_NUMBER: _ClassVar[int]
    PIPELINE_ID_FIELD_NUMBER: _ClassVar[int]
    gateway_id: str
    pipeline_id: str
    def __init__(self, gateway_id: _Optional[str] = ..., pipeline_id: _Optional[str] = ...) -> None: ...

class ReportLeftResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("worker_id",)
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    def __init__(self, worker_id: _Optional[str] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("pipeline_ids",)
    PIPELINE_IDS_FIELD_NUMBER: _ClassVar[int]
    pipeline_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, pipeline_ids: _Optional[_Iterable[str]] = ...) -> None: ...
