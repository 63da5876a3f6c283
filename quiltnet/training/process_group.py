"""The process group of ranks that torchrun may have started again.

torchrun's agent keeps one store for all starts of its workers (torch 2.14, ``_shared_tcp_store_server`` in
``elastic/rendezvous/dynamic_rendezvous.py``), and a new start finds the addresses of the ended ranks in it: whoever
reads one before its successor has written over it tries to reach a process that is gone. So the ranks of each start
agree on a prefix of their own. Counts of restarts would not do as such: each node has its own.
"""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import PrefixStore, Store

_LOOK_S = 0.02


def start_process_group(backend: str, timeout: timedelta) -> None:  # all ranks
    """Start it where torchrun has started this process; whoever else starts ranks is left to accelerate.

    Args:
        backend: torch's name, ``gloo`` or ``nccl``.
        timeout: of each collective.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or dist.is_initialized():
        return
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    prefix = agree_on_prefix(store, rank, world_size)
    dist.init_process_group(
        backend, store=PrefixStore(prefix, store), rank=rank, world_size=world_size, timeout=timeout
    )


def agree_on_prefix(store: Store, rank: int, world_size: int) -> str:  # all ranks
    """Rank 0's word, new at every start, to ranks that live now.

    Each of the others leaves a word of its own, and takes what is answered to that: what earlier ranks left is answered
    too, and read by nobody. Rank 0 answers until all have said that they know.
    """
    mine = uuid.uuid4().hex
    if rank > 0:
        store.set(f"quiltnet/asks/{rank}", mine)
        prefix = store.get(f"quiltnet/answers/{mine}").decode()  # waits for it
        store.set(f"quiltnet/knows/{prefix}/{rank}", "")
        return prefix
    waiting, answered = set(range(1, world_size)), set()
    while waiting:
        for other in sorted(waiting):
            if store.check([f"quiltnet/knows/{mine}/{other}"]):
                waiting.remove(other)
            elif store.check([f"quiltnet/asks/{other}"]):
                word = store.get(f"quiltnet/asks/{other}").decode()
                if word not in answered:
                    store.set(f"quiltnet/answers/{word}", mine)
                    answered.add(word)
        time.sleep(_LOOK_S if waiting else 0)
    return mine
