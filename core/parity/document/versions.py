"""Versions of the software that made a report, read from package metadata: no framework is imported."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess

from telechat_twins.core.cli import version
from telechat_twins.core.files import IN_CHECKOUT, ROOT

_PACKAGES = ("numpy", "mindspore", "torch", "torch_npu")
_GIT_S = 5.0  # longest time that git may take


def own_versions() -> dict[str, str]:
    """Name -> version of this program, its commit where it runs from a checkout, Python and the packages installed."""
    found = {"telechat-twins": version()}
    if revision := commit():
        found["commit"] = revision
    found |= {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The checkout's commit, with "+changes" where tracked files differ from it; None outside a checkout of git."""
    if not IN_CHECKOUT or not (ROOT / ".git").exists():
        return None
    revision = _git("rev-parse", "--short=12", "HEAD")
    if not revision:
        return None
    return revision + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _git(*words: str) -> str:
    try:
        # Without optional locks: reading a status must not write the index of a checkout that others work in.
        command = ["git", "--no-optional-locks", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=_GIT_S, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
