"""The only door from the neutral code to a framework: modules are loaded by name, when asked for."""

from __future__ import annotations

import importlib
from types import ModuleType

from telechat_twins.core.errors import UserError

BACKENDS = {"ms": "telechat_ms", "pt": "pt_reference"}
TITLES = {"ms": "MindSpore", "pt": "PyTorch"}
_FRAMEWORK = {"ms": "mindspore", "pt": "torch"}


def load(backend: str, module: str) -> ModuleType:
    """``load("ms", "forward")`` is the module telechat_twins.telechat_ms.forward.

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
            f"--backend {backend}: {TITLES[backend]} is not installed; run: pip install -e '.[{backend}]'"
        ) from None
