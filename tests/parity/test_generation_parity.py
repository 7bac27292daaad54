"""Generation and `tele forward` in both backends, against numbers of the original implementation.

Tolerances. Relative Frobenius norm, float32 against the float64 run of the same formulas stored in the goldens: the
original's own float32 logits lie 7e-7 away, its gradients up to 2e-6 of the largest entry. Ours get 2e-6 on logits and
1e-5 on any gradient; the smallest planted fault of the goldens (norm epsilon) moves logits by 0.2 of their spread.
"""

from __future__ import annotations

import argparse
import importlib
import io as io_module
import json
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from telechat_twins.convert.source import open_model
from telechat_twins.core import backends, cli
from telechat_twins.core.data.chat_template import encode_chat
from telechat_twins.core.data.tokenizer import load_tokenizer
from telechat_twins.core.data.tokenizer_training import train_tokenizer
from telechat_twins.core.errors import UserError
from telechat_twins.core.inference.chat import Chat
from telechat_twins.core.inference.engine import Engine
from telechat_twins.core.inference.generation import generate
from telechat_twins.core.inference.pages import pool_size
from telechat_twins.core.inference.sampling import sampling_config
from telechat_twins.core.model.batch import IGNORE, Batch
from telechat_twins.core.model.config import with_table_dtype
from telechat_twins.core.parity.bounds import relative_frobenius
from tests.support.engine_support import Feed

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"
MODEL = GOLDENS / "telechat2_gqa"
RUNS = json.loads((GOLDENS / "generation" / "generation.json").read_text())["runs"]
TABLES = {"fp32table": "float32", "released": "float16"}

LOGITS = 2e-6
GRADIENT = 1e-5
LOSS = 1e-6  # relative; a loss near 5 in float32 is known to 1e-7, summed over 72 tokens
MARGIN = 5e-4  # goldens/generation/meta.json


@pytest.fixture(scope="session", params=["ms", "pt"])
def backend(request):
    framework = pytest.importorskip({"ms": "mindspore", "pt": "torch"}[request.param])
    if request.param == "ms":
        # On a CPU the pipeline of asynchronous launches spins while it waits: ten times the time of the operators.
        framework.runtime.launch_blocking()
    return request.param


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """The golden weights as a released folder."""
    folder = tmp_path_factory.mktemp("telechat2_gqa")
    shutil.copy(MODEL / "config.json", folder)
    shutil.copy(MODEL / "weights.safetensors", folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def source(checkpoint):
    return open_model(checkpoint)


@pytest.fixture(scope="session")
def io():
    return load_file(MODEL / "io.safetensors")


def tele(verb: str, *argv: object) -> int:
    """Run a command in this process; a UserError comes out as such."""
    module = importlib.import_module(f"telechat_twins.core.commands.{verb}")
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return module.run(parser.parse_args([str(a) for a in argv]))


# Generation


def runner_of(backend, config, get, tokens=128, precision="fp32"):
    return backends.load(backend, "generate").Runner(config, get, pool_size(tokens), precision)


@pytest.fixture(scope="session")
def engines(backend, source):
    """One engine a table variant, with pages of earlier prompts in it."""
    return {
        variant: Engine(runner_of(backend, with_table_dtype(source.config, dtype), source.tensor))
        for variant, dtype in TABLES.items()
    }


@pytest.mark.parametrize("variant", TABLES)
@pytest.mark.parametrize("run", RUNS, ids=lambda r: f"{len(r['prompt'])}ids-penalty{r['repetition_penalty']}")
def test_greedy_tokens_and_margins(engines, run, variant):
    golden = run[variant]
    sampling = sampling_config(repetition_penalty=run["repetition_penalty"])
    result = generate(engines[variant], run["prompt"], sampling, len(golden["tokens"]))
    assert result.tokens == golden["tokens"]
    np.testing.assert_allclose(result.top2_margins, golden["top2_margin"], rtol=0, atol=MARGIN)


def test_the_margins_tell_the_variants_apart():
    # Otherwise the tolerance above would let one table pass for the other.
    pairs = [np.subtract(run["fp32table"]["top2_margin"], run["released"]["top2_margin"]) for run in RUNS]
    assert np.abs(pairs).max() > 2 * MARGIN


def batch_of(ids: list[int]) -> Batch:
    row = np.asarray([ids], np.int32)
    return Batch(row, np.full_like(row, IGNORE), np.arange(len(ids), dtype=np.int32)[None])


# Lengths within the trained 64, and beyond it, where base and attention scale have grown (to 150: alpha 7).
@pytest.mark.parametrize("total", [40, 150])
def test_cached_steps_equal_one_pass_over_the_whole_prefix(backend, source, total):
    ids = np.random.default_rng(total).integers(0, source.config.vocab_size, total).tolist()
    forward = backends.load(backend, "forward").run
    judge = forward(source.config, source.tensor, batch_of(ids), "fp64", False)["logits"][0]
    whole = forward(source.config, source.tensor, batch_of(ids), "fp32", False)["logits"][0]
    fed = Feed(runner_of(backend, source.config, source.tensor, total), total)
    rows, at = [], 0
    for size in (17, *[1] * 8, 5, *[1] * (total - 30)):  # a prompt, steps, a second piece, steps
        rows.append((at + size - 1, fed.extend(ids[at : at + size])))
        at += size
    assert at == total == fed.length
    places = [place for place, _ in rows]
    cached = np.stack([row for _, row in rows])
    assert relative_frobenius(whole[places], judge[places]) < LOGITS
    assert relative_frobenius(cached, judge[places]) < LOGITS
    # Row by row as well: one wrong step may not hide among good ones.
    assert max(relative_frobenius(row, judge[place]) for place, row in rows) < 4 * LOGITS
    assert (cached.argmax(-1) == whole[places].argmax(-1)).all()


def test_cached_generation_gives_the_tokens_of_uncached(backend, source):
    forward = backends.load(backend, "forward").run
    ids = list(RUNS[0]["prompt"])
    made = generate(Engine(runner_of(backend, source.config, source.tensor)), ids, sampling_config(), 12).tokens
    for token in made:
        assert (
            int(forward(source.config, source.tensor, batch_of(ids), "fp32", False)["logits"][0, -1].argmax()) == token
        )
        ids.append(token)


def test_rescale_step_follows_the_length_and_request_does_not(backend, source):
    """`step` at length n uses the tables of length n for the new token; `request` those of the planned end."""
    ids = np.random.default_rng(1).integers(0, source.config.vocab_size, 70).tolist()
    runner = runner_of(backend, source.config, source.tensor, 70)
    last = {}
    for rescale, length in (("request", 70), ("step", 60)):
        fed = Feed(runner, length, by_step=rescale == "step")
        inside = fed.extend(ids[:60])
        for token in ids[60:]:
            logits = fed.extend([token])
        last[rescale] = inside, logits
    short = backends.load(backend, "forward").run(source.config, source.tensor, batch_of(ids[:60]), "fp32", False)
    long = backends.load(backend, "forward").run(source.config, source.tensor, batch_of(ids), "fp32", False)
    # Within the trained length a step knows nothing of the planned one ...
    assert relative_frobenius(last["step"][0], short["logits"][0, -1]) < LOGITS
    assert relative_frobenius(last["request"][0], short["logits"][0, -1]) > 1e-2
    # ... and at the end the request is the plain forward, while old keys under `step` keep their old rotation.
    assert relative_frobenius(last["request"][1], long["logits"][0, -1]) < 4 * LOGITS
    assert relative_frobenius(last["step"][1], long["logits"][0, -1]) > 1e-2


def test_sampled_tokens_are_the_same_in_both_backends(source):
    pytest.importorskip("mindspore")
    pytest.importorskip("torch")
    sampling = sampling_config(temperature=0.8, top_k=30, top_p=0.95, repetition_penalty=1.1, seed=11)
    made = [
        generate(Engine(runner_of(b, source.config, source.tensor)), [7, 8, 9], sampling, 40).tokens
        for b in ("ms", "pt")
    ]
    # Logits differ by some 1e-6; a draw within that of a boundary would differ. This seed has none.
    assert made[0] == made[1]
    assert len(set(made[0])) > 10


# tele generate, tele chat


@pytest.fixture(scope="session")
def talking(tmp_path_factory, source):
    """The golden's shape with longer training, a tokenizer of its own and random ends: a released folder that talks."""
    folder, size = tmp_path_factory.mktemp("talking"), 330
    train_tokenizer(["a model answers \u6a21\u578b\u56de\u7b54 " * 50], folder / "tokenizer.model", size)
    config = json.loads((MODEL / "config.json").read_text())
    config.update(vocab_size=size, seq_length=256, training_seqlen=256, base_seqlen=256)
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(MODEL / "weights.safetensors")
    random = np.random.default_rng(0)
    for name in ("transformer.word_embeddings.weight", "lm_head.weight"):
        scale = weights[name].std()
        weights[name] = (random.normal(size=(size, 48)) * scale).astype(np.float32)
    save_file(weights, folder / "model.safetensors")
    return folder


def test_generate_command_gives_ids(backend, checkpoint, capsys):
    run = RUNS[0]
    ids = ",".join(map(str, run["prompt"]))
    common = ("--backend", backend, "--checkpoint", checkpoint, "--ids", ids, "--max-new-tokens", 40, "--ignore-eos")
    assert tele("generate", *common, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ids"] == run["fp32table"]["tokens"]
    assert report["prompt_ids"] == run["prompt"]
    assert (report["text"], report["finish_reason"], report["stop_token"]) == (None, "length", None)
    np.testing.assert_allclose(report["top2_margins"], run["fp32table"]["top2_margin"], rtol=0, atol=MARGIN)
    common = (*common[:-3], "--max-new-tokens", 10, "--ignore-eos")
    assert tele("generate", *common) == 0
    assert capsys.readouterr().out == ",".join(map(str, run["fp32table"]["tokens"][:10])) + "\n"
    assert tele("generate", *common, "--json", "--quantize", "int8") == 0
    margins = np.subtract(json.loads(capsys.readouterr().out)["top2_margins"], run["fp32table"]["top2_margin"][:10])
    assert 10 * MARGIN < np.abs(margins[:1]).max() < 0.5
    assert tele("generate", *common, "--json", "--table-dtype", "float16") == 0
    report = json.loads(capsys.readouterr().out)
    np.testing.assert_allclose(report["top2_margins"], run["released"]["top2_margin"][:10], rtol=0, atol=MARGIN)


def test_generate_command_gives_text(backend, talking, capsys, tmp_path):
    common = ("--backend", backend, "--checkpoint", talking, "--max-new-tokens", 12, "--ignore-eos")
    (tmp_path / "prompt.txt").write_text("a model\n", encoding="utf-8")
    assert tele("generate", *common, "--prompt", "a model", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    tokenizer = load_tokenizer(talking)
    assert report["prompt_ids"] == tokenizer.encode("a model")
    whole = tokenizer.decode(report["prompt_ids"] + report["ids"], skip_special=True)
    assert whole == "a model" + report["text"]
    for extra in (("--stream",), ("--no-stream",), ("--greedy",)):
        assert tele("generate", *common, "--prompt-file", tmp_path / "prompt.txt", *extra) == 0
        told = capsys.readouterr()
        assert told.out == report["text"] + "\n"
        assert "12 tokens in" in told.err
    for stop in (report["text"][5:8], "\n\n"):
        assert tele("generate", *common, "--prompt", "a model", "--stop", "never this", "--stop", stop, "--json") == 0
        ended = json.loads(capsys.readouterr().out)
        found = stop in report["text"]
        assert ended["text"] == report["text"].partition(stop)[0]
        assert (ended["finish_reason"], ended["stop_text"]) == (("stop", stop) if found else ("length", None))
    drawn = ("--prompt", "a model", "--temperature", 1.5, "--samples", 3, "--seed", 2)
    assert tele("generate", *common, *drawn, "--json", "--logprobs", 2) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["sample"] for row in rows] == [0, 1, 2] and len({row["text"] for row in rows}) == 3
    for row in rows:
        assert len(row["logprobs"]) == 12 and all(len(top) == 2 for top in row["top_logprobs"])
        assert all(max(top.values()) >= own for top, own in zip(row["top_logprobs"], row["logprobs"], strict=True))
    assert tele("generate", *common, *drawn) == 0
    assert capsys.readouterr().out == "".join(row["text"] + "\n" for row in rows)
    assert tele("generate", *common, "--prompt", "a<_user>b", "--allow-control", "--add-bos", "--json") == 0
    asked = json.loads(capsys.readouterr().out)["prompt_ids"]
    assert asked == [1, *tokenizer.encode("a"), tokenizer.control["<_user>"], *tokenizer.encode("b")]
    assert tele("generate", *common, "--prompt", "a<_user>b", "--chat", "--json") == 0
    asked = json.loads(capsys.readouterr().out)["prompt_ids"]
    assert asked == encode_chat(tokenizer, [{"role": "user", "content": "a<_user>b"}])
    assert asked.count(tokenizer.control["<_user>"]) == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--ids", "1,x"), "--ids: entry 1 is 'x', not a token id"),
        (("--ids", "1,151"), "prompt: token id 151 at place 1 is outside the vocabulary of 151"),
        (("--ids", "1", "--chat"), "--ids: cannot be combined with --chat or --allow-control"),
        (("--ids", "1", "--max-new-tokens", "0"), "--max-new-tokens: must be at least 1"),
        (("--ids", "1", "--top-k", "5"), "--top-k: needs --temperature, since it has no effect on greedy decoding"),
        (("--ids", "1", "--temperature", "0.5", "--greedy"), "--greedy: cannot be combined with --temperature 0.5"),
        (("--ids", "1", "--temperature", "0.5", "--top-p", "2"), "sampling.top_p: must be at most 1.0"),
        (("--ids", "1", "--samples", "3"), "--samples: several need --temperature, since greedy answers are equal"),
        (("--ids", "1", "--logprobs", "3"), "--logprobs requires --json; add --json"),
        (("--ids", "1", "--logprobs", "152", "--json"), "logprobs: must be 0 to 151"),
        (("--ids", "1", "--stop", "x"), "stop: stop strings and text output need a tokenizer, found none"),
        (("--ids", "1", "--presence-penalty", "1e9"), "sampling.presence_penalty: must be at most 100"),
        (("--prompt", "hello"), "has no tokenizer, which a text prompt needs"),
        (("--prompt-file", "nowhere.txt"), "--prompt-file nowhere.txt: cannot be read"),
    ],
)
def test_generate_command_refuses(checkpoint, argv, message):
    pytest.importorskip("torch")
    with pytest.raises(UserError, match=re.escape(message)):
        tele("generate", "--backend", "pt", "--checkpoint", checkpoint, *argv)


def test_a_tokenizer_of_another_size_is_refused(checkpoint, talking):
    pytest.importorskip("torch")
    with pytest.raises(UserError, match="330 pieces but model.vocab_size is 151"):
        tele("generate", "--backend", "pt", "--checkpoint", checkpoint, "--tokenizer", talking, "--prompt", "a")


def test_chat_command_over_a_pipe(backend, talking, tmp_path):
    saved = tmp_path / "talk.jsonl"
    script = f"a model\n/system answers\na\n\u6a21\u578b\n/save {saved}\n/nonsense\n/exit\nnever read\n"
    argv = ["chat", "--backend", backend, "--checkpoint", str(talking), "--max-new-tokens", "6"]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "telechat_twins.core.cli", *argv],
        input=script.encode(),
        capture_output=True,
        cwd=root,
        timeout=300,
    )
    errors = done.stderr.decode()
    assert done.returncode == 2, errors  # who pipes questions in sees no errors pass by
    assert "error: /nonsense: unknown command" in errors
    row = json.loads(saved.read_text(encoding="utf-8"))
    assert row["system"] == "answers\n"
    assert [turn["content"] for turn in row["dialog"]][::2] == ["a", "\u6a21\u578b"]
    # The same conversation through the Python interface.
    source = open_model(talking)
    tokenizer = load_tokenizer(talking, in_vocabulary=True)
    chat = Chat(Engine(runner_of(backend, source.config, source.tensor, 256), tokenizer), max_new_tokens=6)
    answers = [chat.ask("a model")]
    chat.system = "answers"
    chat.reset()
    answers += [chat.ask("a"), "".join(chat.ask("\u6a21\u578b", stream=True))]
    assert done.stdout.decode() == "".join(answer + "\n" for answer in answers)
    assert [turn["content"] for turn in row["dialog"]][1::2] == answers[1:]


# tele forward

LABELS = {"loss_mean": ("labels", None), "loss_ignore": ("labels_ignore", None), "loss_masked": ("labels", "loss_mask")}


@pytest.mark.parametrize("integer", [np.int32, np.int64])
@pytest.mark.parametrize("loss", LABELS)
@pytest.mark.parametrize("variant", TABLES)
def test_forward_command_equals_the_goldens(backend, checkpoint, io, tmp_path, variant, loss, integer):
    labels, mask = LABELS[loss]
    inputs = {"input_ids": io["input_ids"].astype(integer), "labels": io[labels].astype(integer)}
    if mask:
        inputs["loss_mask"] = io[mask]
    save_file(inputs, tmp_path / "in.safetensors")
    golden = {
        ("fp32table", "loss_mean"): "grads_fp32table",
        ("released", "loss_mean"): "grads_released",
        ("fp32table", "loss_masked"): "grads_fp32table_masked_loss",
    }.get((variant, loss))
    options = ["--table-dtype", TABLES[variant], *(["--grads"] if golden else [])]
    out = tmp_path / "out.safetensors"
    place = ("--inputs", tmp_path / "in.safetensors", "--out", out)
    assert tele("forward", "--backend", backend, "--checkpoint", checkpoint, *place, *options) == 0
    made = load_file(out)
    assert made["logits"].dtype == np.float32 and made["loss"].shape == ()
    assert relative_frobenius(made["logits"], io[f"{variant}.logits"]) < LOGITS
    assert abs(made["loss"] / io[f"{variant}.{loss}"] - 1) < LOSS
    gradients = {name.removeprefix("grad."): value for name, value in made.items() if name.startswith("grad.")}
    if golden is None:
        assert not gradients
        return
    expected = load_file(MODEL / f"{golden}.safetensors")
    assert gradients.keys() == expected.keys()
    for name, value in expected.items():
        assert gradients[name].dtype == np.float32
        assert relative_frobenius(gradients[name], value) < GRADIENT, name


def test_forward_command_without_labels(backend, checkpoint, io, tmp_path):
    save_file({"input_ids": io["input_ids"]}, tmp_path / "in.safetensors")
    place = ("--inputs", tmp_path / "in.safetensors", "--out", tmp_path / "out.safetensors")
    assert tele("forward", "--backend", backend, "--checkpoint", checkpoint, *place) == 0
    made = load_file(tmp_path / "out.safetensors")
    assert list(made) == ["logits"]
    assert relative_frobenius(made["logits"], io["fp32table.logits"]) < LOGITS
    with pytest.raises(UserError, match="--grads: gradients of the loss need labels, and .* has none"):
        tele("forward", "--backend", backend, "--checkpoint", checkpoint, *place, "--grads")


def test_forward_command_goes_beyond_the_trained_length_and_says_so(backend, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("telechat_twins.core.inference.generation._noted", set())
    case = GOLDENS / "telechat2_ntk" / "base_eq_training_step2"
    shutil.copy(case / "config.json", tmp_path)
    shutil.copy(case.parent / "weights.safetensors", tmp_path / "model.safetensors")
    golden = load_file(case / "io.safetensors")
    save_file({"input_ids": golden["input_ids"], "labels": golden["input_ids"]}, tmp_path / "in.safetensors")
    place = ("--inputs", tmp_path / "in.safetensors", "--out", tmp_path / "out.safetensors")
    for _ in range(2):
        assert tele("forward", "--backend", backend, "--checkpoint", tmp_path, *place) == 0
    assert relative_frobenius(load_file(tmp_path / "out.safetensors")["logits"], golden["fp32table.logits"]) < LOGITS
    assert capsys.readouterr().err.count("beyond max_seqlen 64") == 1


def test_a_planted_shift_of_the_labels_is_seen(backend, checkpoint, io, tmp_path):
    """The comparison above can fail: labels moved by one give another loss and other gradients."""
    save_file({"input_ids": io["input_ids"], "labels": np.roll(io["labels"], 1, axis=1)}, tmp_path / "in.safetensors")
    out = tmp_path / "out.safetensors"
    place = ("--inputs", tmp_path / "in.safetensors", "--out", out)
    assert tele("forward", "--backend", backend, "--checkpoint", checkpoint, *place, "--grads") == 0
    made, expected = load_file(out), load_file(MODEL / "grads_fp32table.safetensors")
    assert abs(made["loss"] / io["fp32table.loss_mean"] - 1) > 1e-3
    assert all(relative_frobenius(made[f"grad.{name}"], value) > 1e-2 for name, value in expected.items())


def test_chat_from_python_says_the_same_on_both_backends(talking, capsys):
    pytest.importorskip("mindspore").runtime.launch_blocking()
    pytest.importorskip("torch")
    told = {}
    for backend in backends.BACKENDS:
        model = backends.load(backend, "chat").open_chat(str(talking))
        answer, history = model.chat("What is a model?", max_new_tokens=12)
        streamed = list(model.chat("And a question?", history, stream=True, max_new_tokens=12, temperature=0.9, seed=3))
        again, longer = model.chat("And a question?", history, max_new_tokens=12, temperature=0.9, seed=3)
        assert "".join(delta for delta, _ in streamed) == again and streamed[-1][1] == longer
        assert [message["role"] for message in longer] == ["user", "bot"] * 2
        told[backend] = [answer, *(delta for delta, _ in streamed)]
    assert told["ms"] == told["pt"] and len(told["ms"]) > 3


# The documentation

PAGE = Path(__file__).resolve().parents[2] / "docs" / "generation.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture
def shown(talking, tmp_path, monkeypatch):
    """A folder with everything that the page's commands name."""
    pytest.importorskip("mindspore").runtime.launch_blocking()
    pytest.importorskip("torch")
    (tmp_path / "TeleChat2-7B").symlink_to(talking)
    (tmp_path / "prompt.txt").write_text("a model\n", encoding="utf-8")
    (tmp_path / "questions.txt").write_text("a\nb\n", encoding="utf-8")
    rows = ({"instruction": f"a model {n}", "output": "answers"} for n in range(2))
    (tmp_path / "questions.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    (tmp_path / "judge.py").write_text(textwrap.dedent(blocks("py")[0]), encoding="utf-8")
    ids = np.arange(12).reshape(2, 6)
    save_file({"input_ids": ids, "labels": ids}, tmp_path / "in.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_of_the_page_run(shown, capfd, monkeypatch):
    commands = [line for block in blocks("bash") for line in block.splitlines()]
    assert len(commands) == 10
    for line in commands:
        feed, _, piped = line.rpartition(" | ")
        words, _, name = piped.partition(" < ")
        text = shlex.split(feed)[1] if feed else Path(name).read_text() if name else ""
        monkeypatch.setattr(sys, "stdin", io_module.TextIOWrapper(io_module.BytesIO(text.encode())))
        program, *argv = shlex.split(words)
        assert program == "tele"
        assert cli.main(argv) == 0, capfd.readouterr().err
        assert capfd.readouterr().out or "--out" in argv
    assert (shown / "out.safetensors").exists()
    assert (shown / "best.jsonl").read_text(encoding="utf-8").count("\n") == 2


def test_the_python_of_the_page_runs(shown):
    found = blocks("python")
    assert len(found) == 2
    for code in found:
        (shown / "page.py").write_text(code, encoding="utf-8")
        root = PAGE.parents[1]
        start = f"import sys, runpy; sys.path.insert(0, {str(root)!r}); runpy.run_path('page.py')"
        done = subprocess.run([sys.executable, "-c", start], capture_output=True, timeout=300)
        assert done.returncode == 0, done.stderr.decode()
        assert done.stdout.count(b"\n") >= 2
    told = done.stdout.decode()
    assert "And a question? 1" in told and "length" in told
    assert "the prompt's 250 tokens and 1 new ones are 251, and the context has room for 250" in told


def test_what_was_assumed_of_a_release_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    released = json.loads((GOLDENS / "telechat2_mha/config.json").read_text())
    released["hidden_dropout"] = 0.1
    (tmp_path / "config.json").write_text(json.dumps(released))
    (tmp_path / "model.safetensors").symlink_to(GOLDENS / "telechat2_mha/weights.safetensors")
    words = ["generate", "--backend", "pt", "--checkpoint", str(tmp_path), "--ids", "5,6,7", "--max-new-tokens", "1"]
    assert cli.main(words) == 0
    assert "note: hidden_dropout 0.1 is ignored" in capsys.readouterr().err
