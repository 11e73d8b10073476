"""How the sequence kernels are compiled and kept on disk."""

import hashlib
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from numba import njit
from numba.core import event
from numba.core.caching import FunctionCache, IndexDataCacheFile

from ..activations import ARITHMETIC

__all__ = ["cached", "part"]

_PACKAGE = Path(__file__).parents[1]

#: Modules of the GPU alone.
_GPU = ("cuda", "plan", "ptx")


@cache
def _source_hash(outer: str) -> str:
    """Hash every file whose code ends up inside a kernel; Numba itself watches only that of the outer function."""
    digest = hashlib.sha256()
    scalar = [_PACKAGE / f"{name}.py" for name in ("activations", "cells", "checks", "losses")]
    kernels = [path for path in sorted((_PACKAGE / "kernels").glob("*.py")) if path.stem not in _GPU]
    for path in [*scalar, *kernels, Path(outer)]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


class _KernelCache(FunctionCache):
    """Numba's on-disk cache for a function made by a factory.

    Numba's own key of a closure changes from process to process, and its numbering of data files lets two processes
    that compile two closures of one factory overwrite each other. Here each variant has a file of its own, valid as
    long as the sources are.
    """

    def __init__(self, py_func, variant):
        super().__init__(py_func)
        self._variant = variant
        self.label, self.started = f"{py_func.__name__} ({variant})", 0.0
        name, source = f"{self._impl.filename_base}-{variant}", _source_hash(py_func.__code__.co_filename)
        self._cache_file = IndexDataCacheFile(self.cache_path, name, source)

    def _index_key(self, sig, codegen):
        return sig, codegen.magic_tuple(), self._variant


class _Announcement(event.Listener):
    """Say that a kernel is compiled, and how long it took: the first call in a new environment takes seconds."""

    def _cache_of(self, happening):
        cache = getattr(happening.data["dispatcher"], "_cache", None)
        return cache if isinstance(cache, _KernelCache) else None

    def on_start(self, happening):
        if cache := self._cache_of(happening):
            cache.started = time.perf_counter()
            print(f"rnnlab compiles {cache.label} …", end="", file=sys.stderr, flush=True)

    def on_end(self, happening):
        if cache := self._cache_of(happening):
            print(f" {time.perf_counter() - cache.started:.1f} s, once in this environment", file=sys.stderr)


event.register("numba:compile", _Announcement())


def part(*key, **options):
    """Return the decorator of a compiled function inside kernels that a factory makes anew for every `key`.

    The linker takes functions of one name for one function, and kernels from the cache bring names along from other
    processes. Numba numbers the closures of a process, which tells nothing to another: so the key goes into the name.
    """

    def decorate(function):
        function.__qualname__ = "_".join([function.__qualname__, *map(str, key)])
        return njit(**options)(function)

    return decorate


def cached(variant: str, *parts: Any) -> Callable[[Any], Any]:
    """Return the decorator of a function that Python calls: compiled without the GIL, kept on disk as `variant`.

    `parts` are the scalar functions inside it. With one that is not rnnlab's own nothing is kept: its source is not in
    the hash.
    """

    def decorate(function):
        dispatcher = part(variant, nogil=True, **ARITHMETIC)(function)
        if not all(part.py_func.__module__.startswith("rnnlab.") for part in parts):
            return dispatcher
        dispatcher._cache = _KernelCache(function, variant)
        return dispatcher

    return decorate
