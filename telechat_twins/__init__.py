"""Import name of the project: ``telechat_twins.core``, ``telechat_twins.kernels`` and so on.

The folders are at the top level of the repository, but nothing imports them by their bare names: ``kernels`` is also a
package of Hugging Face, and many projects have a ``core``. ``core/``, ``convert/`` and ``kernels/`` therefore have no
``__init__.py``: Python prefers any regular package of the same name to a folder without one. In a wheel the folders are
inside this package; in a checkout, installed as editable or not, they are beside it.
"""

from pathlib import Path

_CHECKOUT = Path(__file__).resolve().parent.parent
if (_CHECKOUT / "pyproject.toml").is_file() and (_CHECKOUT / "core" / "cli.py").is_file():
    __path__.append(str(_CHECKOUT))
