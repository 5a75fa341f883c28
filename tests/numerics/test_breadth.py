"""Every architecture that declares a pipeline plan gives transformers' own tokens over three stages, or is refused.

What each does is written down in docs/models.md (`tools/make_models_doc.py`); a change of that is a failure here.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import transformers
from breadth import model_types, tiny_config, try_architecture

from stagemesh.errors import UnsupportedModel
from stagemesh.models.architectures import ARCHITECTURES
from stagemesh.models.support import check_supported

DOC = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
WRITTEN = dict(re.findall(r"^\| `(\w+)` \| `\w+` \| (works|refused)", DOC, re.M))
VERIFIED = {name for name, known in ARCHITECTURES.items() if known.verified}
SAME_VERSION = f"transformers {transformers.__version__}" in DOC


def why_refused(model_type: str) -> str:
    """What the coordinator makes of this config.json alone."""
    try:
        check_supported(json.loads(tiny_config(model_type).to_json_string()))
    except UnsupportedModel as e:
        return e.message
    return ""


IN_CI = 3
"""One of so many; `make numerics` goes through all."""


@pytest.mark.parametrize(
    "model_type",
    [pytest.param(m, marks=pytest.mark.slow if i % IN_CI else ()) for i, m in enumerate(model_types())],
)
@pytest.mark.filterwarnings("ignore")
def test_splits_like_the_whole(model_type: str, tmp_path: Path) -> None:
    outcome = try_architecture(model_type, str(tmp_path))
    assert outcome.status in {"works", "refused"}
    reason = f"model type {model_type!r} cannot be served: {outcome.detail}"
    assert why_refused(model_type) == (reason if outcome.status == "refused" else "")
    assert len(reason) <= 200, reason
    assert (outcome.status == "works") == (model_type in VERIFIED) or model_type not in WRITTEN
    if SAME_VERSION:
        assert WRITTEN[model_type] == outcome.status, f"{outcome}: run tools/make_models_doc.py"
