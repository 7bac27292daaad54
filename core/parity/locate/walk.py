"""Order in which the quantities of a training step are looked at: forward, backward, then the update.

Every quantity comes after those that it is computed from, so that the first one beyond its budget was made by an
operator whose inputs are within theirs. The gradient of an activation is complete when its earliest reader has gone
backward: only then is it looked at, and all of its readers are suspects.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from telechat_twins.core.parity.record.format import quantity_key
from telechat_twins.core.parity.record.sites import Site

FORWARD, BACKWARD, UPDATE, START = "forward", "backward", "update", "start"
# Operators in the order of suspicion where several have read one tensor: a sum passes its gradient on as it is.
_PLAIN = ("add",)


@dataclass(frozen=True)
class Suspect:
    """An operator in one direction. ``site``: the name of its output; of an update, and of weights before the first
    step, the parameter."""

    operator: str
    site: str
    direction: str

    @property
    def layer(self) -> int | None:
        """The block that it belongs to."""
        return int(self.site.split(".")[1]) if self.site.startswith("layers.") else None

    @property
    def where(self) -> str:
        return "outside the blocks" if self.layer is None else f"layer {self.layer}"


@dataclass(frozen=True)
class Check:
    """A quantity, and the operators that it is made by, the likeliest first."""

    kind: str
    name: str
    step: int
    suspects: tuple[Suspect, ...]

    @property
    def key(self) -> str:
        return quantity_key(self.kind, self.name, self.step)


def checks(sites: Sequence[Site], parameters: Sequence[str], steps: Sequence[int]) -> Iterator[Check]:
    """All quantities of ``steps``, each after what it depends on. ``sites``: core.parity.record.sites."""
    for step in steps:
        for name in parameters:
            yield Check("weight_before", name, step, (Suspect("weights", name, START),))
        for site in sites:
            if site.name != "grad_norm":
                yield Check("activation", site.name, step, (Suspect(site.operator, site.name, FORWARD),))
        yield from _backward(sites, step)
        yield Check("activation", "grad_norm", step, (Suspect("norm", "grad_norm", BACKWARD),))
        for kind in ("moment1", "moment2", "weight_after"):
            for name in parameters:
                yield Check(kind, name, step, (Suspect("adamw", name, UPDATE),))


def readers(sites: Sequence[Site]) -> dict[str, list[Site]]:
    """Of every site and weight the sites that read it, in execution order."""
    found: dict[str, list[Site]] = {}
    for site in sites:
        for name in site.inputs:
            found.setdefault(name, []).append(site)
    return found


def _backward(sites: Sequence[Site], step: int) -> Iterator[Check]:
    names, by_input = {site.name for site in sites}, _backward_readers(sites)
    for site in reversed(sites):
        ready = [name for name in site.inputs if by_input[name][0] is site]
        weights = [name for name in ready if name not in names]
        for name in (*weights, *(name for name in ready if name in names)):
            read = sorted(by_input[name], key=lambda reader: (reader.operator in _PLAIN, sites.index(reader)))
            suspects = tuple(Suspect(reader.operator, reader.name, BACKWARD) for reader in read)
            yield Check("activation_grad" if name in names else "gradient", name, step, suspects)


def _backward_readers(sites: Sequence[Site]) -> dict[str, list[Site]]:
    """``readers`` as gradients are recorded. The sum after attention and the RMS norm that reads it are one operator:
    the recorded gradient of the sum is what other readers send back, that of the attention's output has the norm's
    part as well."""
    found, places = readers(sites), {site.name: site for site in sites}
    for site in sites:
        total = places.get(site.inputs[0]) if site.operator == "rms_norm" else None
        if total is not None and total.name.endswith(".attn_sum"):
            found[total.name].remove(site)
            found[total.inputs[1]].append(site)
    return found
