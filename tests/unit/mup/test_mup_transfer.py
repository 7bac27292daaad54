"""muP's rules: the published tables from their narrow models, the run that comes out, warnings and mistakes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from telechat_twins.core import cli
from telechat_twins.core.commands.mup.transfer import number, table
from telechat_twins.core.config import load_run_config
from telechat_twins.core.errors import UserError
from telechat_twins.core.model.config import CONFIGS, load_model_config
from telechat_twins.core.model.init import init_tensor
from telechat_twins.core.mup import transfer as rules
from telechat_twins.core.mup.transfer import at_width, transfer, warnings

TELEFLM, FLM = CONFIGS / "train" / "teleflm-mup.yaml", CONFIGS / "train" / "flm-mup.yaml"

# Published for the 52B (width 8192); the narrow model's by muP, base width 256 as its released quotients say.
# The digits are those of the report and of the card.
PUBLISHED = {
    "learning rate": ("1.5e-4", "1.5e-4", "1.5e-4"),
    "matrix learning rate": ("2.4e-3", "4.8e-3", "1.5e-4"),
    "minimum learning rate": ("1.5e-5", "1.5e-5", "1.5e-5"),
    "standard deviation": ("4e-3", "4e-3", "4e-3"),
    "matrix standard deviation": ("0.01697", "0.024", "4.242e-3"),
    "input multiplier": ("1", "1", "1"),
    "logit multiplier": ("0.5", "1", "0.03125"),
    "weight decay": ("0", "0", "0"),
}


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, tuple[str, ...]]:
    """The numbers of `tele mup transfer`, by what they are."""
    assert cli.main(["mup", "transfer", *words]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if " optim." in line or " model." in line]
    found = {}
    for row in rows:
        option = next(i for i, word in enumerate(row) if word.startswith(("optim.", "model.")))
        rule = 2 if row[option + 1] in ("/", "x") else 1 if row[option + 1] == "same" else 0
        found[" ".join(row[:option])] = tuple(row[option + 1 + rule :])
    return found


def test_the_table_of_teleflm(capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, "--config", str(TELEFLM), "--width", "256", "8192")
    assert {what: found[what] for what in PUBLISHED} == PUBLISHED
    assert (found["heads"], found["layers"]) == (("4", "2", "64"), ("64", "64", "64"))


def test_the_52b_preset_and_recipe_come_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run that is written is the shipped one in every number that muP speaks of."""
    out = tmp_path / "deep" / "wide.yaml"
    assert cli.main(["mup", "transfer", "--config", str(TELEFLM), "--target", "teleflm-52b", "--out", str(out)]) == 0
    made, shipped = load_run_config(out), load_run_config(CONFIGS / "train" / "teleflm-52b.yaml")
    assert made.model == shipped.model
    for name in ("lr", "matrix_lr", "min_lr", "weight_decay", "warmup_steps", "clip_grad"):
        assert getattr(made.optim, name) == getattr(shipped.optim, name), name
    assert Path(made.data.sources[0].path).resolve() == Path(shipped.data.sources[0].path).resolve()
    assert "vocab_size 81920 -> 80384" in capsys.readouterr().out
    out.write_text("adapted: by hand")
    again = ["mup", "transfer", "--config", str(TELEFLM), "--width", "256", "--out", str(out)]
    assert cli.main(again) == 2 and out.read_text() == "adapted: by hand"
    assert f"{out}: exists already; choose another --out, or replace it with --force" in capsys.readouterr().err
    assert cli.main([*again, "--force"]) == 0 and load_run_config(out).model.hidden_size == 256


def test_flm_from_its_narrow_model(capsys: pytest.CaptureFixture[str]) -> None:
    """Published: lr 4e-4, standard deviation 1.6e-2, temperature 2.0 at width 256; the released multiplier is 0.05."""
    found = printed(capsys, "--config", str(FLM), "--width", "10240")
    assert found["learning rate"] == ("4e-4", "4e-4") and found["matrix learning rate"] == ("4e-4", "1e-5")
    assert found["standard deviation"] == ("0.016", "0.016") and found["logit multiplier"] == ("2", "0.05")
    assert found["matrix weight decay"] == ("0.1", "4")
    narrow = load_run_config(FLM)
    for width, name in ((10240, "flm-101b"), (7168, "flm-51b"), (4096, "flm-16b")):
        model, _ = transfer(narrow.model, narrow.optim, at_width(narrow.model, width))
        preset = load_model_config(name)
        assert model.logit_mult == pytest.approx(preset.logit_mult, rel=1e-11)  # transferred numbers have 12 digits
        assert model.matrix_init_std == pytest.approx(preset.matrix_init_std, rel=1e-4)  # the preset's has five
        shape = ("hidden_size", "ffn_hidden_size", "num_heads", "num_kv_heads", "num_layers", "head_dim")
        assert all(getattr(model, one) == getattr(preset, one) for one in shape), name


FAULTS = {
    "matrix rate not scaled": ("optim.matrix_lr", 0.0),
    "standard deviation / r": ("model.matrix_init_std", -1.0),
    "logit multiplier not scaled": ("model.logit_mult", 0.0),
    "deviation of vectors scaled": ("model.init_std", -0.5),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_rule_is_seen_in_the_table(
    fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    option, power = FAULTS[fault]
    planted = tuple(replace(rule, power=power) if rule.option == option else rule for rule in rules.RULES)
    monkeypatch.setattr(rules, "RULES", planted)
    found = printed(capsys, "--config", str(TELEFLM), "--width", "256", "8192")
    wrong = [what for what in PUBLISHED if found[what] != PUBLISHED[what]]
    assert wrong == [next(rule.what for rule in planted if rule.option == option)]


def test_there_and_back_and_nowhere() -> None:
    run = load_run_config(TELEFLM)
    wide, rates = transfer(run.model, run.optim, at_width(run.model, 8192, 21824))
    narrow, back = transfer(wide, rates, run.model)
    assert narrow.matrix_init_std == pytest.approx(run.model.matrix_init_std, rel=1e-11)
    assert narrow.logit_mult == run.model.logit_mult and back.matrix_lr == pytest.approx(run.optim.matrix_lr, rel=1e-11)
    assert transfer(run.model, run.optim, run.model) == (run.model, run.optim)
    tiny = load_run_config(CONFIGS / "train" / "telechat2-tiny.yaml")
    same = transfer(tiny.model, tiny.optim, tiny.model)
    assert same == (tiny.model, tiny.optim), "no class is told apart that was not: the same run bit for bit"


def test_without_numbers_of_their_own_matrices_start_from_the_vectors() -> None:
    tiny = load_run_config(CONFIGS / "train" / "telechat2-tiny.yaml")
    model, optim = transfer(tiny.model, tiny.optim, at_width(tiny.model, 4 * tiny.model.hidden_size))
    assert optim.matrix_lr == tiny.optim.lr / 4 and optim.matrix_weight_decay == 4 * tiny.optim.weight_decay
    assert optim.matrix_lr * optim.matrix_weight_decay == pytest.approx(tiny.optim.lr * tiny.optim.weight_decay)
    assert model.matrix_init_std == tiny.model.init_std / 2
    assert model.num_heads // model.num_kv_heads == tiny.model.num_heads // tiny.model.num_kv_heads
    assert init_tensor("layers.0.ffn.up.weight", model, 1).std() == pytest.approx(model.matrix_init_std, rel=0.02)


def test_what_is_not_a_matter_of_width_is_warned_of() -> None:
    narrow = load_model_config("teleflm-mup")
    assert warnings(narrow, at_width(narrow, 8192)) == []
    targets = {
        "depth 64 -> 32: muP has no rule for depth": replace(narrow, num_layers=32),
        "head size 128 -> 64": replace(narrow, num_heads=8, num_kv_heads=8, head_dim=64),
        "query heads per kv head 1 -> 2": replace(narrow, num_kv_heads=2),
        "the ffn grows 1.016 times": replace(narrow, ffn_hidden_size=1365),
        "rope_theta 10000.0 -> 1000000.0, tied_embeddings False -> True: not": replace(
            narrow, tied_embeddings=True, rope_theta=1e6
        ),
    }
    for says, target in targets.items():
        (line,) = warnings(narrow, target)
        assert line.startswith(says)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--width", "8200"], "--width 8200: must be a multiple of 128 (head size 128); nearest: 8192"),
        (["--width", "0"], "--width 0: must be a multiple of 128"),
        (["--width", "512", "1024", "--out", "x.yaml"], "--out: a run has one width, found 2"),
        (["--width", "512", "--force"], "--force: replaces the file of --out, which is not given"),
        (["--width", "512", "1024", "--ffn", "8"], "--ffn: is the width of one target's ffn, found 2 widths"),
        (["--width", "512", "--ffn", "0"], "--ffn: must be at least 1"),
        (["--target", "teleflm-52b", "--ffn", "8"], "--ffn: cannot be combined with --target"),
        (["--target", "teleflm-53b"], "--target: no model preset 'teleflm-53b'; did you mean"),
        (["--width", "512", "--set", "optim.lr=-1"], "optim.lr: must be above 0"),
        ([], "one of the arguments --width --target is required"),
    ],
)
def test_mistakes_are_one_line(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["mup", "transfer", "--config", str(TELEFLM), *words]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_shapes_that_cannot_be() -> None:
    shared = load_model_config("telechat2-tiny")  # two query heads share a kv head
    with pytest.raises(UserError, match=r"multiple of 64 \(head size 32 x 2 heads that share keys\); nearest: 128"):
        at_width(shared, 96)
    odd = replace(load_model_config("teleflm-tiny"), ffn_hidden_size=333)
    with pytest.raises(UserError, match="must have a whole width; give one by --ffn, or take a multiple of 128"):
        at_width(odd, 192)
    assert at_width(odd, 192, 500).ffn_hidden_size == 500


def test_numbers_are_written_as_papers_write_them() -> None:
    shown = {1.5e-4: "1.5e-4", 0.016968: "0.01697", 0.004242: "4.242e-3", 0.03125: "0.03125", 16.0: "16", 0.0: "0"}
    assert {value: number(value) for value in shown} == shown
    run = load_run_config(TELEFLM)
    assert "/ sqrt(r)" in table("x", (run.model, run.optim), [(run.model, run.optim)])
