"""Files from anywhere: what is read of them, and how what they say is shown."""

from __future__ import annotations

import json
import os
import struct
import sys
import time
from pathlib import Path

import pytest

from telechat_twins.core import cli
from telechat_twins.core.checkpoint.pieces import tiling_fault
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.foreign import (
    MAX_JSON,
    MAX_LINE,
    MAX_VALUES,
    lines,
    load_json,
    parse_value,
    read_file,
    read_text,
)
from telechat_twins.core.files.protobuf import fields
from telechat_twins.core.files.safetensors import MAX_HEADER, SafetensorsFile
from telechat_twins.core.launch.nodes import _parse_end
from telechat_twins.core.model.config import ModelConfig, load_model_config
from telechat_twins.core.near import nearest
from telechat_twins.core.parallel.layout import Layout, parse_layout
from telechat_twins.core.parallel.schedule import actions, peak_live
from telechat_twins.core.schema import MAX_NODES, load_yaml, parse_yaml, set_dotted
from telechat_twins.core.shown import LONGEST, controls_shown, printable, shown
from tests.campaigns.hostile_files import campaign, summary
from tests.house import ROOT

ESCAPES = {
    "\x1b[31mred": "\\x1b[31mred",
    "two\nlines\r": "two\\nlines\\r",
    "\u202edlrow": "\\u202edlrow",
    "\x9b1m": "\\x9b1m",
    "\ud800": "\\ud800",
    "中文 é \U0001f600": "中文 é \U0001f600",
    "back\\slash": "back\\slash",
}


@pytest.mark.parametrize(("text", "safe"), ESCAPES.items(), ids=[ascii(text) for text in ESCAPES])
def test_names_are_shown_without_control_characters(text: str, safe: str) -> None:
    assert printable(text) == safe == printable(safe) == str(UserError(text))
    assert str(UserError(f"again: {UserError(text)}")) == f"again: {safe}"


@pytest.mark.parametrize("longest", [80, 200, LONGEST])
def test_a_long_text_is_cut_to_the_length_that_was_asked_for(longest: int) -> None:
    text = "".join(chr(0x4E00 + n) for n in range(3 * longest))
    for size in (longest, longest + 1, 2 * longest, 3 * longest):
        cut = printable(text[:size], longest)
        assert len(cut) <= longest + 30 and cut[: longest // 2] == text[: longest // 2]
        assert (cut == text[:size]) == (size == longest) and cut.endswith(text[size - longest // 5 : size])


def test_a_text_for_the_terminal_keeps_its_lines() -> None:
    assert controls_shown("a\n\tb \u200d\u3000\x1b[2J\x07\x9b\r") == "a\n\tb \u200d\u3000\\x1b[2J\\x07\\x9b\\r"


def test_a_long_message_keeps_its_beginning_and_end() -> None:
    told = str(UserError("file: " + "x" * 10_000_000 + "; do this"))
    assert len(told) < LONGEST + 100
    assert told.startswith("file: xxx") and told.endswith("xxx; do this") and "characters) ..." in told


def test_values_are_shown_at_bounded_length() -> None:
    tree: list = ["leaf"]
    for _ in range(60):
        tree = [tree, tree]
    assert len(shown(tree)) < 500 and len(shown({"a" * 10**6: [0] * 10**6})) < 500
    assert shown("it's") == repr("it's") and shown(-5) == "-5" and shown(2**128) == repr(2**128)
    assert shown(-(1 << 20_000)) == "-(a whole number of about 6021 digits)"


def test_hints_are_for_short_words() -> None:
    assert nearest("tranium", ["train", "titanium"]) == "titanium"
    assert nearest("x" * 1_000_000, ["x" * 60]) is None and nearest("abc", ["abd" * 10_000]) is None
    assert nearest(5, ["5"]) is None


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    found = {"pipe": "a pipe", "device": "a device", ".": "a folder", "none": "no such file", "loop": "symbolic links"}
    for name, words in found.items():
        for read in (read_file, load_yaml, SafetensorsFile, lambda path: load_json(path, "JSON")):
            with pytest.raises(UserError, match=words):
                read(tmp_path / name)
    with pytest.raises(UserError, match="is not a valid file name"):
        read_file("a\0b")
    (tmp_path / "text").write_bytes(b"\xef\xbb\xbfabc")
    assert read_text(tmp_path / "text", 6) == "abc"
    with pytest.raises(UserError, match="must have at most 5 bytes, found 6"):
        read_text(tmp_path / "text", 5)


BAD_JSON = {
    "nested too deeply": b"[" * 100_000 + b"]" * 100_000,
    "key 'k7' appears twice": b"{" + b", ".join(b'"k%d": 0' % n for n in range(20_000)) + b', "k7": 1}',
    "a whole number has 41 digits": b"9" * 41,
    "a whole number has 5000 digits": b"[" + b"9" * 5_000 + b"]",
    "the number '1e999' is out of range": b'{"a": 1e999}',
    "NaN is not a JSON number": b"NaN",
    "-Infinity is not a JSON number": b"-Infinity",
    "unpaired surrogate": b'"\\ud800"',
    "above the limit of 600000": b"[" + b"0," * MAX_VALUES + b"0]",
    f"above the limit of {MAX_JSON}": b'"' + b"a" * MAX_JSON + b'"',
    "with characters of four bytes": '"\U0001f600'.encode() + b"a" * (MAX_JSON // 4) + b'"',
}


@pytest.mark.parametrize("reason", BAD_JSON)
def test_json_is_read_strictly_and_within_limits(reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_value(BAD_JSON[reason])


def test_what_is_within_the_limits_is_read() -> None:
    assert parse_value(b'["\\ud83d\\ude00", 1e308, %d, -0.0]' % 2**128) == ["\U0001f600", 1e308, 2**128, 0.0]
    names = {f"name{n}": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]} for n in range(20_000)}
    assert parse_value(json.dumps(names).encode()) == names


def test_a_long_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"short\n" + b"x" * MAX_LINE + b"\n")
    with open(path, "rb") as file, pytest.raises(UserError, match=r"rows\.jsonl:2: the line is longer than 4194304"):
        list(lines(file, path))
    with open(path, "rb") as file:
        assert [len(line) for line in lines(file, path, MAX_LINE + 1)] == [6, MAX_LINE + 1]


def test_a_large_header_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    path = tmp_path / "large.safetensors"
    length = 100_000_000
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", length) + b"{")
        file.truncate(8 + length)
    with pytest.raises(UserError, match=f"its header must have at most {MAX_HEADER} bytes, found {length}"):
        SafetensorsFile(path)


BAD_YAML = {
    "once its aliases are written out": "x0: &x0 [1, 2]\n"
    + "".join(f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 9)}]\n" for n in range(1, 30)),
    "an alias to what contains it": "a: &a {b: *a}",
    f"more than {MAX_NODES} values": "[" + "0, " * MAX_NODES + "0]",
    "nested too deeply": "[" * 5_000,
    "a number of 400 characters": "a: " + "9" * 400,
    "a number of 4001 characters": "a: -" + "9" * 4_000,
}


@pytest.mark.parametrize("reason", BAD_YAML)
def test_yaml_is_read_within_limits(reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        parse_yaml(BAD_YAML[reason], "here")


def test_aliases_of_a_usual_size_are_read() -> None:
    assert parse_yaml("base: &base {a: 1}\nlist: [*base, *base]", "here")["list"] == [{"a": 1}] * 2


@pytest.mark.parametrize("value", ["9" * 40, str(2**63), "1e999", ".inf", ".nan", "[[1, 2], {a: b}]", "x" * 50_000])
def test_numbers_out_of_range_are_mistakes(value: str) -> None:
    tree = {"preset": "telechat2-tiny"}
    for key in ("vocab_size", "norm_eps"):
        set_dotted(tree, f"{key}={value}")
        with pytest.raises(UserError, match=rf"model\.{key}: ") as caught:
            load_model_config(tree)
        assert len(str(caught.value)) < LONGEST + 100
        del tree[key]


def test_presets_that_circle_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("preset: b.yaml")
    (tmp_path / "b.yaml").write_text("preset: a.yaml")
    with pytest.raises(UserError, match="do they circle"):
        load_model_config(str(tmp_path / "a.yaml"))


def test_the_nearest_number_is_found_soon() -> None:
    sizes = dict(
        vocab_size=8, ffn_hidden_size=8, num_layers=1, norm_eps=1e-5, training_seqlen=8, base_seqlen=8, max_seqlen=8
    )
    begun = time.process_time()
    with pytest.raises(UserError, match="nearest that does: 1$"):
        ModelConfig(hidden_size=2**31 - 1, num_heads=1_000, num_kv_heads=1, **sizes)
    with pytest.raises(UserError, match="nearest that does: 1000$"):
        ModelConfig(hidden_size=2 * 10**9, num_heads=1_001, num_kv_heads=1, **sizes)
    with pytest.raises(UserError, match="must be at most 1048576"):
        Layout(cp=10**18, ulysses=7)
    with pytest.raises(UserError, match="'tp99999999999' is out of range"):
        parse_layout("tp99999999999")
    assert peak_live("1f1b", 4, 2, 10**15, 1) == 9
    assert time.process_time() - begun < 5  # each took minutes or for ever when it counted


@pytest.mark.parametrize(("schedule", "virtual"), [("gpipe", 1), ("1f1b", 1), ("1f1b", 2)])
def test_the_peak_of_a_schedule_is_that_of_its_actions(schedule: str, virtual: int) -> None:
    for pp, micro in ((2, 2), (4, 4), (4, 12), (3, 6)):
        for rank in range(pp):
            live = peak = 0
            for action in actions(schedule, pp, virtual, micro, rank):
                live += 1 if action.kind == "F" else -1
                peak = max(peak, live)
            assert peak_live(schedule, pp, virtual, micro, rank) == peak


def test_pieces_that_no_layout_makes_are_refused_soon() -> None:
    n = 8_000
    boxes = [((i, 0), (1, n)) for i in range(n)] + [((0, n + i), (n, 1)) for i in range(n)]
    assert "too many of them side by side" in str(tiling_fault((n, 2 * n), boxes))
    grid = [((16 * i, 8 * j), (16, 8)) for i in range(512) for j in range(8)]
    assert tiling_fault((8192, 64), grid) is None
    assert "overlap" in str(tiling_fault((8192, 64), [*grid[:-1], grid[0]]))


def test_a_varint_has_an_end() -> None:
    assert list(fields(b"\x08\x96\x01")) == [(1, 150)]
    with pytest.raises(ValueError, match="longer than ten bytes"):
        list(fields(b"\x80" * 1_000_000))


@pytest.mark.parametrize("number", ["9" * 5_000, "9" * 400, str(2**63), "1e3"])
def test_numbers_of_options_are_bounded(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--model", "telechat2-tiny", "--micro-batches", number]) == 2
    told = capsys.readouterr().err
    assert told.startswith("tele: argument --micro-batches: ") and told.count("\n") == 1 and len(told) < 2_500


def test_memory_that_there_is_not_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(words: list[str]) -> int:
        raise MemoryError("Unable to allocate 8.00 EiB")

    monkeypatch.setattr(cli, "_run", run)
    assert cli.main(["plan"]) == 2
    assert capsys.readouterr().err.startswith("tele: out of memory (Unable to allocate 8.00 EiB); use smaller sizes")


@pytest.mark.parametrize("framework", ["torch", "mindspore.mint"])
def test_a_frameworks_refusal_of_memory_is_one_line(
    framework: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    zeros = pytest.importorskip(framework).zeros
    monkeypatch.setattr(cli, "_run", lambda words: int(zeros((1 << 56,)).sum()))
    assert cli.main(["plan"]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("tele: out of memory (") and told.endswith("; use smaller sizes, or a larger machine")


@pytest.mark.parametrize(
    ("words", "path", "named"),
    [
        (["eval", "--out", "/proc/x"], "/proc/x", True),
        (["eval", "--out=/proc/x/y"], "/proc/x", True),
        (["eval", "--domain", "a=texts"], "texts/part.jsonl", True),
        (["eval", "--out", "scores"], "/proc/x", False),
        (["eval", "--out", "scores"], None, False),
    ],
)
def test_a_refusal_of_a_path_that_the_caller_named_is_one_line(
    words: list[str], path: str | None, named: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder that cannot be made below /proc is "not found", as a file of ours that is missing would be."""

    def run(words: list[str]) -> int:
        raise FileNotFoundError(2, "No such file or directory", path)

    monkeypatch.setattr(cli, "_run", run)
    assert cli.main(words) == (2 if named else 1)
    told = capsys.readouterr().err
    assert ("Traceback" not in told) == named
    assert not named or told == f"tele: {path}: No such file or directory; choose another path\n"


def test_a_sample_of_the_campaign() -> None:
    told: list[str] = []
    outcomes = campaign(40, seed=11, say=told.append)
    assert not [outcome for outcome in outcomes if outcome.fault], "\n".join(told)
    assert "| all | 40 |" in summary(outcomes)


def test_a_defect_shows_names_as_text(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(words: list[str]) -> int:
        raise RuntimeError("tensor \x1b[2Jx\x07")

    monkeypatch.setattr(cli, "_run", run)
    assert cli.main(["plan"]) == 1
    told = capsys.readouterr().err
    assert "RuntimeError: tensor \\x1b[2Jx\\x07" in told and "\n  File " in told


def test_notes_of_foreign_names_are_shown_as_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    release = tmp_path / "release"
    release.mkdir()
    golden = ROOT / "tests" / "goldens" / "telechat2_gqa"
    config = json.loads((golden / "config.json").read_text()) | {"hidden_dropout": "\x1b[31mred\n"}
    (release / "config.json").write_text(json.dumps(config))
    (release / "model.safetensors").symlink_to(golden / "weights.safetensors")
    words = ["convert", "--from", "hf", "--to", "canonical", str(release), str(tmp_path / "out")]
    assert cli.main(words) == 0
    assert "note: hidden_dropout \\x1b[31mred\\n is ignored" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change", [{"shape": [0] * 33}, {"shape": [2**62] * 4}, {"data_offsets": [-8, 0]}, {"dtype": "x" * 10**6}]
)
def test_a_tensor_that_cannot_be_is_refused_in_one_line(tmp_path: Path, change: dict) -> None:
    path = tmp_path / "bad.safetensors"
    header = json.dumps({"\x1b[2J": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **change}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(UserError, match=r"tensor '\\x1b\[2J'") as caught:
        SafetensorsFile(path)
    assert str(caught.value).isprintable() and len(str(caught.value)) < LONGEST + 100


def test_a_line_from_another_node_is_shown_as_text() -> None:
    word = _parse_end({"why": "lost\x1b[2J\nmore", "when": float("nan"), "code": 2}, 1)
    assert word.why == "lost\\x1b[2J\\nmore" and word.when > 0


def test_nesting_is_bounded_under_any_recursion_limit() -> None:
    """Libraries raise it for themselves, and with it what Python's parser would take."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)
    try:
        with pytest.raises(ValueError, match="nested too deeply"):
            parse_value(b'["]", ' + b"[" * 3_000 + b"]" * 3_000 + b"]")
    finally:
        sys.setrecursionlimit(before)
    assert parse_value(b"[" * 400 + b"]" * 400)
    assert parse_value(json.dumps(["[" * 3_000] * 100).encode()) == ["[" * 3_000] * 100
