"""The house rules hold here, and each rule goes red on a tree with a planted violation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests import floors, house
from tests.private_names import private_names
from tests.size_report import report

RULES: list[Callable[[Path], list[str]]] = [
    house.wrong_imports,
    house.twin_differences,
    house.twin_signatures,
    house.stale_exceptions,
    house.unsafe_calls,
    house.machine_paths,
    house.too_long,
    house.long_functions,
    house.bare_names,
    floors.floors,
    floors.no_circles,
    floors.flat,
    floors.commands_are_leaves,
    private_names,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_tree_keeps_the_rule(rule: Callable[[Path], list[str]]) -> None:
    complaints = rule(house.ROOT)
    assert not complaints, "\n" + "\n".join(complaints)


CLEAN = {
    "core/config.py": "import yaml\nfrom telechat_twins.core.errors import UserError\n",
    "core/errors.py": "class UserError(Exception): ...\n",
    "core/launch/launcher.py": "from telechat_twins.core.files import atomic\n",
    "core/files/atomic.py": "",
    "core/commands/convert.py": "def run(args):\n    from telechat_twins.convert import hf\n    return hf\n",
    "convert/hf/folder.py": "from telechat_twins.core.config import x\n",
    "kernels/reference.py": "import numpy as np\ndef f(p):\n    return np.load(p, allow_pickle=False)\n",
    "kernels/pytorch/ops.py": "import torch\nclass A:\n    def f(self, x): return self._g(x._replace(a=torch))\n",
    "kernels/pytorch/private.py": "import torch\nx = torch._C\n",
    "telechat_ms/model.py": "import mindspore\nclass Model:\n    def run(self, a): ...\ndef build(config): ...\n",
    "pt_reference/model.py": "import torch\nclass Model:\n    def run(self, a): ...\ndef build(config): ...\n",
    "tests/unit/test_x.py": "import torch, mindspore\n",
    "docs/a.md": "see https://example.org/home/page and ../shared/x and /usr/bin/env and $HOME/opt/x\n",
}


def plant(root: Path, changes: dict[str, str]) -> Path:
    for name, text in {**CLEAN, **changes}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize("rule", [r for r in RULES if r is not house.stale_exceptions], ids=lambda rule: rule.__name__)
def test_a_clean_tree_passes(rule: Callable[[Path], list[str]], tmp_path: Path) -> None:
    assert rule(plant(tmp_path, {})) == []


IMPORTS = house.wrong_imports
UNSAFE = house.unsafe_calls


@pytest.mark.parametrize(
    ("rule", "file", "text", "says"),
    [
        (IMPORTS, "core/x.py", "import torch\n", "core/x.py:1: imports torch"),
        (IMPORTS, "core/x.py", "def f():\n    import mindspore.mint\n", "imports mindspore.mint"),
        (IMPORTS, "core/x.py", "from telechat_twins.convert import hf\n", "imports convert"),
        (IMPORTS, "core/x.py", "import telechat_twins.kernels.reference\n", "imports kernels"),
        (IMPORTS, "core/x.py", "from telechat_twins.telechat_ms import model\n", "imports telechat_ms"),
        (IMPORTS, "core/commands/x.py", "from telechat_twins.convert import hf\n", "at the top"),
        (
            IMPORTS,
            "core/commands/x.py",
            "def run():\n    import telechat_twins.pt_reference.model\n",
            "imports pt_reference",
        ),
        (IMPORTS, "core/commands/x.py", "import importlib\nimportlib.import_module('torch')\n", "is the door"),
        (IMPORTS, "convert/x.py", "import torch\n", "imports torch"),
        (IMPORTS, "convert/x.py", "import kernels\n", "imports kernels"),
        (IMPORTS, "kernels/x.py", "from telechat_twins.convert import hf\n", "imports convert"),
        (IMPORTS, "kernels/reference.py", "import torch\n", "imports torch"),
        (IMPORTS, "kernels/mindspore/ops.py", "import torch\n", "imports torch"),
        (IMPORTS, "telechat_ms/model.py", "import torch.nn\n", "imports torch.nn"),
        (
            IMPORTS,
            "telechat_ms/model.py",
            "from telechat_twins.kernels.pytorch import ops\n",
            "other framework's kernels.pytorch",
        ),
        (
            IMPORTS,
            "telechat_ms/model.py",
            "def f():\n    from telechat_twins.pt_reference.model import g\n",
            "imports pt_reference",
        ),
        (IMPORTS, "pt_reference/model.py", "import mindspore\n", "imports mindspore"),
        (IMPORTS, "pt_reference/model.py", "import telechat_ms\n", "imports telechat_ms"),
        (IMPORTS, "pt_reference/model.py", "from . import ops\n", "relative import"),
        (IMPORTS, "core/x.py", "from tests import house\n", "imports tests"),
        (
            house.twin_differences,
            "telechat_ms/extra.py",
            "x = 1\n",
            "telechat_ms/extra.py: pt_reference has no such file",
        ),
        (house.twin_differences, "pt_reference/extra.py", "x = 1\n", "telechat_ms has no such file"),
        (house.twin_differences, "pt_reference/model.py", "class Model: ...\n", "'build' has no twin"),
        (house.twin_differences, "telechat_ms/model.py", "def build(): ...\n", "'Model' has no twin"),
        (
            house.twin_signatures,
            "pt_reference/model.py",
            "class Model:\n    def run(self, b): ...\ndef build(config): ...\n",
            "Model.run(self, a) against (self, b)",
        ),
        (UNSAFE, "core/x.py", "import pickle\n", "nothing here is pickled"),
        (UNSAFE, "pt_reference/x.py", "import torch\ntorch.save(1, 'f')\n", "torch.save pickles"),
        (UNSAFE, "tests/x.py", "import torch\ntorch.load('f', weights_only=True)\n", "torch.load unpickles"),
        (UNSAFE, "core/x.py", "import yaml\nyaml.load('', Loader=yaml.Loader)\n", "yaml.load may build"),
        (UNSAFE, "core/x.py", "import yaml\nyaml.unsafe_load('')\n", "yaml.unsafe_load"),
        (UNSAFE, "core/x.py", "import numpy as np\nnp.load('f')\n", "needs allow_pickle=False"),
        (UNSAFE, "core/x.py", "import numpy as np\nnp.load('f', allow_pickle=True)\n", "needs allow_pickle=False"),
        (UNSAFE, "core/x.py", "eval('1')\n", "eval runs text as code"),
        (UNSAFE, "core/x.py", "import subprocess\nsubprocess.run('ls', shell=True)\n", "shell=True"),
        (
            IMPORTS,
            "telechat_ms/x.py",
            "from telechat_twins.kernels.triton import ops\n",
            "other framework's kernels.triton",
        ),
        (
            IMPORTS,
            "pt_reference/x.py",
            "from telechat_twins.kernels.ascend import ops\n",
            "other framework's kernels.ascend",
        ),
        (
            IMPORTS,
            "pt_reference/x.py",
            "def f():\n    from telechat_twins.kernels.mindspore import paged\n",
            "framework's kernels.mindspore",
        ),
        (IMPORTS, "kernels/pytorch/cpu.py", "import mindspore\n", "imports mindspore"),
        (IMPORTS, "kernels/dispatch.py", "import torch\n", "imports torch"),
        (IMPORTS, "core/commands/generate.py", "from telechat_twins.convert import source\n", "at the top"),
        (
            floors.floors,
            "core/files/x.py",
            "from telechat_twins.core.config import X\n",
            "'files' imports core.config, which is not on a lower floor",
        ),
        (
            floors.floors,
            "core/files/x.py",
            "def f():\n    from telechat_twins.core.launch import launcher\n",
            "is not on a lower floor",
        ),
        (floors.floors, "core/serve/x.py", "import telechat_twins.core.parity.x\n", "'serve' imports core.parity.x"),
        (floors.floors, "core/attic/x.py", "", "room 'attic' is not on any floor"),
        (
            floors.no_circles,
            "core/errors.py",
            "def f():\n    from telechat_twins.core import config\n",
            "core.config and core.errors import",
        ),
        (
            floors.no_circles,
            "core/errors.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from telechat_twins.core.config import X\n",
            "core.config and core.errors import each other",
        ),
        (
            floors.commands_are_leaves,
            "core/serve/x.py",
            "from telechat_twins.core.commands.convert import run\n",
            "imports the command",
        ),
        (
            floors.commands_are_leaves,
            "core/commands/x.py",
            "from telechat_twins.core.commands import convert\n",
            "imports the command",
        ),
        (
            house.bare_names,
            "core/x.py",
            "def f():\n    from core.errors import UserError\n",
            "core/x.py:2: write telechat_twins.core.errors",
        ),
        (house.bare_names, "tests/x.py", "import kernels\n", "write telechat_twins.kernels"),
        (house.long_functions, "core/x.py", "def f():\n" + "    x = 1\n" * 60, "core/x.py:1: f has 61 lines"),
        (private_names, "telechat_ms/x.py", "from mindspore._c_expression import run\n", "mindspore._c_expression.run"),
        (private_names, "kernels/mindspore/x.py", "from mindspore.ops.operations import _inner_ops\n", "_inner_ops"),
        (private_names, "kernels/triton/x.py", "def f():\n    from triton._C.libtriton import ir\n", "triton._C"),
        (
            private_names,
            "pt_reference/x.py",
            "import torch\nx = torch._C._get()\n",
            "pt_reference/x.py:2: private name",
        ),
        (
            private_names,
            "kernels/pytorch/x.py",
            "import torch\nx = torch.ones(1).untyped_storage()._cdata\n",
            "._cdata",
        ),
        (private_names, "kernels/bench/x.py", "import torch\nx = hasattr(torch.ops, '_linear')\n", "'_linear'"),
        (house.too_long, "core/x.py", "x = 1\n" * 501, "core/x.py: 501 lines"),
    ],
)
def test_a_planted_violation_is_found(rule: Callable, file: str, text: str, says: str, tmp_path: Path) -> None:
    plant(tmp_path, {"core/parity/x.py": ""})
    complaints = rule(plant(tmp_path, {file: text}))
    assert any(says in c for c in complaints), complaints


@pytest.mark.parametrize("folder", ["root", "home", "work", "opt", "tmp", "Users"])
def test_a_machine_path_is_found(folder: str, tmp_path: Path) -> None:
    complaints = house.machine_paths(plant(tmp_path, {"docs/b.md": f"first\nread `/{folder}/some.file`\n"}))
    assert len(complaints) == 1 and complaints[0].startswith("docs/b.md:2")


def test_an_exception_that_is_not_needed_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exceptions = {"telechat_ms/autograd.py": "", "telechat_ms/model.py:build": "", "telechat_ms/model.py:gone": ""}
    monkeypatch.setattr(house, "TWIN_EXCEPTIONS", exceptions)
    complaints = house.stale_exceptions(plant(tmp_path, {"telechat_ms/autograd.py": "def private(): ...\n"}))
    assert [c.partition(": ")[0] for c in complaints] == ["telechat_ms/model.py:gone"]


def test_a_model_of_400_lines_is_found(tmp_path: Path) -> None:
    root = plant(tmp_path, {"telechat_ms/model.py": "x = 1\n" * 400, "pt_reference/model.py": "x = 1\n" * 399})
    assert house.too_long(root) == ["telechat_ms/model.py: 400 lines, at most 399"]


def test_size_report_marks_what_is_over_budget(tmp_path: Path) -> None:
    root = plant(tmp_path, {"telechat_ms/model.py": "x = 1\n" * 401, "telechat_ms/ulysses.py": "x = 1\n" * 300})
    text = report(house.sizes(root))
    marked = [line.split()[0] for line in text.splitlines() if line.endswith("OVER")]
    assert marked == ["telechat_ms/model.py"]
    assert "1 over budget" in text


def test_a_crowded_folder_is_found(tmp_path: Path) -> None:
    many = {f"core/model/f{i}.py": "" for i in range(21)} | {f"telechat_ms/f{i}.py": "" for i in range(24)}
    assert floors.flat(plant(tmp_path, many)) == ["core/model/: 21 files, at most 20"]
