"""The MindSpore side. Importing it prepares the process."""

import kernels.mindspore_settings  # noqa: F401
