"""From the gateway's records to clocks, events, figures, picture and table; the load's and the command's words."""

from __future__ import annotations

import itertools
import json
import math
import random
import xml.etree.ElementTree as ET
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from stagemesh.bench import chrome, waterfall
from stagemesh.bench.clocks import Exchange, estimate
from stagemesh.bench.cpu import CpuUse
from stagemesh.bench.load import Load
from stagemesh.bench.records import Trace, read
from stagemesh.bench.report import table
from stagemesh.bench.summary import covered_us, spread, summarize
from stagemesh.cli.main import main
from stagemesh.errors import ConfigError, InvalidRequest

COLUMNS = [
    "plan_arrived_us", "input_complete_us", "began_us", "output_us", "ended_us", "result_sent_us",
    "result_received_us", "wait_input_us", "compute_us", "wait_send_us", "compute_cpu_us",
    "draft_us",
]  # fmt: skip
SKEW = (0, 5_000_000_000)
"""The second stage's host was booted an hour and a half before the gateway's."""
REPLAN = "tokens delivered to next plan of a row"
TURNAROUND = "turnaround: last stage's end to that plan taken by stage 0"


def raw(steps: int = 40, skew: tuple[int, int] = SKEW, seed: int = 1) -> dict[str, Any]:
    """Records of two stages that take turns: 1000 us a step on each, two sequences, delays of 50 us and a bit."""
    rng = random.Random(seed)
    records = []
    for n in range(steps):
        at = 1_000_000 + n * 1100

        def way() -> int:
            return 50 + rng.randrange(20)

        first = {"arrived": at + 20 + way()}
        first |= {"complete": first["arrived"], "began": first["arrived"] + 10}
        first |= {"output": first["began"] + 900, "ended": first["began"] + 1000}
        second = {"arrived": at + 20 + way(), "complete": first["output"] + 60}
        second |= {"began": second["complete"] + 5}
        second |= {"output": second["began"] + 995, "ended": second["began"] + 1000}
        stages = []
        for times, offset in zip((first, second), skew, strict=True):
            sent = times["ended"] + 15
            stages.append(
                [times[k] + offset for k in ("arrived", "complete", "began", "output", "ended")]
                + [sent + offset, sent + way(), 7, 1000, 0, 800, 40 if times is first else 0]
            )
        received = stages[1][6]
        records.append(
            {
                "pipeline_id": "p0", "epoch": 4, "step": n + 1, "planned_us": at, "sent_us": at + 20,
                "sequences": [n % 2 + 1], "tokens": 9 if n < 2 else 1, "prefill_tokens": 9 if n < 2 else 0,
                "stages": stages, "sampled": [n % 2 + 1], "received_us": received, "delivered_us": received + 30,
            }
        )  # fmt: skip
    stage = {"worker_id": "w", "tp_size": 1, "device": "cpu", "route": ""}
    return {
        "gateway": {"pid": 1, "boot_id": "b"},
        "pipelines": [
            {
                "pipeline_id": "p0", "epoch": 4, "model": 'odd <name> & "more"',
                "stages": [{"stage": i, "layers": [2 * i, 2 * i + 2], **stage} for i in range(2)],
            }
        ],
        "stage_columns": COLUMNS,
        "steps": records,
    }  # fmt: skip


@pytest.fixture
def trace() -> Trace:
    return read(raw())


@pytest.mark.parametrize("true_us", [-7_000_000_000, -3_000, 900, 5_000_000_000])
def test_a_clocks_offset_is_found_and_its_uncertainty_is_true(true_us: int) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    exchanges = []
    for n in range(200):
        at = n * 10_000
        arrived = at + 50 + int(rng.expovariate(1 / 300))
        answered = arrived + rng.randrange(3000)
        exchanges.append(
            Exchange(at, arrived + true_us, answered + true_us, answered + 80 + int(rng.expovariate(1 / 300)))
        )
    found = estimate(exchanges)
    assert not found.shared
    assert abs(found.offset_us - true_us) <= found.uncertainty_us
    assert found.uncertainty_us <= min(e.round_trip_us for e in exchanges) / 2


def test_a_shared_clock_is_known_as_one() -> None:
    found = estimate([Exchange(0, 300, 500, 520), Exchange(1000, 1040, 1100, 1500)])
    assert (found.offset_us, found.uncertainty_us, found.shared) == (0.0, 30.0, True)


def test_clocks_that_drift_apart_take_the_quickest_exchange() -> None:
    slow, quick = Exchange(0, 100_900, 100_950, 2000), Exchange(9000, 104_030, 104_130, 9160)
    found = estimate([quick, slow])
    assert abs(found.offset_us - 95_000) <= found.uncertainty_us == 30


def test_times_come_onto_the_gateways_clock(trace: Trace) -> None:
    assert [clock.shared for clock in trace.clocks] == [True, False]
    assert abs(trace.clocks[1].offset_us - SKEW[1]) <= trace.clocks[1].uncertainty_us < 100
    for step in trace.steps:
        assert step.planned_us <= step.sent_us
        for t in step.stages:
            assert step.sent_us <= t.plan_arrived_us <= t.began_us <= t.output_us <= t.ended_us <= t.result_sent_us
            assert t.input_complete_us <= t.began_us
            assert t.result_sent_us <= t.result_received_us <= step.received_us <= step.delivered_us


def test_steps_of_another_epoch_are_left_out() -> None:
    records = raw()
    for step in records["steps"][:3]:
        step["epoch"] = 3
    trace = read(records)
    assert (len(trace.steps), trace.left_out) == (37, 3)
    assert "3 steps of another epoch are left out" in table(trace, summarize(trace), "no")


def test_records_of_another_release_are_refused() -> None:
    records = raw()
    records["stage_columns"] = [*COLUMNS[:-1], "something_new"]
    with pytest.raises(InvalidRequest, match="same release"):
        read(records)


def test_events_of_gateway_stages_and_link(trace: Trace) -> None:
    document = json.loads(json.dumps(chrome.document(trace, {"told": 1}), allow_nan=False))
    events = document["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert [name.split(":")[0] for name in names.values()] == ["gateway", "stage 0", "link 0 to 1", "stage 1"]
    assert "clock known to" in names[chrome.stage_pid(1)]
    assert document["otherData"]["told"] == 1
    assert not document["otherData"]["clocks"]["stage 1"]["shared_with_gateway"]
    per_pid: dict[int, int] = defaultdict(int)
    spans: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    opened: dict[str, float] = {}
    for event in events:
        assert event.get("ts", 0) >= 0
        assert event["pid"] in names
        if event["ph"] == "X":
            spans[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
            per_pid[event["pid"]] += event["cat"] == "compute"
        elif event["ph"] == "b":
            assert event["id"] not in opened
            opened[event["id"]] = event["ts"]
            per_pid[event["pid"]] += event["cat"] == "link"
        elif event["ph"] == "e":
            assert opened[event["id"]] <= event["ts"]
            opened[event["id"]] = math.inf
    assert set(opened.values()) == {math.inf}
    assert {pid: per_pid[pid] for pid in (10, 11, 12)} == {10: 40, 11: 40, 12: 40}
    assert sum(event.get("cat") == "draft" for event in events) == 40
    # What one thread does never overlaps: a viewer would nest it.
    for lane in spans.values():
        lane.sort()
        for (_, end), (begin, _) in itertools.pairwise(lane):
            assert end <= begin + 0.002
    arrows = [[e["ph"] for e in events if e.get("cat") == "flow" and e["id"] == n] for n in (1, 40)]
    assert arrows == [["s", "t", "t", "f"]] * 2


def test_the_picture_is_svg_with_a_box_for_each_step(trace: Trace) -> None:
    root = ET.fromstring(waterfall.draw(trace, summarize(trace)))
    boxes = [e for e in root.findall(".//{*}rect") if e.find("{*}title") is not None]
    said = [e.findtext("{*}title") or "" for e in boxes]
    for what, count in (
        ("computes", 80),
        ("hands its output over", 40),
        ("guesses what follows", 40),
        ("activation on the link", 40),
    ):
        assert sum(what in text for text in said) == count
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for box in boxes:
        x, y, w, h = (float(box.attrib[k]) for k in ("x", "y", "width", "height"))
        assert 0 <= x <= x + w <= width
        assert 0 <= y <= y + h <= height
        assert w > 0
    assert any('odd <name> & "more"' in (e.text or "") for e in root.findall(".//{*}text"))


def test_a_picture_of_one_step() -> None:
    trace = read(raw(steps=1, skew=(0, 0)))
    ET.fromstring(waterfall.draw(trace, summarize(trace)))
    assert "1 steps of" in table(trace, summarize(trace), "too short")


def test_the_figures(trace: Trace) -> None:
    summary = summarize(trace)
    first, second = summary.stages
    # 1000 us of every 1100 are a step's.
    assert first.busy_share == pytest.approx(1 / 1.1, abs=0.01)
    assert first.has_step_share > first.busy_share
    assert tuple(first.times[name].p50_ms for name in ("compute", "hand over", "guess")) == (0.9, 0.06, 0.04)
    assert math.isnan(first.times["hop in"].p50_ms)
    assert second.times["hop in"].p50_ms == pytest.approx(0.06, abs=trace.clocks[1].uncertainty_us / 1000)
    assert first.compute_cpu_share == 0.8
    assert summary.slowest.stage == 1
    assert summary.tokens == 40
    assert summary.prefill_share == pytest.approx(18 / 56)
    # The last stage ends 2055 us after a plan; the next plan of that sequence, 2200 us after it, is taken at 2280.
    assert summary.times[TURNAROUND].p50_ms == pytest.approx(0.225, abs=0.04)
    text = table(trace, summary, CpuUse(2.0, {"gateway": 0.2, "stage 0 rank 0": 0.8}, 0.75, 40))
    assert "slowest stage (1) has a step to compute: 0.9" in text
    assert "non-compute CPU share: 0.25 (goal <= 0.15: missed)" in text
    assert "5.00" in text  # ms of the gateway's time a token
    assert "non-compute CPU share: not known" in table(trace, summary, "elsewhere")


def test_a_plan_that_was_there_before_the_token_has_no_turnaround() -> None:
    records = raw(steps=3, skew=(0, 0))
    assert summarize(read(records)).times[TURNAROUND].p50_ms > 0.1
    first, _, third = records["steps"]
    third["planned_us"] = third["sent_us"] = first["received_us"] - 500
    third["stages"][0][0] = first["stages"][1][4] - 100
    summary = summarize(read(records))
    assert summary.times[TURNAROUND].p50_ms == summary.times[REPLAN].p50_ms == 0
    assert math.isnan(summarize(read(raw(steps=2))).times[TURNAROUND].p50_ms)


def test_spans_and_percentiles() -> None:
    assert covered_us([(0, 10), (5, 12), (20, 30), (21, 22)]) == 22
    assert covered_us([]) == 0
    assert spread(range(1, 101)).p50_ms == 0.05
    assert spread(range(1, 101)).p99_ms == 0.099
    assert spread([5]).p99_ms == 0.005


@pytest.mark.parametrize(
    "text", ["", "16", "16x128", "0x1x1", "1x0x1", "1x1x0", "ax1x1", "5000x1x1", "1x1x1x1", "-1x2x3"]
)
def test_a_load_that_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match="16x128x64"):
        Load.parse(text)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["demo", "--url", "http://127.0.0.1:1"], "not both"),
        (["-pp", "2"], "give MODEL"),
        (["--load", "16"], "CLIENTSxINPUTxOUTPUT"),
        (["--url", "127.0.0.1:8000"], "http://"),
    ],
)
def test_wrong_usage_is_said(args: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "trace", *args, "--out", str(tmp_path)]) == 2
    assert words in capsys.readouterr().err


def test_nobody_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "trace", "--url", "http://127.0.0.1:9", "--out", str(tmp_path / "made")]) == 1
    assert "no gateway answers at http://127.0.0.1:9" in capsys.readouterr().err
