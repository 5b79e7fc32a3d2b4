"""Instance types of training jobs: what is in them, what they cost about, and which of them a job's resources mean.

Sources, read in November 2026:

* Shapes (GPUs, vCPU, memory, NVMe, EFA): EC2's DescribeInstanceTypes, of which moto has a copy; ml.X is EC2's X. A test
  compares. Only p3 is no longer in that copy; its rows are those of torchx's named resources.
* Prices: EC2's list prices for Linux in us-east-1 (skypilot-org/skypilot-catalog v8/aws, datareceipts/data-receipts),
  times what SageMaker adds; the factors are those of published ml.* prices (ml.g4dn.xlarge 0.736, ml.g5.xlarge 1.408,
  ml.g5.12xlarge 7.09, ml.p3.2xlarge 3.825, ml.m5.xlarge 0.23). The true prices stand in AWS's Price List only.

Not here: ml.p6e-gb200 (its CPUs are ARM), ml.trn* (no GPUs), ml.p2 (no CUDA of today), and CPU families that have an
equal here. A target's `instance_types` takes any name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from launcher.errors import SpecError, nearest
from launcher.quantities import format_size

__all__ = ["ELSEWHERE", "INSTANCES", "MODELS", "InstanceType", "choose", "instance_type", "words"]

_AS_OF = "2026-11"
_MOST = 5
"""InstancePreferences takes so many types."""
_SMALLEST_CPUS, _SMALLEST_MEMORY = 2, 8 * 2**30
"""Of a type for a job without GPUs that says nothing else."""

_FAMILIES: Mapping[str, tuple[str, int, float]] = {
    "g4dn": ("T4", 16, 1.25),
    "g5": ("A10G", 24, 1.25),
    "g6": ("L4", 24, 1.25),
    "g6e": ("L40S", 48, 1.25),
    "g7": ("RTXPRO4500", 32, 1.25),
    "g7e": ("RTXPRO6000", 96, 1.25),
    "p3": ("V100", 16, 1.25),
    "p3dn": ("V100", 32, 1.25),
    "p4d": ("A100", 40, 1.15),
    "p4de": ("A100", 80, 1.15),
    "p5": ("H100", 80, 1.15),
    "p5e": ("H200", 141, 1.15),
    "p5en": ("H200", 141, 1.15),
    "p6-b200": ("B200", 179, 1.15),
    "p6-b300": ("B300", 268, 1.15),
}
"""Family → model as job files name it, GB of one GPU, what SageMaker takes in EC2's prices."""
_SMALLEST_FACTOR, _CPU_FACTOR = 1.4, 1.2
"""The same for the smallest type of a family of GPUs (`xlarge`), and for types without GPUs."""

_SHAPES: Sequence[tuple[str, int, int, int, int, bool, float | None]] = (
    # name, GPUs, vCPU, GiB, GB of NVMe, EFA, EC2's price
    ("g4dn.xlarge", 1, 4, 16, 125, False, 0.526),
    ("g4dn.2xlarge", 1, 8, 32, 225, False, 0.752),
    ("g4dn.4xlarge", 1, 16, 64, 225, False, 1.204),
    ("g4dn.8xlarge", 1, 32, 128, 900, True, 2.176),
    ("g4dn.16xlarge", 1, 64, 256, 900, True, 4.352),
    ("g4dn.12xlarge", 4, 48, 192, 900, True, 3.912),
    ("g5.xlarge", 1, 4, 16, 250, False, 1.006),
    ("g5.2xlarge", 1, 8, 32, 450, False, 1.212),
    ("g5.4xlarge", 1, 16, 64, 600, False, 1.624),
    ("g5.8xlarge", 1, 32, 128, 900, True, 2.448),
    ("g5.16xlarge", 1, 64, 256, 1900, True, 4.096),
    ("g5.12xlarge", 4, 48, 192, 3800, True, 5.672),
    ("g5.24xlarge", 4, 96, 384, 3800, True, 8.144),
    ("g5.48xlarge", 8, 192, 768, 7600, True, 16.288),
    ("g6.xlarge", 1, 4, 16, 250, False, 0.8048),
    ("g6.2xlarge", 1, 8, 32, 450, False, 0.9776),
    ("g6.4xlarge", 1, 16, 64, 600, False, 1.3232),
    ("g6.8xlarge", 1, 32, 128, 900, True, 2.0144),
    ("g6.16xlarge", 1, 64, 256, 1880, True, 3.3968),
    ("g6.12xlarge", 4, 48, 192, 3760, True, 4.6016),
    ("g6.24xlarge", 4, 96, 384, 3760, True, 6.6752),
    ("g6.48xlarge", 8, 192, 768, 7520, True, 13.3504),
    ("g6e.xlarge", 1, 4, 32, 250, False, 1.861),
    ("g6e.2xlarge", 1, 8, 64, 450, False, 2.242),
    ("g6e.4xlarge", 1, 16, 128, 600, False, 3.004),
    ("g6e.8xlarge", 1, 32, 256, 900, True, 4.5286),
    ("g6e.16xlarge", 1, 64, 512, 1900, True, 7.577),
    ("g6e.12xlarge", 4, 48, 384, 3800, True, 10.493),
    ("g6e.24xlarge", 4, 96, 768, 3800, True, 15.066),
    ("g6e.48xlarge", 8, 192, 1536, 7600, True, 30.131),
    ("g7.2xlarge", 1, 8, 32, 440, False, None),
    ("g7.4xlarge", 1, 16, 64, 875, False, None),
    ("g7.8xlarge", 1, 32, 128, 930, True, None),
    ("g7.12xlarge", 2, 48, 192, 1900, True, None),
    ("g7.24xlarge", 4, 96, 384, 3800, True, None),
    ("g7.48xlarge", 8, 192, 768, 7600, True, None),
    ("g7e.2xlarge", 1, 8, 64, 1900, False, None),
    ("g7e.4xlarge", 1, 16, 128, 1900, False, None),
    ("g7e.8xlarge", 1, 32, 256, 1900, True, None),
    ("g7e.12xlarge", 2, 48, 512, 3800, True, None),
    ("g7e.24xlarge", 4, 96, 1024, 7600, True, None),
    ("g7e.48xlarge", 8, 192, 2048, 15200, True, None),
    ("p3.2xlarge", 1, 8, 61, 0, False, 3.06),
    ("p3.8xlarge", 4, 32, 244, 0, False, 12.24),
    ("p3.16xlarge", 8, 64, 488, 0, False, 24.48),
    ("p3dn.24xlarge", 8, 96, 768, 1800, True, 31.212),
    ("p4d.24xlarge", 8, 96, 1152, 8000, True, 21.957642),
    ("p4de.24xlarge", 8, 96, 1152, 8000, True, 27.44705),
    ("p5.4xlarge", 1, 16, 256, 3800, True, 6.88),
    ("p5.48xlarge", 8, 192, 2048, 30400, True, 55.04),
    ("p5e.48xlarge", 8, 192, 2048, 30400, True, None),
    ("p5en.48xlarge", 8, 192, 2048, 30400, True, 63.296),
    ("p6-b200.48xlarge", 8, 192, 2048, 30400, True, 113.9328),
    ("p6-b300.48xlarge", 8, 192, 4096, 30400, True, None),
)

_CPU_FAMILIES: Mapping[str, tuple[int, float, Sequence[int]]] = {
    "m5": (4, 0.048, (2, 4, 8, 16, 48, 96)),
    "c5": (2, 0.0425, (4, 8, 16, 36, 72)),
    "m7i": (4, 0.0504, (2, 4, 8, 16, 32, 48, 64, 96, 192)),
    "c7i": (2, 0.044625, (2, 4, 8, 16, 32, 48, 64, 96, 192)),
}
"""Family → GiB and EC2's price of one vCPU, vCPU of each size that SageMaker has."""

ELSEWHERE = (
    "A16", "A2", "A30", "A40", "GB200", "GB300", "GH200", "H20", "L40", "MI250X", "MI300A", "MI300X", "MI325X",
    "P100", "P4", "P40", "RTX3080", "RTX3090", "RTX4090", "RTX5000-ADA", "RTX5090", "RTX6000", "RTX6000-ADA", "RTX8000",
    "RTXA4000", "RTXA5000", "RTXA6000", "V100S",
)  # fmt: skip
"""Models that other platforms have: passed over in a list beside one that SageMaker has."""

_ALIASES = {"A10": "A10G", "A1024GB": "A10G24GB"}
"""EC2's A10G is the A10 of other platforms, for all that a training can tell."""


@dataclass(frozen=True)
class InstanceType:
    """What is in a type; with a name alone it is one that nothing is known of.

    gpu: model as job files name it, empty without GPUs. gpu_memory: GB of one. memory: bytes. price: USD an hour.
    """

    name: str
    gpus: int = 0
    gpu: str = ""
    gpu_memory: int = 0
    cpus: int = 0
    memory: int = 0
    nvme: int | None = None
    """Bytes of the local disk, which takes the place of a volume of any size; None: a volume as large as asked for."""
    efa: bool = False
    price: float | None = None
    priced: str = ""
    """Where the price is from; empty without one."""

    @property
    def models(self) -> tuple[str, ...]:
        """What a job file may call its GPU: `A100`, `A100-80GB`."""
        return (self.gpu, f"{self.gpu}-{self.gpu_memory}GB") if self.gpu else ()

    @property
    def accelerated(self) -> bool:
        """As AWS means it: of a family of GPUs or of its own chips, known here or not."""
        return re.match(r"ml\.(p|g|trn|inf)\d", self.name) is not None


def _gpu_type(name: str, gpus: int, cpus: int, gib: int, nvme: int, efa: bool, ec2: float | None) -> InstanceType:
    family, _, size = name.partition(".")
    gpu, memory, factor = _FAMILIES[family]
    price = _price(ec2, _SMALLEST_FACTOR if size == "xlarge" else factor)
    return InstanceType(f"ml.{name}", gpus, gpu, memory, cpus, gib * 2**30, nvme * 10**9 or None, efa, *price)


def _cpu_type(family: str, cpus: int) -> InstanceType:
    gib, ec2, _ = _CPU_FAMILIES[family]
    size = {2: "large", 4: "xlarge"}.get(cpus, f"{cpus // 4}xlarge")
    price = _price(cpus * ec2, _CPU_FACTOR)
    return InstanceType(f"ml.{family}.{size}", 0, "", 0, cpus, cpus * gib * 2**30, None, cpus == 192, *price)


def _price(ec2: float | None, factor: float) -> tuple[float | None, str]:
    return (None, "") if ec2 is None else (round(ec2 * factor, 3), f"EC2's price × {factor:g}, us-east-1, {_AS_OF}")


def _instances() -> dict[str, InstanceType]:
    cpu = (_cpu_type(family, cpus) for family, (_, _, sizes) in _CPU_FAMILIES.items() for cpus in sizes)
    return {found.name: found for found in (*(_gpu_type(*row) for row in _SHAPES), *cpu)}


INSTANCES: Mapping[str, InstanceType] = _instances()
MODELS: tuple[str, ...] = tuple(dict.fromkeys(model for found in INSTANCES.values() for model in found.models[:1]))
"""Of GPUs that SageMaker has, by their general names."""


def instance_type(name: str) -> InstanceType | None:
    """What is known of a type; None: nothing, though it may well exist."""
    return INSTANCES.get(name)


def choose(
    *, gpus: int, models: Sequence[str], cpus: int | None, memory: int | None, disk: int
) -> tuple[InstanceType, ...]:
    """Types that are large enough, best first: the cheapest of each acceptable model; one if any model will do.

    memory, disk: bytes. A model that SageMaker lacks, or has in no large enough type, is passed over beside others.
    Raises SpecError, key `resources.…`, where nothing is left.
    """
    if not gpus:
        cpus, memory = cpus or _SMALLEST_CPUS, memory or _SMALLEST_MEMORY
    groups = _by_model(models) if gpus else [[found for found in INSTANCES.values() if not found.gpus]]
    needs = _needs(gpus, cpus or 0, memory or 0, disk)
    chosen = [min(fit, key=_cost) for group in groups if (fit := [found for found in group if _fits(found, needs)])]
    if not chosen:
        raise _too_much([found for group in groups for found in group], needs)
    return tuple(dict.fromkeys(chosen))[:_MOST]


def words(instance: InstanceType) -> str:
    """`ml.g5.2xlarge: 1 × A10G (24 GB), 8 vCPU, 32 GiB, 450 GB NVMe; about $1.51/h (estimate, …)`."""
    if not instance.cpus:
        return f"{instance.name}: nothing is known of it here"
    gpu = [f"{instance.gpus} × {instance.gpu} ({instance.gpu_memory} GB)"] if instance.gpus else []
    disk = [f"{instance.nvme // 10**9} GB NVMe"] if instance.nvme else []
    shape = ", ".join([*gpu, f"{instance.cpus} vCPU", f"{instance.memory // 2**30} GiB", *disk])
    price = (
        "no price known" if instance.price is None else f"about ${instance.price:.2f}/h (estimate: {instance.priced})"
    )
    return f"{instance.name}: {shape}; {price}"


def _by_model(models: Sequence[str]) -> list[list[InstanceType]]:
    """Types of each model, in the models' order; all in one without models."""
    if not models:
        return [[found for found in INSTANCES.values() if found.gpus]]
    groups = {model: _of_model(model) for model in models}
    for model, group in groups.items():
        if not group and not (any(groups.values()) and _elsewhere(model)):
            raise SpecError(_no_model(model), key="resources.gpu")
    return [group for group in groups.values() if group]


def _of_model(model: str) -> list[InstanceType]:
    wanted = _ALIASES.get(_plain(model), _plain(model))
    return [found for found in INSTANCES.values() if wanted in map(_plain, found.models)]


def _plain(model: str) -> str:
    """`RTX PRO 6000` and `rtx-pro-6000` are RTXPRO6000."""
    return re.sub(r"[ _-]", "", model).upper()


def _elsewhere(model: str) -> bool:
    return _plain(model) in map(_plain, ELSEWHERE)


def _no_model(model: str) -> str:
    hint = ("" if _elsewhere(model) else nearest(_plain(model), MODELS)) or ";"
    return (
        f"SageMaker has no {model!r}{hint} there are {', '.join(MODELS)};"
        " another type goes by its name in the target: instance_types: [ml.…]"
    )


@dataclass(frozen=True)
class _Need:
    """has: what a type has of it; infinite where a volume is made as large as asked for."""

    key: str
    wanted: float
    has: Callable[[InstanceType], float]
    say: Callable[[float], str]


def _needs(gpus: int, cpus: int, memory: int, disk: int) -> tuple[_Need, ...]:
    return (
        _Need("gpus", gpus, lambda found: found.gpus, lambda n: f"{n:g} GPUs"),
        _Need("cpus", cpus, lambda found: found.cpus, lambda n: f"{n:g} vCPU"),
        _Need("memory", memory, lambda found: found.memory, lambda n: f"{format_size(n)} of memory"),
        _Need("disk", disk, lambda found: found.nvme or math.inf, lambda n: f"{n / 10**9:.0f} GB of disk"),
    )


def _fits(found: InstanceType, needs: Sequence[_Need]) -> bool:
    return all(need.has(found) >= need.wanted for need in needs)


def _cost(found: InstanceType) -> tuple[bool, float, int]:
    """Types without a price come last, the smallest of them first."""
    return found.price is None, found.price or 0.0, found.cpus


def _too_much(types: Sequence[InstanceType], needs: Sequence[_Need]) -> SpecError:
    """Names the first need that no type meets which meets those before it."""
    left = list(types)
    for need in needs:
        fit = [found for found in left if need.has(found) >= need.wanted]
        if not fit:
            break
        left = fit
    largest = max(left, key=need.has)
    of = f" with {', '.join(dict.fromkeys(found.gpu for found in left))}" if left[0].gpu else ""
    return SpecError(
        f"no instance of SageMaker{of} has {need.say(need.wanted)}; the largest that meets the rest is {largest.name}"
        f" with {need.say(need.has(largest))}: ask for less, or spread the job over more nodes",
        key=f"resources.{need.key}",
    )
