"""Which tasks with a long memory does gradient descent find with clipping, and with the regulariser Ω?

Pascanu, Mikolov & Bengio (2013), sec. 4.1 and Fig. 7: the order of two symbols that lie in the first and second half of
a sequence of distractors, four classes, learned by an RNN of 50 units from batches of 20, learning rate 0.01, clipping
at norm 1; a network is trained for each length. Solved means that under 1 % of 10,000 fresh sequences are wrong. The
initialisations are theirs: W_hh, W_ih and readout from N(0, s²), s = 0.01 for sigmoid and 0.1 for tanh, biases zero;
"smart tanh" is s = 0.01 with 15 non-zeros a unit in W_hh, rescaled to spectral radius 0.95. What to look for:

- plain descent < clipping < clipping and Ω, and success that ends at some length, for each method at a larger one; a
  Wilson interval of 5 of 5 still begins at 0.57. Sigmoid units find nothing without Ω;
- the loss sits at ln 4 (dotted), where the network ignores its inputs, until it finds the task; some stay at ln 2,
  where they know one symbol. When the network leaves the plateau its gradient grows by orders of magnitude: a plain
  step of that length destroys what was found;
- Ω, which keeps ‖dL/dh_t‖ from shrinking on its way back, shortens the plateau: at a small budget that decides. Every
  network may take as many steps in time, 150,000 updates at T = 50. The paper's budget is 5 million updates at every
  length, so that success ends earlier here;
- Ω has the weight 32. The authors' program has 2, with the square of the norm ratio in place of the ratio, which near
  a ratio of 1 is 8 here; of 2, 8, 32 and 100 the network of seed 0 learned T = 100 soonest with 32;
- the adding problem (Hochreiter & Schmidhuber 1997, sec. 5.4) by an LSTM with Adam, which is not their optimiser: where
  the forget gates begin open enough it is solved after their order of 74,000 sequences (dashed) or sooner, where their
  bias is 1 it is not: 0.73 to the power 50 is left of a gradient over the 50 steps.
"""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from rnnlab import Recurrent, SequenceModel
from rnnlab.clipping import ByGlobalNorm
from rnnlab.optim import SGD, Adam
from rnnlab.plots import PALETTE, caption, panels, shares
from rnnlab.statistics import columns, wilson
from rnnlab.study import Study, side_by_side
from rnnlab.tasks import TASKS
from rnnlab.training import error_rate, train, until_solved

#: Cell and standard deviation of each initialisation.
INITS = {"tanh": ("rnn_tanh", 0.1), "smart tanh": ("rnn_tanh", 0.01), "sigmoid": ("rnn_sigmoid", 0.01)}
#: Whether a method clips, and its weight of Ω.
METHODS = {"SGD": (False, 0.0), "SGD + clipping": (True, 0.0), "SGD + clipping + Ω": (True, 32.0)}
#: How the LSTM's forget gates begin: chrono spreads their time scales up to 100 steps (Tallec & Ollivier 2018).
GATES: dict[str, Any] = {"bias 1": {"forget_bias": 1.0}, "bias 4": {"forget_bias": 4.0}, "chrono": {"chrono": 100}}
HIDDEN, BATCH, RATE, THRESHOLD = 50, 20, 0.01, 1.0
PUBLISHED_SEQUENCES = 74_000
#: Sigmoid units find nothing without Ω in the time given: they are tried at two lengths.
LENGTHS = {init: [20, 50] if init == "sigmoid" else [20, 30, 40, 50, 100, 150, 200] for init in INITS}


def grid(quick: bool) -> list[dict[str, Any]]:
    runs, steps, memory, budget = (3, 30_000, 30, 500) if quick else (5, 7_500_000, 100, 5_000)
    points = [
        ("temporal_order", init, method, length, steps // length)
        for init in INITS
        for method in METHODS
        for length in ([10, 20] if quick else LENGTHS[init])
    ]
    points += [("adding_1997", init, "Adam + clipping", memory, budget) for init in GATES]
    names = ("task", "init", "method", "length", "updates")
    return [dict(zip(names, point, strict=True)) | {"runs": runs} for point in points]


def network(init: str, dtype: str, seed: int) -> SequenceModel:
    """Return a model for temporal order, drawn as in the paper."""
    cell, spread = INITS[init]
    model = SequenceModel(Recurrent(cell, 6, HIDDEN, dtype=dtype), 4)
    rng, net = np.random.default_rng(seed), model.rnn
    if init == "smart tanh":
        net.initialise("sparse", "zeros", "zeros", seed=seed)
    else:
        net.initialise("gaussian", "zeros", "zeros", gain=spread * HIDDEN**0.5, seed=seed)
    for name in ("rnn.weight_ih_l0", "readout.weight"):
        model.params[name] = rng.normal(0, spread, model.params[name].shape).astype(net.dtype)
    model.params["readout.bias"][:] = 0
    return model


def learn(point: dict[str, Any], seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Train one network until it solves the task or the updates are spent; return its end and its curve."""
    task, length = TASKS[point["task"]], point["length"]
    if point["task"] == "temporal_order":
        model = network(point["init"], point["dtype"], seed)
        clips, omega = METHODS[point["method"]]
    else:
        net = Recurrent("lstm", task.input_size, HIDDEN, dtype=point["dtype"])
        net.initialise(**GATES[point["init"]], seed=seed)
        model = SequenceModel(net, task.output_size, task.topology, task.loss, seed=seed)
        clips, omega = True, 0.0

    log = train(
        model,
        task,
        SGD(RATE) if point["task"] == "temporal_order" else Adam(RATE),
        batch=BATCH,
        updates=point["updates"],
        length=length,
        clip=ByGlobalNorm(THRESHOLD) if clips else None,
        omega=omega,
        seed=seed,
        evaluate_every=500,
        stop=until_solved(model, task, length, seed=seed),
    )
    last = log.rows[-1]
    wrong = error_rate(model, task, length, seed=seed)
    end = {"solved": wrong < task.wrong_allowed, "wrong": wrong, "outcome": log.outcome, "skipped": last["skipped"]}
    curve = [{"kind": "curve", **{name: row[name] for name in ("update", "loss", "norm")}} for row in log.rows]
    return {"kind": "run", "sequences": last["sequences"], **end}, curve


def run(point: dict[str, Any]) -> list[dict[str, Any]]:
    found = side_by_side(learn, point)
    rows = [{"network": k, **row} for k, (end, curve) in enumerate(found) for row in (end, *(curve if k == 0 else []))]
    solved = sum(end["solved"] for end, _ in found)
    return [*rows, {"kind": "share", **columns("success", wilson(solved, len(found)))}]


def plot(frame: pd.DataFrame) -> Figure:
    figure, axes = panels(2, 3, (16, 9))
    order, adding = (frame[frame["task"] == task] for task in ("temporal_order", "adding_1997"))
    for ax, init in zip(axes, INITS, strict=False):
        part = order[(order["kind"] == "share") & (order["init"] == init)]
        shares(ax, part, x="length", y="success", hue="method", order=list(METHODS))
        ax.set(title=f"temporal order, {init}", xlabel="length [steps]", ylabel="share of networks that solve it")
    curves = order[(order["kind"] == "curve") & (order["init"] == "tanh")]
    lengths = curves["length"].unique()
    length = lengths[len(lengths) // 2]
    for colour, method in zip(PALETTE, METHODS, strict=False):
        line = curves[(curves["method"] == method) & (curves["length"] == length) & (curves["update"] > 0)]
        for ax, column in ((axes[3], "loss"), (axes[4], "norm")):
            ax.plot(line["update"], line[column], color=colour, linewidth=1, label=method)
    for level in (np.log(4), np.log(2)):
        axes[3].axhline(level, color="k", linestyle=":", linewidth=1)
    axes[3].set(title=f"loss, tanh, T = {length}, network 0", ylabel="mean loss since the last point [nats]")
    axes[4].set(title="its gradient, with that of Ω", ylabel="norm before clipping", yscale="log")
    for ax in axes[3:5]:
        ax.set(xlabel="updates", xscale="log")
        ax.legend(fontsize=8)
    ends = adding[adding["kind"] == "run"]
    for mark, label, solved in (("o", "solved", True), ("x", "not solved", False)):
        part = ends[ends["solved"] == solved]
        axes[5].plot(part["init"], part["sequences"], mark, color=PALETTE[0], alpha=0.6, label=label)
    axes[5].axhline(PUBLISHED_SEQUENCES, color="k", linestyle="--", linewidth=1, label="published, T = 100")
    axes[5].set(xlabel="forget gate", ylabel="sequences seen", yscale="log")
    axes[5].set_title(f"adding problem by an LSTM, T = {adding['length'].iloc[0]}")
    axes[5].legend(fontsize=8)
    steps, budget = (order["updates"] * order["length"]).max(), adding["updates"].iloc[0]
    setting = (
        "H = {H}, batches of {B}, SGD with learning rate {rate}, clipping at {top}, at most {steps:,} steps in time; "
        "{runs} networks a point, 95 % Wilson intervals; LSTM: Adam with the same numbers, {budget:,} updates; "
        "{dtype}, seed {seed}"
    ).format(H=HIDDEN, B=BATCH, rate=RATE, top=THRESHOLD, steps=steps, budget=budget, **frame.iloc[0])
    caption(figure, "Long memory by gradient descent, with clipping and with Ω", setting)
    return figure


study = Study("temporal_order", question=__doc__, grid=grid, run=run, plot=plot, devices=("cpu",))

if __name__ == "__main__":
    study.main()
