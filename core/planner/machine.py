"""Machine files: peaks, memory, links and measured efficiencies of a device and its node, each with its source."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from telechat_twins.core.errors import UserError
from telechat_twins.core.model.config import CONFIGS
from telechat_twins.core.near import nearest_name
from telechat_twins.core.schema import from_mapping, in_file, load_yaml, option

MACHINES = CONFIGS / "machines"
_CHIP = re.compile(r"[a-z]+|[0-9]+[a-z]?[0-9]*")  # parts of a chip's name: ascend, 910b3
OPERATIONS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "shift", "send")


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A number with its source; the unit is that of the field that holds it."""

    value: float = option(help="the number, in the unit of its field", above=0.0)
    source: str = option(help="where the number is from: a document, or the command that measured it")


@dataclass(frozen=True, kw_only=True)
class OperationSpec:
    """A collective as it was measured, in place of a link's bandwidth and latency."""

    op: str = option(help="as in core.parallel.traffic", choices=OPERATIONS)
    latency: float = option(help="microseconds of a call with little data", min=0.0)
    bandwidth: float = option(help="GB/s that a rank sends by a ring algorithm", above=0.0)
    sizes: list[int] = option([], help="bytes that a rank passed in, in rising order; between them one interpolates")
    microseconds: list[float] = option([], help="of a call of each of `sizes`, in place of latency and bandwidth")

    def __post_init__(self) -> None:
        if len(self.sizes) != len(self.microseconds) or sorted(set(self.sizes)) != self.sizes:
            raise UserError(
                f"measured {self.op}: must have as many `microseconds` as `sizes`, which rise; found "
                f"{len(self.microseconds)} and {self.sizes}"
            )


@dataclass(frozen=True, kw_only=True)
class LinkSpec:
    """A link as one device sees it."""

    bandwidth: Figure = option(help="GB/s that a device sends, in one direction")
    latency: Figure = option(help="microseconds of one hop of a message")
    efficiency: Figure = option(help="share of the bandwidth that large collectives reach")
    measured: list[OperationSpec] = option([], help="operations that were measured, which then have precedence")


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """Shares of the peak that operators reach, by class and shape, and the error of predictions made with them.

    A share may be above 1 where another program measured the peak. A product [m, k] x [k, n] reaches
    ``matmul`` m/(m + tile) k/(k + tile) n/(n + tile) of the peak.
    """

    matmul: float = option(help="share of the peak that a large matrix product reaches", above=0.0, max=10.0)
    attention: float = option(help="share of the peak that fused attention reaches", above=0.0, max=10.0)
    memory: float = option(help="share of the memory bandwidth that elementwise operators reach", above=0.0, max=10.0)
    tile: float = option(help="size of a dimension at which a product reaches half of its share", min=0.0)
    launch: float = option(help="microseconds between operators", min=0.0)
    overlap: float = option(1.0, help="share of a transfer that runs beside computation", min=0.0, max=1.0)
    faster: float = option(help="share by which a held-out run was at most faster than predicted", min=0.0, max=0.9)
    slower: float = option(help="share by which a held-out run was at most slower than predicted", min=0.0, max=9.0)
    source: str = option(help="the runs that were fitted or the measurements, and the command that repeats it")


@dataclass(frozen=True, kw_only=True)
class Host:
    """Microseconds of a host that starts operators one by one, beside the operators' own work; in place of `launch`.

    Each was measured by itself, on a model so narrow that its operators have nothing to do.
    """

    block_forward: float = option(help="a decoder block's forward, of a micro-batch", min=0.0)
    block_backward: float = option(help="its backward", min=0.0)
    ends_forward: float = option(help="embedding, head and loss together, of a micro-batch", min=0.0)
    ends_backward: float = option(help="their backward", min=0.0)
    step: float = option(help="what a step takes beside its micro-batches", min=0.0)
    update: float = option(help="norm of the gradients, and update", min=0.0)
    tensor_ends_forward: float = option(
        0.0, help="what tensor ranks add to `ends_forward`, beside messages and `exchange`", min=0.0
    )
    tensor_ends_backward: float = option(0.0, help="likewise, to `ends_backward`", min=0.0)
    stage_forward: float = option(
        0.0, help="what a further stage of a pipeline adds to a micro-batch's forward, beside the message", min=0.0
    )
    stage_backward: float = option(0.0, help="likewise, to its backward", min=0.0)
    exchange: float = option(help="a collective inside a layer, beside the collective", min=0.0)
    ring_forward: float = option(help="a ring's step of a block's forward, beside its message", min=0.0)
    ring_backward: float = option(help="a ring's step of a block's backward", min=0.0)
    ring_forward_mb: float = option(0.0, help="more of it for each MB of float32 queries", min=0.0)
    ring_backward_mb: float = option(0.0, help="likewise, of the backward", min=0.0)
    exponent: float = option(0.0, help="all of it is c ** exponent as fast in a process with c cores", min=0.0, max=1.0)
    update_bandwidth: float = option(help="GB/s that norm and update move", above=0.0)
    source: str = option(help="the command that measured it")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A cluster of equal nodes. ``shared_cores``: a CPU, whose ranks divide the node's cores among themselves."""

    name: str = option(help="as on the command line")
    title: str = option(help="the product's name")
    devices_per_node: int = option(help="devices of a node", min=1, max=4096)
    peak_bf16: Figure = option(help="TFLOP/s of a device in bf16 and fp16, dense")
    peak_fp32: Figure = option(help="TFLOP/s of a device in fp32")
    memory: Figure = option(help="GiB of device memory")
    memory_bandwidth: Figure = option(help="GB/s of device memory")
    node: LinkSpec = option(help="links between the devices of a node")
    cluster: LinkSpec = option(help="links between nodes, of one device")
    scaling: Figure = option(help="share of time that each doubling of the devices beyond a node adds (stragglers)")
    power: Figure = option(help="watts of a device under load, with its share of the node")
    efficiency: Efficiency = option(help="shares of the peaks that programs reach")
    backend: str | None = option(None, help="a CPU: the backend that was measured", choices=("ms", "pt"))
    shared_cores: bool = option(False, help="a CPU: ranks on a node divide its cores")
    core_exponent: float = option(1.0, help="a CPU: a rank with c cores is c ** exponent as fast", min=0.0, max=1.0)
    host: Host | None = option(None, help="a CPU: time of the host beside the operators, in place of `launch`")

    def peak(self, precision: str) -> float:
        """FLOP/s of a device in the products of a ``precision`` mode of training."""
        return self._peak(precision).value * 1e12 / (2.0 if precision == "fp64" else 1.0)

    def peak_source(self, precision: str) -> str:
        """The peak with its unit and source, in words."""
        figure = self._peak(precision)
        return f"{figure.value:g} TFLOP/s ({figure.source})"

    def _peak(self, precision: str) -> Figure:
        return self.peak_bf16 if precision in ("bf16", "fp16", "amp") else self.peak_fp32

    @property
    def memory_bytes(self) -> float:
        """Memory of a device in bytes."""
        return self.memory.value * 2**30


def machine_names() -> list[str]:
    """Names of the machine files that come with the program."""
    return sorted(path.stem for path in MACHINES.glob("*.yaml"))


def _with_chip(word: str) -> str | None:
    """The bundled machine whose title has what ``word`` says, e.g. its chip: "ascend910b"; None if not exactly one."""
    words = _CHIP.findall(word.lower())
    having = []
    for name in machine_names():
        parts = _CHIP.findall(str(load_yaml(MACHINES / f"{name}.yaml").get("title")).lower())
        if words and all(any(part.startswith(one) or one.startswith(part) for part in parts) for one in words):
            having.append(name)
    return having[0] if len(having) == 1 else None


def load_machine(name_or_path: str) -> Machine:
    """The machine of a bundled name (``atlas-800t-a2``) or of a YAML file of that form.

    UserError names the nearest bundled machine for an unknown name, and the key for a value out of range.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        if name_or_path not in machine_names():
            near = nearest_name(name_or_path, machine_names(), cutoff=0.4) or _with_chip(name_or_path)
            hint = f"did you mean '{near}'?" if near else f"there are: {', '.join(machine_names())}."
            raise UserError(f"--machine: no machine '{name_or_path}'; {hint} A file's name ends in .yaml")
        path = MACHINES / f"{name_or_path}.yaml"
    values = load_yaml(path)
    try:
        return machine_from(values, "")
    except UserError as error:
        raise UserError(in_file(str(error), path)) from None


def machine_from(values: object, where: str) -> Machine:
    """The machine of a mapping in the form of the files; ``where`` is named in errors."""
    return from_mapping(Machine, values, where)
