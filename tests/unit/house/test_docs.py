"""The documentation says what the program does: commands are understood and run, links lead somewhere."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import textwrap
from pathlib import Path

import pytest

from telechat_twins.core.data.demo_text import CHINESE_PAGES
from tests import docs
from tests.house import ROOT
from tests.support.docs_workspace import add_demo, add_release, add_text


@pytest.mark.parametrize("page", [*docs.PAGES, *docs.OTHERS])
def test_a_page_has_no_mistakes(page: str) -> None:
    complaints = docs.mistakes(ROOT, page)
    assert not complaints, "\n" + "\n".join(complaints)


PLANTED = [
    ("```bash\ntele train --backend ms --confg F\n```", "unknown argument '--confg', did you mean '--config'?"),
    ("```\ntele forward --backend pt --checkpoint D --inputs F --out G --grad\n```", "unknown argument '--grad'"),
    ("```bash\ntele generate --backend tf --checkpoint D\n```", "invalid choice: 'tf'"),
    ("```bash\ntele generate --backend pt\n```", "required: --checkpoint"),
    ("```bash\ntele tokenize trian corpus\n```", "invalid choice: 'trian'"),
    ("```bash\necho x | tele chat --backend pt --checkpont D\n```", "did you mean '--checkpoint'?"),
    ("```bash\ntele chat --backend pt \\\n  --checkpont D\n```", "did you mean '--checkpoint'?"),
    ("```bash\ntele serv --port 80\n```", "no command 'tele serv'"),
    ("```bash\ntele plan --model telechat2-7\n```", "no model preset 'telechat2-7'"),
    (
        "```bash\ntele train --backend ms --config configs/train/telechat2-tiny.yaml --set train.stesp=3\n```",
        "unknown key 'stesp'",
    ),
    ("```bash\ntele train --backend ms --config configs/train/gone.yaml\n```", "gone.yaml"),
    ("```\ntorchrun --nproc-per-node=1 pt_reference/train.py --cofig F\n```", "'--cofig', did you mean '--config'"),
    ("```\ntorchrun pt_reference/train.py --config F --outt D\n```", "'--outt', did you mean '--out'"),
    ("```\nmsrun telechat_ms/trian.py --config F\n```", "launches no script of this project"),
    ("```bash\nmake demos\n```", "no target 'demos'"),
    ("```bash\nmake test WORKRS=2\n```", "knows no variable WORKRS"),
    ("```bash\nwget example.org\n```", "'wget' is not a program of this project"),
    ("```python\ndef f(:\n```", "invalid syntax"),
    ("```yaml\ndata:\n  seq_len: 8\n  sourcs: []\n```", "did you mean 'sources'?"),
    ("```yaml\nconfig: run.yaml\ngrid:\n  learning_rate: [1.0]\n```", "grid: unknown key 'learning_rate'"),
    ("See `tele serv`.", "no command 'tele serv'"),
    ("Give `--max-new-token`.", "no option --max-new-token, nearest --max-new-tokens"),
    ("Set `health.spike_polcy`.", "no config key health.spike_polcy"),
    ("[there](gone.md)", "link to gone.md"),
    ("# A\n\n[there](#b)", "link to #b, a heading that is not there"),
    ("See `core/recipe.py`.", "core/recipe.py does not exist"),
    ("See `core/train/recipe.py`: `learning_rate`, `learning_pace`.", "core/train/recipe.py has no learning_pace"),
    ("```python\nfrom core.errors import UserError\n```", "the import name is telechat_twins.core.errors"),
]


@pytest.mark.parametrize(("text", "says"), PLANTED, ids=[says for _, says in PLANTED])
def test_a_planted_mistake_is_found(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(text + "\n")
    complaints = docs.mistakes(tmp_path, "page.md")
    assert len(complaints) == 1 and says in complaints[0], complaints


def test_a_right_page_passes(tmp_path: Path) -> None:
    page = """\
        # Right

        [here](#right) and [this](page.md#right), `tele train --resume auto`,
        `health.spike_policy=skip`, `model.safetensors`

        ```bash
        tele train --backend ms --config configs/train/telechat2-tiny.yaml \\
          --set train.steps=3 optim.warmup_steps=1   # a comment
        printf 'a # b' | tele chat --backend pt --checkpoint D < F
        make test WORKERS=1
        ```

        ```text
        tele --no-such-option in some program's output
        ```

        ```
        run/
          it's a tree, not a command
        ```
        """
    (tmp_path / "page.md").write_text(textwrap.dedent(page))
    assert docs.mistakes(tmp_path, "page.md") == []
    found = docs.commands(tmp_path, "page.md")
    assert [c.words[0] for c in found] == ["tele", "tele", "make"]
    assert found[0].text.endswith("optim.warmup_steps=1") and found[0].words[-1] == "optim.warmup_steps=1"
    assert found[1].text == "printf 'a # b' | tele chat --backend pt --checkpoint D < F"
    assert (found[1].stdin_text, found[1].stdin_file) == ("a # b", "F")


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    pages = [page.removeprefix("docs/") for page, _ in docs.PAIRS if page.startswith("docs/")]
    assert [name for name in pages if name != "index.md" and f"({name})" not in index] == []


def test_the_chinese_pages_are_text_enough_for_the_demo() -> None:
    text = "".join((ROOT / page).read_text(encoding="utf-8") for page in CHINESE_PAGES)
    assert len(text.encode()) > 20000 and text.count("\n## ") >= 10
    assert len(re.findall(r"[\u4e00-\u9fff]", text)) > 3500


def test_the_pages_show_a_real_demo_and_measured_numbers() -> None:
    shown = {}
    for page, name in (("docs/demo.md", "demo output"), ("docs/maturity.md", "measured")):
        parts = (ROOT / page).read_text(encoding="utf-8").split(f"<!-- {name} -->")
        assert len(parts) == 3, f"{page}: '<!-- {name} -->' opens and closes one place"
        shown[name] = parts[1]
    assert "== result" in shown["demo output"], "docs/demo.md: paste the output of `make demo` between its marks"
    assert "tokens/s" in shown["measured"], "docs/maturity.md: paste the table of `tele bench step` between its marks"


def test_what_is_not_run_is_shown_and_names_tests_that_exist() -> None:
    shown = {c.text for page in (*docs.PAGES, *docs.OTHERS) for c in docs.commands(ROOT, page)}
    assert [text for text in docs.NOT_RUN if text not in shown] == []
    for reason in (*docs.NOT_RUN.values(), *docs.RUN_ELSEWHERE.values()):
        for file, name in re.findall(r"(tests/\S+\.py)::(\w+)", reason):
            assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), reason


@pytest.mark.parametrize("page", sorted({c.page for c in docs.to_run("unit")}))
def test_the_light_commands_run(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the order of the page, in a folder that has what they name; those of docs/data.md make their tokenizer."""
    shown = [c for c in docs.to_run("unit") if c.page == page]
    add_text(tmp_path)
    add_release(tmp_path)
    if any("demo/" in c.text for c in shown):
        add_demo(tmp_path)
    if any("configs/" in c.text for c in shown):
        shutil.copytree(ROOT / "configs", tmp_path / "configs")
    if any("tokenize train" in c.text for c in shown):
        (tmp_path / "tokenizer.model").unlink(missing_ok=True)
    monkeypatch.chdir(tmp_path)
    for command in shown:
        assert docs.run(command, monkeypatch) == 0, f"{command.where}: {command.text}\n{capsys.readouterr().err}"
        assert capsys.readouterr().out, f"{command.where}: printed nothing"
    if page == "docs/tour.md":
        copied = {p.name: p.read_bytes() for p in Path("hf-again").iterdir()}
        assert copied == {p.name: p.read_bytes() for p in Path("demo/hf").iterdir()}


def test_the_python_of_the_checkpoint_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fence,) = (f for f in docs.fences(ROOT, "docs/checkpoints.md") if f.language == "python")
    add_release(tmp_path)
    (tmp_path / "page.py").write_text("\n".join(fence.lines))
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path("page.py")
    assert names["rows"].shape == (16, 32) and names["k"].shape == (16, 32)


def test_git_ignores_what_the_pages_write() -> None:
    """Who follows them in a checkout has nothing to commit, and `make test` does not read it as sources."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout of git")
    pages = [page for page in docs.PAGES if page in docs.FIRST or page.startswith("docs/tutorial-")]
    written: set[str] = set()
    for command in (found for page in pages for found in docs.commands(ROOT, page) if found.words[0] == "tele"):
        parser = docs.parser(command.words[1])
        given = vars(parser.parse_args(command.words[2:]))
        names = {"out", "junit", *(action.dest for action in parser._actions if action.metavar == "DST")}
        written |= {str(given[name]) for name in names if given.get(name)}
    assert {"records/npu", "hf-again", "runs/grown", "parity.xml"} <= written
    inside = [f"{name}/file" for name in written]  # a pattern of a folder knows it by what is in it
    known = subprocess.run(["git", "check-ignore", *written, *inside], cwd=ROOT, capture_output=True, text=True)
    ignored = {line.removesuffix("/file") for line in known.stdout.splitlines()}
    assert sorted(written - ignored) == []
