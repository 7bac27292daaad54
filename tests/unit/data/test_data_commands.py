"""`tele data` and `tele tokenize`, from files to packed folders, and the one-line errors on bad input."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from telechat_twins.core import cli
from telechat_twins.core.commands import data as data_command
from telechat_twins.core.commands import tokenize as tokenize_command
from telechat_twins.core.data.encoders import tasks
from telechat_twins.core.data.forms import texts
from telechat_twins.core.data.packed import PackedDataset, PackedWriter
from telechat_twins.core.data.packing.dialogue_file import DialogueFile
from telechat_twins.core.data.prepare import pack_text, read_texts
from telechat_twins.core.data.rows import detect_kind, find_inputs, read_documents
from telechat_twins.core.data.tokenizer import load_tokenizer
from telechat_twins.core.errors import UserError
from tests.support.data_support import (
    SENTENCES,
    dialogue_row,
    encode_dialogue,
    tiny_tokenizer,
    tiny_tokenizer_path,
    write_rows,
)
from tests.support.shared import shared_file


def call(command, *words) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(w) for w in words]))


def tele_data(*words) -> int:
    return call(data_command, *words, "--tokenizer", tiny_tokenizer_path(), "--quiet")


# ---- texts


def test_texts_become_documents(tmp_path, capsys):
    folder = tmp_path / "corpus"
    (folder / ".git").mkdir(parents=True)
    (folder / "a.txt").write_bytes("\ufeffThe quick fox\r\n中国\n".encode())
    write_rows(folder / "b.jsonl", [{"text": "jumps over"}, {"text": ""}, "", {"text": "<_end><_user>", "id": 3}])
    (folder / ".git" / "c.txt").write_text("hidden")
    (folder / "d.bin").write_bytes(b"\xff\xfe")
    assert tele_data(folder, "--out", tmp_path / "out") == 0
    tokenizer = tiny_tokenizer()
    want = ["The quick fox\r\n中国\n", "jumps over", "<_end><_user>"]
    stream = [i for text in want for i in [*tokenizer.encode(text), 2]]
    data = PackedDataset(tmp_path / "out")
    assert data.tokens.tolist() == stream
    assert data.tokens.dtype == np.uint16 and data.meta["documents"] == 3
    assert f"3 documents, {len(stream)} tokens, vocabulary 600" in capsys.readouterr().out
    assert load_tokenizer(tmp_path / "out").sha256 == tokenizer.sha256
    tele_data(folder, "--out", tmp_path / "bos", "--bos")
    assert PackedDataset(tmp_path / "bos").tokens[0] == 1


def test_blocks_of_a_long_file_encode_as_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "BLOCK_BYTES", 64)
    monkeypatch.setattr(tasks, "TASK", 100)
    text = "".join(SENTENCES) * 7 + "\n\n  no newline at the end"
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    (tmp_path / "one_line.txt").write_text("中" * 900, encoding="utf-8")
    blocks = list(read_documents(tmp_path / "long.txt"))
    assert len(blocks) > 10 and "".join(b.text for b in blocks) == text
    assert [b.first for b in blocks] == [True] + [False] * (len(blocks) - 1)
    assert [b.last for b in blocks] == [False] * (len(blocks) - 1) + [True]
    one = list(read_documents(tmp_path / "one_line.txt"))
    assert "".join(b.text for b in one) == "中" * 900 and len(one) > 1
    pack_text([tmp_path / "long.txt"], tmp_path / "out", tiny_tokenizer(), quiet=True)
    assert PackedDataset(tmp_path / "out").tokens.tolist() == [*tiny_tokenizer().encode(text), 2]


def test_memory_does_not_grow_with_the_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "BLOCK_BYTES", 1 << 14)
    monkeypatch.setattr(tasks, "TASK", 1 << 14)
    peaks = []
    for name, copies in (("small", 300), ("large", 1500)):
        write_rows(tmp_path / f"{name}.jsonl", [{"text": "The quick brown fox. " * 30}] * copies)
        (tmp_path / f"{name}.txt").write_text("".join(SENTENCES) * copies, encoding="utf-8")
        inputs = [tmp_path / f"{name}.jsonl", tmp_path / f"{name}.txt"]
        pack_text(inputs, tmp_path / f"{name}-warm", tiny_tokenizer(), quiet=True)
        tracemalloc.start()
        pack_text(inputs, tmp_path / name, tiny_tokenizer(), quiet=True)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # Five times the text, 1 MiB more of it; 2 MiB of write buffers are in both. Measured: equal within 2 KiB.
    assert peaks[1] < peaks[0] + 100_000, peaks


def test_patterns_and_order(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        (tmp_path / name).write_text('{"text": "x"}\n')
    assert [p.name for p in find_inputs([tmp_path / "*.jsonl"])] == ["a.jsonl", "b.jsonl"]
    assert [p.name for p in find_inputs([tmp_path / "c.txt", tmp_path])] == ["c.txt", "a.jsonl", "b.jsonl"]
    (tmp_path / "sub").mkdir()
    assert len(find_inputs([tmp_path / "a.jsonl", tmp_path / "sub" / ".." / "a.jsonl"])) == 1


# ---- dialogues


def sft_rows(tmp_path, count=30):
    return write_rows(tmp_path / "rows.jsonl", [dialogue_row(n, turns=1 + (n % 5 == 0)) for n in range(count)])


def test_plain_dialogues(tmp_path, capsys):
    source = sft_rows(tmp_path)
    assert tele_data(source, "--out", tmp_path / "out", "--sft", "plain", "--seq-len", 128) == 0
    data = PackedDataset(tmp_path / "out")
    encoded = [encode_dialogue(tiny_tokenizer(), d) for d in DialogueFile([source])]
    assert data.tokens.tolist() == [i for ids, _ in encoded for i in ids]
    assert data.mask.tolist() == [m for _, mask in encoded for m in mask]
    assert np.diff(data.sequences).max() <= 128
    assert data.meta["rows"] == 30 and data.meta["rows_lost"] == 0 and data.meta["documents"] == 30
    out = capsys.readouterr().out
    assert "30 rows in" in out and "lost" not in out


def test_released_variants_say_what_they_lose(tmp_path, capsys):
    source = sft_rows(tmp_path)
    tele_data(source, "--out", tmp_path / "ds", "--sft", "deepspeed", "--seq-len", 128)
    ds = PackedDataset(tmp_path / "ds").meta
    assert ds["rows_lost"] > 0 and f"lost: {ds['rows_lost']} of 30 rows" in capsys.readouterr().out
    tele_data(source, "--out", tmp_path / "mf", "--sft", "mindformers", "--seq-len", 128)
    mf = PackedDataset(tmp_path / "mf")
    assert set(np.diff(mf.sequences)) == {129}
    assert f"lost: {mf.meta['rows_lost']} of 30 rows" in capsys.readouterr().out
    assert ds["kinds"] == mf.meta["kinds"] == {"dialog": 30}  # though one of them reads every row twice


def test_deepspeed_rows_longer_than_a_sample_are_cut_as_released(tmp_path, capsys):
    source = write_rows(tmp_path / "rows.jsonl", [dialogue_row(1, turns=3, size=60)])
    tele_data(source, "--out", tmp_path / "out", "--sft", "deepspeed", "--seq-len", 64)
    data = PackedDataset(tmp_path / "out")
    assert len(data.tokens) == 64 and "truncated:" in capsys.readouterr().out


def test_tool_rows_stay_inside_the_vocabulary(tmp_path):
    row = dialogue_row(1)
    row["dialog"][1]["content"] = "<tool_call>f</tool_call><unk>"
    source = write_rows(tmp_path / "rows.jsonl", [row] * 9)
    tele_data(source, "--out", tmp_path / "mf", "--sft", "mindformers", "--seq-len", 150)
    assert 9 in PackedDataset(tmp_path / "mf").tokens


def test_released_dialogues(tmp_path):
    tokenizer = shared_file("data/telechat2/tokenizer.model")
    source = shared_file("data/telechat2/demo_role.jsonl")
    words = ["--tokenizer", tokenizer, "--out", tmp_path / "out", "--sft", "plain", "--seq-len", 4096, "--quiet"]
    assert call(data_command, source, *words) == 0
    data = PackedDataset(tmp_path / "out")
    assert data.tokens.dtype == np.int32 and data.meta["rows"] == 50 and data.meta["rows_lost"] == 0
    assert (np.asarray(data.tokens) == 6).sum() == 50


# ---- mistakes


def test_malformed_rows_are_named_by_file_and_line(tmp_path):
    cases = [
        ('{"text": "a"', "rows.jsonl:3: not valid JSON (Expecting ',' delimiter at column 13)"),
        ("[1, 2]", "rows.jsonl:3: expected a JSON object, found list"),
        ('{"txt": "a"}', "rows.jsonl:3: expected text in field 'text'; keys found: txt"),
        ('{"text": 5}', "rows.jsonl:3: expected text in field 'text', found int"),
        ('{"text": null}', "rows.jsonl:3: expected text in field 'text', found nothing"),
        ('{"text": "a\\ud800"}', "rows.jsonl:3: not valid JSON (an unpaired surrogate escape)"),
        ('{"dialog": []}', "rows.jsonl:3: a dialogue; pack dialogues with --sft"),
        ("[" * 100000, "rows.jsonl:3: not valid JSON"),
        (
            '{"text": "a", "n": ' + "9" * 5000 + "}",
            "rows.jsonl:3: not valid JSON (a whole number has 5000 digits, at most 40 are allowed)",
        ),
    ]
    for line, says in cases:
        source = write_rows(tmp_path / "rows.jsonl", [{"text": "fine"}, "", line])
        with pytest.raises(UserError) as caught:
            tele_data(source, "--out", tmp_path / "out")
        assert says in str(caught.value) and "\n" not in str(caught.value), line
        assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


def test_malformed_dialogues_are_named_by_file_and_line(tmp_path):
    turn = {"role": "user", "content": "x"}
    cases = [
        ({"dialog": {}}, "'dialog' must be a list"),
        ({"dialog": []}, "'dialog' is empty"),
        ({"dialog": [{"role": "narrator", "content": "x"}]}, "'dialog[0].role' is 'narrator'"),
        ({"dialog": [turn, {"role": "bot"}]}, "'dialog[1].content' must be text, found nothing"),
        ({"dialog": [turn, "x"]}, "'dialog[1]' must be an object"),
        ({"dialog": [turn], "tool": "no"}, "'tool' must be true or false"),
        ({"dialog": [turn], "system": 3}, "'system' must be text"),
        ({"messages": [turn], "tools": "[1"}, "'tools' is text but not a JSON list"),
        ({"input": "a", "output": None}, "'output' must be text"),
        ({"text": "a"}, "a text"),
        ({"question": "a"}, "a row of no kind that is read: dialog (dialog); messages (messages)"),
    ]
    for variant in ("plain", "deepspeed", "mindformers"):
        for row, says in cases:
            source = write_rows(tmp_path / "rows.jsonl", [dialogue_row(1), row])
            with pytest.raises(UserError) as caught:
                tele_data(source, "--out", tmp_path / "out", "--sft", variant, "--seq-len", 64)
            assert "rows.jsonl:2: " in str(caught.value) and says in str(caught.value), (variant, row)
            assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


def test_files_that_are_not_utf8_are_named_by_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"fine\nfine\nbad \xff\xfe\n")
    with pytest.raises(UserError, match=r"a.txt:3: not UTF-8"):
        tele_data(tmp_path / "a.txt", "--out", tmp_path / "out")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "\xff"}\n')
    with pytest.raises(UserError, match=r"a.jsonl:2: not UTF-8"):
        tele_data(tmp_path / "a.jsonl", "--out", tmp_path / "out")


def test_empty_inputs(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.jsonl").write_text("\n\n")
    for name in ("empty.txt", "blank.jsonl"):
        with pytest.raises(UserError, match="would be empty"):
            tele_data(tmp_path / name, "--out", tmp_path / "out")
    for variant in ("plain", "deepspeed", "mindformers"):
        with pytest.raises(UserError, match="would be empty"):
            tele_data(tmp_path / "blank.jsonl", "--out", tmp_path / "out", "--sft", variant, "--seq-len", 64)
    (tmp_path / "folder").mkdir()
    for missing in ("nowhere.txt", "folder", "*.csv"):
        with pytest.raises(UserError, match="no such file"):
            tele_data(tmp_path / missing, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--sft", "plain"], "--seq-len: missing"),
        (["--sft", "plain", "--seq-len", "1"], "--seq-len: must be at least 2"),
        (["--seq-len", "64"], "--seq-len: only with --sft"),
        (["--no-start"], "--no-start: only with --sft mindformers"),
        (["--sft", "plain", "--seq-len", "64", "--bos"], "--bos: only with texts"),
        (["--sft", "mindformers", "--seq-len", "64", "--no-template"], "--no-template: only with --sft deepspeed"),
        (["--bos-token", "<_user>"], "--bos-token: only with --bos"),
        (["--eos-token", "<_user>"], "--eos-token <_user>: documents of a tokenizer with .* end with <_end>"),
        (["--ignore-key", "text"], "--ignore-key text: is the field of the document"),
        (["--threads", "0"], "--threads: must be at least 1"),
        (
            ["--control", "none", "--eos-token", "<none>"],
            "--eos-token: eos token '<none>' is not one of",
        ),
        (["--sft", "plain", "--seq-len", "64"], "dialogues are read from files of rows \\(.jsonl"),
    ],
)
def test_options_that_do_not_go_together(tmp_path, words, says):
    (tmp_path / "a.txt").write_text("some text")
    with pytest.raises(UserError, match=says):
        tele_data(tmp_path / "a.txt", "--out", tmp_path / "out", *words)


def test_existing_output_needs_force(tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", [{"text": "some text"}])
    tele_data(source, "--out", tmp_path / "out")
    with pytest.raises(UserError, match="--force"):
        tele_data(source, "--out", tmp_path / "out")
    assert tele_data(source, "--out", tmp_path / "out", "--force") == 0


def test_kind_of_input(tmp_path):
    texts = write_rows(tmp_path / "t.jsonl", [{"text": "a"}])
    talks = write_rows(tmp_path / "d.jsonl", [dialogue_row(1)])
    (tmp_path / "a.txt").write_text("x")
    assert detect_kind([texts, tmp_path / "a.txt"]) == "text"
    assert detect_kind([talks]) == "dialogue"
    with pytest.raises(UserError, match="pack them separately"):
        detect_kind([texts, talks])


def test_progress_shows_rate_and_time_left(tmp_path, capsys):
    source = write_rows(tmp_path / "rows.jsonl", [{"text": "some text " * 50}] * 20)
    call(data_command, source, "--out", tmp_path / "out", "--tokenizer", tiny_tokenizer_path())
    shown = capsys.readouterr().err
    assert "tokenizing: 100%" in shown and "B/s" in shown


def test_a_mistake_is_one_line_in_a_log(tmp_path, capsys):
    source = write_rows(tmp_path / "rows.jsonl", [{"text": "fine"}, "{oops"])
    words = ["data", str(source), "--out", str(tmp_path / "out"), "--tokenizer", str(tiny_tokenizer_path())]
    assert cli.main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"tele: {source}:2: ") and err.count("\n") == 1


# ---- tele tokenize


def test_train_encode_decode(tmp_path, capsys):
    write_rows(tmp_path / "a.jsonl", [{"text": s} for s in SENTENCES] * 10 + [dialogue_row(1)] * 10)
    out = tmp_path / "new" / "tokenizer.model"
    assert call(tokenize_command, "train", tmp_path / "a.jsonl", "--out", out, "--vocab-size", 420) == 0
    assert "420 pieces" in capsys.readouterr().out
    with pytest.raises(UserError, match="exists already.*--force"):
        call(tokenize_command, "train", tmp_path / "a.jsonl", "--out", out, "--vocab-size", 420)
    call(tokenize_command, "encode", "--tokenizer", out, "--ids", "--allow-control", "<_user>fox 中<_end>")
    ids = capsys.readouterr().out.split()
    assert (ids[0], ids[-1]) == ("4", "2")
    call(tokenize_command, "decode", "--tokenizer", out, *ids)
    assert capsys.readouterr().out == "<_user> fox 中<_end>\n"
    call(tokenize_command, "encode", "--tokenizer", out, "fox")
    assert "tokens, 3 characters" in capsys.readouterr().out
    chat = json.dumps([{"role": "system", "content": "s"}, {"role": "user", "content": "<_end>"}])
    call(tokenize_command, "encode", "--tokenizer", out, "--ids", "--chat", "--bos", chat)
    ids = [int(i) for i in capsys.readouterr().out.split()]
    assert [i for i in ids if i < 18] == [1, 6, 4, 5]
    call(tokenize_command, "info", "--tokenizer", out)
    assert "pieces    420" in capsys.readouterr().out
    with pytest.raises(UserError, match="420 pieces"):
        call(tokenize_command, "info", "--tokenizer", out, "--model", "telechat2-3b")
    with pytest.raises(UserError, match="'x7': not a token id"):
        call(tokenize_command, "decode", "--tokenizer", out, "4", "x7")
    for word in ("\u00b2", "--5", "9" * 5000, "1_0", "\u0663"):  # what int() refuses and isdigit() does not
        with pytest.raises(UserError, match="not a token id"):
            call(tokenize_command, "decode", "--tokenizer", out, "--", word)
    for deep in ("[" * 100000, "[" + "9" * 5000 + "]"):
        with pytest.raises(UserError, match="--chat"):
            call(tokenize_command, "encode", "--tokenizer", out, "--chat", deep)


def test_training_text_is_limited(tmp_path):
    source = write_rows(tmp_path / "a.jsonl", [{"text": "0123456789"}] * 10)
    assert len(list(read_texts([source], max_bytes=35))) == 4


def test_a_full_disk_leaves_nothing(tmp_path):
    """A limit on the size of files stands for a full disk; what is held back cannot be written either at the end."""
    source = write_rows(tmp_path / "rows.jsonl", [{"text": "The quick brown fox. " * 100}] * 3000)
    words = [str(source), "--tokenizer", str(tiny_tokenizer_path()), "--out", str(tmp_path / "out"), "--quiet"]
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)); "
    program = limit + "from telechat_twins.core.cli import main; sys.exit(main(['data', *sys.argv[1:]]))"
    done = subprocess.run([sys.executable, "-c", program, *words, "--threads", "1"], capture_output=True, text=True)
    assert done.returncode == 2 and "out: cannot be written (File too large); nothing was left behind" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize("use", [[], ["--sft", "plain"], ["--sft", "mindformers"], ["--preference"], ["--teacher"]])
def test_a_file_that_changes_while_it_is_read_is_refused(use, tmp_path, monkeypatch):
    row = {"text": "a fox"} if not use else {"input": "q", "output": "a"}
    row = {"--preference": {"prompt": "q", "chosen": "a", "rejected": "b"}, "--teacher": {"text": "a", "label": 1}}.get(
        *use[:1] or [None], row
    )
    source = write_rows(tmp_path / "rows.jsonl", [row] * 40)
    before = PackedWriter.add_documents, PackedWriter.add_sequence

    def grown(method):
        def changed(self, *given):
            source.write_text(source.read_text() + "\n")
            return method(self, *given)

        return changed

    words = [source, "--out", tmp_path / "out", "--threads", 1, *use, *(["--seq-len", 200] if use else [])]
    monkeypatch.setattr(PackedWriter, "add_documents", grown(before[0]))
    monkeypatch.setattr(PackedWriter, "add_sequence", grown(before[1]))
    with pytest.raises(UserError, match=r"rows.jsonl: changed while it was read"):
        tele_data(*words)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    monkeypatch.undo()
    assert tele_data(*words) == 0
