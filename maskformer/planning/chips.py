"""What a plan knows of each chip: memory, peak rates, links, and what an hour of it is said to cost.

Rates are the vendors' data sheets', one way for links; peaks are those that measured MFU is a share of. `usable` is
what the TPU compiler itself says is free for a program (its out-of-memory message names it); of a GPU it is the share
that JAX preallocates by default. Prices are on-demand list prices of one region at the time of writing, rounded:
estimates to be overridden (`maskformer plan --price`).
"""

from __future__ import annotations

import dataclasses

from maskformer.checks import nearest, shown
from maskformer.training.throughput import PEAK_FLOPS

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
    name: str, kind: str, gib: float, usable_gib: float, bandwidth: float, torus: int, link: float, price: float,
    devices: int = 1,
) -> Chip:  # fmt: skip
    return Chip(
        name, "tpu", gib * GIB / devices, usable_gib * GIB, bandwidth / devices, PEAK_FLOPS[kind], devices, 4, torus,
        link, 2.5e10, price,
    )  # fmt: skip


def _gpu(name: str, gigabytes: float, bandwidth: float, nvlink: float, port: float, price: float) -> Chip:
    memory, flops = gigabytes * 1e9, PEAK_FLOPS[name.upper()]
    # JAX preallocates three quarters of a GPU's memory; XLA_PYTHON_CLIENT_MEM_FRACTION moves that.
    return Chip(name, "gpu", memory, 0.75 * memory, bandwidth, flops, 1, 8, 0, nvlink, 8 * port, price)


CHIPS = {
    chip.name: chip
    for chip in (
        _tpu("v4", "TPU v4", 32, 30.75, 1.23e12, 3, 4.5e10, 3.22),
        _tpu("v5e", "TPU v5 lite", 16, 15.75, 8.1e11, 2, 4.5e10, 1.20),
        _tpu("v5p", "TPU v5", 96, 95.74, 2.8e12, 3, 9e10, 4.20),
        _tpu("v6e", "TPU v6 lite", 32, 31.25, 1.6e12, 2, 9e10, 2.70),
        _tpu("tpu7x", "TPU7x", 192, 94.75, 7.4e12, 3, 9e10, 12.0, devices=2),
        _gpu("a100", 80, 2.0e12, 3e11, 2.5e10, 3.7),
        _gpu("h100", 80, 3.35e12, 4.5e11, 5e10, 4.0),
        _gpu("h200", 141, 4.8e12, 4.5e11, 5e10, 5.0),
        _gpu("b200", 180, 8.0e12, 9e11, 5e10, 8.0),
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
