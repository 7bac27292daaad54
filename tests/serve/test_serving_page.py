"""The commands and the Python of docs/serving.md, as shown but for the port."""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import shlex
import subprocess
from pathlib import Path

import pytest

from telechat_twins.core import cli
from telechat_twins.core.commands.serve import EPILOG
from tests import docs
from tests.house import ROOT
from tests.support.docs_workspace import add_release
from tests.support.serve_support import process

PAGE = "docs/serving.md"
SHOWN = "http://127.0.0.1:8000"


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    add_release(tmp_path)
    (tmp_path / "keys.txt").write_text("one-key\nanother-key\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def told(command: str, port: int, *words: str) -> str:
    """What curl prints."""
    shown = [*shlex.split(command.replace(SHOWN, f"http://127.0.0.1:{port}")), "-sS", "--fail-with-body", *words]
    return subprocess.run(shown, capture_output=True, text=True, check=True, timeout=60).stdout


def test_the_commands_of_the_page_run(workspace, capsys):
    pytest.importorskip("mindspore")
    pytest.importorskip("torch")
    commands = [command.text for command in docs.commands(ROOT, PAGE)]
    plain, limited, convert = (text for text in commands if text.startswith("tele"))
    asked = [text for text in commands if text.startswith("curl")]
    assert len(asked) == 5 and len(commands) == 8
    with process(*shlex.split(plain)[2:]) as (_, port):
        models, chat, stream, health, metrics = (told(text, port) for text in asked)
        assert json.loads(models)["data"][0]["id"] == "TeleChat2-7B"
        assert json.loads(chat)["choices"][0]["message"]["role"] == "assistant"
        assert "data: {" in stream and stream.endswith("data: [DONE]\n\n")
        assert json.loads(health) == {"status": "ok"} and "tele_running 0" in metrics
        run_python(port)
        # The example of `tele serve --help`.
        example = EPILOG[EPILOG.index("curl") : EPILOG.index("\n\nRoutes")].replace("\\\n", "")
        example = example.replace('"model": "model"', '"model": "TeleChat2-7B"')
        assert json.loads(told(example, port))["object"] == "chat.completion"
    words = [word for word in shlex.split(limited)[2:] if word not in ("--host", "0.0.0.0")]
    with process(*words) as (_, port):
        with pytest.raises(subprocess.CalledProcessError) as refused:
            told(asked[0], port)
        assert "an API key is required" in refused.value.stdout
        assert "TeleChat2-7B" in told(asked[0], port, "-H", "Authorization: Bearer another-key")
    assert cli.main(shlex.split(convert)[1:]) == 0, capsys.readouterr().err


def run_python(port: int) -> None:
    """The page's Python, in this process."""
    pytest.importorskip("openai")
    (fence,) = (fence for fence in docs.fences(ROOT, PAGE) if fence.language == "python")
    code = "\n".join(fence.lines).replace(SHOWN, f"http://127.0.0.1:{port}")
    Path("page.py").write_text(code)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        names = runpy.run_path("page.py")
    assert names["answer"].choices[0].message.content in printed.getvalue()
    assert len(names["drawn"].choices) == 2
