"""Each format of quantized weights becomes the one form in memory, without loss, and only a rank's share is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from quantized_checkpoints import FORMATS, fp8, mxfp4
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from stagemesh.stage_worker.model.checkpoint import Checkpoint
from stagemesh.stage_worker.model.cut import WHOLE, Cut
from stagemesh.stage_worker.model.quantized.packed import Packed
from stagemesh.stage_worker.model.quantized.reader import QuantizedReader
from stagemesh.stage_worker.model.quantized.weights import Weights

N, K = 48, 192
WEIGHT = "model.layers.0.mlp.up_proj.weight"
EXACT = 1e-6
"""Largest difference, relative to the largest weight: one rounding of fp32 in another order."""


def write(folder: Path, name: str, n: int = N, k: int = K) -> torch.Tensor:
    """Writes one linear to a folder in a format, and returns its values."""
    format = FORMATS[name]
    torch.manual_seed(3)
    tensors, values = format.write(torch.randn(n, k) * 0.1)
    named = {WEIGHT.removesuffix(".weight") + end: part.contiguous() for end, part in tensors.items()}
    save_file(named, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    config = format.config if format.file != "config.json" else {"quantization_config": format.config}
    (folder / format.file).write_text(json.dumps(config))
    return values


@pytest.fixture(params=FORMATS)
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, torch.Tensor, str]:
    """A folder with one linear, its values, and the format's name."""
    return tmp_path, write(tmp_path, request.param), request.param


def check_form(packed: Packed) -> None:
    """Checks the shapes and types that `Packed` promises."""
    n, k = packed.shape
    bits = 8 if packed.kind in ("int8", "fp8") else 4
    assert packed.codes.dtype == torch.uint8
    assert packed.codes.shape == (n, k * bits // 8)
    assert k % packed.group == 0
    assert packed.scales.shape == (n, k // packed.group)
    assert packed.scales.dtype in (torch.float32, torch.float16, torch.bfloat16)
    assert packed.codes.is_contiguous()
    assert packed.scales.is_contiguous()
    if isinstance(packed.zeros, torch.Tensor):
        assert packed.zeros.shape == packed.scales.shape
        assert packed.zeros.dtype == packed.scales.dtype
    if packed.order is not None:
        assert sorted(packed.order.tolist()) == list(range(k))
    if packed.row_scale is not None:
        assert packed.row_scale.shape == (n,)
        assert packed.row_scale.dtype == torch.float32


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() <= EXACT * expected.abs().max())


def test_values_are_those_of_the_format(stored: tuple[Path, torch.Tensor, str]) -> None:
    folder, values, _ = stored
    reader = QuantizedReader(Checkpoint(folder))
    assert reader.names == [WEIGHT]
    assert reader.is_quantized(WEIGHT)
    packed = reader.packed(WEIGHT)
    check_form(packed)
    assert packed.shape == reader.shape(WEIGHT) == (N, K)
    assert close(packed.dequantize(), values)
    assert close(packed.rows(5, 21).dequantize(), values[5:21])
    assert packed.dequantize(torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("columns", [(0, 96), (96, 192), (64, 128), (16, 40), (150, 192), (0, 192)], ids=str)
@pytest.mark.parametrize("rows", [(0, 48), (0, 24), (24, 48), (13, 31), (47, 48)], ids=str)
def test_a_share_is_that_part_of_the_whole(
    stored: tuple[Path, torch.Tensor, str], rows: tuple[int, int], columns: tuple[int, int]
) -> None:
    folder, values, _ = stored
    part = QuantizedReader(Checkpoint(folder)).packed(WEIGHT, rows, columns)
    check_form(part)
    assert close(part.dequantize(), values[slice(*rows), slice(*columns)])
    whole = QuantizedReader(Checkpoint(folder)).packed(WEIGHT)
    cut = whole.rows(*rows).columns(*columns)
    check_form(cut.contiguous())
    assert torch.equal(cut.dequantize(), part.dequantize())


@pytest.mark.parametrize("dim", [0, 1])
def test_two_ranks_read_little_more_than_one(stored: tuple[Path, torch.Tensor, str], dim: int) -> None:
    """What they both read are scales of a whole tensor, tables, and the groups of all columns: at most 2.5 KiB here."""
    folder, _, name = stored
    read = []
    for share in ((0, (N, K)[dim] // 2), ((N, K)[dim] // 2, (N, K)[dim]), None):
        checkpoint = Checkpoint(folder)
        QuantizedReader(checkpoint).packed(WEIGHT, **{("rows", "columns")[dim]: share})
        read.append(checkpoint.tensor_bytes_read)
    beside = 2500 if "nested" in name else 2000 if "act order" in name else 1000
    assert read[2] <= read[0] + read[1] <= read[2] + beside
    assert max(read[:2]) < 0.75 * read[2] + beside / 2


@pytest.mark.parametrize("name", ["fp8 by blocks", "gptq", "gptq act order", "awq", "w4a16"])
def test_large_weights_are_dequantized_in_pieces(tmp_path: Path, name: str) -> None:
    values = write(tmp_path, name, 4704, 1056)
    weights = Weights(Checkpoint(tmp_path))
    for cut in (WHOLE, Cut(0, ((0, 40), (96, 4704))), Cut(1, ((32, 1056),))):
        expected = cut.apply(values)
        out = torch.empty(expected.shape)
        weights.read_into(out, WEIGHT, cut)
        assert close(out, expected)


def test_as_many_blocks_as_rows_are_blocks(tmp_path: Path) -> None:
    values = write(tmp_path, "fp8 by blocks", 32, 1024)
    weights = Weights(Checkpoint(tmp_path))
    out = torch.empty(32, 1024)
    weights.read_into(out, WEIGHT)
    assert close(out, values)


def test_a_stack_of_experts_in_fp8(tmp_path: Path) -> None:
    """As transformers saves what it has merged."""
    torch.manual_seed(5)
    made = [fp8(32, 32)(torch.randn(N, K)) for _ in range(3)]
    name = "model.layers.0.mlp.experts.gate_up_proj"
    save_file(
        {
            name: torch.stack([tensors[".weight"] for tensors, _ in made]),
            f"{name}_scale_inv": torch.stack([tensors[".weight_scale"] for tensors, _ in made]),
        },
        tmp_path / "model.safetensors",
    )
    settings = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings}))
    weights, expected = Weights(Checkpoint(tmp_path)), torch.stack([values for _, values in made])
    assert weights.shape(name) == expected.shape
    for cut in (WHOLE, Cut(0, ((1, 3),)), Cut(1, ((0, 10), (33, 40)))):
        out = torch.empty(cut.shape(expected.shape))
        weights.read_into(out, name, cut)
        assert close(out, cut.apply(expected))


def test_experts_of_a_stack_are_read_one_at_a_time(tmp_path: Path) -> None:
    torch.manual_seed(4)
    made = [mxfp4(torch.randn(N, K)) for _ in range(3)]
    name = "model.layers.0.mlp.experts.gate_up_proj"
    save_file(
        {
            f"{name}_blocks": torch.stack([tensors[".weight_packed"] for tensors, _ in made]).unflatten(-1, (-1, 16)),
            f"{name}_scales": torch.stack([tensors[".weight_scale"] for tensors, _ in made]),
            f"{name}_bias": torch.zeros(3, N),
        },
        tmp_path / "model.safetensors",
    )
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "mxfp4"}}))
    checkpoint = Checkpoint(tmp_path)
    reader = QuantizedReader(checkpoint)
    assert reader.shape(name) == (3, N, K)
    for expert, (_, values) in enumerate(made):
        for rows, columns in (((0, N), (0, K)), ((5, 20), (0, K)), ((0, N), (64, 128)), ((7, 9), (32, 50))):
            before = checkpoint.tensor_bytes_read
            packed = reader.packed(name, rows, columns, expert)
            check_form(packed)
            assert torch.equal(packed.dequantize(), values[slice(*rows), slice(*columns)])
            assert checkpoint.tensor_bytes_read - before == packed.codes.nbytes + len(packed.codes) * (
                -(-columns[1] // 32) - columns[0] // 32
            )


GOLDEN = sorted((Path(__file__).parents[1] / "vendor" / "quantized").glob("*.safetensors"))


@pytest.mark.parametrize("file", GOLDEN, ids=[file.stem for file in GOLDEN])
def test_values_are_those_of_the_library_that_wrote_them(file: Path, tmp_path: Path) -> None:
    """compressed-tensors, torchao and bitsandbytes quantized and dequantized a weight, the latter partly in bf16."""
    tensors = load_file(file)
    values = tensors.pop("values")
    save_file(tensors, tmp_path / "model.safetensors")
    with safe_open(file, "pt") as opened:
        (tmp_path / "config.json").write_text(opened.metadata()["config"])
    reader = QuantizedReader(Checkpoint(tmp_path))
    assert reader.names == [WEIGHT]
    found = reader.packed(WEIGHT).dequantize()
    # Of bf16, half a unit of the last place; the scale may have been rounded, too.
    bound = 2**-7 if values.dtype == torch.bfloat16 else 1e-6
    assert values.float().abs().max() > 0.1
    torch.testing.assert_close(found, values.float(), rtol=bound, atol=1e-7)


def test_experts_of_gpt_oss_are_those_of_transformers(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(6)
    blocks = torch.randint(0, 256, (2, N, K // 32, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(110, 140, (2, N, K // 32), generator=generator, dtype=torch.uint8)
    name = "model.layers.0.mlp.experts.down_proj"
    save_file({f"{name}_blocks": blocks, f"{name}_scales": scales}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "mxfp4"}}))
    weights = Weights(Checkpoint(tmp_path))
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert weights.shape(name) == expected.shape == (2, K, N)
    out = torch.empty(expected.shape)
    weights.read_into(out, name)
    assert torch.equal(out, expected)
    for cut in (Cut(0, ((1, 2),)), Cut(1, ((0, 32), (64, 96))), Cut(2, ((3, 9), (20, 48)))):
        out = torch.empty(cut.shape(expected.shape))
        weights.read_into(out, name, cut)
        assert torch.equal(out, cut.apply(expected))
