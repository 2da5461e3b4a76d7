"""Figures of a run, drawn with matplotlib's Agg canvas: no display, no global state."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from ._optional import load
from .analysis import SLOW_OBSERVABLES
from .comparison import completed
from .io import write_atomically

__all__ = [
    "COMPARISON_FIGURES",
    "draw_autocorrelations",
    "draw_configurations",
    "draw_costs",
    "draw_scaling",
    "draw_throughput",
    "draw_tau_int",
    "draw_training",
    "write_comparison_figures",
    "write_figures",
]

# Okabe and Ito's palette, told apart with any colour vision, then three of Tol's; grey is HMC in every figure.
_HMC_COLOUR = "#555555"
_LONG_HMC_COLOUR = "#a5a5a5"
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#882255", "#999933", "#332288")

_SYMBOLS = {
    "M2": r"$M^2$",
    "phi2": r"$\phi^2$",
    "phi2_smeared": r"smeared $\phi^2$",
}


def _colours(priors: list[str]) -> dict[str | None, str]:
    return {None: _HMC_COLOUR} | {prior: _COLOURS[i % len(_COLOURS)] for i, prior in enumerate(priors)}


def _figure(width: float, height: float, rows: int = 1, columns: int = 1, **keywords: Any):
    """A figure and its axes as a (rows, columns) array, without frames that carry nothing."""
    load("matplotlib", "drawing figures")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **keywords)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _sampler_colours(samplers: list[dict[str, Any]]) -> list[str]:
    """One for each sampler; plain HMC with another trajectory length is a lighter grey."""

    def key(sampler):
        return sampler["prior"] or ("" if sampler["name"].lower().startswith("hmc") else sampler["name"])

    colours = _colours(list(dict.fromkeys(key(s) for s in samplers if key(s))))
    greys = iter([_HMC_COLOUR, _LONG_HMC_COLOUR, *["#b8b8b8"] * len(samplers)])
    return [colours[key(s)] if key(s) else next(greys) for s in samplers]


def _label(sampler: dict[str, Any]) -> str:
    return sampler["name"] if sampler["prior"] is None else f"flow-HMC, {sampler['prior']}"


def _with_chains(results: dict[str, Any]) -> dict[str, Any]:
    """The results without samplers whose fields are independent, or whose chains are too short to be judged."""
    chains = [s for s in results["samplers"] if s["judged"] and s["observables"]["M2"]["tau_int"] is not None]
    return results | {"samplers": chains}


def _smooth(series: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices and running means over a fiftieth of a series."""
    width = max(1, len(series) // 50)
    means = np.convolve(series, np.full(width, 1 / width), mode="valid")
    return np.arange(len(means)) + (width - 1) // 2, means


def draw_training(trainings: list):
    """ESS, and the loss above its final value, against steps and against seconds.

    Parameters
    ----------
    trainings : list of lfq.experiment.Training
    """
    figure, axes = _figure(10, 6.4, 2, 2, sharex="col", sharey="row")
    colours = _colours([training.name for training in trainings])
    for training in trainings:
        history, colour = training.history, colours[training.name]
        tail = max(1, len(history["loss"]) // 4)
        excess = (history["loss"] - history["loss"][-tail:].mean()) / training.theory.volume
        for row, series in enumerate((history["ess"], excess)):
            index, mean = _smooth(series)
            for ax, x in zip(axes[row], (np.arange(1, len(series) + 1), history["seconds"]), strict=True):
                ax.plot(x, series, color=colour, alpha=0.18, linewidth=0.5)
                ax.plot(x[index], mean, color=colour, linewidth=1.6, label=training.name)
    axes[0, 0].set_ylabel("effective sample size / batch size")
    axes[0, 0].set_yscale("log")
    axes[0, 0].set_ylim(None, 1)
    axes[1, 0].set_ylabel("(loss − final loss) per site")
    late = np.concatenate([_smooth(t.history["loss"])[1] for t in trainings])
    if np.ptp(late) > 0:
        axes[1, 0].set_yscale("symlog", linthresh=1e-3)
        axes[1, 0].set_ylim(-1e-2, None)
    axes[1, 0].axhline(0, color="#999999", linewidth=0.6, zorder=0)
    axes[1, 0].set_xlabel("training step")
    axes[1, 1].set_xlabel("wall time [s], coarse chains included")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=6, frameon=False)
    return figure


def draw_tau_int(results: dict[str, Any], logarithmic: bool = False):
    """Bars of tau_int with errors, for every observable that sets the cost and every sampler."""
    samplers = results["samplers"]
    colours = _sampler_colours(samplers)
    figure, axes = _figure(8, 4)
    ax, width = axes[0, 0], 0.8 / len(samplers)
    for i, sampler in enumerate(samplers):
        entries = [sampler["observables"][name] for name in SLOW_OBSERVABLES]
        position = np.arange(len(entries)) + (i - (len(samplers) - 1) / 2) * width
        ax.bar(
            position,
            [entry["tau_int"] for entry in entries],
            0.92 * width,
            yerr=[entry["tau_int_error"] for entry in entries],
            color=colours[i],
            error_kw={"elinewidth": 1, "capsize": 2},
            label=_label(sampler),
        )
    ax.set_xticks(range(len(SLOW_OBSERVABLES)), [_SYMBOLS[name] for name in SLOW_OBSERVABLES])
    ax.tick_params(axis="x", length=0)
    ax.set_ylabel(r"$\tau_{\mathrm{int}}$ [trajectories]")
    if logarithmic:
        ax.set_yscale("log")
        ax.axhline(0.5, color="#999999", linewidth=0.6, zorder=0)
        figure.legend(loc="outside right center", frameon=False)
    else:
        ax.legend(frameon=False)
    return figure


def draw_costs(results: dict[str, Any], logarithmic: bool = False):
    """Bars of the cost of an independent sample, in wall time and in force evaluations."""
    samplers = results["samplers"]
    figure, axes = _figure(10, 1.2 + 0.5 * len(samplers), 1, 2, sharey=True)
    panels = (
        ("cost_per_independent_sample_s", 1e3, "wall time per independent sample [ms]"),
        ("cost_per_independent_sample_force_evaluations", 1, "force evaluations per independent sample"),
    )
    for ax, (key, unit, label) in zip(axes[0], panels, strict=True):
        costs = np.array([sampler[key] for sampler in samplers]) * unit
        errors = costs * [sampler["cost_relative_error"] for sampler in samplers]
        ax.barh(
            range(len(samplers)),
            costs,
            0.7,
            xerr=errors,
            color=_sampler_colours(samplers),
            error_kw={"elinewidth": 1, "capsize": 2},
        )
        for row, cost in enumerate(costs + errors):
            ax.annotate(f"{costs[row]:.3g}", (cost, row), (4, 0), textcoords="offset points", va="center")
        if logarithmic:
            ax.set_xscale("log")
            ax.set_xlim(0.4 * costs.min(), 8 * (costs + errors).max())
        else:
            ax.set_xlim(0, 1.15 * (costs + errors).max())
        ax.set_xlabel(label)
        ax.tick_params(axis="y", length=0)
    axes[0, 0].set_yticks(range(len(samplers)), [_label(sampler) for sampler in samplers])
    axes[0, 0].invert_yaxis()
    return figure


def draw_scaling(sizes: list[dict[str, Any]]):
    """Cost of an independent sample per site against the lattice's extent, in both clocks.

    Parameters
    ----------
    sizes : list of dict
        `lfq.Comparison.results` of one list of samplers at several extents.
    """
    figure, axes = _figure(10, 4.4, 1, 2)
    panels = (
        ("cost_per_independent_sample_s", 1e9, "wall time per independent sample and site [ns]"),
        ("cost_per_independent_sample_force_evaluations", 1, "force evaluations per independent sample"),
    )
    samplers = sizes[0]["samplers"]
    colours = _sampler_colours(samplers)
    # Where colours repeat, as the light greys of HMC do, lines differ.
    styles = [("-", "--", ":", "-.")[colours[:i].count(colour) % 4] for i, colour in enumerate(colours)]
    for ax, (key, unit, label) in zip(axes[0], panels, strict=True):
        for sampler, colour, style in zip(samplers, colours, styles, strict=True):
            found = [s for size in sizes for s in size["samplers"] if s["name"] == sampler["name"] and s["judged"]]
            if not found:
                continue
            sites = [math.prod(s["shape"]) if unit != 1 else 1 for s in found]
            costs = np.array([s[key] for s in found]) * unit / sites
            ax.errorbar(
                [s["L"] for s in found],
                costs,
                costs * [s["cost_relative_error"] for s in found],
                color=colour,
                linestyle=style,
                marker="o",
                markersize=4,
                linewidth=1.4,
                label=sampler["name"],
            )
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        extents = [size["theory"]["shape"][0] for size in sizes]
        ax.set_xticks(extents, map(str, extents))
        ax.set_xlabel("L")
        ax.set_title(label, fontsize=10)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure


def draw_throughput(results: dict[str, Any]):
    """Independent samples against wall time, training included: where a line starts is what training took."""
    samplers = results["samplers"]
    figure, axes = _figure(8, 4.4)
    ax = axes[0, 0]
    starts = [max(sampler["train_seconds"], 1e-2) for sampler in samplers]
    end = 100 * max(*starts, results["seconds"])
    for sampler, colour in zip(samplers, _sampler_colours(samplers), strict=True):
        time = np.geomspace(1e-2, end, 400)
        worth = (time - sampler["train_seconds"]) * sampler["n_effective_per_second"]
        shown = worth > 1
        ax.plot(time[shown], worth[shown], color=colour, linewidth=1.6, label=_label(sampler))
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("wall time, training included [s]")
    ax.set_ylabel("independent samples")
    figure.legend(loc="outside right center", frameon=False)
    return figure


def draw_autocorrelations(results: dict[str, Any]):
    """Autocorrelation function of M^2 of every sampler, until it has decayed, with one standard error."""
    samplers = results["samplers"]
    figure, axes = _figure(8, 4.4)
    ax = axes[0, 0]
    for sampler, colour in zip(samplers, _sampler_colours(samplers), strict=True):
        lag, rho, error = (np.array(sampler["autocorrelation"][key]) for key in ("lag", "rho", "error"))
        ax.fill_between(lag, rho - error, rho + error, color=colour, alpha=0.25, linewidth=0)
        ax.plot(lag, rho, color=colour, linewidth=1.5, label=_label(sampler))
    ax.axhline(0, color="#999999", linewidth=0.6, zorder=0)
    ax.set_xlim(0, None)
    ax.set_xlabel("lag [trajectories]")
    ax.set_ylabel(r"autocorrelation of $M^2$")
    ax.legend(frameon=False)
    return figure


def _plane(phi: np.ndarray) -> np.ndarray:
    """The first plane of a field, as an image."""
    phi = np.atleast_2d(phi)
    return phi[(0,) * (phi.ndim - 2)]


def draw_configurations(trainings: list, example: np.ndarray):
    """One field on its way from each prior through the flow, beside one from HMC.

    Parameters
    ----------
    trainings : list of lfq.experiment.Training
    example : ndarray, shape (*shape)
        A configuration from HMC.
    """
    rows = (("coarse", "coarse lattice"), ("prior", "prior sample $z$"), ("flow", "flow $f(z)$"))
    columns = len(trainings) + 1
    figure, axes = _figure(1.9 * columns + 0.9, 5.9, len(rows), columns)
    limit = 1.05 * np.abs(example).max()
    image = None
    for column, training in enumerate(trainings):
        axes[0, column].set_title(training.name, fontsize=11)
        for ax, (key, _) in zip(axes[:, column], rows, strict=True):
            if key in training.fields:
                image = ax.imshow(_plane(training.fields[key]), cmap="PuOr", vmin=-limit, vmax=limit)
            else:
                ax.set_box_aspect(1)
                ax.text(0.5, 0.5, "—", ha="center", va="center", transform=ax.transAxes, color="#999999")
    image = axes[-1, -1].imshow(_plane(example), cmap="PuOr", vmin=-limit, vmax=limit)
    axes[-1, -1].set_title("HMC", fontsize=11)
    for ax in axes[:-1, -1]:
        ax.set_visible(False)
    for ax, (_, label) in zip(axes[:, 0], rows, strict=True):
        ax.set_ylabel(label)
    for ax in axes.flat:
        ax.set_xticks([])
        ax.set_yticks([])
        ax.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label=r"$\phi$", shrink=0.5, extend="both")
    return figure


def write_figures(out: Path, results: dict[str, Any], trainings: list, example: np.ndarray) -> dict[str, Path]:
    """Draw every figure of a run as a PNG in a directory.

    Returns
    -------
    dict of str to Path
        Files by caption.
    """
    target = results["config"]["target"]
    where = f"{' x '.join(map(str, target['shape']))}, beta = {target['beta']:g}, lam = {target['lam']:g}"
    captions = {
        "tau_int": f"Autocorrelation times at equal trajectory length and tuned acceptance ({where}).",
        "cost": "Cost of an independent sample of the slowest observable: 2 tau_int trajectories.",
        "autocorrelation": "Autocorrelation function of M^2; bands are one standard error.",
        "configurations": "One field from each prior before and after its flow, and one from HMC.",
    }
    figures = {
        "tau_int": draw_tau_int(results),
        "cost": draw_costs(results),
        "autocorrelation": draw_autocorrelations(results),
    }
    if trainings:
        captions["training"] = (
            "Training: effective sample size of each batch and the loss, which each prior knows up to a "
            "constant. Lines are running means."
        )
        figures["training"] = draw_training(trainings)
        figures["configurations"] = draw_configurations(trainings, example)
    return _write(out, figures, captions)


def _write(out: Path, figures: dict, captions: dict[str, str]) -> dict[str, Path]:
    files = {}
    for name, figure in figures.items():
        path = out / f"{name}.png"
        with write_atomically(path) as file:
            figure.savefig(file, format="png", facecolor="white")
        files[captions[name]] = path
    return files


COMPARISON_FIGURES = {
    "cost": "Cost of an independent sample of the slowest observable, training not included.",
    "throughput": "Independent samples against wall time, training included.",
    "tau_int": "Autocorrelation times, each sampler tuned to least cost.",
    "autocorrelation": "Autocorrelation function of M^2; bands are one standard error.",
}
"""The figures of `lfq compare`, by the names of their files, and their captions."""


def write_comparison_figures(out: Path, results: dict[str, Any]) -> dict[str, Path]:
    """Draw every figure of a comparison as a PNG in a directory; returns the files by caption."""
    results = results | {"samplers": completed(results)}
    chains = _with_chains(results)
    figures = {}
    if results["samplers"]:
        figures = {"cost": draw_costs(results, logarithmic=True), "throughput": draw_throughput(results)}
    if chains["samplers"]:
        figures["tau_int"] = draw_tau_int(chains, logarithmic=True)
        figures["autocorrelation"] = draw_autocorrelations(chains)
    return _write(out, figures, COMPARISON_FIGURES)
