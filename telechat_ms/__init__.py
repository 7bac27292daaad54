"""The MindSpore side. Importing it prepares the process."""

import kernels.mindspore.settings  # noqa: F401
