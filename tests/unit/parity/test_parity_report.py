"""The comparison that judges the two backends: it must see each kind of difference, and say so first."""

import dataclasses
import json
import math

import numpy as np
import pytest

from telechat_twins.core.config import OptimConfig
from telechat_twins.core.model.batch import Batch
from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.model.init import init_weights
from telechat_twins.core.parallel.layout import parse_layout
from telechat_twins.core.parity.bounds import (
    UNIT_ROUNDOFF,
    Bound,
    compare_low_precision_traces,
    compare_tensors,
    compare_traces,
    global_norm,
    judge_batch,
    relative_frobenius,
    tolerances,
)
from telechat_twins.core.parity.layouts import References, expected_of, judge_layout, smooth_optim
from telechat_twins.core.parity.report import ParityReport, to_json, to_markdown, write_report
from telechat_twins.core.parity.worker import Outcome, Task, write_batch

RNG = np.random.default_rng(5)


def a_run(noise=0.0, seed=0):
    """A result of forward-and-backward whose rounding errors are about ``noise``, relative."""
    random = np.random.default_rng([99, seed])
    base = np.random.default_rng(1)

    def rounded(x):
        return x * (1 + noise * random.standard_normal(x.shape))

    grads = {f"layers.{i}.attn.{n}.weight": rounded(base.standard_normal((6, 5))) for i in range(2) for n in "qkvo"}
    return {"logits": rounded(base.standard_normal((2, 3, 7))), "loss": float(rounded(np.array(5.0))), "grads": grads}


def judged(ms, pt=None, precision="fp32"):
    return judge_batch({"ms": ms, "pt": pt or a_run(3e-7, seed=2)}, a_run(), precision, 4)


def broken(report):
    return [bound.what for bound in report.bounds() if not bound.holds]


def test_relative_frobenius():
    a = RNG.standard_normal((4, 5)).astype(np.float32)
    assert relative_frobenius(a, a) == 0
    assert relative_frobenius(1.01 * a.astype(np.float64), a) == pytest.approx(0.01, rel=1e-6)
    assert relative_frobenius(np.zeros(3), np.zeros(3)) == 0
    assert relative_frobenius(np.ones(3), np.zeros(3)) == math.inf
    assert math.isnan(relative_frobenius(np.array([math.nan]), np.ones(1)))
    with pytest.raises(ValueError, match="shapes"):
        relative_frobenius(np.ones((2, 3)), np.ones((3, 2)))


def test_compare_tensors_orders_names_and_shapes():
    expected = {"a": np.ones(3), "b": np.ones(3), "c": np.ones(2), "d": np.ones(1)}
    actual = {"a": np.ones(3), "b": np.array([1, 1, 1.5]), "c": np.ones(3), "e": np.ones(1)}
    compared = compare_tensors(actual, expected)
    assert [r.name for r in compared.rows] == ["c", "b", "a"]
    assert compared.rows[1].max_abs == 0.5
    assert (compared.missing, compared.unexpected) == (["d"], ["e"])
    assert not compared.same_names and compared.worst() == math.inf
    assert compare_tensors({"a": np.ones(3)}, {"a": np.ones(3)}).worst() == 0
    assert compare_tensors({}, {}).worst() == math.inf  # nothing compared is not "equal"


def test_a_nan_is_worst_and_breaks_a_bound():
    compared = compare_tensors({"a": np.array([math.nan]), "b": np.ones(1)}, {"a": np.ones(1), "b": np.full(1, 1e-9)})
    assert compared.rows[0].name == "a"
    assert not Bound("x", math.nan, 1.0, "").holds
    run = a_run(3e-7)
    run["grads"]["layers.1.attn.k.weight"][0, 0] = math.nan
    report = judged(run)
    assert report.gradients[0].name == "layers.1.attn.k.weight"
    assert any("layers.1.attn.k.weight" in what for what in broken(report))


def test_two_rounded_runs_are_equal():
    assert broken(judged(a_run(3e-7))) == []


@pytest.mark.parametrize("name", ["logits", "loss", "one gradient", "gradient norm"])
def test_each_difference_is_seen(name):
    run = a_run(3e-7)
    if name == "logits":
        run["logits"] = run["logits"] * (1 + 2e-5)
    elif name == "loss":
        run["loss"] *= 1 + 2e-5
    elif name == "one gradient":
        run["grads"]["layers.0.attn.v.weight"][2, 2] += 1e-3
    else:
        run["grads"] = {n: g * (1 + 2e-5) for n, g in run["grads"].items()}
    report = judged(run)
    expected = "layers.0.attn.v.weight" if name == "one gradient" else name
    assert any(expected in what for what in broken(report)), broken(report)


def test_one_side_much_worse_than_the_other_is_seen_below_the_ceiling():
    """An error of 1e-6 is fine beside 5e-7, and not beside a backend whose rounding costs 3e-8."""
    ceiling = tolerances("fp32", 4)["logits"].ceiling
    run = a_run(3e-7)
    run["logits"] = a_run()["logits"] * (1 + 1e-6)
    assert ceiling > 1e-6
    assert "logits, ms against float64" in broken(judged(run, a_run(3e-8, seed=2)))
    assert broken(judged(run, a_run(6e-7, seed=2))) == []


def test_in_float64_one_of_the_two_is_the_judge():
    """Its own distance of zero takes nothing from the other, and there are no floors of float32."""
    assert broken(judged(a_run(1e-15), a_run(), "fp64")) == []
    assert len(broken(judged(a_run(1e-12), a_run(), "fp64"))) > 3


def test_both_wrong_alike_is_seen_by_the_ceiling():
    """A fault that both share leaves their ratio at one; the float64 run tells."""
    run = a_run(3e-7)
    run["grads"]["layers.0.attn.q.weight"] *= 1.001
    assert broken(judge_batch({"ms": run, "pt": run}, a_run(), "fp32", 4))


def test_names_that_differ_are_seen():
    run = a_run(3e-7)
    run["grads"]["layers.0.attn.q.bias"] = run["grads"].pop("layers.0.attn.q.weight")
    report = judged(run)
    assert report.names == ["ms lacks layers.0.attn.q.weight", "ms also has layers.0.attn.q.bias"]
    assert "gradient names that differ" in broken(report)


@pytest.mark.parametrize("precision", ["bf16", "amp", "fp16"])
def test_low_precision_is_judged_by_the_ratio(precision):
    u = UNIT_ROUNDOFF[precision]
    assert broken(judged(a_run(3 * u), a_run(3 * u, seed=2), precision)) == []
    assert broken(judged(a_run(30 * u), a_run(3 * u, seed=2), precision)) != []


def test_the_norm_counts_every_tensor_once():
    assert global_norm({"a": np.full(4, 1.0, np.float32), "b": np.full((2, 2), 2.0)}) == pytest.approx(math.sqrt(20))


def rows(steps=60, drift=0.0, **changes):
    """A trace; ``drift``: relative distance of the loss from the plain trace."""
    made = []
    for step in range(1, steps + 1):
        row = {
            "step": step,
            "loss": (5 + 3 / step) * (1 + drift),
            "grad_norm": 1 + 1 / step,
            "lr": 1e-3 / step,
            "tokens": 64 * step,
        }
        made.append(row)
    for key, (step, value) in changes.items():
        made[step - 1][key] = value
    return made


def trace_broken(a, b):
    return [bound.what for bound in compare_traces(a, b).bounds if not bound.holds]


def test_traces():
    assert trace_broken(rows(drift=5e-5), rows()) == []
    assert trace_broken(rows(drift=2e-4), rows()) == ["loss, steps 1 to 50"]
    assert trace_broken(rows(grad_norm=(7, 1.2)), rows()) == ["gradient norm, steps 1 to 50"]
    assert trace_broken(rows(lr=(60, 1e-9)), rows()) == ["learning rate or tokens of any step"]
    assert trace_broken(rows(matrix_lr=(60, 1e-4)), rows()) == ["learning rate or tokens of any step"]
    assert trace_broken(rows(tokens=(60, 1)), rows()) == ["learning rate or tokens of any step"]
    assert trace_broken(rows(59), rows()) == ["steps that only one run has"]
    assert trace_broken([], []) == ["steps that only one run has"]
    assert trace_broken(rows(loss=(3, None)), rows()) == ["loss, steps 1 to 50"]
    assert trace_broken(rows(loss=(3, None)), rows(loss=(3, None))) == []
    for drift, holds in ((1e-13, True), (1e-12, False)):
        bounds = compare_traces(rows(drift=drift), rows(), precision="fp64").bounds
        assert all(bound.holds for bound in bounds) is holds
    report = compare_traces(rows(loss=(55, 9.0)), rows())
    assert all(bound.holds for bound in report.bounds) and max(report.loss) > 0.5  # measured, not judged, after step 50


def test_a_recipe_that_magnifies_rounding_is_judged_by_its_float64_run():
    exact = rows()
    pt = rows(drift=1e-3)
    assert all(bound.holds for bound in compare_traces(rows(drift=2e-3), pt, exact).bounds)
    assert [b.what for b in compare_traces(rows(drift=9e-3), pt, exact).bounds if not b.holds] == [
        "loss, steps 1 to 50"
    ]
    # A float64 run that stays near never loosens the 1e-4.
    assert [b.limit for b in compare_traces(rows(), rows(), exact).bounds] == [0.0, 1e-4, 1e-4]


def test_low_precision_traces_are_judged_by_their_distance_from_fp32():
    near = compare_low_precision_traces(rows(drift=1e-3), rows(drift=-1.5e-3), rows())
    assert all(bound.holds for bound in near.bounds)
    far = compare_low_precision_traces(rows(drift=1e-3), rows(drift=4e-3), rows())
    assert [b.what for b in far.bounds if not b.holds] == ["ratio of distances from fp32"]


def test_the_report_says_the_verdict_first(tmp_path):
    good = ParityReport({"model": "tiny"}, judged(a_run(3e-7)), compare_traces(rows(), rows()))
    text = to_markdown(good, "traces.png")
    assert text.splitlines()[2].startswith("**EQUAL: all 9 bounds hold")
    assert "`layers." in text and "traces.png" in text and "x the other backend's error" in text
    bad = ParityReport({"model": "tiny"}, judged(a_run(3e-3)), compare_traces(rows(drift=1e-2), rows()))
    assert to_markdown(bad).splitlines()[2].startswith("**NOT EQUAL: ")
    assert "**BROKEN**" in to_markdown(bad) and bad.broken
    path = write_report(bad, tmp_path, {"MindSpore": rows(drift=1e-2), "PyTorch": rows()})
    data = json.loads((tmp_path / "report.json").read_text())
    assert path == tmp_path / "report.md" and data["equal"] is False and len(data["trace"]["loss"]) == 60
    assert (tmp_path / "traces.png").read_bytes()[:4] == b"\x89PNG"
    assert "(traces.png)" in path.read_text()


def test_json_has_no_number_that_json_lacks():
    run = a_run(3e-7)
    run["grads"]["layers.0.attn.q.weight"][:] = math.nan
    text = json.dumps(to_json(ParityReport({}, judged(run))), allow_nan=False)
    assert '"nan"' in text and '"equal": false' in text


def test_one_backend_alone_is_judged_by_the_ceiling():
    report = judge_batch({"pt": a_run(3e-7)}, a_run(), "fp32", 4)
    assert broken(report) == [] and report.quantities[0].apart is None
    assert "PyTorch error" in to_markdown(ParityReport({}, report))


# One layer, so that it is quick; rounding as a_run has it.
MODEL = ModelConfig(
    vocab_size=11, hidden_size=16, ffn_hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, norm_eps=1e-5,
    training_seqlen=64, base_seqlen=64, max_seqlen=64,
)  # fmt: skip


@pytest.fixture
def layout_task(tmp_path):
    ids = np.zeros((4, 8), np.int32)
    batch = write_batch(tmp_path / "b.safetensors", Batch(ids, ids, ids))
    return Task(name="pp2.tp2", model=MODEL, layout=parse_layout("pp2.tp2"), batch=batch, steps=2)


def an_outcome(task, noise=0.0, seed=0):
    """What ranks that round with ``noise`` leave of ``task``: gradients, weights after two updates, what they sent."""
    initial = init_weights(MODEL, 0, "strong")
    truth, random = np.random.default_rng(1), np.random.default_rng([7, seed])
    gradients, weights = {}, {}
    for name, weight in initial.items():
        gradients[name] = truth.standard_normal(weight.shape) * (1 + noise * random.standard_normal(weight.shape))
        moved = 1e-3 * truth.standard_normal(weight.shape) * (1 + noise * random.standard_normal(weight.shape))
        weights[name] = weight + moved
    loss, norm = 5.0 * (1 + noise), global_norm(gradients)
    traffic, peaks = expected_of(task)
    return Outcome([loss] * 2, [norm] * 2, None, gradients, weights, traffic, peaks, [0.1] * 4)


def judged_layout(task, run, single=None):
    exact = an_outcome(task)
    task = dataclasses.replace(task, optim=smooth_optim(OptimConfig(lr=1e-3), exact))
    single = single or an_outcome(task, 1e-7, seed=5)
    return judge_layout("pt", task, run, References(single, exact, init_weights(MODEL, 0, "strong")))


def broken_in(report):
    return [bound.what for bound in report.broken]


def test_a_layout_that_only_rounds_otherwise_holds_every_bound(layout_task):
    report = judged_layout(layout_task, an_outcome(layout_task, 3e-7))
    assert broken_in(report) == [] and len(report.bounds) == 12
    assert report.live == [2, 1] and report.sent > 0 and report.notes == []
    assert report.gradients[0].apart < 1e-5 and len(report.gradients) == len(report.weights) == 25


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("loss", "loss against one device"),
        ("norm", "gradient norm against float64"),
        ("gradient", "gradient (layers.1.attn.v.weight) against one device"),
        ("weight", "weight's change (layers.0.ffn.up.weight) against float64"),
        ("nan", "gradient (norm.weight) against one device"),
        ("name", "names, shapes or pieces that differ"),
        ("shape", "names, shapes or pieces that differ"),
        ("pieces", "names, shapes or pieces that differ"),
        ("message", "messages unlike the formula"),
        ("graph", "ranks with more or fewer live graphs"),
    ],
)
def test_each_kind_of_difference_breaks_its_bound(layout_task, what, expected):
    run = an_outcome(layout_task, 3e-7)
    if what in ("loss", "norm"):
        numbers = run.losses if what == "loss" else run.norms
        numbers[0] *= 1 + 3e-6
    elif what == "gradient":
        run.gradients["layers.1.attn.v.weight"] *= 1 + 2e-5
    elif what == "weight":
        run.weights["layers.0.ffn.up.weight"] += 1e-5
    elif what == "nan":
        run.gradients["norm.weight"][3] = math.nan
    elif what == "name":
        run.gradients["layers.0.attn.q.bias"] = run.gradients.pop("layers.0.attn.q.weight")
    elif what == "shape":
        run.weights["norm.weight"] = run.weights["norm.weight"][:8]
    elif what == "pieces":
        run.problems.append("weights: the 2 pieces of 'norm.weight' cover 8 of 16 elements")
    elif what == "message":
        run.traffic[3]["all_reduce", "tp"][1] += 4
    else:
        run.peaks[1] += 1
    report = judged_layout(layout_task, run)
    assert expected in broken_in(report)
    if what in ("loss", "gradient", "weight", "message", "graph"):
        assert len({b.split(" against")[0] for b in broken_in(report)}) == 1, "and no other"
    if what == "message":
        assert "rank 3, all_reduce over tp: " in report.broken[0].source


@pytest.mark.parametrize("precision", ["bf16", "amp", "fp16"])
def test_a_low_precision_layout_is_judged_by_the_ratio_of_errors(layout_task, precision):
    task = dataclasses.replace(layout_task, precision=precision)
    u = UNIT_ROUNDOFF[precision]
    single = an_outcome(task, 3 * u, seed=5)
    assert broken_in(judged_layout(task, an_outcome(task, 3 * u, seed=6), single)) == []
    far = broken_in(judged_layout(task, an_outcome(task, 6 * u, seed=6), single))
    assert {"gradients, all as one", "gradients, median", "updates of weights, median"} <= set(far)
    one = an_outcome(task, 3 * u, seed=6)
    one.gradients["layers.0.attn_norm.weight"] *= 1 + 12 * u
    assert broken_in(judged_layout(task, one, single)) == ["gradients, worst (layers.0.attn_norm.weight)"]


def test_a_layout_of_a_model_that_magnifies_rounding(layout_task):
    """A gradient may be as far off as 12 roundings of the weights move it in float64, no further, and that one only."""
    exact, initial = an_outcome(layout_task), init_weights(MODEL, 0, "strong")
    task = dataclasses.replace(layout_task, optim=smooth_optim(OptimConfig(lr=1e-3), exact))
    name = "layers.1.attn.q.weight"
    nudged = exact.gradients | {name: exact.gradients[name] * (1 + 2e-6)}
    references = References(an_outcome(task, 1e-7, seed=5), exact, initial, nudged)

    def broken_by(changed, factor):
        run = an_outcome(task, 3e-7)
        run.gradients[changed] *= factor
        return broken_in(judge_layout("pt", task, run, references))

    assert broken_by(name, 1 + 1.9e-5) == []
    assert any(name in what for what in broken_by(name, 1 + 2.7e-5))
    assert broken_by("layers.1.attn.k.weight", 1 + 1.9e-5) != []


def test_an_eps_that_makes_the_optimizer_smooth(layout_task):
    exact = an_outcome(layout_task)
    optim = smooth_optim(OptimConfig(lr=1e-3, clip_grad=0.0), exact)
    assert optim.eps == pytest.approx(1.0, rel=0.05)  # of standard normal gradients
    clipped = smooth_optim(OptimConfig(lr=1e-3, clip_grad=0.5), exact)
    assert clipped.eps == pytest.approx(optim.eps * 0.5 / exact.norms[0], rel=1e-5)


def test_layouts_in_the_report(layout_task, tmp_path):
    good = judged_layout(layout_task, an_outcome(layout_task, 3e-7))
    run = an_outcome(layout_task, 3e-7)
    run.losses[0] = math.nan
    run.traffic[0]["all_reduce", "tp"][0] += 1
    bad = dataclasses.replace(judged_layout(layout_task, run), layout="dp4", notes=["messages of what are not counted"])
    report = ParityReport({}, judged(a_run(3e-7)), None, [good, bad])
    assert report.verdict.startswith("NOT EQUAL: 3 of 30 bounds broken: dp4, PyTorch: loss against one device")
    text = to_markdown(report)
    assert "| ok | pp2.tp2 | PyTorch | " in text and "| **BROKEN** | dp4 | PyTorch | " in text
    assert "| **BROKEN** | dp4, PyTorch: messages unlike the formula | 1 | 0 | rank 0, all_reduce over tp" in text
    assert "- dp4, PyTorch: messages of what are not counted" in text
    write_report(report, tmp_path)
    data = json.loads((tmp_path / "report.json").read_text())
    assert [row["layout"] for row in data["layouts"]] == ["pp2.tp2", "dp4"]
    assert len(data["layouts"][0]["gradients"]) == 25 and data["layouts"][1]["errors"]["loss"] == ["nan", "nan"]
