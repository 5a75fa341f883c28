from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PipelineState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PIPELINE_STATE_UNSPECIFIED: _ClassVar[PipelineState]
    PIPELINE_STATE_DOWN: _ClassVar[PipelineState]
    PIPELINE_STATE_FORMING: _ClassVar[PipelineState]
    PIPELINE_STATE_SERVING: _ClassVar[PipelineState]
    PIPELINE_STATE_DRAINING: _ClassVar[PipelineState]
PIPELINE_STATE_UNSPECIFIED: PipelineState
PIPELINE_STATE_DOWN: PipelineState
PIPELINE_STATE_FORMING: PipelineState
PIPELINE_STATE_SERVING: PipelineState
PIPELINE_STATE_DRAINING: PipelineState

class LayerRange(_message.Message):
    __slots__ = ("first", "last")
    FIRST_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    first: int
    last: int
    def __init__(self, first: _Optional[int] = ..., last: _Optional[int] = ...) -> None: ...

class ModelRef(_message.Message):
    __slots__ = ("name", "path", "fingerprint", "num_layers", "hidden_size", "dtype", "load_format", "seed", "draft", "deterministic", "repo", "commit", "quantization")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    LOAD_FORMAT_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    DRAFT_FIELD_NUMBER: _ClassVar[int]
    DETERMINISTIC_FIELD_NUMBER: _ClassVar[int]
    REPO_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    name: str
    path: str
    fingerprint: str
    num_layers: int
    hidden_size: int
    dtype: str
    load_format: str
    seed: int
    draft: DraftModel
    deterministic: bool
    repo: str
    commit: str
    quantization: str
    def __init__(self, name: _Optional[str] = ..., path: _Optional[str] = ..., fingerprint: _Optional[str] = ..., num_layers: _Optional[int] = ..., hidden_size: _Optional[int] = ..., dtype: _Optional[str] = ..., load_format: _Optional[str] = ..., seed: _Optional[int] = ..., draft: _Optional[_Union[DraftModel, _Mapping]] = ..., deterministic: bool = ..., repo: _Optional[str] = ..., commit: _Optional[str] = ..., quantization: _Optional[str] = ...) -> None: ...

class DraftModel(_message.Message):
    __slots__ = ("model", "num_tokens")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    model: ModelRef
    num_tokens: int
    def __init__(self, model: _Optional[_Union[ModelRef, _Mapping]] = ..., num_tokens: _Optional[int] = ...) -> None: ...

class RunLimits(_message.Message):
    __slots__ = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "page_size", "num_pages", "steps_in_flight", "gateways", "pipelines")
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_SEQS_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_BATCHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_PAGES_FIELD_NUMBER: _ClassVar[int]
    STEPS_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    GATEWAYS_FIELD_NUMBER: _ClassVar[int]
    PIPELINES_FIELD_NUMBER: _ClassVar[int]
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    page_size: int
    num_pages: int
    steps_in_flight: int
    gateways: int
    pipelines: int
    def __init__(self, max_model_len: _Optional[int] = ..., max_num_seqs: _Optional[int] = ..., max_num_batched_tokens: _Optional[int] = ..., page_size: _Optional[int] = ..., num_pages: _Optional[int] = ..., steps_in_flight: _Optional[int] = ..., gateways: _Optional[int] = ..., pipelines: _Optional[int] = ...) -> None: ...

class SamplingParams(_message.Message):
    __slots__ = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed", "top_logprobs", "logprobs", "min_tokens", "suppressed_ids", "bias_ids", "bias_values")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SUPPRESSED_IDS_FIELD_NUMBER: _ClassVar[int]
    BIAS_IDS_FIELD_NUMBER: _ClassVar[int]
    BIAS_VALUES_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    seed: int
    top_logprobs: int
    logprobs: bool
    min_tokens: int
    suppressed_ids: _containers.RepeatedScalarFieldContainer[int]
    bias_ids: _containers.RepeatedScalarFieldContainer[int]
    bias_values: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., seed: _Optional[int] = ..., top_logprobs: _Optional[int] = ..., logprobs: bool = ..., min_tokens: _Optional[int] = ..., suppressed_ids: _Optional[_Iterable[int]] = ..., bias_ids: _Optional[_Iterable[int]] = ..., bias_values: _Optional[_Iterable[float]] = ...) -> None: ...

class StepTiming(_message.Message):
    __slots__ = ("wait_input_us", "compute_us", "wait_send_us", "compute_cpu_us", "plan_arrived_us", "input_complete_us", "began_us", "output_us", "ended_us", "result_sent_us", "tokens", "draft_us")
    WAIT_INPUT_US_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_US_FIELD_NUMBER: _ClassVar[int]
    WAIT_SEND_US_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_CPU_US_FIELD_NUMBER: _ClassVar[int]
    PLAN_ARRIVED_US_FIELD_NUMBER: _ClassVar[int]
    INPUT_COMPLETE_US_FIELD_NUMBER: _ClassVar[int]
    BEGAN_US_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_US_FIELD_NUMBER: _ClassVar[int]
    ENDED_US_FIELD_NUMBER: _ClassVar[int]
    RESULT_SENT_US_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    DRAFT_US_FIELD_NUMBER: _ClassVar[int]
    wait_input_us: int
    compute_us: int
    wait_send_us: int
    compute_cpu_us: int
    plan_arrived_us: int
    input_complete_us: int
    began_us: int
    output_us: int
    ended_us: int
    result_sent_us: int
    tokens: int
    draft_us: int
    def __init__(self, wait_input_us: _Optional[int] = ..., compute_us: _Optional[int] = ..., wait_send_us: _Optional[int] = ..., compute_cpu_us: _Optional[int] = ..., plan_arrived_us: _Optional[int] = ..., input_complete_us: _Optional[int] = ..., began_us: _Optional[int] = ..., output_us: _Optional[int] = ..., ended_us: _Optional[int] = ..., result_sent_us: _Optional[int] = ..., tokens: _Optional[int] = ..., draft_us: _Optional[int] = ...) -> None: ...

class DeviceInfo(_message.Message):
    __slots__ = ("kind", "name", "memory_bytes", "flops_per_s", "bytes_per_s")
    KIND_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    FLOPS_PER_S_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    kind: str
    name: str
    memory_bytes: int
    flops_per_s: float
    bytes_per_s: float
    def __init__(self, kind: _Optional[str] = ..., name: _Optional[str] = ..., memory_bytes: _Optional[int] = ..., flops_per_s: _Optional[float] = ..., bytes_per_s: _Optional[float] = ...) -> None: ...

class TransportEndpoints(_message.Message):
    __slots__ = ("name", "rank_addresses")
    NAME_FIELD_NUMBER: _ClassVar[int]
    RANK_ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    name: str
    rank_addresses: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, name: _Optional[str] = ..., rank_addresses: _Optional[_Iterable[bytes]] = ...) -> None: ...

class StageView(_message.Message):
    __slots__ = ("stage", "worker_id", "address", "layers", "tp_size", "generation", "num_pages", "device", "route", "weight_bytes", "tensor_bytes_read", "protocol")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    TP_SIZE_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    NUM_PAGES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    ROUTE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    TENSOR_BYTES_READ_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    stage: int
    worker_id: str
    address: str
    layers: LayerRange
    tp_size: int
    generation: int
    num_pages: int
    device: DeviceInfo
    route: str
    weight_bytes: int
    tensor_bytes_read: int
    protocol: int
    def __init__(self, stage: _Optional[int] = ..., worker_id: _Optional[str] = ..., address: _Optional[str] = ..., layers: _Optional[_Union[LayerRange, _Mapping]] = ..., tp_size: _Optional[int] = ..., generation: _Optional[int] = ..., num_pages: _Optional[int] = ..., device: _Optional[_Union[DeviceInfo, _Mapping]] = ..., route: _Optional[str] = ..., weight_bytes: _Optional[int] = ..., tensor_bytes_read: _Optional[int] = ..., protocol: _Optional[int] = ...) -> None: ...

class PipelineView(_message.Message):
    __slots__ = ("pipeline_id", "epoch", "state", "reason", "model", "limits", "stages", "final", "next", "leaving")
    PIPELINE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    FINAL_FIELD_NUMBER: _ClassVar[int]
    NEXT_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    pipeline_id: str
    epoch: int
    state: PipelineState
    reason: str
    model: ModelRef
    limits: RunLimits
    stages: _containers.RepeatedCompositeFieldContainer[StageView]
    final: bool
    next: NextEpoch
    leaving: bool
    def __init__(self, pipeline_id: _Optional[str] = ..., epoch: _Optional[int] = ..., state: _Optional[_Union[PipelineState, str]] = ..., reason: _Optional[str] = ..., model: _Optional[_Union[ModelRef, _Mapping]] = ..., limits: _Optional[_Union[RunLimits, _Mapping]] = ..., stages: _Optional[_Iterable[_Union[StageView, _Mapping]]] = ..., final: bool = ..., next: _Optional[_Union[NextEpoch, _Mapping]] = ..., leaving: bool = ...) -> None: ...

class NextEpoch(_message.Message):
    __slots__ = ("epoch", "stages", "copies", "pipelines")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    COPIES_FIELD_NUMBER: _ClassVar[int]
    PIPELINES_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    stages: _containers.RepeatedCompositeFieldContainer[StageView]
    copies: _containers.RepeatedCompositeFieldContainer[KvCopy]
    pipelines: int
    def __init__(self, epoch: _Optional[int] = ..., stages: _Optional[_Iterable[_Union[StageView, _Mapping]]] = ..., copies: _Optional[_Iterable[_Union[KvCopy, _Mapping]]] = ..., pipelines: _Optional[int] = ...) -> None: ...

class KvCopy(_message.Message):
    __slots__ = ("index", "from_epoch", "from_stage", "to_stage", "layers")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    FROM_EPOCH_FIELD_NUMBER: _ClassVar[int]
    FROM_STAGE_FIELD_NUMBER: _ClassVar[int]
    TO_STAGE_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    index: int
    from_epoch: int
    from_stage: int
    to_stage: int
    layers: LayerRange
    def __init__(self, index: _Optional[int] = ..., from_epoch: _Optional[int] = ..., from_stage: _Optional[int] = ..., to_stage: _Optional[int] = ..., layers: _Optional[_Union[LayerRange, _Mapping]] = ...) -> None: ...

class WorkerView(_message.Message):
    __slots__ = ("worker_id", "address", "pool", "tp_size", "device", "state", "loaded_bytes", "total_bytes", "layers", "version", "any_stage")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    POOL_FIELD_NUMBER: _ClassVar[int]
    TP_SIZE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    LOADED_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ANY_STAGE_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    address: str
    pool: int
    tp_size: int
    device: DeviceInfo
    state: str
    loaded_bytes: int
    total_bytes: int
    layers: LayerRange
    version: str
    any_stage: bool
    def __init__(self, worker_id: _Optional[str] = ..., address: _Optional[str] = ..., pool: _Optional[int] = ..., tp_size: _Optional[int] = ..., device: _Optional[_Union[DeviceInfo, _Mapping]] = ..., state: _Optional[str] = ..., loaded_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ..., layers: _Optional[_Union[LayerRange, _Mapping]] = ..., version: _Optional[str] = ..., any_stage: bool = ...) -> None: ...

class Rebalance(_message.Message):
    __slots__ = ("pipeline_id", "epoch", "before_us", "expected_us", "after_us")
    PIPELINE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    BEFORE_US_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_US_FIELD_NUMBER: _ClassVar[int]
    AFTER_US_FIELD_NUMBER: _ClassVar[int]
    pipeline_id: str
    epoch: int
    before_us: int
    expected_us: int
    after_us: int
    def __init__(self, pipeline_id: _Optional[str] = ..., epoch: _Optional[int] = ..., before_us: _Optional[int] = ..., expected_us: _Optional[int] = ..., after_us: _Optional[int] = ...) -> None: ...

class MeshView(_message.Message):
    __slots__ = ("pipelines", "workers", "stale_refused", "wanted_counts", "given_up", "rebalances", "advice")
    class StaleRefusedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    PIPELINES_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    STALE_REFUSED_FIELD_NUMBER: _ClassVar[int]
    WANTED_COUNTS_FIELD_NUMBER: _ClassVar[int]
    GIVEN_UP_FIELD_NUMBER: _ClassVar[int]
    REBALANCES_FIELD_NUMBER: _ClassVar[int]
    ADVICE_FIELD_NUMBER: _ClassVar[int]
    pipelines: _containers.RepeatedCompositeFieldContainer[PipelineView]
    workers: _containers.RepeatedCompositeFieldContainer[WorkerView]
    stale_refused: _containers.ScalarMap[str, int]
    wanted_counts: _containers.RepeatedScalarFieldContainer[int]
    given_up: str
    rebalances: _containers.RepeatedCompositeFieldContainer[Rebalance]
    advice: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, pipelines: _Optional[_Iterable[_Union[PipelineView, _Mapping]]] = ..., workers: _Optional[_Iterable[_Union[WorkerView, _Mapping]]] = ..., stale_refused: _Optional[_Mapping[str, int]] = ..., wanted_counts: _Optional[_Iterable[int]] = ..., given_up: _Optional[str] = ..., rebalances: _Optional[_Iterable[_Union[Rebalance, _Mapping]]] = ..., advice: _Optional[_Iterable[str]] = ...) -> None: ...
