"""Every architecture that declares a pipeline plan gives transformers' own tokens over three stages, or is refused.

What each does is written down in docs/models.md (`tools/make_models_doc.py`); a change of that is a failure here.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import transformers
from breadth import model_types, try_architecture

from stagemesh.stage_worker.model.plain.verified import VERIFIED

DOC = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
WRITTEN = dict(re.findall(r"^\| `(\w+)` \| `\w+` \| (works|refused)", DOC, re.M))
SAME_VERSION = f"transformers {transformers.__version__}" in DOC


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
    assert (outcome.status == "works") == (model_type in VERIFIED) or model_type not in WRITTEN
    if SAME_VERSION:
        assert WRITTEN[model_type] == outcome.status, f"{outcome}: run tools/make_models_doc.py"
