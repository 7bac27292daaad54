"""``tele forward``: logits, loss and gradients of one batch, read from a file and written to a file."""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from telechat_twins.core import backends
from telechat_twins.core.commands.options import read_layout
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.safetensors import SafetensorsFile, write_atomically
from telechat_twins.core.launch.launcher import COLLECTIVE_TIMEOUT_S
from telechat_twins.core.model.batch import IGNORE, Batch, shift_labels
from telechat_twins.core.model.config import PRECISIONS, ModelConfig, with_table_dtype
from telechat_twins.core.model.xpos_range import say_xpos_range
from telechat_twins.core.near import nearest
from telechat_twins.core.parallel.layout import Layout, check_layout
from telechat_twins.core.parity.worker import Task, collect, launch_tasks, write_batch
from telechat_twins.core.shown import message_line, printable
from telechat_twins.core.types import JsonObject

NAMES = ("input_ids", "labels", "loss_mask")
MAX_INPUT_BYTES = 1 << 26  # of one array: 8 million ids, whose logits exceed the memory of any machine


EPILOG = """\
The loss needs labels in F. Position t predicts labels[t+1]; the loss is the mean over positions whose label is not -100
and, with loss_mask, whose loss_mask[t+1] is 1.

examples:
  tele forward --backend pt --checkpoint model --inputs batch.safetensors --out result.safetensors
  tele forward --backend ms --checkpoint model --inputs batch.safetensors --out result.safetensors --grads
  tele forward --backend ms --checkpoint model --inputs batch.safetensors --out result.safetensors --layout tp2.pp2
      in 4 processes, each with a part of the model; the same result up to rounding (layouts: see `tele train --help`)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tele forward``."""
    parser.epilog = EPILOG
    parser.add_argument(
        "--backend", required=True, choices=sorted(backends.BACKENDS), help="ms: MindSpore, pt: PyTorch"
    )
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="released HF folder or canonical checkpoint")
    parser.add_argument(
        "--inputs",
        required=True,
        metavar="F",
        help="safetensors: input_ids [B,S]; labels [B,S] (not shifted; -100: ignored); loss_mask [B,S] of 0 and 1",
    )
    parser.add_argument("--out", required=True, metavar="G", help="safetensors: logits, loss, grad.<name>")
    parser.add_argument(
        "--grads",
        action="store_true",
        help="also d loss / d weight, in the checkpoint's names and packing (in fp16, loss scaling is used and undone)",
    )
    parser.add_argument("--precision", default="fp32", choices=PRECISIONS, help="arithmetic (fp32)")
    parser.add_argument("--table-dtype", choices=("float32", "float16"), help="rotary tables; float16 as released")
    parser.add_argument("--layout", metavar="TEXT", help="divide model and sequences among processes, e.g. tp2.ring2")
    parser.add_argument("--nproc", type=int, metavar="N", help="processes (default: as many as the layout needs)")
    parser.add_argument(
        "--timeout",
        type=float,
        metavar="SECONDS",
        help=f"with a layout: longest time of a rank in a collective ({COLLECTIVE_TIMEOUT_S:.0f}; 0: no limit)",
    )


def run(args: argparse.Namespace) -> int:
    """Read the inputs, compute, and write the output file atomically."""
    from telechat_twins.convert.source import open_model
    from telechat_twins.core.inference.generation import note_length
    from telechat_twins.core.inference.load import without_padding

    out = check_output(args.out, args.inputs)
    layout = read_layout(args.layout, args.nproc, args.timeout)
    arrays = read_inputs(args.inputs)
    backend = backends.load(args.backend, "forward") if layout.world == 1 else None
    source = open_model(args.checkpoint)
    for note in source.notes:
        print(f"note: {message_line(note)}", file=sys.stderr)
    check_not_of_model(out, source.files())
    # By the tokenizer beside the weights, so that the loss is that of training (vocab_tokens).
    config = without_padding(with_table_dtype(source.config, args.table_dtype), source.tokenizer_path, own=True)
    batch = make_batch(arrays, config, args.inputs)
    has_loss = "labels" in arrays
    if args.grads and not has_loss:
        raise UserError(f"--grads: gradients of the loss need labels, and {args.inputs} has none; add labels to it")
    note_length(config, batch.input_ids.shape[1])
    say_xpos_range(config, args.precision, batch.input_ids.shape[1])
    if backend is not None:
        result = backend.run(config, source.tensor, batch, args.precision, args.grads)
    else:
        check_layout(layout, config, seq_len=batch.input_ids.shape[1])
        code, result = run_layout(args, config, batch, layout)
        if code:
            return code

    tensors = {"logits": np.asarray(result["logits"], np.float64 if args.precision == "fp64" else np.float32)}
    if has_loss:
        tensors["loss"] = np.asarray(result["loss"], np.float64)
    if args.grads:
        tensors |= {f"grad.{name}": value for name, value in source.export(result["grads"]).items()}
    write_atomically(out, tensors)
    if has_loss and not math.isfinite(tensors["loss"]):
        print(
            f"warning: the loss is {float(tensors['loss'])}; --precision {args.precision} may overflow", file=sys.stderr
        )
    B, S = batch.input_ids.shape
    loss = f", loss {float(tensors['loss']):.6f} over {batch.num_targets} targets" if has_loss else ""
    if args.grads and args.precision == "fp16":
        exponent = round(math.log2(result["loss_scale"]))
        loss += f", gradients computed with loss scale 2^{exponent} and divided by it"
    print(f"{args.out}: logits [{B}, {S}, {config.vocab_size}]{loss}", file=sys.stderr)
    return 0


def run_layout(args: argparse.Namespace, config: ModelConfig, batch: Batch, layout: Layout) -> tuple[int, JsonObject]:
    """``forward.run`` of a backend in a layout's processes. Returns the launcher's exit code and, if 0, the result.

    After a failure of a rank (code 1) the folder with the logs is kept; the launcher has printed its name.
    """
    from telechat_twins.convert.parity_rank import SCRIPT

    folder = Path(tempfile.mkdtemp(prefix="tele-forward-"))
    code = 0
    try:
        task = Task(
            name="forward",
            model=config,
            layout=layout,
            batch=write_batch(folder / "batch.safetensors", batch),
            weights=str(Path(args.checkpoint).resolve()),
            precision=args.precision,
            logits=True,
            gradients=args.grads,
        )
        code = launch_tasks(args.backend, [task], folder, script=SCRIPT, collective_timeout=args.timeout)
        if code:
            return code, {}
        found = collect(folder / "0", layout.world)
        if found.problems:
            raise RuntimeError(f"layout {layout.name}: {'; '.join(found.problems)}")
        return 0, {
            "logits": found.logits,
            "loss": found.losses[0],
            "grads": found.gradients,
            "loss_scale": found.loss_scale,
        }
    finally:
        if code != 1:
            shutil.rmtree(folder, ignore_errors=True)


def read_inputs(path: str) -> dict[str, np.ndarray]:
    """The arrays of NAMES in the file; others are ignored with a note.

    UserError when the file is missing, truncated or not a safetensors file, and for a name that looks misspelt.
    """
    file = SafetensorsFile(path)
    found = list(file.tensors)
    for name in set(NAMES) & set(found):
        if (size := file.info(name).nbytes) > MAX_INPUT_BYTES:
            raise UserError(f"--inputs {path}: {name} must have at most {MAX_INPUT_BYTES} bytes, found {size}")
    arrays = {name: file.read(name) for name in NAMES if name in found}
    others = sorted(set(found) - set(NAMES))
    for name in others[:100]:
        if near := nearest(name, [n for n in NAMES if n not in arrays], cutoff=0.8):
            raise UserError(f"--inputs {path}: unknown array '{name}'; did you mean '{near}'?")
    if "input_ids" not in arrays:
        raise UserError(f"--inputs {path}: must have input_ids, found {', '.join(others[:100]) or 'no array'}")
    if others:
        print(printable(f"note: {path}: not used: {', '.join(others[:100])}"), file=sys.stderr)
    return arrays


def make_batch(arrays: dict[str, np.ndarray], config: ModelConfig, path: str) -> Batch:
    """The inputs, checked, as a Batch with shifted labels; without labels every target is IGNORE.

    UserError, naming array, value and index, for a wrong type or shape, an id outside the vocabulary, a mask value
    other than 0 and 1, a mask without labels, and labels without a single target.
    """
    ids = arrays["input_ids"]
    if ids.ndim != 2 or 0 in ids.shape:
        raise UserError(f"{path}: input_ids must have shape [B, S] with B, S >= 1, found {list(ids.shape)}")
    for name in ("input_ids", "labels"):
        if name in arrays and arrays[name].dtype not in (np.int32, np.int64):
            raise UserError(f"{path}: {name} must be int32 or int64, found {arrays[name].dtype}")
    for name in ("labels", "loss_mask"):
        if name in arrays and arrays[name].shape != ids.shape:
            raise UserError(
                f"{path}: {name} must have the shape of input_ids, {list(ids.shape)}, found {list(arrays[name].shape)}"
            )
    outside = (ids < 0) | (ids >= config.vocab_size)
    _refuse(path, "input_ids", ids, outside, f"outside the vocabulary of {config.vocab_size}")
    positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape).copy()
    targets = np.full(ids.shape, IGNORE, np.int32)
    mask = arrays.get("loss_mask")
    if mask is not None:
        if "labels" not in arrays:
            raise UserError(f"{path}: loss_mask needs labels, found none; add labels")
        _refuse(path, "loss_mask", mask, (mask != 0) & (mask != 1), "neither 0 nor 1")
    if "labels" in arrays:
        labels = arrays["labels"]
        outside = ((labels < 0) | (labels >= config.vocab_size)) & (labels != IGNORE)
        _refuse(path, "labels", labels, outside, f"neither {IGNORE} nor inside the vocabulary of {config.vocab_size}")
        targets = shift_labels(labels, mask)
        if not (targets != IGNORE).any():
            raise UserError(
                f"{path}: at least one label must count in the loss, found none (position t predicts labels[t+1], so "
                f"the first of a row never counts); give labels other than {IGNORE}, unmasked, in rows of 2 tokens or "
                "more"
            )
    return Batch(ids.astype(np.int32), targets.astype(np.int32), positions)


def _refuse(path: str, name: str, array: np.ndarray, bad: np.ndarray, why: str) -> None:
    if bad.any():
        place = tuple(int(i) for i in np.argwhere(bad)[0])
        raise UserError(f"{path}: {name}[{', '.join(map(str, place))}] is {array[place]}, {why}")


def check_output(out: str, inputs: str) -> Path:
    """The output path, checked before long work: its folder exists, and it is not the input."""
    path = Path(out)
    if path.is_dir():
        raise UserError(f"--out {out}: must be a file, found a folder; give the name of a file")
    if not path.parent.is_dir():
        raise UserError(f"--out {out}: its folder {path.parent} does not exist; create it first")
    if Path(inputs).exists() and path.exists() and path.samefile(inputs):
        raise UserError(f"--out {out}: must not be the file of --inputs; give another")
    return path


def check_not_of_model(out: Path, files: Iterable[Path]) -> None:
    """UserError when the output would replace a file of the checkpoint."""
    if out.exists() and any(file.exists() and out.samefile(file) for file in files):
        raise UserError(f"--out {out}: must not be a file of the checkpoint; give another")
