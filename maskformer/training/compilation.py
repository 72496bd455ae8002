"""What was compiled once is read again: JAX's persistent compilation cache, on by default in the cache folder.

`$MASKFORMER_CACHE/xla/<machine>` holds one file a program. JAX's key of a program covers the program itself, the
versions of JAX and its compiler, the flags of XLA and the devices, but not all that XLA takes from a CPU when it
compiles for one (its instructions, the number of its cores), so each kind of machine has a folder of its own: what is
read was compiled for a machine like this one, and computes the same bits.

`JAX_COMPILATION_CACHE_DIR` names another folder, which is then left to JAX alone, and `JAX_ENABLE_COMPILATION_CACHE=0`
turns the cache off. `JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS` (1) is how long a program must compile to be kept. Of
several processes the first one writes and all read.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import pathlib
import platform
import time
import uuid
from typing import Any

logger = logging.getLogger(__name__)

# Beyond this, the oldest entries are removed at the start of a run, down to three quarters.
MOST_BYTES = 20_000_000_000
_PARTIAL = ".partial"
_PARTIAL_SECONDS = 86_400.0

_EVENTS = {"/jax/compilation_cache/cache_hits": "hits", "/jax/compilation_cache/cache_misses": "misses"}
_counts = {"hits": 0, "misses": 0}
_listening = False


def use_cache() -> str | None:
    """Turn the cache on, unless the environment says otherwise; call it before anything is compiled.

    A folder that cannot be used is said in a warning, and the run goes on without a cache.

    Returns:
      The folder in use, or None.
    """
    import jax

    from maskformer.data.cache import cache_dir
    from maskformer.textfiles import DataError

    _listen()
    if not jax.config.jax_enable_compilation_cache:
        return None
    if jax.config.jax_compilation_cache_dir is None:
        try:
            folder = cache_dir() / "xla" / machine()
            folder.mkdir(parents=True, exist_ok=True)
        except (DataError, OSError) as error:
            logger.warning("no compilation cache: %s", error)
            return None
        _trim(folder)
        _write_whole_files()
        jax.config.update("jax_compilation_cache_dir", str(folder))
    return jax.config.jax_compilation_cache_dir


def counts() -> tuple[int, int]:
    """Programs that this process has read from the cache, and those that it has compiled and found worth keeping."""
    return _counts["hits"], _counts["misses"]


def in_use() -> bool:
    """Whether programs are looked for in a cache."""
    import jax

    return bool(jax.config.jax_enable_compilation_cache and jax.config.jax_compilation_cache_dir)


def machine() -> str:
    """A name for machines on which XLA compiles a program for the CPU to the same code: 16 hex digits."""
    parts = [platform.machine(), str(os.cpu_count())]
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        parts.append(platform.processor())
    else:
        # x86 has flags, and ARM features; the lines are those of the first core.
        for name in ("model name", "flags", "Features", "CPU part"):
            value = next((line.partition(":")[2] for line in lines if line.partition(":")[0].strip() == name), "")
            parts.append(" ".join(sorted(value.split())))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _listen() -> None:
    global _listening
    if not _listening:
        from jax import monitoring

        monitoring.register_event_listener(_count)
        _listening = True


def _count(event: str, **_: Any) -> None:
    if event in _EVENTS:
        _counts[_EVENTS[event]] += 1


def _write_whole_files() -> None:
    """Entries appear under their name only when they are whole.

    JAX writes them in place and never again: what a kill or a full disk cut off would be warned of, and compiled anew,
    at every later start, and two processes would read each other's halves.
    """
    import jax
    from jax._src import compilation_cache, lru_cache

    class WholeFiles(lru_cache.LRUCache):
        failed = False

        def put(self, key: str, value: bytes) -> None:
            if self.eviction_enabled or "://" in str(self.path):
                # Under its own lock, or a store in which objects appear whole.
                return super().put(key, value)
            target = self.path / f"{key}-cache"
            partial = self.path / f"{uuid.uuid4().hex}{_PARTIAL}"
            try:
                partial.write_bytes(value)
                partial.replace(target)
            except OSError as error:
                level = logging.DEBUG if self.failed else logging.WARNING
                logger.log(level, "compilation cache %s: cannot be written (%s)", self.path, error.strerror or error)
                self.failed = True
                with contextlib.suppress(OSError):
                    partial.unlink()

    # Private, but the one place where JAX makes its cache.
    def cache(path: str) -> tuple[Any, str]:
        return WholeFiles(path, max_size=jax.config.jax_compilation_cache_max_size), path

    compilation_cache.get_file_cache = cache


def _trim(folder: Any, most: int = MOST_BYTES) -> None:
    """Remove the oldest entries of a cache that has grown beyond `most` bytes, and what killed processes left."""
    if "://" in str(folder):
        return
    now, entries = time.time(), []
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            with contextlib.suppress(OSError):  # another process may remove it at this moment
                if not entry.is_file():
                    continue
                told = entry.stat()
                if entry.name.endswith(_PARTIAL) and now - told.st_mtime > _PARTIAL_SECONDS:
                    os.unlink(entry.path)
                else:
                    entries.append((told.st_mtime, told.st_size, entry.path))
    size = sum(of for _, of, _ in entries)
    if size <= most:
        return
    for _, of, path in sorted(entries):
        if size <= most * 3 / 4:
            break
        with contextlib.suppress(OSError):
            os.unlink(path)
        size -= of
