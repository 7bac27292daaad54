"""`tele parity compare`: records that round hold every bound, planted faults break theirs, and the rest is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from safetensors.numpy import save_file

from telechat_twins.core.cli import main
from telechat_twins.core.parity.compare.measures import differences, side
from telechat_twins.core.parity.compare.pages import to_document
from telechat_twins.core.parity.compare.records import Comparison, compare_records
from telechat_twins.core.parity.envelope import Envelope, write_envelope
from telechat_twins.core.parity.record.format import Record
from tests.support.parity_samples import breaks_schema, trace
from tests.support.record_pairs import Fault, altered, record, rounded, step_tensors, write
from tests.support.records import sketched

Q, CORE = "gradient:layers.1.attn.q.weight@1", "activation:layers.2.attn.core@1"
UP = "gradient:layers.3.ffn.up.weight@1"


@dataclasses.dataclass
class Step:
    """One step as A, B and a float64 run computed it, by name: whole tensors, and records in memory and in folders."""

    root: Path
    arrays: dict[str, dict[str, np.ndarray]]
    records: dict[str, Record]

    def folder(self, name: str) -> str:
        return str(self.root / name) if (self.root / name).exists() else write(self.root / name, self.records[name])


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> Step:
    arrays = {"exact": step_tensors()}
    records = {"exact": record(arrays["exact"], precision="fp64")}
    for precision in ("fp32", "bf16"):
        for seed, letter in enumerate("ab", 1):
            name = f"{letter}-{precision}"
            arrays[name] = rounded(arrays["exact"], precision, seed)
            layout, backend = ("tp2.pp2", "ms") if letter == "a" else ("one", "pt")
            records[name] = record(arrays[name], precision=precision, layout=layout, backend=backend)
    return Step(tmp_path_factory.mktemp("records"), arrays, records)


def broken(found: Comparison) -> list[str]:
    return [row.key for row in found.quantities if not row.holds]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_records_that_round_hold_every_bound(step: Step, precision: str) -> None:
    a, b, exact = (step.records[name] for name in (f"a-{precision}", f"b-{precision}", "exact"))
    for reference in (exact, None):
        found = compare_records(a, b, reference)
        assert broken(found) == [] and len(found.quantities) == len(a.quantities) > 300
        assert found.missing == {"a": [], "b": []} and found.shapes == []
    mixed = compare_records(a, step.records["b-bf16" if precision == "fp32" else "b-fp32"], exact)
    assert broken(mixed) == [], "precisions may meet"
    assert broken(compare_records(a, exact)) == [], "a float64 record judges the other"
    assert compare_records(a, exact).reference == "b"


def scaled(factor: float) -> Fault:
    return lambda x: x * factor


def element(x: np.ndarray) -> np.ndarray:
    x[3, 5] *= 1.001
    return x


def not_finite(x: np.ndarray) -> np.ndarray:
    x.reshape(-1)[7] = math.inf
    return x


# Key, fault, and whether it is seen without a reference: only beyond both ceilings, or far above its kind's median.
FAULTS: list[tuple[str, Fault, bool]] = [
    (CORE, scaled(1 + 1e-5), True),
    (CORE, lambda x: x[::-1].copy(), True),  # rows of the batch exchanged: all norms and extremes are the same
    (CORE, not_finite, True),
    ("activation:loss@1", scaled(1 + 2e-6), False),
    ("activation_grad:layers.0.ffn.act@1", scaled(0.5), True),
    (Q, lambda x: x.T.copy(), True),
    (Q, scaled(1 + 1e-6), False),
    (Q, element, True),
    ("gradient:layers.0.attn_norm.weight@1", scaled(1 + 1e-4), True),
    ("moment2:layers.1.attn.q.weight@1", lambda x: np.sqrt(x), True),
    ("weight_before:layers.1.attn.q.weight@1", scaled(1 + 1e-5), True),
    # The learning rate is 1 % too large; weight decay of 0.1 is forgotten: lr * 0.1 * w, w of size 0.02.
    ("weight_after:layers.1.attn.q.weight@1", lambda x: x * 1.0 + 1e-5 * np.sign(x), True),
    ("weight_after:layers.3.ffn.up.weight@1", scaled(1 - 1e-4), True),
]


@pytest.mark.parametrize(("key", "fault", "alone"), FAULTS, ids=[f"{n}-{key}" for n, (key, *_) in enumerate(FAULTS)])
def test_a_planted_fault_breaks_its_bound_and_no_other(step: Step, key: str, fault: Fault, alone: bool) -> None:
    """Also where weights after the step are compared: the fault is in one quantity."""
    a = altered(step.records["a-fp32"], step.arrays["a-fp32"], {key: fault})
    b, exact = step.records["b-fp32"], step.records["exact"]
    touched = {key} | ({key.replace("_before", "_after")} if "_before" in key else set())
    for sides in ((a, b), (b, a)):
        seen = broken(compare_records(*sides, exact))
        assert key in seen and set(seen) <= touched
        assert (key in broken(compare_records(*sides))) is alone


def test_a_fault_that_both_share_needs_the_reference(step: Step) -> None:
    names = ("a-fp32", "b-fp32")
    both = [altered(step.records[name], step.arrays[name], {UP: scaled(1.001)}) for name in names]
    found = compare_records(*both, step.records["exact"])
    sides = {"a": both[0], "b": both[1], "reference": step.records["exact"]}
    assert broken(found) == [UP]
    assert [UP in note for note in to_document(sides, found, None, []).notes] == [True], "a note names what both exceed"
    assert broken(compare_records(*both)) == [], "which the page says"


def test_single_wrong_elements_are_seen(step: Step) -> None:
    """One element of any gradient that is off by 1e-3 of the gradient's root mean square: at least 95 of 100."""
    random, trials = np.random.default_rng(3), 300
    a, b, exact = (step.records[name] for name in ("a-fp32", "b-fp32", "exact"))
    keys = [key for key in a.quantities if key.startswith("gradient:")]
    seen = {"with": 0, "without": 0}
    for _ in range(trials):
        key = keys[random.integers(len(keys))]
        wrong = step.arrays["a-fp32"][key].copy()
        wrong.reshape(-1)[random.integers(wrong.size)] += 1e-3 * np.sqrt(np.mean(wrong**2))
        one = dataclasses.replace(a, quantities={key: dataclasses.replace(sketched(key, wrong), dtype="float32")})
        seen["with"] += broken(compare_records(one, b, exact)) == [key]
        seen["without"] += broken(compare_records(one, b)) == [key]
    assert seen["with"] >= 0.95 * trials and seen["without"] >= 0.95 * trials, seen


def test_sketches_of_two_sizes_meet(step: Step) -> None:
    """A record of more quantities has smaller sketches; buckets that coincide are added up."""
    small = record(step.arrays["b-fp32"], buckets=64)
    a, exact = step.records["a-fp32"], step.records["exact"]
    assert broken(compare_records(a, small, exact)) == []
    keys = list(small.quantities)
    folded, made = side(step.records["b-fp32"], keys, 64), side(small, keys, 64)
    counts = np.array([small.quantities[key].count for key in keys])
    assert differences(folded, made, counts, made.norm).distance.max() < 1e-12


@pytest.mark.parametrize("what", ["weights", "batch"])
def test_records_of_other_weights_or_batches_are_refused(
    step: Step, tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    other = altered(step.records["b-fp32"], {}, digests={what: "ab" * 32})
    write(tmp_path / "other", other)
    for words in (("other", step.folder("a-fp32")), (step.folder("a-fp32"), "other")):
        paths = [str(tmp_path / word) if word == "other" else word for word in words]
        assert main(["parity", "compare", *paths, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert f"digest of {what} must be equal, found " in error and "abababababab" in error
        assert error.count("\n") == 1 and "(--at)" not in error
    steps = dataclasses.replace(other, header=dataclasses.replace(other.header, steps=[1, 2]))
    write(tmp_path / "steps", steps)
    assert main(["parity", "compare", str(tmp_path / "steps"), step.folder("a-fp32"), "--out", str(tmp_path)]) == 2
    assert ("steps 1, 2 and 1 were recorded; record the same steps" in capsys.readouterr().err) == (what == "batch")
    assert not (tmp_path / "out" / "report.json").exists()


# Run folders of other programs: name, key, value.
ODD = [("text", "loss", "low"), ("list", "lr", [1]), ("still", "step", 7), ("huge", "tokens", 1e305)]


def test_other_mistakes_are_one_line_and_exit_code_2(
    step: Step, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, dump = tmp_path / "run", tmp_path / "x.safetensors"
    run.mkdir()
    (run / "metrics.jsonl").write_text("")
    save_file({"weight": np.zeros(2, np.float32)}, dump)
    a, b = step.folder("a-fp32"), step.folder("b-fp32")
    odd = [a_run(tmp_path / name, lambda row, key=key, value=value: row | {key: value}) for name, key, value in ODD]
    save_file({"logits": np.zeros((2, 3)), "loss": np.zeros(2)}, tmp_path / "losses.safetensors")
    losses = str(tmp_path / "losses.safetensors")
    for words, says in (
        ([odd[0], odd[0]], "step 1: loss must be a number or null, found 'low'"),
        ([odd[1], odd[1]], "step 1: lr must be a number or null, found [1]"),
        ([odd[2], odd[2]], "steps must be whole numbers that rise, found 7"),
        ([odd[3], odd[3]], "step 1: tokens must be a number or null, found"),
        ([losses, losses], "loss must be one number, found shape [2]"),
        ([a, str(run)], "must be of the same kind as"),
        ([a, str(tmp_path / "gone")], "no such file"),
        ([str(run), str(run)], "must have at least one step, found none"),
        ([str(dump), str(dump)], "must hold logits"),
        ([a, b, "--reference", b], "must be of higher precision than both records, found fp32"),
        ([a, b, "--junit", str(tmp_path)], "must be a file, found a folder"),
    ):
        assert main(["parity", "compare", *words, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1, error


def test_what_one_record_lacks_is_listed_and_a_missing_weight_is_a_fault(step: Step, tmp_path: Path) -> None:
    for name, key in (("sites", CORE), ("weight", Q)):
        write(tmp_path / name, altered(step.records["a-fp32"], {}, drop=(key,)))
    out = tmp_path / "out"
    words = [step.folder("b-fp32"), "--reference", step.folder("exact"), "--out", str(out)]
    assert main(["parity", "compare", str(tmp_path / "sites"), *words]) == 0
    data = json.loads((out / "report.json").read_text())
    assert data["missing"] == {"a": [CORE], "b": []} and f"A lacks 1 quantities: {CORE}" in data["notes"]
    assert main(["parity", "compare", str(tmp_path / "weight"), *words]) == 1
    data = json.loads((out / "report.json").read_text())
    (bound,) = [bound for bound in data["bounds"] if not bound["holds"]]
    assert bound["key"] == "names-and-shapes/lacking" and Q in bound["source"]


def test_the_command_without_a_framework(step: Step, tmp_path: Path) -> None:
    """A subprocess, as a CI job runs it: verdict, exit code, all formats, and neither framework imported."""
    faults = {CORE: scaled(1.01), UP: scaled(0.5)}
    write(tmp_path / "wrong", altered(step.records["a-fp32"], step.arrays["a-fp32"], faults, trace_noise=1e-3))
    junit = tmp_path / "parity.xml"
    program = (
        "import sys\nfrom telechat_twins.core.cli import main\ncode = main(sys.argv[1:])\n"
        "assert not {'torch', 'mindspore', 'matplotlib'} & set(sys.modules)\nsys.exit(code)"
    )
    words = [str(tmp_path / "wrong"), step.folder("b-fp32"), "--reference", step.folder("exact")]
    command = [sys.executable, "-c", program, "parity", "compare", *words, "--out", str(tmp_path / "out")]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([*command, "--junit", str(junit)], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 1 and done.stderr == "", done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2.0, "processor time in seconds"
    assert done.stdout.startswith("NOT EQUAL: 3 of ")
    assert f"first beyond its bound: {CORE}, in execution order" in done.stdout
    assert f"go on with tele parity locate {words[0]} {words[1]} --reference {words[3]}" in done.stdout
    assert breaks_schema(tmp_path / "out" / "report.json") == []
    data = json.loads((tmp_path / "out" / "report.json").read_text())
    wrong = {bound["key"] for bound in data["bounds"] if not bound["holds"]}
    assert wrong == {
        "activations/layers.2.attn.core.step1",
        "gradients-of-weights/layers.3.ffn.up.weight.step1",
        "trace/trace.loss",
    }
    suites = ElementTree.parse(junit).getroot()
    assert int(suites.attrib["tests"]) == len(data["bounds"]) and int(suites.attrib["failures"]) == 3
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.index("NOT EQUAL") < page.index("<table") and page.count("<svg") >= 4


def a_run(folder: Path, change: Callable[[dict], dict] = lambda row: row, steps: int = 60) -> str:
    folder.mkdir(parents=True)
    rows = [change(row) for row in trace(steps)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_run_folders_and_forward_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")

    def compare(*words: str) -> int:
        code = main(["parity", "compare", *words, "--out", out])
        assert breaks_schema(tmp_path / "out" / "report.json") == []
        return code

    plain = a_run(tmp_path / "plain")
    near = a_run(tmp_path / "near", lambda row: row | {"loss": row["loss"] * (1 + 5e-5)})
    far = a_run(tmp_path / "far", lambda row: row | {"loss": row["loss"] * (1 + 2e-4)})
    other = a_run(tmp_path / "rate", lambda row: row | {"lr": row["lr"] * 1.01})
    skipped = a_run(tmp_path / "null", lambda row: row | dict.fromkeys(("loss", "lr", "grad_norm")))
    assert [compare(plain, run) for run in (plain, near, far, other, skipped)] == [0, 0, 1, 1, 1]
    assert compare(skipped, skipped) == 0
    assert compare(plain, far, "--precision", "bf16") == 0
    assert "measured, not judged" in capsys.readouterr().out
    assert compare(far, near, "--precision", "bf16", "--reference", plain) == 1, "4 times as far from the reference"

    random = np.random.default_rng(0)
    exact = {name: random.standard_normal((4, 6)) for name in ("logits", "grad.h.0.w", "grad.h.1.w")}
    exact["loss"] = np.array(3.0)
    files = {name: str(tmp_path / f"{name}.safetensors") for name in ("exact", "a", "b", "wrong", "less")}
    save_file(exact, files["exact"])
    for name in ("a", "b"):
        noise = {key: np.asarray(x * (1 + 1e-7 * random.standard_normal(x.shape))) for key, x in exact.items()}
        save_file(noise, files[name])
    save_file(noise | {"grad.h.1.w": noise["grad.h.1.w"] * 1.001}, files["wrong"])
    save_file({key: x for key, x in noise.items() if key != "grad.h.0.w"}, files["less"])
    for extra in ([], ["--reference", files["exact"]]):
        assert [compare(files["a"], files[name], *extra) for name in ("b", "wrong", "less")] == [0, 1, 1]


FLAT = np.ones((4, 6), np.float32)
DUMPS = {  # what another program may have written, and what the refusal says
    "whole numbers": ({"logits": FLAT.astype(np.int64)}, "logits must be of F64"),
    "a loss that is a truth": ({"logits": FLAT, "loss": np.array(True)}, "loss must be of F64"),
    "one logit": ({"logits": np.array(1.0)}, "logits must be [..., positions, vocabulary]"),
    "no logit": ({"logits": FLAT[:0]}, "logits must be [..., positions, vocabulary]"),
    "losses": ({"logits": FLAT, "loss": FLAT}, "loss must be one number"),
    "a name of two lines": ({"logits": FLAT, "grad.a\nb": FLAT}, "a tensor's name"),
    "a name that clears the screen": ({"logits": FLAT, "grad.\x1b[2J": FLAT}, "a tensor's name"),
}


@pytest.mark.parametrize("name", DUMPS)
def test_forward_results_of_other_programs_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    tensors, message = DUMPS[name]
    path = str(tmp_path / "dump.safetensors")
    save_file(tensors, path)
    assert main(["parity", "compare", path, path, "--precision", "fp32", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and said.strip().isprintable()


@pytest.mark.parametrize("step", ['"1"', "1.5", "-1", "0", "true"])
def test_steps_of_a_run_are_positive_whole_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], step: str
) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": {step}, "loss": 1.0}}\n')
    assert main(["parity", "compare", str(tmp_path), str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert str(tmp_path) in said and said.count("\n") == 1


def test_long_traces_are_judged_by_an_envelope(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Step by step: a fixed limit judges 50 steps only, and fails runs of a recipe that magnifies rounding."""
    rows = trace(200)
    band = [1e-6 * math.exp(step / 20) for step in range(1, 201)]
    envelope = Envelope(
        precision="fp32",
        backend="pt",
        runs=4,
        seed=0,
        noise=1e-7,
        config="",
        steps=[row["step"] for row in rows],
        centre={key: [row[key] for row in rows] for key in ("loss", "grad_norm")},
        limits={"loss": band, "grad_norm": band},
    )
    write_envelope(envelope, tmp_path / "e.json")

    def drifting(share: float, only: int | None = None) -> Callable[[dict], dict]:
        def change(row: dict) -> dict:
            there = only is None or row["step"] == only
            return row | {"loss": row["loss"] * (1 + there * share * band[row["step"] - 1])}

        return change

    runs = {
        "plain": a_run(tmp_path / "plain", steps=200),
        "equal": a_run(tmp_path / "equal", drifting(0.9), 200),
        "late": a_run(tmp_path / "late", drifting(1.5, only=190), 200),
        "short": a_run(tmp_path / "short", steps=190),
    }
    words = ["--envelope", str(tmp_path / "e.json"), "--out", str(tmp_path / "out")]
    codes = {name: main(["parity", "compare", run, runs["plain"], *words]) for name, run in runs.items()}
    assert codes == {"plain": 0, "equal": 0, "late": 1, "short": 1}
    data = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [bound["key"] for bound in data["bounds"] if not bound["holds"]] == ["trace/envelope.steps"]
    assert breaks_schema(tmp_path / "out" / "report.json") == []
    fixed = [main(["parity", "compare", runs[name], runs["plain"], *words[2:]]) for name in ("late", "equal")]
    assert fixed == [0, 0], "without it nothing after step 50 is judged"
    capsys.readouterr()
    assert main(["parity", "compare", runs["plain"], runs["late"], *words, "--precision", "bf16"]) == 2
    assert "must be of the precision that is compared, bf16, found fp32" in capsys.readouterr().err
