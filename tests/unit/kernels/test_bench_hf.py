"""The baseline's import of transformers, which must not meet this checkout's folder ``kernels``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from telechat_twins.core.files import ROOT

# Stands in for transformers 5.0 to 5.9, which look for a package "kernels" wherever Python would import it from.
TRANSFORMERS = """
import importlib.util
class StoppingCriteria: ...
__version__ = str(importlib.util.find_spec("kernels"))
"""


def test_transformers_does_not_find_our_kernels(tmp_path: Path) -> None:
    (tmp_path / "transformers.py").write_text(TRANSFORMERS)
    program = (
        f"import sys; sys.path[:0] = ['', {str(ROOT)!r}, {str(tmp_path)!r}]\n"
        "from telechat_twins.kernels.bench import hf\n"
        "import telechat_twins.kernels.reference\n"  # ours are imported all the same
        "print(hf.transformers.__version__)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "None"), done.stderr
