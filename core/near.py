"""Suggestion for a misspelt word: the most similar legal one, or what other programs call differently; for a number
that is not written in digits: how to write it."""

from __future__ import annotations

import itertools
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fractions import Fraction
from pathlib import Path

MOST = 1000  # entries of a folder that are looked at
LONGEST = 64  # characters of a word that gets a suggestion: the cost of comparing grows with the square
# Keys of a run under the names that other trainers' options have (Hugging Face's Trainer, LLaMA-Factory, Megatron-LM,
# MindFormers), and bare keys that are often typed as options.
RUN_KEYS = {
    "steps": "train.steps",
    "max_steps": "train.steps",
    "train_steps": "train.steps",
    "train_iters": "train.steps",
    "num_steps": "train.steps",
    "epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "num_train_epochs": "train.epochs",
    "batch": "train.global_batch",
    "batch_size": "train.global_batch",
    "train_batch_size": "train.global_batch",
    "global_batch": "train.global_batch",
    "global_batch_size": "train.global_batch",
    "micro_batch": "train.micro_batch",
    "micro_batch_size": "train.micro_batch",
    "per_device_train_batch_size": "train.micro_batch",
    "precision": "train.precision",
    "dtype": "train.precision",
    "bf16": "train.precision=bf16",
    "fp16": "train.precision=fp16",
    "recompute": "train.recompute",
    "gradient_checkpointing": "train.recompute=full",
    "recompute_granularity": "train.recompute",
    "seed": "train.seed",
    "freeze": "train.freeze",
    "lr": "optim.lr",
    "learning_rate": "optim.lr",
    "min_lr": "optim.min_lr",
    "schedule": "optim.schedule",
    "lr_scheduler": "optim.schedule",
    "lr_scheduler_type": "optim.schedule",
    "lr_decay_style": "optim.schedule",
    "warmup": "optim.warmup_steps",
    "warmup_steps": "optim.warmup_steps",
    "warmup_ratio": "optim.warmup_ratio",
    "weight_decay": "optim.weight_decay",
    "gradient_accumulation_steps": "train.global_batch",
    "accumulate_grad_batches": "train.global_batch",
    "adam_beta1": "optim.beta1",
    "adam_beta2": "optim.beta2",
    "adam_eps": "optim.eps",
    "adam_epsilon": "optim.eps",
    "clip_grad": "optim.clip_grad",
    "max_grad_norm": "optim.clip_grad",
    "model": "model",
    "data": "data.sources=[{path: DIR}]",
    "data_path": "data.sources=[{path: DIR}]",
    "dataset": "data.sources=[{path: DIR}]",
    "seq_len": "data.seq_len",
    "seq_length": "data.seq_len",
    "seqlen": "data.seq_len",
    "cutoff_len": "data.seq_len",
    "max_length": "data.seq_len",
    "max_seq_length": "data.seq_len",
    "save_steps": "checkpoint.every",
    "save_interval": "checkpoint.every",
    "save_total_limit": "checkpoint.keep_last",
    "report_to": "track",
    "lora_rank": "lora.rank",
    "lora_r": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_target": "lora.targets",
    "target_modules": "lora.targets",
}
# Options under the names of other programs: the first of ours that a command has.
OPTIONS = {
    "output": ("--out",),
    "output_dir": ("--out",),
    "output_path": ("--out",),
    "save": ("--out",),
    "resume_from_checkpoint": ("--resume",),
    "load": ("--resume", "--checkpoint"),
    "load_checkpoint": ("--resume", "--checkpoint"),
    "model_name_or_path": ("--init", "--checkpoint"),
    "model_path": ("--init", "--checkpoint"),
    "pretrained": ("--init", "--checkpoint"),
    "model": ("--checkpoint",),
    "adapter_name_or_path": ("--adapter",),
    "lora_path": ("--adapter",),
    "lora_modules": ("--adapter",),
    "served_model_name": ("--name",),
    "max_model_len": ("--max-len",),
    "max_length": ("--max-len", "--max-new-tokens"),
    "max_tokens": ("--max-new-tokens",),
    "tensor_parallel_size": ("--layout",),
    "nproc_per_node": ("--nproc",),
    "dtype": ("--precision",),
    "framework": ("--backend",),
    "device": ("--backend",),
    "nodes": ("--nnodes", "--devices"),
    "num_nodes": ("--nnodes", "--devices"),
    "gpus": ("--nproc", "--devices"),
    "num_gpus": ("--nproc", "--devices"),
    "world_size": ("--nproc", "--devices"),
    "tp": ("--layout",),
    "pp": ("--layout",),
    "dp": ("--layout",),
    "ckpt": ("--checkpoint", "--resume"),
    "batch": ("--micro-batch",),
    "batch_size": ("--micro-batch",),
    "num_fewshot": ("--shots",),
    "workers": ("--threads",),
    "num_workers": ("--threads",),
    "num_proc": ("--threads",),
    "overwrite": ("--force",),
    "do_sample": ("--temperature",),
    "ctx_size": ("--max-len", "--seq-len"),
    "system_prompt": ("--system",),
}
# Parts of an option's name that say no more than the others do: num_samples means --samples.
_FILLERS = frozenset({"n", "num", "number", "nr", "dir", "path", "file", "name", "random"})
_SURE, _ANY_START, _SAME_START = 0.8, 0.75, 0.65  # similarity of two options' letters; see option_like


def nearest(word: object, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The word of ``known`` most similar to ``word``, with a similarity of at least ``cutoff``; None if there is none,
    or ``word`` is too long. Other cases and hyphens, then exchanged letters, count as most similar."""
    text = str(word) if not isinstance(word, int) else ""
    if len(text) > LONGEST:
        return None
    names = [name for name in known if len(name) <= LONGEST]
    same = [name for name in names if text and _bare(name) == _bare(text)]
    exchanged = [name for name in names if text and sorted(name) == sorted(text)]
    found = same or exchanged or get_close_matches(text, names, n=1, cutoff=cutoff)
    return found[0] if found else None


_FOR_TESTS = ("tiny", "mup")  # parts of the names of models that nobody deploys
_PREFIX = 3  # letters of a word, at least, of which a name's beginning is found


def nearest_name(word: object, known: Sequence[str], cutoff: float = 0.6) -> str | None:
    """``nearest`` among names that are made of parts, such as those of models and machines: "115b" means a name with
    that part, and no other size that is spelt alike.

    Of several names with all parts of ``word``, the one with the fewest others, then one that is no model for tests,
    then the one of the commonest family: whose other parts most names have. Where none has them, the same of names that
    begin with ``word``.
    """
    wanted, parts = _parts(str(word)), {name: _parts(name) for name in known}
    common = Counter(part for found in parts.values() for part in found)
    having = [name for name in known if wanted and wanted <= parts[name]]
    if not having and len(str(word)) >= _PREFIX:
        having = [name for name in known if _bare(name).startswith(_bare(str(word)))]

    def order(name: str) -> tuple[int, bool, int]:
        others = parts[name] - wanted
        return len(others), not others.isdisjoint(_FOR_TESTS), -sum(common[part] for part in others)

    return min(having, key=order) if having else nearest(word, known, cutoff)


def _parts(name: str) -> set[str]:
    return {part for part in re.split(r"[-_/ ]+", name.lower()) if part}


def run_key(word: str) -> str | None:
    """The dotted key of a run that another trainer, or a hurried user, calls ``word`` (an option or a key); with
    "=value" where the word says that, too."""
    return RUN_KEYS.get(_bare(word))


def option_like(argument: str, known: Sequence[str]) -> str | None:
    """What is meant by an option that is not among a command's ``known`` ones: a similar option, another program's name
    for one, or an assignment of ``--set`` (where ``known`` has it with ``--config``); None if nothing is near.

    Options are compared by their letters alone: the hyphens that all of them begin with would make short ones alike. A
    slip changes a word's first letter less often than another, so less is asked of options with the same one.
    """
    name, _, value = argument.partition("=")
    if not argument.startswith("-"):  # a text by itself
        return "--prompt" if "--prompt" in known else None
    word, options = _bare(name), {_bare(option): option for option in known if option.startswith("--")}
    letters = {bare.replace("_", ""): option for bare, option in options.items()}
    if near := nearest(word.replace("_", ""), letters, cutoff=_SURE):
        return letters[near]
    if same := [option for option in OPTIONS.get(word, ()) if option in known]:
        return same[0]
    key = run_key(name) if {"--set", "--config"} <= {*known} and name.startswith("--") else None
    if key is not None:
        return "--set " + shlex.quote(key if "=" in key else f"{key}={value or 'VALUE'}")
    if found := _of_parts(word, options):
        return options[found]
    alike = [one for one in letters if one[:1] == word[:1]]
    near = nearest(word.replace("_", ""), alike, _SAME_START) or nearest(word.replace("_", ""), letters, _ANY_START)
    return letters[near] if near else None


def _of_parts(word: str, names: Iterable[str]) -> str | None:
    """The shortest of ``names`` that begins with ``word`` or has all its parts, or that has its parts but fillers."""
    parts = {*word.split("_")}

    def means(name: str) -> bool:
        others = {*name.split("_")}
        longer = parts <= others or (len(word) >= _PREFIX and name.startswith(word))
        return longer or (others < parts and parts - others <= _FILLERS)

    return min(filter(means, names), key=len, default=None)


_SUFFIXED = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?([kKmMgG])(i?)[bB]?")
_GROUPED = re.compile(r"[0-9]{1,3}(?:[,_' ][0-9]{3}){1,4}")
_PLAIN = re.compile(r"[0-9]{1,15}(?:\.[0-9]{0,15})?(?:[eE]\+?[0-9]{1,2})?")


def number_meant(text: str, whole: bool) -> str:
    """How to write the number that a text seems to be ("8k", "8,192", "1e5", "10%", "0,1"), for a message: "8192 or
    8000"; "" where it seems to be none. ``whole``: whether a whole number is wanted."""
    text = text.strip()
    sign, bare = (text[0] if text[:1] == "-" else ""), text.lstrip("+-")
    if found := _SUFFIXED.fullmatch(bare):
        number, power = Fraction(found[1]), "kmg".index(found[2].lower()) + 1
        binary, decimal = number * 1024**power, number * 1000**power
        counts = [binary] if found[3] else [binary, decimal]
        if number.denominator > 1 or int(number) & int(number) - 1:  # 8k means 8192 more often, 10k 10000
            counts.reverse()
        return " or ".join(f"{sign}{int(count)}" for count in counts if count.denominator == 1)
    if whole and _GROUPED.fullmatch(bare):
        return sign + re.sub("[^0-9]", "", bare)
    if whole and _PLAIN.fullmatch(bare) and (number := Fraction(bare)).denominator == 1 and number < 1 << 63:
        return f"{sign}{int(number)}"
    if not whole and re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})? ?%", bare):
        return f"{sign}{float(bare.rstrip('% ')) / 100:g}"
    if not whole and re.fullmatch("[0-9]{1,9},[0-9]{1,9}", bare):
        return sign + bare.replace(",", ".")
    return ""


def _bare(word: str) -> str:
    return word.lstrip("-").replace("-", "_").lower()


def near_path(path: str | Path) -> str:
    """For a message about a path that is not there: "; did you mean 'X'?", X the most similar name beside it, or ""."""
    path = Path(path)
    try:
        with os.scandir(path.parent) as entries:
            beside = [entry.name for entry in itertools.islice(entries, MOST) if not entry.name.startswith(".")]
    except (OSError, ValueError):
        return ""
    near = nearest(path.name, beside, cutoff=0.7)
    return "" if near is None or near == path.name else f"; did you mean '{path.with_name(near)}'?"
