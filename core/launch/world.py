"""Rank and world size as the launchers put them into the environment."""

from __future__ import annotations

import os


def launched_world() -> tuple[int, int]:
    """(rank, number of processes) as torchrun or msrun told this process; (0, 1) without a launcher."""
    for rank, size in (("RANK", "WORLD_SIZE"), ("RANK_ID", "RANK_SIZE"), ("MS_NODE_ID", "MS_WORKER_NUM")):
        if size in os.environ:
            given = os.environ.get(rank, "0")
            return int(given) if given.isdigit() else 0, int(os.environ[size])
    return 0, 1
