"""A mesh serves quantized checkpoints, and quantizes others by `--quantization`. The tokens are one process's."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from mesh import serve
from quantized_checkpoints import FORMATS, quantize_folder
from tiny_models import make_checkpoint

sys.path.insert(0, str(Path(__file__).parents[1] / "numerics"))

from chain import Chain

PROMPT, TOKENS = list(range(20, 80)), 12


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("llama") / "model")


@pytest.mark.parametrize("tp", ["1", "2,1"])
def test_a_quantized_checkpoint(llama: Path, tmp_path: Path, tp: str) -> None:
    folder = quantize_folder(llama, tmp_path / "quantized", FORMATS["gptq act order"])
    expected = Chain(folder, (0, 6)).greedy([PROMPT], TOKENS)[0]
    assert expected != Chain(llama, (0, 6)).greedy([PROMPT], TOKENS)[0]
    with serve(str(folder), "-pp", "2", "-tp", tp, "--dtype", "float32") as mesh:
        assert mesh.greedy(PROMPT, TOKENS) == expected


def test_weights_are_quantized_as_the_coordinator_says(llama: Path) -> None:
    expected = Chain(llama, (0, 6), quantization="int4").greedy([PROMPT], TOKENS)[0]
    assert expected != Chain(llama, (0, 6)).greedy([PROMPT], TOKENS)[0]
    with serve(str(llama), "-pp", "2", "--dtype", "float32", "--quantization", "int4") as mesh:
        assert mesh.greedy(PROMPT, TOKENS) == expected
