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

__all__ = ["cached", "part", "written"]

_PACKAGE = Path(__file__).parents[1]

#: What modules of the GPU alone begin with.
_GPU = ("cuda", "plan", "ptx")


def _read_sources():
    """Hash every file whose code ends up inside a kernel; Numba itself watches only that of the outer function."""
    scalar = [_PACKAGE / f"{name}.py" for name in ("activations", "cells", "losses")]
    kernels = [path for path in sorted((_PACKAGE / "kernels").glob("*.py")) if not path.stem.startswith(_GPU)]
    return hashlib.sha256(b"".join(path.read_bytes() for path in [*scalar, *kernels]))


#: As they were when this process began, for that is what it compiles.
_SOURCES = _read_sources()


@cache
def _source_hash(outer):
    digest = _SOURCES.copy()
    digest.update(Path(outer).read_bytes())
    return digest.hexdigest()


class _Files(IndexDataCacheFile):
    """Files whose names say what they hold, written before the index names them.

    Numba takes the next free number: two processes that compile for two types at once would take the same, and what is
    killed between index and code would leave the new name of old code.
    """

    def save(self, key, data):
        index = self._load_index()
        if not index:  # there is none, or one of other sources
            for path in Path(self._cache_path).glob(f"{Path(self._index_name).stem}.*.nbc"):
                path.unlink(missing_ok=True)
        name = self._data_name(int(hashlib.sha256(repr((self._source_stamp, key)).encode()).hexdigest()[:15], 16))
        self._save_data(name, data)
        self._save_index(self._load_index() | {key: name})


class _KernelCache(FunctionCache):
    """Numba's on-disk cache for a function made by a factory.

    Numba's own key of a closure changes from process to process. Here each variant has files of its own, valid as long
    as the sources are.
    """

    def __init__(self, py_func, variant):
        super().__init__(py_func)
        self._variant = variant
        self.label, self.started = f"{py_func.__name__} ({variant})", 0.0
        name, source = f"{self._impl.filename_base}-{variant}", _source_hash(py_func.__code__.co_filename)
        self._cache_file = _Files(self.cache_path, name, source)

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


def written(name: str, arguments: str, lines: list[str], **names: Any) -> Any:
    """Return the function of these lines of source, to which `names` are known; it is not compiled yet.

    What is written out compiles faster than a recursion over closures.
    """
    space = dict(names)
    exec("\n    ".join([f"def {name}({arguments}):", *lines]), space)
    return space[name]


def _is_own(function):
    inner = [cell.cell_contents for cell in function.py_func.__closure__ or ()]
    return function.py_func.__module__.startswith("rnnlab.") and all(_is_own(f) for f in inner if hasattr(f, "py_func"))


def cached(variant: str, *parts: Any) -> Callable[[Any], Any]:
    """Return the decorator of a function that Python calls: compiled without the GIL, kept on disk as `variant`.

    `parts` are the scalar functions inside it. With one that is not rnnlab's own, or calls such a one, nothing is kept:
    its source is not in the hash.
    """

    def decorate(function):
        dispatcher = part(variant, nogil=True, **ARITHMETIC)(function)
        if not all(map(_is_own, parts)):
            return dispatcher
        dispatcher._cache = _KernelCache(function, variant)
        return dispatcher

    return decorate
