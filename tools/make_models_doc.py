"""Tries every architecture of transformers, and writes docs/models.md and stage_worker/model/plain/verified.py.

python tools/make_models_doc.py          # about two minutes on one core
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "numerics"))

from breadth import BOUNDS, LENGTHS, MAX_TOKENS, Outcome, model_types, try_architecture  # noqa: E402

INTRODUCTION = """\
# Models

What stagemesh can serve, and what it refuses. This page is written by `tools/make_models_doc.py`, which tries every
decoder-only text architecture of the installed transformers that declares a pipeline plan (`base_model_pp_plan`);
`tests/numerics/test_breadth.py` fails when what happens is no longer what is written here.

Each is made tiny with seeded weights, split into {stages} stages in one process, and decoded greedily in fp32: prompts
of {lengths} tokens in chunks of 47, then {max_tokens} tokens as one batch over paged KV. *works* means: not one token
differs from transformers' own `generate` on the whole model, and zeroing the KV changes every output.

Made with transformers {version}: {works} work, {refused} are refused.

Refused whatever the type, with the reason in the error:

- quantized weights (there are no kernels for them yet);
- rotary embeddings that depend on the longest position in a batch (`longrope`, `dynamic`);
- layers that mix tokens by something other than causal attention over cached keys and values (recurrent,
  convolutional, indexed or compressed attention), that share keys and values with another layer, or that take inputs
  beside the hidden states;
- a vision or audio tower.

A type that is not on this page (a newer transformers) is tried, with a warning in the log, if none of these applies and
each of its layers calls attention exactly once.

Tensor parallelism follows the architecture's own plan (`base_model_tp_plan`). Heads must divide by the ranks; KV heads
fewer than ranks are replicated. Where a plan gathers queries, keys and values (Phi-3, OLMo 2 and 3) or leaves attention
whole (DeepSeek), every rank keeps all KV heads; GPT-OSS cuts its head alone.

| model type | class | split | why not |
| --- | --- | --- | --- |
"""


def main() -> int:
    """Tries all architectures and writes both files. Returns 1 if one gave wrong tokens or failed."""
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    outcomes: list[Outcome] = []
    for model_type in model_types():
        with tempfile.TemporaryDirectory() as folder:
            try:
                outcome = try_architecture(model_type, folder)
            except (AssertionError, RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:
                outcome = Outcome(model_type, "?", "failed", repr(error)[:200])
        print(f"{outcome.model_type}: {outcome.status} {outcome.detail}", flush=True)
        outcomes.append(outcome)
    _write(outcomes)
    return int(any(outcome.status == "failed" for outcome in outcomes))


def _write(outcomes: list[Outcome]) -> None:
    works = sorted(outcome.model_type for outcome in outcomes if outcome.status == "works")
    page = INTRODUCTION.format(
        stages=len(BOUNDS) - 1,
        lengths=" and ".join(map(str, LENGTHS)),
        max_tokens=MAX_TOKENS,
        version=transformers.__version__,
        works=len(works),
        refused=sum(outcome.status == "refused" for outcome in outcomes),
    )
    rows = [f"| `{o.model_type}` | `{o.architecture}` | {o.status} | {o.detail} |\n" for o in outcomes]
    (ROOT / "docs" / "models.md").write_text(page + "".join(rows))
    names = "".join(f'    "{name}",\n' for name in works)
    (ROOT / "stage_worker" / "model" / "plain" / "verified.py").write_text(
        '"""The model types whose split gave transformers\' own tokens. '
        'Written by tools/make_models_doc.py, not by hand."""\n\n'
        f"from __future__ import annotations\n\nVERIFIED: tuple[str, ...] = (\n{names})\n"
    )


if __name__ == "__main__":
    raise SystemExit(main())
