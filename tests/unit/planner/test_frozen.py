"""Adapters, frozen parameters and preference in the memory model: against what PyTorch saves, and what is named."""

from __future__ import annotations

import dataclasses
import importlib.util

import numpy as np
import pytest

from telechat_twins.core.model.config import load_model_config
from telechat_twins.core.model.lora import LoraConfig, lora_table
from telechat_twins.core.model.params import parameter_table
from telechat_twins.core.parallel.layout import Layout, parse_layout, stage_layers
from telechat_twins.core.parallel.traffic import Widths
from telechat_twins.core.planner.memory.activations import STATISTIC
from telechat_twins.core.planner.memory.estimate import Work, estimate, ranks_of
from telechat_twins.core.planner.memory.executor import MINDSPORE, PYTORCH, Executor, on_cpu
from telechat_twins.core.planner.memory.frozen import first_trained

TINY = load_model_config("telechat2-tiny")
ALL = ["q", "k", "v", "o", "gate", "up", "down"]
BASE = frozenset(parameter_table(TINY))
LENGTH = 56  # two rows are no matrix's rows or columns


def saved_bytes(lora: LoraConfig | None, constants: frozenset[str], precision: str, batch: int, length: int) -> int:
    """As in test_memory.py, of a model with adapters or frozen parameters; the loss by rows where it is served."""
    torch = pytest.importorskip("torch")
    from telechat_twins.core.model.lora_dropout import LoraDropout
    from telechat_twins.pt_reference import ops
    from telechat_twins.pt_reference.model import Decoder

    model = Decoder(TINY, precision, "none", lora=lora).train()
    narrow = torch.float32 if precision == "fp32" else torch.bfloat16
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.02)
        if name in constants:
            parameter.requires_grad_(False)
            if parameter.dim() == 2 and name != "embed.weight":
                parameter.data = parameter.data.to(narrow)
    ids, rope = torch.zeros(batch, length, dtype=torch.long), model.rope(np.arange(length)[None], length)
    drops = None
    if lora is not None and lora.dropout:
        drops = LoraDropout(lora.dropout, 0, 0, np.arange(batch), np.arange(length)[None])
    aside = {t.untyped_storage().data_ptr() for t in (ids, *rope, *model.parameters())}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in aside:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        blocks = ops.attention_blocks(length, length, None)
        if model.loss_head(ids.numel()) is None:
            _loss = ops.cross_entropy(model(ids, rope, blocks, dropout=drops), ids)
        else:
            _loss = model(ids, rope, blocks, dropout=drops, targets=ids)
    # The factors in the dtype of products are counted with them, not with activations.
    factors = {tuple(spec.shape) for spec in (lora_table(TINY, lora) if lora else {}).values()}
    return sum(one.untyped_storage().nbytes() for one in saved.values() if tuple(one.shape) not in factors)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "amp"])
@pytest.mark.parametrize("targets", [ALL, ["q", "v"], ["q", "up"]])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_activations_beside_adapters_are_what_autograd_saves(
    precision: str, targets: list[str], dropout: float
) -> None:
    """To the byte, but for the first block's norm: no gradient passes it, and it is counted."""
    lora = LoraConfig(rank=4, targets=targets, dropout=dropout, rank_pattern={"layers.0.*": 12})
    work = Work(LENGTH, 2, 1, precision, executor=on_cpu(PYTORCH))
    predicted = ranks_of(TINY, Layout(), work, lora, BASE)[0].activations
    width = Widths.of(precision).residual + (1 if dropout else 0)  # of its input, and of the mask
    norm = 2 * LENGTH * (TINY.hidden_size * width + STATISTIC)
    assert predicted - norm == saved_bytes(lora, BASE, precision, 2, LENGTH)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kept", [0, 2])
def test_blocks_before_the_first_trained_one_keep_nothing(precision: str, kept: int) -> None:
    """Frozen from the embedding to block ``kept`` - 1; with nothing frozen all blocks count."""
    constants = frozenset(
        name for name in BASE if kept and (name == "embed.weight" or name.split(".")[1:2] < [str(kept)])
    ) - {"norm.weight", "head.weight"}
    work = Work(LENGTH, 2, 1, precision, executor=on_cpu(PYTORCH))
    predicted = ranks_of(TINY, Layout(), work, None, constants)[0].activations
    assert predicted == saved_bytes(None, constants, precision, 2, LENGTH)
    assert first_trained(TINY, BASE, constants) == kept


def test_a_stage_without_trained_parameters_keeps_no_graphs() -> None:
    stage = [f"layers.{number}." for number in stage_layers(parse_layout("pp2"), TINY)[0]]
    half = frozenset(name for name in BASE if name == "embed.weight" or name.startswith(tuple(stage)))
    work = Work(LENGTH, 2, 4, "bf16", executor=on_cpu(MINDSPORE))
    first, last = ranks_of(TINY, parse_layout("pp2"), work, None, half)
    assert first.states["gradients"] == 0 and 0 < first.activations < last.activations / 3


def test_what_is_frozen_spares_operations() -> None:
    """Of a product forward, of two: a frozen matrix one of three; a block without gradients two, attention included."""
    whole = estimate(TINY, LENGTH)["flops_per_token"]
    head = estimate(TINY, LENGTH, constants=["head.weight"])["flops_per_token"]
    assert whole["matrices"] - head["matrices"] == 2 * TINY.vocab_size * TINY.hidden_size
    passed = [name for name in BASE if name == "embed.weight" or name.startswith("layers.")]
    alone = estimate(TINY, LENGTH, constants=passed)["flops_per_token"]
    blocks = whole["matrices"] - 6 * TINY.vocab_size * TINY.hidden_size
    assert alone["matrices"] == pytest.approx(whole["matrices"] - blocks * 2 / 3)
    assert alone["attention"] == pytest.approx(whole["attention"] / 3)


def test_a_frozen_head_has_its_loss_by_rows_only_where_the_twins_compute_it_so() -> None:
    lora = LoraConfig(rank=4)

    small = dataclasses.replace(TINY, vocab_size=64)

    def logits(precision: str = "fp32", layout: str = "single", whole: bool = False) -> int:
        work, there = Work(LENGTH, 2, 1, precision, executor=on_cpu(MINDSPORE)), parse_layout(layout)
        full, less = (ranks_of(one, there, work, lora, BASE, whole)[-1].activations for one in (TINY, small))
        return full - less

    size = 2 * LENGTH * (TINY.vocab_size - 64)
    assert logits() == 0
    assert logits(whole=True) == 4 * size
    assert logits("bf16") == 2 * size  # its operators of the loss read 16-bit logits
    assert logits("bf16", "tp2") == (4 + 2) * size // 2  # those of a divided vocabulary do not


def test_a_trained_head_has_its_loss_by_rows_only_where_the_twins_compute_it_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No logits then, but the head's gradient; where the logits are small, whole logits."""
    large = dataclasses.replace(TINY, vocab_size=TINY.vocab_size + 1024)
    columns, heads, rows = 1024, 4 * 1024 * TINY.hidden_size, 2 * LENGTH

    def more(precision: str = "fp32", layout: str = "single", executor: Executor = PYTORCH, whole: bool = False) -> int:
        """Bytes that 1,024 further rows of the vocabulary add to the activations."""
        work, there = Work(LENGTH, 2, 1, precision, executor=executor), parse_layout(layout)
        found, less = (ranks_of(one, there, work, None, frozenset(), whole)[-1].activations for one in (large, TINY))
        return found - less

    assert more(executor=on_cpu(PYTORCH)) == 4 * columns * rows, "small logits"
    by_rows(monkeypatch)
    for executor in (on_cpu(PYTORCH), on_cpu(MINDSPORE)):
        assert more(executor=executor) == more("bf16", executor=executor) == heads
        assert more(executor=executor, whole=True) == 4 * columns * rows
        assert more("fp16", executor=executor) == 2 * columns * rows
        assert more(layout="tp2", executor=executor) == 4 * columns * rows // 2
    assert more() == 4 * columns * rows, "an accelerator"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_trained_head_by_rows_keeps_what_autograd_saves(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    by_rows(monkeypatch)
    work = Work(LENGTH, 2, 1, precision, executor=on_cpu(PYTORCH))
    predicted = ranks_of(TINY, Layout(), work)[0].activations
    assert predicted == saved_bytes(None, frozenset(), precision, 2, LENGTH)
    whole = ranks_of(TINY, Layout(), work, whole_logits=True)[0].activations
    assert predicted != whole


def by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every trained head's loss by blocks of rows, in the twin and in the estimate."""
    monkeypatch.setattr("telechat_twins.core.planner.memory.frozen.trained_by_rows", lambda *_: True)
    if importlib.util.find_spec("torch"):
        monkeypatch.setattr("telechat_twins.kernels.pytorch.head_loss.trained_by_rows", lambda *_: True)


def test_the_estimate_without_logits_is_smaller_by_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 8,192 tokens: what the twins' processes were measured to save, 182 MB and 157 MB, within their tenth."""
    config = dataclasses.replace(load_model_config("telechat2-mini"), max_seqlen=8192)

    def bytes_of(executor: Executor, whole: bool) -> int:
        plan = estimate(config, 8192, 1, "fp32", fused_attention=True, executor=executor, whole_logits=whole)
        return int(plan["memory_bytes"]["total"])

    for executor, saved in ((on_cpu(PYTORCH), 182e6), (on_cpu(MINDSPORE), 157e6)):
        less = bytes_of(executor, True) - bytes_of(executor, False)
        assert abs(less - saved) < 0.1 * bytes_of(executor, False)
        assert 100e6 < less < 268e6
