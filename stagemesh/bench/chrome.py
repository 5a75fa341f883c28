"""Writes a trace in Chrome's format, for chrome://tracing and ui.perfetto.dev. Pure.

Gateway, stages and links are shown as processes. Work that one thread does in sequence becomes "X" events. What
overlaps (steps in flight, waiting plans, activations on a link) becomes pairs of "b" and "e". Arrows ("s", "t", "f")
follow a step from its plan through the stages to its tokens. The format:
https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

from typing import Any

from .records import Step, Trace

Event = dict[str, Any]

GATEWAY = 1
PLANS, TOKENS = 1, 2
ENGINE, WAITING = 1, 2


def stage_pid(stage: int) -> int:
    """The process number that stands for a stage."""
    return 10 + 2 * stage


def link_pid(stage: int) -> int:
    """The process number that stands for the link from a stage to the next."""
    return stage_pid(stage) + 1


def events(trace: Trace) -> list[Event]:
    """All events. Times are microseconds since the first plan."""
    zero = min(step.planned_us for step in trace.steps)
    out = _names(trace)
    for step in trace.steps:
        out += _gateway(step)
        for i in range(len(trace.stages)):
            out += _stage(step, i, last=i == len(trace.stages) - 1)
            if i:
                out += _link(step, i)
        out += _arrows(step)
    for event in out:
        if "ts" in event:
            event["ts"] = round(event["ts"] - zero, 3)
    return out


def document(trace: Trace, told: dict[str, Any]) -> dict[str, Any]:
    """The whole file. Viewers show `told` as information about the trace."""
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


def _names(trace: Trace) -> list[Event]:
    out = _named(GATEWAY, "gateway", {PLANS: "plans", TOKENS: "tokens"})
    for info, clock in zip(trace.stages, trace.clocks, strict=True):
        first, last = info.layers
        how = "the gateway's clock" if clock.shared else f"clock known to {clock.uncertainty_us:.0f} us"
        label = f"stage {info.stage}: layers {first}-{last - 1}, tp {info.tp_size}, {info.worker_id} ({how})"
        out += _named(stage_pid(info.stage), label, {ENGINE: "engine", WAITING: "plans that wait"})
        if info.stage < len(trace.stages) - 1:
            route = f" ({info.route})" if info.route else ""
            out += _named(link_pid(info.stage), f"link {info.stage} to {info.stage + 1}{route}", {1: "activations"})
    return out


def _named(pid: int, name: str, threads: dict[int, str]) -> list[Event]:
    out: list[Event] = [
        {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}},
        {"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": pid}},
    ]
    for tid, thread in threads.items():
        out.append({"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": thread}})
    return out


def _gateway(step: Step) -> list[Event]:
    args = {
        "rows": len(step.sequences),
        "tokens": step.tokens,
        "prefill_tokens": step.prefill_tokens,
        "sampled": len(step.sampled),
    }
    name = f"step {step.number}"
    return [
        _span(GATEWAY, PLANS, "plan", f"plan {step.number}", step.planned_us, step.sent_us, args),
        _span(GATEWAY, TOKENS, "tokens", f"tokens {step.number}", step.received_us, step.delivered_us, args),
        *_overlapping(GATEWAY, PLANS, "in flight", name, step.number, step.planned_us, step.delivered_us, args),
    ]


def _stage(step: Step, stage: int, *, last: bool) -> list[Event]:
    t, pid = step.stages[stage], stage_pid(stage)
    args = {
        "rows": len(step.sequences),
        "tokens": step.tokens,
        "prefill_tokens": step.prefill_tokens,
        "wait_input_us": t.wait_input_us,
        "wait_send_us": t.wait_send_us,
        "compute_cpu_us": t.compute_cpu_us,
    }
    out = [_span(pid, ENGINE, "compute", f"step {step.number}", t.began_us, t.output_us, args)]
    if not last:
        out.append(_span(pid, ENGINE, "send", f"send {step.number}", t.output_us, t.handed_over_us, {}))
    if t.draft_us > 0:
        out.append(_span(pid, ENGINE, "draft", f"guesses of {step.number}", t.handed_over_us, t.ended_us, {}))
    out.append(_span(pid, ENGINE, "report", f"result {step.number}", t.ended_us, t.result_sent_us, {}))
    name = f"plan {step.number}"
    return out + _overlapping(
        pid,
        WAITING,
        "plan waits",
        name,
        step.number,
        t.plan_arrived_us,
        t.began_us,
        {"ready_for_us": t.began_us - t.ready_us},
    )


def _link(step: Step, stage: int) -> list[Event]:
    """The transfer of the activation to `stage`."""
    begin, end = step.stages[stage - 1].output_us, step.stages[stage].input_complete_us
    name = f"step {step.number}"
    return _overlapping(
        link_pid(stage - 1), 1, "link", name, step.number, begin, max(begin, end), {"tokens": step.tokens}
    )


def _arrows(step: Step) -> list[Event]:
    common = {"name": "step", "cat": "flow", "id": step.number}
    out: list[Event] = [{"ph": "s", "pid": GATEWAY, "tid": PLANS, "ts": step.planned_us, **common}]
    for i, t in enumerate(step.stages):
        out.append({"ph": "t", "pid": stage_pid(i), "tid": ENGINE, "ts": t.began_us, **common})
    out.append({"ph": "f", "bp": "e", "pid": GATEWAY, "tid": TOKENS, "ts": step.received_us, **common})
    return out


def _span(pid: int, tid: int, cat: str, name: str, begin: float, end: float, args: Event) -> Event:
    dur = round(max(0.0, end - begin), 3)
    return {"ph": "X", "pid": pid, "tid": tid, "cat": cat, "name": name, "ts": begin, "dur": dur, "args": args}


def _overlapping(
    pid: int, tid: int, cat: str, name: str, ident: int, begin: float, end: float, args: Event
) -> list[Event]:
    common = {"pid": pid, "tid": tid, "cat": cat, "name": name, "id": f"{pid}.{cat}.{ident}"}
    return [{"ph": "b", "ts": begin, "args": args, **common}, {"ph": "e", "ts": max(begin, end), **common}]
