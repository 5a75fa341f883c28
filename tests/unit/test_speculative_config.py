"""`--speculative-config`: vLLM's keys, from wherever settings come, passed on, and refused with a reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stagemesh.errors import ConfigError
from stagemesh.local.plan import coordinator_settings, gateway_settings
from stagemesh.settings.coordinator import CoordinatorSettings
from stagemesh.settings.gateway import GatewaySettings
from stagemesh.settings.loading import load
from stagemesh.settings.serve import ServeSettings

GOOD = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, "prompt_lookup_min": 2}


def flag(value: str) -> GatewaySettings:
    return load(GatewaySettings, file=None, env={}, given={"speculative_config": value})


def test_it_is_off_unless_asked_for() -> None:
    assert load(ServeSettings, file=None, env={}, given={}).speculative_config is None


def test_flag_variable_and_file_say_the_same(tmp_path: Path) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text(json.dumps({"speculative_config": GOOD}))
    by_flag = flag(json.dumps(GOOD))
    assert by_flag == load(GatewaySettings, file=str(file), env={}, given={})
    assert by_flag == load(GatewaySettings, file=None, env={"STAGEMESH_SPECULATIVE_CONFIG": json.dumps(GOOD)}, given={})
    assert by_flag.speculative_config is not None
    assert by_flag.speculative_config.model_dump(exclude_none=True) == GOOD


def test_serve_hands_it_to_the_gateway_as_a_flag_that_can_be_typed_again() -> None:
    serve = load(ServeSettings, file=None, env={}, given={"speculative_config": json.dumps(GOOD)})
    gateway = gateway_settings(serve, "127.0.0.1:1")
    assert flag(str(gateway.speculative_config)).speculative_config == serve.speculative_config


@pytest.mark.parametrize(
    ("given", "lengths"),
    [({}, (5, 5)), ({"prompt_lookup_max": 3}, (3, 3)), ({"prompt_lookup_min": 2}, (2, 2)), (GOOD, (2, 4))],
    ids=["neither", "the most", "the least", "both"],
)
def test_lengths_that_are_left_out_are_vllms(given: dict[str, Any], lengths: tuple[int, int]) -> None:
    config = flag(json.dumps({"method": "ngram", "num_speculative_tokens": 2, **given})).speculative_config
    assert config is not None
    assert (config.prompt_lookup_min, config.prompt_lookup_max) == lengths


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("ngram", r"'ngram' is not JSON .*: write \{\"method\": \"ngram\""),
        ("[4]", "must be an object such as"),
        (json.dumps({**GOOD, "method": "eagle"}), "speculative_config.method in --speculative-config: .*'ngram'"),
        (
            json.dumps({"num_speculative_tokens": 4}),
            "speculative_config.method in --speculative-config: Field required",
        ),
        (json.dumps({"method": "ngram"}), "num_speculative_tokens in --speculative-config: Field required"),
        (json.dumps({**GOOD, "num_speculative_tokens": 0}), "num_speculative_tokens .*greater than or equal to 1"),
        (json.dumps({**GOOD, "num_speculative_tokens": 33}), "num_speculative_tokens .*less than or equal to 32"),
        (json.dumps({**GOOD, "prompt_lookup_min": 0}), "prompt_lookup_min .*greater than or equal to 1"),
        (json.dumps({**GOOD, "prompt_lookup_min": 5}), "prompt_lookup_min 5 must not exceed prompt_lookup_max 4"),
        (
            json.dumps({**GOOD, "tree": "x"}),
            "unknown setting 'speculative_config.tree' .*known: method, model, num_",
        ),
    ],
)
def test_what_is_wrong_is_told(value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        flag(value)


DRAFT = {"method": "draft_model", "model": "/draft", "num_speculative_tokens": 3}


def test_serve_hands_a_draft_model_to_the_coordinator_and_lookup_to_the_gateway() -> None:
    for config, at_coordinator in ((DRAFT, True), (GOOD, False)):
        serve = load(ServeSettings, file=None, env={}, given={"speculative_config": json.dumps(config)})
        coordinator, gateway = coordinator_settings(serve, "/state"), gateway_settings(serve, "127.0.0.1:1")
        assert (coordinator.speculative_config is not None) is at_coordinator
        assert (gateway.speculative_config is None) is at_coordinator
        assert serve.speculative_config in (coordinator.speculative_config, gateway.speculative_config)


@pytest.mark.parametrize(
    ("settings", "value", "message"),
    [
        (GatewaySettings, DRAFT, "guesses on the last stage: give it to the coordinator"),
        (CoordinatorSettings, GOOD, "guesses in the gateway: give it to the gateway"),
        (ServeSettings, {**DRAFT, "model": None}, 'draft_model needs "model"'),
        (ServeSettings, {**GOOD, "model": "/draft"}, '"model" is for method draft_model'),
    ],
)
def test_what_belongs_elsewhere_is_refused(settings: Any, value: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(settings, file=None, env={}, given={"speculative_config": json.dumps(value)})
