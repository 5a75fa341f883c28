"""Small checkpoints in the formats of quantized weights, written by each format's own definition.

A writer turns the weight [n, k] of one linear into the tensors of the format, and into the values that they stand for.
It shares no code with the readers.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]
Writer = Callable[[Tensor], tuple[Tensors, Tensor]]
"""Weight -> (end of name -> tensor, values). The end replaces `.weight`."""

LINEAR = re.compile(r"\.layers\.\d+\..*(?<!norm)(?<!\.gate)(?<!router)\.weight$")
FP4_VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
NF4_VALUES = torch.tensor(
    [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0, 0.0795803, 0.1609302,
     0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
)  # fmt: skip
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def words(codes: Tensor, bits: int, dim: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Packs codes into int32 along `dim`. Bits from the lowest on hold the codes of a word in `order`."""
    per_word = 32 // bits
    codes = codes.to(torch.int64).movedim(dim, -1)
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % per_word)).unflatten(-1, (-1, per_word))
    packed = sum(codes[..., source] << bits * at for at, source in enumerate(order or range(per_word)))
    assert isinstance(packed, Tensor)
    return (packed - (packed >> 31 << 32)).to(torch.int32).movedim(-1, dim).contiguous()


def nibbles(codes: Tensor, high_first: bool = False) -> Tensor:
    """Packs codes of 4 bits into bytes along the last dimension."""
    first, second = codes[..., ::2].to(torch.uint8), codes[..., 1::2].to(torch.uint8)
    return first << 4 | second if high_first else second << 4 | first


def nearest(values: Tensor, table: Tensor) -> Tensor:
    """Returns the index of the nearest value of a table."""
    return (values[..., None] - table).abs().argmin(-1)


def blocks(w: Tensor, rows: int, columns: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Returns the largest absolute value of each block, and a function that repeats one number a block."""
    n, k = w.shape
    padded = torch.nn.functional.pad(w, (0, -k % columns, 0, -n % rows))
    largest = padded.abs().unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).amax((1, 3)).clamp(min=1e-4)
    return largest, lambda scale: scale.repeat_interleave(rows, 0)[:n].repeat_interleave(columns, 1)[:, :k]


def fp8(
    rows: int = 0, columns: int = 0, name: str = "weight_scale", scales: str = "float", shape: str = "matrix"
) -> Writer:
    """FP8 with a scale for each block of so many rows and columns. 0 is all of them."""

    def write(w: Tensor) -> tuple[Tensors, Tensor]:
        largest, spread = blocks(w, rows or len(w), columns or w.shape[1])
        scale = largest / 448
        if scales == "ue8m0":
            scale = torch.exp2(scale.log2().ceil())
        elif scales == "bfloat16":
            scale = scale.bfloat16().float()
        codes = (w / spread(scale)).clamp(-448, 448).to(torch.float8_e4m3fn)
        stored = {"ue8m0": torch.float8_e8m0fnu, "float": torch.float32, "bfloat16": torch.bfloat16}[scales]
        beside = scale.to(stored)
        beside = beside.reshape(()) if shape == "scalar" else beside.reshape(-1) if shape == "vector" else beside
        return {".weight": codes, f".{name}": beside}, codes.float() * spread(scale)

    return write


def int8(columns: int = 0, *, asymmetric: bool = False, name: str = "weight_scale") -> Writer:
    """int8 with a scale for each row, or each group of a row."""

    def write(w: Tensor) -> tuple[Tensors, Tensor]:
        largest, spread = blocks(w, 1, columns or w.shape[1])
        scale = (largest / 127).bfloat16().float()
        zero = torch.randint(-9, 9, scale.shape).float() if asymmetric else torch.zeros_like(scale)
        codes = (w / spread(scale) + spread(zero)).round().clamp(-128, 127)
        tensors = {".weight": codes.to(torch.int8), f".{name}": scale.bfloat16()}
        if asymmetric:
            tensors[".weight_zero_point"] = zero.to(torch.int8)
        return tensors, (codes - spread(zero)) * spread(scale)

    return write


def _integers(w: Tensor, bits: int, group: int, *, symmetric: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns codes [n, k], scales [n, groups] (of fp16), zero points [n, groups], values [n, k]."""
    _, spread = blocks(w, 1, group)
    grouped = w.unflatten(1, (-1, group))
    top = 2**bits - 1
    if symmetric:
        scale = (grouped.abs().amax(-1) * 2 / top).half().float()
        zero = torch.full_like(scale, 2 ** (bits - 1))
    else:
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        scale = ((high - low) / top).half().float()
        zero = (-low / scale).round().clamp(1, top)
    codes = (w / spread(scale) + spread(zero)).round().clamp(0, top)
    return codes, scale, zero, (codes - spread(zero)) * spread(scale)


def gptq(
    bits: int = 4, group: int = 32, *, symmetric: bool = True, version: int = 1, act_order: bool = False
) -> Writer:
    """GPTQ. `act_order`: columns belong to groups in the order of some importance."""

    def write(w: Tensor) -> tuple[Tensors, Tensor]:
        size = group if group > 0 else w.shape[1]
        order = torch.randperm(w.shape[1]) if act_order else torch.arange(w.shape[1])
        codes, scale, zero, values = _integers(w[:, order], bits, size, symmetric=symmetric)
        back = order.argsort()
        return {
            ".qweight": words(codes[:, back].t(), bits, 0),
            ".qzeros": words(zero.t() - (1 if version == 1 else 0), bits, 1),
            ".scales": scale.t().half().contiguous(),
            ".g_idx": (back // size).to(torch.int32),
        }, values[:, back]

    return write


def awq(group: int = 32) -> Writer:
    """AWQ, the gemm version."""

    def write(w: Tensor) -> tuple[Tensors, Tensor]:
        codes, scale, zero, values = _integers(w, 4, group, symmetric=False)
        return {
            ".qweight": words(codes.t(), 4, 1, AWQ_ORDER),
            ".qzeros": words(zero.t(), 4, 1, AWQ_ORDER),
            ".scales": scale.t().half().contiguous(),
        }, values

    return write


def packed(bits: int = 4, group: int = 32, *, symmetric: bool = True, act_order: bool = False) -> Writer:
    """compressed-tensors' pack-quantized."""

    def write(w: Tensor) -> tuple[Tensors, Tensor]:
        size = group if group > 0 else w.shape[1]
        order = torch.randperm(w.shape[1]) if act_order else torch.arange(w.shape[1])
        codes, scale, zero, values = _integers(w[:, order], bits, size, symmetric=symmetric)
        back = order.argsort()
        tensors = {
            ".weight_packed": words(codes[:, back], bits, 1),
            ".weight_scale": scale.half(),
            ".weight_shape": torch.tensor(w.shape),
        }
        if not symmetric:
            tensors[".weight_zero_point"] = words(zero, bits, 0)
        if act_order:
            tensors[".weight_g_idx"] = (back // size).to(torch.int32)
        return tensors, values[:, back]

    return write


def nvfp4(*, of: str = "modelopt") -> Writer:
    """NVFP4 of ModelOpt or compressed-tensors, whose global scale is the reciprocal."""

    def write(w: Tensor) -> tuple[Tensors, Tensor]:
        largest, spread = blocks(w, 1, 16)
        whole = w.abs().max() / (448 * 6)
        if of != "modelopt":
            whole = 1 / (1 / whole)
        scale = (largest / 6 / whole).clamp(max=448).to(torch.float8_e4m3fn)
        factor = spread(scale.float()) * whole
        codes = nearest(w / factor, FP4_VALUES)
        values = FP4_VALUES[codes] * factor
        if of == "modelopt":
            beside = {".weight": nibbles(codes), ".weight_scale_2": whole, ".input_scale": torch.ones(())}
        else:
            beside = {".weight_packed": nibbles(codes), ".weight_global_scale": (1 / whole).reshape(1)}
        return {**beside, ".weight_scale": scale}, values

    return write


def mxfp4(w: Tensor) -> tuple[Tensors, Tensor]:
    """MXFP4: groups of 32, scales are exponents."""
    largest, spread = blocks(w, 1, 32)
    exponent = (largest / 6).log2().ceil()
    codes = nearest(w / spread(exponent.exp2()), FP4_VALUES)
    stored = {".weight_packed": nibbles(codes), ".weight_scale": (exponent + 127).to(torch.uint8)}
    return stored, FP4_VALUES[codes] * spread(exponent.exp2())


def nf4(*, nested: bool = False) -> Writer:
    """bitsandbytes' NF4 in blocks of 32."""

    def write(w: Tensor) -> tuple[Tensors, Tensor]:
        n, k = w.shape
        largest, spread = blocks(w, 1, 32)
        state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 32, "dtype": "float32", "shape": [n, k]}
        tensors = {".weight.absmax": largest.flatten()}
        if nested:
            offset = float(largest.mean())
            table = torch.linspace(-1, 1, 256)
            flat = torch.nn.functional.pad((largest - offset).flatten(), (0, -largest.numel() % 256)).view(-1, 256)
            outer = flat.abs().amax(1)
            index = nearest(flat / outer[:, None], table)
            largest = ((table[index] * outer[:, None]).flatten()[: largest.numel()] + offset).view_as(largest)
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
            tensors = {
                ".weight.absmax": index.flatten()[: largest.numel()].to(torch.uint8),
                ".weight.nested_absmax": outer,
                ".weight.nested_quant_map": table,
            }
        codes = nearest(w / spread(largest), NF4_VALUES)
        text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        tensors |= {".weight": nibbles(codes, high_first=True).reshape(-1, 1), ".weight.quant_map": NF4_VALUES.clone()}
        return {**tensors, ".weight.quant_state.bitsandbytes__nf4": text}, NF4_VALUES[codes] * spread(largest)

    return write


def bnb_int8(w: Tensor) -> tuple[Tensors, Tensor]:
    """bitsandbytes' INT8."""
    largest = w.abs().amax(1)
    codes = (w / largest[:, None] * 127).round()
    stored = {".weight": codes.to(torch.int8), ".SCB": largest, ".weight_format": torch.zeros((), dtype=torch.uint8)}
    return stored, codes * (largest / 127)[:, None]


def torchao_rows(writer: Writer, *, zero_point: bool) -> Writer:
    """torchao's Int8Tensor and Float8Tensor."""

    def write(w: Tensor) -> tuple[Tensors, Tensor]:
        tensors, values = writer(w)
        stored = {"._weight_qdata": tensors[".weight"], "._weight_scale": tensors[".weight_scale"].float()}
        if zero_point:
            stored["._weight_zero_point"] = torch.zeros_like(stored["._weight_scale"], dtype=torch.int8)
        return stored, values

    return write


def torchao_int4(w: Tensor) -> tuple[Tensors, Tensor]:
    """torchao's Int4Tensor: the zero point is a value that is added."""
    grouped = w.unflatten(1, (-1, 32))
    low, high = grouped.amin(-1), grouped.amax(-1)
    scale = (high - low) / 15
    codes = ((grouped - low[..., None]) / scale[..., None]).round().clamp(0, 15) - 8
    zero = low + 8 * scale
    stored = {
        "._weight_qdata": nibbles(codes.flatten(1).to(torch.int8).view(torch.uint8) & 15),
        "._weight_scale": scale.t().contiguous(),
        "._weight_zero_point": zero.t().contiguous(),
    }
    return stored, (codes * scale[..., None] + zero[..., None]).flatten(1)


def _group(format: str, **weights: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": groups, "ignore": ["lm_head"]}


@dataclass(frozen=True)
class Format:
    """One format: what config.json says, and how a weight is written."""

    config: dict[str, Any]
    write: Writer
    file: str = "config.json"


_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
_INT8, _FP8 = {"num_bits": 8, "type": "int"}, {"num_bits": 8, "type": "float"}
FORMATS: dict[str, Format] = {
    "fp8 by blocks": Format(
        {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [32, 32]},
        fp8(32, 32, "weight_scale_inv"),
    ),
    "fp8 by uneven blocks": Format(
        {"quant_method": "fp8", "weight_block_size": [40, 64]}, fp8(40, 64, "weight_scale_inv", "bfloat16")
    ),
    "fp8 ue8m0": Format(
        {"quant_method": "fp8", "weight_block_size": [32, 32], "scale_fmt": "ue8m0"},
        fp8(32, 32, "weight_scale_inv", "ue8m0"),
    ),
    "fp8 per tensor": Format({"quant_method": "fp8", "activation_scheme": "static"}, fp8(shape="scalar")),
    "fp8 per row": Format({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, fp8(1)),
    "w8a8 int8": Format(_group("int-quantized", **_INT8, strategy="channel"), int8()),
    "int8 by groups": Format(_group("naive-quantized", **_INT8, strategy="group"), int8(32, asymmetric=True)),
    "w8a8 fp8": Format(_group("float-quantized", **_FP8, strategy="channel"), fp8(1, scales="bfloat16")),
    "w8a8 fp8 per tensor": Format(_group("float-quantized", **_FP8, strategy="tensor"), fp8(shape="vector")),
    "w8a8 fp8 by blocks": Format(
        _group("float-quantized", **_FP8, strategy="block", block_structure=[32, 32]), fp8(32, 32)
    ),
    "w4a16": Format(_group("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32), packed()),
    "w4a16 asymmetric": Format(
        _group("pack-quantized", num_bits=4, type="int", strategy="group", symmetric=False), packed(symmetric=False)
    ),
    "w4a16 act order": Format(
        _group("pack-quantized", num_bits=4, type="int", strategy="group", actorder="group"), packed(act_order=True)
    ),
    "w4a16 per row": Format(_group("pack-quantized", num_bits=4, type="int", strategy="channel"), packed(group=-1)),
    "w8a16": Format(_group("pack-quantized", **_INT8, strategy="group", group_size=32), packed(8)),
    "w8a16 asymmetric": Format(
        _group("pack-quantized", **_INT8, strategy="group", symmetric=False), packed(8, symmetric=False)
    ),
    "gptq": Format(_GPTQ, gptq()),
    "gptq v2 asymmetric": Format(
        {**_GPTQ, "sym": False, "checkpoint_format": "gptq_v2"}, gptq(symmetric=False, version=2)
    ),
    "gptq asymmetric": Format({**_GPTQ, "sym": False}, gptq(symmetric=False)),
    "gptq 8 bits": Format({**_GPTQ, "bits": 8}, gptq(8)),
    "gptq 8 bits asymmetric": Format({**_GPTQ, "bits": 8, "sym": False}, gptq(8, symmetric=False)),
    "gptq act order": Format({**_GPTQ, "desc_act": True}, gptq(act_order=True)),
    "gptq per row": Format({**_GPTQ, "group_size": -1}, gptq(group=-1)),
    "awq": Format({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}, awq()),
    "nvfp4": Format(
        {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16}},
        nvfp4(),
        "hf_quant_config.json",
    ),
    "modelopt fp8": Format(
        {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}},
        fp8(shape="scalar"),
        "hf_quant_config.json",
    ),
    "compressed nvfp4": Format(
        _group("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16),
        nvfp4(of="compressed-tensors"),
    ),
    "compressed mxfp4": Format(
        _group("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32), mxfp4
    ),
    "bitsandbytes nf4": Format(
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, nf4()
    ),
    "bitsandbytes nf4 nested": Format(
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, nf4(nested=True)
    ),
    "bitsandbytes int8": Format({"quant_method": "bitsandbytes", "load_in_8bit": True}, bnb_int8),
    "torchao int8": Format(
        {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}},
        torchao_rows(int8(), zero_point=True),
    ),
    "torchao float8": Format(
        {"quant_method": "torchao", "quant_type": {"default": {"_type": "Float8WeightOnlyConfig"}}},
        torchao_rows(fp8(1), zero_point=False),
    ),
    "torchao int4": Format(
        {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int4WeightOnlyConfig"}}}, torchao_int4
    ),
}
"""All formats of single linears. GPT-OSS's stacks are written by `quantize_gpt_oss`."""


def quantize_folder(source: Path, out: Path, format: Format, *, seed: int = 0) -> Path:
    """Writes `source` in a format to `out`, and the values that it stands for to `out / "plain"`. Returns `out`."""
    torch.manual_seed(seed)
    tensors, plain = Tensors(), Tensors()
    for name, tensor in sorted(load_file(source / "model.safetensors").items()):
        plain[name] = tensor
        if not LINEAR.search(name) or tensor.dim() != 2:
            tensors[name] = tensor
            continue
        written, plain[name] = format.write(tensor)
        tensors |= {name.removesuffix(".weight") + end: part.contiguous() for end, part in written.items()}
    return _write(source, out, tensors, plain, format)


def quantize_gpt_oss(source: Path, out: Path) -> Path:
    """As `quantize_folder`, with the stacks of experts in MXFP4."""
    tensors, plain = Tensors(), Tensors()
    for name, tensor in sorted(load_file(source / "model.safetensors").items()):
        plain[name] = tensor
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[name] = tensor
            continue
        experts = [mxfp4(expert.t()) for expert in tensor]
        plain[name] = torch.stack([values.t() for _, values in experts]).contiguous()
        codes = torch.stack([stored[".weight_packed"] for stored, _ in experts])
        tensors[f"{name}_blocks"] = codes.unflatten(-1, (-1, 16))
        tensors[f"{name}_scales"] = torch.stack([stored[".weight_scale"] for stored, _ in experts])
    return _write(source, out, tensors, plain, Format({"quant_method": "mxfp4"}, mxfp4))


def _write(source: Path, out: Path, tensors: Tensors, plain: Tensors, format: Format) -> Path:
    shutil.copytree(source, out)
    shutil.copytree(source, out / "plain")
    save_file(tensors, out / "model.safetensors")
    save_file(plain, out / "plain" / "model.safetensors", {"format": "pt"})
    if format.file != "config.json":
        (out / format.file).write_text(json.dumps(format.config))
        return out
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": format.config}))
    return out
