"""The coordinator's smaller parts: what it writes down, gateways' slots, nonces, and settings against a checkpoint."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from stagemesh.coordinator.build import build
from stagemesh.coordinator.service.slots import MAX_SLOT, Slots
from stagemesh.coordinator.state.nonces import nonces
from stagemesh.coordinator.state.store import Store
from stagemesh.coordinator.values import Loaded, StagePlan, StoredPlan
from stagemesh.coordinator.world.record import Record
from stagemesh.errors import CheckpointError, ConfigError, QueueFull, UnsupportedModel
from stagemesh.models.architectures import MADE_WITH
from stagemesh.models.support import PLUGINS, check_heads, check_supported, heads_to_divide
from stagemesh.planning.limits import pages_per_sequence
from stagemesh.settings.coordinator import CoordinatorSettings

QUARANTINE_S = 60.0
PLAN = StoredPlan(
    "pipeline-0",
    7,
    (StagePlan(0, "a", 2**63 + 5, (0, 3), 11), StagePlan(1, "b", 9, (3, 6), 12)),
    (Loaded(40, 1, 2, "f"), Loaded(41, 3, 4, "f")),
    ("shared memory", ""),
    "terms",
)


class TestStore:
    def test_what_was_written_is_there_after_a_start(self, tmp_path: Path) -> None:
        store = Store(str(tmp_path / "state"))
        drains = {"a": 2**63 + 5, "b": 9}
        written = Record({"pipeline-0": 7}, {"pipeline-0": PLAN}, {0: 2}, (2, 4), drains, frozenset("b"))
        store.save(Record(), written, "terms")
        store.save_slot(3, "gateway-0", 2**64 - 1)
        store.close()
        again = Store(str(tmp_path / "state"))
        assert again.load("terms") == written
        assert again.load("those of another model") == replace(written, counts=None)
        assert again.slots() == {3: ("gateway-0", 2**64 - 1)}
        going_on = replace(PLAN, next=replace(PLAN, epoch=PLAN.epoch + 1, shares=2))
        again.save(written, replace(written, plans={"pipeline-0": going_on}), "terms")
        assert again.load("terms").plans == {"pipeline-0": going_on}
        again.close()

    def test_what_was_forgotten_is_not(self, tmp_path: Path) -> None:
        store = Store(str(tmp_path))
        for slot in (3, 4, 5):
            store.save_slot(slot, "gateway-0", slot)
        first = Record({"pipeline-0": 7}, {"pipeline-0": PLAN}, {0: 3, 1: 2}, (2, 4), {"a": 1}, frozenset("a"))
        store.save(Record(), first, "terms")
        second = Record({"pipeline-0": 7}, {}, {1: 4}, None, {"b": 2})
        store.save(first, second, "terms")
        store.forget_slots([3, 5])
        store.close()
        again = Store(str(tmp_path))
        assert again.load("terms") == second
        assert again.load("terms").epochs == {"pipeline-0": 7}, "no epoch is used again"
        assert again.slots() == {4: ("gateway-0", 4)}
        again.close()

    def test_an_epoch_never_falls(self) -> None:
        store = Store(None)
        store.save(Record(), Record({"p": 7}), "terms")
        store.save(Record(), Record({"p": 5}), "terms")
        assert store.load("terms").epochs == {"p": 7}
        store.close()

    def test_what_the_release_before_wrote_is_read(self, tmp_path: Path) -> None:
        """It knew no forced drains."""
        db = sqlite3.connect(tmp_path / "coordinator.sqlite")
        db.executescript(
            "CREATE TABLE epochs (pipeline_id TEXT PRIMARY KEY, epoch INTEGER NOT NULL);"
            "CREATE TABLE drains (worker_id TEXT PRIMARY KEY, incarnation TEXT NOT NULL);"
            "INSERT INTO epochs VALUES ('pipeline-0', 7); INSERT INTO drains VALUES ('a', '9');"
            "PRAGMA user_version = 1;"
        )
        db.close()
        store = Store(str(tmp_path))
        assert store.load("terms") == Record({"pipeline-0": 7}, drains={"a": 9})
        store.close()

    def test_two_coordinators_cannot_share_a_state(self, tmp_path: Path) -> None:
        first = Store(str(tmp_path))
        first.save(Record(), Record({"p": 1}), "terms")
        with pytest.raises(ConfigError, match="no other coordinator"):
            Store(str(tmp_path))
        first.close()

    def test_a_file_where_the_folder_should_be(self, tmp_path: Path) -> None:
        (tmp_path / "state").write_text("")
        with pytest.raises(ConfigError, match="--state-dir"):
            Store(str(tmp_path / "state"))

    def test_a_file_that_is_no_database(self, tmp_path: Path) -> None:
        (tmp_path / "coordinator.sqlite").write_bytes(b"not a database, but long enough to look like one" * 99)
        with pytest.raises(ConfigError, match=r"coordinator\.sqlite"):
            Store(str(tmp_path))

    def test_a_later_releases_format_is_refused(self, tmp_path: Path) -> None:
        Store(str(tmp_path)).close()
        db = sqlite3.connect(tmp_path / "coordinator.sqlite")
        db.execute("PRAGMA user_version = 99")
        db.close()
        with pytest.raises(ConfigError, match="another release"):
            Store(str(tmp_path))


class TestSlots:
    def test_an_instance_keeps_its_slot_and_another_gets_another(self) -> None:
        slots = Slots({}, now=0, quarantine_s=QUARANTINE_S)
        one = slots.acquire("g", 1, 0)
        assert slots.acquire("g", 1, 0) == one
        assert slots.acquire("g", 2, 0) != one

    def test_a_slot_is_quarantined_after_its_gateway_went(self) -> None:
        slots = Slots({}, now=0, quarantine_s=QUARANTINE_S)
        taken = [slots.acquire("g", n, 0) for n in range(MAX_SLOT)]
        assert sorted(taken) == list(range(1, MAX_SLOT + 1))
        with pytest.raises(QueueFull, match="250"):
            slots.acquire("g", 999, 0)
        slots.release(taken[7], 10)
        with pytest.raises(QueueFull):
            slots.acquire("g", 999, 10 + QUARANTINE_S - 1)
        assert slots.acquire("g", 999, 10 + QUARANTINE_S) == taken[7]

    def test_a_gateway_with_two_streams_is_gone_when_both_are(self) -> None:
        slots = Slots({}, now=0, quarantine_s=QUARANTINE_S, first=5)
        slot = slots.acquire("g", 1, 0)
        slots.acquire("g", 1, 0)
        slots.release(slot, 0)
        others = {slots.acquire("h", n, 1000) for n in range(MAX_SLOT - 1)}
        assert slot not in others

    def test_slots_that_are_free_for_all_are_said_once(self) -> None:
        """So that they are not written down for ever: a coordinator that is started again would wait for them."""
        slots = Slots({5: ("g", 1)}, now=0, quarantine_s=QUARANTINE_S, first=5)
        other = slots.acquire("g", 2, 0)
        assert slots.expire(QUARANTINE_S - 1) == []
        assert slots.expire(QUARANTINE_S) == [5]
        assert slots.expire(QUARANTINE_S) == []
        slots.release(other, QUARANTINE_S)
        assert slots.expire(2 * QUARANTINE_S) == [other]

    def test_slots_of_before_a_restart_are_kept_for_their_gateways(self) -> None:
        slots = Slots({5: ("g", 1)}, now=0, quarantine_s=QUARANTINE_S, first=5)
        assert slots.acquire("h", 2, 1) != 5
        assert slots.acquire("g", 1, 1) == 5


def test_nonces_are_never_zero_and_never_one_twice() -> None:
    seen = list(islice(nonces(0), 100_000))
    assert len(set(seen)) == len(seen)
    assert all(0 < n < 1 << 32 for n in seen)
    assert next(nonces(-0x9E3779B1 % 2**32)) != 0


def settings(folder: Path, **changes: Any) -> CoordinatorSettings:
    (folder / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 4,
                "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
                "vocab_size": 256, "max_position_embeddings": 8192, "dtype": "bfloat16",
            }
        )
    )  # fmt: skip
    return CoordinatorSettings(model=str(folder), load_format="dummy", **changes)


class TestBuild:
    def test_defaults_come_from_the_checkpoint(self, tmp_path: Path) -> None:
        built = build(settings(tmp_path, pipeline_parallel_size=2))
        limits = built.limits
        assert (limits.max_model_len, limits.steps_in_flight, limits.num_pages) == (4096, 2, 0)
        assert (built.model.dtype, built.model.num_layers, built.model.hidden_size) == ("bfloat16", 4, 64)
        assert built.model.name == tmp_path.name
        many = build(settings(tmp_path, pipeline_parallel_size=4)).limits
        assert (build(settings(tmp_path)).limits.steps_in_flight, many.steps_in_flight) == (1, 5)

    def test_what_is_asked_for_wins(self, tmp_path: Path) -> None:
        built = build(
            settings(tmp_path, dtype="float32", max_model_len=100, steps_in_flight=5, num_kv_pages=70, block_size=8)
        )
        assert built.model.dtype == "float32"
        limits = built.limits
        assert (limits.max_model_len, limits.steps_in_flight, limits.num_pages, limits.page_size) == (100, 5, 70, 8)
        assert pages_per_sequence(limits) == 13

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"pipeline_parallel_size": 5}, ["-size 5", "4 layers", "-pp 4"]),
            ({"pipeline_parallel_size": 2, "layer_partition": [1, 2]}, ["1,2", "adds up to 3", "2,2"]),
            ({"max_model_len": 9000}, ["9000", "8192", "--max-model-len 8192 or less"]),
            ({"num_kv_pages": 4, "max_model_len": 100}, ["--num-kv-pages 4", "64 tokens", "--num-kv-pages 7"]),
        ],
    )
    def test_a_mesh_that_cannot_be_is_refused_with_numbers_and_a_way_out(
        self, tmp_path: Path, changes: dict[str, Any], words: list[str]
    ) -> None:
        with pytest.raises(ConfigError) as e:
            build(settings(tmp_path, **changes))
        for word in words:
            assert word in e.value.message, e.value.message

    @pytest.mark.parametrize(
        ("config", "words"),
        [
            ({"model_type": "mamba"}, "declares no pipeline plan"),
            ({"model_type": "no_such_model"}, "declares no pipeline plan"),
            ({"model_type": "doge"}, "makes an attention mask of its own"),
            ({"model_type": "qwen3_next"}, "linear_attention"),
            ({"model_type": "gemma3", "vision_config": {}}, "vision or audio tower"),
            ({"model_type": "gemma3n_text"}, "share keys and values"),
            ({"layer_types": ["full_attention", "mamba"]}, "mix tokens by mamba"),
            ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "(dynamic) depends on the longest position"),
            ({"rope_parameters": {"full_attention": {"rope_type": "longrope"}}}, "(longrope) depends on the longest"),
            ({"rope_parameters": {"rope_type": "spiral"}}, "of type 'spiral'"),
            ({"quantization_config": {"quant_method": "aqlm"}}, "quantized (aqlm"),
            ({"quantization_config": {"quant_method": "gptq", "bits": 3}}, "bits 3 is not known"),
        ],
    )
    def test_a_model_that_cannot_be_served_is_refused_from_its_config(
        self, tmp_path: Path, config: dict[str, Any], words: str
    ) -> None:
        asked = settings(tmp_path)
        path = tmp_path / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
        with pytest.raises(UnsupportedModel) as e:
            build(asked)
        assert words in e.value.message
        assert len(e.value.message.removeprefix(str(tmp_path))) <= 200

    def test_a_newer_transformers_or_a_plugin_may_know_another_model(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = {"model_type": "no_such_model"}
        check_supported(config, installed="5.99.0")
        check_supported(config, installed="6.0.0.dev0")
        for installed in ("5.17.0", MADE_WITH, "", "main"):
            with pytest.raises(UnsupportedModel):
                check_supported(config, installed=installed)
        monkeypatch.setenv(PLUGINS, "sleep_shard")
        asked = settings(tmp_path)
        path = tmp_path / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
        build(asked)

    def test_a_draft_model_is_checked_like_the_model(self, tmp_path: Path) -> None:
        (tmp_path / "draft").mkdir()
        config = {"method": "draft_model", "model": str(tmp_path / "draft"), "num_speculative_tokens": 2}
        settings(tmp_path / "draft")
        asked = settings(tmp_path, speculative_config=config)
        assert build(asked).model.HasField("draft")
        path = tmp_path / "draft" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "mamba"}))
        with pytest.raises(UnsupportedModel, match="mamba"):
            build(asked)

    def test_no_checkpoint(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"nowhere.*no such directory"):
            build(CoordinatorSettings(model=str(tmp_path / "nowhere")))

    def test_other_bounds_are_other_terms(self, tmp_path: Path) -> None:
        one = build(settings(tmp_path)).terms
        assert build(settings(tmp_path)).terms == one
        assert build(settings(tmp_path, max_num_seqs=3)).terms != one
        assert build(settings(tmp_path, pipeline_parallel_size=2)).terms != one
        assert build(settings(tmp_path, quantization="int8")).terms != one

    def test_workers_are_told_to_quantize(self, tmp_path: Path) -> None:
        assert build(settings(tmp_path)).model.quantization == ""
        assert build(settings(tmp_path, quantization="int4")).model.quantization == "int4"

    def test_weights_are_not_quantized_twice(self, tmp_path: Path) -> None:
        asked = settings(tmp_path)
        tensors = {f"model.layers.{i}.mlp.up_proj.weight": torch.ones(8, 8).to(torch.float8_e4m3fn) for i in range(4)}
        scales = {f"{name}_scale": torch.ones(1) for name in tensors}
        save_file({**tensors, **scales, "model.embed_tokens.weight": torch.ones(8, 8)}, tmp_path / "model.safetensors")
        path = tmp_path / "config.json"
        said = {"quantization_config": {"quant_method": "fp8"}, "tie_word_embeddings": True}
        path.write_text(json.dumps(json.loads(path.read_text()) | said))
        assert build(asked.model_copy(update={"load_format": "auto"})).model.quantization == ""
        with pytest.raises(ConfigError, match=r"--quantization int8: .* quantized already \(fp8\)"):
            build(asked.model_copy(update={"load_format": "auto", "quantization": "int8"}))


@pytest.mark.parametrize(
    ("config", "works"),
    [
        ({"model_type": "llama", "num_attention_heads": 12, "num_key_value_heads": 4}, {1, 2, 4, 12}),
        ({"model_type": "llama", "num_attention_heads": 12}, {1, 2, 3, 4, 6, 12}),
        ({"model_type": "llama", "num_attention_heads": 8, "num_key_value_heads": None}, {1, 2, 4, 8}),
        ({"model_type": "gpt_neox", "num_attention_heads": 6, "num_key_value_heads": 1}, {1, 2, 3, 6}),
        ({"model_type": "gpt_oss", "num_attention_heads": 8, "num_key_value_heads": 2}, set(range(1, 13))),
        ({"model_type": "llama", "num_attention_heads": [8, 4], "num_key_value_heads": 2}, set(range(1, 13))),
        ({"model_type": "no_such_model", "num_attention_heads": 8}, set(range(1, 13))),
    ],
)
def test_ranks_that_cut_no_head(config: dict[str, Any], works: set[int]) -> None:
    """KV heads fewer than ranks are replicated. What config.json alone does not show is left to the ranks."""
    for size in range(1, 13):
        if size in works:
            check_heads(heads_to_divide(config), size)
            continue
        with pytest.raises(ConfigError) as e:
            check_heads(heads_to_divide(config), size)
        assert len(e.value.message) <= 200
