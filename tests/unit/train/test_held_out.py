"""Loss on held-out text while training, with the numpy trainer: its definition, its rows, and what follows from it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from telechat_twins.core.checkpoint.read import open_checkpoint
from telechat_twins.core.config import run_config_from_dict
from telechat_twins.core.errors import UserError
from telechat_twins.core.model.batch import IGNORE, Batch
from telechat_twins.core.train import loop, records
from telechat_twins.core.train.heldout import evaluate, sources
from telechat_twins.core.train.heldout.evaluate import HeldOut, figures
from telechat_twins.core.train.heldout.sources import byte_lengths, open_held_out
from telechat_twins.core.train.metrics import MEASURED, plot_losses, read_metrics
from tests.support.data_support import VOCAB_SIZE, tiny_tokenizer
from tests.support.numpy_stepper import SEQ_LEN, VOCAB, Cluster, MemoryBlend, NumpyStepper, run_config
from tests.support.packed import write_packed, write_pairs

LENGTHS = np.arange(VOCAB) % 5
TWO = [{"path": "made/web"}, {"path": "made/code", "name": "c"}]


class Held(MemoryBlend):
    """A source of ten rows."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.num_rows = 10


@pytest.fixture(autouse=True)
def in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "open_blend", lambda data, seed, vocab_size, pad_token_id: MemoryBlend(seed))
    monkeypatch.setattr(records, "plot_losses", lambda runs, path, title, marks: path)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sources in memory, whose texts differ by their path."""
    seeds = {source["path"]: 100 + n for n, source in enumerate(TWO)}
    monkeypatch.setattr(sources, "open_blend", lambda data, *_: Held(seeds[data.sources[0].path]))
    monkeypatch.setattr(sources, "load_tokenizer", lambda *_, **__: None)
    monkeypatch.setattr(sources, "byte_lengths", lambda _: LENGTHS)


def defined(weights: dict[str, np.ndarray], seed: int, rows: int) -> tuple[float, float]:
    """Loss and bits per byte of a source's first rows in float64."""
    batch = Held(seed).batch(0, rows)
    counted = batch.targets != IGNORE
    ids, targets = batch.input_ids[counted], batch.targets[counted]
    logits = (weights["embed.weight"][ids] + weights["norm.weight"]).astype(np.float64)
    losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(ids)), targets]
    return losses.mean(), losses.sum() / LENGTHS[targets].sum() / math.log(2)


def held_rows(out: Path) -> list[dict]:
    return [row for row in read_metrics(out) if "eval/web/loss" in row]


@pytest.mark.parametrize(("batches", "rows"), [(2, 8), (9, 10)])
def test_the_figures_are_those_of_the_definition(held: None, tmp_path: Path, batches: int, rows: int) -> None:
    config = run_config(eval={"sources": TWO, "every": 5, "batches": batches}, checkpoint={"every": 1, "keep_last": 99})
    loop.train(NumpyStepper, config, tmp_path)
    found = held_rows(tmp_path)
    assert [row["step"] for row in found] == [5, 10, 12]
    for row in found:
        checkpoint = open_checkpoint(tmp_path / f"step-{row['step']:08d}")
        weights = {name: checkpoint.read("weights", name) for name in checkpoint.names("weights")}
        for name, seed in (("web", 100), ("c", 101)):
            loss, bits = defined(weights, seed, rows)
            assert row[f"eval/{name}/loss"] == pytest.approx(loss, rel=1e-6)
            assert row[f"eval/{name}/perplexity"] == pytest.approx(math.exp(loss), rel=1e-6)
            assert row[f"eval/{name}/bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    # It is loss on other text: rows of the training data would give another number.
    assert abs(found[-1]["eval/web/loss"] - defined(weights, 7, rows)[0]) > 1e-3


def test_training_is_not_changed_and_a_resumed_run_is_the_same(held: None, tmp_path: Path) -> None:
    section = {"sources": TWO, "every": 4, "keep_best": True, "patience": 50}
    config = run_config(eval=section, checkpoint={"every": 3, "keep_last": 99})
    loop.train(NumpyStepper, run_config(checkpoint={"every": 3, "keep_last": 99}), tmp_path / "without")
    loop.train(NumpyStepper, config, tmp_path / "whole")
    rows = [
        [{k: v for k, v in row.items() if k not in MEASURED} for row in read_metrics(tmp_path / run)]
        for run in ("without", "whole")
    ]
    assert rows[0] == [{k: v for k, v in row.items() if not k.startswith("eval/")} for row in rows[1]]
    loop.train(NumpyStepper, config, tmp_path / "later", resume=str(tmp_path / "whole" / "step-00000006"))
    later = [{k: v for k, v in row.items() if k not in MEASURED} for row in read_metrics(tmp_path / "later")]
    assert later == rows[1][6:]
    ends = [open_checkpoint(tmp_path / run).trainer["held_out"] for run in ("whole", "later")]
    assert ends[0] == ends[1] and ends[0]["step"] == 12


def test_ranks_share_the_rows(held: None, tmp_path: Path) -> None:
    section = {"sources": TWO, "every": 6, "keep_best": True}
    loop.train(NumpyStepper, run_config(eval=section), tmp_path / "one")
    cluster, config = Cluster(2), run_config(eval=section, parallel={"dp": 2}, train__micro_batch=1)
    ends = cluster.run(
        lambda rank: loop.train(lambda given: NumpyStepper(given, None, cluster, rank), config, tmp_path / "two")
    )
    assert [end.step for end in ends] == [12, 12] and (tmp_path / "two" / "best").is_file()
    for one, two in zip(held_rows(tmp_path / "one"), held_rows(tmp_path / "two"), strict=True):
        for key in (key for key in one if key.startswith("eval/")):
            assert two[key] == pytest.approx(one[key], rel=1e-6)


def test_the_best_checkpoint_stays_and_patience_ends_the_run(held, tmp_path, monkeypatch, capsys) -> None:
    losses = iter([3.0, 2.0, math.nan, 2.5, 2.0, 9.0, 1.0])

    def made(given, *_):
        return figures("web", next(losses), 10, 20) | figures("c", 1.0, 1, 0)

    monkeypatch.setattr(evaluate, "held_out_metrics", made)
    section = {"sources": TWO, "every": 2, "keep_best": True, "patience": 3, "metric": "web/loss"}
    config = run_config(train__steps=40, eval=section, checkpoint={"every": 1, "keep_last": 1})
    result = loop.train(NumpyStepper, config, tmp_path)
    assert result.step == 10  # 3.0 and 2.0 were better, then three were not
    assert (tmp_path / "best").read_text() == "step-00000004\n"
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000004", "step-00000010"]
    shown = capsys.readouterr().err
    assert "held out after step 4: web loss 2.0000, perplexity 7.389, 1.4427 bits per byte; c loss 1.0000" in shown
    assert "3 evaluations without a better one than that after step 4; finished 10 steps" in shown
    assert '"eval/c/bits_per_byte": null' in (tmp_path / "metrics.jsonl").read_text()
    # Resumed, the run has ended.
    assert loop.train(NumpyStepper, config, tmp_path, resume="auto").step == 10


@pytest.mark.parametrize(
    ("change", "step"),
    [
        ({}, 2),  # 1.0 of the first evaluation stays the best
        ({"metric": "c/loss"}, 8),
        ({"batches": 3}, 8),
        ({"sources": TWO[:1]}, 8),
        ({"patience": 9, "every": 4}, 2),  # these judge nothing
    ],
)
def test_a_resumed_run_that_judges_by_another_number_compares_anew(held, tmp_path, monkeypatch, change, step) -> None:
    losses = iter([1.0, 2.0, 2.5, 2.25, 2.75, 3.0, 3.5])

    def made(given, *_):
        return figures("web", loss := next(losses), 10, 20) | figures("c", loss, 1, 0)

    monkeypatch.setattr(evaluate, "held_out_metrics", made)
    section = {"sources": TWO, "every": 2, "keep_best": True}
    first = run_config(train__steps=6, eval=section, checkpoint={"every": 1, "keep_last": 9})
    loop.train(NumpyStepper, first, tmp_path)
    then = run_config(train__steps=12, eval=section | change, checkpoint={"every": 1, "keep_last": 9})
    loop.train(NumpyStepper, then, tmp_path, resume="auto")
    assert open_checkpoint(tmp_path).trainer["held_out"]["step"] == step
    assert (tmp_path / "best").read_text() == f"step-{step:08d}\n"


def test_other_text_in_the_same_folder_is_compared_anew(held, tmp_path, monkeypatch, capsys) -> None:
    losses = iter([1.0, 2.0, 3.0, 2.5, 2.6, 2.7])
    monkeypatch.setattr(evaluate, "held_out_metrics", lambda *_: figures("web", next(losses), 10, 20))
    section = {"sources": TWO[:1], "every": 2, "keep_best": True, "patience": 3}
    first = run_config(train__steps=4, eval=section, checkpoint={"every": 1, "keep_last": 9})
    loop.train(NumpyStepper, first, tmp_path)
    assert "compare anew" not in capsys.readouterr().err
    monkeypatch.setattr(Held, "digest", lambda self: "other text")
    then = run_config(train__steps=12, eval=section, checkpoint={"every": 1, "keep_last": 9})
    loop.train(NumpyStepper, then, tmp_path, resume="auto")
    said = "warning: eval judges by another metric or other text than before: the best so far, 1.0000 of step 2, no"
    assert said in capsys.readouterr().err
    assert open_checkpoint(tmp_path).trainer["held_out"] == {"value": 2.5, "step": 8, "since": 2}
    assert (tmp_path / "best").read_text() == "step-00000008\n"
    checkpoint = open_checkpoint(tmp_path).trainer
    checkpoint.pop("held_out_data")  # as an earlier version wrote it
    again = HeldOut(then, sources.open_held_out(then, MemoryBlend(7)))
    assert again.load(checkpoint) == [] and again.best.value == 2.5


def test_a_metric_that_is_no_number_is_said(held, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(evaluate, "held_out_metrics", lambda *_: figures("web", math.nan, 10, 20))
    section = {"sources": TWO[:1], "every": 2, "keep_best": True, "patience": 3}
    config = run_config(train__steps=12, eval=section, checkpoint={"every": 1, "keep_last": 9})
    assert loop.train(NumpyStepper, config, tmp_path).step == 6
    said = capsys.readouterr().err
    assert "warning: step 2: eval.metric loss is nan, which is never better than another" in said
    assert "3 evaluations, and none with a finite eval.metric; finished 6 steps" in said
    assert not (tmp_path / "best").exists()


def test_best_follows_the_checkpoint_that_a_run_goes_on_from(held, tmp_path, monkeypatch) -> None:
    """A run may be killed after it saved its best checkpoint and before `best` names it, or be put back."""
    losses = iter([3.0, 2.0, 9.0, 8.0, 8.5, 8.6])
    monkeypatch.setattr(evaluate, "held_out_metrics", lambda *_: figures("web", next(losses), 10, 20))
    section = {"sources": TWO[:1], "every": 2, "keep_best": True}
    config = run_config(train__steps=4, eval=section, checkpoint={"every": 1, "keep_last": 9})
    loop.train(NumpyStepper, config, tmp_path)
    (tmp_path / "best").write_text("step-00000002\n")  # as if it were killed between the two
    further = run_config(train__steps=6, eval=section, checkpoint={"every": 1, "keep_last": 2})
    loop.train(NumpyStepper, further, tmp_path, resume="auto")
    assert (tmp_path / "best").read_text() == "step-00000004\n"
    assert sorted(p.name for p in tmp_path.glob("step-*")) == [f"step-{step:08d}" for step in (4, 5, 6)]
    # Put back to step 2, after which nothing is better: its own best counts.
    loop.train(NumpyStepper, config, tmp_path / "other")
    assert (tmp_path / "other" / "best").read_text() == "step-00000002\n"
    (tmp_path / "other" / "best").write_text("step-00000004\n")
    loop.train(NumpyStepper, config, tmp_path / "other", resume=str(tmp_path / "other" / "step-00000003"))
    assert (tmp_path / "other" / "best").read_text() == "step-00000002\n"


def test_the_longest_rows_of_a_legal_config_are_read_again(held, tmp_path, monkeypatch) -> None:
    names = [f"{'long' * 9}-{number:02d}" for number in range(16)]

    def made(*_):
        return {key: value for name in names for key, value in figures(name, 1.2345678901234567e-5, 1, 3).items()}

    monkeypatch.setattr(evaluate, "held_out_metrics", made)
    given = [{"path": "made/web", "name": name} for name in names]
    config = run_config(eval={"sources": given, "every": 6, "metric": f"{names[3]}/loss"})
    loop.train(NumpyStepper, config, tmp_path)
    assert sum(name.startswith("eval/") for name in read_metrics(tmp_path)[5]) == 48


def test_the_file_of_the_best_is_mended_as_a_run_goes_on(held, tmp_path, monkeypatch) -> None:
    """Of a run that was killed behind a checkpoint and before its mark; of one that returns to an earlier step."""
    losses, mark = iter([3.0, 2.0, 2.5, 9.0, 9.0]), HeldOut.mark

    def made(*_):
        return figures("web", loss := next(losses), 10, 20) | figures("c", loss, 1, 0)

    def killed(folder: Path, checkpoint: Path, rank: int) -> None:
        if checkpoint.name == "step-00000004":
            raise KeyboardInterrupt
        mark(folder, checkpoint, rank)

    monkeypatch.setattr(evaluate, "held_out_metrics", made)
    section = {"sources": TWO, "every": 2, "keep_best": True}
    config = run_config(train__steps=6, eval=section, checkpoint={"every": 1, "keep_last": 1})
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(HeldOut, "mark", staticmethod(killed))
        loop.train(NumpyStepper, config, tmp_path)
    assert (tmp_path / "best").read_text() == "step-00000002\n" and (tmp_path / "step-00000004").is_dir()
    loop.train(NumpyStepper, config, tmp_path, resume="auto")
    assert (tmp_path / "best").read_text() == "step-00000004\n"
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000004", "step-00000006"]
    (tmp_path / "best").write_text("step-00000006\n")
    longer = run_config(train__steps=8, eval=section, checkpoint={"every": 1, "keep_last": 9})
    loop.train(NumpyStepper, longer, tmp_path, resume=str(tmp_path / "step-00000004"))
    assert (tmp_path / "best").read_text() == "step-00000004\n"


def test_the_figures_are_drawn_and_go_to_tensorboard(held, tmp_path) -> None:
    loop.train(NumpyStepper, run_config(eval={"sources": TWO, "every": 5}), tmp_path)
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert events.read_bytes().count(b"eval/c/bits_per_byte") == 3
    assert plot_losses({"run": read_metrics(tmp_path)}, tmp_path / "loss.png", "title").stat().st_size > 1000


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"sources": []}, r"eval.sources: must be 1 to 16 folders \(or give tasks or samples\), found 0"),
        ({"sources": [{"path": "a/b c"}]}, r"eval.sources\[0\].name: must be 1 to 40 letters.*found 'b c'"),
        ({"sources": [{"path": "a/x"}, {"path": "b/x"}]}, r"eval.sources\[1\].name: .* unlike the others' names"),
        (
            {"sources": TWO, "metric": "code/loss"},
            "one of loss, web/loss, .*c/bits_per_byte; found 'code/loss'",
        ),
        ({"sources": TWO, "patience": 2}, "eval.every: must be set"),
    ],
)
def test_sections_that_make_no_sense_are_refused(section: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_config(eval=section)


def test_sources_on_disk(tmp_path: Path) -> None:
    """The bytes of text of the targets, and what is refused before anything is built."""
    tokenizer = tiny_tokenizer()
    folders = {name: write_packed(tmp_path / name, VOCAB_SIZE, SEQ_LEN, 5, 3, tokenizer) for name in ("train", "held")}
    write_packed(tmp_path / "foreign", VOCAB_SIZE, SEQ_LEN, 5)
    write_pairs(tmp_path / "pairs", VOCAB_SIZE, SEQ_LEN, 4)

    def config(path: object):
        tree = run_config().to_dict() | {"eval": {"sources": [{"path": str(path)}]}}
        tree["model"]["vocab_size"] = VOCAB_SIZE
        return run_config_from_dict(tree)

    trained = sources.open_blend(run_config(data__sources=[{"path": str(folders["train"])}]).data, 0, VOCAB_SIZE, 3)
    (source,) = open_held_out(config(folders["held"]), trained)
    batch = source.batch(3, 4)
    assert source.rows == 5 and (batch.targets[2:] == IGNORE).all() and (batch.targets[:2] != IGNORE).any()
    ids = tokenizer.encode("中国电信 word1\n")
    target = np.asarray([[*ids, tokenizer.eos_token_id, IGNORE]], np.int32)
    assert source.num_bytes(Batch(target, target, target)) == len(" 中国电信 word1\n".encode())
    assert byte_lengths(tokenizer)[list(tokenizer.control.values())].sum() == 0
    for name, message in (
        ("none", r"eval.sources\[0\]|no such"),
        ("foreign", "by another tokenizer than the data"),
        ("pairs", "holds preference pairs"),
    ):
        with pytest.raises(UserError, match=message):
            open_held_out(config(tmp_path / name), trained)
    assert HeldOut(run_config(), []).trainer_entries == {} and not HeldOut(run_config(), []).exhausted
    assert json.dumps(run_config().to_dict())
