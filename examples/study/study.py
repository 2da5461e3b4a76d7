"""Does learning from coarser lattices pay, and how does it scale? The runs behind docs/study.md.

python examples/study/study.py run examples/study/L16-one-block.toml --results docs/study
python examples/study/study.py all --results docs/study          # all that have no results yet; an hour of one core
python examples/study/study.py units --results docs/study        # what a force and a training step cost
python examples/study/study.py draw --results docs/study --docs docs

A configuration is one of `lfq compare`, with the chains and acceptance of `[sampling]` and every sampler run until it
is long enough, and a last table, `[study]`.
"""

import argparse
import json
import platform
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import lfq
from lfq import _optional, experiment
from lfq.analysis import SLOW_OBSERVABLES, estimate, fit_exponent, integrated_time, with_error
from lfq.comparison import RELIABLE_TAU, SHORTEST_CHAIN, agreement
from lfq.config import Config, PriorConfig, SamplerConfig, SamplingConfig, parse_config
from lfq.hmc import Sampler
from lfq.train import effective_sample_size, independence_acceptance

CONFIGS = Path(__file__).parent
OBSERVABLES = ("M2", "abs_M", "phi2", "phi2_smeared", "G_pmin")
MODES = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
POINTS = 60  # of a training's history that are stored


@dataclass(frozen=True)
class Study:
    """``[study]``: what a configuration of lfq does not say.

    Attributes
    ----------
    weights : str
        Run from whose flows, prior by prior, training starts; empty: from the flow's initial weights.
    train : bool
        Otherwise the flows of `weights` are used as they are.
    compose : tuple of str
        Runs whose flows come before the trained one, the first acting first.
    through_map : bool
        HMC moves the latents of the prior's base, and not the prior's fields.
    spectrum : int
        Samples behind the autocorrelation times of Fourier modes.
    n_tau_int : int
        Autocorrelation times of the slowest observable, over all chains, after which sampling ends.
    """

    weights: str = ""
    train: bool = True
    compose: tuple[str, ...] = ()
    through_map: bool = False
    spectrum: int = 0
    n_tau_int: int = 1500


def load(path: Path) -> tuple[Config, Study]:
    """The configuration of lfq and the study's own table, which is the last one of the file."""
    own, _, mine = path.read_text().partition("[study]\n")
    table = _optional.load("tomllib" if sys.version_info >= (3, 11) else "tomli", "a configuration file").loads(mine)
    return parse_config(own), Study(**table | {"compose": tuple(table.get("compose", ()))})


# ---- flows ----------------------------------------------------------------------------------


def stored(results: Path, name: str) -> dict:
    return json.loads((results / f"{name}.json").read_text())


def stored_flow(results: Path, name: str, prior: str) -> lfq.Flow:
    """A flow that another run has trained."""
    record = stored(results, name)
    flow = experiment.initial_flow(parse_config(record["config"]))
    flow.weights = np.array(record["trainings"][prior]["weights"])
    return flow


def with_stored_map(base: lfq.priors.Prior, record: dict) -> lfq.priors.Prior:
    """The prior with the scale, widths and interpolation that a training has found, where it has them."""
    if not isinstance(base, lfq.Upsample):
        return base
    found = lfq.UpsampleMap(record["scale"], record["width"], record["interpolation"], len(base.shape))
    return base.with_map_weights(found.weights)


def trained(config: Config, study: Study, prior, results: Path, phi) -> tuple[lfq.Flow, dict]:
    """The flow that is sampled through, and what is known of its training."""
    target, seed = experiment.target_theory(config), experiment.stage_seed(config.run.seed, f"train {prior.name}")
    base, start = experiment.make_prior(config, prior), experiment.initial_flow(config)
    if study.weights:
        start = stored_flow(results, study.weights, prior.name)
        base = with_stored_map(base, stored(results, study.weights)["trainings"][prior.name])
    history = {}
    if study.train:
        options = vars(config.training) | {"dtype": config.run.dtype, "n_threads": 1}
        fit = lfq.train(start, base, target, seed=seed, **options)
        flow, base = fit.flow, fit.prior
        last = len(fit.history["loss"]) - 1
        at = np.unique(np.geomspace(1, last + 1, POINTS).round().astype(int)) - 1
        history = {"step": at + 1} | {key: fit.history[key][at] for key in ("loss", "ess", "std_log_w")}
        history["smooth_std_log_w"] = [median(fit.history["std_log_w"], i) for i in at]
        facts = {"ess": fit.ess, "acceptance": fit.acceptance, "std_log_w": fit.std_log_w}
    else:
        flow = start
        z = base.sample(4096, seed, config.run.dtype, 1)
        out, log_det = flow.forward(z, 1)
        log_w = log_det - target.action(out, 1) - base.log_prob(z, 1)
        facts = {"ess": effective_sample_size(log_w), "acceptance": independence_acceptance(log_w, seed)}
        facts["std_log_w"] = log_w.std()
    facts |= {"reverse_ess": lfq.reverse_ess(flow, base, target, phi, 1), "n_weights": flow.n_weights}
    drawn = flow.forward(base.sample(2048, seed + 1, config.run.dtype, 1), 1)[0].reshape(2048, -1)
    facts |= {"M2": float((drawn.mean(axis=1) ** 2).mean()), "phi2": float((drawn**2).mean())}
    if isinstance(base, lfq.Upsample):
        facts |= {"width": base.width, "interpolation": base.interpolation, "scale": base.scale}
    record = facts | {"weights": flow.weights, "history": history}
    return sampled_through(study, results, prior.name, base, flow), record


def sampled_through(study: Study, results: Path, prior: str, base: lfq.priors.Prior, flow: lfq.Flow) -> lfq.Flow:
    """The flow with what comes before it: the prior's map, flows of other runs."""
    parts = [base.map] if study.through_map and base.map else []
    parts += [stored_flow(results, name, prior) for name in study.compose]
    return lfq.Compose([*parts, flow]) if parts else flow


def median(series, at: int, width: int = 10) -> float:
    """The median of a batch's figure over the steps around it: one outlier of log w moves a batch's deviation."""
    return float(np.median(series[max(0, at - width) : at + width + 1]))


# ---- chains ---------------------------------------------------------------------------------


def built(config: Config, sampler: SamplerConfig, flows: dict[str, lfq.Flow], state) -> Sampler:
    """The sampler, tuned: to least force evaluations, or the number of its steps alone."""
    target, settings = experiment.target_theory(config), config.sampling
    options = {"tau": sampler.tau, "dtype": config.run.dtype, "n_threads": 1, "length_spread": sampler.length_spread}
    seed = experiment.stage_seed(config.run.seed, f"tune {sampler.name}")
    if sampler.kind == "swendsen-wang":
        return lfq.ClusterHMC(target, **options).tune(settings.acceptance, settings.n_chains, seed)
    theory = target if sampler.kind == "hmc" else target.pullback(flows[sampler.prior])
    hmc = lfq.HMC(theory, integrator=sampler.integrator, **options)
    if sampler.tune:
        # The baseline is cheap, so that its search can afford to be the more careful one.
        n, longest = (64, 2000) if sampler.kind == "hmc" else (32, 400)
        return hmc.tune_cost(0.8, n, seed, max_trajectories=longest, clock="forces")
    return hmc.tune(settings.acceptance, settings.n_chains, seed, start=hmc.start(settings.n_chains, seed, phi=state))


def measured(sampler: Sampler, phi, seed: int, settings: SamplingConfig, n_tau_int: int) -> lfq.Run:
    """Chains from fields in equilibrium, until they are long enough or have all the samples of `settings`."""
    state = sampler.start(len(phi), seed, phi=phi)
    state = sampler.advance(state, 1, max(1, settings.n_warmup), measure=False).state
    blocks, done, most = [], 0, settings.n_samples
    while done < most:
        blocks.append(sampler.advance(state, min(max(250, done), most - done)))
        state, done = blocks[-1].state, done + len(blocks[-1].dh)
        run = lfq.Run.from_blocks(sampler.theory, sampler, blocks)
        tau_int = max(integrated_time(run.observables[name]) for name in SLOW_OBSERVABLES)
        if done * len(phi) > n_tau_int * tau_int and done > 2 * SHORTEST_CHAIN * tau_int:
            break
    return run


def chain_facts(run: lfq.Run) -> dict:
    found = {name: estimate(run.observables[name]) for name in OBSERVABLES}
    slowest = max((found[name] for name in SLOW_OBSERVABLES), key=lambda e: e.tau_int)
    forces = run.force_evaluations_per_trajectory
    return {
        "tau": run.sampler.tau,
        "n_steps": run.sampler.n_steps,
        "acceptance": run.acceptance,
        "exp_minus_dh": run.exp_minus_dh(),
        "n_chains": run.n_chains,
        "n_samples": run.n_samples,
        "observables": {
            name: {"value": e.value, "error": e.error, "tau_int": e.tau_int, "tau_int_error": e.tau_int_error}
            for name, e in found.items()
        },
        "forces": 2 * slowest.tau_int * forces,
        "relative_error": slowest.tau_int_error / slowest.tau_int,
        "forces_per_trajectory": forces,
        "n_tau_int": slowest.n_samples / slowest.tau_int,
        "long_enough": slowest.n_samples >= RELIABLE_TAU * slowest.tau_int
        and run.n_samples >= SHORTEST_CHAIN * slowest.tau_int,
    }


def spectrum(sampler: Sampler, state, n_samples: int) -> list[dict]:
    """tau_int of the squared modulus of the modes (n, 0) and (0, n), in trajectories."""
    extent, modes = sampler.theory.shape[0], []
    wanted = [n for n in MODES if n <= extent // 2]
    for _ in range(n_samples):
        block = sampler.advance(state, 1, measure=False)
        state, phi = block.state, block.phi
        rows, columns = (np.fft.rfft(phi.sum(axis=axis, dtype=float), axis=-1)[:, wanted] for axis in (1, 2))
        modes.append((abs(rows) ** 2 + abs(columns) ** 2) / 2)
    found = [estimate(series) for series in np.moveaxis(np.array(modes), -1, 0)]
    return [{"n": n, "tau_int": e.tau_int, "error": e.tau_int_error} for n, e in zip(wanted, found, strict=True)]


def run(path: Path, results: Path) -> dict:
    """Everything that a configuration says: trainings, chains, and what they found as plain data."""
    config, study = load(path)
    target, seed = experiment.target_theory(config), config.run.seed
    clusters = lfq.ClusterHMC(target, tau=1.0, n_steps=10, dtype=config.run.dtype, n_threads=1)
    begin = clusters.start(max(512, config.sampling.n_chains), experiment.stage_seed(seed, "fields"))
    phi = clusters.advance(begin, 1, 200, measure=False).phi
    flows, trainings, samplers, runs = {}, {}, [], {}
    for prior in config.prior:
        flows[prior.name], trainings[prior.name] = trained(config, study, prior, results, phi)
        tell(path.stem, prior.name, {k: trainings[prior.name][k] for k in ("ess", "std_log_w", "reverse_ess")})
    phi = phi[: config.sampling.n_chains]
    for entry in config.sampler:
        record = {"name": entry.name, "kind": entry.kind, "prior": entry.prior, "tuned": entry.tune}
        try:
            sampler = built(config, entry, flows, phi)
            stage = experiment.stage_seed(seed, f"sample {entry.name}")
            found = measured(sampler, phi, stage, config.sampling, study.n_tau_int)
            runs[entry.name] = found
            record |= chain_facts(found)
            if study.spectrum and entry.kind != "swendsen-wang" and entry.tau != 1:
                record["spectrum"] = spectrum(sampler, found.state, study.spectrum)
        except (lfq.NotFiniteError, RuntimeError) as error:
            record["error"] = str(error)
        samplers.append(record)
        tell(path.stem, entry.name, {k: record.get(k) for k in ("tau", "n_steps", "forces", "n_tau_int", "error")})
    chi2 = agreement(runs)[0] if len(runs) > 1 else {}
    for record in samplers:
        record["chi2"] = chi2.get(record["name"])
    found = {
        "name": path.stem,
        "config": config.to_toml(),
        "study": vars(study),
        "trainings": trainings,
        "samplers": samplers,
        "lfq": lfq.__version__,
        "python": platform.python_version(),
        "machine": experiment.machine(1),
    }
    write(results / f"{path.stem}.json", found)
    return found


def tell(*what) -> None:
    print(*what, file=sys.stderr, flush=True)


def rounded(value):
    """Six significant digits of every number, weights included: more would be noise, and text."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, (float, np.floating)) else value


def write(path: Path, found: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rounded(experiment.finite(rounded(found))), allow_nan=False) + "\n")


# ---- what things cost -----------------------------------------------------------------------


def cpu_seconds(call, *arguments, **options) -> float:
    """Of this process: what others do on the machine does not count."""
    begin = time.process_time()
    call(*arguments, **options)
    return time.process_time() - begin


def force_seconds(hmc: lfq.HMC, state) -> float:
    """CPU seconds of a force evaluation, and what a trajectory takes beside it, of one chain of many."""
    n = 1
    while True:
        used = cpu_seconds(hmc.advance, state, 1, n, measure=False)
        if used > 0.05:
            return used / (n * state.n_chains * hmc.force_evaluations_per_trajectory)
        n *= 2


def training_seconds(flow: lfq.Flow, prior: PriorConfig, config: Config, target: lfq.Phi4) -> float:
    """CPU seconds of a step of training."""
    base = experiment.make_prior(replace(config, prior_chains=replace(config.prior_chains, n_warmup=0)), prior)
    options = vars(config.training) | {"dtype": config.run.dtype, "n_threads": 1, "n_evaluation": 2}
    few, steps, more = cpu_seconds(lfq.train, flow, base, target, **options | {"n_steps": 2}), 4, 0.0
    while more < 0.1:
        steps *= 4
        more = cpu_seconds(lfq.train, flow, base, target, **options | {"n_steps": 2 + steps}) - few
    return more / steps


def units(results: Path, repeats: int = 3) -> None:
    """What a force through each flow and a step of training cost, in plain HMC forces measured beside them.

    Runs that have their units already are left out.
    """
    path, known = results / "units.json", {}
    found = json.loads(path.read_text())["units"] if path.exists() else {}
    for record in (json.loads(file.read_text()) for file in sorted(results.glob("L*.json"))):
        config, study, name = parse_config(record["config"]), Study(**record["study"]), record["name"]
        target, dtype = experiment.target_theory(config), config.run.dtype
        if name in found:
            continue
        # Steps so small that no flow is too steep for them.
        plain = lfq.HMC(target, tau=0.1, n_steps=20, dtype=dtype, n_threads=1)
        state = plain.start(config.sampling.n_chains, 1)
        state = plain.advance(state, 1, 500, measure=False).state
        found[name] = {}
        for prior in config.prior:
            batch, maps = config.training.batch_size, (study.through_map, *study.compose)
            key = config.target, config.flow, config.prior_chains, prior, batch, maps
            if key not in known:
                base = with_stored_map(experiment.make_prior(config, prior), record["trainings"][prior.name])
                flow = stored_flow(results, name, prior.name)
                whole = sampled_through(study, results, prior.name, base, flow)
                through = replace(plain, theory=target.pullback(whole))
                latent = through.start(len(state.latent), 1, phi=state.latent)
                training_seconds(flow, prior, config, target)  # compiles
                rounds = [
                    (force_seconds(plain, state), force_seconds(through, latent), force_seconds(plain, state),
                     training_seconds(flow, prior, config, target))
                    for _ in range(repeats)
                ]  # fmt: skip
                unit = float(np.median([p for one, _, two, _ in rounds for p in (one, two)]))
                known[key] = {
                    "plain_s": unit,
                    "force": np.median([f / p for p, f, _, _ in rounds]),
                    "training_step": np.median([step / p for _, _, p, step in rounds]),
                    # The thermalisation of the prior's chains.
                    "warm_up": cpu_seconds(base.base.start, batch, 1, dtype, 1) / unit,
                }
            found[name][prior.name] = known[key]
        if not config.prior:
            found[name][""] = {"plain_s": np.median([force_seconds(plain, state) for _ in range(repeats)])}
        tell(name, found[name])
        write(path, {"units": found, "machine": experiment.machine(1), "lfq": lfq.__version__})


# ---- tables and figures ---------------------------------------------------------------------

PRIORS = {
    "gaussian": ("Gaussian", "#0072B2"),
    "lattice": ("same lattice, smaller beta", "#E69F00"),
    "interleave": ("four copies, interleaved", "#009E73"),
    "upsample": ("one copy, upsampled", "#CC79A7"),
}
SIZES = (8, 16, 32, 64)
NETS = {
    "one-block": "paper's block",
    "k5": "k = 5",
    "k9": "k = 9",
    "b2": "2 blocks",
    "b4": "4 blocks",
    "b8": "8 blocks",
    "h8": "hidden layer of 8",
    "site1": "`site`, 1 block",
    "site4": "`site`, 4 blocks",
    "map": "paper's block, latents of the prior",
    "site4-map": "`site`, 4 blocks, latents of the prior",
    "composed": "blocks of all levels",
    "from16": "weights of L = 16",
    "ladder": "weights handed up",
    "scratch": "from scratch, as long as the ladder",
}
SITE_NETS = ("site1", "site4")
APART = ("hmc1", "hmc", "tau1", "tau1-gaussian", "tau1-upsample")
"""Runs of HMC, and of length 1 at L = 64, that go with the paper's block."""


class Found:
    """All results, and seconds from counts and unit costs."""

    def __init__(self, results: Path):
        self.runs = {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("L*.json"))}
        self.units = json.loads((results / "units.json").read_text())["units"]
        plain = {}
        for name, priors in self.units.items():
            plain.setdefault(int(name[1:3]), []).extend(unit["plain_s"] for unit in priors.values())
        self._plain = {size: min(times) for size, times in plain.items()}

    def get(self, extent: int, net: str) -> dict | None:
        return self.runs.get(f"L{extent:02d}-{net}")

    def sampler(self, extent: int, name: str, net: str = "one-block") -> dict | None:
        """The record of a sampler, with its seconds, where it was run and did not fail.

        Of HMC and clusters the longer runs; lengths of 1 are apart where they are long.
        """
        runs = [self.get(extent, n) for n in ((*APART, net) if net == "one-block" else (net,))]
        known = [(r, s) for r in runs if r for s in r["samplers"] if s["name"] == name and "error" not in s]
        if not known:
            return None
        run, record = known[0]
        for _, other in known[1:]:
            same = all(other[key] == record[key] for key in ("tau", "n_steps"))
            record = ({"spectrum": other["spectrum"]} if same and "spectrum" in other else {}) | record
        step = self.unit(run["name"], record["prior"], "force") if record["prior"] else self.plain(extent)
        return record | {"step": step / self.plain(extent), "seconds": record["forces"] * step}

    def unit(self, name: str, prior: str, what: str) -> float:
        """CPU seconds of a force through a flow, of a step of training, or of what comes before the first."""
        measured = self.units[name][prior]
        return measured[what] * measured["plain_s"]

    def best(self, extent: int, prior: str, net: str) -> dict | None:
        """The cheapest of the samplers through a flow."""
        run = self.get(extent, net)
        names = [s["name"] for s in run["samplers"] if s["prior"] == prior] if run else []
        return min(filter(None, (self.sampler(extent, n, net) for n in names)), key=lambda s: s["forces"], default=None)

    def plain(self, extent: int) -> float:
        """Seconds of a force evaluation of plain HMC and what goes with it, of one chain of many.

        The least of all processes: where memory happens to lie makes a third at L = 64.
        """
        return self._plain[extent]

    def training_seconds(self, extent: int, net: str, prior: str) -> float:
        """Of all steps and those of the runs before, the thermalisation of the prior's chains included."""
        run = self.get(extent, net)
        study = run["study"]
        before = 0.0
        for name in [study["weights"], *study["compose"]]:
            if name:
                before += self.training_seconds(int(name[1:3]), name[4:], prior)
        if not study["train"]:
            return before
        steps = run["trainings"][prior]["history"]["step"][-1]
        return (
            before + self.unit(run["name"], prior, "warm_up") + steps * self.unit(run["name"], prior, "training_step")
        )

    def curve(self, extent: int, net: str, prior: str) -> tuple[list[float], list[float]]:
        """Seconds of training at this size and the deviation of log w after them."""
        run = self.get(extent, net)
        history = run["trainings"][prior]["history"]
        start, step = (self.unit(run["name"], prior, what) for what in ("warm_up", "training_step"))
        return [start + n * step for n in history["step"]], history["smooth_std_log_w"]


def number(value: float | None) -> str:
    """Three significant digits, without an exponent where it can be."""
    if value is None:
        return "-"
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        value = float(f"{value:.3g}")
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:g}"
    return f"{value:.1e}"


def taus(record: dict, name: str) -> str:
    entry = record["observables"][name]
    return with_error(entry["tau_int"], entry["tau_int_error"]) + ("" if record["long_enough"] else "*")


def markdown(heading: list[str], rows: list[list[str]], left: int = 1) -> str:
    marks = ["---"] * left + ["--:"] * (len(heading) - left)
    return "\n".join("| " + " | ".join(line) + " |" for line in [heading, marks, *rows])


def z(found: Found, pick, name: str, net: str, smallest: int) -> str:
    """The exponent of a figure of a sampler over the sizes from `smallest` on, where there are three."""
    records = [(extent, found.sampler(extent, name, net)) for extent in SIZES if extent >= smallest]
    records = [(extent, *pick(record)) for extent, record in records if record]
    if len(records) < 3:
        return ""
    extents, values, errors = zip(*records, strict=True)
    return with_error(*fit_exponent(extents, values, [e / v for v, e in zip(values, errors, strict=True)]))


def magnetisation(record: dict) -> tuple[float, float]:
    entry = record["observables"]["M2"]
    return entry["tau_int"], entry["tau_int_error"]


def forces(record: dict) -> tuple[float, float]:
    return record["forces"], record["forces"] * record["relative_error"]


def over(value, error, base, base_error) -> str:
    """A ratio with its error."""
    ratio = base / value
    return with_error(ratio, ratio * np.hypot(error / value, base_error / base))


def table_priors(found: Found) -> str:
    """tau_int of M^2 and forces of an independent sample at every size, and HMC's over them."""
    parts = []
    paper = [(label, prior, "one-block") for prior, (label, _) in PRIORS.items()]
    other = [
        (f"{NETS[net]}, {PRIORS[prior][0]}", prior, net) for net in SITE_NETS for prior in ("gaussian", "upsample")
    ]
    for pick, ending, lines, smallest, title in (
        (magnetisation, ", tau 1", paper, 8, "tau_int of M^2, length 1; HMC's over it"),
        (forces, "", [*paper, *other], 16, "forces of an independent sample, tuned; HMC's over it"),
    ):
        base, rows = {extent: pick(found.sampler(extent, "HMC" + ending)) for extent in SIZES}, []
        for label, prior, net in [("HMC", "HMC", "one-block"), *lines]:
            cells = []
            for extent in SIZES:
                record = found.sampler(extent, prior + ending, net)
                if record is None:
                    cells.append("")
                    continue
                gain = "" if prior == "HMC" else f"; {over(*pick(record), *base[extent])}"
                cells.append(f"{with_error(*pick(record))}{'' if record['long_enough'] else '*'}{gain}")
            rows.append([label, *cells, z(found, pick, prior + ending, net, smallest)])
        parts.append(markdown([title, *(f"L = {extent}" for extent in SIZES), "z"], rows))
    return "\n\n".join(parts)


def table_details(found: Found) -> str:
    rows = []
    for extent in SIZES:
        runs = [found.get(extent, net) for net in (*APART, "one-block")]
        for name in dict.fromkeys(entry["name"] for run in filter(None, runs) for entry in run["samplers"]):
            record = found.sampler(extent, name)
            rows.append(
                [
                    str(extent),
                    name,
                    f"{record['tau']:.3g}",
                    str(record["n_steps"]),
                    f"{record['acceptance']:.2f}",
                    *(taus(record, name) for name in ("M2", "abs_M", "phi2", "phi2_smeared")),
                    number(record["forces"]),
                    number(1e3 * record["seconds"]) if record["kind"] != "swendsen-wang" else "",
                    with_error(*record["exp_minus_dh"]),
                    "" if record["chi2"] is None else f"{record['chi2'] / 4:.2f}",
                ]
            )
    heading = ["L", "sampler", "length", "steps", "acceptance", "M^2", "abs M", "phi^2", "smeared", "forces", "ms"]
    return markdown([*heading, "exp(-dH)", "chi^2 / 4"], rows, 2)


def table_training(found: Found) -> str:
    rows = []
    for extent in SIZES:
        for prior, (label, _) in PRIORS.items():
            t = found.get(extent, "one-block")["trainings"][prior]
            rows.append(
                [
                    str(extent),
                    label,
                    f"{t['std_log_w']:.3g}",
                    number(t["ess"]),
                    number(t["acceptance"]),
                    number(t["reverse_ess"]),
                    number(t["M2"]),
                    ", ".join(f"{w:.2f}" for w in t["width"]) if "width" in t else "",
                    number(found.training_seconds(extent, "one-block", prior)),
                ]
            )
    heading = ["L", "prior", "std(log w)", "ESS", "acceptance", "reverse ESS", "M^2", "widths", "training [s]"]
    return markdown(heading, rows, 2)


def reached(curve, goal: float) -> float | None:
    """Seconds after which a curve stays below a goal."""
    seconds, values = curve
    late = [i for i, value in enumerate(values) if value > goal]
    start = late[-1] + 1 if late else 0
    return seconds[start] if start < len(seconds) else None


def table_convergence(found: Found) -> str:
    """Seconds to std(log w) of the Gaussian's trained flow, and to within a tenth of the prior's own end."""
    rows = []
    for extent in SIZES:
        goal = 1.1 * found.get(extent, "one-block")["trainings"]["gaussian"]["std_log_w"]
        for prior, (label, _) in PRIORS.items():
            training = found.get(extent, "one-block")["trainings"][prior]
            curve, name = found.curve(extent, "one-block", prior), f"L{extent:02d}-one-block"
            rows.append(
                [
                    str(extent),
                    label,
                    number(1e3 * found.unit(name, prior, "warm_up")),
                    number(1e3 * found.unit(name, prior, "training_step")),
                    f"{curve[1][0]:.3g}",
                    f"{training['std_log_w']:.3g}",
                    number(reached(curve, 1.1 * training["std_log_w"])),
                    number(reached(curve, goal)) if reached(curve, goal) is not None else "never",
                ]
            )
    heading = ["L", "prior", "chains' start [ms]", "step [ms]", "std(log w) first", "last", "s to own end"]
    return markdown([*heading, "s to the Gaussian's end"], rows, 2)


def table_nets(found: Found) -> str:
    """Every structure: its training, and what an independent sample costs through it, tuned."""
    rows = []
    for extent in SIZES[1:]:
        base = found.sampler(extent, "HMC")
        rows.append([str(extent), "HMC", *[""] * 4, f"{base['tau']:.3g}", taus(base, "M2")])
        rows[-1] += [number(base["forces"]), "1", number(1e3 * base["seconds"]), ""]
        for net, label in NETS.items():
            run = found.get(extent, net)
            for prior in [p for p in PRIORS if run and p in run["trainings"]]:
                training = run["trainings"][prior]
                record = found.best(extent, prior, net)
                row = [str(extent), label, prior, str(training["n_weights"]), f"{training['std_log_w']:.3g}"]
                seconds = found.training_seconds(extent, net, prior)
                row.append(number(seconds))
                if record is None:
                    errors = [s.get("error", "") for s in run["samplers"] if s["name"] == prior]
                    rows.append([*row, *(errors or [""]), *[""] * 5])
                    continue
                gain = base["seconds"] - record["seconds"]
                row += [f"{record['tau']:.3g}", taus(record, "M2"), number(record["forces"]), number(record["step"])]
                rows.append([*row, number(1e3 * record["seconds"]), number(seconds / gain) if gain > 0 else "never"])
    heading = ["L", "net", "prior", "weights", "std(log w)", "training [s]", "length", "tau_int M^2", "forces"]
    return markdown([*heading, "step / plain", "ms", "pays after"], rows, 3)


def table_effort(found: Found) -> str:
    """How the cost through the paper's block depends on the steps of training."""
    rows, efforts = [], ("steps30", "steps100", "steps300", "one-block")
    for extent in (16, 32):
        for prior in ("gaussian", "interleave", "upsample"):
            row = [str(extent), PRIORS[prior][0]]
            for net in efforts:
                record = found.sampler(extent, prior, net)
                seconds = found.training_seconds(extent, net, prior)
                row.append(f"{with_error(*forces(record))} ({number(seconds)} s)" if record else "-")
            rows.append(row)
    return markdown(["L", "prior", *(f"{n} steps" for n in (30, 100, 300, 1000))], rows, 2)


def table_spectrum(found: Found) -> str:
    """tau_int of Fourier modes times the forces of a trajectory: forces for half an independent sample."""
    rows = []
    for extent in SIZES[1:]:
        for name in ("HMC", *PRIORS):
            record = found.sampler(extent, name)
            if record is None or "spectrum" not in record:
                continue
            modes = {m["n"]: with_error(m["tau_int"], m["error"]) for m in record["spectrum"]}
            steps = f"{record['tau']:.3g}, {record['n_steps']}"
            rows.append([str(extent), name, steps, *(modes.get(n, "") for n in (0, 1, 2, 4, 8, 16, 32))])
    return markdown(["L", "sampler", "length, steps", *(f"n = {n}" for n in (0, 1, 2, 4, 8, 16, 32))], rows, 3)


def figure(width: float, columns: int):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(width, 3.8), dpi=120, layout="constrained")
    FigureCanvasAgg(drawn)
    axes = drawn.subplots(1, columns)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_yscale("log")
    return drawn, axes


def draw_scaling(found: Found):
    drawn, axes = figure(9, 2)
    known = [("HMC", "one-block", "HMC", "#555555", "-")]
    known += [(prior, "one-block", label, colour, "-") for prior, (label, colour) in PRIORS.items()]
    known += [(prior, "site1", f"site, {label}", colour, "--") for prior, (label, colour) in PRIORS.items()]
    for axis, ending, pick, title in (
        (axes[0], ", tau 1", magnetisation, "tau_int of M^2, length 1"),
        (axes[1], "", forces, "forces of an independent sample, tuned"),
    ):
        for name, net, label, colour, style in known:
            records = [(extent, found.sampler(extent, name + ending, net)) for extent in SIZES]
            records = [(extent, *pick(record)) for extent, record in records if record]
            if records:
                line = {"fmt": "o", "linestyle": style, "ms": 4, "lw": 1.4, "color": colour}
                axis.errorbar(*zip(*records, strict=True), **line, label=label)
        axis.set_xscale("log", base=2)
        axis.set_xticks(SIZES, map(str, SIZES))
        axis.set(xlabel="L", title=title)
    axes[1].legend(frameon=False, fontsize=7)
    return drawn


def draw_convergence(found: Found):
    drawn, axes = figure(10, 3)
    for axis, extent in zip(axes, SIZES[1:], strict=True):
        for prior, (title, colour) in PRIORS.items():
            axis.plot(*found.curve(extent, "one-block", prior), color=colour, lw=1.4, label=title)
            if found.get(extent, "ladder") and prior in found.get(extent, "ladder")["trainings"]:
                axis.plot(*found.curve(extent, "ladder", prior), color=colour, lw=1.4, ls="--")
        axis.set_xscale("log")
        axis.set(title=f"L = {extent}", xlabel="seconds of training, chains included")
    axes[0].set_ylabel("std(log w) of a batch")
    axes[0].legend(frameon=False, fontsize=8)
    return drawn


def draw_spectrum(found: Found):
    drawn, axes = figure(10, 3)
    for axis, extent in zip(axes, SIZES[1:], strict=True):
        for name, (title, colour) in ({"HMC": ("HMC", "#555555")} | PRIORS).items():
            record = found.sampler(extent, name)
            if record is None or "spectrum" not in record:
                continue
            scale = 2 * record["forces_per_trajectory"]
            modes = [(m["n"], scale * m["tau_int"], scale * m["error"]) for m in record["spectrum"]]
            axis.errorbar(*zip(*modes, strict=True), fmt="o-", ms=3, lw=1.2, color=colour, label=title)
        axis.set_xscale("symlog", linthresh=1)
        ticks = [n for n in (0, 1, 2, 4, 8, 16, 32) if n <= extent // 2]
        axis.set_xticks(ticks, map(str, ticks))
        axis.set(title=f"L = {extent}", xlabel="n of the modes (n, 0), (0, n)")
    axes[0].set_ylabel("forces of an independent sample")
    axes[0].legend(frameon=False, fontsize=8)
    return drawn


def draw_costs(found: Found):
    """Every net against HMC: forces saved, and seconds."""
    drawn, axes = figure(10, 3)
    multiscale = json.loads((CONFIGS.parents[1] / "docs" / "multiscale.json").read_text())["sizes"]
    for axis, extent in zip(axes, SIZES[1:], strict=True):
        base = found.sampler(extent, "HMC")
        for net in NETS:
            for prior, (_, colour) in PRIORS.items():
                record = found.best(extent, prior, net)
                if record:
                    gains = base["forces"] / record["forces"], base["seconds"] / record["seconds"]
                    axis.plot(*gains, "s" if net.startswith("site") else "o", ms=5, color=colour, alpha=0.8)
        size = next(size for size in multiscale if size["theory"]["shape"][0] == extent)
        records = {record["name"]: record for record in size["samplers"]}
        keys = ("cost_per_independent_sample_force_evaluations", "cost_per_independent_sample_s")
        for name, mark in (("multiscale", "k*"), ("Swendsen-Wang", "kD")):
            axis.plot(*(records["HMC"][key] / records[name][key] for key in keys), mark, ms=7)
        axis.axhline(1, color="#555555", lw=0.8)
        axis.set_xscale("log")
        axis.minorticks_off()
        for ticks, marks in ((axis.set_xticks, (0.5, 1, 2, 5, 10, 20, 50)), (axis.set_yticks, (0.02, 0.1, 0.5, 1, 5))):
            ticks(marks, [f"{mark:g}" for mark in marks])
        axis.set(title=f"L = {extent}", xlabel="HMC / sampler in forces")
    for label, colour in PRIORS.values():
        axes[0].plot([], [], "o", color=colour, label=label)
    for mark, label in (("o", "exp(-|s|)"), ("s", "site"), ("*", "multiscale"), ("D", "Swendsen-Wang")):
        axes[1].plot([], [], mark, color="#555555", label=label)
    for axis in axes[:2]:
        axis.legend(frameon=False, fontsize=7)
    axes[0].set_ylabel("HMC / sampler in seconds")
    return drawn


TABLES = {
    "priors": table_priors,
    "training": table_training,
    "convergence": table_convergence,
    "nets": table_nets,
    "effort": table_effort,
    "spectrum": table_spectrum,
    "details": table_details,
}
FIGURES = {
    "scaling": draw_scaling,
    "convergence": draw_convergence,
    "spectrum": draw_spectrum,
    "costs": draw_costs,
}


def draw(results: Path, docs: Path) -> None:
    """Write every table of study.md between its marks, and every figure."""
    found, page = Found(results), docs / "study.md"
    text = page.read_text()
    for name, table in TABLES.items():
        head, rest = text.split(f"<!-- {name} -->", 1)
        text = f"{head}<!-- {name} -->\n{table(found)}\n<!-- /{name} -->{rest.split(f'<!-- /{name} -->', 1)[1]}"
    page.write_text(text)
    (docs / "figures").mkdir(exist_ok=True)
    for name, make in FIGURES.items():
        make(found).savefig(docs / "figures" / f"study-{name}.png", facecolor="white")


def depth(path: Path) -> int:
    """How many runs have to be finished one after another before this one."""
    study = load(path)[1]
    before = {study.weights, *study.compose} - {""}
    return max((1 + depth(path.with_stem(name)) for name in before), default=0)


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=("run", "all", "units", "draw"))
    parser.add_argument("configs", type=Path, nargs="*", help="of `run`")
    parser.add_argument("--results", type=Path, required=True, help="directory of one JSON for each run")
    parser.add_argument("--docs", type=Path, help="of `draw`: directory whose study.md gets the tables")
    given = parser.parse_args(arguments)
    if given.command == "units":
        units(given.results)
    elif given.command == "draw":
        draw(given.results, given.docs)
    else:
        paths = given.configs
        if given.command == "all":
            paths = sorted(CONFIGS.glob("*.toml"), key=lambda path: (depth(path), path.stem))
            paths = [path for path in paths if not (given.results / f"{path.stem}.json").exists()]
        for path in paths:
            run(path, given.results)


if __name__ == "__main__":
    main()
