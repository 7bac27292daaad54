"""Files: atomic writes, safetensors, unbuffered reading, and where the repository lies."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # the checkout, or site-packages/telechat_twins where a wheel was installed
