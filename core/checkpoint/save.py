"""Saving a canonical checkpoint: by one process or by all ranks of a job together, at once or in the background.

Ranks that save together share a folder and, after one barrier, nothing else: they speak through files. Rank 0 makes the
folder under a hidden name and leaves a notice of it; every rank writes its pieces and, last, publishes its part; rank 0
gathers the parts, writes the manifest, renames the folder and removes the notice, by which the others know the outcome.
So the same save runs in a background thread while the framework's collectives go on.
"""

from __future__ import annotations

import errno
import json
import logging
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from telechat_twins.core.checkpoint.notice import _SIGHT_S, _Notice, _polls
from telechat_twins.core.checkpoint.pieces import MAX_FILE_BYTES, PieceWriter, Planned, Tensors, write_manifest
from telechat_twins.core.checkpoint.streams import _copied, _in_turns, _Stream
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.atomic import mark_lives, new_folder, remove_folder, write_text
from telechat_twins.core.files.safetensors import load_json
from telechat_twins.core.types import JsonObject

STEP_FOLDER = re.compile(r"step-(\d{8,})")
_NUMBER = re.compile(r'^ "number": (\d{1,18}),$', re.MULTILINE)
_LEFT = re.compile(r"\.saving-step-\d{8,}\.json|\.(latest|\.?saving-step-\d{8,}\.json)-\d+")

_log = logging.getLogger(__name__)


class Ranks(NamedTuple):
    """Which of ``size`` ranks this one is in a common save.

    ``barrier`` returns when every rank has called it; it is called once a save, in the caller's thread. A save is given
    up when a rank is not ready ``timeout_s`` after rank 0.
    """

    rank: int
    size: int
    barrier: Callable[[], None]
    timeout_s: float = 1800.0


class Asset(NamedTuple):
    """A small file that is kept with a checkpoint, by its contents: a file may be altered while training goes on."""

    name: str
    data: bytes


ALONE = Ranks(0, 1, lambda: None)


def save_checkpoint(
    root: str | Path,
    step: int,
    *,
    model: JsonObject,
    weights: Tensors,
    optimizer: Tensors,
    trainer: JsonObject | None,
    keep_last: int,
    assets: Iterable[Path | Asset] = (),
    max_file_bytes: int = MAX_FILE_BYTES,
    ranks: Ranks = ALONE,
) -> Path:
    """Write ``root/step-00000100`` so that it appears complete or not at all, then move ``root/latest`` to it.

    ``weights`` and ``optimizer`` are whole tensors or pieces, taken one at a time; each is on its way to disk before
    the next is asked for. ``model`` and ``trainer`` are JSON values. ``assets`` are small files (tokenizer) kept with
    the checkpoint. Saving a step again replaces it. Afterwards only the ``keep_last`` newest checkpoints stay, this one
    always.

    With ``ranks`` every rank calls this with the same ``root`` and ``step`` and the pieces that it owns; of the rest,
    rank 0's arguments count. The pieces of all ranks must make up each tensor, every element once (ValueError).

    Returns the new folder, on every rank only when all of it is there. UserError on every rank, with the space needed,
    when the disk of one is full: the checkpoints before are intact.
    """
    finish = begin_save(
        root,
        step,
        model=model,
        weights=weights,
        optimizer=optimizer,
        trainer=trainer,
        keep_last=keep_last,
        assets=assets,
        max_file_bytes=max_file_bytes,
        ranks=ranks,
    )
    return finish()


def begin_save(
    root: str | Path,
    step: int,
    *,
    model: JsonObject,
    weights: Tensors,
    optimizer: Tensors,
    trainer: JsonObject | None,
    keep_last: int,
    assets: Iterable[Path | Asset] = (),
    max_file_bytes: int = MAX_FILE_BYTES,
    ranks: Ranks = ALONE,
) -> Callable[[], Path]:
    """save_checkpoint up to the barrier; the function returned does the rest, in any thread, and returns the folder."""
    folder = Path(root) / f"step-{step:08d}"

    def publish() -> None:
        write_text(folder.parent / "latest", folder.name + "\n")
        _prune(folder.parent, folder, keep_last)
        _forget_notices(folder)

    def number() -> int:
        return 1 + max(map(_save_number, _saved(folder.parent)), default=0)

    streams = {"weights": _Stream(weights), "optimizer": _Stream(optimizer)}
    job = _Job(folder, step, model, trainer, streams, tuple(assets), max_file_bytes, ranks, publish, number=number)
    return _begin(job)


def write_checkpoint(
    folder: str | Path,
    step: int,
    *,
    model: JsonObject,
    weights: Tensors,
    optimizer: Tensors = (),
    trainer: JsonObject | None = None,
    assets: Iterable[Path | Asset] = (),
    max_file_bytes: int = MAX_FILE_BYTES,
    ranks: Ranks = ALONE,
    planned: Mapping[str, Planned] | None = None,
) -> Path:
    """Write one checkpoint folder atomically, without ``latest`` and pruning; arguments as in save_checkpoint.

    ``planned``: the pieces of both kinds, where they are known before they are made. They are then written past the
    file cache, and the kinds are taken in turns, so that they end together, and else one after the other.
    """
    streams = {"weights": _Stream(weights), "optimizer": _Stream(optimizer)}
    for kind, plan in (planned or {}).items():
        streams[kind].size = plan.nbytes
    job = _Job(Path(folder), step, model, trainer, streams, tuple(assets), max_file_bytes, ranks, lambda: None, planned)
    return _begin(job)()


class Saver:
    """Saves of one run, one after another; those asked to be asynchronous are written by a background thread.

    ``last`` is the last checkpoint known to be complete.
    """

    def __init__(self) -> None:
        self.last: Path | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def failed(self) -> bool:
        """Whether the save in the background is known to have failed; ``wait`` raises its error."""
        return self._error is not None

    def save(
        self, root: str | Path, step: int, *, asynchronous: bool, weights: Tensors, optimizer: Tensors, **rest: Any
    ) -> None:
        """save_checkpoint, with its arguments. ``asynchronous``: all arrays are copied, then written in the background.

        Waits for the save before, and raises its error. All ranks must agree about ``asynchronous``.
        """
        self.wait()
        if asynchronous:
            weights, optimizer = _copied(weights), _copied(optimizer)
        finish = begin_save(root, step, weights=weights, optimizer=optimizer, **rest)
        if not asynchronous:
            self.last = finish()
            return

        def write() -> None:
            try:
                self.last = finish()
            except BaseException as error:  # raised where the owner of this object waits
                self._error = error

        # A daemon: a rank that failed must be able to end, even when the others never finish their parts.
        self._thread = threading.Thread(target=write, name=f"save-{step}", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return when nothing is being written; raises the error of the background save once."""
        if self._thread is not None:
            self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error


@dataclass(frozen=True)
class _Job:
    """One save: what to write where, with whom, and what rank 0 does when it stands."""

    folder: Path
    step: int
    model: JsonObject
    trainer: JsonObject | None
    streams: dict[str, _Stream]
    assets: tuple[Path | Asset, ...]
    max_file_bytes: int
    ranks: Ranks
    publish: Callable[[], None]
    planned: Mapping[str, Planned] | None = None
    number: Callable[[], int | None] = lambda: None  # which save of its run this one is

    def texts(self) -> dict[str, str]:
        """The JSON files by name."""
        texts = {"model.json": _json(self.model)}
        if self.trainer is not None:
            texts["trainer.json"] = _json(self.trainer)
        return texts

    def write_tensors(
        self, folder: Path, rank: int | None = None, watch: Callable[[], None] | None = None
    ) -> JsonObject:
        """All pieces of this rank into ``folder``; their description. ``watch`` is called between them."""
        with PieceWriter(folder, self.max_file_bytes, rank, self.planned) as writer:
            for kind, piece in _in_turns(self.streams):
                writer.add(kind, piece)
                del piece  # or it would stay in memory while the next one is made
                if watch is not None:
                    watch()
        return writer.part()

    def complete(
        self, folder: Path, texts: Mapping[str, str], parts: Sequence[JsonObject], save: str | None = None
    ) -> None:
        """Everything that is not a tensor."""
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        for asset in self.assets:
            (folder / "assets").mkdir(exist_ok=True)
            place = folder / "assets" / asset.name
            if isinstance(asset, Asset):
                place.write_bytes(asset.data)
            else:
                shutil.copyfile(asset, place)
        write_manifest(folder, self.step, parts, save, self.number())

    def needed(self) -> int:
        """Bytes of this rank's pieces. For when the disk is full and nothing will be saved: asks for all the rest."""
        return sum(stream.drain() for stream in self.streams.values())


def _begin(job: _Job) -> Callable[[], Path]:
    """Do what needs the other ranks' presence; the function returned does the rest, in any thread."""
    if job.ranks.size == 1:
        return _begin_alone(job)
    return _begin_first(job) if job.ranks.rank == 0 else _begin_other(job)


def _begin_alone(job: _Job) -> Callable[[], Path]:
    texts = job.texts()

    def finish() -> Path:
        with new_folder(job.folder, lambda: job.needed() + sum(map(len, texts.values()))) as building:
            job.complete(building, texts, [job.write_tensors(building)])
        job.publish()
        return job.folder

    return finish


def _begin_first(job: _Job) -> Callable[[], Path]:
    """Rank 0: makes the folder, gathers the parts, and tells the others how it ended."""
    notice = _Notice(job.folder)
    met = False
    try:
        with ExitStack() as entered:
            texts = job.texts()
            building = entered.enter_context(new_folder(job.folder))
            notice.post(building)
            met = True
            job.ranks.barrier()
            folder_to_be = entered.pop_all()
    except BaseException as error:
        notice.refuse(_told(error, job))
        if not met:
            job.ranks.barrier()
        raise

    def finish() -> Path:
        try:
            with folder_to_be:
                _write_part(job, building, lambda: _raise_failure(building, job))
                parts = _gathered(job, building)
                job.complete(building, texts, parts, notice.id)
            job.publish()
        except BaseException as error:
            told = _told(error, job)
            notice.refuse(told)
            if isinstance(error, OSError):
                raise UserError(told) from None
            raise
        notice.withdraw()
        return job.folder

    return finish


def _begin_other(job: _Job) -> Callable[[], Path]:
    """Any other rank: writes its part, then waits for rank 0's word."""
    job.ranks.barrier()

    def finish() -> Path:
        notice = _Notice(job.folder)
        building = notice.follow()
        try:
            _write_part(job, building, notice.check)
        except BaseException as error:
            told = _told(error, job)
            _mark_failed(building, job.ranks.rank, told)
            if getattr(error, "errno", None) in (errno.ENOENT, errno.ESTALE) or not building.exists():
                # Rank 0 gave up first and is taking the folder away: its word explains our error.
                told = notice.outcome(_SIGHT_S) or told
                shutil.rmtree(building, ignore_errors=True)  # should our part have come after that
            if isinstance(error, OSError | UserError):
                raise UserError(told) from None
            raise
        # Rank 0 says when it is lost; the limit is for one that died and a launcher that did not notice.
        if refusal := notice.outcome(8 * job.ranks.timeout_s):
            shutil.rmtree(building, ignore_errors=True)
            raise UserError(refusal)
        return job.folder

    return finish


def _part_name(rank: int) -> str:
    return f"rank-{rank:05d}"


def _write_part(job: _Job, building: Path, check: Callable[[], None]) -> None:
    """This rank's pieces and their description, which appear beside those of the others in one step.

    ``check`` raises when the save is lost already; it is called once a second.
    """
    last = time.monotonic()

    def watch() -> None:
        nonlocal last
        if time.monotonic() - last >= 1:
            check()
            last = time.monotonic()

    place = building / _part_name(job.ranks.rank)
    try:
        with new_folder(place, job.needed) as part:
            described = job.write_tensors(part, job.ranks.rank, watch)
            (part / "part.json").write_text(json.dumps(described), encoding="utf-8")
    except UserError as error:
        raise UserError(str(error).replace(f"{place}:", f"{job.folder}: rank {job.ranks.rank}:")) from None


def _gathered(job: _Job, building: Path) -> list[JsonObject]:
    """The descriptions of all parts, in rank order, when they are there; their files move into ``building``."""
    missing = list(range(job.ranks.size))
    for _ in _polls(job.ranks.timeout_s):
        _raise_failure(building, job)
        missing = [rank for rank in missing if not (building / _part_name(rank)).is_dir()]
        if not missing:
            break
    else:
        raise UserError(
            f"{job.folder}: rank {missing[0]} was not ready {job.ranks.timeout_s:g} s after rank 0 "
            f"({len(missing)} of {job.ranks.size} ranks missing); nothing was replaced"
        )
    parts = []
    for rank in range(job.ranks.size):
        folder = building / _part_name(rank)
        parts.append(load_json(folder / "part.json", "the description of a rank's part"))
        (folder / "part.json").unlink()
        for file in list(folder.iterdir()):
            file.rename(building / file.name)
        folder.rmdir()
    return parts


def _mark_failed(building: Path, rank: int, told: str) -> None:
    """Let rank 0 know, even on a full disk, where a name may still be made though nothing can be written."""
    marker = building / f"{_part_name(rank)}.failed"
    with suppress(OSError, UserError):
        write_text(marker, told)
        return
    with suppress(OSError):
        marker.touch()


def _raise_failure(building: Path, job: _Job) -> None:
    for marker in sorted(building.glob("rank-*.failed")):
        told = marker.read_text(encoding="utf-8", errors="replace")
        raise UserError(told or f"{job.folder}: rank {int(marker.stem[5:])} could not save nor say why")


def _told(error: BaseException, job: _Job) -> str:
    """One line for the other ranks."""
    if isinstance(error, UserError):
        return str(error)
    where = f"{job.folder}: rank {job.ranks.rank}"
    if isinstance(error, OSError):
        return f"{where}: cannot be written ({error.strerror or error}); nothing was replaced"
    return f"{where} could not save ({type(error).__name__}: {str(error).partition(chr(10))[0]})"


def _saved(root: Path) -> list[Path]:
    """The step folders of a run."""
    return [p for p in root.iterdir() if STEP_FOLDER.fullmatch(p.name) and (p / "manifest.json").is_file()]


def _save_number(folder: Path) -> int:
    """Which save of its run a checkpoint was; 0 where that was not counted yet, or its manifest cannot be read."""
    try:
        with open(folder / "manifest.json", encoding="utf-8") as file:
            head = file.read(1000)
            if found := _NUMBER.search(head):  # where write_manifest puts it; the rest may be megabytes
                return int(found[1])
            number = json.loads(head + file.read()).get("number", 0)
        return number if type(number) is int else 0
    except (OSError, ValueError, AttributeError):
        return 0


def _prune(root: Path, newest: Path, keep_last: int) -> None:
    """Keep ``newest`` and the ``keep_last`` - 1 saved last before it.

    Not those of the highest steps, since a run may go back to an older one, nor by the time of their files, since
    clocks are set and files copied: by their number. Those without one were saved before all others, in the order of
    time.
    """
    others = [p for p in _saved(root) if p != newest]
    others.sort(key=lambda p: (_save_number(p), (p / "manifest.json").stat().st_mtime_ns, p.name), reverse=True)
    for folder in others[max(keep_last - 1, 0) :]:
        try:
            remove_folder(folder)
        except OSError as error:
            _log.warning("%s: old checkpoint could not be removed (%s)", folder, error.strerror)


def _forget_notices(folder: Path) -> None:
    """Remove the notices of saves that were given up or killed (that of this save goes last), and what is left of files
    that an earlier version of this program was writing when it was killed."""
    own = _Notice(folder).path
    for left in folder.parent.glob(".*"):
        if left.name != own.name and _LEFT.fullmatch(left.name):
            pid = left.name.rpartition("-")[2]
            if left.suffix == ".json" or not mark_lives(pid):
                left.unlink(missing_ok=True)


def _json(value: object) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
