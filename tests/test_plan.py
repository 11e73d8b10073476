"""Layouts of GPU kernels: they fit the chip, cover every unit, sequence and weight, and say what they chose."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rnnlab import CELLS
from rnnlab.kernels.plan import ARITHMETIC, H200, Chip, explain, plan

A100 = Chip((8, 0), 108, 166_912)


@settings(max_examples=60)
@given(data=st.data())
def test_a_layout_fits_the_chip_and_covers_everything(data):
    cell, dtype = data.draw(st.sampled_from(sorted(CELLS))), data.draw(st.sampled_from(sorted(ARITHMETIC)))
    B, H, backward = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 1300)), data.draw(st.booleans())
    chip = data.draw(st.sampled_from([H200, A100]))
    made, kind = plan(cell, dtype, B, H, backward, chip), ARITHMETIC[dtype]
    assert made.blocks * made.units >= H
    assert made.tier != "A" or made.blocks in (1, 2, 4, 8, 16)
    assert made.teams * made.slice >= B > (made.teams - 1) * made.slice
    assert made.tile * made.units <= made.threads
    assert made.shared <= chip.shared
    assert all(offset * kind.word % 16 == 0 for offset in made.regions)
    weights = sum(product.gates * product.depth for product in made.products)
    assert weights == len(CELLS[cell].gates) * H
    for product in made.products:
        assert product.groups * product.tiles * kind.rows >= product.gates * made.units
        assert product.slices * product.chunks * kind.depth >= product.depth
        assert product.slices * product.groups * kind.lanes <= made.threads
        assert product.row >= product.slices * product.chunks * kind.words
        assert min(product.registers, product.kept, product.streamed) >= 0
        assert product.registers * product.tiles * 4 * kind.word // 4 * made.threads <= chip.registers
    streamed = sum(product.streamed for product in made.products)
    assert made.tier == ("C" if streamed else made.tier)
    if made.tier == "A":
        assert made.blocks <= (16 if chip is H200 else 1)
        assert streamed == 0
    else:
        assert made.teams == 1
        assert made.blocks <= chip.processors


@pytest.mark.parametrize(
    ("dtype", "H", "tier"),
    [("float32", 128, "A"), ("float32", 256, "A"), ("bf16", 512, "A"), ("float32", 1024, "B"), ("float32", 4096, "C")],
)
def test_tiers_follow_the_size_of_the_weights(dtype, H, tier):
    made = plan("lstm", dtype, 16, H)
    assert made.tier == tier
    text = explain(made)
    assert f"forward: tier {tier}, about {made.cycles} cycles a step" in text
    assert text.count("  tier ") == 2


def test_what_does_not_fit_is_said():
    with pytest.raises(ValueError, match="no kernel of tier A fits lstm in float32, B=16, H=4096"):
        plan("lstm", "float32", 16, 4096, tiers="A")
    with pytest.raises(ValueError, match="no kernel of tier A or B or C fits lstm in tf32, B=16, H=16384"):
        plan("lstm", "tf32", 16, 16384, True)


@pytest.mark.parametrize("dtype", ["tf32", "bf16", "fp16"])
def test_tensor_cores_take_fewer_than_eight_sequences_of_the_widest_layers(dtype):
    """DeepBench's widest LSTM: eight vectors of 4·H numbers would not fit, of those that do none may lie beyond."""
    made = plan("lstm", dtype, 16, 4096, True)
    assert made.vectors == made.tile < made.inner == 8 == made.rows
    assert made.vectors * made.products[0].row <= made.regions[2]  # where the sums begin
    assert made.shared <= H200.shared


def test_clusters_that_do_not_run_at_once_take_turns():
    """132 multiprocessors would hold 16 clusters of 8, but each lies in one GPC."""
    assert [H200.at_once(blocks) for blocks in (1, 2, 4, 8, 16)] == [132, 66, 31, 15, 7]
    assert Chip((9, 0), 132, 232_448).at_once(8) == 16
    made = plan("lstm", "float32", 32, 128, tiers="A", blocks=(8,))
    assert made.teams <= H200.at_once(8)
    two = plan("lstm", "float32", 32, 128, tiers="A", blocks=(8,), chip=H200._replace(clusters=((8, 2),)))
    assert two.teams <= 2
