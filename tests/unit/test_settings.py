"""Options: each declared once, and from there alone a flag, a variable, a YAML key, a value of the chart, and handed
on by `serve`."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml
from pydantic.fields import FieldInfo

import stagemesh.settings
from stagemesh.cli.flags import given, spellings
from stagemesh.cli.main import parser
from stagemesh.cli.service import SERVICES, settings_class
from stagemesh.errors import ConfigError
from stagemesh.local.plan import coordinator_settings, gateway_settings, standby_settings, worker_settings
from stagemesh.settings.base import Base
from stagemesh.settings.coordinator import CoordinatorSettings
from stagemesh.settings.gateway import GatewaySettings
from stagemesh.settings.loading import load
from stagemesh.settings.serve import ServeSettings
from stagemesh.settings.speculative import SpeculativeConfig
from stagemesh.settings.stage import StageSettings

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tools" / "helm"))

import values_model  # noqa: E402

OWN_DEFAULT = {
    "port": {"CoordinatorSettings", "StageSettings", "GatewaySettings", "ServeSettings"},
    "grpc_port": {"GatewaySettings", "ServeSettings"},
    "drain_timeout": {"StageSettings", "GatewaySettings", "ServeSettings"},
}
"""Options whose text and bounds are declared once, as a type, and whose default each of these services says."""
TWO_OF_ONE_NAME = {
    "model": {"ModelSettings", "Join"},
    "tensor_parallel_size": {"StageSettings", "ServeSettings"},
}
"""Two options with one flag. `model`: what is served, and where its files are on this machine. `tensor_parallel_size`:
ranks of one worker, and of each stage."""
CASES = [(name, option) for name in SERVICES for option in settings_class(name).model_fields]
SERVED = {"coordinator": CoordinatorSettings, "stage": StageSettings, "gateway": GatewaySettings}
DECIDED = {
    "coordinator": {"host", "insecure", "port"},
    "stage": {"host", "insecure", "port", "tensor_parallel_size", "drain_timeout"},
    "gateway": {"speculative_config"},
}
"""What `serve` does not hand on as it is: only the gateway may listen beyond loopback; each method of speculative
decoding concerns one service (here the coordinator)."""


def blocks() -> list[type[Base]]:
    """Every class of the package that declares options of a service."""
    for module in pkgutil.iter_modules(stagemesh.settings.__path__, "stagemesh.settings."):
        importlib.import_module(module.name)
    found, pending = [], [Base]
    while pending:
        pending += (below := pending.pop().__subclasses__())
        found += [cls for cls in below if cls.__module__.startswith("stagemesh.settings.") and cls not in found]
    return [cls for cls in found if cls is not SpeculativeConfig]


def another(name: str, field: FieldInfo) -> Any:
    """A value of an option that is not its default, as YAML has it."""
    own: dict[str, Any] = {
        "host": "::1",
        "layer_partition": [3],
        "tensor_parallel_size": 2,
        "pipeline_parallel_size": 3,
        "gpu_memory_utilization": 0.5,
        "speculative_config": {"method": "draft_model", "num_speculative_tokens": 2, "model": "/d"},
    }
    if name in own:
        return own[name]
    kinds = [kind for kind in get_args(field.annotation) or [field.annotation] if kind is not type(None)]
    if words := [kind for kind in (field.annotation, *kinds) if get_origin(kind) is Literal]:
        return next(word for word in get_args(words[0]) if word != field.default)
    if kinds[0] is bool:
        return not field.default
    if kinds[0] is str:
        return "another"
    return kinds[0]((field.default or 0) + 2)


def test_no_option_is_declared_twice() -> None:
    declared: dict[str, set[str]] = {}
    for cls in blocks():
        for name in inspect.get_annotations(cls):
            declared.setdefault(name, set()).add(cls.__name__)
    assert len(declared) > 50
    assert {name: where for name, where in declared.items() if len(where) > 1} == OWN_DEFAULT | TWO_OF_ONE_NAME


def test_an_option_with_several_defaults_is_one_option() -> None:
    for name, owners in OWN_DEFAULT.items():
        fields = [cls.model_fields[name] for cls in blocks() if cls.__name__ in owners]
        assert {str(field.metadata) for field in fields} == {str(fields[0].metadata)}
        assert len({field.description for field in fields}) <= 2  # an HTTP port, or a gRPC one


@pytest.mark.parametrize(("service", "option"), CASES)
def test_an_option_is_a_flag_a_variable_and_a_key(service: str, option: str, tmp_path: Path) -> None:
    cls = settings_class(service)
    field = cls.model_fields[option]
    assert field.description
    value = another(option, field)
    text = json.dumps(value) if isinstance(value, dict) else str(value).strip("[]")
    if service == "gateway" and option == "speculative_config":
        value = {**value, "method": "ngram", "model": None}
        text = json.dumps(value)
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump({option: value}))
    by_file = load(cls, file=str(file), env={}, given={})
    assert getattr(by_file, option) != field.default
    assert load(cls, file=None, env={f"STAGEMESH_{option.upper()}": text}, given={}) == by_file
    shown = spellings(option, field)[-1]
    typed = [text] if service == "serve" and option == "model" else [f"{shown}={text}"]
    if field.annotation is bool:
        typed = [shown if value else shown.replace("--", "--no-", 1)]
    namespace = parser().parse_args([service, *typed])
    given_by_flag = {k: v for k, v in given(namespace, cls).items() if k == option}
    assert load(cls, file=None, env={}, given=given_by_flag) == by_file


@pytest.mark.parametrize(("service", "cls"), SERVED.items())
def test_an_option_of_a_service_is_a_value_of_the_chart(service: str, cls: type[Base]) -> None:
    schema = json.loads((ROOT / "helm/stagemesh/values.schema.json").read_text())
    options = set(schema["definitions"][cls.__name__]["properties"])
    assert options | set(values_model.OWNED[cls]) == set(cls.model_fields)


@pytest.mark.parametrize(
    ("service", "option"),
    [(s, o) for s, cls in SERVED.items() for o in cls.model_fields if o in ServeSettings.model_fields],
)
def test_serve_hands_every_option_on(service: str, option: str) -> None:
    value = another(option, ServeSettings.model_fields[option])
    serve = ServeSettings.model_validate({option: value, "standby": 1})
    made: dict[str, list[Any]] = {
        "coordinator": [coordinator_settings(serve, "/state")],
        "stage": [*worker_settings(serve, "here:1"), *standby_settings(serve, "here:1")][-2:],
        "gateway": [gateway_settings(serve, "here:1")],
    }
    handed_on = all(getattr(settings, option) == getattr(serve, option) for settings in made[service])
    assert handed_on is (option not in DECIDED[service])


def test_serve_keeps_all_but_the_gateway_on_this_machine() -> None:
    serve = ServeSettings(host="0.0.0.0", insecure=True, port=1234, drain_timeout=7.0)
    for settings in (coordinator_settings(serve, "/state"), *worker_settings(serve, "here:1")):
        assert (settings.host, settings.insecure, settings.port) == ("127.0.0.1", False, 0)
    gateway = gateway_settings(serve, "here:1")
    assert (gateway.host, gateway.insecure, gateway.port, gateway.drain_timeout) == ("0.0.0.0", True, 1234, 7.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pipeline_parallel_size": 65}, "at most 64 stages"),
        ({"pipeline_parallel_size": 3, "tensor_parallel_size": [1, 2]}, "one for each of the 3 stages"),
        ({"host": "10.0.0.1"}, "add --insecure on a network that you trust"),
        ({"layer_partition": "5;7"}, "'5;7' is not a comma-separated list of whole numbers, such as 5,7"),
        ({"tp": 2}, "unknown setting 'tp' in --tp; known: .*tensor_parallel_size"),
    ],
)
def test_what_cannot_be_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(ServeSettings, file=None, env={}, given=values)


@pytest.mark.parametrize(
    ("code", "not_needed"),
    [
        ("from stagemesh.cli.main import parser; parser()", ("torch", "numpy", "transformers", "uvicorn")),
        ("import stagemesh.cli.service", ("pydantic", "argparse", "yaml")),
    ],
)
def test_a_process_starts_without_what_only_others_need(code: str, not_needed: tuple[str, ...]) -> None:
    code += f"; import sys; print([m for m in {not_needed} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("cls", [GatewaySettings, ServeSettings])
def test_a_key_that_would_open_the_door_is_refused(cls: type[Base]) -> None:
    for key in ("", " ", "\n"):
        with pytest.raises(ConfigError, match=r"api_key in \$STAGEMESH_API_KEY: is empty"):
            load(cls, file=None, env={"STAGEMESH_API_KEY": key}, given={})
    made = load(cls, file=None, env={"STAGEMESH_API_KEY": "of a file\n"}, given={})
    assert made.model_dump()["api_key"] == "of a file"
