"""The CI examples of docs/parity.md: their commands parse, and what one job records is what another judges."""

from __future__ import annotations

import fnmatch
import re
import shlex
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml

from tests import docs
from tests.house import ROOT

Complaints = Iterator[str]


def examples() -> tuple[str, str, str]:
    """Of GitHub Actions, GitLab CI and Jenkins."""
    fences = [fence for fence in docs.fences(ROOT, "docs/parity.md") if fence.language in ("yml", "groovy")]
    github, gitlab, jenkins = ("\n".join(fence.lines) for fence in fences)
    return github, gitlab, jenkins


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1] if name in words else ""


def wrong_commands(lines: list[str]) -> Complaints:
    """Commands of this program that would not be understood; ``ci.yaml`` is the reader's."""
    for line in lines:
        words = ["F" if word == "ci.yaml" else word for word in shlex.split(line)]
        if words[0] == "tele" and (said := docs.mistake(docs.Command("", 0, line, tuple(words)))):
            yield f"{line}: {said}"


def tele(lines: list[str], action: str) -> list[list[str]]:
    found = [shlex.split(line) for line in lines]
    return [words for words in found if words[:3] == ["tele", "parity", action]]


def judged(lines: list[str]) -> tuple[list[str], str, str]:
    """Of the one comparison: the records it reads, its report folder and its JUnit file."""
    (words,) = tele(lines, "compare")
    return [*words[3:5], option(words, "--reference")], option(words, "--out"), option(words, "--junit")


def github_mistakes(text: str) -> Complaints:
    jobs: dict[str, Any] = yaml.safe_load(text)["jobs"]
    steps = {name: job["steps"] for name, job in jobs.items()}
    lines = [step["run"] for job in steps.values() for step in job if "run" in step]
    yield from wrong_commands(lines)
    for name, job in jobs.items():
        yield from (f"{name} needs {other}, which is no job" for other in job.get("needs", []) if other not in jobs)
        yield from (f"{name}: a step must run or use one thing" for s in job["steps"] if ("run" in s) == ("uses" in s))
    using = [(name, step) for name, job in steps.items() for step in job if "uses" in step]
    uploads = {s["with"]["name"]: (n, s) for n, s in using if s["uses"].startswith("actions/upload-artifact@")}
    recorded = {option(words, "--out") for words in tele(lines, "record")}
    (judge, fetch), *_ = ((n, s["with"]) for n, s in using if s["uses"].startswith("actions/download-artifact@"))
    folders = {}
    for name, (job, step) in uploads.items():
        if fnmatch.fnmatch(name, fetch["pattern"]):
            folders[f"{fetch['path']}/{name}"] = step["with"]["path"]
            if job not in jobs[judge].get("needs", []):
                yield f"{judge} does not wait for {job}"
    records, out, junit = judged(lines)
    yield from (f"{folder} is not downloaded" for folder in records if folder not in folders)
    yield from (f"{path} is uploaded, but not recorded" for path in folders.values() if path not in recorded)
    kept = [step for _, step in uploads.values() if step["with"]["path"] == out]
    if not kept or kept[0].get("if") != "always()" or not junit.startswith(f"{out}/"):
        yield "the report is not kept after a failure"


def gitlab_mistakes(text: str) -> Complaints:
    tree: dict[str, Any] = yaml.safe_load(text)
    jobs = {name: job for name, job in tree.items() if name != "stages"}
    lines = [line for job in jobs.values() for line in job["script"]]
    yield from wrong_commands(lines)
    kept = set()
    for name, job in jobs.items():
        if job["stage"] not in tree["stages"]:
            yield f"{name}: no stage {job['stage']}"
        for words in tele(job["script"], "record"):
            out = option(words, "--out")
            if any(out.startswith(path) for path in job["artifacts"]["paths"]):
                kept.add((out, name))
    (judge,) = (name for name, job in jobs.items() if tele(job["script"], "compare"))
    records, out, junit = judged(lines)
    held = {folder for folder, name in kept if name in jobs[judge]["needs"]}
    yield from (f"{judge} does not get {folder}" for folder in records if folder not in held)
    artifacts = jobs[judge]["artifacts"]
    if artifacts.get("when") != "always" or f"{out}/" not in artifacts["paths"]:
        yield "the report is not kept after a failure"
    if artifacts["reports"]["junit"] != junit:
        yield f"{junit} is not the file of the test report"


def jenkins_mistakes(text: str) -> Complaints:
    bare = re.sub(r"'[^']*'|\"[^\"]*\"", "", text)
    if bare.count("{") != bare.count("}"):
        yield "braces do not match"
    lines = [single or double for single, double in re.findall(r"\bsh (?:'([^']*)'|\"([^\"]*)\")", text)]
    yield from wrong_commands(lines)
    stashed = {name: files.split(",") for name, files in re.findall(r"stash name: '(\w+)', includes: '([^']*)'", text)}
    fetched = re.findall(r"\bunstash '(\w+)'", text)
    yield from (f"unstash {name}, which nothing stashes" for name in fetched if name not in stashed)
    held = {files.removesuffix("/**") for name in fetched for files in stashed.get(name, [])}
    recorded = {option(words, "--out") for words in tele(lines, "record")}
    records, out, junit = judged(lines)
    yield from (f"{folder} is not there to compare" for folder in records if folder not in held & recorded)
    after = text[text.index("always {") :] if "always {" in text else ""
    if f"junit '{junit}'" not in after or f"archiveArtifacts '{out}/**'" not in after:
        yield "the report is not kept after a failure"


CHECKS: tuple[Callable[[str], Complaints], ...] = (github_mistakes, gitlab_mistakes, jenkins_mistakes)


@pytest.mark.parametrize("system", range(3), ids=["github", "gitlab", "jenkins"])
def test_an_example_fits_together(system: int) -> None:
    assert list(CHECKS[system](examples()[system])) == []


PLANTED = [
    (0, "name: record-gpu", "name: gpu", "records/record-gpu is not downloaded"),
    (0, "path: records/npu}", "path: records/out}", "records/out is uploaded, but not recorded"),
    (0, "needs: [npu, gpu]", "needs: [npu]", "compare does not wait for gpu"),
    (0, "if: always()", "if: success()", "the report is not kept"),
    (0, "--reference", "--refrence", "unknown argument '--refrence'"),
    (1, "needs: [npu, gpu]", "needs: [npu]", "compare does not get records/gpu"),
    (1, "stage: judge", "stage: test", "no stage test"),
    (1, "junit: report/junit.xml", "junit: junit.xml", "is not the file of the test report"),
    (1, "--backend ms", "--backend npu", "invalid choice: 'npu'"),
    (2, "unstash 'gpu'", "unstash 'cuda'", "unstash cuda, which nothing stashes"),
    (2, "records/gpu/**,", "", "records/gpu is not there to compare"),
    (2, "always {", "success {", "the report is not kept"),
    (2, "--junit", "--junt", "unknown argument '--junt'"),
]


@pytest.mark.parametrize(("system", "right", "wrong", "says"), PLANTED, ids=[planted[3] for planted in PLANTED])
def test_a_planted_mistake_is_found(system: int, right: str, wrong: str, says: str) -> None:
    text = examples()[system]
    assert right in text
    found = list(CHECKS[system](text.replace(right, wrong)))
    assert any(says in complaint for complaint in found), found
