"""Products from register tiles: every remainder, against NumPy in higher precision, and bit for bit in parts."""

from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from conftest import relative_error
from numba import njit

from rnnlab.kernels import products
from rnnlab.kernels.panels import panels_at_most, tiles_at_most
from rnnlab.kernels.simd import VECTOR_BYTES, address

DTYPES = ["float32", "float64"]
GROUPS = [1, 3, 4]
ROWS = [*range(1, 14), 24, 97]

#: What surrounds every array that is written to, and must still be there afterwards; no sum comes to it.
CANARY = 12345.0
_EDGE = 64


def lanes(dtype):
    return VECTOR_BYTES // np.dtype(dtype).itemsize


def bound(dtype, depth):
    """Rounding errors of a sum of `depth` terms add up as a random walk; 4 for terms larger than their sum."""
    return 4 * np.finfo(dtype).eps * np.sqrt(depth)


def normal(dtype, *shape):
    return np.random.default_rng(shape).normal(size=shape).astype(dtype)


class Guarded:
    """An array with canaries on both sides; `intact` tells whether they live."""

    def __init__(self, shape, dtype, fill=np.nan):
        size = int(np.prod(shape))
        self._memory = np.full(size + 2 * _EDGE, CANARY, dtype)
        self.array = self._memory[_EDGE : _EDGE + size].reshape(shape)
        self.array[...] = fill

    @property
    def intact(self):
        return (self._memory[:_EDGE] == CANARY).all() and (self._memory[-_EDGE:] == CANARY).all()


def units_of(H, dtype):
    return -(-H // lanes(dtype))


def in_lanes(values, group, dtype):
    """(…, G·H) in the order unit, gate, lane: (…, U, G, V), zero past the last unit."""
    V, H = lanes(dtype), values.shape[-1] // group
    U = units_of(H, dtype)
    padded = np.zeros((*values.shape[:-1], group, U * V), values.dtype)
    padded[..., :H] = values.reshape(*values.shape[:-1], group, H)
    return np.moveaxis(padded.reshape(*values.shape[:-1], group, U, V), -3, -2)


def in_rows(values, gates, dtype):
    """(…, G·H) in the order unit, gate, lane, without padding between them."""
    H = values.shape[-1] // gates
    order = [
        g * H + j for u in range(0, H, lanes(dtype)) for g in range(gates) for j in range(u, min(u + lanes(dtype), H))
    ]
    return values[..., order]


def width_at(unit, units, most):
    return max(w for w in (1, 2, 4, 8) if w <= most and (w == 1 or w <= units - unit))


def panels(columns, most):
    """Where each panel of (K, U, width of a unit) begins, and all panels one after the other, read front to back."""
    K, U = columns.shape[:2]
    flat, starts, unit = [], [], 0
    while unit < U:
        width = width_at(unit, U, most)
        flat.append(columns[:, unit : unit + width].reshape(K, -1).reshape(-1))
        starts.append(unit)
        unit += width
    return starts, np.concatenate(flat)


# Packing --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("one_row", [False, True])
def test_gates_of_a_unit_are_packed_side_by_side(dtype, group, one_row):
    V, most = lanes(dtype), products.panel_units(group, one_row)
    for H in (1, V - 1, V, V + 1, 2 * V * most - 1, 3 * V * most + V + 2):
        for depth in (1, 3, 64, 65, 130):  # rows are taken 64 at a time
            weight = normal(dtype, group * H, depth)
            _, want = panels(in_lanes(weight.T, group, dtype), most)
            target, U = Guarded(want.shape, dtype), units_of(H, dtype)
            products.pack_gates(target.array, 0, weight, group, group, most, 0, U, U)
            np.testing.assert_array_equal(target.array, want)
            assert target.intact
            weight[-H:] = 0  # as if it were not kept
            _, want = panels(in_lanes(weight.T, group, dtype), most)
            weight[-H:] = np.nan
            products.pack_gates(target.array, 0, weight, group, group - 1, most, 0, U, U)
            np.testing.assert_array_equal(target.array, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gates", GROUPS)
def test_gates_of_the_last_unit_share_vectors(dtype, gates):
    V, depth = lanes(dtype), 7
    for H in range(1, 2 * V + 1):
        rest, units = H % V, units_of(H, dtype)
        whole = products.whole_units(H, V, gates, False)
        assert whole == units - (0 < gates * rest <= (gates - 1) * V)
        assert products.whole_units(H, V, gates, True) == units
        if whole < units:
            assert products.shared_vectors(H, V, gates) == units_of(gates * rest, dtype)
            weight = normal(dtype, gates * H, depth)
            rows = weight.reshape(gates, H, depth)[:, H - rest :].reshape(-1, depth)
            _, want = panels(in_lanes(rows.T, 1, dtype), products.panel_units(1))
            target = Guarded(want.shape, dtype)
            products.pack_shared(target.array, 0, weight, gates)
            np.testing.assert_array_equal(target.array, want)
            assert target.intact


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gates", GROUPS)
@pytest.mark.parametrize("one_row", [False, True])
def test_columns_are_packed_in_the_order_of_units(dtype, gates, one_row):
    V, most = lanes(dtype), products.panel_units(1, one_row)
    for H in (1, V, 2 * V + 3):
        for columns in (1, V - 1, V, V + 1, 2 * V * most - 1, V * most + 3 * V + 2):
            weight = normal(dtype, gates * H, columns)
            rows = in_rows(weight.T, gates, dtype).T
            _, want = panels(in_lanes(rows, 1, dtype), most)
            target = Guarded(want.shape, dtype)
            products.pack_columns(target.array, 0, weight, gates, gates, most, 0, units_of(columns, dtype))
            np.testing.assert_array_equal(target.array, want)
            assert target.intact
            weight[-H:] = 0  # as if it were not kept
            _, want = panels(in_lanes(in_rows(weight.T, gates, dtype).T, 1, dtype), most)
            weight[-H:] = np.nan
            products.pack_columns(target.array, 0, weight, gates, gates - 1, most, 0, units_of(columns, dtype))
            np.testing.assert_array_equal(target.array, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parties", [2, 3, 7])
def test_parts_of_a_packing_are_shared_out_without_overlap(dtype, parties):
    """Each party packs its panels at their own place, and leaves those of the others as they are."""
    V, group, shift = lanes(dtype), 3, 5
    H, depth, gates = 11 * V + 2, 7, group
    weight, columns = normal(dtype, group * H, depth), normal(dtype, gates * 4, H)
    U = units_of(H, dtype)
    for one_row in (False, True):
        for pack, source, most, numbers, of in (
            (products.pack_gates, weight, products.panel_units(group, one_row), group * V * depth, (U,)),
            (products.pack_columns, columns, products.panel_units(1, one_row), len(columns) * V, ()),
        ):
            whole = np.full(shift + U * numbers, np.nan, dtype)
            pack(whole, shift, source, group, group, most, 0, U, *of)
            assert np.isnan(whole[:shift]).all()
            parts, ends = np.full_like(whole, np.nan), []
            for rank in range(parties):
                first, last = (products.share(U, most, r, parties) for r in (rank, rank + 1))
                ends += [first, last]
                one = np.full_like(whole, np.nan)
                pack(one, shift, source, group, group, most, first, last, *of)
                mine = slice(shift + first * numbers, shift + last * numbers)
                parts[mine] = one[mine]
                one[mine] = np.nan
                assert np.isnan(one).all()
            assert (ends[0], ends[-1]) == (0, U)
            assert ends[1:-1:2] == ends[2:-1:2]  # one begins where the last one ended
            np.testing.assert_array_equal(parts, whole)


def test_shares_begin_at_panels_and_differ_by_one_at_most():
    for count in range(1, 40):
        for most in (1, 2, 4, 8):
            for parties in (1, 2, 3, 5, 8):
                ends = [products.share(count, most, rank, parties) for rank in range(parties + 1)]
                assert (ends[0], ends[-1]) == (0, count)
                assert all(end % most == 0 for end in ends[:-1] if end < count)
                sizes = [-(-last // most) - -(-first // most) for first, last in pairwise(ends)]
                assert max(sizes) - min(sizes) <= 1


# Products with packed panels ------------------------------------------------------------------------------------------


@cache
def multiplier(group, dtype):
    """`multiply` for arrays instead of addresses, from given numbers of out, start, a and of the packed factor on."""
    multiply = products.multiply(group, np.dtype(dtype))

    @njit
    def run(out, o, o_row, start, s, s_row, a, a0, a_row, packed, depth, rows, first, last, units):
        multiply(
            address(out, o), o_row, address(start, s), s_row, address(a, a0), a_row, address(packed, 0), depth, rows,
            first, last, units,
        )  # fmt: skip

    return run


@cache
def block_runner(group, dtype):
    """`blocks` for arrays instead of addresses."""
    block = products.blocks(group, np.dtype(dtype))

    @njit
    def run(width, out, o, o_row, o_unit, o_gate, start, s, s_row, a, a0, a_row, a_k, packed, p, depth, rows):
        block(
            width, address(out, o), o_row, o_unit, o_gate, address(start, s), s_row, address(a, a0), a_row, a_k,
            address(packed, p), depth, rows,
        )  # fmt: skip

    return run


def product_problem(dtype, group, rows, depth, H):
    """a (rows, depth), packed panels of a weight (G·H, depth), start (rows, U·G·V), and start + a·weightᵀ."""
    a, weight = normal(dtype, rows, depth), normal(dtype, group * H, depth)
    columns = in_lanes(weight.T, group, dtype)
    start = normal(dtype, rows, *columns.shape[1:])
    exact = in_lanes(a.astype(np.longdouble) @ weight.T.astype(np.longdouble), group, dtype)
    return a, columns, start, exact


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("rows", ROWS)
def test_product_with_every_remainder(dtype, group, rows):
    V, most = lanes(dtype), products.panel_units(group)
    for U in range(1, 2 * most + 2):
        H = U * V - (U * 3) % V
        for depth in (1, 2, 33):
            a, columns, start, exact = product_problem(dtype, group, rows, depth, H)
            _, packed = panels(columns, most)
            row = U * group * V
            out = Guarded((rows, U, group, V), dtype)
            multiplier(group, dtype)(
                out.array.reshape(-1), 0, row, start.reshape(-1), 0, row, a.reshape(-1), 0, depth, packed, depth, rows,
                0, U, U,
            )  # fmt: skip
            assert relative_error(out.array, start.astype(np.longdouble) + exact) <= bound(dtype, depth)
            assert out.intact
            past = (np.arange(U * V) >= H).reshape(U, 1, V) & np.ones((rows, 1, group, 1), bool)
            np.testing.assert_array_equal(out.array[past], start[past])  # weights past the last unit are 0

            bias = start[:1].copy()  # one row to start all from
            multiplier(group, dtype)(
                out.array.reshape(-1), 0, row, bias.reshape(-1), 0, 0, a.reshape(-1), 0, depth, packed, depth, rows,
                0, U, U,
            )  # fmt: skip
            assert relative_error(out.array, bias.astype(np.longdouble) + exact) <= bound(dtype, depth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("parties", [2, 3, 5])
def test_parts_of_a_product_give_the_same_bits(dtype, group, parties):
    """Rows and units dealt out among threads: the same numbers, and none of another's is touched."""
    V, most, rows, depth = lanes(dtype), products.panel_units(group), 41, 70
    U = 3 * most + 1
    row = U * group * V
    a, columns, start, _ = product_problem(dtype, group, rows, depth, U * V - 2)
    _, packed = panels(columns, most)
    run = multiplier(group, dtype)

    def product(r0, r1, first, last):
        out = np.full((rows, U, group, V), np.nan, dtype)
        run(
            out.reshape(-1), r0 * row, row, start.reshape(-1), r0 * row, row, a.reshape(-1), r0 * depth, depth, packed,
            depth, r1 - r0, first, last, U,
        )  # fmt: skip
        assert np.isnan(out[:r0]).all()
        assert np.isnan(out[r1:]).all()
        assert np.isnan(out[:, :first]).all()
        assert np.isnan(out[:, last:]).all()
        return out[r0:r1, first:last]

    whole = product(0, rows, 0, U)
    row_ends = [rows * rank // parties for rank in range(parties + 1)]
    by_rows = [product(*ends, 0, U) for ends in pairwise(row_ends)]
    np.testing.assert_array_equal(np.concatenate(by_rows), whole)
    unit_ends = [products.share(U, most, rank, parties) for rank in range(parties + 1)]
    by_units = [product(0, rows, *ends) for ends in pairwise(unit_ends)]
    np.testing.assert_array_equal(np.concatenate(by_units, axis=1), whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", GROUPS)
def test_single_rows_and_strides_give_the_same_bits(dtype, group):
    """A row alone has wider panels; tiles read a by columns and write gates apart, as the kernels have them do."""
    V, rows, depth = lanes(dtype), 29, 50
    for one_row in (False, True):
        most = products.panel_units(group, one_row)
        for U in range(1, 2 * most + 2):
            row = U * group * V
            a, columns, start, _ = product_problem(dtype, group, rows, depth, U * V - 1)
            whole = np.full((rows, U, group, V), np.nan, dtype)
            multiplier(group, dtype)(
                whole.reshape(-1), 0, row, start.reshape(-1), 0, row, a.reshape(-1), 0, depth,
                panels(columns, products.panel_units(group))[1], depth, rows, 0, U, U,
            )  # fmt: skip
            starts, packed = panels(columns, most)
            transposed = np.ascontiguousarray(a.T)
            out = Guarded((group, rows, U, V), dtype)  # gates apart
            for unit in starts:
                width = width_at(unit, U, most)
                assert products.width_at(unit, U, most) == width
                b = 0
                while b < rows:
                    count = products.rows_at(width, group, rows - b)
                    assert count <= rows - b
                    assert count in products.tile_rows(width * group)
                    assert rows - b < 9 or count == products.tile_rows(width * group)[0]
                    block_runner(group, dtype)(
                        width, out.array.reshape(-1), (b * U + unit) * V, U * V, V, rows * U * V, start.reshape(-1),
                        b * row + unit * group * V, row, transposed.reshape(-1), b, 1, rows, packed,
                        unit * group * V * depth, depth, count,
                    )  # fmt: skip
                    b += count
            np.testing.assert_array_equal(np.moveaxis(out.array, 0, 2), whole)
            assert out.intact


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("one_row", [False, True])
def test_tiles_cover_every_row_and_unit_once(group, one_row):
    most = products.panel_units(group, one_row)
    for rows in (1,) if one_row else ROWS:
        for U in range(1, 2 * most + 2):
            for first, last in ((0, U), (products.share(U, most, 1, 2), U)):
                table = np.zeros((U * rows + 1, 5), np.int64)
                vectors = 24 // group
                count = products.list_tiles(table, 2, 2 + rows, first, last, U, most, vectors, 7)
                covered = np.zeros((U, rows + 3), int)
                assert (table[:count, 4] == 7).all()
                for unit, width, row, height, _ in table[:count]:
                    assert width == width_at(unit, U, most)
                    assert width * height <= vectors
                    covered[unit : unit + width, row : row + height] += 1
                assert (table[count:] == 0).all()
                want = np.zeros_like(covered)
                want[first:last, 2 : 2 + rows] = 1
                np.testing.assert_array_equal(covered, want)


@pytest.mark.parametrize("most", [1, 2, 4, 8])
def test_states_of_tiles_have_room(most):
    """Those of a thread begin behind all that threads before it can have, and end within what all have."""
    vectors, V = 24, 4

    def tiles(first, last, units, widest, *sequences):
        return products.list_tiles(table, *sequences, first, last, units, widest, vectors, V)

    for units in range(1, 3 * most + 2):
        table = np.zeros((2 * units * 31, 5), np.int64)
        for M in range(1, 31):
            end = tiles_at_most(panels_at_most(units, most), most, M, vectors * V, V)
            for start in range(0, units, most):
                begin = tiles_at_most(start // most, most, M, vectors * V, V)
                for cut in {0, (M + 1) // 2, M}:  # going back: both halves of the batch
                    before, after = (
                        sum(tiles(*part, units, most, *half) for half in ((0, cut), (cut, M)))
                        for part in ((0, start), (start, units))
                    )
                    assert before <= begin
                    assert begin + after <= end
                last = tiles(units - 1, units, units, 1, 0, M)  # forward: the last unit by itself
                assert begin + tiles(start, units - 1, units - 1, most, 0, M) + last <= end


# Sums over rows -------------------------------------------------------------------------------------------------------


def sum_problem(dtype, gates, H, columns, rows):
    """a (rows, U·G·V), of which only G·H numbers are set; b (rows, columns); aᵀ·b and Σ a (G·H, …)."""
    inside, b = normal(dtype, rows, gates * H), normal(dtype, rows, columns)
    a = np.full((rows, units_of(H, dtype) * gates * lanes(dtype)), np.nan, dtype)
    a[:, : gates * H] = in_rows(inside, gates, dtype)
    exact = inside.astype(np.longdouble).T @ b.astype(np.longdouble)
    return a, b, exact, inside.sum(axis=0, dtype=np.longdouble)


def in_runs(b, run=7):
    """Return rows of b (flat) with a row of NaN behind every seven, and how they lie."""
    parts = [np.concatenate([b[k : k + run], np.full_like(b[:1], np.nan)]) for k in range(0, len(b), run)]
    return np.concatenate(parts).reshape(-1), (run, (run + 1) * b.shape[1])


def add_product(out, a, b, gates, dtype, *, strips=None, which=None, shift=0, far=False):
    """`add_transposed` with guarded scratch; a and b begin at number `shift` of theirs.

    Rows of a that lie `far` apart, with NaN between them, are packed before they are multiplied.
    """
    columns, strips = out.shape[1], strips or (0, a.shape[1] // lanes(dtype))
    if far:
        a = np.concatenate([a, np.full((len(a), products._NEAR // a.itemsize), np.nan, dtype)], axis=1)
    assert (a.strides[0] > products._NEAR) == far
    scratch = Guarded((products.scratch_size(columns, lanes(dtype)),), dtype)
    before, (rows_of_b, runs) = np.full(shift, np.nan, dtype), in_runs(b)
    products.add_transposed(np.dtype(dtype))(
        out, np.concatenate([before, a.reshape(-1)]), shift, a.shape[1], gates, which or (0, gates),
        np.concatenate([before, rows_of_b]), shift, runs, columns, len(a), strips, scratch.array,
    )  # fmt: skip
    assert scratch.intact


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, products.DEPTH - 1, products.DEPTH, products.DEPTH + 1, 2 * products.DEPTH + 9])
def test_transposed_product_with_every_remainder(dtype, rows):
    V = lanes(dtype)
    sizes = [(1, 1, 1), (3, V, V), (4, V + 1, 4 * V + 3), (1, 3 * V - 1, 2 * V - 1), (3, V - 1, 6 * V + 1)]
    sizes += [(1, H, 5) for H in range(2, 14)]  # every remainder of rows in a strip
    sizes += [(4, 3 * V + 2, 3 * V)]  # more strips than are packed at a time
    for gates, H, columns in sizes:
        a, b, exact, _ = sum_problem(dtype, gates, H, columns, rows)
        out = Guarded((gates * H, columns), dtype, fill=1)  # the product is added
        add_product(out.array, a, b, gates, dtype, shift=3)
        assert relative_error(out.array, 1 + exact) <= bound(dtype, rows), (gates, H, columns)
        assert out.intact
        packed = Guarded((gates * H, columns), dtype, fill=1)
        add_product(packed.array, a, b, gates, dtype, shift=3, far=True)
        np.testing.assert_array_equal(packed.array, out.array)
        assert packed.intact


@pytest.mark.parametrize("dtype", DTYPES)
def test_transposed_product_of_some_gates(dtype):
    """Gates outside the range stay as they are; two ranges together are all of it, to the last bit."""
    V, gates, rows = lanes(dtype), 3, 37
    H, columns = 2 * V + 5, V + 3
    a, b, _, _ = sum_problem(dtype, gates, H, columns, rows)
    whole, parts = np.zeros((gates * H, columns), dtype), np.zeros((gates * H, columns), dtype)
    add_product(whole, a, b, gates, dtype)
    add_product(parts, a, b, gates, dtype, which=(0, 2))
    np.testing.assert_array_equal(parts[: 2 * H], whole[: 2 * H])
    assert (parts[2 * H :] == 0).all()
    add_product(parts, a, b, gates, dtype, which=(2, 3), far=True)
    np.testing.assert_array_equal(parts, whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gates", GROUPS)
@pytest.mark.parametrize("parties", [2, 3, 5])
def test_strips_of_a_transposed_product_give_the_same_bits(dtype, gates, parties):
    """Strips dealt out among threads: each adds its own rows of the result, once."""
    V, rows = lanes(dtype), products.DEPTH + 13
    H, columns = 5 * V + 3, 2 * V + 1
    a, b, _, _ = sum_problem(dtype, gates, H, columns, rows)
    whole, parts = np.zeros((gates * H, columns), dtype), np.zeros((gates * H, columns), dtype)
    add_product(whole, a, b, gates, dtype)
    strips = gates * units_of(H, dtype)
    for rank in range(parties):
        add_product(
            parts,
            a,
            b,
            gates,
            dtype,
            strips=(products.share(strips, 1, rank, parties), products.share(strips, 1, rank + 1, parties)),
            far=rank % 2 == 1,
        )
    np.testing.assert_array_equal(parts, whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gates", GROUPS)
def test_sums_over_rows(dtype, gates):
    V = lanes(dtype)
    for H in (1, V - 1, V, V + 1, 3 * V - 2):  # up to 12 strips, which are taken 8 at a time
        for rows in ROWS:
            a, _, _, exact = sum_problem(dtype, gates, H, 1, rows)
            flat = np.concatenate([np.full(5, np.nan, dtype), a.reshape(-1)])
            strips, scratch = a.shape[1] // V, Guarded((products.scratch_size(1, V),), dtype)
            out = Guarded((gates * H,), dtype, fill=1)  # the sum is added
            products.add_sums(out.array, flat, 5, a.shape[1], gates, rows, (0, strips), scratch.array)
            assert relative_error(out.array, 1 + exact) <= bound(dtype, rows)
            assert out.intact
            assert scratch.intact
            parts = np.ones_like(out.array)
            ends = [products.share(strips, 1, rank, 3) for rank in range(4)]
            for both in pairwise(ends):
                products.add_sums(parts, flat, 5, a.shape[1], gates, rows, both, scratch.array)
            np.testing.assert_array_equal(parts, out.array)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gates", GROUPS)
def test_transposed_product_of_few_columns(dtype, gates):
    V, rows = lanes(dtype), 97
    for H, columns in ((1, 1), (V - 1, 2), (V + 1, 3), (3 * V - 2, V // 2)):
        a, b, exact, _ = sum_problem(dtype, gates, H, columns, rows)
        wide = np.concatenate([b, np.full_like(b, np.nan)], axis=1)  # rows of b lie apart
        before = np.full(5, np.nan, dtype)
        rows_of_b, runs = in_runs(wide)
        left, right = (np.concatenate([before, part]) for part in (a.reshape(-1), rows_of_b))
        scratch = Guarded((products.scratch_size(columns, V),), dtype)
        out = Guarded((gates * H, columns), dtype, fill=1)  # the product is added

        def add(out, strips, left=left, right=right, runs=runs, scratch=scratch, row=a.shape[1], columns=columns):
            products.add_narrow(
                out.reshape(-1), left, 5, row, gates, right, 5, runs, 2 * columns, columns, rows, strips, scratch.array
            )

        add(out.array, (0, a.shape[1] // V))
        assert relative_error(out.array, 1 + exact) <= bound(dtype, rows), (H, columns)
        assert out.intact
        assert scratch.intact
        parts = np.ones_like(out.array)
        for both in pairwise(products.share(a.shape[1] // V, 1, rank, 3) for rank in range(4)):
            add(parts, both)
        np.testing.assert_array_equal(parts, out.array)
