"""What a queued resource of Cloud TPU is asked for, as the arguments of gcloud: one place that knows its flags."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

from launch.accelerators import FLAT
from launch.job import check, check_count


@dataclasses.dataclass(frozen=True)
class Kind:
    """A generation of TPU: how its accelerator types are named and counted, and the image that its machines start from.

    Attributes:
      counted: what the number in the name of a type counts, for each chip.
      single: the most chips that are one machine; larger slices have four chips a machine.
      shapes: the topologies that a type of so many chips gives.
    """

    prefix: str
    runtime: str
    counted: int
    single: int
    shapes: tuple[str, ...]


_CUBIC = (
    "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16",
)  # fmt: skip

# https://cloud.google.com/tpu/docs/runtimes and the page of each generation.
KINDS = {
    "v4": Kind("v4", "tpu-ubuntu2204-base", 2, 4, _CUBIC),
    "v5e": Kind("v5litepod", "v2-alpha-tpuv5-lite", 1, 8, FLAT),
    "v5p": Kind("v5p", "v2-alpha-tpuv5", 2, 4, (*_CUBIC, "16x16x24")),
    "v6e": Kind("v6e", "v2-alpha-tpuv6e", 1, 8, FLAT),
}


def accelerator(topology: str) -> str:
    """The accelerator type of a topology.

    Raises:
      ValueError: it is none, or no accelerator type has it.

    >>> accelerator("v5e:4x4"), accelerator("v5p:4x4x8"), accelerator("v6e:2x2")
    ('v5litepod-16', 'v5p-256', 'v6e-4')
    >>> accelerator("v5p:2x2x32")
    Traceback (most recent call last):
        ...
    ValueError: --topology 'v5p:2x2x32': expected one of v5p:2x2x1, 2x2x2, 2x2x4, 2x4x4, 4x4x4, 4x4x8, 4x8x8, 8x8x8,
    8x8x16, 8x16x16, 16x16x16, 16x16x24; v5p-256 is 4x4x8
    """
    name, _, shape = topology.partition(":")
    check(name != "tpu7x", "--topology", topology, f"{', '.join(KINDS)}: tpu7x is had through GKE; use launch.gke")
    check(name in KINDS, "--topology", topology, f"KIND:SHAPE, such as v5e:4x4, of {', '.join(KINDS)}")
    kind = KINDS[name]
    sizes = [math.prod(map(int, one.split("x"))) for one in kind.shapes]
    if shape not in kind.shapes:
        near = ""
        if re.fullmatch(r"[0-9]{1,4}(x[0-9]{1,4}){1,2}", shape):
            chips = math.prod(map(int, shape.split("x")))
            if chips in sizes:
                near = f"; {kind.prefix}-{chips * kind.counted} is {kind.shapes[sizes.index(chips)]}"
        check(False, "--topology", topology, f"one of {name}:{', '.join(kind.shapes)}{near}")
    return f"{kind.prefix}-{sizes[kind.shapes.index(shape)] * kind.counted}"


def _kind(accelerator_type: str) -> tuple[Kind, int]:
    match = re.fullmatch("([a-z0-9]+)-([0-9]{1,6})", accelerator_type)
    found = [kind for kind in KINDS.values() if match and kind.prefix == match[1]]
    known = ", ".join(f"{kind.prefix}-N" for kind in KINDS.values())
    check(found, "--accelerator-type", accelerator_type, f"one of {known}")
    assert match is not None
    chips, rest = divmod(int(match[2]), found[0].counted)
    fits = not rest and chips > 0 and (chips <= found[0].single or chips % 4 == 0)
    check(fits, "--accelerator-type", accelerator_type, "a size that there is, such as v5litepod-16 or v5p-32")
    return found[0], chips


def hosts(accelerator_type: str) -> int:
    """How many machines one slice has.

    >>> hosts("v5litepod-8"), hosts("v5litepod-16"), hosts("v5p-8"), hosts("v5p-256")
    (1, 4, 1, 32)
    """
    kind, chips = _kind(accelerator_type)
    return 1 if chips <= kind.single else chips // 4


@dataclasses.dataclass(frozen=True)
class Request:
    """Which machines, and where.

    Args:
      zone: such as us-east5-b.
      accelerator_type: of each slice.
      slices: how many slices are tried for, the first count first; with several, each of the others is tried for when
        the one before could not be had.
      runtime_version: the image of the machines; None for that of the generation.
      project: None for gcloud's own.
      spot: machines that may be taken away; reserved: of a reservation.
      valid_until_duration: as gcloud reads it, such as 6h: what is not had by then is given up.
      create_extra, ssh_extra: further flags of `gcloud ... create` and `gcloud ... ssh`, each as `--network=x`.

    Raises:
      ValueError: one line, naming the flag.
    """

    zone: str
    accelerator_type: str
    slices: Sequence[int] = (1,)
    runtime_version: str | None = None
    project: str | None = None
    spot: bool = False
    reserved: bool = False
    valid_until_duration: str | None = None
    create_extra: Sequence[str] = ()
    ssh_extra: Sequence[str] = ()

    def __post_init__(self) -> None:
        check(re.fullmatch("[a-z]+-[a-z]+[0-9]-[a-z]", self.zone), "--zone", self.zone, "a zone, such as us-east5-b")
        hosts(self.accelerator_type)
        for count in self.slices:
            check_count("--slices", count)
        falling = all(a > b for a, b in zip(self.slices, self.slices[1:]))
        check(falling, "--slices", ",".join(map(str, self.slices)), "counts that fall, such as 4,2,1")
        until = self.valid_until_duration
        fine = until is None or re.fullmatch("([0-9]{1,9}[smhd])+", until)
        check(fine, "--valid-until-duration", until, "a duration, such as 6h or 90m")
        if self.spot and self.reserved:
            raise ValueError("--reserved beside --spot: expected one of --spot and --reserved")
        for field, pattern in (("runtime_version", "[a-z0-9.-]+"), ("project", "[a-z0-9.:-]+")):
            value = getattr(self, field)
            check(value is None or re.fullmatch(pattern, value), f"--{field.replace('_', '-')}", value, "a name")
        for field, ours in (("create_extra", _CREATE), ("ssh_extra", _SSH)):
            flag = f"--{field.replace('_', '-')}"
            for option in getattr(self, field):
                match = re.fullmatch(r"(--[a-z0-9-]+)(=[^\x00-\x1f\x7f]*)?", option)
                check(match, flag, option, "--option or --option=value")
                assert match is not None
                check(match[1] not in ours, flag, option, "an option that this launcher does not set itself")

    def workers(self, slices: int) -> int:
        """How many machines so many slices have together."""
        return hosts(self.accelerator_type) * slices

    def create(self, name: str, slices: int) -> list[str]:
        """Asks for it. More than one slice is one request too, and their machines know each other."""
        nodes = [f"--node-id={name}"] if slices == 1 else [f"--node-count={slices}", f"--node-prefix={name}"]
        flags = [
            f"--accelerator-type={self.accelerator_type}",
            f"--runtime-version={self.runtime_version or _kind(self.accelerator_type)[0].runtime}",
            *nodes,
            *["--spot"] * self.spot,
            *["--reserved"] * self.reserved,
            *([f"--valid-until-duration={self.valid_until_duration}"] if self.valid_until_duration else []),
            *self.create_extra,
        ]
        return self._gcloud("create", name, *flags)

    def describe(self, name: str, form: str = "json") -> list[str]:
        return self._gcloud("describe", name, f"--format={form}")

    def delete(self, name: str) -> list[str]:
        """Gives the machines back as well, and waits until they are gone: only then is the name free again."""
        return self._gcloud("delete", name, "--force")

    def ssh(self, name: str, command: str) -> list[str]:
        """Runs it on all workers of all slices, and nothing else is possible here: some of them alone would wait.

        gcloud takes 64 at a time by itself, and the 65th would start when the first has ended.
        """
        everywhere = ["--node=all", "--worker=all", "--batch-size=all"]
        return self._gcloud("ssh", name, *everywhere, *self.ssh_extra, f"--command={command}")

    def _gcloud(self, verb: str, name: str, *flags: str) -> list[str]:
        where = [f"--zone={self.zone}", *([f"--project={self.project}"] if self.project else [])]
        return ["gcloud", "compute", "tpus", "queued-resources", verb, name, *where, *flags, "--quiet"]


_COMMON = ("--zone", "--project", "--format", "--quiet")
_CREATE = (
    *_COMMON, "--accelerator-type", "--topology", "--type", "--runtime-version", "--node-id", "--node-count",
    "--node-prefix", "--spot", "--reserved", "--valid-until-duration", "--async",
)  # fmt: skip
_SSH = (*_COMMON, "--node", "--worker", "--batch-size", "--command", "--output-directory", "--dry-run")
