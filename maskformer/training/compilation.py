"""What was compiled once is read again: JAX's persistent compilation cache, on by default in the cache folder.

`$MASKFORMER_CACHE/xla/<machine>`, which may be in a bucket, holds one file a program. JAX's key of a program covers the
program itself, the versions of JAX and its compiler, the flags of XLA and the devices, but not all that XLA takes from
a CPU when it compiles for one (its instructions, the number of its cores), so each kind of machine has a folder of its
own: what is read was compiled for a machine like this one, and computes the same bits.

`JAX_COMPILATION_CACHE_DIR` names another folder, which is then left to JAX alone, and `JAX_ENABLE_COMPILATION_CACHE=0`
turns the cache off. `JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS` (1) is how long a program must compile to be kept. Of
several processes the first one writes and all read; on CPU, where JAX's key differs between them, each reads its own.
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

from maskformer import paths
from maskformer.paths import AnyPath, StorePath

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
      The folder of this machine that JAX has been given, or None.
    """
    import jax

    _listen()
    if not jax.config.jax_enable_compilation_cache:
        return None
    _let_all_processes_write()
    if jax.config.jax_compilation_cache_dir is None:
        try:
            folder, local = _folders()
        except (ValueError, OSError) as error:
            logger.warning("no compilation cache: %s", error)
            return None
        _use_own_files(folder)
        # Not every address is a path to JAX, which keeps what XLA found out about a GPU's kernels there as well.
        jax.config.update("jax_compilation_cache_dir", str(local))
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


def _folders() -> tuple[AnyPath, pathlib.Path]:
    """Where programs are kept, and a folder on this machine: the same one, unless the cache is in a bucket."""
    from maskformer.data import cache

    local = cache.cache_dir() / "xla" / machine()
    local.mkdir(parents=True, exist_ok=True)
    _trim(local)
    chosen = os.environ.get("MASKFORMER_CACHE")
    if chosen and not paths.is_local(chosen):
        # The bucket itself, not its mirror here: what the first process compiled is there for all hosts.
        return paths.resolve(chosen) / "xla" / machine(), local
    return local, local


def _listen() -> None:
    global _listening
    if not _listening:
        from jax import monitoring

        monitoring.register_event_listener(_count)
        _listening = True


def _count(event: str, **_: Any) -> None:
    if event in _EVENTS:
        _counts[_EVENTS[event]] += 1


def _let_all_processes_write() -> None:
    """Keep what each process compiled for a CPU, where JAX's key of a program depends on the process.

    JAX lets the first one write only. The others would compile at every start while that one waits, and gloo gives up
    after half a minute.
    """
    import jax
    from jax._src import compilation_cache, compiler, distributed

    write = compiler._cache_write
    if getattr(write, "of_all_processes", False):
        return

    # JAX 0.10 has callbacks of the host as a last argument, with which nothing is kept.
    def write_own(key: str, seconds: float, name: str, backend: Any, executable: Any, *callbacks: Any) -> None:
        write(key, seconds, name, backend, executable, *callbacks)
        long_enough = seconds >= jax.config.jax_persistent_cache_min_compile_time_secs
        if backend.platform == "cpu" and distributed.global_state.process_id and long_enough and not any(callbacks):
            # As for the first one: what cannot be kept is compiled again.
            with contextlib.suppress(Exception):
                compilation_cache.put_executable_and_time(key, name, executable, backend, int(seconds))

    write_own.of_all_processes = True  # type: ignore[attr-defined]
    compiler._cache_write = write_own


def _use_own_files(folder: AnyPath) -> None:
    """Have JAX keep its programs in files of `folder` that appear under their name only when they are whole.

    By itself it writes them in place and never again: what a kill or a full disk cut off would be warned of, and
    compiled anew, at every later start, and two processes would read each other's halves.
    """
    from jax._src import compilation_cache
    from jax._src.compilation_cache_interface import CacheInterface

    class WholeFiles(CacheInterface):
        def __init__(self) -> None:
            self._path = folder
            self._failed = False

        def get(self, key: str) -> bytes | None:
            try:
                return (self._path / f"{key}-cache").read_bytes()
            except FileNotFoundError:
                return None
            except OSError as error:
                self._say("read", error)
                return None

        def put(self, key: str, value: bytes) -> None:
            target = self._path / f"{key}-cache"
            try:
                if isinstance(target, StorePath):
                    target.write_bytes(value)
                    return
                partial = target.with_name(f"{uuid.uuid4().hex}{_PARTIAL}")
                try:
                    partial.write_bytes(value)
                    partial.replace(target)
                except OSError:
                    partial.unlink(missing_ok=True)
                    raise
            except OSError as error:
                self._say("written", error)

        def _say(self, done: str, error: OSError) -> None:
            level = logging.DEBUG if self._failed else logging.WARNING
            logger.log(level, "compilation cache %s: cannot be %s (%s)", self._path, done, error.strerror or error)
            self._failed = True

    # Private, but the one place where JAX makes its cache.
    compilation_cache.get_file_cache = lambda path: (WholeFiles(), path)


def _trim(folder: pathlib.Path, most: int = MOST_BYTES) -> None:
    """Remove the oldest entries of a cache that has grown beyond `most` bytes, and what killed processes left."""
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
