"""Rows under names of their own: which key of them is which part (``--column``), and which speaker which role."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from telechat_twins.core.data.kinds.table import KINDS, SPEAKERS, WORDS, Parts
from telechat_twins.core.errors import UserError
from telechat_twins.core.shown import printable, shown


@dataclass(frozen=True)
class Columns:
    """``parts``: (name of a key that a kind reads, the rows' own key); ``roles``: (the rows' own name, role)."""

    parts: Parts = ()
    roles: Parts = ()

    @property
    def spellings(self) -> tuple[tuple[str, str], ...]:
        """(key of the speaker, key of what is said) of messages, each pair that may occur."""
        given = dict(self.parts)
        own = tuple(next((given[name] for name in names if name in given), "") for names in (SPEAKERS, WORDS))
        common = tuple(zip(SPEAKERS, WORDS, strict=True))
        if not any(own):
            return (*common, *zip(SPEAKERS, reversed(WORDS), strict=True))
        return tuple((own[0] or who, own[1] or said) for who, said in common)


NO_COLUMNS = Columns()


def read_columns(given: Sequence[str], roles: Sequence[str], use: str, legal_roles: Collection[str]) -> Columns:
    """``--column NAME=KEY`` and ``--role NAME=ROLE`` as ``Columns``. UserError for names that rows for ``use`` lack."""
    parts = [_split(one, "--column", "question=Q") for one in given]
    legal = {name for kind in KINDS.values() if kind.use == use for names in kind.slots.values() for name in names}
    legal |= {*SPEAKERS, *WORDS}
    for name, _ in parts:
        if name not in legal:
            raise UserError(f"--column {printable(name, 80)}: no part of such rows; legal: {', '.join(sorted(legal))}")
    for position, what in ((0, "names"), (1, "keys")):
        seen = [part[position] for part in parts]
        if twice := next((one for one in seen if seen.count(one) > 1), None):
            raise UserError(f"--column: {shown(twice)} is given twice; {what} must be distinct")
    named = [_split(one, "--role", "agent=assistant") for one in roles]
    for _, role in named:
        if role not in legal_roles:
            raise UserError(f"--role {printable(role, 80)}: no role; legal: {', '.join(legal_roles)}")
    return Columns(tuple(parts), tuple(named))


def _split(given: str, option: str, example: str) -> tuple[str, str]:
    name, sign, key = given.partition("=")
    if not (name and sign and key):
        raise UserError(f"{option} {printable(given, 80)}: must be two names with = between them, e.g. {example}")
    return name, key
