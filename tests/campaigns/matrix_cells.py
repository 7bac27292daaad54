"""The environments of the matrix: which versions stand in for those of pyproject.toml, and which tests run there."""

from __future__ import annotations

from dataclasses import dataclass

GOLDENS = (
    "tests/parity/test_goldens.py",
    "tests/parity/test_families.py",
    "tests/parity/test_optimizer_trace.py",
)
PARITY = ("tests/parity/test_rehearsal.py", "tests/parity/test_engine_parity.py")
RELEASES = (
    "tests/unit/convert/test_convert_hf.py",
    "tests/unit/convert/test_convert_families.py",
    "tests/unit/convert/test_convert_telechat3.py",
)
MINDSPORE_FILES = ("tests/unit/convert/test_convert_mindformers.py", "tests/unit/convert/test_mindspore_ckpt.py")
EXPORTS = ("tests/parity/test_exports_load.py",)
AUTOGRAD = ("tests/unit/telechat_ms/test_autograd_ms.py", "tests/unit/kernels/test_private_names.py")
MINDFORMERS_CHOOSES = ("tokenizers", "huggingface-hub", "setuptools", "pyarrow", "fsspec", "protobuf", "dill", "nltk",
                       "datasets", "multiprocess")  # fmt: skip
PLAIN = ("numpy", "ml-dtypes", "safetensors", "pyyaml", "sentencepiece", "tqdm", "matplotlib", "tensorboard", "psutil",
         "pytest", "hypothesis", "jinja2")  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One environment. ``packages``: its requirements beside PLAIN; what has no version there has that of
    requirements.lock, unless it is in ``free``. ``tests``: what pytest runs. ``backends``: those installed. ``lacks``:
    part of pip's message where the index has not got what the packages require; docs/matrix.md says more."""

    name: str
    packages: tuple[str, ...]
    tests: tuple[str, ...]
    backends: str = "ms,pt"
    free: tuple[str, ...] = ()
    lacks: str = ""


CELLS = (
    Cell("mindspore-2.10", ("mindspore==2.10.0", "torch", "tokenizers"),
         (*GOLDENS, *PARITY, *AUTOGRAD, *RELEASES, *MINDSPORE_FILES, *EXPORTS), "ms", ("protobuf",)),
    Cell("torch-2.12", ("torch==2.12.1", "tokenizers"), (*GOLDENS, *RELEASES, *EXPORTS), "pt", ("setuptools",)),
    Cell("torch-2.14", ("torch==2.14.1", "tokenizers"), (*GOLDENS, *RELEASES, *EXPORTS), "pt"),
    Cell("transformers-4.57", ("torch", "transformers==4.57.1"), EXPORTS, "pt", ("tokenizers", "huggingface-hub")),
    Cell("transformers-5", ("torch", "transformers==5.24.0"), EXPORTS, "pt", ("tokenizers", "huggingface-hub")),
    Cell("mindformers-1.9", ("mindspore", "mindformers==1.9.0"), ("tests/parity/test_mindformers_wheel.py",), "ms",
         MINDFORMERS_CHOOSES),
    # Without mindspore beside it, so that pip names the version that is missing and not a conflict of the two.
    Cell("mindformers-2.1", ("mindformers==2.1.0",), ("tests/parity/test_mindformers_wheel.py",), "ms",
         ("mindspore", *MINDFORMERS_CHOOSES), "mindspore~=2.11"),
)  # fmt: skip

# What continuous integration runs: the cell that needs the smallest installation. `make test` has run the rest of it.
CI_CELL = "transformers-5"
CI_TESTS = (*EXPORTS, "-k", "transformers")
