"""Commit protocol of a canonical checkpoint: one process or all ranks of a job, synchronous or in the background.

After one barrier the ranks communicate through files only, so a save can run in a background thread while training goes
on with its collectives:

    1. rank 0    creates the hidden folder .tmp-tele-step-N-... and the notice .saving-step-N.json, which names it
    2. all       meet at the barrier
    3. each      writes its pieces to a hidden folder inside it, syncs that and renames it to rank-R
    4. rank 0    moves the files out of all rank-R, writes JSON, assets and the manifest, syncs, renames to step-N
    5. rank 0    moves ``latest``, prunes old checkpoints, removes the notice
    6. others    find the notice gone and a manifest with its id: the save is complete

A crash before the rename in 4 leaves only hidden files, which the next save removes. A crash after it leaves a complete
step-N that ``latest`` does not name yet.
"""

from __future__ import annotations

import errno
import json
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from telechat_twins.core.checkpoint.notice import VISIBILITY_S, Notice, polls
from telechat_twins.core.checkpoint.pieces import MAX_FILE_BYTES, PieceWriter, Planned, Tensors, write_manifest
from telechat_twins.core.checkpoint.retention import forget_notices, prune, save_number, step_folders
from telechat_twins.core.checkpoint.streams import Stream, copied, in_turns
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.atomic import new_folder, write_text
from telechat_twins.core.files.safetensors import load_json
from telechat_twins.core.types import JsonObject


class SaveRanks(NamedTuple):
    """This rank's place among the ``size`` ranks of a common save.

    ``barrier`` returns when every rank has called it; a save calls it once, in the caller's thread. A save fails when
    some rank's part is not ready ``timeout_s`` seconds after rank 0's.
    """

    rank: int
    size: int
    barrier: Callable[[], None]
    timeout_s: float = 1800.0


class Asset(NamedTuple):
    """A small file of a checkpoint, given by its contents, since a file on disk may change while training goes on."""

    name: str
    data: bytes


ALONE = SaveRanks(0, 1, lambda: None)


@dataclass(frozen=True)
class Contents:
    """One rank's contribution to a checkpoint, and the ranks that save together.

    ``weights`` and ``optimizer``: whole tensors or pieces, consumed one at a time; each is handed to the disk before
    the next is requested. ``model`` and ``trainer``: JSON values. ``assets``: small files (tokenizer) kept with it.
    Every rank gives the pieces that it owns; of the other fields, rank 0's values are saved. The pieces of all ranks
    must cover each element of every tensor exactly once.

    ``planned``: this rank's pieces of both kinds, if they are known in advance. They are then hashed while they are
    written, past the page cache, and weights and optimizer are written in turns, so that both end together; otherwise
    one after the other, each file hashed when it is complete.
    """

    model: JsonObject
    weights: Tensors
    optimizer: Tensors = ()
    trainer: JsonObject | None = None
    assets: Sequence[Path | Asset] = ()
    max_file_bytes: int = MAX_FILE_BYTES
    ranks: SaveRanks = ALONE
    planned: Mapping[str, Planned] | None = None


def save_checkpoint(root: str | Path, step: int, contents: Contents, *, keep_last: int) -> Path:
    """Write ``root/step-00000100`` so that it appears complete or not at all, then move ``root/latest`` to it.

    Saving a step again replaces it. Afterwards the ``keep_last`` newest checkpoints are kept, this one among them. With
    several ranks, every rank calls this with the same ``root``, ``step`` and ``keep_last``.

    Returns the new folder when the whole checkpoint is complete, on every rank. ValueError when the pieces do not cover
    their tensors. UserError on every rank, with the space needed, when the disk of one is full; earlier checkpoints are
    intact then.
    """
    return begin_save(root, step, contents, keep_last=keep_last)()


def begin_save(root: str | Path, step: int, contents: Contents, *, keep_last: int) -> Callable[[], Path]:
    """save_checkpoint up to the barrier. The returned function does the rest, in any thread, and returns the folder."""
    folder = Path(root) / f"step-{step:08d}"

    def publish() -> None:
        # The folder stands under its name. A crash before the next line leaves ``latest`` at the checkpoint before,
        # which is pruned only after ``latest`` has moved: ``latest`` names a whole folder at every moment.
        write_text(folder.parent / "latest", folder.name + "\n")
        prune(folder.parent, folder, keep_last)
        forget_notices(folder)

    def number() -> int:
        return 1 + max(map(save_number, step_folders(folder.parent)), default=0)

    return _begin(_Save(folder, step, contents, _streams(contents), publish, number))


def write_checkpoint(
    folder: str | Path,
    step: int,
    *,
    model: JsonObject,
    weights: Tensors,
    optimizer: Tensors = (),
    trainer: JsonObject | None = None,
    assets: Sequence[Path | Asset] = (),
    max_file_bytes: int = MAX_FILE_BYTES,
    planned: Mapping[str, Planned] | None = None,
) -> Path:
    """Write one checkpoint folder atomically, from one process, without ``latest`` and pruning; see Contents."""
    contents = Contents(model, weights, optimizer, trainer, assets, max_file_bytes, planned=planned)
    return _begin(_Save(Path(folder), step, contents, _streams(contents), lambda: None))()


class Saver:
    """Saver of a run's checkpoints, one at a time; asynchronous saves are written by a background thread.

    ``last``: the last checkpoint known to be complete.
    """

    def __init__(self) -> None:
        self.last: Path | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def failed(self) -> bool:
        """Whether the background save has failed; ``wait`` raises its error."""
        return self._error is not None

    def save(self, root: str | Path, step: int, contents: Contents, *, keep_last: int, asynchronous: bool) -> None:
        """save_checkpoint, with its arguments. ``asynchronous``: all arrays are copied, then written in the background.

        First waits for the previous save and raises its error. ``asynchronous`` must be the same on all ranks.
        """
        self.wait()
        if asynchronous:
            weights, weights_plan = copied(contents.weights)
            optimizer, optimizer_plan = copied(contents.optimizer)
            plans = {"weights": weights_plan, "optimizer": optimizer_plan}
            contents = replace(contents, weights=weights, optimizer=optimizer, planned=plans)
        finish = begin_save(root, step, contents, keep_last=keep_last)
        if not asynchronous:
            self.last = finish()
            return

        def write() -> None:
            try:
                self.last = finish()
            except BaseException as error:  # raised by ``wait``
                self._error = error

        # A daemon thread: a rank that fails must be able to exit even if other ranks never finish their parts.
        self._thread = threading.Thread(target=write, name=f"save-{step}", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the background save; raises its error, once."""
        if self._thread is not None:
            self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error


@dataclass(frozen=True)
class _Save:
    """One save: its contents, its folder, and rank 0's action (``publish``) after the folder has its name."""

    folder: Path
    step: int
    contents: Contents
    streams: dict[str, Stream]
    publish: Callable[[], None]
    number: Callable[[], int | None] = lambda: None  # the save's number in its run

    @property
    def ranks(self) -> SaveRanks:
        return self.contents.ranks

    def texts(self) -> dict[str, str]:
        """The JSON files by name."""
        texts = {"model.json": _json(self.contents.model)}
        if self.contents.trainer is not None:
            texts["trainer.json"] = _json(self.contents.trainer)
        return texts

    def write_tensors(
        self, folder: Path, rank: int | None = None, watch: Callable[[], None] | None = None
    ) -> JsonObject:
        """Write all pieces of this rank to ``folder``; returns their description. ``watch`` is called between them."""
        with PieceWriter(folder, self.contents.max_file_bytes, rank, self.contents.planned) as writer:
            for kind, piece in in_turns(self.streams):
                writer.add(kind, piece)
                del piece  # otherwise it stays in memory while the next one is made
                if watch is not None:
                    watch()
        return writer.part()

    def complete(
        self, folder: Path, texts: Mapping[str, str], parts: Sequence[JsonObject], save: str | None = None
    ) -> None:
        """Write everything that is not a tensor; last the manifest, which lists size and hash of every other file."""
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        for asset in self.contents.assets:
            (folder / "assets").mkdir(exist_ok=True)
            place = folder / "assets" / asset.name
            if isinstance(asset, Asset):
                place.write_bytes(asset.data)
            else:
                shutil.copyfile(asset, place)
        write_manifest(folder, self.step, parts, save, self.number())

    def needed(self) -> int:
        """Total bytes of this rank's pieces, for the message about a full disk. Consumes the remaining pieces."""
        return sum(stream.drain() for stream in self.streams.values())


def _streams(contents: Contents) -> dict[str, Stream]:
    streams = {"weights": Stream(contents.weights), "optimizer": Stream(contents.optimizer)}
    for kind, plan in (contents.planned or {}).items():
        streams[kind].size = plan.nbytes
    return streams


def _begin(save: _Save) -> Callable[[], Path]:
    """Do the part of a save that needs the barrier; the returned function does the rest, in any thread."""
    if save.ranks.size == 1:
        return _begin_alone(save)
    return _begin_first(save) if save.ranks.rank == 0 else _begin_other(save)


def _begin_alone(save: _Save) -> Callable[[], Path]:
    texts = save.texts()

    def finish() -> Path:
        # new_folder syncs every file and folder before it renames, so the name step-N never stands for data that a
        # power failure could still lose. A crash inside the block leaves a hidden folder for the next save to remove.
        with new_folder(save.folder, lambda: save.needed() + sum(map(len, texts.values()))) as building:
            save.complete(building, texts, [save.write_tensors(building)])
        save.publish()
        return save.folder

    return finish


def _begin_first(save: _Save) -> Callable[[], Path]:
    """Rank 0's side: creates the folder, gathers the parts and publishes the outcome to the other ranks."""
    notice = Notice(save.folder)
    met = False
    try:
        with ExitStack() as entered:
            texts = save.texts()  # values that are not JSON fail here, before any rank writes
            building = entered.enter_context(new_folder(save.folder))
            # Posted before the barrier, so that every rank that passes it finds the notice of this save and not one
            # that a killed save of the same step has left.
            notice.post(building)
            met = True
            save.ranks.barrier()
            folder_to_be = entered.pop_all()
    except BaseException as error:
        notice.refuse(_reason(error, save))
        # The others are about to enter the barrier: join them, so that they pass it and read the refusal.
        if not met:
            save.ranks.barrier()
        raise

    def finish() -> Path:
        try:
            with folder_to_be:  # on a clean exit synced and renamed to step-N: the commit point; else removed
                _write_part(save, building, lambda: _raise_failure(building, save))
                parts = _gathered(save, building)
                # The manifest carries the notice's id, by which the other ranks tell this save of a step from an
                # earlier one under the same name.
                save.complete(building, texts, parts, notice.id)
            save.publish()
        except BaseException as error:
            reason = _reason(error, save)
            notice.refuse(reason)
            if isinstance(error, OSError):
                raise UserError(reason) from None
            raise
        # Last: to the other ranks, an absent notice together with a manifest that has its id means success.
        notice.withdraw()
        return save.folder

    return finish


def _begin_other(save: _Save) -> Callable[[], Path]:
    """Another rank's side: writes its part, then waits for the outcome that rank 0 publishes."""
    save.ranks.barrier()

    def finish() -> Path:
        notice = Notice(save.folder)
        building = notice.follow()
        try:
            _write_part(save, building, notice.check)
        except BaseException as error:
            reason = _reason(error, save)
            _mark_failed(building, save.ranks.rank, reason)
            if getattr(error, "errno", None) in (errno.ENOENT, errno.ESTALE) or not building.exists():
                # Rank 0 has failed before us and is removing the folder, which caused our error: report its reason.
                reason = notice.outcome(VISIBILITY_S) or reason
                shutil.rmtree(building, ignore_errors=True)  # in case our part was created after the removal
            if isinstance(error, OSError | UserError):
                raise UserError(reason) from None
            raise
        # A failed save is reported by rank 0; the time limit is for a rank 0 that died unnoticed by the launcher.
        if refusal := notice.outcome(8 * save.ranks.timeout_s):
            shutil.rmtree(building, ignore_errors=True)
            raise UserError(refusal)
        return save.folder

    return finish


def _part_name(rank: int) -> str:
    return f"rank-{rank:05d}"


def _write_part(save: _Save, building: Path, check: Callable[[], None]) -> None:
    """Write this rank's pieces and their description, which become visible together, by one rename.

    ``check`` is called once a second and raises when the save has already failed on another rank.
    """
    last = time.monotonic()

    def watch() -> None:
        nonlocal last
        if time.monotonic() - last >= 1:
            check()
            last = time.monotonic()

    # The pieces and part.json are synced under a hidden name and appear as rank-R in one rename, so rank 0 never
    # reads a part that is still being written: the folder's existence is the message that it is complete.
    place = building / _part_name(save.ranks.rank)
    try:
        with new_folder(place, save.needed) as part:
            described = save.write_tensors(part, save.ranks.rank, watch)
            (part / "part.json").write_text(json.dumps(described), encoding="utf-8")
    except UserError as error:
        raise UserError(str(error).replace(f"{place}:", f"{save.folder}: rank {save.ranks.rank}:")) from None


def _gathered(save: _Save, building: Path) -> list[JsonObject]:
    """Wait for all ranks' parts, move their files into ``building``, and return their descriptions by rank."""
    missing = list(range(save.ranks.size))
    for _ in polls(save.ranks.timeout_s):
        _raise_failure(building, save)
        missing = [rank for rank in missing if not (building / _part_name(rank)).is_dir()]
        if not missing:
            break
    else:
        raise UserError(
            f"{save.folder}: all ranks must be ready within {save.ranks.timeout_s:g} s of rank 0, rank {missing[0]} "
            f"was not ({len(missing)} of {save.ranks.size} ranks missing); nothing was replaced"
        )
    # Renames within one file system copy no data. File names contain the rank, so none collide. A crash here loses the
    # hidden folder, but no completed checkpoint.
    parts = []
    for rank in range(save.ranks.size):
        folder = building / _part_name(rank)
        parts.append(load_json(folder / "part.json", "the description of a rank's part"))
        (folder / "part.json").unlink()
        for file in list(folder.iterdir()):
            file.rename(building / file.name)
        folder.rmdir()
    return parts


def _mark_failed(building: Path, rank: int, reason: str) -> None:
    """Report a failure to rank 0 by a marker file; on a full disk by an empty one, which may still be possible."""
    marker = building / f"{_part_name(rank)}.failed"
    with suppress(OSError, UserError):
        write_text(marker, reason)
        return
    with suppress(OSError):
        marker.touch()


def _raise_failure(building: Path, save: _Save) -> None:
    for marker in sorted(building.glob("rank-*.failed")):
        reason = marker.read_text(encoding="utf-8", errors="replace")
        raise UserError(reason or f"{save.folder}: rank {int(marker.stem[5:])} failed to save (no reason recorded)")


def _reason(error: BaseException, save: _Save) -> str:
    """The error as one line for the other ranks."""
    if isinstance(error, UserError):
        return str(error)
    where = f"{save.folder}: rank {save.ranks.rank}"
    if isinstance(error, OSError):
        return f"{where}: cannot be written ({error.strerror or error}); nothing was replaced"
    return f"{where} failed to save ({type(error).__name__}: {str(error).partition(chr(10))[0]})"


def _json(value: object) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
