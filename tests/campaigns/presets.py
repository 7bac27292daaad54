"""Every task of the presets on rows of ours in the published schemas: the harness's own task code, both backends.

The real data sets cannot be downloaded on the build machines. So this shows that the presets' tasks read the published
fields, with their shots and metrics, and that both backends answer alike; it says nothing about scores.

    python -m tests.campaigns.presets --out build/presets          (needs the extra eval; about 4 minutes)
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from telechat_twins.core.cli import main as tele
from telechat_twins.core.eval.presets import PRESETS
from tests.support.harness_support import write_llama

EXAMPLES = 30  # rows of a split that gives examples: more than 25 shots need
FOUR = {"A": "red", "B": "blue", "C": "green", "D": "white"}
ZH = {"A": "红", "B": "蓝", "C": "绿", "D": "白"}
TARGETS = {"choices": ["It is red.", "It is blue."], "labels": [1, 0]}
ROWS: dict[str, dict[str, object]] = {
    "allenai/ai2_arc": {
        "id": "a",
        "question": "Which is hot?",
        "choices": {"text": ["ice", "fire"], "label": ["A", "B"]},
        "answerKey": "B",
    },
    "Rowan/hellaswag": {
        "ind": 1,
        "activity_label": "Cooking",
        "ctx_a": "A man cuts bread.",
        "ctx_b": "he",
        "ctx": "A man cuts bread. he",
        "endings": ["eats it.", "flies.", "sings.", "sleeps."],
        "label": "0",
    },
    "cais/mmlu": {"question": "Which colour?", "subject": "colours", "choices": list(FOUR.values()), "answer": 2},
    "truthfulqa/truthful_qa": {"question": "What is it?", "mc1_targets": TARGETS, "mc2_targets": TARGETS},
    "allenai/winogrande": {
        "sentence": "The cup is in the box because _ is small.",
        "option1": "cup",
        "option2": "box",
        "answer": "1",
    },
    "openai/gsm8k": {"question": "1 + 1?", "answer": "One and one.\n#### 2"},
    "openai/openai_humaneval": {
        "task_id": "HumanEval/0",
        "prompt": "def one():\n",
        "canonical_solution": "    return 1\n",
        "test": "def check(f):\n    assert f() == 1\n",
        "entry_point": "one",
    },
    "SaylorTwift/bbh": {"input": "True and False is", "target": "False"},
    "google-research-datasets/mbpp": {
        "task_id": 11,
        "text": "Write a function that returns 1.",
        "code": "def f(): return 1",
        "test_list": ["assert f() == 1"] * 3,
    },
    "google/IFEval": {
        "key": 1000,
        "prompt": "Write without commas.",
        "instruction_id_list": ["punctuation:no_comma"],
        "kwargs": [{}],
    },
    "ceval/ceval-exam": {"id": 0, "question": "什么颜色？", **ZH, "answer": "B", "explanation": ""},
    "haonan-li/cmmlu": {"Question": "什么颜色？", **ZH, "Answer": "C"},
    "clue/c3": {
        "id": 0,
        "context": ["男：你好", "女：再见"],
        "question": "谁先说？",
        "choice": ["男的", "女的"],
        "answer": "男的",
    },
    "clue/csl": {"idx": 0, "corpus_id": 1, "abst": "语言模型的研究", "keyword": ["语言", "模型"], "label": 1},
    "clue/chid": {
        "idx": 0,
        "candidates": ["一心一意", "三心二意", "画蛇添足", "守株待兔"],
        "content": ["他做事#idiom000001#，从不#idiom000002#。", "这是#idiom000003#。"],
        "answers": {"text": ["一心一意", "三心二意", "画蛇添足"], "candidate_id": [0, 1, 2]},
    },
}
METRIC = '''
import datasets
import evaluate

class CodeEval(evaluate.Metric):
    """Stand-in of the hub's code_eval: runs nothing, and calls every program wrong."""

    def _info(self):
        features = datasets.Features(
            {"predictions": datasets.Sequence(datasets.Value("string")), "references": datasets.Value("string")}
        )
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references, k=(1,), **_):
        return {f"pass@{n}": 0.0 for n in k}, {}
'''
SPLITS = ("train", "validation", "val", "dev", "test")
NAMES = {"truthfulqa/truthful_qa": ["multiple_choice"], "google-research-datasets/mbpp": ["full", "sanitized"]}


def data_names() -> dict[str, set[str | None]]:
    """By data set, the configurations that the harness's tasks name."""
    import lm_eval

    found: dict[str, set[str | None]] = {}
    for path in (key for key in ROWS if not key.startswith("clue/")):
        found[path] = set(NAMES.get(path, ()))
    folders = {"mmlu/default": "cais/mmlu", "ceval": "ceval/ceval-exam", "cmmlu": "haonan-li/cmmlu"}
    folders |= {"bbh/cot_fewshot": "SaylorTwift/bbh", "arc": "allenai/ai2_arc", "winogrande": "allenai/winogrande"}
    folders |= {"gsm8k": "openai/gsm8k"}
    for folder, path in folders.items():
        for file in (Path(lm_eval.__file__).parent / "tasks" / folder).glob("*.yaml"):
            found[path] |= set(
                re.findall(r"^['\"]?dataset_name['\"]?: *['\"]?([\w.-]+)", file.read_text(), re.MULTILINE)
            )
    return found


def write_data(folder: Path) -> None:
    """All data sets below ``folder``, the same row in every place but for a number in its text."""
    metric = folder / "evaluate-metric" / "code_eval"
    metric.mkdir(parents=True)
    # A stand-in of NLTK's table of sentence ends; the row's instruction counts no sentences.
    (folder / "nltk_data" / "tokenizers" / "punkt_tab").mkdir(parents=True)
    (metric / "code_eval.py").write_text(METRIC)
    names = {**data_names(), **{f"clue/{name}": {None} for name in ("c3", "csl", "chid")}}
    for path, configurations in names.items():
        for name in configurations or {None}:
            place = folder / path / name if name and name != "null" else folder / path
            place.mkdir(parents=True, exist_ok=True)
            for split in SPLITS:
                rows = []
                for number in range(EXAMPLES):
                    row = dict(ROWS[path])
                    for key in ("question", "Question", "input", "ctx_a", "sentence", "abst", "text"):
                        if isinstance(row.get(key), str):
                            row[key] = f"{number + 1}. {row[key]}"
                    rows.append(json.dumps(row, ensure_ascii=False) + "\n")
                (place / f"{split}.jsonl").write_text("".join(rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=2)
    parser.add_argument("--backends", nargs="+", default=["ms", "pt"])
    parser.add_argument("--presets", nargs="+", default=list(PRESETS))
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    write_llama(args.out / "model", num_layers=2)
    write_data(args.out / "data")
    options = ["--checkpoint", str(args.out / "model"), "--data", str(args.out / "data"), "--limit", str(args.limit)]
    options += ["--max-len", "1600", "--cache-tokens", "16000", "--run-unsafe-code", "--quiet"]
    for preset in args.presets:
        code = tele(
            ["eval", "--backends", *args.backends, *options, "--tasks", preset, "--out", str(args.out / preset)]
        )
        if code:
            raise SystemExit(f"{preset}: exit code {code}")
        one = args.out / preset / (args.backends[0] if len(args.backends) > 1 else "")
        print((one / "results.md").read_text())


if __name__ == "__main__":
    main()
