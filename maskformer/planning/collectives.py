"""The collectives of a compiled step, by mesh axis: how many, how many bytes, and what each device sends for them.

A group of devices is read in each form that XLA writes: lists (`{{0,1},{2,3}}`), iota (`[2,2]<=[4]`,
`[2,2]<=[2,2]T(1,0)`) and a mesh's own axes (`mesh['a'=2,'b'=2] {'a'}`). Which mesh axis it is, its members' coordinates
say. What crosses slices leaves a TPU's program as a send to the host.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping

import numpy as np

from maskformer.planning import hlo

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
DCN = "slices"  # the name that traffic between slices has in the place of a mesh axis


@dataclasses.dataclass(frozen=True)
class Collective:
    """What one kind of collective does along one axis in a step.

    Attributes:
      axis: a mesh axis, several joined by "+" in the mesh's order, "slices" for what leaves a slice, or "part of" axes
        whose groups are smaller.
      kind: of `KINDS`.
      count: how often it runs in a step.
      payload_bytes: of the whole arrays that are reduced or gathered, per device: of an all-reduce its input, of an
        all-gather its output, of a reduce-scatter its input, of a permute what it moves.
      sent_bytes: what each device sends for it around a ring: of n devices, 2 (n-1)/n of the payload for an
        all-reduce, (n-1)/n for an all-gather, a reduce-scatter and an all-to-all, all of it for a permute.
    """

    axis: str
    kind: str
    count: int
    payload_bytes: int
    sent_bytes: int


def sent(kind: str, payload: float, devices: int) -> float:
    """Bytes that each of `devices` sends around a ring for `payload` bytes, see `Collective.sent_bytes`.

    >>> sent("all-reduce", 800, 4), sent("all-gather", 800, 4), sent("collective-permute", 800, 4)
    (1200.0, 600.0, 800.0)
    """
    share = (devices - 1) / devices
    return payload * {"all-reduce": 2 * share, "collective-permute": 1.0}.get(kind, share)


def read(
    text: str, mesh_shape: Mapping[str, int], across: Mapping[str, int] | None = None
) -> tuple[list[Collective], list[str]]:
    """The collectives of a compiled program's text, largest first, and what could not be read, a line each.

    Args:
      text: of `jax.stages.Compiled.as_text`.
      mesh_shape: axis -> devices, in the order of the mesh that the program was compiled for.
      across: axis -> slices that it spans.
    """
    module = hlo.parse(text)
    found: dict[tuple[str, str], list[int]] = {}
    seen: set[tuple[str, str | None]] = set()
    problems = [f"loop {name}: no trip count is written; counted once" for name in module.unknown_loops]
    for computation, instruction, runs in module.instructions():
        kind = instruction.opcode.removesuffix("-start")
        if instruction.opcode == "send" and "xla_megascale" in instruction.rest:
            axis, kind = DCN, _rendezvous(instruction)
            payload = moved = instruction.arrays[0]
        elif kind not in KINDS:
            continue
        else:
            # The compiler may part one collective over a chain of fusions, which then share its channel.
            channel = instruction.attribute("channel_id")
            if "chain_id=" in instruction.rest and (kind, channel) in seen:
                continue
            seen.add((kind, channel))
            axis, devices = _axis(instruction, kind, mesh_shape, across or {})
            if devices == 1:
                continue
            if kind == "all-reduce" and _scatters(module, computation):
                kind = "reduce-scatter"
            payload = _payload(instruction, kind, devices, scattered=kind != instruction.opcode.removesuffix("-start"))
            moved = round(sent(kind, payload, devices))
        total = found.setdefault((axis, kind), [0, 0, 0])
        for index, amount in enumerate((1, payload, moved)):
            total[index] += runs * amount
    collectives = [Collective(axis, kind, *totals) for (axis, kind), totals in found.items()]
    return sorted(collectives, key=lambda one: -one.sent_bytes), problems


def groups(text: str) -> list[list[int]]:
    """The groups of a `replica_groups=` value.

    Raises:
      ValueError: another form.

    >>> groups("{{0,1},{2,3}}"), groups("[2,2]<=[4]"), groups("[2,2]<=[2,2]T(1,0)")
    ([[0, 1], [2, 3]], [[0, 1], [2, 3]], [[0, 2], [1, 3]])
    >>> groups("mesh['a'=2,'b'=2] {'a'}"), groups("mesh['a'=4] {'a':(2)2}"), groups("{}")
    ([[0, 2], [1, 3]], [[0, 1], [2, 3]], [])
    """
    if text.startswith("mesh["):
        return _mesh_groups(text)
    if found := re.fullmatch(r"\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        sizes = [int(size) for size in found[3].split(",")]
        devices = np.arange(math.prod(sizes)).reshape(sizes)
        if found[4]:
            devices = devices.transpose([int(axis) for axis in found[4].split(",")])
        return devices.reshape(int(found[1]), int(found[2])).tolist()
    if re.fullmatch(r"\{(\{[\d,]*\},?)*\}", text):
        return [[int(device) for device in one.split(",")] for one in re.findall(r"\{([\d,]+)\}", text)]
    raise ValueError(f"replica_groups={text}: a form that is not known here")


def _mesh_groups(text: str) -> list[list[int]]:
    """Groups along some axes of a mesh that the text names; `'a':(2)2` is the part of `a` below the first 2."""
    found = re.fullmatch(r"mesh\[([^\]]*)\](?:, ?device_ids=\((.*)\))? ?\{(.*)\}", text)
    if found is None:
        raise ValueError(f"replica_groups={text}: a form that is not known here")
    names, order, axes = found.groups()
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", names)}
    devices = np.arange(math.prod(sizes.values()))
    if order is not None:
        devices = np.array(groups(_as_iota(order))).reshape(-1)
    taken: dict[str, tuple[int, int]] = {}
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes):
        taken[name] = (int(before), int(size)) if size else (1, sizes[name])
    shape, moved, kept = [], [], []
    for name, size in sizes.items():
        before, part = taken.get(name, (1, 1))
        parts = [before, part, size // (before * part)]
        kept += [len(shape), len(shape) + 2]
        moved.append(len(shape) + 1)
        shape += parts
    array = devices.reshape(shape).transpose([*kept, *moved])
    return array.reshape(-1, math.prod(part for _, part in taken.values())).tolist()


def _as_iota(text: str) -> str:
    """`[4,2]T(1,0)` or `[8]` of a mesh's device order in the form of replica groups."""
    sizes = re.match(r"\[([\d,]+)\]", text)[1]  # type: ignore[index]
    count = math.prod(int(size) for size in sizes.split(","))
    return f"[1,{count}]<={text}"


def axis_name(
    members: Iterable[Iterable[int]], mesh_shape: Mapping[str, int], across: Mapping[str, int] | None = None
) -> str:
    """The mesh axis along which each group's members differ, several joined by "+"; "part of" it where they are fewer.

    What an axis has within each of the slices that it spans counts as the axis.

    >>> axis_name([[0, 2], [1, 3]], {"data": 2, "tensor": 2}), axis_name([[0, 1, 2, 3]], {"data": 2, "tensor": 2})
    ('data', 'data+tensor')
    """
    sizes = tuple(mesh_shape.values())
    first = list(next(iter(members)))
    places = np.array(np.unravel_index(first, sizes)).T
    varying = [name for name, column in zip(mesh_shape, places.T) if len(set(column)) > 1]
    whole = math.prod(mesh_shape[name] for name in varying)
    slices = math.prod((across or {}).get(name, 1) for name in varying)
    return "+".join(varying) if len(first) in (whole, whole // slices) else f"part of {'+'.join(varying)}"


def _axis(
    instruction: hlo.Instruction, kind: str, mesh_shape: Mapping[str, int], across: Mapping[str, int]
) -> tuple[str, int]:
    """The axis of a collective and the devices of one of its groups."""
    if kind == "collective-permute":
        pairs = re.findall(r"\{(\d+),(\d+)\}", instruction.attribute("source_target_pairs") or "")
        moved = [(int(a), int(b)) for a, b in pairs if a != b]
        if not moved:
            return "other", 1
        sizes = tuple(mesh_shape.values())
        places = [np.array(np.unravel_index(pair, sizes)).T for pair in moved]
        varying = [n for i, n in enumerate(mesh_shape) if any(a[i] != b[i] for a, b in places)]
        return "+".join(varying), 2
    everyone = [list(range(math.prod(mesh_shape.values())))]
    text = instruction.attribute("replica_groups")
    members = (groups(_whole_groups(instruction, text)) if text else []) or everyone
    if len(members[0]) == 1:
        return "other", 1
    return axis_name(members, mesh_shape, across), len(members[0])


def _whole_groups(instruction: hlo.Instruction, text: str) -> str:
    # The axes of a mesh follow it after a space, and an order of devices after a comma.
    if not text.startswith("mesh["):
        return text
    start = instruction.rest.index("replica_groups=mesh[") + len("replica_groups=")
    return instruction.rest[start : instruction.rest.index("}", start) + 1]


def _scatters(module: hlo.Module, computation: str) -> bool:
    """Whether a fusion's all-reduce keeps a part of its result only: a reduce-scatter under another name."""
    inside = [one.opcode for one in module.computations[computation]]
    return "all-reduce-scatter" in computation and "dynamic-slice" in inside


def _payload(instruction: hlo.Instruction, kind: str, devices: int, scattered: bool) -> int:
    arrays = instruction.arrays
    if instruction.opcode.endswith("-start") and instruction.shape.startswith("("):
        if kind == "collective-permute":
            return arrays[0]
        if kind != "all-reduce":
            # (inputs, outputs), and perhaps scalars of synchronisation.
            half = len(arrays) // 2
            return max(sum(arrays[:half]), sum(arrays[half : 2 * half])) if half else sum(arrays)
    if kind == "reduce-scatter" and not scattered:
        return sum(arrays) * devices
    return sum(arrays)


def _rendezvous(instruction: hlo.Instruction) -> str:
    found = re.search(r"_xla_host_transfer_rendezvous=\"?([a-z\-]+)", instruction.rest)
    name = found[1].rstrip("-") if found else ""
    return next((kind for kind in KINDS if name.startswith(kind)), "send")
