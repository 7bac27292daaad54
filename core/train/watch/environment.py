"""What a run was made with, in its folder: run.yaml, the configuration in full, and environment.json, its starts.

run.yaml is a config for ``tele train --config``: every option with its value, paths absolute. environment.json has one
entry a start (a new run, or one that was resumed): time, step, versions, device, layout, host, command.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import yaml

from telechat_twins.core.config import RunConfig
from telechat_twins.core.files import IN_CHECKOUT, ROOT
from telechat_twins.core.files.atomic import write_text
from telechat_twins.core.files.foreign import parse_json
from telechat_twins.core.launch.restarts import restarts_before
from telechat_twins.core.types import JsonObject

CONFIG, ENVIRONMENT = "run.yaml", "environment.json"
_PACKAGES = ("telechat-twins", "mindspore", "torch", "torch_npu", "triton", "numpy", "safetensors")
_STARTS = 100  # newest starts kept
_GIT_S = 5.0


def write_environment(out: Path, config: RunConfig, implementation: Mapping[str, str], step: int) -> None:
    """Write run.yaml, and add this start, at ``step``, to environment.json."""
    write_text(out / CONFIG, yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True))
    starts = [*read_environment(out), _start(config, implementation, step)][-_STARTS:]
    write_text(out / ENVIRONMENT, json.dumps({"starts": starts}, indent=1, ensure_ascii=False) + "\n")


def read_environment(out: Path) -> list[JsonObject]:
    """The starts recorded in a run's folder; none where the file is missing or not ours."""
    with suppress(OSError, ValueError):
        found = parse_json((out / ENVIRONMENT).read_bytes())
        if isinstance(found.get("starts"), list):
            return [entry for entry in found["starts"] if isinstance(entry, dict)]
    return []


def _start(config: RunConfig, implementation: Mapping[str, str], step: int) -> JsonObject:
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "step": step,
        "restarts": restarts_before(),
        **implementation,
        "layout": config.parallel.name,
        "host": socket.gethostname(),
        "system": platform.platform(),
        "versions": {"python": platform.python_version(), **_versions()},
        **({"commit": commit} if (commit := _commit()) else {}),
        "command": shlex.join(sys.argv)[:2000],
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _commit() -> str | None:
    """The checkout's commit, with "-dirty" where files differ from it; None outside a checkout."""
    if not IN_CHECKOUT:
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_S, stdin=subprocess.DEVNULL)
        return done.stdout.strip() or None
    return None
