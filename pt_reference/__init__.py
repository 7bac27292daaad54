"""The PyTorch side. Importing it prepares the process."""

import telechat_twins.kernels.pytorch.settings  # noqa: F401
