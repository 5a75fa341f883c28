"""What the benchmarks work out from what they see: rows, ratios, shares, the ideal pipeline."""

from __future__ import annotations

import importlib.util
import re
import xml.etree.ElementTree
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import suite_result
from benchmarks.common.errors import BenchmarkError
from benchmarks.common.probe import Probe, Sample, role_of, sums_of
from benchmarks.peers import report, workloads
from benchmarks.scale.grid import Point
from benchmarks.scale.report import write_grid

ROOT = Path(__file__).resolve().parents[2]


def test_a_suite_is_told_by_file_and_what_failed_by_name() -> None:
    suite = xml.etree.ElementTree.fromstring(
        "<testsuites><testsuite>"
        '<testcase classname="tests.chaos.test_kill" name="test_one[a]" time="2.6"/>'
        '<testcase classname="tests.chaos.test_kill" name="test_two" time="9.9"><failure message="x"/></testcase>'
        '<testcase classname="tests.chaos.test_kill.TestMany" name="test_three" time="1"><error/></testcase>'
        '<testcase classname="tests.chaos.test_moves" name="test_four" time="0"><skipped/></testcase>'
        "</testsuite></testsuites>"
    )
    found = suite_result.modules(suite.iter("testcase"))
    assert found["tests/chaos/test_kill.py"].failed == ["test_two", "test_three"]
    assert suite_result.table(found)[2:] == [
        "| tests/chaos/test_kill.py | 1 | 2 | 0 | 14 | `test_two` 10 |",
        "| tests/chaos/test_moves.py | 0 | 0 | 1 | 0 | `test_four` 0 |",
    ]


def test_rows_say_layout_load_and_requests_at_once() -> None:
    single, long, plain = workloads.parse_rows("pp2@1,tp2:long-prompts,pp2tp2", None)
    assert (single.layout.pp, single.layout.tp, single.load.concurrency, single.load.num_prompts) == (2, 1, 1, 8)
    assert (long.layout.ranks, long.load.input_len, long.load.concurrency) == (2, 1500, 8)
    assert (plain.layout.ranks, plain.load.concurrency) == (4, 16)
    assert [row.load.num_prompts for row in workloads.parse_rows("pp2,pp2@1", 4)] == [4, 4]
    assert len({row.file_name for row in workloads.parse_rows("table", None)}) == len(workloads.TABLE)


@pytest.mark.parametrize("name", ["", "pp", "pp2@0", "pp2:nothing", "@4", "pp2@1:mixed"])
def test_a_row_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(BenchmarkError, match="write pp2"):
        workloads.parse_row(name)


def test_requests_that_come_at_a_rate_are_not_held_back() -> None:
    shown = workloads.shown_client(workloads.parse_row("pp2:mixed").load)
    assert "--request-rate=4 " in shown
    assert "--random-range-ratio=0.9" in shown
    assert "--max-concurrency" not in shown


def run_of(system: str, tok_s: float, repeat: int = 0) -> report.Run:
    return report.Run("pp2", system, repeat, 1.0, 4, 0, tok_s, 1, 2, 3, 4, 5, 10, 10, 1.0, 0.0)


def test_each_peer_gets_a_ratio_of_medians() -> None:
    runs = [run_of("stagemesh", s) for s in (90.0, 100.0, 500.0)] + [run_of("vllm", 50.0), run_of("llama.cpp", 200.0)]
    ratios = {e["system"]: e["ratio"]["output_tok_s"] for e in report.summarize(runs) if "ratio" in e}
    assert ratios == {"stagemesh / vllm": 2.0, "stagemesh / llama.cpp": 0.5}
    assert not [e for e in report.summarize(runs[3:]) if "ratio" in e]


@pytest.mark.parametrize(
    ("title", "role"),
    [
        ("stagemesh serve", "supervisor"),
        ("stagemesh stage 1", "agent of stage 1"),
        ("stagemesh stage 1 layers 6-11 rank 0", "rank 0 of stage 1"),
        ("stagemesh gateway", "gateway"),
        ("/usr/bin/python -m pytest", "other"),
    ],
)
def test_roles_come_from_titles(title: str, role: str) -> None:
    assert role_of(title) == role


METRICS = """stagemesh_generation_tokens_total 40.0
stagemesh_num_requests_running 3.0
stagemesh_stage_steps_total{stage="1"} 7.0
stagemesh_stage_seconds_total{spent_on="wait_input",stage="1"} 0.5
stagemesh_stage_seconds_total{spent_on="compute",stage="1"} 1.5
"""


def test_metrics_are_read() -> None:
    assert sums_of(METRICS) == {
        "tokens": 40.0, "running": 3.0, "steps 1": 7.0, "stage 1 wait_input": 0.5, "stage 1 compute": 1.5,
    }  # fmt: skip


def test_a_period_ends_with_the_last_token_and_is_as_long_as_the_client_says() -> None:
    """One token and 0.5 s of compute a second from 10 to 20; the rank uses 0.8 s of CPU, the gateway 0.2."""
    samples = []
    for at in range(0, 31):
        busy = float(min(max(at - 10, 0), 10))
        sums = {"tokens": busy, "stage 0 compute": 0.5 * busy, "stage 0 wait_input": 0.1 * busy}
        samples.append(Sample(float(at), {"rank 0 of stage 0": 0.8 * busy, "gateway": 0.2 * busy}, sums))
    spent = Probe(0, "", samples).spent(4.5)
    assert spent is not None
    assert spent.seconds == 4.5
    assert spent.busiest == pytest.approx(0.5)
    assert spent.outside_ranks == pytest.approx(0.2)
    assert spent.not_compute() == pytest.approx(0.5)
    assert Probe(0, "", samples[:5]).spent(1.0) is None


def test_the_ideal_pipeline() -> None:
    """A step each 20 ms when full, whatever its rows; one request crosses all eight stages for each token."""
    point = Point(8, 20.0, 1, 9, False, 8.0, 6.25, 6.25, 0.125, {}, 0.2, {}, 0.1)
    assert point.efficiency == pytest.approx(1.0)
    assert replace(point, at_once=4).efficiency == pytest.approx(0.25)
    assert replace(point, at_once=90, tok_s=500.0, steps_s=50.0).efficiency == pytest.approx(1.0)
    assert replace(point, at_once=90, tok_s=500.0, steps_s=50.0).rows == pytest.approx(10.0)


def test_the_page_and_the_picture_of_a_grid(tmp_path: Path) -> None:
    cpu = {"gateway": 0.8, "agent of stage 0": 0.1, "rank 0 of stage 0": 0.2, "coordinator": 0.01}
    idle = {"gateway": 0.05, "coordinator": 0.001}
    point = Point(2, 20.0, 1, 3, False, 8.0, 24.0, 24.0, 0.5, cpu, 0.2, idle, 0.1)
    points = [point, replace(point, at_once=4, tok_s=40.0, steps_s=10.0)]
    told = {"date": "d", "machine": {"cores": 2, "cpu": "c", "memory_gib": 1.0, "cpu_flags": []}, "versions": {}}
    assert write_grid(tmp_path / "s", points, {**told, "command": "c"}) == 1  # a point below its goal
    page = (tmp_path / "s.md").read_text()
    assert "| 2 | 0.96 (20%) | 0.20 (20%) |" in page
    assert "Below it: P=2 n=4 at 20 ms (0.20)." in page
    assert "| 2 | 4 | 40.0 | 4.0 | 5000 | 1250 |" in page  # the gateway: 0.4 s over idle, for 80 steps and 320 tokens
    for name in ("s.svg", "s-cost.svg"):
        xml.etree.ElementTree.fromstring((tmp_path / name).read_text())
    assert write_grid(tmp_path / "s", points[:1], {**told, "command": "c"}) == 0


def test_every_command_of_the_page_is_there() -> None:
    page = (ROOT / "benchmarks" / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"make (bench[\w-]*)", page)):
        assert f"\n{target}:" in makefile
    for script in set(re.findall(r"python (\S+\.py)", page)):
        assert (ROOT / script).exists()
    modules = set(re.findall(r"python -m ([\w.]+)", page + makefile))
    assert len(modules - {"pytest", "venv", "pip"}) > 6
    for module in modules:
        assert importlib.util.find_spec(module) is not None
