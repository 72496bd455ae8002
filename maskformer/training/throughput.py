"""How fast a run is: tokens and floating-point operations per second, and the share of the hardware's peak."""

from __future__ import annotations

import time

import jax

# Dense bfloat16 peak per JAX device in FLOP/s, by a part of jax's `device_kind`, from the vendors' data sheets.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,  # a chip is two devices
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
}


def peak_flops(device: jax.Device) -> float | None:
    """Peak of one device, or None where it is unknown (CPUs)."""
    return next((peak for kind, peak in PEAK_FLOPS.items() if kind in device.device_kind), None)


class Clock:
    """Turns counts per window into rates; the time from `pause` to `resume`, such as an evaluation's, is left out."""

    def __init__(self, flops_per_token: float, devices: list[jax.Device]):
        self._flops_per_token = flops_per_token
        peaks = [peak_flops(device) for device in devices]
        self._peak = sum(peak for peak in peaks if peak is not None) if None not in peaks else None
        # The first window includes compilation: it has no rate worth telling.
        self._since: float | None = None
        self._paused: float | None = None

    def rates(self, tokens: int) -> dict[str, float]:
        """Rates since the last call; empty for the first window, which holds the compilation."""
        now, since = time.perf_counter(), self._since
        self._since = now
        if since is None or now <= since:
            return {}
        seconds = now - since
        flops_per_second = self._flops_per_token * tokens / seconds
        rates = {
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "tflops_per_second": flops_per_second / 1e12,
        }
        if self._peak is not None:
            rates["mfu"] = flops_per_second / self._peak
        return rates

    def pause(self) -> None:
        """Training stops now, with nothing queued on the device."""
        self._paused = time.perf_counter()

    def resume(self) -> None:
        """Training goes on now, and the window with it."""
        # The window's beginning moves with the pause: the tokens that were seen before it keep their time.
        if self._since is not None and self._paused is not None:
            self._since += time.perf_counter() - self._paused
        self._paused = None
