"""Registry of backends: modules of a twin, and with them its framework, are imported when a command needs them."""

from __future__ import annotations

import importlib
from types import ModuleType

from telechat_twins.core.errors import UserError
from telechat_twins.core.files import IN_CHECKOUT

BACKENDS = {"ms": "telechat_ms", "pt": "pt_reference"}
TITLES = {"ms": "MindSpore", "pt": "PyTorch"}
_FRAMEWORK = {"ms": "mindspore", "pt": "torch"}


def install_command(extra: str) -> str:
    """The pip command that installs an extra, in a checkout or for an installed wheel."""
    return f"pip install -e '.[{extra}]'" if IN_CHECKOUT else f"pip install 'telechat-twins[{extra}]'"


def load(backend: str, module: str) -> ModuleType:
    """A module of a backend: ``load("ms", "forward")`` is telechat_twins.telechat_ms.forward.

    UserError when the framework is not installed.
    """
    if backend not in BACKENDS:
        raise UserError(f"--backend: '{backend}' is not one of {', '.join(BACKENDS)}")
    try:
        return importlib.import_module(f"telechat_twins.{BACKENDS[backend]}.{module}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != _FRAMEWORK[backend]:
            raise
        raise UserError(
            f"--backend {backend}: {TITLES[backend]} is not installed; run: {install_command(backend)}"
        ) from None
