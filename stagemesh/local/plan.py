"""Plans the processes of a mesh that `serve` starts. Pure: settings in, settings out.

Options that `serve` shares with a service are passed on block by block (`shared`). The rest is decided here.
"""

from __future__ import annotations

from typing import Any

from stagemesh.processes.limits import Cores, own_cores
from stagemesh.settings.base import shared
from stagemesh.settings.coordinator import CoordinatorSettings
from stagemesh.settings.gateway import GatewaySettings
from stagemesh.settings.serve import ServeSettings
from stagemesh.settings.speculative import SpeculativeConfig
from stagemesh.settings.stage import StageSettings

LOOPBACK = "127.0.0.1"
INNER: dict[str, Any] = {"host": LOOPBACK, "insecure": False, "port": 0}
"""Settings of all services except the gateway: they stay on this machine, on ports that the system chooses."""


def coordinator_settings(serve: ServeSettings, state_dir: str) -> CoordinatorSettings:
    """Returns the settings of the coordinator."""
    own = {"state_dir": state_dir, "speculative_config": _if_method(serve, "draft_model")}
    return CoordinatorSettings(**{**shared(serve, CoordinatorSettings), **INNER, **own})


def worker_settings(serve: ServeSettings, coordinator: str, cores: Cores | None = None) -> list[StageSettings]:
    """Returns the settings of one worker for each stage.

    `cores` are divided among all ranks; default: those of this process. Ranks are pinned if there is a core for each.
    Otherwise the kernel would wake the receiver of an activation on the sender's core, so that two stages share one
    core while another is idle. If nothing else computes, as with one stream, a step uses the other ranks' cores, too.

    Under a CPU limit ranks are not pinned: containers beside this one have the same cores, and would pin the same ones.
    """
    ranks = sum(serve.tp_sizes)
    cores = cores or own_cores()
    threads = _threads(serve, cores)
    pinned = serve.device != "cuda" and cores.count == len(cores.ids) >= ranks
    groups = [",".join(map(str, cores.ids[rank * threads : (rank + 1) * threads])) for rank in range(ranks)]
    stages = []
    for i, size in enumerate(serve.tp_sizes):
        first = sum(serve.tp_sizes[:i])
        own = groups[first : first + size]
        others = [group for i, group in enumerate(groups) if not first <= i < first + size]
        cpu_list = "|".join(own) if pinned else None
        # Ranks of a stage compute at the same time, so each idle core goes to one of them.
        idle_cpu_list = "|".join(",".join(others[rank::size]) for rank in range(size)) if pinned and others else None
        stages.append(
            StageSettings(
                **_of_any_worker(serve, coordinator, threads),
                worker_id=f"stage-{i}",
                stage=i,
                any_stage=len(set(serve.tp_sizes)) == 1,
                tensor_parallel_size=size,
                cpu_list=cpu_list,
                idle_cpu_list=idle_cpu_list,
            )
        )
    return stages


def standby_settings(serve: ServeSettings, coordinator: str, cores: Cores | None = None) -> list[StageSettings]:
    """Returns the settings of workers that may replace any stage.

    They are not pinned, because it is not known which core will be free. A worker with a single rank may use idle cores
    of others, which helps most when its pages are computed again in a recovery.
    """
    size, cores = max(serve.tp_sizes), cores or own_cores()
    lends = serve.device != "cuda" and size == 1 and cores.count == len(cores.ids)
    lent = cores.ids[1:] if lends else ()
    return [
        StageSettings(
            **_of_any_worker(serve, coordinator, _threads(serve, cores)),
            worker_id=f"standby-{i}",
            tensor_parallel_size=size,
            idle_cpu_list=",".join(map(str, lent)) or None,
        )
        for i in range(serve.standby)
    ]


def _of_any_worker(serve: ServeSettings, coordinator: str, threads: int) -> dict[str, Any]:
    own = {"coordinator": coordinator, "model": serve.model, "threads": threads, "drain_timeout": 0.0}
    return {**shared(serve, StageSettings), **INNER, **own}


def _threads(serve: ServeSettings, cores: Cores) -> int:
    return max(1, cores.count // sum(serve.tp_sizes))


def gateway_settings(serve: ServeSettings, coordinator: str) -> GatewaySettings:
    """Returns the settings of the gateway. Only the gateway may listen beyond loopback."""
    own = {
        "coordinator": coordinator,
        "model": serve.model,
        "port": serve.port,
        "grpc_port": serve.grpc_port,
        "drain_timeout": serve.drain_timeout,
        "speculative_config": _if_method(serve, "ngram"),
    }
    return GatewaySettings(**{**shared(serve, GatewaySettings), **own})


def _if_method(serve: ServeSettings, method: str) -> SpeculativeConfig | None:
    """Returns the settings of speculative decoding if they use this method, else None."""
    config = serve.speculative_config
    return config if config is not None and config.method == method else None
