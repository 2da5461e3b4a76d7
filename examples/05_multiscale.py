"""Multiscale flow-HMC on the line of constant physics: the runs behind docs/multiscale.md.

python examples/05_multiscale.py                    # half an hour on one core; leaves multiscale.json
python examples/05_multiscale.py --draw --docs docs # tables and figure of docs/multiscale.md from it
"""

import argparse
import dataclasses
import json
import platform
import sys
import time
from pathlib import Path

import numpy as np

import lfq
from lfq.analysis import estimate, fit_exponent
from lfq.experiment import finite, machine

BETA = {8: 0.576, 16: 0.634, 32: 0.6614, 64: 0.67435, 128: 0.6806}
STEPS = {2: 2000, 4: 4000, 8: 6000, 16: 6000, 32: 3000, 64: 2000, 128: 1200}
EFFORT = {8: 1, 16: 1, 32: 2, 64: 6, 128: 6}  # what the steps are multiplied with to train a map for this L
BATCH = {2: 512, 4: 512, 8: 512, 16: 256, 32: 128, 64: 64, 128: 32}
CHAINS = {8: 64, 16: 64, 32: 64, 64: 32, 128: 16}
SECONDS = {8: 3, 16: 15, 32: 30, 64: 90, 128: 150}
DTYPE, LENGTH_SPREAD = "float32", 0.3
# Chains on a GPU, then lengths and steps there: of the map, and of plain HMC; trajectories that are measured of each.
GPU = {
    8: (8192, [(1.06, 3), (1.5, 4)], [(2.83, 15)], (1000, 2000)),
    16: (4096, [(1.06, 3), (1.5, 4)], [(4.0, 20), (5.33, 26)], (1000, 2000)),
    32: (2048, [(1.06, 5), (1.5, 7)], [(5.33, 48), (8.0, 72)], (1000, 4000)),
    64: (1024, [(1.06, 8), (1.5, 11)], [(5.33, 53), (10.67, 120)], (1000, 8000)),
    128: (256, [(1.5, 21)], [(10.67, 165)], (240, 5000)),
}
CHECKERBOARD = "ce|o o|ce"
VARIANTS = {
    "exp(-|s|), 1 checkerboard": dict(order=CHECKERBOARD, scale="exp(-|s|)"),
    "even, 2 features, 1 checkerboard": dict(order=CHECKERBOARD, scale="even", features=2),
    "even, 2 features, 4 checkerboards": dict(n_blocks=4, order=CHECKERBOARD, scale="even", features=2),
    "site, 1 checkerboard": dict(order=CHECKERBOARD),
    "site, 2 checkerboards": dict(n_blocks=2, order=CHECKERBOARD),
    "site, 2 checkerboards, one set of weights": dict(n_blocks=2, sublattices=False),
    "site, 3 checkerboards": dict(n_blocks=3, order=CHECKERBOARD),
    "site, 2 checkerboards, 5 x 5": dict(n_blocks=2, order=CHECKERBOARD, kernel_size=5),
    "site, e|c, 2 checkerboards": dict(order="e|c ce|o o|ce ce|o o|ce"),
    "site, e|c c|e e|c c|e e|c o|ce o|ce": dict(order="e|c c|e e|c c|e e|c o|ce o|ce"),
    "site, e|c c|e e|c o|ce c|eo e|co o|ce": dict(interpolate=True),  # like all others
    "the same, o|ce": dict(order="e|c c|e e|c o|ce c|eo e|co o|ce o|ce"),
}


def theory(extent, beta=None):
    return lfq.Phi4((extent, extent), beta=beta or BETA[extent], lam=0.5)


def trained(extent, effort=None, **structure):
    """Flows of 2 x 2, 4 x 4, ... at the coupling of `extent`, each level trained with all below it."""
    extents, effort = [2**n for n in range(1, extent.bit_length())], effort or EFFORT[extent]
    return lfq.train_ladder(
        lfq.MultiscaleFlow(1, seed=1, **structure), [theory(n, BETA[extent]) for n in extents],
        n_steps=[int(effort * STEPS[n]) for n in extents], batch_size=[BATCH[n] for n in extents], seed=extent,
        learning_rate=[0.015 if n < 64 or extent < 128 else 0.007 for n in extents], dtype=DTYPE, n_threads=1,
    )  # fmt: skip


def through(flow, extent, **options):
    return lfq.HMC(theory(extent).pullback(flow), dtype=DTYPE, n_threads=1, **options)


def measured(sampler, extent, n_samples=300):
    """Acceptance and tau_int of tuned chains, and the force evaluations of an independent sample."""
    state = sampler.advance(sampler.start(CHAINS[extent], seed=4), 1, 60, measure=False).state
    block = sampler.advance(state, n_samples)
    series = {"M2": block.observables["M"] ** 2, "abs_M": abs(block.observables["M"])}
    series |= {name: block.observables[name] for name in ("phi2", "phi2_smeared", "G_pmin")}
    tau_int = {name: estimate(values).tau_int for name, values in series.items()}
    forces = sampler.force_evaluations_per_trajectory
    return {
        "tau": sampler.tau,
        "n_steps": sampler.n_steps,
        "acceptance": float(block.accepted.mean()),
        "tau_int": tau_int,
        "forces_per_independent_sample": 2 * max(tau_int.values()) * forces,
    }


def variants(extents):
    found = []
    for name, structure in VARIANTS.items():
        record = {"name": name, "sizes": []}
        for extent in extents:
            fits = trained(extent, 0.5, **structure)
            record["n_weights"] = fits[-1].flow.n_weights
            facts = {"L": extent, "training_s": sum(fit.seconds for fit in fits), "std_log_w": fits[-1].std_log_w}
            try:
                sampler = through(fits[-1].flow, extent, tau=2.0, n_steps=8).tune(0.9, CHAINS[extent], seed=3)
                state = sampler.start(CHAINS[extent], seed=4)
                plain = lfq.HMC(theory(extent), tau=1.0, n_steps=20, dtype=DTYPE, n_threads=1)
                step = sampler.time_trajectory(state) / sampler.force_evaluations_per_trajectory
                plain_state = plain.start(CHAINS[extent], seed=4)
                step /= plain.time_trajectory(plain_state) / plain.force_evaluations_per_trajectory
                facts |= measured(sampler, extent) | {"step_over_plain": step}
            except (lfq.NotFiniteError, RuntimeError) as error:
                facts["error"] = str(error)
            record["sizes"].append(facts)
            print(name, facts, file=sys.stderr, flush=True)
        found.append(record)
    return found


def of_flow(flow, extent):
    """<M^2> of a flow's own fields."""
    z = lfq.Gaussian((extent, extent)).sample(2048, seed=6, dtype=DTYPE, n_threads=1)
    return float((flow.forward(z, n_threads=1)[0].mean(axis=(1, 2), dtype=float) ** 2).mean())


def comparison(extent):
    """Each sampler tuned to least cost in seconds on one core."""
    target, fits = theory(extent), trained(extent)
    flow, seconds = fits[-1].flow, sum(fit.seconds for fit in fits)
    hmc = lfq.HMC(target, tau=max(1.0, min(extent, 64) / 12), dtype=DTYPE, n_threads=1)
    if extent == 128:  # pilot runs would have to be as long as the run itself: its length is the best one at L = 64
        hmc = lfq.Contender(hmc.tune(0.7, CHAINS[extent], seed=3), tune=False)
    contenders = {
        "HMC": hmc,
        "Swendsen-Wang": lfq.ClusterHMC(target, dtype=DTYPE, n_threads=1),
        "multiscale": lfq.Contender(
            through(flow, extent, tau=1.5, n_steps=8, length_spread=LENGTH_SPREAD), seconds
        ),
    }  # fmt: skip
    if extent < 128:
        contenders["multiscale, OMF2"] = lfq.Contender(
            through(flow, extent, tau=1.5, n_steps=4, length_spread=LENGTH_SPREAD, integrator="omf2"), seconds
        )
        light = trained(extent, order=CHECKERBOARD)
        contenders["multiscale, 1 checkerboard"] = lfq.Contender(
            through(light[-1].flow, extent, tau=1.5, n_steps=8, length_spread=LENGTH_SPREAD),
            sum(fit.seconds for fit in light),
        )
    found = lfq.compare(target, contenders, seconds=SECONDS[extent], n_chains=CHAINS[extent], seed=3)
    print(f"L = {extent}\n\n{found}\n", flush=True)
    record = found.results | {"training_s": seconds, "std_log_w": fits[-1].std_log_w, "ess": fits[-1].ess}
    record["acceptance_of_proposals"] = fits[-1].acceptance
    record["M2_of_flow"] = of_flow(flow, extent)
    record["tau_2"] = measured(through(flow, extent, tau=2.0, n_steps=8).tune(0.9, CHAINS[extent], seed=3), extent)
    if 16 <= extent < 128:
        carried = fits[2].flow
        while carried.n_levels < flow.n_levels:
            carried = carried.refined()
        carried = through(carried, extent, tau=2.0, n_steps=8).tune(0.9, CHAINS[extent], seed=3)
        record["carried_from_8"] = measured(carried, extent)
    print(json.dumps(finite({k: record[k] for k in ("tau_2", "carried_from_8") if k in record})), flush=True)
    return record


def on_gpu(extent, flow):
    """What independent samples of many chains cost on a GPU, in forces and in seconds."""
    n_chains, lengths, plain_lengths, n_samples = GPU[extent]
    target, found, options = theory(extent), [], dict(dtype=DTYPE, length_spread=LENGTH_SPREAD, device="cuda")
    latents = target.pullback(flow)
    samplers = [("multiscale", latents, *length, n_samples[0]) for length in lengths]
    samplers += [("HMC", target, *length, n_samples[1]) for length in plain_lengths]
    first = lfq.HMC(latents, tau=2.0, n_steps=2 * lengths[0][1], **options)
    warm = first.advance(first.start(n_chains, seed=4), 1, 200, measure=False)
    for name, action, tau, n_steps, count in samplers:
        sampler = lfq.HMC(action, tau=tau, n_steps=n_steps, **options)
        state = warm.state if action is latents else lfq.State(warm.phi, 0, 5)
        state = sampler.advance(state, 1, 10, measure=False).state
        begin = time.perf_counter()
        state = sampler.advance(state, 1, count // 4, measure=False).state
        seconds = (time.perf_counter() - begin) / (count // 4 * n_chains)
        block = sampler.advance(state, count)
        series = {"M": block.observables["M"], "M2": block.observables["M"] ** 2, "abs_M": abs(block.observables["M"])}
        series |= {key: block.observables[key] for key in ("phi2", "phi2_smeared", "G_pmin")}
        record = {"name": name, "L": extent, "tau": tau, "n_steps": n_steps, "n_chains": n_chains, "n_samples": count}
        record |= {"acceptance": float(block.accepted.mean()), "seconds_per_trajectory": seconds}
        record["exp_minus_dh"] = dataclasses.asdict(estimate(np.exp(-block.dh)))
        record["observables"] = {key: dataclasses.asdict(estimate(values)) for key, values in series.items()}
        slowest = max((e for key, e in record["observables"].items() if key != "M"), key=lambda e: e["tau_int"])
        record["forces_per_independent_sample"] = 2 * slowest["tau_int"] * sampler.force_evaluations_per_trajectory
        record["relative_error"] = slowest["tau_int_error"] / slowest["tau_int"]
        record["seconds_per_independent_sample"] = 2 * slowest["tau_int"] * seconds
        found.append(record)
        print(json.dumps(finite(record)), file=sys.stderr, flush=True)
    return found


def shells(extent, flow):
    """tau_int of the power in each shell of momenta, |n| to the nearest integer, at the lengths that were tuned."""
    _, lengths, plain_lengths, _ = GPU[extent]
    (tau, n_steps), (plain_tau, plain_steps) = lengths[0], plain_lengths[0]
    n = np.fft.fftfreq(extent, 1 / extent)
    shell = np.rint(np.hypot(n[:, None], n))
    members = [shell == number for number in range(1, extent // 2 + 1)]
    chains = through(flow, extent, tau=tau, n_steps=n_steps, length_spread=LENGTH_SPREAD)
    warm = chains.advance(chains.start(CHAINS[extent], seed=4), 1, 200, measure=False)
    plain = lfq.HMC(theory(extent), tau=plain_tau, n_steps=plain_steps, dtype=DTYPE, n_threads=1)
    found = []
    for name, sampler, state, count in (
        ("multiscale", chains, warm.state, 1000),
        ("HMC", plain, plain.start(CHAINS[extent], seed=5, phi=warm.phi), {16: 2000, 32: 4000, 64: 6000}[extent]),
    ):
        series = np.empty((len(members), count, CHAINS[extent]))
        for trajectory in range(count):
            block = sampler.advance(state, 1, measure=False)
            state, power = block.state, abs(np.fft.fft2(block.phi)) ** 2
            for number, member in enumerate(members):
                series[number, trajectory] = power[:, member].mean(axis=1)
        estimates = [estimate(values) for values in series]
        record = {"name": name, "L": extent, "tau": sampler.tau, "n_steps": sampler.n_steps, "n_samples": count}
        record["tau_int"] = [e.tau_int for e in estimates]
        record["tau_int_error"] = [e.tau_int_error for e in estimates]
        found.append(record)
        print(json.dumps(finite(record)), file=sys.stderr, flush=True)
    return found


def cubic(extents):
    """Three dimensions, on the improved action of Hasenbusch, hep-lat/9902026, at its critical coupling."""

    def target(extent):
        return lfq.Phi4((extent,) * 3, beta=0.3750966, lam=1.1)

    found, seconds, options = [], 0.0, dict(dtype=DTYPE, n_threads=1)
    theories = [target(extent) for extent in (2, 4, *extents)]
    budget = dict(n_steps=[2000, 3000, 4000, 3000, 2000], batch_size=[512, 256, 96, 64, 32])
    fits = lfq.train_ladder(
        lfq.MultiscaleFlow(n_levels=1, ndim=3, seed=1), theories, learning_rate=0.015, **options,
        **{name: values[: len(theories)] for name, values in budget.items()},
    )  # fmt: skip
    for extent, fit in zip((2, 4, *extents), fits, strict=True):
        seconds += fit.seconds
        if extent < 8:
            continue
        through_flow = lfq.HMC(target(extent).pullback(fit.flow), tau=2.2, n_steps=8, **options).tune(0.85, seed=3)
        warm = through_flow.advance(through_flow.start(32, seed=4), 1, 300, measure=False)
        samplers = {"multiscale": (through_flow, warm.state, 1000)}
        for tau in (1.4, 2.8, 4.0):
            plain = lfq.HMC(target(extent), tau=tau, n_steps=12, **options)
            state = plain.start(32, seed=5, phi=warm.phi)
            samplers[f"HMC, tau = {tau}"] = plain.tune(0.85, start=state), state, 4000 if extent < 32 else 6000
        for name, (sampler, state, n_samples) in samplers.items():
            block = sampler.advance(state, n_samples)
            estimates = {"M2": estimate(block.observables["M"] ** 2), "phi2": estimate(block.observables["phi2"])}
            slowest = max(e.tau_int for e in estimates.values())
            record = {"name": name, "L": extent, "n_steps": sampler.n_steps, "acceptance": float(block.accepted.mean())}
            record |= {k: {"value": e.value, "error": e.error, "tau_int": e.tau_int} for k, e in estimates.items()}
            record["forces_per_independent_sample"] = 2 * slowest * sampler.force_evaluations_per_trajectory
            found.append(record | {"training_s": seconds})
            print(record, file=sys.stderr, flush=True)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--extents", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--results", type=Path, default=Path("multiscale.json"))
    parser.add_argument("--draw", action="store_true", help="draw from the results instead of making them")
    parser.add_argument("--docs", type=Path, default=Path("."), help="where figures/multiscale.png goes")
    parser.add_argument("--cubic", action="store_true", help="only three dimensions, L = 8, 16 and 32")
    parser.add_argument("--gpu", action="store_true", help="only many chains on a GPU, at lengths tuned before")
    parser.add_argument("--shells", action="store_true", help="only tau_int of each shell of momenta")
    parser.add_argument("--variants", action="store_true", help="only the comparison of blocks")
    arguments = parser.parse_args()
    if arguments.draw:
        return draw(json.loads(arguments.results.read_text()), arguments.docs)
    results = json.loads(arguments.results.read_text()) if arguments.results.exists() else {}
    results |= {"machine": machine(), "lfq": lfq.__version__, "python": platform.python_version()}
    begin = time.perf_counter()
    if arguments.variants:
        results["variants"] = variants([extent for extent in arguments.extents if 16 <= extent <= 32])
    elif arguments.cubic:
        results["cubic"] = cubic([8, 16, 32])
    elif arguments.shells:
        results["shells"] = [record for extent in (16, 32, 64) for record in shells(extent, trained(extent)[-1].flow)]
    elif arguments.gpu:
        results["gpu"] = {"device": lfq.info()["gpu"], "samplers": []}
        for extent in arguments.extents:
            results["gpu"]["samplers"] += on_gpu(extent, trained(extent)[-1].flow)
    else:
        kept = [size for size in results.get("sizes", []) if size["theory"]["shape"][0] not in arguments.extents]
        for extent in arguments.extents:
            kept.append(comparison(extent))
            results["sizes"] = sorted(kept, key=lambda size: size["theory"]["shape"][0])
            arguments.results.write_text(json.dumps(finite(results), indent=1, allow_nan=False) + "\n")
    results["seconds"] = time.perf_counter() - begin
    arguments.results.write_text(json.dumps(finite(results), indent=1, allow_nan=False) + "\n")


def draw(results, docs):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    clocks = {
        "cost_per_independent_sample_s": "ns per site and independent sample",
        "cost_per_independent_sample_force_evaluations": "force evaluations per independent sample",
    }
    drawn = [size["theory"]["shape"][0] for size in results["sizes"]]
    for axis, (key, label) in zip(axes, clocks.items(), strict=True):
        for name in [record["name"] for record in results["sizes"][0]["samplers"]]:
            records = [s for size in results["sizes"] for s in size["samplers"] if s["name"] == name]
            extents = [r["L"] for r in records]
            costs = [r[key] * (1e9 / r["L"] ** 2 if key.endswith("_s") else 1) for r in records]
            axis.plot(extents, costs, "o-", label=name)
            scaling = [n for n, extent in enumerate(extents) if 16 <= extent <= 64]
            if len(scaling) < 3:
                continue
            errors = [records[n]["cost_relative_error"] for n in scaling]
            z, error = fit_exponent([extents[n] for n in scaling], [costs[n] for n in scaling], errors)
            print(f"{name}, {label}: {', '.join(f'{c:.3g}' for c in costs)}; z = {z:.2f} +- {error:.2f}")
        axis.set(xscale="log", yscale="log", xlabel="L", ylabel=label)
        axis.set_xticks(drawn, drawn)
        axis.minorticks_off()
    axes[0].legend()
    (docs / "figures").mkdir(parents=True, exist_ok=True)
    figure.savefig(docs / "figures" / "multiscale.png", dpi=150)


if __name__ == "__main__":
    main()
