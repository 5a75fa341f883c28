"""One rank of a tensor-parallel group in a process of its own: `python tp_rank.py JOBS RANK SIZE SHARED_MEMORY_FD`.

JOBS is a JSON file: the group's store, and a list of [model_dir, bounds, prompts, max_tokens, enforce_eager]. Writes
`JOBS.RANK`: for each job the tokens, the bytes read and the KV heads of every stage.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from chain import Chain

from stagemesh.stage_worker.model.parallel import TensorParallel


def main(jobs_path: str, rank: int, size: int, exchange_fd: str) -> None:
    """Run every job, one chain after the other."""
    torch.set_num_threads(1)
    jobs = json.loads(Path(jobs_path).read_text())
    parallel = TensorParallel(rank, size, store_path=jobs["store"], exchange_fd=int(exchange_fd))
    results = []
    for model_dir, bounds, prompts, max_tokens, enforce_eager in jobs["jobs"]:
        chain = Chain(model_dir, bounds, parallel=parallel, num_pages=32, enforce_eager=enforce_eager)
        tokens = chain.greedy(prompts, max_tokens, chunk=64)
        read = [shard.tensor_bytes_read for shard in chain.shards]
        heads = [shard.kv_layers[0].num_kv_heads for shard in chain.shards]
        results.append([tokens, read, heads])
    Path(f"{jobs_path}.{rank}").write_text(json.dumps(results))
    parallel.close()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
