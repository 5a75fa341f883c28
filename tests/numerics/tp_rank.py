"""One rank of a tensor-parallel group in a process of its own: `python tp_rank.py JOBS RANK SIZE`.

JOBS is a JSON file: the group's store, and a list of [model_dir, bounds, prompts, max_tokens]. Writes
`JOBS.RANK`: for each job the tokens, the bytes read and the KV heads of every stage.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from chain import Chain

from stagemesh.stage_worker.tp import TPGroup


def main(jobs_path: str, rank: int, size: int) -> None:
    """Run every job, one chain after the other."""
    torch.set_num_threads(1)
    jobs = json.loads(Path(jobs_path).read_text())
    group = TPGroup(jobs["store"], rank, size, timeout_s=60)
    results = []
    for model_dir, bounds, prompts, max_tokens in jobs["jobs"]:
        chain = Chain(model_dir, bounds, group=group, num_pages=32)
        tokens = chain.greedy(prompts, max_tokens, chunk=64)
        read = [shard.tensor_bytes_read for shard in chain.shards]
        heads = [shard.kv_layers[0].num_kv_heads for shard in chain.shards]
        results.append([tokens, read, heads])
    Path(f"{jobs_path}.{rank}").write_text(json.dumps(results))
    group.close()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
