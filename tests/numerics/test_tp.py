"""Two and three ranks in processes of their own give transformers' tokens, and read only their slices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from tiny_models import clear_prompts, make_checkpoint

from stagemesh.errors import TransportError
from stagemesh.stage_worker.messages.shared_memory import make_shared_memory
from stagemesh.stage_worker.model.tp import TPGroup

MAX_TOKENS = 4
RANK_SCRIPT = Path(__file__).parent / "tp_rank.py"
TIMEOUT_S = 200


@dataclass(frozen=True)
class Case:
    """A checkpoint, how many KV heads a rank keeps, and the share of weights it reads (None: not looked at)."""

    family: str
    kv_heads: int
    settings: dict[str, Any] = field(default_factory=dict)


TWO_RANKS = {
    "llama": Case("llama", 1),
    "llama_one_kv_head": Case("llama", 1, {"num_key_value_heads": 1}),
    "llama_tied_odd_sizes": Case("llama_tied", 1, {"intermediate_size": 97, "vocab_size": 261}),
    "qwen3": Case("qwen3", 1),
    "gemma2": Case("gemma2", 1),
    "gpt_neox": Case("gpt_neox", 2),
    "mixtral": Case("mixtral", 1),
    "phi3": Case("phi3", 2),
    "olmo2": Case("olmo2", 2),
    "deepseek_v3": Case("deepseek_v3", 4),
    "gpt_oss": Case("gpt_oss", 2),
}
THREE_RANKS = {
    "llama_three_kv_heads": Case(
        "llama", 1, {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3, "vocab_size": 260}
    ),
    "llama_one_kv_head": Case("llama", 1, {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 1}),
    "mixtral": Case("mixtral", 1, {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3}),
}


def checkpoint_bytes(folder: Path) -> int:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118


def start_ranks(path: Path, size: int) -> list[subprocess.Popen[bytes]]:
    """The jobs' ranks, with memory that they share."""
    shared = make_shared_memory(size)
    try:
        return [
            subprocess.Popen(
                [sys.executable, str(RANK_SCRIPT), str(path), str(rank), str(size), str(shared)],
                stderr=subprocess.PIPE,
                pass_fds=[shared],
            )
            for rank in range(size)
        ]
    finally:
        os.close(shared)


@pytest.mark.parametrize("eager", [False, True], ids=["kernels", "eager"])
@pytest.mark.parametrize(("size", "cases"), [(2, TWO_RANKS), (3, THREE_RANKS)], ids=["two", "three"])
@pytest.mark.filterwarnings("ignore")
def test_ranks_together_equal_the_whole(size: int, cases: dict[str, Case], eager: bool, tmp_path: Path) -> None:
    if not eager:
        cases = {name: case for name, case in cases.items() if case.family.startswith(("llama", "qwen3"))}
    jobs, prompts, folders = [], [], []
    for name, case in cases.items():
        folder = make_checkpoint(case.family, tmp_path / name, num_hidden_layers=3, **case.settings)
        clear = clear_prompts(folder, [5, 100], MAX_TOKENS)
        folders.append(folder)
        prompts.append(clear)
        jobs.append([str(folder), [0, 1, 3], [prompt.prompt_ids for prompt in clear], MAX_TOKENS, eager])
    path = tmp_path / "jobs.json"
    path.write_text(json.dumps({"store": str(tmp_path / "store"), "jobs": jobs}))
    ranks = start_ranks(path, size)
    try:
        for rank, process in enumerate(ranks):
            _, errors = process.communicate(timeout=TIMEOUT_S)
            assert process.returncode == 0, f"rank {rank}: {errors.decode()[-3000:]}"
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    outputs = [json.loads(Path(f"{path}.{rank}").read_text()) for rank in range(size)]
    for index, (name, case) in enumerate(cases.items()):
        for rank in range(size):
            tokens, read, heads = outputs[rank][index]
            assert tokens == [prompt.tokens for prompt in prompts[index]], f"{name}, rank {rank}"
            assert heads == [case.kv_heads] * 2, f"{name}, rank {rank}"
            assert sum(read) < checkpoint_bytes(folders[index]), f"{name}, rank {rank}"


LOST = """
import os, sys, torch
from stagemesh.errors import TransportError
from stagemesh.stage_worker.model.tp import TPGroup
group = TPGroup(sys.argv[1], int(sys.argv[2]), 2, timeout_s=60)
group.all_reduce(torch.ones(4))
if group.rank == 1:
    os._exit(9)
try:
    group.all_reduce(torch.ones(4))
except TransportError as error:
    print(error.message)
os._exit(0)
"""


def test_a_lost_rank_is_an_error_at_once(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", LOST, str(tmp_path / "store")]
    other = subprocess.Popen([*arguments, "1"])
    try:
        done = subprocess.run([*arguments, "0"], capture_output=True, text=True, timeout=50, check=False)
    finally:
        assert other.wait(timeout=10) == 9
    assert "rank 0 of 2: a rank is lost or late" in done.stdout, done.stderr


def test_ranks_that_do_not_meet_say_so(tmp_path: Path) -> None:
    with pytest.raises(TransportError, match="2 ranks did not all meet within 1 s"):
        TPGroup(tmp_path / "store", 0, 2, timeout_s=1)


@pytest.mark.parametrize("eager", [False, True], ids=["kernels", "eager"])
def test_a_rank_reads_its_share_of_llama(tmp_path: Path, eager: bool) -> None:
    """What is cut is read once over all ranks, what is not (norms, the embedding) by each."""
    folder = make_checkpoint("llama", tmp_path / "llama", num_hidden_layers=2)
    path = tmp_path / "jobs.json"
    job = [str(folder), [0, 2], [[1, 2, 3]], 1, eager]
    path.write_text(json.dumps({"store": str(tmp_path / "store"), "jobs": [job]}))
    ranks = start_ranks(path, 2)
    try:
        assert [process.wait(timeout=TIMEOUT_S) for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    read = [json.loads(Path(f"{path}.{rank}").read_text())[0][1][0] for rank in range(2)]
    on_every_rank = 4 * (260 * 64 + 5 * 64)
    assert sum(read) == checkpoint_bytes(folder) + on_every_rank
    assert read[0] == read[1]
