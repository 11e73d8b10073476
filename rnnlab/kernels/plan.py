"""Where the numbers of a GPU kernel lie, and who computes them: arithmetic alone, no GPU needed.

A **team** of blocks owns a slice of the batch for the whole sequence. Each of its blocks owns some hidden units with
all their gates: it keeps their rows of W_hh (going back: columns), and at every step needs h (dL/dah) of all units,
which the blocks send each other. The tiers differ in how:

- A: a team is one cluster; numbers travel through distributed shared memory, one cluster barrier a step.
- B: one team is the whole grid; numbers travel through L2, one barrier over global counters a step.
- C: as B, and those weights that neither registers nor shared memory hold are read from L2 at every step.

A product is cut among the workers of a block: threads that multiply and add, or warps whose tensor cores do. Worker
(slice, group) holds `tiles` tiles of outputs, every `groups`-th, and of their depth `chunks` chunks, every `slices`-th;
a chunk of weights is four words a thread. Sums over the slices are added up by the threads that run the cell.
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

from ..cells import CELLS, Cell

__all__ = ["ARITHMETIC", "H200", "Arithmetic", "Chip", "Plan", "Product", "explain", "plan"]


class Chip(NamedTuple):
    """What a plan needs to know of a GPU: compute capability, multiprocessors, bytes of shared memory and registers.

    clusters: (blocks, how many clusters of so many run at once), where that is known; see `at_once`.
    """

    capability: tuple[int, int]
    processors: int
    shared: int
    registers: int = 65_536
    clusters: tuple[tuple[int, int], ...] = ()

    def at_once(self, blocks: int) -> int:
        """Return how many clusters of so many blocks run at once: fewer than fit, as each must lie in one GPC."""
        return dict(self.clusters).get(blocks, self.processors // blocks)


H200 = Chip((9, 0), 132, 232_448, clusters=((2, 66), (4, 31), (8, 15), (16, 7)))


class Arithmetic(NamedTuple):
    """How a dtype multiplies: bytes of a number, numbers in a chunk's depth, threads and outputs of a tile.

    rate: multiply-adds a cycle for which one multiprocessor of a Hopper chip is built.
    """

    item: int
    depth: int
    lanes: int
    rows: int
    rate: int

    @property
    def word(self) -> int:
        """Bytes of a word of weights: a register of a tensor core, or one number."""
        return 8 if self.item == 8 else 4

    @property
    def words(self) -> int:
        """Words of the vector in the depth of a chunk."""
        return self.depth * self.item // self.word


#: float32 and float64 multiply and add in the registers of a thread; the others in tensor cores, m16n8k8 and m16n8k16.
ARITHMETIC = {
    "float32": Arithmetic(4, 4, 1, 1, 128),
    "float64": Arithmetic(8, 4, 1, 1, 64),
    "tf32": Arithmetic(4, 8, 32, 16, 1024),
    "bf16": Arithmetic(2, 16, 32, 16, 2048),
    "fp16": Arithmetic(2, 16, 32, 16, 2048),
}

#: Cycles: a barrier of a cluster and of the grid, latencies of a step, of a tile and of two tensor products that follow
#: each other; bytes a cycle from L2 and from shared memory.
_CLUSTER, _GRID, _STEP, _TILE, _TENSOR, _L2_BYTES, _SHARED_BYTES = 400, 1700, 500, 250, 17, 32, 128


class Product(NamedTuple):
    """One product with weights that stay: `gates`·units outputs of `depth` numbers, cut as the module says.

    registers and kept: chunks of a worker in registers and in shared memory, the rest are streamed; row: words of a
    vector, padded; sums: numbers of a row of outputs, padded.
    """

    gates: int
    depth: int
    tiles: int
    groups: int
    slices: int
    chunks: int
    registers: int
    kept: int
    row: int
    sums: int

    @property
    def streamed(self) -> int:
        """Chunks of a worker that come from L2 at every step."""
        return self.chunks - self.registers - self.kept


class Plan(NamedTuple):
    """The layout of one kernel.

    teams of `blocks` blocks of `threads` threads; units of a block, sequences of a team (`slice`), of them those that
    are taken at a time (`tile`) and within a product (`inner`); offsets of the regions of shared memory in words: two
    vectors, sums, weights of two products, the end; cycles of a step as estimated.
    """

    cell: str
    dtype: str
    batch: int
    hidden: int
    backward: bool
    tier: str
    teams: int
    blocks: int
    threads: int
    units: int
    slice: int
    tile: int
    inner: int
    products: tuple[Product, ...]
    regions: tuple[int, ...]
    cycles: int

    @property
    def rows(self) -> int:
        """Rows of sums: a tile, rounded up to what a product takes at a time."""
        return -(-self.tile // self.inner) * self.inner

    @property
    def vectors(self) -> int:
        """Rows of vectors in shared memory: all of the slice, or with tiers B and C those of a tile.

        A tensor core takes eight vectors: of a tile of fewer it is given the last one again.
        """
        last = self.tile if self.tile < min(self.inner, 8) else self.rows
        return (-(-self.slice // self.tile) - 1) * self.tile + last if self.tier == "A" else last

    @property
    def shared(self) -> int:
        """Bytes of shared memory of a block."""
        return self.regions[-1] * ARITHMETIC[self.dtype].word


def _products(cell: Cell, H: int, backward: bool) -> list[tuple[int, int]]:
    """Return (gates of a unit, depth) of each product; with a reset that of the last gate is the second."""
    G, head = len(cell.gates), len(cell.gates) - bool(cell.reset)
    first = (1, head * H) if backward else (head, H)
    return [first, (1, H)] if head < G else [first]


def _cut(gates: int, depth: int, units: int, threads: int, dtype: str, words: int) -> Product:
    """Cut a product among the workers of a block, with up to `words` words of weights in the registers of a thread."""
    kind = ARITHMETIC[dtype]
    workers, tiles = threads // kind.lanes, -(-gates * units // kind.rows)
    each = max(-(-tiles // workers), min(4 if kind.rows == 1 else 1, tiles))
    groups, chunks = -(-tiles // each), -(-depth // kind.depth)
    a_worker = -(-chunks // min(workers // groups, chunks))
    slices = -(-chunks // a_worker)
    registers = min(a_worker, words * 4 // kind.word // (4 * each))
    pad = 4 if kind.rows > 1 else 0
    row, sums = slices * a_worker * kind.words + pad, groups * each * kind.rows + pad
    return Product(gates, depth, each, groups, slices, a_worker, registers, 0, row, sums)


def _lay_out(
    cell: Cell, dtype: str, B: int, H: int, backward: bool, chip: Chip, team: tuple[int, bool], threads: int, part: int,
    tile: int,
) -> Plan | None:  # fmt: skip
    """Return the plan for (blocks of a team, whether they are a cluster), or None where it does not fit."""
    kind, cluster, units = ARITHMETIC[dtype], team[1], -(-H // team[0])
    blocks = -(-H // units)
    if cluster:  # sizes that hardware is made for; a block may be without units
        blocks = 1 << (blocks - 1).bit_length()
    if tile * units > threads or (threads > 256 and not cluster):  # 128 registers are too few to be without spills
        return None
    teams, of_cell = -(-B // part), _products(cell, H, backward)
    # Of the registers of a thread, 255 at most, half hold weights, less what addresses and a cell take, more in float64
    # and, of 128, where threads multiply without tensor cores.
    taken = 72 if kind.word == 8 else 24 if threads > 256 and kind.rows == 1 else 16
    spare = max(0, min(256, chip.registers // threads) // 2 - taken)
    words = spare // len(of_cell)
    products = [_cut(gates, depth, units, threads, dtype, words) for gates, depth in of_cell]
    resident = all(product.chunks == product.registers for product in products)
    few, many = (8, 16) if kind.rows > 1 else (4, 4 if kind.word == 8 else 8)  # sums of float64 take twice the room
    inner = few if resident or tile <= few else many
    if inner > few:  # weights that are loaded serve more sequences, whose sums take registers
        most = (64 if kind.rows > 1 else max(0, spare - 24)) // len(of_cell)
        products = [_cut(gates, depth, units, threads, dtype, min(words, most)) for gates, depth in of_cell]
    if kind.rows == 1:
        inner = min(inner, tile)
    tier = "A" if cluster else "B"
    made = Plan(
        cell.name, dtype, B, H, backward, tier, teams, blocks, threads, units, part, tile, inner, tuple(products), (), 0
    )
    # Vectors are double where they are in the memory of others: one is written while the other is read.
    vectors = [products[0].row * made.vectors * (2 if cluster else 1), *(p.row * made.vectors for p in products[1:])]
    if not cluster:
        vectors = [max(vectors), 0][: len(products)]
    sums = max(product.slices * product.sums for product in products) * made.rows
    free = chip.shared // kind.word - sum(vectors) - sums
    if free < 0:
        return None
    for k, product in enumerate(products):
        size = 4 * product.tiles * threads
        kept = max(0, min(product.chunks - product.registers, free // size))
        products[k] = product._replace(kept=kept)
        free -= kept * size
    streams = any(product.streamed for product in products)
    if streams and cluster:
        return None
    weights = [4 * p.kept * p.tiles * threads for p in products]
    sizes = (*(*vectors, 0)[:2], sums, *(*weights, 0)[:2])
    ends = tuple(accumulate((-(-size // 4) * 4 for size in sizes), initial=0))
    made = made._replace(tier="C" if streams else tier, products=tuple(products), regions=ends)
    return made._replace(cycles=_cycles(made, chip)) if ends[-1] * kind.word <= chip.shared else None


def _cycles(made: Plan, chip: Chip) -> int:
    """Estimate the cycles of a step, all waves of teams together; measured barriers, published rates."""
    kind, cycles = ARITHMETIC[made.dtype], 0.0
    for product in made.products:
        workers = product.slices * product.groups
        chunk, passes = product.tiles * made.threads * 4 * kind.word, made.rows // made.inner
        tile = product.tiles * kind.rows * workers * product.chunks * kind.depth * made.rows / kind.rate
        if kind.rows > 1:
            tile = max(tile, product.chunks * passes * _TENSOR)
        tile += made.threads / 32 * product.chunks * made.rows / (1 if kind.rows == 1 else 4)
        tile += product.kept * chunk * passes / _SHARED_BYTES + product.streamed * chunk * passes / _L2_BYTES
        tile += 2 * product.slices * made.rows * product.sums * kind.word / _SHARED_BYTES + _TILE
        if made.tier != "A":
            tile += made.rows * product.row * kind.word / _L2_BYTES + _TILE
        barrier = _GRID if made.tier != "A" else _CLUSTER if made.blocks > 1 else 0
        cycles += tile * -(-made.slice // made.tile) + barrier
    waves = -(-made.teams // max(1, chip.at_once(made.blocks))) if made.tier == "A" else 1
    return round((cycles + _STEP) * waves)


def _candidates(
    cell: Cell,
    dtype: str,
    B: int,
    H: int,
    backward: bool,
    chip: Chip,
    blocks: tuple[int, ...],
    threads: tuple[int, ...],
) -> Iterator[Plan]:
    powers = [2**k for k in range(7)]
    most = 16 if chip.capability >= (9, 0) else 1
    teams = [(n, True) for n in blocks or (1, 2, 4, 8, 16)] + [(n, False) for n in blocks or (chip.processors,)]
    for team in teams:
        if team[1] and (team[0] > most or not chip.at_once(team[0])):
            continue
        whole = -(-B // chip.at_once(team[0])) if team[1] else B
        for part in {whole, *(p for p in powers if p < whole)} if team[1] else {B}:
            for tile in {part, *(p for p in powers if p < part)}:
                for count in threads:
                    if made := _lay_out(cell, dtype, B, H, backward, chip, team, count, part, tile):
                        yield made


@lru_cache(4096)
def plan(
    cell_name: str,
    dtype: str,
    B: int,
    H: int,
    backward: bool = False,
    chip: Chip = H200,
    tiers: str = "ABC",
    blocks: tuple[int, ...] = (),
    threads: tuple[int, ...] = (256, 512),
) -> Plan:
    """Return the layout with the fewest estimated cycles a step.

    `tiers`, `blocks` (of a team) and `threads` (of a block) narrow the choice. Raises ValueError where nothing fits:
    tier A needs weights that fit one cluster, clusters of several blocks compute capability 9.0; and the others room in
    shared memory for a vector of one step of one sequence, G·H numbers going back, and its sums.
    """
    made = _candidates(CELLS[cell_name], dtype, B, H, backward, chip, blocks, threads)
    fitting = [one for one in made if one.tier in tiers]
    if not fitting:
        why = "shared memory must hold the vectors of one step of a few sequences"
        raise ValueError(f"no kernel of tier {' or '.join(tiers)} fits {cell_name} in {dtype}, B={B}, H={H}: {why}")
    return min(fitting, key=lambda one: one.cycles)


def explain(made: Plan, chip: Chip = H200) -> str:
    """Return a plan in words, the best of the other tiers beside it."""
    kind = ARITHMETIC[made.dtype]
    registers = sum(4 * product.registers * product.tiles * kind.word // 4 for product in made.products)
    kept = sum(4 * product.kept * product.tiles * made.threads * kind.word for product in made.products)
    streamed = sum(4 * p.streamed * p.tiles * made.threads * kind.word for p in made.products) * made.blocks
    how = {
        "A": f"the weights fit {made.blocks} blocks: states travel through distributed shared memory",
        "B": "the weights fit the whole grid: states travel through L2, one grid barrier a step",
        "C": f"{streamed / 2**20:.1f} MiB of weights fit nowhere on chip and are read from L2 at every step",
    }
    lines = [
        f"{'backward' if made.backward else 'forward'}: tier {made.tier}, about {made.cycles} cycles a step",
        f"  why        {how[made.tier]}",
        f"  blocks     {made.teams} x {made.blocks}"
        + (", in clusters" if made.tier == "A" and made.blocks > 1 else ""),
        f"  threads    {made.threads} a block, {made.units} hidden units",
        f"  batch      {made.slice} sequences a team, {made.tile} at a time",
        f"  registers  {registers} a thread for weights",
        f"  shared     {made.shared} bytes a block, {kept} of them weights",
    ]
    for tier in "ABC".replace(made.tier, ""):
        try:
            other = plan(made.cell, made.dtype, made.batch, made.hidden, made.backward, chip, tier)
        except ValueError:
            lines.append(f"  tier {tier}     does not fit")
        else:
            lines.append(f"  tier {tier}     about {other.cycles} cycles a step")
    return "\n".join(lines)
