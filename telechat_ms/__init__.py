"""The MindSpore side. Importing it prepares the process."""

import telechat_twins.kernels.mindspore.settings  # noqa: F401
