"""What a plan knows of each chip: memory, peak rates, links, and what an hour of it is said to cost.

Rates are the vendors' data sheets', dense bfloat16, one way for links. `usable` is what the TPU compiler itself says is
free for a program (its out-of-memory message names it); of a GPU it is the share that JAX preallocates by default.
Prices are on-demand list prices of one region at the time of writing, rounded: estimates to be overridden
(`maskformer plan --price`).
"""

from __future__ import annotations

import dataclasses

from maskformer.checks import nearest, shown

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of chip.

    Attributes:
      name: as in `--topology NAME:SHAPE`.
      platform: "tpu" or "gpu".
      memory, usable: bytes of HBM of one device, and how many of them a program may use.
      memory_bandwidth: bytes/s of one device.
      flops: dense bfloat16 FLOP/s of one device.
      devices: JAX devices of one chip; 2 on tpu7x.
      chips_per_host: of a machine that is a part of a pod.
      torus: dimensions of the ICI's torus; 0 where a switch joins the devices of a host (NVLink).
      link_bandwidth: bytes/s one way of one ICI link, of which a chip has two for each dimension; of a switched device,
        all that it sends.
      network_bandwidth: bytes/s one way of a host's network: DCN between slices, InfiniBand or RoCE between GPU hosts.
      price: US dollars for one chip and hour, an estimate.
    """

    name: str
    platform: str
    memory: float
    usable: float
    memory_bandwidth: float
    flops: float
    devices: int
    chips_per_host: int
    torus: int
    link_bandwidth: float
    network_bandwidth: float
    price: float


def _tpu(
    name: str, gib: float, usable_gib: float, bandwidth: float, flops: float, torus: int, link: float, price: float,
    devices: int = 1,
) -> Chip:
    return Chip(
        name, "tpu", gib * GIB / devices, usable_gib * GIB, bandwidth / devices, flops / devices, devices, 4, torus,
        link, 2.5e10, price,
    )  # fmt: skip


def _gpu(name: str, gigabytes: float, bandwidth: float, flops: float, nvlink: float, port: float, price: float) -> Chip:
    memory = gigabytes * 1e9
    # JAX preallocates three quarters of a GPU's memory; XLA_PYTHON_CLIENT_MEM_FRACTION moves that.
    return Chip(name, "gpu", memory, 0.75 * memory, bandwidth, flops, 1, 8, 0, nvlink, 8 * port, price)


CHIPS = {
    chip.name: chip
    for chip in (
        _tpu("v4", 32, 30.75, 1.23e12, 2.75e14, 3, 4.5e10, 3.22),
        _tpu("v5e", 16, 15.75, 8.1e11, 1.97e14, 2, 4.5e10, 1.20),
        _tpu("v5p", 96, 95.74, 2.8e12, 4.59e14, 3, 9e10, 4.20),
        _tpu("v6e", 32, 31.25, 1.6e12, 9.2e14, 2, 9e10, 2.70),
        _tpu("tpu7x", 192, 94.75, 7.4e12, 2.307e15, 3, 9e10, 12.0, devices=2),
        _gpu("a100", 80, 2.0e12, 3.12e14, 3e11, 2.5e10, 3.7),
        _gpu("h100", 80, 3.35e12, 9.89e14, 4.5e11, 5e10, 4.0),
        _gpu("h200", 141, 4.8e12, 9.89e14, 4.5e11, 5e10, 5.0),
        _gpu("b200", 180, 8.0e12, 2.25e15, 9e11, 5e10, 8.0),
    )
}


def chip(name: str) -> Chip:
    """The chip called `name`.

    Raises:
      ValueError: there is no such chip.

    >>> chip("v5e").usable / 2**30
    15.75
    >>> chip("v5")
    Traceback (most recent call last):
        ...
    ValueError: --topology: chip 'v5': expected one of v4, v5e, v5p, v6e, tpu7x, a100, h100, h200, b200; did you mean
    'v5p'?
    """
    if name not in CHIPS:
        raise ValueError(
            f"--topology: chip {shown(name)}: expected one of {', '.join(CHIPS)}{nearest(name, CHIPS, cutoff=0.4)}"
        )
    return CHIPS[name]
