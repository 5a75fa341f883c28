"""Writes a trace in Chrome's format, for chrome://tracing and ui.perfetto.dev. Pure.

Gateway, stages and links are shown as processes. Work that one thread does in sequence becomes "X" events. What
overlaps (steps in flight, waiting plans, activations on a link) becomes pairs of "b" and "e". Arrows ("s", "t", "f")
follow a step from its plan through the stages to its tokens. The format:
https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .records import Step, Trace

Event = dict[str, Any]

GATEWAY = 1
PLANS, TOKENS, PLANS_SENT, RESULTS_SENT = 1, 2, 3, 4
ENGINE, WAITING, READY = 1, 2, 3
ACTIVATIONS = 1


def stage_pid(stage: int) -> int:
    """Returns the process number of a stage."""
    return 10 + 2 * stage


def link_pid(stage: int) -> int:
    """Returns the process number of the link from a stage to the next."""
    return stage_pid(stage) + 1


def events(trace: Trace) -> list[Event]:
    """Returns all events. Times are microseconds since the first plan."""
    zero = min(step.planned_us for step in trace.steps)
    out = [*_names(trace), *(event for step in trace.steps for event in _step(step))]
    for event in out:
        if "ts" in event:
            event["ts"] = round(event["ts"] - zero, 3)
    return out


def document(trace: Trace, told: dict[str, Any]) -> dict[str, Any]:
    """Returns the whole file. Viewers show `told` as information about the trace."""
    clocks = {
        f"stage {i}": {
            "offset_us": clock.offset_us,
            "uncertainty_us": clock.uncertainty_us,
            "shared_with_gateway": clock.shared,
        }
        for i, clock in enumerate(trace.clocks)
    }
    return {
        "traceEvents": events(trace),
        "displayTimeUnit": "ms",
        "otherData": {"model": trace.model, "pipeline": trace.pipeline_id, "epoch": trace.epoch, "clocks": clocks}
        | told,
    }


def _names(trace: Trace) -> Iterator[Event]:
    lanes = {PLANS: "plans", TOKENS: "tokens", PLANS_SENT: "plans to stage 0", RESULTS_SENT: "results to gateway"}
    yield from _named(GATEWAY, "gateway", lanes)
    for info, clock in zip(trace.stages, trace.clocks, strict=True):
        name = f"stage {info.stage}: layers {info.layers[0]}-{info.layers[1] - 1}"
        how = "the gateway's clock" if clock.shared else f"clock known to {clock.uncertainty_us:.0f} us"
        lanes = {ENGINE: name, WAITING: "plans that wait", READY: "steps that are ready"}
        yield from _named(stage_pid(info.stage), f"{name}, tp {info.tp_size}, {info.worker_id} ({how})", lanes)
        if info.stage < len(trace.stages) - 1:
            name, route = f"link {info.stage} to {info.stage + 1}", f" ({info.route})" if info.route else ""
            yield from _named(link_pid(info.stage), name + route, {ACTIVATIONS: name})


def _named(pid: int, name: str, threads: dict[int, str]) -> Iterator[Event]:
    yield {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}}
    yield {"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": pid}}
    for tid, thread in threads.items():
        yield {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": thread}}


def _step(step: Step) -> Iterator[Event]:
    """Yields the events of one step, with its arrows."""

    def spent(pid: int, tid: int, cat: str, word: str, begin: float, end: float, **args: float) -> Event:
        """Makes an event for a thread's work. `word`: text of its box, before the number of the step."""
        told = {"rows": len(step.sequences), "sampled": len(step.sampled), "tokens": step.tokens}
        told["prefill_tokens"] = step.prefill_tokens
        event = {"pid": pid, "tid": tid, "cat": cat, "name": f"{word} {step.step}", "ts": begin, "args": told | args}
        return event | {"ph": "X", "dur": round(max(0.0, end - begin), 3)}

    def beside(pid: int, tid: int, cat: str, word: str, begin: float, end: float) -> Iterator[Event]:
        """Makes events for work that overlaps other work of its kind. The two events follow each other."""
        event = spent(pid, tid, cat, word, begin, end) | {"id": f"{pid}.{cat}.{step.step}"}
        del event["dur"]
        yield event | {"ph": "b"}
        yield event | {"ph": "e", "ts": max(begin, end)}

    yield spent(GATEWAY, PLANS, "plan", "plan", step.planned_us, step.sent_us)
    yield spent(GATEWAY, TOKENS, "tokens", "tokens", step.received_us, step.delivered_us)
    yield from beside(GATEWAY, PLANS, "in flight", "step", step.planned_us, step.delivered_us)
    yield from beside(GATEWAY, PLANS_SENT, "plan sent", "plan", step.planned_us, step.stages[0].plan_arrived_us)
    arrow: Event = {"name": "step", "cat": "flow", "id": step.step}
    yield arrow | {"ph": "s", "pid": GATEWAY, "tid": PLANS, "ts": step.planned_us}
    for i, t in enumerate(step.stages):
        pid = stage_pid(i)
        waited = {"wait_input_us": t.wait_input_us, "wait_send_us": t.wait_send_us, "compute_cpu_us": t.compute_cpu_us}
        yield spent(pid, ENGINE, "compute", "step", t.began_us, t.output_us, **waited)
        yield arrow | {"ph": "t", "pid": pid, "tid": ENGINE, "ts": t.began_us}
        yield from beside(pid, READY, "ready", "step", t.ready_us, t.began_us)
        if i < len(step.stages) - 1:
            yield spent(pid, ENGINE, "send", "send", t.output_us, t.handed_over_us)
            arrived_us = step.stages[i + 1].input_complete_us
            yield from beside(link_pid(i), ACTIVATIONS, "link", "step", t.output_us, arrived_us)
        if t.draft_us > 0:
            yield spent(pid, ENGINE, "draft", "guesses of", t.handed_over_us, t.ended_us)
        yield spent(pid, ENGINE, "report", "result", t.ended_us, t.result_sent_us)
        yield from beside(pid, WAITING, "plan waits", "plan", t.plan_arrived_us, t.began_us)
    yield from beside(GATEWAY, RESULTS_SENT, "result sent", "result", step.stages[-1].ended_us, step.delivered_us)
    yield arrow | {"ph": "f", "bp": "e", "pid": GATEWAY, "tid": TOKENS, "ts": step.received_us}
