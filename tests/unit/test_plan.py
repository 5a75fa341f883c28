"""`stagemesh plan`: it says what the coordinator would do, adds up by hand, and its ways out are some."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from model_configs import DEEPSEEK_V3, GPT_OSS, LLAMA_70B, MIXTRAL

from stagemesh.checkpoint import describe
from stagemesh.cli.main import main
from stagemesh.coordinator.build import build
from stagemesh.coordinator.planning.choose import choose
from stagemesh.coordinator.planning.kinds import kinds
from stagemesh.coordinator.planning.placement import Candidate
from stagemesh.errors import ConfigError
from stagemesh.planning.devices import DEVICES, workers
from stagemesh.planning.forecast import DoesNotFit, Forecast, forecast
from stagemesh.planning.partition import GIB
from stagemesh.protos.v1.coordinator_pb2 import RegisterRequest
from stagemesh.protos.v1.types_pb2 import DeviceInfo
from stagemesh.settings.coordinator import CoordinatorSettings
from stagemesh.settings.plan import PlanSettings

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def write(folder: Path, config: dict[str, Any], **changes: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def plan(folder: Path, spec: str, **options: Any) -> Forecast:
    devices = workers(spec)
    settings = PlanSettings(model=str(folder), workers=spec, pipeline_parallel_size=len(devices), **options)
    return forecast(describe(folder), settings, devices)


def as_asked(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = main(["plan", *words])
    out = capsys.readouterr()
    return status, out.out, out.err


@pytest.mark.parametrize(
    ("spec", "sizes", "config"),
    [
        ("2xh100-80g,1xcpu-256g", [1, 1, 1], LLAMA_70B),
        ("2xh100,2xl40s", [1, 1, 2, 4], LLAMA_70B),
        ("3xa100", [2, 2, 2], MIXTRAL),
        ("1xcpu-512g,1xh200", [1, 1], GPT_OSS),
    ],
)
def test_layers_and_steps_are_those_of_the_coordinator(
    folder: Path, spec: str, sizes: list[int], config: dict[str, Any]
) -> None:
    """It is given workers with these devices, each bound to its stage."""
    write(folder, config)
    found = plan(folder, spec, tensor_parallel_size=sizes)
    infos = [
        RegisterRequest(
            worker_id=f"stage-{stage}",
            pool=stage,
            tp_size=size,
            device=DeviceInfo(
                name=device.name,
                memory_bytes=int(device.memory_gib * GIB * (1 / size if device.is_cpu else 0.9)),
                bytes_per_s=device.bytes_per_s,
                flops_per_s=device.flops_per_s,
            ),
        )
        for stage, (device, size) in enumerate(zip(workers(spec), sizes, strict=True))
    ]
    settings = CoordinatorSettings(model=str(folder), load_format="dummy", pipeline_parallel_size=len(sizes))
    target = build(settings)
    candidates = [Candidate(w.worker_id, w.pool, kind) for w, kind in zip(infos, kinds(infos), strict=True)]
    chosen = choose(target, candidates, [])
    assert [(s.first_layer, s.last_layer + 1) for s in found.stages] == [holder.layers for holder in chosen]
    assert found.steps_in_flight == target.limits.steps_in_flight


def test_a_stage_adds_up_by_hand(folder: Path) -> None:
    """40 layers on a rank of two, each with 8 KV heads of 128, half of them here."""
    found = plan(write(folder, LLAMA_70B), "2xh100", tensor_parallel_size=[2], layer_partition=[40, 40])
    first, last = found.stages
    attention, mlp = 2 * 8192 * 8192 + 2 * 8192 * 1024, 3 * 8192 * 28672
    table = 128256 * 8192
    layers = 40 * (attention + mlp + 2 * 8192) * 2
    assert first.weight_bytes == layers / 2 + 2 * table  # the embedding is on every rank
    assert last.weight_bytes == layers / 2 + table + 8192
    assert first.kv_bytes_per_token == 40 * 2 * 4 * 128 * 2
    buffers = (2 + 4) * 512 * 8192 * 2
    room = int(80 * GIB * 0.9) - first.weight_bytes - buffers
    assert first.kv_tokens == min(32 * 4096, room // (16 * first.kv_bytes_per_token) * 16)
    assert first.row_s == pytest.approx(layers / 2 / 3350e9, rel=1e-3)
    rows_kv = found.rows * 2048 * first.kv_bytes_per_token
    assert first.full_step_s == pytest.approx((layers / 2 + rows_kv) / 3350e9, rel=1e-3)
    assert found.tokens_per_s == pytest.approx(found.sequences / (2 * last.full_step_s), rel=1e-3)
    assert found.bottleneck == 1


def test_a_mixture_of_experts_reads_what_its_rows_use(folder: Path) -> None:
    found = plan(write(folder, MIXTRAL), "2xa100", layer_partition=[16, 16])
    first = found.stages[0]
    experts = 16 * 8 * 3 * 4096 * 14336 * 2
    others = first.weight_bytes - experts - 32000 * 4096 * 2
    assert first.row_s == pytest.approx((others + experts * 2 / 8) / 2039e9, rel=1e-3)
    kv = found.rows * 2048 * first.kv_bytes_per_token
    read = 1 - (1 - 2 / 8) ** found.rows
    assert first.full_step_s == pytest.approx((others + experts * read + kv) / 2039e9, rel=1e-3)


def test_quantized_weights_count_in_their_bits(folder: Path) -> None:
    deepseek = plan(write(folder, DEEPSEEK_V3, quantization_config=FP8), "8xh200", tensor_parallel_size=[2])
    assert sum(s.weight_bytes * 2 for s in deepseek.stages) / 1e9 == pytest.approx(671 + 4, rel=0.01)
    # Heads, as pages hold them today, on every rank.
    assert deepseek.stages[0].kv_bytes_per_token == 9 * 128 * (128 + 64 + 128) * 2
    gpt_oss = plan(write(folder, GPT_OSS, quantization_config=MXFP4), "1xh100")
    assert gpt_oss.stages[0].weight_bytes / 1e9 == pytest.approx(65.2, rel=0.01)
    loaded = plan(write(folder, LLAMA_70B), "1xh200", quantization="int8")
    assert loaded.stages[0].weight_bytes / 1e9 == pytest.approx(70.6 + 2 * 128256 * 8192 / 1e9, rel=0.01)
    with pytest.raises(ConfigError, match="quantized already"):
        plan(write(folder, DEEPSEEK_V3, quantization_config=FP8), "8xh200", quantization="int8")


def test_keys_and_values_of_one_byte_are_half_as_much(folder: Path) -> None:
    write(folder, LLAMA_70B)
    whole, half = (plan(folder, "2xh100", kv_cache_dtype=dtype) for dtype in ("auto", "fp8"))
    assert half.stages[0].kv_bytes_per_token == whole.stages[0].kv_bytes_per_token // 2
    assert half.sequences >= 2 * whole.sequences


def test_a_cpu_gives_pages_a_quarter_of_what_is_free(folder: Path) -> None:
    write(folder, MIXTRAL)
    for gib, pages_gib in ((None, (64 - 43.5) / 4), (4.0, 4.0)):
        found = plan(folder, "2xcpu-64g", kv_cache_gib=gib)
        held = found.stages[0].kv_tokens * found.stages[0].kv_bytes_per_token / GIB
        assert held == pytest.approx(pages_gib, rel=0.02)
    with pytest.raises(DoesNotFit, match=r"stage 0 \(cpu\) needs 0\.50 GiB.*--max-model-len") as e:
        plan(folder, "2xcpu-45g", max_model_len=8192)
    (shorter,) = re.findall(r"--max-model-len (\d+)", str(e.value))
    assert plan(folder, "2xcpu-45g", max_model_len=int(shorter)).sequences == 1


class TestDoesNotFit:
    def refusal(self, folder: Path, spec: str, **options: Any) -> str:
        with pytest.raises(DoesNotFit) as e:
            plan(folder, spec, **options)
        return str(e.value)

    def test_what_is_missing_is_said_and_enough(self, folder: Path) -> None:
        write(folder, LLAMA_70B)
        text = self.refusal(folder, "2xl40s")
        (more,) = re.findall(r"needs (\S+) GiB more on each rank", text)
        # The driver keeps a tenth for others (--gpu-memory-utilization).
        plan(folder, f"2xl40s-{45 + float(more) / 0.9 + 0.1:.2f}g")
        assert self.refusal(folder, f"2xl40s-{45 + float(more) / 0.9 - 0.1:.2f}g")

    def test_each_way_out_is_one(self, folder: Path) -> None:
        write(folder, LLAMA_70B)
        text = self.refusal(folder, "2xl40s")
        assert "--quantization int4 would fit" in text
        assert "--quantization int8" in text
        assert "-tp 2,2 would fit" in text
        assert "it needs 4 stages" in text
        assert plan(folder, "2xl40s", quantization="int8").sequences >= 1
        assert plan(folder, "2xl40s", tensor_parallel_size=[2]).sequences >= 1
        assert plan(folder, "4xl40s").sequences >= 1

    def test_ranges_that_were_asked_for(self, folder: Path) -> None:
        text = self.refusal(write(folder, LLAMA_70B), "2xh100", layer_partition=[60, 20])
        assert "stage 0 (layers 0-59) needs" in text
        (more,) = re.findall(r"needs (\S+) GiB more on each rank", text)
        plan(folder, f"2xh100-{80 + float(more) / 0.9 + 0.1:.2f}g", layer_partition=[60, 20])


class TestWorkers:
    def test_counts_kinds_and_memory(self) -> None:
        found = workers("2xh100-64g, 1xcpu-256g,l4")
        assert [(d.name, d.memory_gib) for d in found] == [("h100", 64), ("h100", 64), ("cpu", 256), ("l4", 22)]
        assert found[0].bytes_per_s == DEVICES["h100"].bytes_per_s

    def test_figures_of_ones_own(self) -> None:
        a, b, c = workers("1xh100,2xcpu,gbps=40.5,tflops=1.5,mem=24")
        assert a == DEVICES["h100"]
        assert b == c
        assert (b.memory_gib, b.bytes_per_s, b.flops_per_s) == (24, 40.5e9, 1.5e12)

    @pytest.mark.parametrize(
        ("spec", "words"),
        [
            ("2xh10", ["'2xh10'", "nearest is h100", "mem="]),
            ("1xh100,1xmi300", ["'1xmi300'", "nearest is mi300x"]),
            ("0xh100", ["'0xh100'", "2xh100-80g,1xcpu-256g"]),
            ("2xh100-80", ["'2xh100-80'", "COUNTxKIND"]),
            ("", ["''", "COUNTxKIND"]),
            ("h100,speed=3", ["'speed=3'", "gbps=NUMBER"]),
            ("h100,gbps=fast", ["'gbps=fast'"]),
            ("h100,gbps=nan", ["'gbps=nan'"]),
            ("gbps=3", ["'gbps=3'"]),
        ],
    )
    def test_a_wrong_word_is_named(self, spec: str, words: list[str]) -> None:
        with pytest.raises(ConfigError) as e:
            workers(spec)
        for word in words:
            assert word in e.value.message, e.value.message


class TestCommand:
    def test_the_table_is_at_most_80_columns_wide(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        write(folder, DEEPSEEK_V3, quantization_config=FP8)
        for spec, tp in (("8xh200", "2"), ("4xmi300x,1xcpu-1024g,2xrtx4090,gbps=1,mem=256", "2,2,2,2,1,2,2")):
            status, out, err = as_asked(capsys, str(folder), "--workers", spec, "-tp", tp)
            assert status == 0, err
            assert max(map(len, out.splitlines())) <= 80, out
            assert sum("*" in line[:6] for line in out.splitlines()) == 1
        assert not err

    def test_json_says_the_same(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        write(folder, MIXTRAL)
        status, out, _ = as_asked(capsys, str(folder), "--workers", "2xa100", "--json")
        found = json.loads(out)
        assert (status, found["fits"], len(found["stages"])) == (0, True, 2)
        assert found["sequences"] == plan(folder, "2xa100").sequences

    def test_status_1_if_it_does_not_fit(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        write(folder, LLAMA_70B)
        status, out, _ = as_asked(capsys, str(folder), "--workers", "1xl4")
        assert status == 1
        assert out.startswith("does not fit: needs ")
        status, out, _ = as_asked(capsys, str(folder), "--workers", "1xl4", "--json")
        assert (status, json.loads(out)["fits"]) == (1, False)

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (("--workers", "2xh10"), "nearest is h100"),
            (("--workers", "4xh100", "-tp", "3"), "nearest size that works is 2"),
            (("--workers", "4xh100", "-tp", "1,2"), "one for each of the 4 stages"),
            (("--workers", "81xh100"), "at most 64"),
            (("--workers", "2xh100", "--max-model-len", "200000"), "--max-model-len 131072 or less"),
            (("--workers", "2xh100", "--layer-partition", "40,41"), "adds up to 81"),
            (("--workers", "2xh100", "--gpu-memory-utilization", "2"), "gpu_memory_utilization"),
        ],
    )
    def test_status_2_for_what_cannot_be(
        self, folder: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
    ) -> None:
        status, _, err = as_asked(capsys, str(write(folder, LLAMA_70B)), *words)
        assert status == 2
        assert message in err, err

    def test_no_folder(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        status, _, err = as_asked(capsys, str(folder / "none"), "--workers", "1xh100")
        assert status == 2
        assert "no such directory" in err
