"""The Helm chart, linted and rendered by the real Helm CLI: valid objects, the commands that `serve` runs, locked-down
pods, and values that Helm itself refuses."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import chart
import kubernetes_validate
import pytest
import yaml

from stagemesh.cli.flags import given
from stagemesh.cli.main import parser
from stagemesh.cli.service import settings_class
from stagemesh.local import plan
from stagemesh.settings.base import Base
from stagemesh.settings.coordinator import CoordinatorSettings
from stagemesh.settings.gateway import GatewaySettings
from stagemesh.settings.loading import load
from stagemesh.settings.serve import ServeSettings
from stagemesh.settings.stage import StageSettings

FILES = {path.stem.removesuffix("-values"): path for path in sorted((chart.CHART / "ci").glob("*-values.yaml"))}
CASES = ["default", *FILES]
POD_IP = "10.1.2.3"


def objects_of(case: str, **options: Any) -> list[dict[str, Any]]:
    return chart.render(*([FILES[case]] if case in FILES else []), **options)


def settings_of(pod: chart.Pod, folder: Path) -> Base:
    """The settings that the pod's command gets, by the code that the command runs."""
    namespace = parser().parse_args(pod.args)
    file = folder / f"{pod.owner['metadata']['name']}.yaml"
    file.write_text(pod.file(namespace.config))
    cls = settings_class(namespace.command)
    return load(cls, file=str(file), env=pod.env(POD_IP), given=given(namespace, cls))


@pytest.mark.parametrize("case", CASES)
def test_lint(case: str) -> None:
    said = chart.run("lint", "--strict", str(chart.CHART), *(["-f", str(FILES[case])] if case in FILES else []))
    assert "0 chart(s) failed" in said


@pytest.mark.parametrize("kubernetes", [chart.OLDEST, chart.NEWEST])
@pytest.mark.parametrize("case", CASES)
def test_kubernetes_takes_the_objects(case: str, kubernetes: str) -> None:
    objects = objects_of(case, kubernetes=kubernetes)
    for item in objects:
        kubernetes_validate.validate(item, kubernetes, strict=True)
    names = [(item["kind"], item["metadata"]["name"]) for item in objects]
    assert len(set(names)) == len(names)
    damaged = copy.deepcopy(chart.services(objects)[0].owner)
    damaged["spec"]["template"]["spec"]["containers"][0]["comand"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(damaged, kubernetes, strict=True)


def test_kubernetes_without_grpc_probes_is_refused() -> None:
    with pytest.raises(chart.Refused, match="incompatible"):
        objects_of("default", kubernetes="1.26")


@pytest.mark.parametrize("case", CASES)
def test_every_command_loads_its_settings(case: str, tmp_path: Path) -> None:
    objects = objects_of(case)
    stages = []
    for pod in chart.services(objects):
        settings = settings_of(pod, tmp_path)
        assert parser().parse_args(pod.args).command == pod.component
        ports = {port["name"]: port["containerPort"] for port in pod.container["ports"]}
        if isinstance(settings, CoordinatorSettings):
            assert ports == {"grpc": settings.port}
            assert settings.state_dir in [mount["mountPath"] for mount in pod.container["volumeMounts"]]
            length = settings.pipeline_parallel_size
        elif isinstance(settings, GatewaySettings):
            assert ports == {"http": settings.port, "grpc": settings.grpc_port}
            address = settings.coordinator
        else:
            assert isinstance(settings, StageSettings)
            assert ports == {"grpc": settings.port}
            assert settings.reachable_host == POD_IP
            assert settings.worker_id == pod.owner["metadata"]["name"] + "-0"
            stages.append(settings)
    bound = [settings.stage for settings in stages if settings.stage is not None]
    assert bound == list(range(length))
    assert len(stages) - len(bound) == (1 if case == "three-stages" else 0), "standbys"
    # Everyone dials the coordinator's Service, by the port that it listens on.
    assert {settings.coordinator for settings in stages} == {address}
    host, port = address.split(":")
    name, namespace, kind = host.split(".")
    assert (namespace, kind) == ("there", "svc")
    (front,) = chart.of_kind(objects, "Service")[name]["spec"]["ports"]
    assert front["port"] == int(port)


def test_pods_run_what_serve_runs(tmp_path: Path) -> None:
    """The same mesh, once as values and once as `serve`'s flags: the services get the same settings, but for where
    they listen and for what the machine decides."""
    sets = (
        'stages=[{"tensorParallelSize": 2}, {"tensorParallelSize": 1}]',
        'coordinator.settings={"layer_partition": [3, 5], "max_num_seqs": 7, "transport": "tcp"}',
        'gateway.settings={"max_waiting": 9, "drain_timeout": 2.0}',
        'model={"path": "/models/m", "volume": {"emptyDir": {}}}',
    )
    serve = ServeSettings.model_validate(
        {
            "model": "/models/m",
            "pipeline_parallel_size": 2,
            "tensor_parallel_size": "2,1",
            "layer_partition": "3,5",
            "max_num_seqs": 7,
            "transport": "tcp",
            "max_waiting": 9,
        }
    )
    rendered = [settings_of(pod, tmp_path) for pod in chart.services(objects_of("default", sets=sets))]
    wanted: list[Base] = [
        plan.coordinator_settings(serve, "anywhere"),
        *plan.worker_settings(serve, "anywhere"),
        plan.gateway_settings(serve, "anywhere"),
    ]
    local = {"host", "port", "grpc_port", "insecure", "advertise_host", "coordinator", "state_dir"}
    local |= {"worker_id", "gateway_id", "threads", "cpu_list", "api_key"}

    def comparable(settings: Base) -> dict[str, Any]:
        # A pod is told of the model by the coordinator; `serve` knows it before, and says so.
        told = set() if isinstance(settings, CoordinatorSettings) else {"model"}
        of_stages = {"drain_timeout", "transport"} if isinstance(settings, StageSettings) else set()
        leave_out = local | told | of_stages
        return {"service": type(settings).__name__, **settings.model_dump(exclude=leave_out)}

    def order(settings: dict[str, Any]) -> tuple[str, int]:
        return settings["service"], settings.get("stage", 0)

    assert sorted(map(comparable, rendered), key=order) == sorted(map(comparable, wanted), key=order)


def test_stages_are_sized_one_by_one(tmp_path: Path) -> None:
    pods = [pod for pod in chart.services(objects_of("three-stages")) if pod.component == "stage"]
    settings = [settings_of(pod, tmp_path) for pod in pods]
    assert [pod.owner["spec"]["replicas"] for pod in pods] == [2, 3, 0, 2]
    assert [s.tensor_parallel_size for s in settings if isinstance(s, StageSettings)] == [2, 1, 1, 1]
    # 4 cores for two ranks, 2.5 cores for one, what the user set, and a standby's.
    assert [s.threads for s in settings if isinstance(s, StageSettings)] == [2, 2, 6, 2]


@pytest.mark.parametrize("case", CASES)
def test_no_pod_can_do_more_than_it_must(case: str) -> None:
    for pod in chart.pods(objects_of(case)):
        spec, container = pod.spec, pod.container
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["runAsGroup"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & set(spec)
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        # Kubernetes would make STAGEMESH_PORT=tcp://... from a Service named stagemesh.
        assert spec["enableServiceLinks"] is False
        mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        assert volumes[mounts["/tmp"]["name"]]["emptyDir"] == {}
        assert all(mount.get("readOnly") for path, mount in mounts.items() if path in ("/models", "/etc/stagemesh"))
        if pod.component == "stage":
            assert pod.env(POD_IP)["HOME"] == "/tmp", "ranks keep descriptions of models below it"
            assert volumes[mounts["/dev/shm"]["name"]]["emptyDir"]["medium"] == "Memory"


@pytest.mark.parametrize("case", CASES)
def test_only_who_keeps_a_lease_may_speak_to_kubernetes(case: str, tmp_path: Path) -> None:
    objects = objects_of(case)
    with_token = {}
    for pod in chart.pods(objects):
        volumes = [
            v
            for v in pod.spec["volumes"]
            if any("serviceAccountToken" in s for s in v.get("projected", {}).get("sources", []))
        ]
        if volumes:
            with_token[pod.component] = pod
    roles = chart.of_kind(objects, "Role")
    if case != "three-stages":
        assert (with_token, roles) == ({}, {})
        return
    (pod,) = with_token.values()
    settings = settings_of(pod, tmp_path)
    assert isinstance(settings, CoordinatorSettings)
    (role,) = roles.values()
    bounded = [rule for rule in role["rules"] if rule["verbs"] != ["create"]]
    assert [(rule["resourceNames"], rule["verbs"]) for rule in bounded] == [
        ([settings.kubernetes_lease], ["get", "update"])
    ]
    (binding,) = chart.of_kind(objects, "RoleBinding").values()
    assert binding["subjects"] == [
        {"kind": "ServiceAccount", "name": pod.spec["serviceAccountName"], "namespace": "there"}
    ]
    (volume,) = (v for v in pod.spec["volumes"] if "projected" in v)
    (mount,) = (m for m in pod.container["volumeMounts"] if m["name"] == volume["name"])
    assert mount["mountPath"] == settings.kubernetes_account
    files = [
        s.get("serviceAccountToken", {}).get("path") or next(iter(s.values()))["items"][0]["path"]
        for s in volume["projected"]["sources"]
    ]
    assert files == ["token", "ca.crt", "namespace"]


@pytest.mark.parametrize("case", CASES)
def test_a_pod_has_time_to_drain(case: str, tmp_path: Path) -> None:
    for pod in chart.services(objects_of(case)):
        drain_s = getattr(settings_of(pod, tmp_path), "drain_timeout", 0.0)
        hook = pod.container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["sleep", "0"])
        assert pod.spec["terminationGracePeriodSeconds"] >= int(hook[1]) + drain_s + 10


@pytest.mark.parametrize("case", CASES)
def test_probes_ask_ports_that_are_open(case: str, tmp_path: Path) -> None:
    for pod in chart.services(objects_of(case)):
        settings: Any = settings_of(pod, tmp_path)
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            probe = pod.container[kind]
            if pod.component == "gateway":
                path = "/readyz" if kind == "readinessProbe" else "/livez"
                assert probe["httpGet"] == {"path": path, "port": "http"}
            else:
                assert probe["grpc"] == {"port": settings.port}
        start = pod.container["startupProbe"]
        assert start["failureThreshold"] * start["periodSeconds"] == 600


@pytest.mark.parametrize("case", CASES)
def test_selectors_find_their_own_pods_alone(case: str) -> None:
    objects = objects_of(case)
    pods = list(chart.pods(objects))

    def chosen(selector: dict[str, str]) -> list[str]:
        return [pod.owner["metadata"]["name"] for pod in pods if selector.items() <= pod.labels.items()]

    for pod in chart.services(objects):
        name = pod.owner["metadata"]["name"]
        assert chosen(pod.owner["spec"]["selector"]["matchLabels"]) == [name]
        if pod.owner["kind"] == "StatefulSet":
            governing = chart.of_kind(objects, "Service")[pod.owner["spec"]["serviceName"]]["spec"]
            assert governing["clusterIP"] == "None"
            assert chosen(governing["selector"]) == [name]
    for name, service in chart.of_kind(objects, "Service").items():
        (found,) = chosen(service["spec"]["selector"])
        assert found == name.removesuffix("-pods")
        (pod,) = (pod for pod in pods if pod.owner["metadata"]["name"] == found)
        open_ports = {port["name"] for port in pod.container["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} == open_ports
    for name, budget in chart.of_kind(objects, "PodDisruptionBudget").items():
        assert chosen(budget["spec"]["selector"]["matchLabels"]) == [name]


def test_network_policies_let_the_mesh_talk_and_nobody_else() -> None:
    objects = objects_of("gpu")
    pods = list(chart.pods(objects))

    def sources(policy: dict[str, Any], port: int) -> set[str]:
        """Components that may connect to `port` of the policy's pods."""
        found = set()
        for rule in policy["spec"]["ingress"]:
            if port in [p["port"] for p in rule.get("ports", [{"port": port}])]:
                for peer in rule["from"]:
                    labels = peer.get("podSelector", {}).get("matchLabels")
                    found |= {p.component for p in pods if labels and labels.items() <= p.labels.items()}
        return found

    policies = chart.of_kind(objects, "NetworkPolicy")
    assert sources(policies["chat-coordinator"], 50050) == {"gateway", "stage"}
    assert sources(policies["chat-coordinator"], 22) == set()
    assert sources(policies["chat-stage"], 50052) == {"coordinator", "gateway", "stage"}
    assert sources(policies["chat-stage"], 40000) == {"stage"}
    assert sources(policies["chat-gateway"], 8000) == {"test"}
    (rule,) = policies["chat-gateway"]["spec"]["ingress"]
    assert rule["from"][0] == {"namespaceSelector": {"matchLabels": {"may-chat": "true"}}}


def test_gpus_models_and_placement_reach_the_right_stage(tmp_path: Path) -> None:
    first, second = (pod for pod in chart.services(objects_of("gpu")) if pod.component == "stage")
    assert [pod.container["resources"]["limits"]["nvidia.com/gpu"] for pod in (first, second)] == [2, 1]
    assert [settings_of(pod, tmp_path).device for pod in (first, second)] == ["cuda", "cuda"]  # type: ignore[attr-defined]
    assert (first.spec["runtimeClassName"], first.spec["nodeSelector"]) == ("nvidia", {"accelerator": "large"})
    assert "nodeSelector" not in second.spec
    assert second.spec["priorityClassName"] == "high"
    where = [{v["name"]: v for v in pod.spec["volumes"]}["model"]["hostPath"]["path"] for pod in (first, second)]
    assert where == ["/srv/models", "/mnt/other/models"]
    assert {"name": "NCCL_DEBUG", "value": "INFO"} in second.container["env"]


def test_a_model_of_a_hub(tmp_path: Path) -> None:
    """The coordinator names it; everybody has a cache to write to, the mirror and the token."""
    seen = {}
    for pod in chart.services(objects_of("hub")):
        env = pod.env(POD_IP)
        assert env["HF_ENDPOINT"] == "https://hub.example.com"
        assert env["HF_TOKEN"] == "hub-token/token"
        (mount,) = (mount for mount in pod.container["volumeMounts"] if mount["mountPath"] == env["HF_HOME"])
        assert not mount.get("readOnly")
        assert pod.spec["securityContext"]["fsGroup"] == pod.spec["securityContext"]["runAsGroup"]
        (volume,) = (volume for volume in pod.spec["volumes"] if volume["name"] == mount["name"])
        seen[pod.owner["metadata"]["name"]] = next(kind for kind in volume if kind != "name")
        settings = settings_of(pod, tmp_path)
        if isinstance(settings, CoordinatorSettings):
            assert (settings.model, settings.revision) == ("example/tiny-1B", "v1.0")
        else:
            assert settings.model is None, "it comes with the pipelines"  # type: ignore[attr-defined]
    assert seen["demo-stagemesh-stage-1"] == "persistentVolumeClaim"
    assert {kind for name, kind in seen.items() if name != "demo-stagemesh-stage-1"} == {"hostPath"}
    (pod, *_) = chart.services(objects_of("default", sets=('model.hub={"id": "org/name"}',)))
    assert {"name": "hub-cache", "emptyDir": {}} in pod.spec["volumes"]
    assert "HF_HOME" not in next(iter(chart.services(objects_of("default")))).env(POD_IP)


def test_the_api_key_comes_from_a_secret(tmp_path: Path) -> None:
    def key(case: str, *sets: str) -> tuple[str | None, list[str]]:
        objects = objects_of(case, sets=sets)
        (gateway,) = (pod for pod in chart.services(objects) if pod.component == "gateway")
        settings = settings_of(gateway, tmp_path)
        assert isinstance(settings, GatewaySettings)
        return settings.api_key, list(chart.of_kind(objects, "Secret"))

    assert key("default") == ("demo-stagemesh-api-key/api-key", ["demo-stagemesh-api-key"])
    assert key("three-stages") == ("front-door/key", [])
    assert key("default", 'apiKey={"enabled": false}') == (None, [])


def test_a_setting_restarts_its_own_service_alone() -> None:
    def marks(*sets: str) -> dict[str, dict[str, Any]]:
        return {pod.owner["metadata"]["name"]: pod.template for pod in chart.services(objects_of("default", sets=sets))}

    before = marks('stages=[{"settings": {}}, {}]')
    after = marks('stages=[{"settings": {"kv_cache_gib": 2}}, {}]')
    assert [name for name in before if before[name] != after[name]] == ["demo-stagemesh-stage-0"]


WRONG = {
    "an unknown key": ("replicas=2", "replicas"),
    "an unknown key of a stage": ('stages=[{"replica": 2}]', "replica"),
    "an unknown setting": ('coordinator.settings={"max_model_length": 5}', "max_model_length"),
    "an unknown setting of a stage": ('stages=[{"settings": {"max_num_seqs": 5}}]', "max_num_seqs"),
    "a setting of a wrong type": ('coordinator.settings={"max_model_len": "long"}', "max_model_len"),
    "a setting out of bounds": ('stages=[{"settings": {"gpu_memory_utilization": 1.5}}]', "gpu_memory_utilization"),
    "a setting that is no choice": ('coordinator.settings={"transport": "rdma"}', "transport"),
    "a setting that the chart owns": ('gateway.settings={"grpc_port": 5}', "grpc_port"),
    "two gateways": ("gateway.replicas=2", "replicas"),
    "no stage": ("stages=[]", "stages"),
    "a stage left out": ('stages=[null, {"replicas": 2}]', "stages.0"),
    "root": ("securityContext.runAsUser=0", "runAsUser"),
    "a partition of another length": ('coordinator.settings={"layer_partition": [1, 2, 3]}', "names 3 stages"),
    "fewer GPUs than ranks": (
        'stages=[{"tensorParallelSize": 2, "resources": {"limits": {"nvidia.com/gpu": 1}}}]',
        "make them equal",
    ),
    "cuda without a GPU": ('stages=[{"settings": {"device": "cuda"}}]', "ask for 1"),
    "a model from nowhere": ('model={"path": "/models/m"}', "say where the files come from"),
    "a volume without a model": ('model={"volume": {"emptyDir": {}}}', "name the checkpoint's directory"),
    "two models": (
        'model={"path": "/models/m", "volume": {"emptyDir": {}}, "hub": {"id": "org/name"}}',
        "model.hub.id org/name and model.path or model.volume are both set",
    ),
    "a revision of nothing": ('model={"hub": {"revision": "v1"}}', "model.hub.id is not: name the model"),
    "a model that is no id": ('model={"hub": {"id": "/models/m"}}', "hub"),
    "a Role for everybody": (
        'coordinator={"lease": {"enabled": true}}; serviceAccount={"create": false}',
        "every pod of the namespace",
    ),
    "two keys": ('apiKey={"value": "a", "existingSecret": "b"}', "give one"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_values_are_refused_by_helm(wrong: str) -> None:
    value, said = WRONG[wrong]
    with pytest.raises(chart.Refused, match=said):
        objects_of("default", sets=tuple(value.split("; ")))


def notes(tmp_path: Path, *values: Path) -> str:
    """What `helm install` prints at the end. Without a cluster Helm renders it but does not show it, so a copy of the
    chart shows it as an object."""
    copied = tmp_path / "chart"
    shutil.copytree(chart.CHART, copied)
    (copied / "templates" / "NOTES.txt").rename(copied / "notes.txt")
    for template in (copied / "templates").glob("**/*.yaml"):
        template.unlink()
    (copied / "templates" / "notes.yaml").write_text('notes: {{ tpl (.Files.Get "notes.txt") . | toJson }}')
    files = [part for path in values for part in ("-f", str(path))]
    said = chart.run("template", "demo", str(copied), "-n", "there", "--kube-version", chart.NEWEST, *files)
    return str(yaml.safe_load(said)["notes"])


def test_the_notes_warn_and_lead_to_an_answer(tmp_path: Path) -> None:
    text = notes(tmp_path)
    assert "NOT ENCRYPTED" in text
    assert "NO API KEY" not in text
    objects = objects_of("default")
    names = {f"{kind.lower()}/{name}" for kind in ("Deployment", "Service") for name in chart.of_kind(objects, kind)}
    assert set(re.findall(r"(?:deployment|service)/[a-z0-9-]+", text)) <= names
    (secret,) = re.findall(r"get secret (\S+)", text)
    assert secret in chart.of_kind(objects, "Secret")
    (forwarded,) = re.findall(r"port-forward service/\S+ 8000:(\d+)", text)
    front = chart.of_kind(objects, "Service")["demo-stagemesh-gateway"]["spec"]["ports"]
    assert int(forwarded) in [port["port"] for port in front]
    assert "logs demo-stagemesh-coordinator-0" in text


def test_the_schema_is_what_the_settings_say() -> None:
    done = subprocess.run(
        [sys.executable, str(chart.ROOT / "tools/helm/make_schema.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_chart_and_package_have_one_version() -> None:
    import stagemesh

    described = chart.run("show", "chart", str(chart.CHART))
    assert f"appVersion: {stagemesh.__version__}" in described
