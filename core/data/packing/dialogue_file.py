"""Dialogues of several files by number, read from disk one at a time."""

from __future__ import annotations

import json
import tempfile
from array import array
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import BinaryIO, overload

from telechat_twins.core.data.dialogues import Dialogue, parse_dialogue
from telechat_twins.core.data.forms.formats import JSON, LINES, form_of
from telechat_twins.core.data.forms.json_rows import parse_row, raw_rows, row_place
from telechat_twins.core.data.forms.streams import UTF8, OnBytes, check_encoding, open_file
from telechat_twins.core.data.kinds.fields import typed
from telechat_twins.core.data.kinds.messages import Reading
from telechat_twins.core.data.rows import read_rows
from telechat_twins.core.errors import UserError


class DialogueFile(Sequence[Dialogue]):
    """The dialogues of several files, in order or by number.

    Holds five integers and a flag a row, and no text: JSON files in UTF-8 are read where they lie; rows of tables, of
    compressed files and of other encodings are first written to a temporary file of JSON lines in ``spool`` (default:
    the system's folder). ``on_bytes`` receives the size of every row that is read.
    """

    def __init__(
        self,
        files: Sequence[Path],
        on_bytes: OnBytes | None = None,
        ignore: Collection[str] = (),
        reading: Reading | None = None,
        encoding: str = UTF8,
        spool: Path | None = None,
    ):
        self.on_bytes = on_bytes
        self._reading = reading if reading is not None else Reading(frozenset(ignore))
        self._files = list(files)
        self._file, self._item = array("i"), array("q")
        self._offset, self._size, self._line = array("q"), array("q"), array("q")
        # Rows are noticed once, though they may be read again.
        again = self._reading
        self._again = Reading(again.ignore, again.reasoning, again.kind, again.columns)
        self._seen = bytearray()
        self._handle: tuple[int, BinaryIO] | None = None
        self._spool: BinaryIO | None = None
        plain = check_encoding(encoding) in (UTF8, "utf-8-sig")
        for n, path in enumerate(self._files):
            form = form_of(path)
            if form.name in (LINES, JSON) and not form.compression and plain:
                for row in raw_rows(path):
                    self._add(n, row.offset, len(row.data), row.line, row.item)
            else:
                self._keep(path, encoding, spool)

    def __len__(self) -> int:
        return len(self._offset)

    @overload
    def __getitem__(self, index: int) -> Dialogue: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Dialogue]: ...
    def __getitem__(self, index: int | slice) -> Dialogue | Sequence[Dialogue]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        n = self._file[index]
        file = self._opened(n)
        file.seek(self._offset[index])
        data = file.read(self._size[index])
        if self.on_bytes:
            self.on_bytes(len(data))
        if n < 0:
            where, row = json.loads(data)
        else:
            where = row_place(self._files[n], self._line[index], self._item[index])
            row = parse_row(data, where)
        reading = self._again if self._seen[index] else self._reading
        self._seen[index] = 1
        return parse_dialogue(row, where, reading=reading)

    def close(self) -> None:
        """Close the file that is open; the next row opens its own again."""
        if self._handle is not None:
            self._handle[1].close()
            self._handle = None

    def _opened(self, n: int) -> BinaryIO:
        if n < 0:
            assert self._spool is not None
            return self._spool
        if self._handle is None or self._handle[0] != n:
            self.close()
            self._handle = (n, open_file(self._files[n]))
        return self._handle[1]

    def _add(self, file: int, offset: int, size: int, line: int, item: int) -> None:
        self._file.append(file)
        self._offset.append(offset)
        self._size.append(size)
        self._line.append(line)
        self._item.append(item)
        self._seen.append(0)

    def _keep(self, path: Path, encoding: str, spool: Path | None) -> None:
        if self._spool is None:
            self._spool = tempfile.TemporaryFile(dir=spool)  # noqa: SIM115 (lives as long as this object)
        for where, row in read_rows(path, None, encoding):
            data = json.dumps([where, row], ensure_ascii=False, default=typed).encode("utf-8", "surrogatepass")
            try:
                self._add(-1, self._spool.tell(), len(data), 0, 0)
                self._spool.write(data)
            except OSError as error:
                raise UserError(f"{path}: no room for a temporary copy of its rows ({error.strerror})") from None
