"""Import and compile time, each in a fresh process: without and with Numba's cache on disk."""

from . import shapes

_USE = """
from rnnlab.kernels import cpu
cpu.warmup({cell!r}, "float32")
"""

_COLD = """
import os, tempfile
folder = tempfile.TemporaryDirectory()
os.environ["NUMBA_CACHE_DIR"] = folder.name
"""


class Import:
    version = "1"

    def timeraw_import(self):
        return "import rnnlab"


class FirstCall:
    version = "1"
    params = (shapes.CELLS,)
    param_names = ("cell",)
    number = 1
    repeat = 3
    timeout = 600  # a slow machine takes minutes

    def timeraw_cold(self, cell):
        return _COLD + _USE.format(cell=cell)

    def timeraw_cached(self, cell):
        return _USE.format(cell=cell)
