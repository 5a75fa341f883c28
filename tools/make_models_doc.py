"""Tries every architecture of transformers, and writes docs/models.md and stagemesh/models/architectures.py.

python tools/make_models_doc.py          # about two minutes on one core
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from stagemesh.models.support import DECIDING, why_not
from stagemesh.stage_worker.model.plain.parallel import cut_heads

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "numerics")]

from breadth import BOUNDS, LENGTHS, MAX_TOKENS, Outcome, model_types, try_architecture  # noqa: E402

INTRODUCTION = """\
# Models

What stagemesh can serve, and what it refuses. `tools/make_models_doc.py` writes this page up to *Quantized*: it tries
every decoder-only text architecture of the installed transformers that declares a pipeline plan
(`base_model_pp_plan`); `tests/numerics/test_breadth.py` fails when what happens is no longer what is written here.

Each is made tiny with seeded weights, split into {stages} stages in one process, and decoded greedily in fp32: prompts
of {lengths} tokens in chunks of 47, then {max_tokens} tokens as one batch over paged KV. *works* means: not one token
differs from transformers' own `generate` on the whole model, and zeroing the KV changes every output.

Made with transformers {version}: {works} work, {refused} are refused.

{compiled} of those that work run through compiled kernels on a CPU with AVX512-BF16, in bf16, fp16 and fp32. The
others run through transformers' modules there, several times slower. The kernels serve what is made of known parts
(`stage_worker/model/parts/description.py`), whatever its type: the parts are read off transformers' modules by running
them. Before a model is served, one layer of each kind is computed both ways with random weights. This description is
kept in `~/.cache/stagemesh`. Making it takes a few seconds, 10 to 20 for large models, once for a model on a machine.

Refused whatever the type, with the reason in the error:

- weights that are quantized by a method that is not known, or without a `quantization_config` (see Quantized);
- rotary embeddings that depend on the longest position in a batch (`longrope`, `dynamic`), or of an unknown type;
- layers that mix tokens by something other than causal attention over cached keys and values (recurrent,
  convolutional, indexed or compressed attention), that share keys and values with another layer, or that take inputs
  beside the hidden states;
- a vision or audio tower.

The coordinator refuses these from config.json and the headers of the weights, before a worker starts
(`stagemesh/models/`). A type that is not on this page is refused, too, unless the installed transformers is newer than
the one above: then it is tried, with a warning in the log, if none of these applies and each of its layers calls
attention exactly once.

Tensor parallelism divides heads, the columns between gate and down, and the width of each expert. Through
transformers' modules it follows the architecture's own plan (`base_model_tp_plan`). Heads must divide by the ranks; KV
heads fewer than ranks are replicated. Where a plan gathers queries, keys and values (Phi-3, OLMo 2 and 3) or leaves
attention whole (DeepSeek), the modules keep all KV heads on every rank; GPT-OSS cuts its head alone. `serve` refuses
other sizes before it starts anything; the coordinator gives a worker of such a size no layers, and says why in
`stagemesh status`.

What is read of a checkpoint's folder (`stagemesh/checkpoint.py`), by everybody alike:

- The files that `model.safetensors.index.json` names, or `model.safetensors`. If both are there and the index names
  other files, it is not clear which are meant, and the folder is refused.
- Embedding and output head, if both are stored, whatever `tie_word_embeddings` says; else the one that is stored serves
  as both, if they are tied. transformers does the same.
- Every tensor of a stage's layers. One that the model does not use ends the load, because the tokens would not be its
  authors'. Left out are tensors that are computed today (rotary frequencies, masks), layers beyond `num_hidden_layers`
  (multi-token prediction), towers, and what transformers leaves out of the architecture.
- `--max-model-len` is at most `max_position_embeddings`, times the factor of yarn, linear or dynamic rotary scaling.

| model type | class | split | compiled kernels | why not |
| --- | --- | --- | --- | --- |
"""
TABLE = '''\
"""What transformers {version} says of each model type, for services that do not import it.

Written by tools/make_models_doc.py, not by hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

MADE_WITH = "{version}"


@dataclass(frozen=True)
class Architecture:
    """A model type that declares a pipeline plan."""

    verified: bool = False
    """Whether its split gave transformers' own tokens."""
    cuts: Literal["", "heads", "kv_heads"] = ""
    """The heads that tensor-parallel ranks divide: none, query heads, or query and KV heads."""
    refusal: str = ""
    """Why it is refused whatever its configuration."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """The class's defaults for which a model is refused, if config.json does not give other values."""


ARCHITECTURES: Mapping[str, Architecture] = {{
{rows}}}
'''


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
    version = transformers.__version__
    page = INTRODUCTION.format(
        stages=len(BOUNDS) - 1,
        lengths=" and ".join(map(str, LENGTHS)),
        max_tokens=MAX_TOKENS,
        version=version,
        works=sum(outcome.status == "works" for outcome in outcomes),
        refused=sum(outcome.status == "refused" for outcome in outcomes),
        compiled=sum(outcome.status == "works" and not outcome.plain_because for outcome in outcomes),
    )
    rows = [
        f"| `{o.model_type}` | `{o.architecture}` | {o.status} | {_compiled(o)} | {o.detail or o.plain_because} |\n"
        for o in outcomes
    ]
    written = ROOT / "docs" / "models.md"
    _, heading, by_hand = written.read_text().partition("\n## ")
    written.write_text(page + "".join(rows) + heading + by_hand)
    known = "".join(
        f'    "{o.model_type}": {_architecture(o)},\n' for o in sorted(outcomes, key=lambda o: o.model_type)
    )
    table = ROOT / "stagemesh" / "models" / "architectures.py"
    table.write_text(TABLE.format(version=version, rows=known))
    subprocess.run([sys.executable, "-m", "ruff", "format", "--quiet", str(table)], check=True)


def _compiled(outcome: Outcome) -> str:
    return "" if outcome.status != "works" else "no" if outcome.plain_because else "yes"


def _architecture(outcome: Outcome) -> str:
    """Returns the entry of an architecture in the table."""
    cls = CONFIG_MAPPING[outcome.model_type]
    entry: dict[str, object] = {}
    if outcome.status == "works":
        entry["verified"] = True
    if cuts := cut_heads(getattr(cls, "base_model_tp_plan", None) or {}):
        entry["cuts"] = cuts
    if outcome.status == "refused" and outcome.by_class:
        entry["refusal"] = outcome.detail
    values = {name: getattr(cls(), name, None) for name in DECIDING}
    # A tower is written as an empty one, and each kind of layer once: that is all that is asked of them.
    values = {name: {} if name.endswith("_config") else value for name, value in values.items() if value is not None}
    values["layer_types"] = sorted(set(values.get("layer_types") or ()))
    refusing = {name: value for name, value in values.items() if why_not({name: value})}
    if refusing:
        entry["defaults"] = refusing
    return f"Architecture({', '.join(f'{name}={value!r}' for name, value in entry.items())})"


if __name__ == "__main__":
    raise SystemExit(main())
