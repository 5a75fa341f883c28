"""The memory that a load takes, at its peak and after it: the shard's weights and little more.

Each case is a process of its own. Its checkpoint has holes instead of data, so that writing it takes no time.
"""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stagemesh.stage_worker.native import ops

MIB = 1 << 20
SLACK = 48
"""MiB beside the share. Half of it is the code of transformers' model, which is imported during the load."""
H, MLP, LAYERS, VOCAB, EXPERTS = 1024, 4096, 6, 8192, 8
BYTES = {"BF16": 2, "F16": 2, "F32": 4, "I32": 4, "F8_E4M3": 1}
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": LAYERS, "hidden_size": H,
    "intermediate_size": MLP, "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": VOCAB,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": False,
    "dtype": "bfloat16",
}  # fmt: skip
WIDE = {**LLAMA, "num_hidden_layers": 1, "intermediate_size": 8 * MLP}
MIXTRAL = {
    **LLAMA, "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_hidden_layers": 1,
    "num_local_experts": EXPERTS, "num_experts_per_tok": 2,
}  # fmt: skip

# Loads as a rank does. Prints the share, and how far the process grew beyond what it was: at most, and in the end.
CHILD = """
import json, sys, types
import torch
from stagemesh.protos.v1 import stage_pb2, types_pb2
from stagemesh.settings.stage import StageSettings
from stagemesh.stage_worker.messages.rank_config import RankConfig
from stagemesh.stage_worker.messages.shared_memory import make_shared_memory
from stagemesh.stage_worker.model.parallel import TensorParallel
from stagemesh.stage_worker.rank.memory.rank_memory import RankMemory
from stagemesh.stage_worker.rank.process import import_all

def kib(name):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(name + ":"))

path, layers, load_format, settings = json.loads(sys.argv[1])
settings = StageSettings(coordinator="here:1", model=path, transport="tcp", threads=1, **settings)
config = RankConfig(label="stage", rank=0, device="cpu", settings=settings)
engine = types.SimpleNamespace(assignments={}, drive_transports=None)
parallel = TensorParallel(0, config.size, exchange_fd=make_shared_memory(config.size))
memory = RankMemory(config, engine, torch.device("cpu"), parallel)
request = stage_pb2.AssignRequest(
    model=types_pb2.ModelRef(path=path, dtype="bfloat16", load_format=load_format, num_layers=layers),
    layers=types_pb2.LayerRange(first=0, last=layers),
    limits=types_pb2.RunLimits(page_size=16),
)
import_all(config)
before = kib("VmRSS")
with open("/proc/self/clear_refs", "w") as f:
    f.write("5")  # Resets the peak, VmHWM.
(shard,) = memory.load(request, lambda done, total: None)
print(json.dumps([shard.weight_bytes, 1024 * (kib("VmHWM") - before), 1024 * (kib("VmRSS") - before)]))
"""


def quantized(entries: dict[str, tuple[str, tuple[int, ...]]], method: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What a method stores for the linears of layers, with groups of 128."""
    out: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, (dtype, shape) in entries.items():
        module, n, k = name.removesuffix(".weight"), shape[0], shape[-1]
        if len(shape) != 2 or ".layers." not in name or name.endswith(".gate.weight"):
            out[name] = dtype, shape
        elif method == "fp8":
            out |= {name: ("F8_E4M3", shape), f"{name}_scale_inv": ("F32", (n // 128, k // 128))}
        else:
            inputs, groups = (k, k // 128) if method == "awq" else (k // 8, k // 128)
            outputs = n // 8 if method == "awq" else n
            out |= {f"{module}.qweight": ("I32", (inputs, outputs)), f"{module}.qzeros": ("I32", (groups, n // 8))}
            out[f"{module}.scales"] = "F16", (groups, n)
    return out


def by(method: str, **settings: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": method, "bits": 4, "sym": False, **settings}}


def sparse_checkpoint(folder: Path, config: dict[str, Any], stored: str) -> None:
    kv, layers = H, config["num_hidden_layers"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, H), "model.norm.weight": (H,)}
    for i in range(layers):
        at = f"model.layers.{i}."
        shapes |= {f"{at}self_attn.{n}_proj.weight": (kv, H) for n in "qkvo"}
        shapes |= {f"{at}{n}_layernorm.weight": (H,) for n in ("input", "post_attention")}
        if config["model_type"] == "mixtral":
            shapes[f"{at}block_sparse_moe.gate.weight"] = (EXPERTS, H)
            for e in range(EXPERTS):
                sizes = {"w1": (MLP, H), "w2": (H, MLP), "w3": (MLP, H)}
                shapes |= {f"{at}block_sparse_moe.experts.{e}.{n}.weight": size for n, size in sizes.items()}
        else:
            shapes |= {f"{at}mlp.{n}_proj.weight": (config["intermediate_size"], H) for n in ("gate", "up")}
            shapes[f"{at}mlp.down_proj.weight"] = (H, config["intermediate_size"])
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (VOCAB, H)
    header, at_byte = {}, 0
    entries: dict[str, tuple[str, tuple[int, ...]]] = {name: (stored, shape) for name, shape in shapes.items()}
    if "quantization_config" in config:
        entries = quantized(entries, config["quantization_config"]["quant_method"])
    for name, (dtype, shape) in entries.items():
        end = at_byte + BYTES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at_byte, end]}
        at_byte = end
    raw = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + at_byte)
    (folder / "config.json").write_text(json.dumps(config))


compiled = pytest.mark.skipif(
    ops.library() is None, reason="NO COMPILED KERNELS: not built, or a processor without AVX512-BF16"
)


def loaded(folder: Path, config: dict[str, Any], load_format: str, settings: dict[str, Any]) -> list[float]:
    """MiB of the share, of the peak of a load of the whole model, and after it."""
    argument = json.dumps([str(folder), config["num_hidden_layers"], load_format, settings])
    command = [sys.executable, "-c", CHILD, argument]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return [size / MIB for size in json.loads(done.stdout)]


EAGER = {"enforce_eager": True}


@pytest.mark.parametrize(
    ("config", "stored", "settings"),
    [
        pytest.param(LLAMA, "BF16", {}, id="compiled", marks=compiled),
        pytest.param(LLAMA, "F32", {}, id="compiled, of another dtype", marks=compiled),
        pytest.param(WIDE, "BF16", {}, id="compiled, large tensors", marks=compiled),
        pytest.param(LLAMA | {"tie_word_embeddings": True}, "BF16", {}, id="compiled, tied", marks=compiled),
        pytest.param(LLAMA, "BF16", EAGER, id="modules"),
        pytest.param(LLAMA, "F32", EAGER, id="modules, of another dtype"),
        pytest.param(MIXTRAL, "BF16", EAGER, id="experts"),
        pytest.param(MIXTRAL, "F32", EAGER, id="experts, of another dtype"),
        pytest.param(WIDE | by("fp8", weight_block_size=[128, 128]), "BF16", EAGER, id="FP8"),
        pytest.param(WIDE | by("gptq"), "BF16", EAGER, id="GPTQ"),
        pytest.param(WIDE | by("awq"), "BF16", EAGER, id="AWQ"),
        pytest.param(MIXTRAL | by("gptq"), "BF16", EAGER, id="experts in GPTQ"),
    ],
)
def test_a_load_takes_the_weights_and_little_more(
    tmp_path: Path, config: dict[str, Any], stored: str, settings: dict[str, Any]
) -> None:
    sparse_checkpoint(tmp_path, config, stored)
    share, peak, after = loaded(tmp_path, config, "auto", settings)
    assert share > 200
    assert share - 8 < after <= share + SLACK, f"{after:.0f} MiB after the load of {share:.0f}"
    assert peak <= share + SLACK, f"{peak:.0f} MiB at the peak of the load of {share:.0f}"


@pytest.mark.parametrize("settings", [pytest.param({}, marks=compiled), EAGER], ids=["compiled", "modules"])
def test_dummy_weights_leave_nothing_behind(tmp_path: Path, settings: dict[str, Any]) -> None:
    """They are made in fp32, several at a time."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    share, _, after = loaded(tmp_path, LLAMA, "dummy", settings)
    assert share - 8 < after <= share + 2 * SLACK, f"{after:.0f} MiB after the load of {share:.0f}"
