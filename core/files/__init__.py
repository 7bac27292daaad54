"""File input and output: atomic writes, safetensors, unbuffered reading; and where the project's own files are."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # the checkout, or site-packages/telechat_twins where a wheel was installed
IN_CHECKOUT = (ROOT / "telechat_twins").is_dir()
IMPORT_ROOT = ROOT if IN_CHECKOUT else ROOT.parent  # what must be on sys.path for `import telechat_twins`
