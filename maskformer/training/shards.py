"""Which process holds what of a state, and how a process that has lost its part gets it from the others.

Arrays pass between the devices and over their own network; no process ever holds more than its devices do.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec


class Shards:
    """The shards of a state over the processes of a mesh.

    Args:
      abstract_state: `jax.ShapeDtypeStruct`s with `NamedSharding`s of one mesh over all devices of all processes.

    Attributes:
      leaves: the arrays of the state, and their names.
      alone: numbers of the leaves of which some part is on one process only: nobody else could give it back.
      fingerprint: equal where the same process holds the same parts of the same arrays.
    """

    def __init__(self, abstract_state: Any):
        paths, self.structure = jax.tree_util.tree_flatten_with_path(abstract_state)
        self.names = [jax.tree_util.keystr(path) for path, _ in paths]
        self.leaves: list[jax.ShapeDtypeStruct] = [leaf for _, leaf in paths]
        self._mesh = self.leaves[0].sharding.mesh
        self._axes = self._mesh.axis_names
        self._devices = list(self._mesh.devices.flat)
        processes = sorted({device.process_index for device in self._devices})
        of_process = [[d for d in self._devices if d.process_index == process] for process in processes]
        # The devices of each process send to those of the next one, in a ring.
        at = {device: number for number, device in enumerate(self._devices)}
        self._ring = [
            (at[one], at[other])
            for here, there in zip(of_process, of_process[1:] + of_process[:1])
            for one, other in zip(here, there)
        ]
        self._next = dict(zip(processes, processes[1:] + processes[:1]))
        self._holders = [self._holders_of(leaf) for leaf in self.leaves]
        self.alone = [
            number
            for number, holders in enumerate(self._holders)
            if len(processes) > 1 and any(len(of_part) == 1 for of_part in holders)
        ]
        described = [
            self._axes, self._mesh.devices.shape, [device.process_index for device in self._devices],
            [(n, leaf.shape, str(leaf.dtype), str(leaf.sharding.spec)) for n, leaf in zip(self.names, self.leaves)],
        ]  # fmt: skip
        self.fingerprint = hashlib.sha256(repr(described).encode()).hexdigest()

    def _holders_of(self, leaf: jax.ShapeDtypeStruct) -> list[set[int]]:
        """The processes that hold each part of an array."""
        holders: dict[str, set[int]] = {}
        for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
            holders.setdefault(str(index), set()).add(device.process_index)
        return list(holders.values())

    def missing(self, have: Sequence[bool]) -> str | None:
        """The first array of which no process that is left has some part; None where all can be had.

        Args:
          have: of each process, whether it has its part, and the copy of its neighbour's.
        """
        for number, holders in enumerate(self._holders):
            for of_part in holders:
                keepers = {self._next[process] for process in of_part} if number in self.alone else set()
                if not any(have[process] for process in of_part | keepers):
                    return self.names[number]
        return None

    def held(self, array: jax.Array, shifted: bool = False) -> list[tuple[str, jax.Array]]:
        """What each of this process's devices holds of an array, in the order of the mesh: which part, and its data.

        Args:
          shifted: the array comes from `shifted`, and its data is the part of the device before in the ring.
        """
        held = {shard.device: shard.data for shard in array.addressable_shards}
        part = array.sharding.devices_indices_map(array.shape)
        before = {self._devices[to]: self._devices[source] for source, to in self._ring} if shifted else {}
        return [(str(part[before.get(device, device)]), held[device]) for device in self._devices if device in held]

    def array(self, leaf: jax.ShapeDtypeStruct, parts: Sequence[np.ndarray]) -> jax.Array:
        """The array of which this process's devices hold `parts`, in the order of the mesh."""
        here = [device for device in self._devices if device.process_index == jax.process_index()]
        placed = [jax.device_put(part, device) for part, device in zip(parts, here, strict=True)]
        return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, placed)

    def shifted(self, array: jax.Array) -> jax.Array:
        """An array of which each process holds what the one before it holds of `array`."""
        return _shift(self._mesh, array.sharding.spec, tuple(self._ring))(array)

    def recovered(
        self, leaf: jax.ShapeDtypeStruct, own: jax.Array, copy: jax.Array | None, have: Sequence[bool]
    ) -> jax.Array:
        """The whole array, bit by bit, from the parts of the processes that have theirs.

        Args:
          own: the array as far as it is there; what a process without its part holds of it may be anything.
          copy: `shifted` of it, as far as it is there; None where every part has a replica elsewhere.
          have: of each process, whether what it holds is right.
        """
        right = np.array([have[device.process_index] for device in self._devices], np.int32)
        there = NamedSharding(self._mesh, PartitionSpec(self._axes))
        ok = jax.make_array_from_callback(right.shape, there, lambda index: right[index])
        back = tuple((other, one) for one, other in self._ring) if copy is not None else ()
        recover = _recover(self._mesh, leaf.sharding.spec, back)
        return recover(own, own if copy is None else copy, ok)


@functools.cache
def _shift(mesh: Any, spec: PartitionSpec, ring: tuple[tuple[int, int], ...]) -> Any:
    shift = lambda part: jax.lax.ppermute(part, mesh.axis_names, ring)
    return jax.jit(jax.shard_map(shift, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))


@functools.cache
def _recover(mesh: Any, spec: PartitionSpec, back: tuple[tuple[int, int], ...]) -> Any:
    named = {axis for axes in spec for axis in ((axes,) if isinstance(axes, str) else axes or ())}
    replicas = tuple(axis for axis in mesh.axis_names if axis not in named)

    def recover(own: jax.Array, copy: jax.Array, ok: jax.Array) -> jax.Array:
        bits, ok = _to_bits(own), ok[0]
        if back:
            returned = jax.lax.ppermute(_to_bits(copy), mesh.axis_names, back)
            bits = jnp.where(ok, bits, returned)
            ok = jnp.maximum(ok, jax.lax.ppermute(ok, mesh.axis_names, back))
        if replicas:
            first = jnp.argmax(jax.lax.all_gather(ok, replicas))
            gives = jax.lax.axis_index(replicas) == first
            bits = jax.lax.psum(jnp.where(gives, bits, 0), replicas)
        return _from_bits(bits, own.dtype)

    everywhere = PartitionSpec(mesh.axis_names)
    return jax.jit(
        jax.shard_map(recover, mesh=mesh, in_specs=(spec, spec, everywhere), out_specs=spec, check_vma=False)
    )


# As integers, since 0 + x is x for them: of floats it is not where x is -0.0. Of 32 bits, which every network adds.
def _to_bits(array: jax.Array) -> jax.Array:
    if jnp.issubdtype(array.dtype, jnp.bool_):
        return array.astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(array, f"uint{8 * array.dtype.itemsize}")
    return bits if array.dtype.itemsize == 8 else bits.astype(jnp.uint32)


def _from_bits(bits: jax.Array, dtype: Any) -> jax.Array:
    if jnp.issubdtype(dtype, jnp.bool_):
        return bits.astype(bool)
    return jax.lax.bitcast_convert_type(bits.astype(f"uint{8 * dtype.itemsize}"), dtype)
