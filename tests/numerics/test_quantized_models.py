"""Quantized checkpoints give the logits of transformers' model with the same values as plain weights.

Over one and three stages, and over two ranks, through transformers' modules and through the compiled kernels. The
bounds are those of fp32 sums in another order, and for the kernels those of inputs of 16 bits.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from chain import Chain, Row
from quantized_checkpoints import FORMATS, LINEAR, Format, fp8, gptq, packed, quantize_folder, quantize_gpt_oss
from safetensors.torch import load_file, save_file
from test_tp import TIMEOUT_S, checkpoint_bytes, start_ranks
from tiny_models import clear_prompts, make_checkpoint, whole_model

from stagemesh.checkpoint import inspect
from stagemesh.errors import ConfigError
from stagemesh.stage_worker.model.choose import load_shard
from stagemesh.stage_worker.model.parallel import TensorParallel
from stagemesh.stage_worker.model.plain.shard import ModelShard
from stagemesh.stage_worker.model.quantized.quantize import Method, quantize
from stagemesh.stage_worker.model.spec import ShardSpec
from stagemesh.stage_worker.native import ops
from stagemesh.stage_worker.native.shard import NativeShard

SPLITS = [(0, 3), (0, 1, 2, 3)]
CLOSE = {True: 3e-5, False: 2e-3}
"""Largest difference of a logit, relative to the largest logit: with --enforce-eager, and without. The kernels round
what goes into a quantized linear to 16 bits. In bf16, all other roundings make ten times as much."""
EAGER = [True, False]
PROMPT = list(range(3, 250, 6))
SMALL = {
    "fp8": Format({"quant_method": "fp8", "weight_block_size": [16, 8]}, fp8(16, 8, "weight_scale_inv")),
    "gptq": Format(
        {"quant_method": "gptq", "bits": 4, "group_size": 8, "desc_act": True}, gptq(group=8, act_order=True)
    ),
    "w4a16": Format(FORMATS["w4a16"].config, packed(group=8)),
}
"""Formats with groups that divide all sizes of the tiny models with experts."""


def some_in_ci(cases: Iterable[Any], every: int = 3) -> list[Any]:
    """Marks all but one of `every` cases as slow. `make numerics` goes through all."""

    def marked(at: int, case: Any) -> Any:
        values = case if isinstance(case, tuple) else (case,)
        return pytest.param(*values, marks=pytest.mark.slow if at % every else ())

    return [marked(at, case) for at, case in enumerate(cases)]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    families = ("llama", "llama_tied", "mixtral", "deepseek_v3", "gpt_oss", "gemma2", "phi3")
    return {
        name: make_checkpoint(name, tmp_path_factory.mktemp(name) / "base", num_hidden_layers=3) for name in families
    }


def logits(
    folder: Path, split: tuple[int, ...], eager: bool, quantization: str = "", dtype: str = "float32"
) -> torch.Tensor:
    """Logits after the prompt, which comes in two chunks."""
    chain = Chain(folder, split, dtype=dtype, quantization=quantization, enforce_eager=eager)
    kind = ModelShard if eager or ops.library() is None else NativeShard
    assert all(isinstance(shard, kind) for shard in chain.shards)
    chain.step([Row(PROMPT[:20], 0, [2, 0, 1], False)])
    return chain.step([Row(PROMPT[20:], 20, [2, 0, 1], True)])[0]


def expected(folder: Path) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = whole_model(str(folder))(torch.tensor([PROMPT])).logits[0, -1]
    return found


def check(folder: Path) -> None:
    want = expected(folder / "plain")
    for split, eager in product(SPLITS, EAGER):
        assert (logits(folder, split, eager) - want).abs().max() <= CLOSE[eager] * want.abs().max(), (split, eager)


@pytest.mark.parametrize("name", some_in_ci(FORMATS))
def test_llama_in_each_format(bases: dict[str, Path], tmp_path: Path, name: str) -> None:
    folder = quantize_folder(bases["llama"], tmp_path / "quantized", FORMATS[name])
    check(folder)
    assert (expected(folder / "plain") - expected(bases["llama"])).abs().max() > 0.01, "nothing was quantized"


@pytest.mark.parametrize(
    ("family", "format"),
    some_in_ci(product(["mixtral", "deepseek_v3", "gemma2", "phi3", "llama_tied"], SMALL), every=2),
)
def test_other_architectures(bases: dict[str, Path], tmp_path: Path, family: str, format: str) -> None:
    check(quantize_folder(bases[family], tmp_path / "quantized", SMALL[format]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["fp8 by blocks", "w8a8 int8", "gptq act order"])
def test_in_16_bits(bases: dict[str, Path], tmp_path: Path, name: str, dtype: str) -> None:
    """The kernels round no more than the modules do."""
    folder = quantize_folder(bases["llama"], tmp_path / "quantized", FORMATS[name])
    want = expected(folder / "plain")
    ours, theirs = (
        float((logits(folder, SPLITS[1], eager, dtype=dtype) - want).norm() / want.norm()) for eager in (False, True)
    )
    assert ours < 1.5 * theirs


def test_gpt_oss_in_mxfp4(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = quantize_gpt_oss(bases["gpt_oss"], tmp_path / "quantized")
    check(folder)
    shard = load_shard(ShardSpec(str(folder), 0, 3, "bfloat16"), TensorParallel())
    assert shard.dtype == torch.bfloat16
    assert shard.tensor_bytes_read == checkpoint_bytes(folder)


@pytest.mark.filterwarnings("ignore")
def test_two_ranks_read_their_shares_and_give_the_same_tokens(bases: dict[str, Path], tmp_path: Path) -> None:
    cases = {name: quantize_folder(bases["llama"], tmp_path / name, format) for name, format in FORMATS.items()}
    cases |= {
        f"mixtral {name}": quantize_folder(bases["mixtral"], tmp_path / f"m-{name}", f) for name, f in SMALL.items()
    }
    cases["gpt_oss"] = quantize_gpt_oss(bases["gpt_oss"], tmp_path / "gpt_oss")
    prompts = {name: clear_prompts(folder / "plain", [5, 40], 3) for name, folder in cases.items()}
    jobs = [[str(cases[n]), [0, 1, 3], [p.prompt_ids for p in own], 3, True] for n, own in prompts.items()]
    path = tmp_path / "jobs.json"
    path.write_text(json.dumps({"store": str(tmp_path / "store"), "jobs": jobs}))
    ranks = start_ranks(path, 2)
    try:
        for rank, process in enumerate(ranks):
            _, errors = process.communicate(timeout=TIMEOUT_S)
            assert process.returncode == 0, f"rank {rank}: {errors.decode()[-3000:]}"
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    for rank in range(2):
        results = json.loads(Path(f"{path}.{rank}").read_text())
        for (name, own), (tokens, read, _) in zip(prompts.items(), results, strict=True):
            assert tokens == [prompt.tokens for prompt in own], f"{name}, rank {rank}"
            # Embedding and norms are read by each rank. In GPT-OSS, only the head is cut.
            share = 1.0 if name == "gpt_oss" else 0.75
            assert sum(read) < share * checkpoint_bytes(cases[name]), f"{name}, rank {rank}"


@pytest.mark.parametrize(
    ("family", "method"),
    some_in_ci(product(["llama", "mixtral", "gpt_oss", "deepseek_v3", "phi3"], ["int8", "fp8", "int4"]), every=2),
)
def test_linears_and_experts_alone_are_quantized_while_they_load(
    bases: dict[str, Path], tmp_path: Path, family: str, method: Method
) -> None:
    tensors = load_file(bases[family] / "model.safetensors")
    for name, tensor in tensors.items():
        if LINEAR.search(name) and tensor.dim() == 2:
            tensors[name] = quantize(tensor, method).dequantize()
        elif name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            values = [quantize(expert.t(), method).dequantize().t() for expert in tensor]
            tensors[name] = torch.stack(values).contiguous()
    folder = Path(shutil.copytree(bases[family], tmp_path / "plain"))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    want = expected(folder)
    for split, eager in product(SPLITS, EAGER):
        found = logits(bases[family], split, eager, quantization=method)
        assert (found - want).abs().max() <= CLOSE[eager] * want.abs().max(), (split, eager)
    assert (want - expected(bases[family])).abs().max() > 2 * CLOSE[False] * want.abs().max(), "nothing was quantized"


def test_weights_are_not_quantized_twice(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = quantize_folder(bases["llama"], tmp_path / "quantized", FORMATS["gptq"])
    with pytest.raises(ConfigError, match="quantized already"):
        load_shard(ShardSpec(str(folder), 0, 3, quantization="int8"), TensorParallel())


@pytest.mark.parametrize("name", FORMATS)
def test_the_coordinator_counts_the_same_parameters(bases: dict[str, Path], tmp_path: Path, name: str) -> None:
    folder = quantize_folder(bases["llama"], tmp_path / "quantized", FORMATS[name])
    found, plain = inspect(folder), inspect(bases["llama"])
    assert [(p.parameters, p.flops_per_token) for p in found.layers] == [
        (p.parameters, p.flops_per_token) for p in plain.layers
    ]
    assert (found.embedding, found.head) == (plain.embedding, plain.head)
    whole = sum(part.weight_bytes(4) + part.expert_bytes(4) for part in (*found.layers, found.embedding, found.head))
    assert whole == checkpoint_bytes(folder)
    assert found.quantization
    assert not plain.quantization
