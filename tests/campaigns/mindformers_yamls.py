"""Every YAML of TeleChat that MindFormers ever published, into a run's config here and back.

    python -m tests.campaigns.mindformers_yamls CLONE [--keep FOLDER]

CLONE: a git repository of MindFormers (bare or not) with its tags and branches; every version of every file
``*telechat*.yaml`` that one of them holds is read. Each must be carried, with no key unlisted and none "not known
here", and the same again after the way back; or be refused for one of REFUSED. One line of JSON a file, the exit code
is 1 if one does neither. --keep writes the files and what was printed of each.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from telechat_twins.core.commands import convert
from telechat_twins.core.config import load_run_config
from telechat_twins.core.errors import UserError
from telechat_twins.core.types import JsonObject

# Why a published YAML cannot be a run here.
REFUSED = {
    "mixture of experts": "mixtures of experts are not supported",
    "tied head": "TeleChat-7B's head is its embedding",
    "no size of the ffn": "intermediate_size or ffn_hidden_size is missing",
    "model elsewhere": "pretrained_model_dir names the folder",
    "not YAML": "appears twice",
}


def published(clone: Path) -> dict[str, str]:
    """Blob -> a name for it, of every version of the files."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(clone), *words], capture_output=True, text=True, check=True).stdout

    found: dict[str, str] = {}
    for ref in git("for-each-ref", "--format=%(refname)").split():
        for line in git("ls-tree", "-r", ref, "--format=%(objectname) %(path)").splitlines():
            blob, _, path = line.partition(" ")
            if re.search(r"telechat[^/]*\.ya?ml$", path):
                found[blob] = f"{Path(path).stem}-{blob[:7]}"
    return {name: git("cat-file", "blob", blob) for blob, name in sorted(found.items(), key=lambda one: one[1])}


def converted(source: Path, target: Path, ways: tuple[str, str]) -> str:
    """What `tele convert` prints, or raises as UserError."""
    parser, said = argparse.ArgumentParser(), io.StringIO()
    convert.add_arguments(parser)
    with contextlib.redirect_stdout(said):
        convert.run(parser.parse_args(["--from", ways[0], "--to", ways[1], str(source), str(target), "--force"]))
    return said.getvalue()


def there_and_back(source: Path) -> JsonObject:
    """What became of a file: ``refused`` and why, or ``carried`` and what is wrong with that."""
    ours, back, again = (source.with_suffix(f".{name}.yaml") for name in ("ours", "back", "again"))
    try:
        said = converted(source, ours, ("mindformers", "canonical"))
    except UserError as error:
        reason = next((name for name, words in REFUSED.items() if words in str(error)), None)
        return {"refused": reason, "wrong": None if reason else str(error)}
    source.with_suffix(".log").write_text(said)
    lines = [line.split(": ") for line in said.splitlines() if line.startswith(("carried: ", "not carried: "))]
    told = {line[1].split(" -> ")[0] for line in lines}
    keys = dotted(yaml.safe_load(source.read_text()))
    model = "model.model_config."  # its fields are carried as one
    wrong = sorted(key for key in keys if key not in told and not key.startswith(model))
    wrong += [": ".join(line) for line in lines if "not known here" in line[-1]]
    if "train" not in yaml.safe_load(ours.read_text()):
        return {"carried": "prediction", "wrong": wrong or None}
    converted(ours, back, ("canonical", "mindformers"))
    converted(back, again, ("mindformers", "canonical"))
    if load_run_config(ours) != load_run_config(again):
        wrong.append("differs after the way back")
    return {"carried": "training", "wrong": wrong or None}


def dotted(tree: object, path: str = "") -> list[str]:
    if not isinstance(tree, dict) or not tree:
        return [path]
    return [key for name, value in tree.items() for key in dotted(value, f"{path}.{name}" if path else str(name))]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("clone", type=Path)
    parser.add_argument("--keep", type=Path)
    args = parser.parse_args()
    bad, counts = 0, collections.Counter[str]()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        folder.mkdir(exist_ok=True)
        for name, text in published(args.clone).items():
            (folder / f"{name}.yaml").write_text(text)
            row = there_and_back(folder / f"{name}.yaml")
            bad += row["wrong"] is not None
            counts[str(row.get("carried") or row.get("refused"))] += 1
            print(json.dumps({"file": name, **row}), flush=True)
    print(json.dumps({"files": counts.total(), **counts, "wrong": bad}))
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
