"""Settings of every service: flags > environment (`STAGEMESH_*`) > YAML file > defaults.

Each service has one frozen model; unknown keys are refused and errors name the field. Flags are vLLM's where
vLLM has one.
`flags(...)` in a field's extra lists short spellings beside `--field-name`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from stagemesh.errors import ConfigError

from .speculative_config import SpeculativeConfig, parse_json

DEMO_MODEL = Path(__file__).parent / "demo_model"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def flags(*short: str) -> dict[str, Any]:
    """Extra spellings of a field on the command line."""
    return {"flags": list(short)}


def _split_ints(value: Any) -> Any:
    """`"2,1"` and `2` as well as `[2, 1]`: what a command line, a YAML file and an environment variable can say."""
    if isinstance(value, int):
        return [value]
    if isinstance(value, str):
        try:
            return [int(part) for part in value.split(",") if part.strip()]
        except ValueError:
            raise ValueError(f"{value!r} is not a comma-separated list of whole numbers, such as 5,7") from None
    return value


class Base(BaseModel):
    """What all settings share: frozen, unknown keys refused, docstrings below fields become descriptions."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())


class TimeScale(Base):
    """The pace of a service (stagemesh/timing.py)."""

    time_scale: float = Field(1.0, gt=0, le=100)
    """All time-outs and pauses that the service keeps within itself, times this: above 1 for slow machines."""


class Loopback(TimeScale):
    """A bind address that stays on this machine unless told otherwise."""

    host: str = "127.0.0.1"
    """Address to bind. Anything but loopback needs --insecure: traffic is not encrypted yet."""
    insecure: bool = False
    """Allow listening beyond loopback without encryption."""

    @model_validator(mode="after")
    def _loopback_unless_insecure(self) -> Loopback:
        if self.host not in LOOPBACK and not self.insecure:
            raise ValueError(
                f"host {self.host} is reachable from other machines and traffic is not encrypted; "
                "use a loopback address, or add --insecure on a network that you trust"
            )
        return self


class ListenSettings(Loopback):
    """Where a service listens and how others reach it."""

    advertise_host: str | None = None
    """Address that others are told, where it differs from `host` (a pod's IP, a NAT)."""

    @property
    def reachable_host(self) -> str:
        """The host part of the address that others are told."""
        return self.advertise_host or self.host


class ModelSettings(Base):
    """Which model, and the bounds it is served with."""

    model: str = str(DEMO_MODEL)
    """Directory of a Hugging Face checkpoint (config.json, *.safetensors, tokenizer.json); default: the small model
    that ships with the package."""
    served_model_name: str | None = None
    """Name that clients use; default: the directory's name."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Element type of weights, activations and KV; auto takes the checkpoint's."""
    load_format: Literal["auto", "dummy"] = "auto"
    """dummy makes seeded random weights without reading any."""
    seed: int = Field(0, ge=0)
    """Seed of dummy weights."""
    max_model_len: int | None = Field(None, ge=2)
    """Longest sequence, prompt and output together; default: the model's, at most 4096 on a CPU."""
    max_num_seqs: int = Field(32, ge=1, le=4096)
    """Most sequences that run at once."""
    max_num_batched_tokens: int = Field(512, ge=1, le=65536)
    """Most tokens of one step; longer prompts go in chunks."""
    block_size: int = Field(16, ge=1, le=1024)
    """Token positions of one KV page."""
    num_kv_pages: int | None = Field(None, ge=1)
    """KV pages of each stage; default: from the memory there is."""
    deterministic: bool = False
    """The same tokens, bit for bit, whatever else is served meanwhile and after any recovery. Costs nothing with the
    compiled kernels; models without them are computed token by token."""

    @property
    def name(self) -> str:
        """The served name."""
        if self.served_model_name:
            return self.served_model_name
        return "stagemesh-demo" if self.model == str(DEMO_MODEL) else Path(self.model).resolve().name


class CoordinatorSettings(ListenSettings, ModelSettings):
    """The coordinator."""

    port: int = Field(50050, ge=0, le=65535)
    """gRPC port; 0 asks the system for one."""
    pipeline_parallel_size: int = Field(1, ge=1, json_schema_extra=flags("-pp"))
    """Number of stages."""
    layer_partition: list[int] | None = None
    """Layers of each stage, such as 5,7; default: chosen by the cost model."""
    rebalance: Literal["off", "auto"] = "off"
    """auto: layers move between stages by themselves when measured steps would be a tenth faster for it."""
    takeover_after: float = Field(15.0, ge=0)
    """Seconds after which the other stages' workers take a lost stage's layers over, where nobody else does."""
    transport: Literal["auto", "ucx", "tcp"] = "auto"
    """What links are made of; auto takes UCX where both ends have it."""
    state_dir: str | None = None
    """Folder of the SQLite file that keeps epochs; default: epochs are kept in memory only."""
    kubernetes_lease: str | None = None
    """Name of a Lease in this pod's namespace: the coordinator that holds it is the leader; default: the lock of
    --state-dir decides."""
    kubernetes_account: str = "/var/run/secrets/kubernetes.io/serviceaccount"
    """Folder of the service account's token, ca.crt and namespace."""
    lease_duration: float = Field(15.0, ge=1)
    """Seconds after which a Lease that is not renewed may be taken."""
    lease_identity: str | None = None
    """Whom the Lease names, such as the pod's UID; default: one for this process."""
    steps_in_flight: int | None = Field(None, ge=1, le=64)
    """Batches that decode rows are spread over, and so the steps that run at once; default: the number of stages, and
    from four on one more."""
    gateways: int = Field(1, ge=1, le=64)
    """Gateways that share the KV pages; each is granted an equal range."""
    speculative_config: SpeculativeConfig | None = None
    """Speculative decoding by a draft model on the last stage, as JSON: method (draft_model), model,
    num_speculative_tokens; default: off."""

    _ints = field_validator("layer_partition", mode="before")(_split_ints)
    _json = field_validator("speculative_config", mode="before")(parse_json)

    @field_validator("speculative_config")
    @classmethod
    def _is_a_model(cls, value: SpeculativeConfig | None) -> SpeculativeConfig | None:
        if value is not None and value.method != "draft_model":
            raise ValueError(f"method {value.method} guesses in the gateway: give it to the gateway")
        return value


class StageSettings(ListenSettings):
    """One stage worker."""

    coordinator: str = "127.0.0.1:50050"
    """Where the coordinator listens."""
    port: int = Field(0, ge=0, le=65535)
    """gRPC port; 0 asks the system for one."""
    worker_id: str | None = None
    """Stable name of this worker; default: host name and process id."""
    stage: int | None = Field(None, ge=0)
    """Stage this worker is pooled for; default: any."""
    any_stage: bool = False
    """Where another worker holds --stage, this one may stand in for any."""
    tensor_parallel_size: int = Field(1, ge=1, le=64, json_schema_extra=flags("-tp"))
    """Ranks of this worker."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where it is there."""
    model: str | None = None
    """Directory of the checkpoint on this machine, where it differs from the coordinator's."""
    transport: Literal["auto", "ucx", "tcp"] = "auto"
    """Transports to open: auto opens UCX, where installed, and TCP."""
    ucx_tls: str | None = None
    """UCX_TLS of the ranks, such as "tcp" or "rc,cuda"; default: UCX chooses."""
    net_device: str | None = None
    """Network device of UCX (UCX_NET_DEVICES), such as "eth0" or "mlx5_0:1"."""
    kv_cache_gib: float | None = Field(None, gt=0)
    """Memory for KV pages of one rank; default: a quarter of what is free on a CPU, the rest of
    --gpu-memory-utilization on CUDA."""
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    """Share of a card's memory that may be used."""
    journal_gib: float = Field(1.0, ge=0)
    """Memory of one rank for activations that it sent, so that a lost neighbour can be refilled; 0: none, and the
    stages before a lost one compute again."""
    enforce_eager: bool = False
    """Run transformers' modules as they are, without compiled kernels."""
    threads: int | None = Field(None, ge=1)
    """Compute threads of one rank on a CPU; default: the machine's cores, shared among the ranks `serve` starts."""
    cpu_list: str | None = None
    """Cores to pin the ranks to, one group a rank, such as "0|1"; default: not pinned."""
    idle_cpu_list: str | None = None
    """Cores of other workers on this machine, one group a rank, such as "1|0": used besides by steps beside which
    nothing else computes, as when one stream decodes; default: none."""
    drain_timeout: float = Field(30.0, ge=0)
    """Seconds that SIGTERM gives running requests to finish."""


class GatewaySettings(ListenSettings):
    """The gateway."""

    coordinator: str = "127.0.0.1:50050"
    """Where the coordinator listens."""
    port: int = Field(8000, ge=0, le=65535)
    """HTTP port; 0 asks the system for one."""
    grpc_port: int = Field(50051, ge=0, le=65535)
    """gRPC port; 0 asks the system for one."""
    gateway_id: str = "gateway-0"
    """Stable name of this gateway."""
    model: str | None = None
    """Directory of the checkpoint (config and tokenizer) on this machine, where it differs from the coordinator's."""
    api_key: str | None = None
    """Key that clients must send as `Authorization: Bearer`."""
    enable_prefix_caching: bool = True
    """Keep the KV of full pages as long as memory lasts, so that a prompt that begins alike is not computed again."""
    speculative_config: SpeculativeConfig | None = None
    """Speculative decoding by prompt lookup, as JSON: method (ngram), num_speculative_tokens, prompt_lookup_max,
    prompt_lookup_min; default: off."""
    max_waiting: int = Field(256, ge=0)
    """Requests that may wait for admission; beyond it, 429."""
    request_timeout: float = Field(600.0, gt=0)
    """Longest life of a request in seconds; a client may ask for less."""
    max_body_mib: float = Field(8.0, gt=0)
    """Largest HTTP body."""
    drain_timeout: float = Field(30.0, ge=0)
    """Seconds that SIGTERM gives running requests to finish."""
    recovery_deadline: float = Field(60.0, ge=0)
    """Seconds that running requests wait for a lost stage to be made good; then they end with STAGE_LOST."""
    token_log: str | None = None
    """Folder in which streams are written down, so that a client can resume them at any gateway that shares it."""

    _json = field_validator("speculative_config", mode="before")(parse_json)

    @field_validator("speculative_config")
    @classmethod
    def _is_lookup(cls, value: SpeculativeConfig | None) -> SpeculativeConfig | None:
        if value is not None and value.method != "ngram":
            raise ValueError(f"method {value.method} guesses on the last stage: give it to the coordinator")
        return value


class ServeSettings(Loopback, ModelSettings):
    """`stagemesh serve`: a whole mesh on this machine; `host` is the front's, the rest stays on loopback."""

    port: int = Field(8000, ge=0, le=65535)
    """HTTP port; 0 asks the system for one."""
    grpc_port: int = Field(0, ge=0, le=65535)
    """gRPC port of the gateway; 0 asks the system for one."""
    api_key: str | None = None
    """Key that clients must send."""
    pipeline_parallel_size: int = Field(1, ge=1, le=64, json_schema_extra=flags("-pp"))
    """Number of stages."""
    tensor_parallel_size: list[int] = Field(default=[1], json_schema_extra=flags("-tp"))
    """Ranks of each stage: one number for all, or one a stage, such as 2,1."""
    layer_partition: list[int] | None = None
    """Layers of each stage, such as 5,7."""
    rebalance: Literal["off", "auto"] = "off"
    """auto: layers move between stages by themselves when measured steps would be a tenth faster for it."""
    takeover_after: float = Field(15.0, ge=0)
    """Seconds after which the other stages' workers take a lost stage's layers over, where nobody else does."""
    transport: Literal["auto", "ucx", "tcp"] = "auto"
    """What links are made of."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where it is there."""
    standby: int = Field(0, ge=0, le=16)
    """Extra workers that hold no stage until one is lost."""
    kv_cache_gib: float | None = Field(None, gt=0)
    """Memory for KV pages of one rank."""
    journal_gib: float = Field(1.0, ge=0)
    """Memory of one rank for activations that it sent, so that a lost neighbour can be refilled."""
    recovery_deadline: float = Field(60.0, ge=0)
    """Seconds that running requests wait for a lost stage to be made good."""
    token_log: str | None = None
    """Folder in which streams are written down, so that a client can resume them."""
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    """Share of a card's memory that may be used."""
    enforce_eager: bool = False
    """Run transformers' modules as they are, without compiled kernels."""
    steps_in_flight: int | None = Field(None, ge=1, le=64)
    """Batches that decode rows are spread over, and so the steps that run at once; default: the number of stages, and
    from four on one more."""
    enable_prefix_caching: bool = True
    """Keep the KV of full pages as long as memory lasts, so that a prompt that begins alike is not computed again."""
    speculative_config: SpeculativeConfig | None = None
    """Speculative decoding, as JSON: method (ngram or draft_model), num_speculative_tokens; prompt_lookup_max and
    prompt_lookup_min, or model; default: off."""
    max_waiting: int = Field(256, ge=0)
    """Requests that may wait for admission."""
    request_timeout: float = Field(600.0, gt=0)
    """Longest life of a request in seconds."""
    drain_timeout: float = Field(2.0, ge=0)
    """Seconds that running requests get to finish when `serve` is stopped; 2 keeps the whole stop under 5 s."""
    start_timeout: float = Field(600.0, gt=0)
    """Seconds until a mesh that is not ready is given up."""

    _ints = field_validator("layer_partition", "tensor_parallel_size", mode="before")(_split_ints)
    _json = field_validator("speculative_config", mode="before")(parse_json)

    @model_validator(mode="after")
    def _sizes_agree(self) -> ServeSettings:
        pp, tp = self.pipeline_parallel_size, self.tensor_parallel_size
        if any(size < 1 for size in tp) or len(tp) not in (1, pp):
            raise ValueError(
                f"tensor_parallel_size {tp} must be one positive number, or one for each of the {pp} stages"
            )
        return self

    @property
    def tp_sizes(self) -> list[int]:
        """Ranks of each stage."""
        tp = self.tensor_parallel_size
        return tp * self.pipeline_parallel_size if len(tp) == 1 else tp


S = TypeVar("S", bound=Base)


def device_kind(wanted: str) -> str:
    """`cpu` or `cuda`, of --device. The CUDA driver is asked by its device node: importing torch would cost seconds.

    Raises:
        ConfigError: CUDA is wanted, and there is none.
    """
    there = sys.platform == "linux" and os.path.exists("/dev/nvidiactl")
    if wanted == "cuda" and not there:
        raise ConfigError("--device cuda: this machine has no CUDA device; use --device cpu or auto")
    return "cuda" if wanted != "cpu" and there else "cpu"


def load(cls: type[S], *, file: str | None, env: Mapping[str, str] = os.environ, given: Mapping[str, Any]) -> S:
    """Settings of class `cls` from flags `given`, then `env`, then the YAML `file`.

    Raises ConfigError that names each wrong field, where it came from, and what it should be.
    """
    values: dict[str, Any] = {}
    if file is not None:
        try:
            values = yaml.safe_load(Path(file).read_text()) or {}
        except (OSError, yaml.YAMLError) as e:
            raise ConfigError(f"cannot read settings from {file}: {e}") from e
        if not isinstance(values, dict):
            raise ConfigError(f"{file} must hold `key: value` lines, not a {type(values).__name__}")
    origin = dict.fromkeys(values, f"in {file}")
    for key in cls.model_fields:
        variable = "STAGEMESH_" + key.upper()
        if variable in env:
            values[key], origin[key] = env[variable], f"in ${variable}"
    for key, value in given.items():
        values[key], origin[key] = value, f"in --{key.replace('_', '-')}"
    try:
        return cls.model_validate(values)
    except ValidationError as e:
        raise ConfigError("\n".join(_explain(error, origin, cls) for error in e.errors())) from e


def _explain(error: Any, origin: Mapping[str, str], cls: type[Base]) -> str:
    key = str(error["loc"][0]) if error["loc"] else ""
    path = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        known = SpeculativeConfig if key == "speculative_config" else cls
        return f"unknown setting {path!r} {origin.get(key, '')}; known: {', '.join(sorted(known.model_fields))}"
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{path} {origin.get(key, '')}: {message}".strip() if key else message
