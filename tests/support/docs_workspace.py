"""A folder that holds what the shown commands name: text, dialogues, a small model in the place of a released one."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

from telechat_twins.convert.copy import canonical_to_hf, hf_to_canonical
from telechat_twins.convert.hf.folder import HfFolder
from telechat_twins.convert.hf.peft import write_peft
from telechat_twins.convert.source import CanonicalSource, open_model
from telechat_twins.core.checkpoint.read import Contents, save_checkpoint
from telechat_twins.core.data.prepare import pack_dialogues, pack_text
from telechat_twins.core.data.tokenizer import load_tokenizer
from telechat_twins.core.data.tokenizer_training import train_tokenizer
from telechat_twins.core.model.config import ModelConfig, load_model_config
from telechat_twins.core.model.init import init_weights
from tests import docs
from tests.house import ROOT
from tests.support.adapters import modules, random_adapter
from tests.support.data_support import VOCAB_SIZE, dialogue_row, tiny_tokenizer_path, write_rows

SOURCES = ("argparse.py", "ast.py", "inspect.py", "typing.py")  # enough text for 4096 pieces


def add_text(folder: Path) -> None:
    """corpus/, more/*.jsonl, dialogues.jsonl, examples/, losses.csv."""
    shutil.copytree(ROOT / "examples", folder / "examples")
    (folder / "corpus").mkdir()
    for name in SOURCES:
        shutil.copy(Path(sysconfig.get_path("stdlib")) / name, folder / "corpus")
    (folder / "more").mkdir()
    write_rows(folder / "more" / "rows.jsonl", [{"text": f"row {n} of some text"} for n in range(20)])
    write_rows(folder / "dialogues.jsonl", [dialogue_row(n, turns=1 + n % 2) for n in range(900)])
    (folder / "losses.csv").write_text(loss_table_of_the_page(), encoding="utf-8")


def loss_table_of_the_page() -> str:
    """The table that docs/mup.md shows as losses.csv."""
    (fence,) = (f for f in docs.fences(ROOT, "docs/mup.md") if f.language == "csv")
    return "\n".join(fence.lines) + "\n"


def add_release(folder: Path) -> None:
    """TeleChat2-7B (a stand-in of the same layout), run (the same as a canonical checkpoint), tokenizer.model, and an
    adapter of the model, law-peft."""
    config = ModelConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        ffn_hidden_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        norm_eps=1e-5,
        training_seqlen=256,
        base_seqlen=256,
        max_seqlen=256,
    )
    made = save_checkpoint(
        folder / "made",
        0,
        Contents(model={"config": config.to_dict()}, weights=init_weights(config, 0, "strong").items(), trainer={}),
        keep_last=1,
    )
    source = open_model(made)
    assert isinstance(source, CanonicalSource)
    canonical_to_hf(source, folder / "TeleChat2-7B", tokenizer=tiny_tokenizer_path())
    hf_to_canonical(HfFolder(folder / "TeleChat2-7B"), folder / "run")
    shutil.copy(tiny_tokenizer_path(), folder / "tokenizer.model")
    release = open_model(folder / "TeleChat2-7B")
    write_peft(random_adapter(release, modules(config, ("q", "k", "v"))), folder / "law-peft")


def add_demo(folder: Path) -> None:
    """What `make demo` leaves behind, of less text and untrained: demo/text, tokenizer.model, tuning.jsonl and hf."""
    demo = folder / "demo"
    (demo / "text").mkdir(parents=True)
    texts = [(folder / "corpus" / name).read_text(encoding="utf-8") for name in SOURCES]
    write_rows(demo / "text" / "code.jsonl", [{"text": text} for text in texts])
    _tokenizer(demo / "tokenizer.model", tuple(texts))
    write_rows(demo / "tuning.jsonl", [{"messages": _turns(n)} for n in range(8)])
    config = load_model_config("telechat2-tiny")
    made = save_checkpoint(
        folder / "made-demo",
        0,
        Contents(model={"config": config.to_dict()}, weights=init_weights(config, 0, "strong").items(), trainer={}),
        keep_last=1,
    )
    source = open_model(made)
    assert isinstance(source, CanonicalSource)
    canonical_to_hf(source, demo / "hf", tokenizer=demo / "tokenizer.model")


_trained: dict[tuple[str, ...], bytes] = {}


def _tokenizer(path: Path, texts: tuple[str, ...]) -> None:
    """2,048 pieces of ``texts``, trained once for all workspaces of this process."""
    if texts not in _trained:
        train_tokenizer(texts, path, 2048)
        _trained[texts] = path.read_bytes()
    path.write_bytes(_trained[texts])


def _turns(n: int) -> list[dict[str, str]]:
    return [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": f"What is {n}?"},
        {"role": "assistant", "content": "A number."},
    ]


def add_packed(folder: Path) -> None:
    """What the data commands of the README leave behind, from what add_demo made: data/tiny and data/dialogues."""
    tokenizer = load_tokenizer(folder / "demo" / "tokenizer.model", in_vocabulary=True)
    pack_text([folder / "demo" / "text"], folder / "data" / "tiny", tokenizer, quiet=True)
    dialogues = folder / "examples" / "dialogues.jsonl"
    pack_dialogues([dialogues], folder / "data" / "dialogues", tokenizer, seq_len=256, quiet=True)


def add_checkout(folder: Path) -> None:
    """configs/ as a copy, because data paths count from there; the raw launchers' scripts."""
    shutil.copytree(ROOT / "configs", folder / "configs")
    for package in ("telechat_ms", "pt_reference"):
        (folder / package).symlink_to(ROOT / package)
