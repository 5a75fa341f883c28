from stagemesh.protos.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StepKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STEP_KIND_UNSPECIFIED: _ClassVar[StepKind]
    STEP_KIND_RUN: _ClassVar[StepKind]
    STEP_KIND_REPLAY: _ClassVar[StepKind]
STEP_KIND_UNSPECIFIED: StepKind
STEP_KIND_RUN: StepKind
STEP_KIND_REPLAY: StepKind

class PipelineKey(_message.Message):
    __slots__ = ("pipeline_id", "epoch")
    PIPELINE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    pipeline_id: str
    epoch: int
    def __init__(self, pipeline_id: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class AssignRequest(_message.Message):
    __slots__ = ("key", "stage", "num_stages", "layers", "generation", "model", "limits", "beside")
    KEY_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    NUM_STAGES_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    BESIDE_FIELD_NUMBER: _ClassVar[int]
    key: PipelineKey
    stage: int
    num_stages: int
    layers: _types_pb2.LayerRange
    generation: int
    model: _types_pb2.ModelRef
    limits: _types_pb2.RunLimits
    beside: bool
    def __init__(self, key: _Optional[_Union[PipelineKey, _Mapping]] = ..., stage: _Optional[int] = ..., num_stages: _Optional[int] = ..., layers: _Optional[_Union[_types_pb2.LayerRange, _Mapping]] = ..., generation: _Optional[int] = ..., model: _Optional[_Union[_types_pb2.ModelRef, _Mapping]] = ..., limits: _Optional[_Union[_types_pb2.RunLimits, _Mapping]] = ..., beside: bool = ...) -> None: ...

class PrepareRequest(_message.Message):
    __slots__ = ("layers", "model", "limits", "beside")
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    BESIDE_FIELD_NUMBER: _ClassVar[int]
    layers: _types_pb2.LayerRange
    model: _types_pb2.ModelRef
    limits: _types_pb2.RunLimits
    beside: bool
    def __init__(self, layers: _Optional[_Union[_types_pb2.LayerRange, _Mapping]] = ..., model: _Optional[_Union[_types_pb2.ModelRef, _Mapping]] = ..., limits: _Optional[_Union[_types_pb2.RunLimits, _Mapping]] = ..., beside: bool = ...) -> None: ...

class AssignResponse(_message.Message):
    __slots__ = ("loaded_bytes", "total_bytes", "done", "fetching")
    LOADED_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    FETCHING_FIELD_NUMBER: _ClassVar[int]
    loaded_bytes: int
    total_bytes: int
    done: AssignDone
    fetching: bool
    def __init__(self, loaded_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ..., done: _Optional[_Union[AssignDone, _Mapping]] = ..., fetching: bool = ...) -> None: ...

class AssignDone(_message.Message):
    __slots__ = ("num_pages", "page_bytes", "weight_bytes", "tensor_bytes_read", "fingerprint", "vocab_size", "kv_layout")
    NUM_PAGES_FIELD_NUMBER: _ClassVar[int]
    PAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    TENSOR_BYTES_READ_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    KV_LAYOUT_FIELD_NUMBER: _ClassVar[int]
    num_pages: int
    page_bytes: int
    weight_bytes: int
    tensor_bytes_read: int
    fingerprint: str
    vocab_size: int
    kv_layout: str
    def __init__(self, num_pages: _Optional[int] = ..., page_bytes: _Optional[int] = ..., weight_bytes: _Optional[int] = ..., tensor_bytes_read: _Optional[int] = ..., fingerprint: _Optional[str] = ..., vocab_size: _Optional[int] = ..., kv_layout: _Optional[str] = ...) -> None: ...

class OfferLinkRequest(_message.Message):
    __slots__ = ("key", "stage", "transport", "sender_addresses", "nonces", "tokens", "copy")
    KEY_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    SENDER_ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    NONCES_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    COPY_FIELD_NUMBER: _ClassVar[int]
    key: PipelineKey
    stage: int
    transport: str
    sender_addresses: _containers.RepeatedScalarFieldContainer[bytes]
    nonces: _containers.RepeatedScalarFieldContainer[int]
    tokens: bool
    copy: _types_pb2.KvCopy
    def __init__(self, key: _Optional[_Union[PipelineKey, _Mapping]] = ..., stage: _Optional[int] = ..., transport: _Optional[str] = ..., sender_addresses: _Optional[_Iterable[bytes]] = ..., nonces: _Optional[_Iterable[int]] = ..., tokens: bool = ..., copy: _Optional[_Union[_types_pb2.KvCopy, _Mapping]] = ...) -> None: ...

class OfferLinkResponse(_message.Message):
    __slots__ = ("receiver_addresses", "secrets")
    RECEIVER_ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    SECRETS_FIELD_NUMBER: _ClassVar[int]
    receiver_addresses: _containers.RepeatedScalarFieldContainer[bytes]
    secrets: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, receiver_addresses: _Optional[_Iterable[bytes]] = ..., secrets: _Optional[_Iterable[bytes]] = ...) -> None: ...

class ConnectLinkRequest(_message.Message):
    __slots__ = ("key", "stage", "transport", "receiver_addresses", "secrets", "nonces", "receiver_id", "tokens", "copy")
    KEY_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    RECEIVER_ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    SECRETS_FIELD_NUMBER: _ClassVar[int]
    NONCES_FIELD_NUMBER: _ClassVar[int]
    RECEIVER_ID_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    COPY_FIELD_NUMBER: _ClassVar[int]
    key: PipelineKey
    stage: int
    transport: str
    receiver_addresses: _containers.RepeatedScalarFieldContainer[bytes]
    secrets: _containers.RepeatedScalarFieldContainer[bytes]
    nonces: _containers.RepeatedScalarFieldContainer[int]
    receiver_id: str
    tokens: bool
    copy: _types_pb2.KvCopy
    def __init__(self, key: _Optional[_Union[PipelineKey, _Mapping]] = ..., stage: _Optional[int] = ..., transport: _Optional[str] = ..., receiver_addresses: _Optional[_Iterable[bytes]] = ..., secrets: _Optional[_Iterable[bytes]] = ..., nonces: _Optional[_Iterable[int]] = ..., receiver_id: _Optional[str] = ..., tokens: bool = ..., copy: _Optional[_Union[_types_pb2.KvCopy, _Mapping]] = ...) -> None: ...

class ConnectLinkResponse(_message.Message):
    __slots__ = ("route",)
    ROUTE_FIELD_NUMBER: _ClassVar[int]
    route: str
    def __init__(self, route: _Optional[str] = ...) -> None: ...

class ActivateRequest(_message.Message):
    __slots__ = ("key", "stage")
    KEY_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    key: PipelineKey
    stage: int
    def __init__(self, key: _Optional[_Union[PipelineKey, _Mapping]] = ..., stage: _Optional[int] = ...) -> None: ...

class ActivateResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("key", "reason", "alone")
    KEY_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ALONE_FIELD_NUMBER: _ClassVar[int]
    key: PipelineKey
    reason: str
    alone: bool
    def __init__(self, key: _Optional[_Union[PipelineKey, _Mapping]] = ..., reason: _Optional[str] = ..., alone: bool = ...) -> None: ...

class ReleaseResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RunRequest(_message.Message):
    __slots__ = ("open", "plan", "open_sequence", "close_sequence", "copy")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    OPEN_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    CLOSE_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    COPY_FIELD_NUMBER: _ClassVar[int]
    open: RunOpen
    plan: StepPlan
    open_sequence: OpenSequence
    close_sequence: CloseSequence
    copy: CopyPages
    def __init__(self, open: _Optional[_Union[RunOpen, _Mapping]] = ..., plan: _Optional[_Union[StepPlan, _Mapping]] = ..., open_sequence: _Optional[_Union[OpenSequence, _Mapping]] = ..., close_sequence: _Optional[_Union[CloseSequence, _Mapping]] = ..., copy: _Optional[_Union[CopyPages, _Mapping]] = ...) -> None: ...

class RunOpen(_message.Message):
    __slots__ = ("key", "stage", "gateway_id", "instance", "slot", "protocol", "pages", "life")
    KEY_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    GATEWAY_ID_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    LIFE_FIELD_NUMBER: _ClassVar[int]
    key: PipelineKey
    stage: int
    gateway_id: str
    instance: int
    slot: int
    protocol: int
    pages: bytes
    life: int
    def __init__(self, key: _Optional[_Union[PipelineKey, _Mapping]] = ..., stage: _Optional[int] = ..., gateway_id: _Optional[str] = ..., instance: _Optional[int] = ..., slot: _Optional[int] = ..., protocol: _Optional[int] = ..., pages: _Optional[bytes] = ..., life: _Optional[int] = ...) -> None: ...

class RunOpened(_message.Message):
    __slots__ = ("num_pages", "page_size", "steps_in_flight", "kv_generation", "journal", "copy_pages", "cores", "cores_alone")
    NUM_PAGES_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    STEPS_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    KV_GENERATION_FIELD_NUMBER: _ClassVar[int]
    JOURNAL_FIELD_NUMBER: _ClassVar[int]
    COPY_PAGES_FIELD_NUMBER: _ClassVar[int]
    CORES_FIELD_NUMBER: _ClassVar[int]
    CORES_ALONE_FIELD_NUMBER: _ClassVar[int]
    num_pages: int
    page_size: int
    steps_in_flight: int
    kv_generation: int
    journal: bytes
    copy_pages: int
    cores: int
    cores_alone: int
    def __init__(self, num_pages: _Optional[int] = ..., page_size: _Optional[int] = ..., steps_in_flight: _Optional[int] = ..., kv_generation: _Optional[int] = ..., journal: _Optional[bytes] = ..., copy_pages: _Optional[int] = ..., cores: _Optional[int] = ..., cores_alone: _Optional[int] = ...) -> None: ...

class CopyPages(_message.Message):
    __slots__ = ("epoch", "index", "number", "pages", "slot")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    index: int
    number: int
    pages: _containers.RepeatedScalarFieldContainer[int]
    slot: int
    def __init__(self, epoch: _Optional[int] = ..., index: _Optional[int] = ..., number: _Optional[int] = ..., pages: _Optional[_Iterable[int]] = ..., slot: _Optional[int] = ...) -> None: ...

class PagesCopied(_message.Message):
    __slots__ = ("index", "number")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    index: int
    number: int
    def __init__(self, index: _Optional[int] = ..., number: _Optional[int] = ...) -> None: ...

class StepPlan(_message.Message):
    __slots__ = ("step", "epoch", "kind", "sequences", "starts", "counts", "tokens", "new_page_counts", "new_pages", "sample_rows", "ref_rows", "ref_steps", "planned_us", "draft_rows", "guess_rows", "guess_counts", "alone", "replay_first", "replay_last")
    STEP_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    STARTS_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    NEW_PAGE_COUNTS_FIELD_NUMBER: _ClassVar[int]
    NEW_PAGES_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_ROWS_FIELD_NUMBER: _ClassVar[int]
    REF_ROWS_FIELD_NUMBER: _ClassVar[int]
    REF_STEPS_FIELD_NUMBER: _ClassVar[int]
    PLANNED_US_FIELD_NUMBER: _ClassVar[int]
    DRAFT_ROWS_FIELD_NUMBER: _ClassVar[int]
    GUESS_ROWS_FIELD_NUMBER: _ClassVar[int]
    GUESS_COUNTS_FIELD_NUMBER: _ClassVar[int]
    ALONE_FIELD_NUMBER: _ClassVar[int]
    REPLAY_FIRST_FIELD_NUMBER: _ClassVar[int]
    REPLAY_LAST_FIELD_NUMBER: _ClassVar[int]
    step: int
    epoch: int
    kind: StepKind
    sequences: _containers.RepeatedScalarFieldContainer[int]
    starts: _containers.RepeatedScalarFieldContainer[int]
    counts: _containers.RepeatedScalarFieldContainer[int]
    tokens: _containers.RepeatedScalarFieldContainer[int]
    new_page_counts: _containers.RepeatedScalarFieldContainer[int]
    new_pages: _containers.RepeatedScalarFieldContainer[int]
    sample_rows: _containers.RepeatedScalarFieldContainer[int]
    ref_rows: _containers.RepeatedScalarFieldContainer[int]
    ref_steps: _containers.RepeatedScalarFieldContainer[int]
    planned_us: int
    draft_rows: _containers.RepeatedScalarFieldContainer[int]
    guess_rows: _containers.RepeatedScalarFieldContainer[int]
    guess_counts: _containers.RepeatedScalarFieldContainer[int]
    alone: bool
    replay_first: int
    replay_last: int
    def __init__(self, step: _Optional[int] = ..., epoch: _Optional[int] = ..., kind: _Optional[_Union[StepKind, str]] = ..., sequences: _Optional[_Iterable[int]] = ..., starts: _Optional[_Iterable[int]] = ..., counts: _Optional[_Iterable[int]] = ..., tokens: _Optional[_Iterable[int]] = ..., new_page_counts: _Optional[_Iterable[int]] = ..., new_pages: _Optional[_Iterable[int]] = ..., sample_rows: _Optional[_Iterable[int]] = ..., ref_rows: _Optional[_Iterable[int]] = ..., ref_steps: _Optional[_Iterable[int]] = ..., planned_us: _Optional[int] = ..., draft_rows: _Optional[_Iterable[int]] = ..., guess_rows: _Optional[_Iterable[int]] = ..., guess_counts: _Optional[_Iterable[int]] = ..., alone: bool = ..., replay_first: _Optional[int] = ..., replay_last: _Optional[int] = ...) -> None: ...

class OpenSequence(_message.Message):
    __slots__ = ("sequence", "sampling", "choice", "prompt", "log", "prompt_len")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    LOG_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LEN_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    sampling: _types_pb2.SamplingParams
    choice: int
    prompt: _containers.RepeatedScalarFieldContainer[int]
    log: _containers.RepeatedScalarFieldContainer[int]
    prompt_len: int
    def __init__(self, sequence: _Optional[int] = ..., sampling: _Optional[_Union[_types_pb2.SamplingParams, _Mapping]] = ..., choice: _Optional[int] = ..., prompt: _Optional[_Iterable[int]] = ..., log: _Optional[_Iterable[int]] = ..., prompt_len: _Optional[int] = ...) -> None: ...

class CloseSequence(_message.Message):
    __slots__ = ("sequence", "after_step")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    AFTER_STEP_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    after_step: int
    def __init__(self, sequence: _Optional[int] = ..., after_step: _Optional[int] = ...) -> None: ...

class RunResponse(_message.Message):
    __slots__ = ("opened", "results", "ended", "copied")
    OPENED_FIELD_NUMBER: _ClassVar[int]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    COPIED_FIELD_NUMBER: _ClassVar[int]
    opened: RunOpened
    results: StepResults
    ended: RunEnded
    copied: PagesCopied
    def __init__(self, opened: _Optional[_Union[RunOpened, _Mapping]] = ..., results: _Optional[_Union[StepResults, _Mapping]] = ..., ended: _Optional[_Union[RunEnded, _Mapping]] = ..., copied: _Optional[_Union[PagesCopied, _Mapping]] = ...) -> None: ...

class StepResults(_message.Message):
    __slots__ = ("results",)
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[StepResult]
    def __init__(self, results: _Optional[_Iterable[_Union[StepResult, _Mapping]]] = ...) -> None: ...

class RunEnded(_message.Message):
    __slots__ = ("reason", "message", "ranks_died")
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RANKS_DIED_FIELD_NUMBER: _ClassVar[int]
    reason: str
    message: str
    ranks_died: bool
    def __init__(self, reason: _Optional[str] = ..., message: _Optional[str] = ..., ranks_died: bool = ...) -> None: ...

class StepResult(_message.Message):
    __slots__ = ("step", "epoch", "timing", "sequences", "positions", "tokens", "logprobs", "top_counts", "top_ids", "top_logprobs", "failed_sequences", "guess_counts", "guesses")
    STEP_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TOP_COUNTS_FIELD_NUMBER: _ClassVar[int]
    TOP_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FAILED_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    GUESS_COUNTS_FIELD_NUMBER: _ClassVar[int]
    GUESSES_FIELD_NUMBER: _ClassVar[int]
    step: int
    epoch: int
    timing: _types_pb2.StepTiming
    sequences: _containers.RepeatedScalarFieldContainer[int]
    positions: _containers.RepeatedScalarFieldContainer[int]
    tokens: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    top_counts: _containers.RepeatedScalarFieldContainer[int]
    top_ids: _containers.RepeatedScalarFieldContainer[int]
    top_logprobs: _containers.RepeatedScalarFieldContainer[float]
    failed_sequences: _containers.RepeatedScalarFieldContainer[int]
    guess_counts: _containers.RepeatedScalarFieldContainer[int]
    guesses: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, step: _Optional[int] = ..., epoch: _Optional[int] = ..., timing: _Optional[_Union[_types_pb2.StepTiming, _Mapping]] = ..., sequences: _Optional[_Iterable[int]] = ..., positions: _Optional[_Iterable[int]] = ..., tokens: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[float]] = ..., top_counts: _Optional[_Iterable[int]] = ..., top_ids: _Optional[_Iterable[int]] = ..., top_logprobs: _Optional[_Iterable[float]] = ..., failed_sequences: _Optional[_Iterable[int]] = ..., guess_counts: _Optional[_Iterable[int]] = ..., guesses: _Optional[_Iterable[int]] = ...) -> None: ...
