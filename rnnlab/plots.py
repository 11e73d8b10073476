"""Tidy tables to figures; nothing is computed here."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

__all__ = ["banded_lines", "bars", "caption", "curves", "decades", "dots", "fit_table", "intervals", "panels", "plane"]
__all__ += ["ranges", "relief", "roofline", "shares", "text_table", "tiles"]

#: Colour-blind safe, in a fixed order.
PALETTE = sns.color_palette("colorblind")


def panels(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """Return a figure that belongs to no window, and its axes row by row."""
    with sns.axes_style("whitegrid"), sns.plotting_context("notebook", font_scale=0.85):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
    return figure, list(axes.flat)


def banded_lines(
    ax: Axes,
    frame: pd.DataFrame,
    *,
    x: str,
    y: str,
    low: str,
    high: str,
    hue: str,
    hue_order: Sequence[Any],
    style: str,
    dashes: Mapping[str, str],
    title: str,
) -> None:
    """Draw a line and its band from `low` to `high` for each value of `hue` (its colour) and `style` (its dashes)."""
    for colour, shade in zip(PALETTE, hue_order, strict=False):
        for name, dash in dashes.items():
            part = frame[(frame[hue] == shade) & (frame[style] == name)]
            if part.empty:
                continue
            ax.plot(part[x], part[y], dash, color=colour, label=_words(f"{shade}, {name}"))
            ax.fill_between(part[x], part[low], part[high], color=colour, alpha=0.15, linewidth=0)
    ax.legend(title=title, fontsize=8, title_fontsize=8)


def dots(ax: Axes, frame: pd.DataFrame, *, x: str, y: str, hue: str, hue_order: Sequence[Any]) -> None:
    """Draw dots in the colours that `banded_lines` gives the values of `hue`."""
    for colour, shade in zip(PALETTE, hue_order, strict=False):
        part = frame[frame[hue] == shade]
        ax.plot(part[x], part[y], "o", color=colour, markersize=4)


def decades(ax: Axes, x_label: str, y_label: str) -> None:
    """Label the axes; y holds logarithms to base 10 and shows powers of ten."""
    ax.set(xlabel=x_label, ylabel=y_label)
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.yaxis.set_major_formatter(lambda value, _: f"$10^{{{value:.0f}}}$")


def fit_table(
    ax: Axes,
    frame: pd.DataFrame,
    title: str,
    *,
    values: Sequence[str],
    rows: Mapping[tuple[str, str], str],
    columns: Sequence[str],
    lines: Sequence[str],
) -> None:
    """Fill a panel with `values`, a number and what ends its interval, for each (cell, state) and initialiser."""
    cells, labels = [], []
    for (cell, state), label in rows.items():
        for line in lines:
            part = frame[(frame["cell"] == cell) & (frame["state"] == state) & (frame["initialiser"] == line)]
            fits = part.set_index("input").loc[list(columns), list(values)].to_numpy()
            cells.append(
                [f"{middle:.3g}" + (" ({:.3g}–{:.3g})".format(*ends) if ends else "") for middle, *ends in fits]
            )
            labels.append(f"{label}, {line}")
    text_table(ax, title, cells, labels, [_words(name) for name in columns])


def text_table(
    ax: Axes, title: str, cells: Sequence[Sequence[str]], rows: Sequence[str], columns: Sequence[str]
) -> None:
    """Fill a panel with a table of texts."""
    ax.axis("off")
    ax.set_title(title)
    table = ax.table(cells, rowLabels=rows, colLabels=columns, loc="upper right")
    table.auto_set_font_size(False)
    table.set_fontsize(8)
    table.auto_set_column_width(list(range(len(columns))))
    table.scale(1, 1.7)


def curves(ax: Axes, frame: pd.DataFrame, *, x: str, y: str, hue: str, style: str) -> None:
    """Draw lines and the bands `low_y` to `high_y` on logarithmic axes, coloured by `hue`, dashed by `style`."""
    for colour, (shade, part) in zip(PALETTE, frame.groupby(hue, sort=False), strict=False):
        for dash, (name, line) in zip(("o-", "s--"), part.groupby(style, sort=False), strict=False):
            ax.plot(line[x], line[y], dash, color=colour, markersize=4, label=f"{shade}, {name}")
            ax.fill_between(line[x], line[f"low_{y}"], line[f"high_{y}"], color=colour, alpha=0.2, linewidth=0)
    ax.set(xscale="log", yscale="log")
    ax.set_xticks(sorted(set(frame[x])), [f"{size:g}" for size in sorted(set(frame[x]))], fontsize=8)
    ax.xaxis.set_minor_locator(NullLocator())
    ax.legend(fontsize=8)


def ranges(ax: Axes, frame: pd.DataFrame, *, x: str, y: str, low: str, high: str, hue: str, style: str) -> None:
    """Draw dots with bars from `low` to `high`, coloured by `hue` and shaped by `style`, and the line at 0."""
    for colour, (shade, part) in zip(PALETTE, frame.groupby(hue, sort=False), strict=False):
        for marker, (name, dots) in zip("osD^", part.groupby(style, sort=False), strict=False):
            ends, label = [dots[y] - dots[low], dots[high] - dots[y]], _words(f"{shade}, {style} {name}")
            ax.errorbar(dots[x], dots[y], ends, fmt=marker, color=colour, markersize=4, capsize=3, label=label)
    ax.axhline(0, color="k", linewidth=1)
    ax.legend(title=_words(hue), fontsize=8, title_fontsize=8)


def shares(ax: Axes, frame: pd.DataFrame, *, x: str, y: str, hue: str, order: Sequence[Any]) -> None:
    """Draw shares and their intervals `low_y` to `high_y` at equally spaced x, side by side, coloured by `hue`.

    Values of x are named as they are, one that is missing "none", in the order in which they first appear.
    """
    names = frame[x].map(lambda value: "none" if pd.isna(value) else f"{value:g}")
    ticks = list(names.unique())
    for i, (colour, shade) in enumerate(zip(PALETTE, order, strict=False)):
        part = frame[frame[hue] == shade]
        at = [ticks.index(name) + 0.08 * (i - (len(order) - 1) / 2) for name in names[part.index]]
        ends = [part[y] - part[f"low_{y}"], part[f"high_{y}"] - part[y]]
        ax.errorbar(at, part[y], ends, fmt="o-", color=colour, markersize=4, capsize=2, label=_words(f"{shade}"))
    ax.set_xticks(range(len(ticks)), ticks)
    ax.set(ylim=(-0.05, 1.22), yticks=[0, 0.2, 0.4, 0.6, 0.8, 1], xlabel=_words(x))  # room for the legend
    ax.legend(title=_words(hue), fontsize=8, title_fontsize=8, loc="upper center", ncols=len(order))


def tiles(ax: Axes, frame: pd.DataFrame, *, rows: Sequence[str], column: str, value: str) -> None:
    """Draw shares and their intervals as a table of colours, a row for each combination of `rows`, in their order."""
    texts = [f"{a:.1f} ({b:.2f}–{c:.2f})" for a, b, c in frame[[value, f"low_{value}", f"high_{value}"]].to_numpy()]
    named = frame.assign(row=_joined(frame, rows), text=texts)
    table, text = (
        named.pivot(index="row", columns=column, values=name).reindex(named["row"].unique()) for name in (value, "text")
    )
    sns.heatmap(table, annot=text, fmt="", annot_kws={"size": 7}, vmin=0, vmax=1, cmap="viridis", cbar=False, ax=ax)
    ax.set(xlabel=_words(column), ylabel="")
    ax.tick_params(axis="y", labelsize=8, rotation=0)


def intervals(ax: Axes, frame: pd.DataFrame, *, rows: Sequence[str], values: Sequence[str]) -> None:
    """Draw values and their intervals `low_…` to `high_…`, a row for each combination of `rows`, from top to bottom."""
    for i, (colour, mark, value) in enumerate(zip(PALETTE, "osD^v", values, strict=False)):
        ends = [frame[value] - frame[f"low_{value}"], frame[f"high_{value}"] - frame[value]]
        at = np.arange(len(frame)) + 0.7 * (i + 0.5 - len(values) / 2) / len(values)
        ax.errorbar(frame[value], at, xerr=ends, fmt=mark, color=colour, markersize=4, capsize=2, label=_words(value))
    ax.set_yticks(range(len(frame)), _joined(frame, rows))
    ax.invert_yaxis()
    ax.tick_params(axis="y", labelsize=8)
    ax.legend(fontsize=8)


def plane(ax: Axes, frame: pd.DataFrame, *, x: str, y: str, colour: str, label: str) -> None:
    """Draw a quantity over a rectangular grid as colour."""
    table = frame.pivot(index=y, columns=x, values=colour)
    image = ax.pcolormesh(table.columns, table.index, table, cmap="viridis", shading="nearest", rasterized=True)
    ax.figure.colorbar(image, ax=ax, label=label)
    ax.set(xlabel=x, ylabel=y)


def relief(ax: Axes, frame: pd.DataFrame, *, x: str, y: str, height: str) -> Any:
    """Put a three-dimensional surface over a rectangular grid in the place of `ax`; return its axes."""
    figure, place = ax.figure, ax.get_subplotspec()
    ax.remove()
    solid: Any = figure.add_subplot(place, projection="3d", computed_zorder=False)
    table = frame.pivot(index=y, columns=x, values=height)
    across, along = np.meshgrid(table.columns, table.index)
    solid.plot_surface(across, along, table.to_numpy(), cmap="viridis", rcount=160, ccount=160)
    solid.set(xlabel=x, ylabel=y, zlabel=height)
    solid.view_init(elev=35, azim=40)
    return solid


def bars(ax: Axes, frame: pd.DataFrame, *, x: str, y: str, hue: str, unit: float) -> None:
    """Draw horizontal bars, and the line where `x` is `unit`."""
    sns.barplot(frame, x=x, y=y, hue=hue, ax=ax, palette="colorblind", errorbar=None)
    ax.axvline(unit, color="k", linewidth=1)


def roofline(ax: Axes, frame: pd.DataFrame, *, hue: str, device: str) -> None:
    """Draw GFLOP/s against FLOPs per byte, under each device's measured peak and bandwidth (Williams et al. 2009).

    Of a device that was measured several times the medians of both are drawn.
    """
    sns.scatterplot(
        frame, x="flops_per_byte", y="gflops_per_second", hue=hue, style="cell", ax=ax, palette="colorblind"
    )
    limits = []
    for colour, (name, part) in zip(itertools.cycle(("k", "0.6")), frame.groupby(device), strict=False):
        peak, bandwidth = part[["peak_gflops_per_second", "bandwidth_gbytes_per_second"]].median()
        ax.axhline(peak, color=colour, linewidth=1)
        ax.axline((1, bandwidth), (10, 10 * bandwidth), color=colour, linewidth=1, linestyle="--")
        limits.append(f"{name}: peak {peak:.0f} GFLOP/s, memory {bandwidth:.0f} GB/s")
    ax.set(xscale="log", yscale="log", xlabel="FLOPs per byte that must move", ylabel="GFLOP/s")
    ax.set_title("\n".join(limits), fontsize=10)
    ax.legend(fontsize=8)


def caption(figure: Figure, title: str, text: str) -> None:
    """Set the figure's title and, below it, the setting in which it was measured."""
    figure.suptitle(title, fontsize=14, fontweight="bold")
    figure.supxlabel(text, fontsize=9, color="0.3")


def _joined(frame: pd.DataFrame, columns: Sequence[str]) -> list[str]:
    cells = frame[list(columns)].itertuples(index=False)
    return [" ".join(f"{cell}" for cell in row if not pd.isna(cell)) for row in cells]


def _words(name: str) -> str:
    return name.replace("_", " ")
