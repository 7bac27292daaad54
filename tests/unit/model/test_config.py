"""Configuration: presets match the published models; every mistake is named with its way out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from telechat_twins.core.config import RunConfig, load_run_config, run_config_from_dict
from telechat_twins.core.errors import UserError
from telechat_twins.core.model.config import load_model_config, preset_names
from telechat_twins.core.model.params import count_parameters, parameter_table
from telechat_twins.core.near import RUN_KEYS
from telechat_twins.core.schema import load_yaml, parse_yaml, set_all, set_dotted, without
from telechat_twins.core.sections.misnamed import section_keys
from telechat_twins.core.types import JsonObject

# Published parameter counts; the 115B's equals the total_size of its released index (float32) divided by 4.
PUBLISHED = {
    "telechat2-3b": 3_070_528_512,
    "telechat2-7b": 7_617_351_680,
    "telechat2-35b": 35_435_059_200,
    "telechat2-115b": 113_282_916_352,
    # Counted from the released shapes; the 52Bs' files have these sizes.
    "telechat-52b": 52_832_509_952,
    "teleflm-52b": 52_824_121_344,
    "teleflm-mup": 283_181_568,
    "teleflm-1t": 1_083_813_908_480,
    "flm-101b": 101_701_570_560,
    # Unpublished shapes: this is what our reconstruction has.
    "flm-51b": 50_051_807_232,
    "flm-16b": 16_521_437_184,
    "flm-mup": 88_871_424,
}
# As the papers and model names give it, in millions, and how closely that can be taken.
NAMED = {
    "telechat-52b": (52_000, 0.02),
    "teleflm-52b": (52_850, 0.001),
    "teleflm-mup": (283, 0.001),
    "teleflm-1t": (1_000_000, 0.1),
    "flm-101b": (101_000, 0.01),
    "flm-51b": (51_000, 0.02),
    "flm-16b": (16_000, 0.04),
}

RUN: JsonObject = {
    "model": "telechat2-tiny",
    "data": {"sources": [{"path": "packed"}], "seq_len": 64},
    "train": {"steps": 10, "global_batch": 4, "micro_batch": 2},
    "optim": {"lr": 1e-3},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_has_the_published_parameter_count(name: str) -> None:
    assert count_parameters(load_model_config(name)) == PUBLISHED[name]


@pytest.mark.parametrize("name", NAMED)
def test_preset_is_as_large_as_its_name(name: str) -> None:
    millions, within = NAMED[name]
    assert abs(count_parameters(load_model_config(name)) / (millions * 1e6) - 1) <= within


def test_multipliers_of_the_presets_are_the_released_quotients() -> None:
    """output_mult and mup_scale_factor of the released configs: width / 256, for the 52B Tele-FLM width / 512."""
    released = {
        "telechat-52b": (1.0, 8192 / 256),
        "teleflm-52b": (0.5, 8192 / 512),
        "teleflm-1t": (2.0, 20480 / 256),
        "flm-101b": (2.0, 10240 / 256),
        "flm-51b": (2.0, 7168 / 256),
        "flm-16b": (2.0, 4096 / 256),
        "flm-mup": (2.0, 256 / 256),
    }
    for name, (output, scale) in released.items():
        assert load_model_config(name).logit_mult == output / scale, name


def test_every_preset_loads() -> None:
    assert {"telechat2-tiny", "telechat2-mini", *PUBLISHED} <= set(preset_names())
    for name in preset_names():
        assert len(parameter_table(load_model_config(name))) > 0


def test_run_config_fills_in_defaults() -> None:
    config = run_config_from_dict(RUN)
    assert config.model.hidden_size == 128
    assert config.data.sources[0].weight == 1.0
    assert config.health.spike_policy == "warn"
    assert run_config_from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"modle": "x"}, "unknown key 'modle'; did you mean 'model'"),
        ({"model": "telechat2-tinny"}, "did you mean 'telechat2-tiny'"),
        ({"model": {"preset": "telechat2-tiny", "num_heads": 5}}, "num_heads: 5 does not divide hidden_size 128"),
        ({"model": {"preset": "telechat2-tiny", "num_kv_heads": 3}}, "num_kv_heads: 3 does not divide num_heads 4"),
        ({"model": {"preset": "telechat2-tiny", "hidden_size": 100, "num_heads": 4}}, "head size 25"),
        ({"model": {"preset": "telechat2-tiny", "norm_eps": "1e-5x"}}, "norm_eps: expected a number, found str"),
        ({"model": {"preset": "telechat2-tiny", "vocab_size": 2}}, "eos_token_id: 2 is outside the vocabulary of 2"),
        ({"model": {"preset": "telechat2-tiny", "table_dtype": "float61"}}, "did you mean 'float16'"),
        (
            {"model": {"preset": "teleflm-tiny", "position": "xpoz"}},
            "position: 'xpoz' is not one of ntk, ntk-theta, rope, xpos",
        ),
        ({"model": {"preset": "teleflm-tiny", "logit_mult": 0}}, "logit_mult: must be above 0"),
        ({"model": {"preset": "teleflm-tiny", "family": "teleflms"}}, "did you mean 'teleflm'"),
        ({"model": {"preset": "telechat2-tiny", "num_layers": True}}, "num_layers: expected a whole number"),
        ({"data": {"sources": [{"path": "p"}], "seq_len": 257}}, "seq_len: 257 is above the model's max_seqlen 256"),
        ({"data": {"sources": [{"path": "p", "weight": 0}], "seq_len": 64}}, "weight: must be above 0"),
        ({"data": {"sources": "p", "seq_len": 64}}, "sources: expected a list"),
        ({"train": {"steps": 0, "global_batch": 4, "micro_batch": 2}}, "steps: must be at least 1"),
        ({"train": {"steps": 5, "global_batch": 4, "micro_batch": 3}}, "micro_batch: 3 does not divide global_batch 4"),
        ({"train": {"global_batch": 4, "micro_batch": 2}}, "train.steps: missing"),
        (
            {"train": {"steps": 5, "global_batch": 4, "micro_batch": 2, "precision": "bf61"}},
            "precision: 'bf61' is not one of fp32, bf16, amp, fp16, fp64 (did you mean 'bf16'?)",
        ),
        ({"optim": {"lr": 1e-3, "min_lr": 1e-2}}, "min_lr: 0.01 is above the peak"),
        ({"optim": {"lr": 1e-3, "matrix_lr": 0}}, "matrix_lr: must be above 0"),
        ({"optim": {"lr": 1e-3, "matrix_weight_decay": -1}}, "matrix_weight_decay: must be at least 0"),
        ({"model": {"preset": "teleflm-tiny", "matrix_init_std": "0.1"}}, "matrix_init_std: expected a number"),
        ({"optim": {"lr": 1e-3, "warmup_steps": 10}}, "warmup_steps: 10 leaves no step"),
        ({"optim": {"lr": float("nan")}}, "optim.lr: nan is not a number"),
        ({"optim": {"lr": 1e-3, "clip_grad": float("inf")}}, "optim.clip_grad: inf is not a number"),
        ({"optim": {"lr": float("inf")}}, "optim.lr: inf is not a number"),
        ({"data": {"sources": [{"path": "p", "weight": float("inf")}], "seq_len": 64}}, "weight: inf is not a number"),
        ({"model": {"preset": "telechat2-tiny", "num_layers": 10**9}}, "num_layers: must be at most"),
        ({"model": {"preset": "../train/telechat2-tiny"}}, "no model preset '../train/telechat2-tiny'"),
        ({"model": "telechat2-tinny"}, "did you mean 'telechat2-tiny'? There are: flm-101b, "),
        ({"trian": {}}, "config: unknown key 'trian'; did you mean 'train'?"),
        ({"optim": None}, "optim"),
        ({"lr": 1}, "config: unknown key 'lr'; did you mean 'optim.lr'?"),
        ({"learning_rate": 1}, "config: unknown key 'learning_rate'; did you mean 'optim.lr'?"),
        ({"num_layers": 1}, "config: unknown key 'num_layers'; did you mean 'model.num_layers'?"),
        ({"train": {"seq_len": 8}}, "train: unknown key 'seq_len'; did you mean 'data.seq_len'?"),
        ({"train": {"batch_size": 8}}, "train: unknown key 'batch_size'; did you mean 'global_batch'?"),
        ({"train": {"epoch": 8}}, "train: unknown key 'epoch'; did you mean 'epochs'?"),
        ({"train": {"bf16": True}}, "train: unknown key 'bf16'; did you mean 'precision'?"),
        ({"lora": {"r": 8}}, "lora: unknown key 'r'; did you mean 'rank'?"),
        ({"data": {"path": "x"}}, "data: unknown key 'path'; did you mean 'sources'?"),
        ({"data": {"sources": "x", "seq_len": 8}}, "data.sources: expected a list, found str 'x'; write [{path: x}]"),
    ],
)
def test_mistake_is_named(change: JsonObject, says: str) -> None:
    with pytest.raises(UserError) as error:
        run_config_from_dict({**RUN, **change})
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_yaml_mistakes_name_file_and_line(tmp_path: Path) -> None:
    for text, says in (("a: [1,\nb: 2", ":1"), ("a: 1\na: 2\n", "'a' appears twice"), ("!!python/object:os.x {}", "")):
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(UserError, match="x.yaml") as error:
            load_yaml(tmp_path / "x.yaml")
        assert says in str(error.value)
    with pytest.raises(UserError, match="no such file"):
        load_yaml(tmp_path / "none.yaml")


UNREADABLE = {
    "a list as a key": "? [a]\n: 1\n",
    "a mapping as a key": "? {a: 1}\n: 1\n",
    "an impossible date": "model: !!timestamp 2020-13-45\n",
    "a number that is none": "a: !!int abc\n",
    "absurd nesting": "[" * 3000,
    "a control character": "a: b\x00c",
    "a number as a key": "1: a\n",
    "nothing as a key": "~: a\n",
    "a truth value as a key": "true: a\n",
    "a line end of YAML 1.1": "model: telechat2-tiny # a\u0085train: {}\n",
    "a line separator": "model: a\u2028train: {}\n",
    "half of a surrogate pair": 'a: "\\ud83d"\n',
    "a text tagged null": "a: !!null x\n",
    "a set": "a: !!set {steps}\n",
    "a date": "a: !!timestamp 2020-01-01\n",
    "bytes": "a: !!binary aGk=\n",
    "an ordered mapping": "a: !!omap [steps: 1]\n",
}


@pytest.mark.parametrize("text", UNREADABLE.values(), ids=UNREADABLE.keys())
def test_whatever_yaml_stumbles_over_is_one_line_that_names_the_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match="x.yaml(:1)?: ") as error:
        load_yaml(tmp_path / "x.yaml")
    assert "\n" not in str(error.value)


# What YAML 1.1 (PyYAML's) and YAML 1.2 read differently, and what either would read as a number that is not decimal.
UNCLEAR = (
    "010 -010 007 08 00 0x1F 0X1f 0o10 0b11 1_000 1_0.5 1_0e3 1:30 -1:30 1:30.5 190:20:30 12:34:56 "
    "yes Yes no NO on On off OFF"
)


@pytest.mark.parametrize("value", UNCLEAR.split())
def test_a_value_that_versions_of_yaml_read_differently_is_refused(tmp_path: Path, value: str) -> None:
    for tag, key in (("", "a"), ("", value), ("!!int ", "a"), ("!!float ", "a"), ("!!bool ", "a")):
        (tmp_path / "x.yaml").write_text(f"b: 1\n{key}: {tag}{value}\n")
        with pytest.raises(UserError, match=f"x.yaml:2: .*'{value}' is .* quote it"):
            load_yaml(tmp_path / "x.yaml")
    with pytest.raises(UserError, match=f"--set a.b=.*'{value}' is"):
        set_dotted({}, f"a.b={value}")
    (tmp_path / "x.yaml").write_text(f"a: '{value}'\nb: [\"{value}\"]\n")
    assert load_yaml(tmp_path / "x.yaml") == {"a": value, "b": [value]}


def test_a_number_that_would_become_nothing_is_refused() -> None:
    for value in ("1e-400", "-0.5e-999"):
        with pytest.raises(UserError, match="is too small for a number, and would be 0"):
            parse_yaml(f"lr: {value}", "run.yaml")
    assert parse_yaml("[0.0, 0e9, 1e-300]", "run.yaml") == [0.0, 0.0, 1e-300]


def test_a_merge_key_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("a: &a {b: 1}\nc:\n  <<: *a\n")
    with pytest.raises(UserError, match="x.yaml:3: .*'<<' merges mappings in YAML 1.1 .* write the keys out"):
        load_yaml(tmp_path / "x.yaml")
    (tmp_path / "x.yaml").write_text("'<<': =\n")
    assert load_yaml(tmp_path / "x.yaml") == {"<<": "="}


def test_decimal_numbers_and_text_are_what_they_look_like(tmp_path: Path) -> None:
    want = {
        **{"0": 0, "-0": 0, "+7": 7, "10": 10, "1.": 1.0, ".5": 0.5, "-.5e3": -500.0, "01.5": 1.5, "1.0e-05": 1e-5},
        **{"true": True, "False": False, "TRUE": True, "~": None, "null": None, "y": "y", "n": "n", "noon": "noon"},
        **{"2001-12-14": "2001-12-14", "10.0.0.1:80": "10.0.0.1:80", "1:90": "1:90", "a_1": "a_1", "0xyz": "0xyz"},
    }
    (tmp_path / "x.yaml").write_text("".join(f"- {text}\n" for text in want))
    found = load_yaml(tmp_path / "x.yaml")
    assert [(type(value), value) for value in found] == [(type(value), value) for value in want.values()]


def test_exponent_without_a_point_is_a_number(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("a: 1e-5\nb: 3e8\nc: -2E+3\nd: 1e-5x\n")
    assert load_yaml(tmp_path / "x.yaml") == {"a": 1e-5, "b": 3e8, "c": -2000.0, "d": "1e-5x"}


@pytest.mark.parametrize(
    ("line", "text", "says"),
    [
        (3, "data: {seq_len: 64,\n  sources: 5}", "data.sources: expected a list, found int 5"),
        (5, "data:\n  seq_len: 64\n  sources:\n  - p", "data.sources[0]: expected a mapping"),
        (2, "trian: {}", "config: unknown key 'trian'; did you mean 'train'?"),
        (3, "train:\n  stepz: 5", "train: unknown key 'stepz'; did you mean 'steps'?"),
        (2, "train: {steps: 1, micro_batch: 3, global_batch: 4}", "train.micro_batch: 3 does not divide"),
        (2, "eval: {sources: 1}", "eval.sources: expected a list, found int 1"),
        (3, "model:\n  vocab_size: x", "model.vocab_size: expected a whole number, found str 'x'"),
        (1, "optim: {beta1: 2}", "optim.lr: missing"),
    ],
)
def test_a_value_that_cannot_be_is_named_with_its_file_and_line(
    line: int, text: str, says: str, tmp_path: Path
) -> None:
    import yaml

    whole = {key: value for key, value in RUN.items() if not text.startswith(f"{key}:")}
    file = tmp_path / "run.yaml"
    file.write_text(f"{'# a run' * (line > 1)}\n{text}\n{yaml.safe_dump(whole)}".lstrip())
    with pytest.raises(UserError) as error:
        load_run_config(file)
    assert str(error.value).startswith(f"{file}:{line}: {says}")
    file.write_text(yaml.safe_dump(RUN))
    with pytest.raises(UserError, match="^train.steps: must be at least 1"):  # what --set gives is not in the file
        load_run_config(file, ["train.steps=0"])


def test_set_overrides_and_relative_paths(tmp_path: Path) -> None:
    import yaml

    (tmp_path / "run.yaml").write_text(yaml.safe_dump(RUN))
    config = load_run_config(tmp_path / "run.yaml", ["train.steps=3", "optim.lr=2e-4", "model.num_layers=2"])
    assert (config.train.steps, config.optim.lr, config.model.num_layers) == (3, 2e-4, 2)
    assert config.data.sources[0].path == str(tmp_path / "packed")
    for wrong in ("train.steps", "train.stepz=3", "train.steps.x=1"):
        with pytest.raises(UserError):
            load_run_config(tmp_path / "run.yaml", [wrong])
    # The value is read by YAML's rules, and may break them.
    for wrong in ("train.steps=[1", "train.steps={a: b: c}", "train.steps=!!python/name:os.system", "train.steps=\x01"):
        with pytest.raises(UserError, match="--set train.steps=") as error:
            load_run_config(tmp_path / "run.yaml", [wrong])
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "earlier, later",
    [("train.steps=3", "train.steps=4"), ("train.steps=3", "train={steps: 4}"), ("data.seq_len=8", "data=null")],
)
def test_what_is_set_twice_is_refused_with_both(tmp_path: Path, earlier: str, later: str) -> None:
    import yaml

    (tmp_path / "run.yaml").write_text(yaml.safe_dump(RUN))
    with pytest.raises(UserError, match=re.escape(f"--set: '{later}' would undo '{earlier}', which is set as well")):
        load_run_config(tmp_path / "run.yaml", [earlier, "optim.lr=2e-4", later])


def test_what_is_set_twice_alike_or_inside_a_group_is_not_refused() -> None:
    tree: dict[str, object] = {}
    set_all(tree, ["a.b=1", "a.b=1", "c={d: 1}", "c.d=2", "a.bc=3"])
    assert tree == {"a": {"b": 1, "bc": 3}, "c": {"d": 2}}
    assert without(["a.b=1", "a.bc=2", "c.d=3", "e=4"], ["a.b=5", "c={d: 6}"]) == ["a.bc=2", "e=4"]


def test_every_key_named_for_another_programs_is_one_of_a_run() -> None:
    legal = section_keys(RunConfig)
    for word, key in RUN_KEYS.items():
        section, _, leaf = key.partition("=")[0].partition(".")
        assert section in legal[""] and (not leaf or leaf in legal[section]), (word, key)


def test_a_folder_and_a_models_file_are_not_a_run(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("x: 1")
    with pytest.raises(UserError, match=r"--config: .* is a folder; the config of that run is .*/run.yaml$"):
        load_run_config(tmp_path)
    (tmp_path / "model.yaml").write_text("preset: telechat2-tiny\nnum_layers: 3\n")
    with pytest.raises(UserError, match="model.yaml: config: has a model's keys and none of a run; name this file as"):
        load_run_config(tmp_path / "model.yaml")
