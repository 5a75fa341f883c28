"""Pydantic models of the chart's values, from which `values.schema.json` is made.

The services' settings come from `stagemesh.settings`, without those that the chart itself sets.
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
        "pipeline_parallel_size",
        "state_dir",
        "kubernetes_lease",
        "kubernetes_account",
        "lease_identity",
    ),
    GatewaySettings: (*NETWORK, "grpc_port", "coordinator", "gateway_id", "api_key", "model"),
    StageSettings: (*NETWORK, "coordinator", "worker_id", "stage", "tensor_parallel_size", "model"),
}
"""Settings that the chart derives from other values, so that they cannot contradict them."""

Map = dict[str, Any]


def _open_settings(cls: type[Base]) -> Any:
    """`cls` without the settings that the chart owns."""
    fields: dict[str, Any] = {
        name: (field.annotation, field) for name, field in cls.model_fields.items() if name not in OWNED[cls]
    }
    return create_model(cls.__name__, __base__=Base, __doc__=f"{cls.__doc__} Keys as in its YAML file.", **fields)


class Values(BaseModel):
    """What all parts share: camelCase keys, unknown ones refused, docstrings below fields become descriptions."""

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), alias_generator=to_camel
    )


class Image(Values):
    """The container image of every pod."""

    repository: str = Field(default="stagemesh", min_length=1)
    """Where the image is, without a tag."""
    tag: str = ""
    """Default: the chart's appVersion."""
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """When the node pulls it."""


class Model(Values):
    """Which checkpoint, and where its files come from."""

    path: str = ""
    """Directory of the checkpoint inside the pods, such as /models/my-model; default: the small demo model that is
    part of the image."""
    mount_path: str = Field(default="/models", pattern="^/[^/].*$")
    """Where the volume is mounted, read-only, in every pod."""
    volume: Map = {}
    """A Kubernetes volume source, such as persistentVolumeClaim: {claimName: models, readOnly: true}. Pods on several
    nodes need one that many nodes can read."""


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
    """What the scheduler sets aside."""
    limits: dict[str, str | int | float] = {}
    """What the container may use at most."""


class Pods(Values):
    """What the pods of one service can be told."""

    resources: Resources = Field(default_factory=Resources)
    """Requests and limits of the container."""
    image_tag: str = ""
    """Tag of the image for this service alone; default: image.tag."""
    env: list[Map] = []
    """More environment variables, as in a Kubernetes container."""
    pod_annotations: dict[str, str] = {}
    """Annotations of the pods."""
    pod_labels: dict[str, str] = {}
    """More labels of the pods."""
    node_selector: dict[str, str] = {}
    """Labels that a node must have."""
    tolerations: list[Map] = []
    """Taints that the pods put up with."""
    affinity: Map = {}
    """Kubernetes affinity."""
    topology_spread_constraints: list[Map] = []
    """How the pods spread over nodes."""
    priority_class_name: str = ""
    """Priority class."""


class Persistence(Values):
    """Where epochs are kept."""

    enabled: bool = True
    """A volume claim; false: an emptyDir, which lives as long as the pod."""
    size: str = "1Gi"
    """Size of the claim; the state itself takes kilobytes."""
    storage_class: str = ""
    """Default: the cluster's."""


class Lease(Values):
    """A Kubernetes Lease by which a coordinator knows that it is the only one."""

    enabled: bool = False
    """With it the coordinator ends when it can no longer renew the Lease, such as on a node that is cut off and whose
    pod was deleted by force. Its service account may then read and write Leases."""


class Coordinator(Pods):
    """The one coordinator."""

    settings: _open_settings(CoordinatorSettings) = Field(default_factory=dict)  # type: ignore[valid-type]
    """Settings of the coordinator and of the model, keys as in its YAML file."""
    persistence: Persistence = Field(default_factory=Persistence)
    """Where epochs are kept."""
    lease: Lease = Field(default_factory=Lease)
    """A Kubernetes Lease by which a coordinator knows that it is the only one."""


class Service(Values):
    """How clients reach the gateway."""

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
    """One: the chart gives all KV pages to one gateway."""
    settings: _open_settings(GatewaySettings) = Field(default_factory=dict)  # type: ignore[valid-type]
    """Settings of the gateway, keys as in its YAML file."""
    service: Service = Field(default_factory=Service)
    """How clients reach it."""


class Stage(Pods):
    """One stage: a pool of workers, each a pod."""

    replicas: int = Field(default=1, ge=0)
    """Workers of this stage; all of them serve, each on a pipeline that shares the stages with fewer."""
    tensor_parallel_size: int = Field(default=1, ge=1, le=64)
    """Ranks of each worker; with GPUs, as many as resources.limits has of nvidia.com/gpu."""
    settings: _open_settings(StageSettings) = Field(default_factory=dict)  # type: ignore[valid-type]
    """Settings of the stage's workers, keys as in their YAML file."""
    shm_size: str = "1Gi"
    """Size of /dev/shm, which the ranks of a worker share. Counts towards the memory limit when used."""
    runtime_class_name: str = ""
    """Runtime class, such as nvidia."""
    model_volume: Map = {}
    """Volume source for this stage where it differs from model.volume."""


class NetworkPolicy(Values):
    """Who may open connections to the pods."""

    enabled: bool = False
    """Coordinator and stages: only pods of this release."""
    clients: list[Map] = []
    """Peers that may reach the gateway, as in a NetworkPolicy's `from`; default: all."""


class PodDisruptionBudget(Values):
    """How many workers of a stage a node drain may take at once."""

    enabled: bool = False
    """One budget a stage."""
    max_unavailable: int | str = 1
    """A number of pods or a share, such as 50%."""


class ServiceAccount(Values):
    """The service account of all pods. No pod gets its token: nothing here asks the Kubernetes API."""

    create: bool = True
    """Make one; false: use `name`."""
    name: str = ""
    """Default: the release's full name, or `default` where none is made."""
    annotations: dict[str, str] = {}
    """Annotations of the service account."""


class SecurityContext(Values):
    """User of every container; the rest (no root, no capabilities, read-only root, seccomp) is not a choice."""

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
    """Secrets for pulling it, such as [{name: pull}]."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """What the services log."""
    startup_timeout_seconds: int = Field(default=600, ge=5)
    """How long a container may take until its probe answers, before Kubernetes starts it anew."""
    model: Model = Field(default_factory=Model)
    """Which checkpoint, and where its files come from."""
    api_key: ApiKey = Field(default_factory=ApiKey)
    """The key that clients must send."""
    coordinator: Coordinator = Field(default_factory=Coordinator)
    """The coordinator."""
    gateway: Gateway = Field(default_factory=Gateway)
    """The gateway."""
    stages: list[Stage] = Field(min_length=1, max_length=64)
    """The stages in order; their number is the pipeline's length."""
    standbys: list[Stage] = Field(default=[], max_length=64)
    """Workers that no stage has of its own, which take the place of any that is lost."""
    network_policy: NetworkPolicy = Field(default_factory=NetworkPolicy)
    """Who may open connections to the pods."""
    pod_disruption_budget: PodDisruptionBudget = Field(default_factory=PodDisruptionBudget)
    """How many workers of a stage a node drain may take at once."""
    service_account: ServiceAccount = Field(default_factory=ServiceAccount)
    """The service account of all pods."""
    security_context: SecurityContext = Field(default_factory=SecurityContext)
    """User of every container."""
    global_: Map = Field(default={}, alias="global")
    """Helm's own, where this chart is part of another."""
