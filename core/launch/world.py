"""Rank and world size from the environment variables of torchrun and msrun."""

from __future__ import annotations

import os


def launched_world() -> tuple[int, int]:
    """(rank, number of processes) of this process by torchrun's or msrun's variables; (0, 1) without them."""
    for rank, size in (("RANK", "WORLD_SIZE"), ("RANK_ID", "RANK_SIZE"), ("MS_NODE_ID", "MS_WORKER_NUM")):
        if size in os.environ:
            given = os.environ.get(rank, "0")
            return int(given) if given.isdigit() else 0, int(os.environ[size])
    return 0, 1
