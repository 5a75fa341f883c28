"""Pydantic models of the chart's values, the source of `values.schema.json`.

The services' settings come from `stagemesh.settings`, without those that the chart sets.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model
from pydantic.alias_generators import to_camel

from stagemesh.settings.base import Base
from stagemesh.settings.coordinator import CoordinatorSettings
from stagemesh.settings.gateway import GatewaySettings
from stagemesh.settings.stage import StageSettings

NETWORK = ("host", "port", "advertise_host", "insecure")
OWNED = {
    CoordinatorSettings: (
        *NETWORK,
        "model",
        "revision",
        "pipeline_parallel_size",
        "state_dir",
        "kubernetes_lease",
        "kubernetes_account",
        "lease_identity",
    ),
    GatewaySettings: (*NETWORK, "grpc_port", "coordinator", "gateway_id", "api_key", "model", "revision"),
    StageSettings: (*NETWORK, "coordinator", "worker_id", "stage", "tensor_parallel_size", "model", "revision"),
}
"""Settings that the chart derives from other values, so that they cannot contradict them."""

Map = dict[str, Any]


def _open_settings(cls: type[Base]) -> Any:
    """Makes `cls` without the settings that the chart owns."""
    fields: dict[str, Any] = {
        name: (field.annotation, field) for name, field in cls.model_fields.items() if name not in OWNED[cls]
    }
    return create_model(cls.__name__, __base__=Base, __doc__=f"{cls.__doc__} Keys as in its YAML file.", **fields)


class Values(BaseModel):
    """Base of all parts: keys are camelCase, unknown keys are refused, docstrings below fields become descriptions."""

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), alias_generator=to_camel
    )


class Image(Values):
    """The container image of every pod."""

    repository: str = Field(default="stagemesh", min_length=1)
    """Repository of the image, without a tag."""
    tag: str = ""
    """Tag of the image; default: the chart's appVersion."""
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """When the node pulls the image."""


class TokenSecret(Values):
    """The Secret with a token of the hub."""

    name: str = ""
    """Name of the Secret; default: no token."""
    key: str = Field(default="token", min_length=1)
    """Key of the entry in the Secret."""


class HubCache(Values):
    """The volume for files that are fetched from the hub."""

    mount_path: str = Field(default="/cache", pattern="^/[^/].*$")
    """Path at which it is mounted in every pod (HF_HOME)."""
    volume: Map = {}
    """A Kubernetes volume source that pods can write to; default: an emptyDir, which ends with its pod."""


class Hub(Values):
    """A model on a Hugging Face hub, of which each pod fetches its part."""

    id: str = Field(default="", pattern=r"^([A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*)?$")
    """Id of the model, such as org/name; default: model.path."""
    revision: str = ""
    """Branch, tag or commit; default: main, as it is when the coordinator first starts."""
    endpoint: str = Field(default="", pattern="^(https?://.+)?$")
    """Address of another hub or mirror (HF_ENDPOINT)."""
    token_secret: TokenSecret = Field(default_factory=TokenSecret)
    """The Secret with a token, for private and gated models (HF_TOKEN)."""
    cache: HubCache = Field(default_factory=HubCache)
    """The volume for fetched files."""


class Model(Values):
    """The checkpoint, and the source of its files."""

    path: str = ""
    """Directory of the checkpoint inside the pods, such as /models/my-model; default: the small demo model that is
    part of the image."""
    mount_path: str = Field(default="/models", pattern="^/[^/].*$")
    """Path at which the volume is mounted, read-only, in every pod."""
    volume: Map = {}
    """A Kubernetes volume source, such as persistentVolumeClaim: {claimName: models, readOnly: true}. Pods on several
    nodes need one that many nodes can read."""
    hub: Hub = Field(default_factory=Hub)
    """A model on a Hugging Face hub, in place of a volume with its files."""


class ApiKey(Values):
    """The key that clients must send."""

    enabled: bool = True
    """Whether the gateway asks for a key."""
    existing_secret: str = ""
    """Name of a Secret that holds the key; default: the chart makes one."""
    secret_key: str = Field(default="api-key", min_length=1)
    """Key of the entry in the Secret."""
    value: str = ""
    """The key for the Secret that the chart makes; default: a random one, kept over upgrades."""


class Resources(Values):
    """Requests and limits of one container."""

    requests: dict[str, str | int | float] = {}
    """Resources that the scheduler reserves."""
    limits: dict[str, str | int | float] = {}
    """Resources that the container may use at most."""


class Pods(Values):
    """Options of the pods of one service."""

    resources: Resources = Field(default_factory=Resources)
    """Requests and limits of the container."""
    image_tag: str = ""
    """Tag of the image for this service only; default: image.tag."""
    env: list[Map] = []
    """Additional environment variables, as in a Kubernetes container."""
    pod_annotations: dict[str, str] = {}
    """Annotations of the pods."""
    pod_labels: dict[str, str] = {}
    """Additional labels of the pods."""
    node_selector: dict[str, str] = {}
    """Labels that a node must have."""
    tolerations: list[Map] = []
    """Taints that the pods tolerate."""
    affinity: Map = {}
    """Kubernetes affinity of the pods."""
    topology_spread_constraints: list[Map] = []
    """Rules for the distribution of the pods over nodes."""
    priority_class_name: str = ""
    """Priority class of the pods."""


class Persistence(Values):
    """Storage of the coordinator's state."""

    enabled: bool = True
    """Use a volume claim; false: an emptyDir, which lives as long as the pod."""
    size: str = "1Gi"
    """Size of the claim; the state takes kilobytes."""
    storage_class: str = ""
    """Storage class of the claim; default: the cluster's."""


class Lease(Values):
    """A Kubernetes Lease, which ensures that there is only one coordinator."""

    enabled: bool = False
    """Use the Lease: the coordinator ends if it cannot renew it, for example on a node that is cut off and whose pod
    was deleted by force. Its service account may then read and write Leases."""


class Coordinator(Pods):
    """The coordinator."""

    settings: _open_settings(CoordinatorSettings) = Field(default_factory=dict)  # type: ignore[valid-type]
    """Settings of the coordinator and of the model, keys as in its YAML file."""
    persistence: Persistence = Field(default_factory=Persistence)
    """Storage of the coordinator's state."""
    lease: Lease = Field(default_factory=Lease)
    """A Kubernetes Lease, which ensures that there is only one coordinator."""


class Service(Values):
    """The Service by which clients reach the gateway."""

    type: Literal["ClusterIP", "NodePort", "LoadBalancer"] = "ClusterIP"
    """Type of the Service."""
    http_port: int = Field(default=8000, ge=1, le=65535)
    """Port of the OpenAI API."""
    grpc_port: int = Field(default=50051, ge=1, le=65535)
    """Port of the gRPC API."""
    annotations: dict[str, str] = {}
    """Annotations of the Service."""


class Gateway(Pods):
    """The gateway."""

    replicas: int = Field(default=1, ge=0, le=1)
    """Number of gateways, at most one: the chart gives all KV pages to one gateway."""
    settings: _open_settings(GatewaySettings) = Field(default_factory=dict)  # type: ignore[valid-type]
    """Settings of the gateway, keys as in its YAML file."""
    service: Service = Field(default_factory=Service)
    """The Service by which clients reach the gateway."""


class Stage(Pods):
    """One stage: a pool of workers, each a pod."""

    replicas: int = Field(default=1, ge=0)
    """Number of workers of this stage; all serve, each in a pipeline that shares the stages with fewer workers."""
    tensor_parallel_size: int = Field(default=1, ge=1, le=64)
    """Ranks of each worker; with GPUs, the number of nvidia.com/gpu in resources.limits."""
    settings: _open_settings(StageSettings) = Field(default_factory=dict)  # type: ignore[valid-type]
    """Settings of the stage's workers, keys as in their YAML file."""
    shm_size: str = "1Gi"
    """Size of /dev/shm, which the ranks of a worker share. Its used part counts towards the memory limit."""
    runtime_class_name: str = ""
    """Runtime class, such as nvidia."""
    model_volume: Map = {}
    """Volume source for this stage, if it differs from model.volume."""
    cache_volume: Map = {}
    """Volume source for files from the hub for this stage, if it differs from model.hub.cache.volume."""


class NetworkPolicy(Values):
    """The peers that may open connections to the pods."""

    enabled: bool = False
    """Restrict connections: only pods of this release may reach coordinator and stages."""
    clients: list[Map] = []
    """Peers that may reach the gateway, as in a NetworkPolicy's `from`; default: all."""


class PodDisruptionBudget(Values):
    """The number of workers of a stage that a node drain may take at once."""

    enabled: bool = False
    """Make one budget for each stage."""
    max_unavailable: int | str = 1
    """A number of pods or a share, such as 50%."""


class ServiceAccount(Values):
    """The service account of all pods. Only a coordinator with a Lease gets its token."""

    create: bool = True
    """Create the service account; false: use `name`."""
    name: str = ""
    """Name of the service account; default: the release's full name, or `default` if none is created."""
    annotations: dict[str, str] = {}
    """Annotations of the service account."""


class SecurityContext(Values):
    """User of every container. The rest (no root, no capabilities, read-only root, seccomp) is fixed."""

    run_as_user: int = Field(default=10001, ge=1)
    """User id; it must be able to read the model."""
    run_as_group: int = Field(default=10001, ge=1)
    """Group id; the coordinator's state volume is made writable for it."""


class ChartValues(Values):
    """Values of the stagemesh chart."""

    name_override: str = Field(default="", max_length=40)
    """Replaces the chart's name in names and labels."""
    fullname_override: str = Field(default="", max_length=40)
    """Replaces the whole prefix of names."""
    image: Image = Field(default_factory=Image)
    """The container image of every pod."""
    image_pull_secrets: list[Map] = []
    """Secrets for pulling the image, such as [{name: pull}]."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Log level of the services."""
    startup_timeout_seconds: int = Field(default=600, ge=5)
    """Seconds until a container's probe must answer, before Kubernetes restarts it."""
    model: Model = Field(default_factory=Model)
    """The checkpoint, and the source of its files."""
    api_key: ApiKey = Field(default_factory=ApiKey)
    """The key that clients must send."""
    coordinator: Coordinator = Field(default_factory=Coordinator)
    """The coordinator."""
    gateway: Gateway = Field(default_factory=Gateway)
    """The gateway."""
    stages: list[Stage] = Field(min_length=1, max_length=64)
    """The stages in order. Their number is the pipeline's length."""
    standbys: list[Stage] = Field(default=[], max_length=64)
    """Workers without a stage, which replace any lost worker."""
    network_policy: NetworkPolicy = Field(default_factory=NetworkPolicy)
    """The peers that may open connections to the pods."""
    pod_disruption_budget: PodDisruptionBudget = Field(default_factory=PodDisruptionBudget)
    """The number of workers of a stage that a node drain may take at once."""
    service_account: ServiceAccount = Field(default_factory=ServiceAccount)
    """The service account of all pods."""
    security_context: SecurityContext = Field(default_factory=SecurityContext)
    """User of every container."""
    global_: Map = Field(default={}, alias="global")
    """Helm's global values, if this chart is part of another."""
