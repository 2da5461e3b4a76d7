"""Every sampler on the line of constant physics, L = 8 to 64: the runs behind docs/comparison.md.

python examples/04_comparison.py                    # a quarter of an hour on one core; leaves comparison.json
python examples/04_comparison.py --draw --docs docs # tables and figure of docs/comparison.md from it
"""

import argparse
import json
import math
import platform
import sys
from dataclasses import replace
from pathlib import Path

import lfq
from lfq.analysis import fit_exponent, with_error
from lfq.comparison import completed
from lfq.experiment import finite, machine
from lfq.plots import draw_scaling

BETA = {4: 0.5, 8: 0.576, 16: 0.634, 32: 0.6614, 64: 0.67435}
SECONDS = {8: 3, 16: 3, 32: 5, 64: 10}
CHAINS = {8: 32, 16: 32, 32: 32, 64: 16}
# Where a search over lengths would take longer than everything else: the length, and mass, of the size before are
# kept, and only the number of steps is tuned.
KEPT_FROM = {"Fourier": 32, "flow-HMC": 64}
TIMING_ERROR = 0.05  # of wall times on a machine that does other work too


def theory(extent):
    return lfq.Phi4((extent, extent), beta=BETA[extent], lam=0.5)


def samplers(extent, proposals, before):
    """Every sampler of the theory at one size.

    `proposals` is a deep flow for independence Metropolis, `before` the tuned samplers of the size before.
    """
    target, tau = theory(extent), max(1.0, extent / 12)
    prior = lfq.Upsample(theory(extent // 2))
    fit = lfq.train(lfq.AffineFlow(), prior, target, n_steps=500, batch_size=256, seed=1)
    fixed = lfq.HMC(target, tau=1.0).tune(0.9, CHAINS[extent], seed=1)
    flow = {"training_seconds": proposals.seconds}
    return {
        "HMC, tau = 1": lfq.Contender(fixed, tune=False),
        "HMC": lfq.HMC(target, tau=tau),
        "HMC, random length": lfq.HMC(target, tau=tau, length_spread=0.3),
        "HMC, OMF2": lfq.HMC(target, tau=tau, integrator="omf2"),
        "Swendsen-Wang": lfq.ClusterHMC(target),
        "Wolff": lfq.ClusterHMC(target, cluster="wolff"),
        "heat bath": lfq.HeatBath(target),
        "heat bath, Swendsen-Wang": lfq.HeatBath(target, cluster="swendsen-wang"),
        "Fourier": kept("Fourier", lfq.FourierHMC(target), extent, before),
        "flow-HMC": replace(
            kept("flow-HMC", lfq.HMC(target.pullback(fit.flow)), extent, before),
            training_seconds=fit.seconds,
            prior=fit.prior,
        ),
        "independence": lfq.Contender(lfq.IndependenceMetropolis(target, proposals.flow), **flow),
        "reweighting": lfq.Contender(lfq.Reweighting(target, proposals.flow), **flow),
        "SMC": lfq.Annealing(target, n_temperatures=6 * extent, resample=0.5),
    }


def kept(name, sampler, extent, before):
    """The sampler, to be tuned by the comparison, or with what was best at the size before."""
    if extent < KEPT_FROM[name] or name not in before:
        return lfq.Contender(sampler)
    last = before[name].sampler
    mass = {"mass": last.mass} if name == "Fourier" else {}
    guess = replace(sampler, tau=last.tau, n_steps=last.n_steps, **mass)
    return lfq.Contender(guess.tune(0.8, CHAINS[extent], seed=3), tune=False)


def run(extents, path):
    coarse = theory(8)
    flow = lfq.AffineFlow(n_blocks=4, hidden=(8,), scale="exp(s)")
    proposals = lfq.train(flow, lfq.Gaussian(coarse.shape), coarse, n_steps=1000, batch_size=256, seed=2)
    sizes, before = [], {}
    facts = {"machine": machine(), "lfq": lfq.__version__, "python": platform.python_version()}
    for extent in extents:
        found = lfq.compare(
            theory(extent),
            samplers(extent, proposals, before),
            seconds=SECONDS[extent],
            n_chains=CHAINS[extent],
            seed=3,
            progress=lambda name, done, total, remark: print(f"{name}: {done}/{total} {remark}", file=sys.stderr),
        )
        print(f"L = {extent}\n\n{found}\n", flush=True)
        sizes.append(found.results)
        before = found.runs
        path.write_text(json.dumps(finite({"sizes": sizes} | facts), indent=1, allow_nan=False) + "\n")


def exponents(sizes, name, clock):
    """z of the cost of an independent sample from L = 16 on, in seconds per site or in force evaluations.

    None where a run is too short to have errors.
    """
    records = [next(s for s in size["samplers"] if s["name"] == name) for size in sizes]
    records = [r for r in records if r["L"] >= 16]
    if len(records) < 3 or not all(r["judged"] for r in records):
        return None
    extents = [r["L"] for r in records]
    # A force evaluation is of the whole lattice, a second is not.
    timed = clock.endswith("_s")
    costs = [r[clock] / (r["L"] ** 2 if timed else 1) for r in records]
    errors = [math.hypot(r["cost_relative_error"], TIMING_ERROR if timed else 0.0) for r in records]
    return fit_exponent(extents, costs, errors)


def digits(number):
    """Three significant digits without an exponent."""
    return f"{float(f'{number:.3g}'):.0f}" if number >= 100 else f"{number:.3g}"


def table(results):
    """The cost of an independent sample at every size, in both clocks, and its exponent, as Markdown."""
    sizes, lines = results["sizes"], []
    extents = [size["theory"]["shape"][0] for size in sizes]
    for clock, unit, title in (
        ("cost_per_independent_sample_s", 1e3, "ms"),
        ("cost_per_independent_sample_force_evaluations", 1, "force evaluations"),
    ):
        lines += [f"| {title} | " + " | ".join(f"L = {extent}" for extent in extents) + " | z |"]
        lines += ["|---" + "|--:" * (len(extents) + 1) + "|"]
        for name in (sampler["name"] for sampler in sizes[0]["samplers"]):
            cells = []
            for size in sizes:
                r = next(s for s in size["samplers"] if s["name"] == name)
                mark = "" if r["long_enough"] else "*"
                cells.append(f"{digits(unit * r[clock])}{mark}" if r["judged"] else "-")
            z = exponents(sizes, name, clock)
            lines.append(f"| {name} | " + " | ".join(cells) + f" | {'' if z is None else with_error(*z)} |")
        lines.append("")
    return "\n".join(lines)


def details(results):
    """tau_int of M^2, settings and agreement at every size, as Markdown."""
    lines = ["| L | sampler | settings | acceptance | tau_int M^2 | tau_int phi^2 | tau_int sign | chi^2 / 4 |"]
    lines.append("|--:|---|---|--:|--:|--:|--:|--:|")
    for size in results["sizes"]:
        for r in completed(size):
            taus = [r["observables"][key] for key in ("M2", "phi2")]
            shown = [with_error(t["tau_int"], t["tau_int_error"]) if r["judged"] and t["tau_int"] else "" for t in taus]
            rest = [
                "" if r["acceptance"] is None else f"{r['acceptance']:.3f}",
                *shown,
                "" if r["sign_tau_int"] is None or not r["judged"] else f"{r['sign_tau_int']:.3g}",
                "" if r["chi2"] is None else f"{r['chi2'] / 4:.2f}",
            ]
            lines.append(f"| {r['L']} | {r['name']} | {r['settings']} | " + " | ".join(rest) + " |")
    return "\n".join(lines)


def write(text, name, content):
    """Replace what lies between `<!-- name -->` and `<!-- /name -->`."""
    head, rest = text.split(f"<!-- {name} -->", 1)
    return f"{head}<!-- {name} -->\n{content}\n<!-- /{name} -->{rest.split(f'<!-- /{name} -->', 1)[1]}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--extents", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--results", type=Path, default=Path("comparison.json"))
    parser.add_argument("--draw", action="store_true", help="only tables and figure, from the results file")
    parser.add_argument("--docs", type=Path, help="directory whose comparison.md gets the tables")
    arguments = parser.parse_args()
    if not arguments.draw:
        run(arguments.extents, arguments.results)
    results = json.loads(arguments.results.read_text())
    print(table(results))
    if arguments.docs:
        page = arguments.docs / "comparison.md"
        text = write(page.read_text(), "costs", table(results))
        page.write_text(write(text, "details", details(results)))
        figure = draw_scaling(results["sizes"])
        figure.savefig(arguments.docs / "figures" / "comparison.png", facecolor="white")


if __name__ == "__main__":
    main()
