"""Examples of deploy/ and the files of CI services, as far as they can be checked without a cluster: they parse, their
structure is right, what they name exists, and the launch lines that they render are ones that `tele train` takes.

tests/multiproc/test_parallel_training.py runs the launch line of deploy/ssh with two nodes on one machine.
"""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from telechat_twins.core.cli import Parser
from telechat_twins.core.commands import train
from telechat_twins.core.config import load_run_config
from telechat_twins.core.launch.command import check_nodes
from telechat_twins.core.train.stages import check_stages

ROOT = Path(__file__).resolve().parents[3]
DEPLOY = ROOT / "deploy"
TEXT, WHOLE = {"type": "string"}, {"type": "integer"}

# The part of Volcano's batch.volcano.sh/v1alpha1 Job that the examples use (its API reference), unknown keys refused.
CONTAINER = {
    "type": "object",
    "required": ["name", "image"],
    "additionalProperties": False,
    "properties": {
        "name": TEXT,
        "image": TEXT,
        "command": {"type": "array", "items": TEXT, "minItems": 1},
        "args": {"type": "array", "items": TEXT},
        "workingDir": TEXT,
        "resources": {
            "type": "object",
            "additionalProperties": False,
            "properties": {"requests": {"type": "object"}, "limits": {"type": "object"}},
        },
        "volumeMounts": {"type": "array", "items": {"type": "object", "required": ["name", "mountPath"]}},
    },
}
POD = {
    "type": "object",
    "required": ["containers", "restartPolicy"],
    "additionalProperties": False,
    "properties": {
        "restartPolicy": {"enum": ["Never", "OnFailure"]},
        "terminationGracePeriodSeconds": WHOLE,
        "nodeSelector": {"type": "object", "additionalProperties": TEXT},
        "containers": {"type": "array", "items": CONTAINER, "minItems": 1},
        "volumes": {"type": "array", "items": {"type": "object", "required": ["name"]}},
    },
}
POLICY = {
    "type": "object",
    "required": ["action"],
    "additionalProperties": False,
    "properties": {
        "event": {"enum": ["PodEvicted", "PodFailed", "TaskCompleted"]},
        "exitCode": WHOLE,
        "action": {"enum": ["RestartJob", "AbortJob", "CompleteJob"]},
    },
}
JOB = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "additionalProperties": False,
    "properties": {
        "apiVersion": {"const": "batch.volcano.sh/v1alpha1"},
        "kind": {"const": "Job"},
        "metadata": {"type": "object", "required": ["name"]},
        "spec": {
            "type": "object",
            "required": ["schedulerName", "minAvailable", "tasks"],
            "additionalProperties": False,
            "properties": {
                "schedulerName": {"const": "volcano"},
                "minAvailable": WHOLE,
                "maxRetry": WHOLE,
                "plugins": {"type": "object", "additionalProperties": {"type": "array"}},
                "policies": {"type": "array", "items": POLICY},
                "tasks": {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        "type": "object",
                        "required": ["name", "replicas", "template"],
                        "additionalProperties": False,
                        "properties": {
                            "name": TEXT,
                            "replicas": WHOLE,
                            "template": {"type": "object", "required": ["spec"], "properties": {"spec": POD}},
                        },
                    },
                },
            },
        },
    },
}


def stubs(folder: Path, **programs: str) -> dict[str, str]:
    """An environment in which these programs are shell scripts, first on PATH."""
    for name, text in {"tele": 'printf "%s\\n" "LINE:$*"', **programs}.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / name).chmod(0o755)
    return {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def launch_lines(output: str) -> list[list[str]]:
    return [line.removeprefix("LINE:").split() for line in output.splitlines() if line.startswith("LINE:")]


def check_lines(lines: list[list[str]], nodes: int, master: str) -> None:
    """Every node's `tele train` line is one that it takes: options, nodes, and a layout that the nodes can hold."""
    found = []
    for verb, *words in sorted(lines, key=lambda line: line[line.index("--node-rank") + 1]):
        assert verb == "train"
        parser = Parser(prog="tele train")
        train.add_arguments(parser)
        args = parser.parse_args(words)
        overrides = train._layout_overrides(args.layout, args.config)
        config = load_run_config(args.config, overrides)
        nproc = train._share(config.parallel, args.nnodes)
        assert check_nodes(nproc, args.nnodes, args.node_rank, args.master)[0] == master
        check_stages(config, nproc * args.nnodes)
        assert args.resume == "auto" and args.restarts > 0 and nproc == 8
        found.append((args.node_rank, args.nnodes))
    assert found == [(rank, nodes) for rank in range(nodes)]


def test_ssh_starts_every_machine(tmp_path: Path) -> None:
    """And its code is that of the first that failed, whichever order they end in."""
    script = DEPLOY / "ssh" / "train.sh"
    env = stubs(tmp_path, ssh='echo "HOST:${*: -2:1}"; exec bash -c "${*: -1}"') | {"HOSTS": "node1 node2"}
    words = [
        "--backend",
        "ms",
        "--config",
        "telechat2-7b",
        "--layout",
        "tp8.dp2",
        "--resume",
        "auto",
        "--restarts",
        "3",
    ]
    done = subprocess.run([script, *words], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {line for line in done.stdout.splitlines() if line.startswith("HOST")} == {"HOST:node1", "HOST:node2"}
    check_lines(launch_lines(done.stdout), 2, "node1")
    spaced = [script, *words, "--out", "runs/a  b"]
    done = subprocess.run(spaced, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.count("--out runs/a  b --nnodes 2") == 2, "an argument with spaces stays one"
    failing = stubs(tmp_path, ssh='[[ "$*" == *"--node-rank 1"* ]] && exit 7; sleep 0.2', tele="") | {"HOSTS": "a b"}
    assert subprocess.run([script, *words], env=failing, cwd=tmp_path).returncode == 7
    assert subprocess.run([script], env=stubs(tmp_path), capture_output=True, cwd=tmp_path).returncode != 0


def test_slurm_starts_every_node(tmp_path: Path) -> None:
    script = DEPLOY / "slurm" / "train.sbatch"
    text = script.read_text()
    options = re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", text, re.MULTILINE)
    assert dict(options)["ntasks-per-node"] == "1" and dict(options)["signal"] == "TERM@180", "or two launchers a node"
    assert text.index("#SBATCH") < text.index("set -euo"), "sbatch stops at the first command"
    srun = 'while [[ $1 == --* ]]; do shift; done\nfor node in 0 1; do SLURM_NODEID=$node "$@"; done'
    env = stubs(tmp_path, scontrol="echo node7; sleep 0.1; echo node8", srun=srun)
    env |= {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "70001", "SLURM_NNODES": "2"}
    words = ["--backend", "pt", "--config", "telechat2-7b", "--layout", "tp8.dp2", "--out", "runs/first"]
    done = subprocess.run([script, *words], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check_lines(launch_lines(done.stdout), 2, "node7")


@pytest.mark.parametrize(
    ("name", "device"), [("ascend-volcano", "huawei.com/Ascend910"), ("gpu-volcano", "nvidia.com/gpu")]
)
def test_volcano_starts_all_pods_or_none(name: str, device: str, tmp_path: Path) -> None:
    job = yaml.safe_load((DEPLOY / "kubernetes" / f"{name}.yaml").read_text())
    validator = Draft202012Validator(JOB)
    assert [error.message for error in validator.iter_errors(job)] == []
    spec = job["spec"]
    (task,) = spec["tasks"]
    assert spec["minAvailable"] == task["replicas"] == 2 and {"svc", "env"} <= spec["plugins"].keys()
    pod = task["template"]["spec"]
    (container,) = pod["containers"]
    resources = container["resources"]
    assert resources["requests"][device] == resources["limits"][device] == 8, "devices cannot be overcommitted"
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    image, _, tag = container["image"].partition(":")
    assert image == "telechat-twins" and (DEPLOY / "docker" / f"{tag}.Dockerfile").is_file()
    lines = []
    text = container["args"][0].replace("source /usr/local/Ascend/ascend-toolkit/set_env.sh\n", "")
    for index in range(2):
        env = stubs(tmp_path) | {"VC_TASK_INDEX": str(index), "VC_WORKER_HOSTS": "job-worker-0.job,job-worker-1.job"}
        done = subprocess.run([*container["command"], text], env=env, capture_output=True, text=True, check=True)
        lines += launch_lines(done.stdout)
    check_lines(lines, 2, "job-worker-0.job")
    (error,) = validator.iter_errors({**job, "spec": {**spec, "minavailable": 2}})
    assert "'minavailable' was unexpected" in error.message


@pytest.mark.parametrize("path", sorted((DEPLOY / "docker").glob("*.Dockerfile")), ids=lambda path: path.stem)
def test_a_dockerfile_installs_what_the_project_offers(path: Path) -> None:
    text = re.sub(r"\\\n\s*", " ", path.read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    words = [line.split(None, 1)[0] for line in lines]
    assert set(words) <= {"ARG", "FROM", "RUN", "WORKDIR", "COPY", "ENV", "ENTRYPOINT", "CMD"}, words
    assert [word for word in words if word != "ARG"][0] == "FROM" and words.count("FROM") == 1
    assert "3.11" in text.partition("\n\n")[0] + lines[0], "the version of Python that MindSpore's and our wheels name"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (named,) = re.findall(r"'\.\[([\w,]+)\]'", text)
    assert set(named.split(",")) <= extras.keys()
    assert "-c requirements.lock" in text and (ROOT / "requirements.lock").is_file()
    tag = re.search(rf"-f deploy/docker/{path.name} -t telechat-twins:(\w+) \.", path.read_text())
    assert tag is not None and tag[1] == path.name.partition(".")[0]
    if path.stem.startswith("ascend"):
        assert "NOT RUN" in path.read_text()


def test_ci_services_run_the_one_script() -> None:
    github: dict[Any, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert {True, "jobs"} <= github.keys()  # YAML 1.1 reads the key "on" as a truth value
    (job,) = github["jobs"].values()
    assert job["steps"][-1] == {"run": ".ci/run"} and "uses" in job["steps"][0]
    assert any(step.get("with", {}).get("python-version") == "3.11" for step in job["steps"])
    gitlab = yaml.safe_load((ROOT / ".gitlab-ci.yml").read_text())
    assert gitlab["test"]["script"] == [".ci/run"] and gitlab["test"]["stage"] in gitlab["stages"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
