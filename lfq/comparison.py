"""The honest comparison: samplers of one theory, each tuned on its own, at equal budget, judged alike."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from . import analysis
from ._core import NotFiniteError
from ._kernels import check_count, check_seed
from .actions import Phi4, PulledBack, check_theory
from .flows import Flow
from .health import RunWarning, concerns
from .heat_bath import HeatBath
from .hmc import HMC, ClusterHMC, FourierHMC, Run, Sampler, State
from .priors import Gaussian, Prior
from .samplers import IndependenceMetropolis, Reweighting, Weighted, WeightedSampler, reverse_ess

__all__ = [
    "AGREEMENT",
    "COLLAPSED",
    "Comparison",
    "Contender",
    "DisagreementWarning",
    "FailureWarning",
    "JUDGED_TAU",
    "RELIABLE_TAU",
    "agreement",
    "chain_record",
    "compare",
    "completed",
    "pay_off",
]

RELIABLE_TAU = 1000
"""A run of fewer autocorrelation times than this, over all chains, is marked."""

SHORTEST_CHAIN = 10
"""So is one whose chains are shorter than this many autocorrelation times, however many they are."""

AGREEMENT = ("phi2", "nn", "abs_M", "phi2_smeared")
"""Observables in which samplers must agree, all at once: a chi-square of four degrees of freedom."""

MOST_SAMPLES = 10000
"""Of each chain: what the analysis of a run can hold."""

JUDGED_TAU = 100
"""A run of fewer autocorrelation times than this, over all chains, has no errors to be judged by."""

HEAVY_TAIL = 0.5
"""Weights with a tail index above this have no variance, and no error to be judged by."""

COLLAPSED = 0.1
"""Of a flow's ESS by its own fields: with a smaller reverse ESS it leaves out part of the theory's fields."""

IMPROBABLE = 1e-5
"""Probability of a chi-square below which a sampler is said to disagree: 4.4 sigma."""


class DisagreementWarning(UserWarning):
    """Samplers of one theory found different expectation values: at least one of them is wrong."""


class FailureWarning(UserWarning):
    """A sampler of a comparison ended in an error."""


@dataclass(frozen=True)
class Contender:
    """A sampler in a comparison, and what it took to make it.

    Attributes
    ----------
    sampler : Sampler or WeightedSampler
    training_seconds : float
        Spent on training its flow.
    tune : bool
        Whether the comparison tunes it: trajectory length and step size, say, to least cost (see its `tune_cost`).
    prior : Prior, optional
        Of the flow's latents, for the reverse ESS; the sampler's own by default, or unit normals.
    """

    sampler: Sampler | WeightedSampler
    training_seconds: float = 0.0
    tune: bool = True
    prior: Prior | None = None

    def __post_init__(self):
        if not isinstance(self.sampler, (Sampler, WeightedSampler)):
            raise TypeError(f"sampler: must be a sampler, got {type(self.sampler).__name__}")
        if not (isinstance(self.training_seconds, (int, float)) and self.training_seconds >= 0):
            raise ValueError(f"training_seconds: must not be negative, got {self.training_seconds!r}")

    @property
    def theory(self) -> Phi4:
        return self.sampler.theory._physical

    @property
    def flow(self) -> Flow | None:
        theory = self.sampler.theory
        return theory.flow if isinstance(theory, PulledBack) else getattr(self.sampler, "flow", None)

    @property
    def latents(self) -> Prior:
        """The prior of the flow's latents."""
        return self.prior or getattr(self.sampler, "prior", None) or Gaussian(self.theory.shape)


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes
    ----------
    results : dict
        ``samplers``: one record for each (see `chain_record`), in the order given, of one that failed only what it
        was and its ``error``; ``disagreeing``: names of those that do not agree with the others; ``unfinished``:
        names of those still to come, in what `compare` stores on its way; ``theory``, ``n_chains``, ``seconds``.
    runs : dict of str to Run or Weighted
        Of the samplers that did not fail.
    """

    results: dict[str, Any]
    runs: dict[str, Run | Weighted]

    def __str__(self) -> str:
        from .report import comparison_text

        return comparison_text(self.results)


def completed(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The records of the samplers that did not fail."""
    return [record for record in results["samplers"] if "error" not in record]


def _described(name: str, theory: Phi4) -> dict[str, Any]:
    return {"name": name, "L": theory.shape[0], "shape": theory.shape, "beta": theory.beta, "lam": theory.lam}


def _decay(series: np.ndarray, tau_int: float, thin: int) -> dict[str, list[float]]:
    """The autocorrelation function of a series until it has decayed, at a hundred lags or fewer."""
    longest = min(len(series) - 1, math.ceil(4 * tau_int))
    rho, error = analysis.autocorrelation(series, longest)
    lags = np.unique(np.linspace(0, longest, 100).round().astype(int))
    return {"lag": (thin * lags).tolist(), "rho": rho[lags].tolist(), "error": error[lags].tolist()}


def chain_record(name: str, run: Run, table: dict[str, analysis.Estimate] | None = None) -> dict[str, Any]:
    """A run of chains as plain data: observables with errors and tau_int, and costs.

    Parameters
    ----------
    name : str
    run : Run
    table : dict, optional
        From `analysis.summarize`.
    """
    table = analysis.summarize(run) if table is None else table
    cost = analysis.cost_per_independent_sample(run, table)
    slowest = table[cost.observable]
    record = _described(name, run.theory._physical) | {
        "acceptance": float(run.acceptance),
        "n_chains": run.n_chains,
        "n_samples": run.n_samples,
    }
    if isinstance(run.sampler, HMC):
        record |= {
            "n_steps": run.sampler.n_steps,
            "trajectory_length": run.sampler.tau,
            "integrator": run.sampler.integrator.name,
        }
    return record | {
        "exp_minus_dh": list(run.exp_minus_dh()),
        "observables": {
            key: {
                "value": entry.value,
                "error": entry.error,
                "tau_int": entry.tau_int * run.thin,
                "tau_int_error": entry.tau_int_error * run.thin,
            }
            for key, entry in table.items()
        },
        "autocorrelation": _decay(run.observables["M2"], table["M2"].tau_int, run.thin),
        "seconds_per_trajectory": run.seconds_per_trajectory,
        "force_evaluations_per_trajectory": run.force_evaluations_per_trajectory,
        "slowest_observable": cost.observable,
        "cost_per_independent_sample_s": cost.seconds,
        "cost_per_independent_sample_force_evaluations": cost.force_evaluations,
        "cost_relative_error": cost.relative_error,
        "n_tau_int": slowest.n_samples / slowest.tau_int,
        "long_enough": slowest.n_samples >= RELIABLE_TAU * slowest.tau_int
        and run.n_samples >= SHORTEST_CHAIN * slowest.tau_int,
    }


def pay_off(records: list[dict[str, Any]], trained: Callable[[dict[str, Any]], bool]) -> None:
    """Give every trained sampler's record ``samples_to_pay_off``; records must be of samplers that did not fail.

    How many independent samples it takes until the cheapest sampler without training would have cost as much
    as training and sampling; None where that never happens.
    """
    costs = [r["cost_per_independent_sample_s"] for r in records if not trained(r)]
    for record in filter(trained, records):
        gain = min(costs, default=-math.inf) - record["cost_per_independent_sample_s"]
        record["samples_to_pay_off"] = record["train_seconds"] / gain if gain > 0 else None


# ---- agreement ------------------------------------------------------------------------------


def _means(run: Run | Weighted) -> tuple[np.ndarray, np.ndarray]:
    """Means of `AGREEMENT` and their covariance."""
    if isinstance(run, Weighted):
        w, parts = run._weights(), []
        for name in AGREEMENT:
            parts.append(run._sums(run.observables[name] - run.mean(name)[0]) / w.sum())
        parts = np.array(parts)
        n = parts.shape[1]
        return np.array([run.mean(name)[0] for name in AGREEMENT]), parts @ parts.T * n / max(n - 1, 1)
    estimates = [analysis.estimate(run.observables[name]) for name in AGREEMENT]
    series = np.array([run.observables[name] for name in AGREEMENT])
    # Correlations between observables from means over blocks longer than they remember.
    length = math.ceil(min(20 * max(e.tau_int for e in estimates), max(1, series.shape[1] // 4)))
    n_blocks = max(1, series.shape[1] // length)
    blocks = series[:, : n_blocks * length].reshape(len(AGREEMENT), n_blocks, length, -1).mean(axis=2)
    correlation = np.corrcoef(blocks.reshape(len(AGREEMENT), -1))
    errors = np.array([e.error for e in estimates])
    return np.array([e.value for e in estimates]), correlation * np.outer(errors, errors)


def _average(found: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """The weighted mean and its covariance."""
    inverse = [np.linalg.pinv(cov, rcond=1e-10, hermitian=True) for _, cov in found]
    total = np.linalg.pinv(sum(inverse), rcond=1e-10, hermitian=True)
    return total @ sum(w @ mean for w, (mean, _) in zip(inverse, found, strict=True)), total


def _chi2(one, other) -> float:
    d = one[0] - other[0]
    return float(d @ np.linalg.pinv(one[1] + other[1], rcond=1e-10, hermitian=True) @ d)


def chi2_probability(chi2: float, degrees: int = len(AGREEMENT)) -> float:
    """Probability of a larger chi-square, for an even number of degrees of freedom."""
    half = chi2 / 2
    return math.exp(-half) * sum(half**j / math.factorial(j) for j in range(degrees // 2))


def agreement(runs: Mapping[str, Run | Weighted]) -> tuple[dict[str, float], list[str]]:
    """Which samplers agree.

    While a sampler is improbable against the weighted mean of the others, the one whose absence leaves the best
    agreement among the rest is set aside: one that is wrong and precise would otherwise make all others look bad. Of
    two that disagree both are named.

    Parameters
    ----------
    runs : mapping of str to Run or Weighted
        At least two.

    Returns
    -------
    chi2 : dict of str to float
        Against the mean of the others that agree, `AGREEMENT`'s four degrees of freedom.
    disagreeing : list of str
    """
    return _agreement({name: _means(run) for name, run in runs.items()})


def _agreement(found: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> tuple[dict[str, float], list[str]]:
    """The same from means and covariances."""

    def against_others(names) -> dict[str, float]:
        return {n: _chi2(found[n], _average([found[m] for m in names if m != n])) for n in names}

    good, bad = list(found), []
    while len(good) > 1:
        chi2 = against_others(good)
        if all(chi2_probability(value) > IMPROBABLE for value in chi2.values()):
            break
        if len(good) == 2:
            bad, good = [*bad, *good], []
            break
        rest = {n: sum(against_others([m for m in good if m != n]).values()) for n in good}
        worst = min(rest, key=rest.get)
        good.remove(worst)
        bad.append(worst)
    chi2 = {}
    for name in found:
        others = [m for m in (good or found) if m != name]
        chi2[name] = _chi2(found[name], _average([found[m] for m in others]))
    return chi2, [name for name in found if name in bad]


def _judged(record: dict[str, Any]) -> bool:
    """Whether the errors of a sampler can be relied on enough to hold it against others."""
    if "tail_index" in record:
        return record["n_tau_int"] >= JUDGED_TAU and record["tail_index"] < HEAVY_TAIL
    chain = record["n_tau_int"] / record["n_chains"]
    return record["n_tau_int"] >= JUDGED_TAU and chain >= SHORTEST_CHAIN


# ---- the comparison -------------------------------------------------------------------------


def _checked(theory: Phi4, name: str, sampler) -> Contender:
    contender = sampler if isinstance(sampler, Contender) else Contender(sampler)
    if contender.theory != theory:
        raise ValueError(f"samplers: {name} samples another theory, {contender.theory}")
    return contender


def _chains(
    sampler: Sampler, start: np.ndarray, seconds: float, n_warmup: int, seed: int, tell: Callable[[], None]
) -> Run:
    """Warm up, then sample for `seconds` of wall time, or until there are `MOST_SAMPLES` of each chain.

    `tell` is called after each block.
    """
    state = sampler.start(len(start), seed, phi=start)
    state = sampler.advance(state, 1, max(n_warmup, 1), measure=False).state
    tell()
    pilot = sampler.advance(state, 20)
    state, per_sample = pilot.state, pilot.seconds / 20
    size = max(1, min(round(min(0.25, seconds / 8) / per_sample), MOST_SAMPLES // 8))
    blocks, used, done = [], 0.0, 0
    while (used < seconds and done < MOST_SAMPLES) or done < 2 * analysis.MIN_SAMPLES:
        blocks.append(sampler.advance(state, size))
        state, used, done = blocks[-1].state, used + blocks[-1].seconds, done + size
        tell()
    return Run.from_blocks(sampler.theory, sampler, blocks)


def _weighted(sampler: WeightedSampler, seconds: float, seed: int) -> Weighted:
    """As many samples as `seconds` of wall time allow, in whole populations, bounded by memory."""
    unit = getattr(sampler, "population", 64)
    pilot = sampler.sample(4 * unit, seed)
    most = max(4, 2**25 // (unit * sampler.theory.volume))
    n = min(max(4, round(seconds / pilot.seconds * 4)), most)
    return sampler.sample(n * unit, seed)


def _sign(run: Run | Weighted) -> dict[str, Any]:
    """The mean of sign(M), zero by symmetry, and how long signs last."""
    if isinstance(run, Weighted):
        sign = np.sign(run.observables["M"])
        signed = replace(run, observables={"sign": sign, "phi2": run.observables["phi2"]})
        value, error = signed.mean("sign")
        return {"sign": value, "sign_error": error, "sign_tau_int": None, "sign_changes": None}
    sign = np.sign(run.observables["M"])
    found = analysis.estimate(sign)
    changes = float((sign[1:] != sign[:-1]).mean()) / run.thin
    return {
        "sign": found.value,
        "sign_error": found.error,
        "sign_tau_int": found.tau_int * run.thin,
        "sign_changes": changes,
    }


def _weighted_record(name: str, run: Weighted) -> dict[str, Any]:
    n, observables = run.n_effective, {}
    for key in ("M", "abs_M", "M2", "phi2", "phi2_smeared", "phi4", "nn", "action_density", "chi", "G_pmin"):
        value, error = run.mean(key)
        observables[key] = {"value": value, "error": error, "tau_int": None, "tau_int_error": None}
    return _described(name, run.theory) | {
        "acceptance": None,
        "n_samples": run.n_samples,
        "observables": observables,
        "ess": run.ess,
        "log_z": [run.log_z, run.log_z_error],
        "cost_per_independent_sample_s": run.seconds / n,
        "cost_per_independent_sample_force_evaluations": run.force_evaluations / n,
        "cost_relative_error": math.sqrt(2 / max(n, 2)),
        "n_tau_int": 2 * n,
        "tail_index": run.tail_index,
        "long_enough": 2 * n >= RELIABLE_TAU and run.tail_index < HEAVY_TAIL,
    }


def _settings(sampler: Sampler | WeightedSampler) -> str:
    if isinstance(sampler, HMC):
        text = f"tau = {sampler.tau:.3g}, {sampler.n_steps} steps"
        if sampler.length_spread:
            text += f", spread {sampler.length_spread:g}"
        if isinstance(sampler, ClusterHMC):
            text += f", {sampler.n_updates} per trajectory"
        return text + (f", mass {sampler.mass:g}" if isinstance(sampler, FourierHMC) else "")
    if isinstance(sampler, HeatBath):
        text = f"{sampler.n_sweeps} per trajectory"
        return text if sampler.cluster is None else f"{text}, then {sampler.n_updates} of clusters"
    if isinstance(sampler, (IndependenceMetropolis, Reweighting)):
        return f"{sampler.flow.n_weights} weights"
    text = f"{sampler.n_temperatures} temperatures, tau = {sampler.tau:.3g}, {sampler.n_steps} steps"
    return text + (f", resampled below {sampler.resample:g}" if sampler.resample else "")


def _decorrelated(sampler: Sampler, state: State, n: int = 512) -> np.ndarray:
    """At least n fields, those of a chain 10 trajectories apart."""
    fields = []
    while sum(map(len, fields)) < n:
        block = sampler.advance(state, 1, 10, measure=False)
        state = block.state
        fields.append(block.phi)
    return np.concatenate(fields)


class _Bench:
    """One theory, one budget: where chains start, and how a contender is run and recorded."""

    def __init__(self, theory: Phi4, seconds, n_chains, n_warmup, acceptance, seed, report):
        self.theory, self.seconds, self.n_chains, self.n_warmup = theory, seconds, n_chains, n_warmup
        self.acceptance, self.seed, self.report = acceptance, seed, report
        self.trusted = ClusterHMC(theory).tune(0.8, n_chains, seed)
        self.fields = self.trusted.advance(self.trusted.start(n_chains, seed), 1, 200, measure=False).phi
        # Fields of the theory that flows must cover.
        self.reference = cache(lambda: _decorrelated(self.trusted, State(self.fields, 200, seed)))

    def run(self, name: str, contender: Contender) -> tuple[Run | Weighted, dict[str, Any]]:
        """Tune, sample and analyse."""
        sampler, begin = contender.sampler, time.perf_counter()
        self.report(name, 0, 3, "tuning")
        if contender.tune and isinstance(sampler, Sampler):
            sampler = sampler.tune_cost(acceptance=self.acceptance, n_chains=self.n_chains, seed=self.seed)
        tuning = time.perf_counter() - begin

        def tell() -> None:
            self.report(name, 1, 3, _settings(sampler))

        tell()
        if isinstance(sampler, WeightedSampler):
            run = _weighted(sampler, self.seconds, self.seed)
            record = _weighted_record(name, run) | {"concerns": []}
        else:
            run = _chains(sampler, self.fields, self.seconds, self.n_warmup, self.seed, tell)
            record = chain_record(name, run) | {"concerns": concerns(run)}
        self.report(name, 2, 3, "analysis")
        cost = record["cost_per_independent_sample_s"]
        record |= {
            "settings": _settings(sampler),
            "tuning_seconds": tuning,
            "prior": None,
            "train_seconds": contender.training_seconds,
            "n_effective_per_second": 1 / cost,
            "n_effective_per_second_with_training": run.seconds / cost / (run.seconds + contender.training_seconds),
            "judged": _judged(record),
        }
        if record["judged"]:
            mean, covariance = _means(run)
            record["means"] = {"of": AGREEMENT, "value": mean.tolist(), "covariance": covariance.tolist()}
        record |= _sign(run)
        if contender.flow is not None:
            record |= self._coverage(contender.flow, contender.latents)
        return run, record

    def _coverage(self, flow: Flow, prior: Prior) -> dict[str, float | None]:
        """ESS of the flow's fields by their own weights, and by the weights of the theory's fields."""
        phi = self.reference()
        try:
            own = Reweighting(self.theory, flow, prior).sample(len(phi), self.seed).ess
        except NotFiniteError:
            own = None
        return {"flow_ess": own, "reverse_ess": reverse_ess(flow, prior, self.theory, phi)}


def compare(
    theory: Phi4,
    samplers: Mapping[str, Sampler | WeightedSampler | Contender | Callable[[], Contender]],
    seconds: float = 20.0,
    n_chains: int = 64,
    n_warmup: int = 200,
    acceptance: float = 0.8,
    seed: int = 1,
    progress: Callable[[str, int, int, str], None] | None = None,
    finished: Iterable[dict[str, Any]] = (),
    store: Callable[[dict[str, Any]], None] | None = None,
) -> Comparison:
    """Compare samplers of one theory at equal budget, each tuned on its own.

    Every chain sampler is tuned to least cost, starts from the same fields of a tuned HMC with Swendsen-Wang clusters,
    is warmed up and runs for `seconds` of wall time (to `MOST_SAMPLES` of each chain at most); weighted samplers draw
    for as long. The cost of an independent
    sample is 2 tau_int trajectories of the slowest of `analysis.SLOW_OBSERVABLES`, timed without measurements
    (weighted samples: seconds over the effective number of samples). Chains are then held against each other.

    Parameters
    ----------
    theory : Phi4
    samplers : mapping of str to Sampler, WeightedSampler, Contender or callable
        By name; with training time as a `Contender`. What is called, when its turn comes, returns one of these.
    seconds : float
        Of sampling, for each.
    n_chains, n_warmup : int
        Chains side by side, trajectories before the first sample.
    acceptance : float
        Aim of the step size at each trajectory length that is tried.
    seed : int
    progress : callable, optional
        Called as progress(name, done, total, remark), with total = 3 stages: tuning, sampling, analysis; also after
        each block of samples. A KeyboardInterrupt that it raises stops the comparison, after a call of `store`.
    finished : iterable of dict
        Records of an earlier, interrupted comparison with the same arguments: those samplers are not run again.
    store : callable, optional
        Called as store(results) after each sampler, with `Comparison.results` as far as they go.

    Returns
    -------
    Comparison

    Raises
    ------
    TypeError, ValueError
        Bad arguments, before any work.

    Warns
    -----
    FailureWarning
        A sampler ended in an error, a divergence say; the others are compared without it.
    DisagreementWarning
        Some samplers' expectation values do not agree; names them.
    RunWarning
        What `lfq.health.concerns` finds in the chains of a sampler.
    """
    check_theory(theory)
    if not isinstance(samplers, Mapping) or not samplers:
        raise TypeError("samplers: must map names to samplers, at least one")
    for name, sampler in samplers.items():
        if not callable(sampler):
            _checked(theory, name, sampler)
    if not (isinstance(seconds, (int, float)) and math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"seconds: must be positive, got {seconds!r}")
    n_chains, n_warmup = check_count(n_chains, "n_chains", 2, 2**20), check_count(n_warmup, "n_warmup")
    if not 0 < acceptance < 1:
        raise ValueError(f"acceptance: must lie between 0 and 1, got {acceptance}")
    check_seed(seed)
    records = {record["name"]: record for record in finished}
    unknown = [name for name in records if name not in samplers]
    if unknown:
        raise ValueError(f"finished: {unknown[0]} is none of the samplers")
    report = progress or (lambda *_: None)
    bench = cache(lambda: _Bench(theory, seconds, n_chains, n_warmup, acceptance, seed, report))
    budget = {"n_chains": n_chains, "seconds": seconds}

    def results() -> dict[str, Any]:
        done = [records[name] for name in samplers if name in records]
        disagreeing = judge([record for record in done if "error" not in record])
        unfinished = [name for name in samplers if name not in records]
        found = {"theory": {"shape": theory.shape, "beta": theory.beta, "lam": theory.lam}} | budget
        return found | {"samplers": done, "disagreeing": disagreeing, "unfinished": unfinished}

    runs = {}
    try:
        for name, sampler in samplers.items():
            if name in records:
                report(name, 3, 3, records[name].get("settings", ""))
                continue
            try:
                contender = _checked(theory, name, sampler() if callable(sampler) else sampler)
                runs[name], records[name] = bench().run(name, contender)
            except Exception as error:
                # Whatever it is, the other samplers can still be compared.
                told = f"{type(error).__name__}: {' '.join(str(error).split())}"
                records[name] = _described(name, theory) | {"error": told, "judged": False, "long_enough": False}
                warnings.warn(f"{name} failed: {told}", FailureWarning, stacklevel=2)
            if store:
                store(results())
            report(name, 3, 3, records[name].get("settings", "failed"))
    except KeyboardInterrupt:
        if store:
            store(results())
        raise
    found = results()
    for record in found["samplers"]:
        for concern in record.get("concerns", ()):
            warnings.warn(f"{record['name']}: {concern}", RunWarning, stacklevel=2)
    if found["disagreeing"]:
        bad = found["disagreeing"]
        warnings.warn(
            f"{' and '.join(bad)} {'disagree' if len(bad) > 1 else 'disagrees'} with the other samplers of {theory}",
            DisagreementWarning,
            stacklevel=2,
        )
    return Comparison(found, runs)


def judge(records: list[dict[str, Any]]) -> list[str]:
    """Give the records what depends on the other samplers; returns the names of those that disagree."""
    pay_off(records, lambda record: record["train_seconds"] > 0)
    judged = {record["name"]: record["means"] for record in records if record["judged"]}
    means = {name: (np.array(found["value"]), np.array(found["covariance"])) for name, found in judged.items()}
    chi2, disagreeing = _agreement(means) if len(means) > 1 else ({}, [])
    for record in records:
        record["chi2"] = chi2.get(record["name"])
        record["agrees"] = record["name"] not in disagreeing
    return disagreeing
