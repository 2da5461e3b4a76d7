"""The pipelines of `lfq run` and `lfq compare`: train a flow from every prior, then sample and compare.

Every stage stores its result as it completes, and a run that was interrupted continues with the same
random numbers: the outcome is that of an uninterrupted one, bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import lfq

from ._optional import load
from .comparison import Contender, chain_record, compare, pay_off
from .config import (
    ComparisonConfig,
    Config,
    ConfigError,
    PriorConfig,
    SamplerConfig,
    SamplingConfig,
    load_config,
    parse_config,
)
from .hmc import HMC, Block, Run, State
from .io import FileFormatError, RunFile, load_tensors, save_tensors, write_atomically
from .observables import OBSERVABLES
from .plots import COMPARISON_FIGURES

__all__ = [
    "ExperimentError",
    "Training",
    "collect",
    "run_comparison",
    "run_experiment",
    "sample",
    "stage_seed",
    "train",
]

Progress = Callable[[str, int, int, str], None]
"""Called with the name of a stage, steps done, steps in all, and a remark."""

PACKAGES = {"pyerrors": "error analysis", "matplotlib": "drawing figures", "h5py": "a run file"}
"""Optional packages that a run needs, and what for."""


class ExperimentError(RuntimeError):
    """A run that cannot start or continue; the message says why in one line."""


@dataclass(frozen=True)
class Training:
    """A trained flow, how good it is, and what training it took.

    Attributes
    ----------
    name : str
        Of the prior.
    theory : lfq.Phi4
        The target.
    flow : lfq.AffineFlow
    ess, acceptance, std_log_w : float
        From fresh samples.
    seconds : float
        Wall time of training, the chains of the prior included.
    history : dict of str to ndarray, shape (n_steps,)
    fields : dict of str to ndarray
        One example each: ``coarse`` (where the prior has a coarser lattice), ``prior`` and ``flow``.
    """

    name: str
    theory: lfq.Phi4
    flow: lfq.AffineFlow
    ess: float
    acceptance: float
    std_log_w: float
    seconds: float
    history: dict[str, np.ndarray]
    fields: dict[str, np.ndarray]

    def save(self, path: str | os.PathLike) -> None:
        """Write all but the flow, which has a file of its own."""
        tensors = {f"history/{name}": np.asarray(series, np.float64) for name, series in self.history.items()}
        tensors |= {f"fields/{name}": np.asarray(phi, np.float64) for name, phi in self.fields.items()}
        scalars = {
            "beta": self.theory.beta,
            "lam": self.theory.lam,
            "shape": list(self.theory.shape),
            "ess": self.ess,
            "acceptance": self.acceptance,
            "std_log_w": self.std_log_w,
            "seconds": self.seconds,
        }
        save_tensors(path, tensors, {"training": json.dumps(scalars)})

    @classmethod
    def load(cls, path: str | os.PathLike, name: str, flow: lfq.AffineFlow) -> Training:
        """Read what `save` wrote.

        Raises
        ------
        FileFormatError
            The file is not a training record.
        """
        tensors, texts = load_tensors(path)
        groups: dict[str, dict[str, np.ndarray]] = {"history": {}, "fields": {}}
        try:
            for key, tensor in tensors.items():
                group, entry = key.split("/")
                groups[group][entry] = tensor
            scalars = json.loads(texts["training"])
            theory = lfq.Phi4(tuple(scalars.pop("shape")), scalars.pop("beta"), scalars.pop("lam"))
            return cls(name=name, theory=theory, flow=flow, **groups, **scalars)
        except (KeyError, TypeError, ValueError) as error:
            raise FileFormatError(f"{path}: not a training record ({error})") from None


def stage_seed(seed: int, stage: str) -> int:
    """Seed of a stage, below 2^63: depends on the run's seed and the stage's name, not on other stages."""
    digest = hashlib.blake2b(f"{seed}/{stage}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextmanager
def _section(name: str) -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ConfigError(name, "", str(error)) from None


def target_theory(config: Config) -> lfq.Phi4:
    """The theory of ``[target]``."""
    with _section("target"):
        return lfq.Phi4(config.target.shape, beta=config.target.beta, lam=config.target.lam)


def initial_flow(config: Config) -> lfq.AffineFlow:
    """The untrained flow of ``[flow]``."""
    keys = vars(config.flow)
    with _section("flow"):
        seed = stage_seed(config.run.seed, "weights")
        return lfq.AffineFlow(**keys, seed=seed, ndim=len(config.target.shape))


def make_prior(config: Config, prior: PriorConfig):
    """The prior of one ``[[prior]]``."""
    target, chain = target_theory(config), vars(config.prior_chains)
    with _section(f"prior {config.prior.index(prior) + 1}"):
        if prior.kind == "gaussian":
            return lfq.Gaussian(target.shape)
        if prior.kind == "lattice":
            return lfq.Lattice(replace(target, beta=prior.beta), **chain)
        coarse = lfq.Phi4(tuple(extent // 2 for extent in target.shape), beta=prior.beta, lam=target.lam)
        if prior.kind == "interleave":
            return lfq.Interleave(coarse, **chain)
        return lfq.Upsample(coarse, width=prior.width, scale=prior.scale, **chain)


def make_hmc(config: Config, theory, name: str = "hmc") -> HMC:
    """HMC of a theory or its pullback with the settings of ``[sampling]``, not tuned yet."""
    with _section("sampling"):
        return HMC(
            theory,
            tau=config.sampling.long_tau if name == "hmc_long" else config.sampling.tau,
            integrator=config.sampling.integrator,
            dtype=config.run.dtype,
            n_threads=config.run.threads or None,
        )


def _check_buildable(config: Config) -> None:
    """Construct everything once, so that what only lfq itself can judge fails before any work."""
    if config.sampler or config.comparison:
        raise ConfigError("sampler" if config.sampler else "comparison", "", "is for `lfq compare`, not `lfq run`")
    theory = target_theory(config)
    make_hmc(config, theory)
    if config.prior or config.ladder:
        flow = initial_flow(config)
        with _section("flow"):
            theory.pullback(flow)
    for prior in config.prior:
        make_prior(config, prior)


def sampler_names(config: Config) -> dict[str, str | None]:
    """Names of the samplers' groups in ``run.h5``, and the prior of each: None for plain HMC."""
    priors = [prior.name for prior in config.prior] + (["ladder"] if config.ladder else [])
    plain = ["hmc", "hmc_long"] if config.sampling.long_tau else ["hmc"]
    return dict.fromkeys(plain) | {f"flow_hmc_{prior}": prior for prior in priors}


def _new_directory(config: Config, out: Path) -> RunFile:
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            if (out / "run.h5").exists():
                raise ExperimentError(f"{out} already holds a run: --resume continues it, --out takes another place")
            raise ExperimentError(f"{out} is not empty: --out takes another place")
        names = sampler_names(config)
        n_samples, n_chains = config.sampling.n_samples, config.sampling.n_chains
        needed = len(names) * n_samples * n_chains * 8 * (len(OBSERVABLES) + 2)
        free = shutil.disk_usage(out).free
        if needed > free:
            raise ExperimentError(f"{out}: run.h5 needs {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB are free")
        return RunFile.create(
            out / "run.h5",
            list(names),
            n_samples=n_samples,
            n_chains=n_chains,
            volume=math.prod(config.target.shape),
            attributes={
                "config": config.to_toml(),
                "versions": json.dumps(versions()),
                "seed": config.run.seed,
            },
        )
    except OSError as error:
        raise ExperimentError(f"cannot write to {out}: {error.strerror or error}") from None


def _old_directory(config: Config | None, out: Path) -> tuple[Config, RunFile]:
    if not (out / "run.h5").is_file():
        raise ExperimentError(f"{out} holds no run to resume")
    file = RunFile(out / "run.h5")
    stored = parse_config(str(file.attributes["config"]))
    if config is None:
        return stored, file
    _check_same(stored, config, out)
    return config, file


def _check_same(stored: Config, config: Config, out: Path) -> None:
    changed = stored.differences(config)
    if changed:
        raise ExperimentError(f"{out} was started with another configuration: {', '.join(changed)}")


def versions() -> dict[str, str]:
    """Versions of Python and of every package that takes part."""
    found = {"lfq": lfq.__version__, "python": platform.python_version()}
    for package in ("numpy", "numba", "h5py", "pyerrors", "matplotlib"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def machine(n_threads: int = 0) -> dict[str, str]:
    """What the timings of a run depend on."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        model = names[0] if names else model
    except OSError:
        pass
    info = lfq.info()
    return {
        "processor": model,
        "threads": str(n_threads or info["threads"]),
        "instruction set": str(info["isa"]),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _example_fields(fit, seed: int) -> dict[str, np.ndarray]:
    z = np.asarray(fit.prior.sample(1, seed))
    phi, _ = fit.flow.forward(z)
    fields = {"prior": z[0], "flow": np.asarray(phi)[0]}
    if isinstance(fit.prior, (lfq.Interleave, lfq.Upsample)):
        even = z[0][(slice(None, None, 2),) * (z.ndim - 1)]
        fields["coarse"] = even / fit.prior.scale if isinstance(fit.prior, lfq.Upsample) else even
    return fields


def _record(fit, name: str, theory: lfq.Phi4, out: Path, seed: int) -> Training:
    training = Training(
        name=name,
        theory=theory,
        flow=fit.flow,
        ess=float(fit.ess),
        acceptance=float(fit.acceptance),
        std_log_w=float(fit.std_log_w),
        seconds=float(fit.seconds),
        history=fit.history,
        fields=_example_fields(fit, stage_seed(seed, f"example {name}")),
    )
    # The record comes last: where it exists, the flow is complete.
    training.flow.save(out / "flows" / f"{name}.safetensors")
    training.save(out / "training" / f"{name}.safetensors")
    return training


def _recorded(name: str, out: Path) -> Training | None:
    path = out / "training" / f"{name}.safetensors"
    if not path.exists():
        return None
    return Training.load(path, name, lfq.load_flow(out / "flows" / f"{name}.safetensors"))


def _training_keywords(config: Config, stage: str, progress: Progress) -> dict[str, Any]:
    def report(step: int, n_steps: int, loss: float, ess: float) -> None:
        progress(stage, step, n_steps, f"loss {loss:.2f}, ESS {ess:.2f}")

    return {
        **vars(config.training),
        "seed": stage_seed(config.run.seed, stage),
        "dtype": config.run.dtype,
        "n_threads": config.run.threads or None,
        "progress": report,
    }


def train(config: Config, prior: PriorConfig, out: Path, progress: Progress) -> Training:
    """Train a flow from one prior, or read the record of an earlier training in `out`."""
    stage = f"train {prior.name}"
    done = _recorded(prior.name, out)
    if done is None:
        target = target_theory(config)
        fit = lfq.train(
            initial_flow(config),
            prior=make_prior(config, prior),
            target=target,
            **_training_keywords(config, stage, progress),
        )
        done = _record(fit, prior.name, target, out, config.run.seed)
    progress(stage, config.training.n_steps, config.training.n_steps, f"ESS {done.ess:.2f}")
    return done


def train_ladder(config: Config, out: Path, progress: Progress) -> list[Training]:
    """Train the levels of ``[ladder]``, or read the records in `out`; the last one is the target's."""
    theories = [
        lfq.Phi4(shape, beta=beta, lam=config.target.lam)
        for shape, beta in zip(config.ladder.shapes, config.ladder.betas, strict=True)
    ]
    names = [f"ladder-{'x'.join(map(str, theory.shape))}" for theory in theories[1:]]
    done = [_recorded(name, out) for name in names]
    if None in done:
        fits = lfq.train_ladder(
            initial_flow(config),
            theories,
            prior=config.ladder.prior,
            chain=vars(config.prior_chains),
            **_training_keywords(config, "train ladder", progress),
        )
        done = [
            _record(fit, name, theory, out, config.run.seed)
            for fit, name, theory in zip(fits, names, theories[1:], strict=True)
        ]
    progress("train ladder", config.training.n_steps, config.training.n_steps, f"ESS {done[-1].ess:.2f}")
    return done


def sample(config: Config, file: RunFile, name: str, theory, progress: Progress) -> Run:
    """Tune, warm up and sample, streaming into `file`; continues after the last complete block there.

    Parameters
    ----------
    config : Config
    file : RunFile
    name : str
        Of the sampler's group.
    theory : lfq.Phi4 or its pullback by a flow
    progress : callable
    """
    settings, stage = config.sampling, name.replace("_", " ")
    hmc = make_hmc(config, theory, name)
    status = file.progress(name)
    if status["n_steps"] == 0:
        progress(stage, 0, settings.n_samples, "tuning")
        hmc = hmc.tune(
            acceptance=settings.acceptance,
            n_chains=settings.n_chains,
            seed=stage_seed(config.run.seed, f"tune {name}"),
        )
        file.record_tuning(name, hmc.n_steps)
    else:
        hmc = replace(hmc, n_steps=status["n_steps"])

    if status["n_complete"] < 0:
        progress(stage, 0, settings.n_samples, "warming up")
        # Fields of the target: what a poor flow makes of normal latents can be far from any of them.
        plain = replace(make_hmc(config, target_theory(config)), n_steps=file.progress("hmc")["n_steps"])
        start = plain.start(settings.n_chains, stage_seed(config.run.seed, f"warm up {name}"))
        start = _advanced(plain, start, settings)
        state = hmc.start(settings.n_chains, stage_seed(config.run.seed, f"sample {name}"), phi=start.latent)
        state = _advanced(hmc, state, settings)
        file.record_start(name, state.latent, state.trajectory, state.seed)
    state, done = _stored_state(config, file, name), file.progress(name)["n_complete"]
    progress(stage, done, settings.n_samples, f"{hmc.n_steps} steps")
    for block in hmc.blocks(state, settings.n_samples - done, block_size=settings.block_size):
        file.append(name, block)
        done += len(block.dh)
        remark = f"{hmc.n_steps} steps, acceptance {block.accepted.mean():.2f}"
        progress(stage, done, settings.n_samples, remark)
    state = _stored_state(config, file, name)
    phi = theory.field(state.latent) if isinstance(theory, lfq.PulledBack) else state.latent
    return Run.from_blocks(theory, hmc, [Block(**file.samples(name), state=state, phi=phi)])


def _advanced(hmc: HMC, state: State, settings: SamplingConfig) -> State:
    """The state after the warm-up."""
    for block in hmc.blocks(state, settings.n_warmup, block_size=settings.block_size):
        state = block.state
    return state


def _stored_state(config: Config, file: RunFile, name: str) -> State:
    latent, status = file.latent(name), file.progress(name)
    latent = latent.reshape(config.sampling.n_chains, *config.target.shape).astype(config.run.dtype)
    return State(latent=latent, trajectory=status["trajectory"], seed=status["seed"])


def finite(value: Any) -> Any:
    """The value with NaN and infinities, which JSON lacks, as None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value


def _level(config: Config, training: Training) -> dict[str, Any]:
    return {
        "L": training.theory.shape[0],
        "shape": training.theory.shape,
        "beta": training.theory.beta,
        "lam": training.theory.lam,
        "prior": training.name,
        "ess": training.ess,
        "acceptance": training.acceptance,
        "std_log_w": training.std_log_w,
        "train_seconds": training.seconds,
        "steps": config.training.n_steps,
        "batch_size": config.training.batch_size,
    }


def _sampler_label(config: Config, tau: float) -> str:
    return "HMC" if tau == config.sampling.tau else f"HMC, tau = {tau:g}"


def _sampler(config: Config, run: Run, prior: str | None) -> dict[str, Any]:
    name = _sampler_label(config, run.sampler.tau) if prior is None else "flow-HMC"
    return {"name": name, "prior": prior} | chain_record(name, run)


def collect(config: Config, trainings: list[Training], runs: dict[str, Run]) -> dict[str, Any]:
    """Everything that was found, as plain data for ``results.json``.

    Parameters
    ----------
    config : Config
    trainings : list of Training
    runs : dict of str to lfq.Run
        By group name, as `sampler_names`.

    Returns
    -------
    dict
        ``version``, ``config``, ``levels`` (one per training), ``samplers``, ``versions``, ``machine``.
        A sampler with a flow also has ``ess``, ``train_seconds`` and ``samples_to_pay_off``: how many
        independent samples it takes until plain HMC, the cheaper one where there are two, would have
        cost as much as training and flow-HMC; None where that never happens.
    """
    samplers = [_sampler(config, runs[name], prior) for name, prior in sampler_names(config).items()]
    for sampler in samplers:
        if sampler["prior"] is None:
            continue
        levels = [t for t in trainings if t.name == sampler["prior"]]
        levels = levels or [t for t in trainings if t.name.startswith("ladder-")]
        sampler["ess"] = levels[-1].ess
        sampler["train_seconds"] = sum(training.seconds for training in levels)
    pay_off(samplers, lambda sampler: sampler["prior"] is not None)
    return finite(
        {
            "version": lfq.__version__,
            "config": config.to_dict(),
            "levels": [_level(config, training) for training in trainings],
            "samplers": samplers,
            "versions": versions(),
            "machine": machine(config.run.threads),
        }
    )


def run_experiment(
    config: Config | None, out: str | os.PathLike, *, resume: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Train, sample, and leave results, figures and a report in a directory.

    Parameters
    ----------
    config : Config or None
        None with `resume` takes the stored one.
    out : path-like
        A new or empty directory, or with `resume` that of an interrupted run.
    resume : bool
        Skip what is finished and continue after the last complete block.
    progress : callable, optional
        Called as ``progress(stage, done, total, remark)``.

    Returns
    -------
    dict
        What ``results.json`` holds, as `collect` says.

    Raises
    ------
    ConfigError
        The configuration cannot be run.
    ExperimentError
        The directory is in use, not writable, or was started with another configuration.
    FileFormatError
        A file of the run to resume is damaged.
    ImportError
        An optional package is missing.
    """
    from . import plots, report

    progress = progress or (lambda *_: None)
    out = Path(out)
    if config is None and not resume:
        raise TypeError("run_experiment: a new run needs a configuration")
    if config is not None:
        _check_buildable(config)
    for package, purpose in PACKAGES.items():
        load(package, purpose)
    if resume:
        config, file = _old_directory(config, out)
        _check_buildable(config)
    else:
        file = _new_directory(config, out)
    with file:
        for folder in ("flows", "training"):
            (out / folder).mkdir(exist_ok=True)
        with write_atomically(out / "config.toml") as stream:
            stream.write(config.to_toml().encode())
        trainings = [train(config, prior, out, progress) for prior in config.prior]
        if config.ladder:
            trainings += train_ladder(config, out, progress)
        flows = {training.name: training.flow for training in trainings}
        if config.ladder:
            flows["ladder"] = trainings[-1].flow
        target, runs = target_theory(config), {}
        for name, prior in sampler_names(config).items():
            theory = target if prior is None else target.pullback(flows[prior])
            runs[name] = sample(config, file, name, theory, progress)

    progress("figures and report", 0, 1, "")
    results = collect(config, trainings, runs)
    with write_atomically(out / "results.json") as stream:
        stream.write(json.dumps(results, indent=1, allow_nan=False).encode())
    figures = plots.write_figures(out, results, trainings, runs["hmc"].phi[0])
    with write_atomically(out / "report.html") as stream:
        stream.write(report.html_report(results, config, figures).encode())
    progress("figures and report", 1, 1, "")
    return results


# ---- lfq compare ----------------------------------------------------------------------------

DEFAULT_SAMPLERS = tuple(
    SamplerConfig(kind=kind, name=kind, length_spread=spread)
    for kind, spread in (("hmc", 0.2), ("swendsen-wang", 0.0), ("wolff", 0.0))
)
"""Samplers of a comparison whose configuration names none; flow-HMC with every trained flow joins them."""


def _contender(config: Config, sampler: SamplerConfig, out: Path, progress: Progress) -> Contender:
    """The sampler of one ``[[sampler]]``, its flow trained, or read from `out`."""
    theory, training, prior = target_theory(config), None, None
    if sampler.prior is not None:
        chosen = next(p for p in config.prior if p.name == sampler.prior)
        training, prior = train(config, chosen, out, progress), make_prior(config, chosen)
    common = {"dtype": config.run.dtype, "n_threads": config.run.threads or None}
    moves = {"tau": sampler.tau, "integrator": sampler.integrator, "length_spread": sampler.length_spread}
    makers = {
        "hmc": lambda: HMC(theory, **moves, **common),
        "swendsen-wang": lambda: lfq.ClusterHMC(theory, n_updates=sampler.n_updates, **moves, **common),
        "wolff": lambda: lfq.ClusterHMC(theory, cluster="wolff", n_updates=sampler.n_updates, **moves, **common),
        "fourier": lambda: lfq.FourierHMC(theory, **moves, **common),
        "heat-bath": lambda: lfq.HeatBath(theory, cluster=sampler.cluster, n_updates=sampler.n_updates, **common),
        "flow-hmc": lambda: HMC(theory.pullback(training.flow), **moves, **common),
        "independence": lambda: lfq.IndependenceMetropolis(theory, training.flow, prior, **common),
        "reweighting": lambda: lfq.Reweighting(theory, training.flow, prior, **common),
        "annealing": lambda: lfq.Annealing(
            theory,
            training and training.flow,
            prior,
            sampler.n_temperatures,
            tau=sampler.tau,
            resample=sampler.resample,
            **common,
        ),
    }
    with _section(f"sampler {sampler.name}"):
        made = makers[sampler.kind]()
        if isinstance(made, HMC) and not sampler.tune:
            comparison = config.comparison or ComparisonConfig()
            made = made.tune(comparison.acceptance, comparison.n_chains, stage_seed(config.run.seed, "tune"))
        return Contender(made, training.seconds if training else 0.0, sampler.tune, prior)


def _comparison_directory(config: Config | None, out: Path, resume: bool, overwrite: bool) -> tuple[Config, list]:
    """The configuration, and the records of samplers that an interrupted comparison in `out` has finished."""
    if resume and overwrite:
        raise ExperimentError("resume keeps what overwrite would replace: choose one")
    stored = out / "config.toml"
    holds_one = stored.is_file() and (out / "training").is_dir() and not (out / "run.h5").exists()
    if resume:
        if not holds_one:
            raise ExperimentError(f"{out} holds no comparison to resume")
        kept = load_config(stored)
        if config is not None:
            _check_same(kept, config, out)
        if not (out / "results.json").exists():
            return config or kept, []
        try:
            records = json.loads((out / "results.json").read_text(encoding="utf-8"))["samplers"]
            # What failed is tried again.
            return config or kept, [record for record in records if "error" not in record]
        except (KeyError, TypeError, ValueError) as error:
            raise FileFormatError(f"{out / 'results.json'}: not the results of a comparison ({error})") from None
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            if not holds_one:
                raise ExperimentError(f"{out} is not empty: --out takes another place")
            if not overwrite:
                choices = "--resume continues it, --overwrite replaces it, --out takes another place"
                raise ExperimentError(f"{out} is not empty, it holds a comparison: {choices}")
            for folder in ("flows", "training"):
                shutil.rmtree(out / folder)
            for name in ("results.json", "report.html", *(f"{name}.png" for name in COMPARISON_FIGURES)):
                (out / name).unlink(missing_ok=True)
        for folder in ("flows", "training"):
            (out / folder).mkdir()
        with write_atomically(stored) as stream:
            stream.write(config.to_toml().encode())
    except OSError as error:
        raise ExperimentError(f"cannot write to {out}: {error.strerror or error}") from None
    return config, []


def run_comparison(
    config: Config | None,
    out: str | os.PathLike,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train the flows, compare the samplers, and leave results, figures and a report in a directory.

    Parameters
    ----------
    config : Config or None
        ``[[sampler]]`` lists the samplers; without any, HMC, Swendsen-Wang and Wolff clusters, and flow-HMC
        with each flow. None with `resume` takes the stored one.
    out : path-like
        A new or empty directory, or with `resume` or `overwrite` that of an earlier comparison.
    resume : bool
        Keep the samplers and flows that are finished. What a sampler that was interrupted, or failed, had done is
        done again.
    overwrite : bool
        Replace the comparison in `out`.
    progress : callable, optional
        Called as ``progress(stage, done, total, remark)``.

    Returns
    -------
    dict
        What ``results.json`` holds: `lfq.Comparison.results`, and ``config``, ``levels``, ``versions``, ``machine``.
        The file is complete after every sampler.

    Raises
    ------
    ConfigError, ExperimentError, FileFormatError, ImportError
        As `run_experiment`.
    """
    from . import plots, report

    progress, out = progress or (lambda *_: None), Path(out)
    if config is None and not resume:
        raise TypeError("run_comparison: a new comparison needs a configuration")
    if config is not None:
        if config.ladder:
            raise ConfigError("ladder", "", "is for `lfq run`, not `lfq compare`")
        if not config.sampler:
            flows = [SamplerConfig("flow-hmc", f"flow-hmc, {prior.name}", prior.name) for prior in config.prior]
            config = replace(config, sampler=(*DEFAULT_SAMPLERS, *flows))
        _check_buildable(replace(config, sampler=(), comparison=None))
    for package, purpose in PACKAGES.items():
        load(package, purpose)
    config, finished = _comparison_directory(config, out, resume, overwrite)

    def store(found: dict[str, Any]) -> dict[str, Any]:
        trainings = filter(None, (_recorded(prior.name, out) for prior in config.prior))
        results = finite(
            {"version": lfq.__version__, "config": config.to_dict(), "levels": [_level(config, t) for t in trainings]}
            | found
            | {"versions": versions(), "machine": machine(config.run.threads)}
        )
        with write_atomically(out / "results.json") as stream:
            stream.write(json.dumps(results, indent=1, allow_nan=False).encode())
        return results

    found = compare(
        target_theory(config),
        {s.name: partial(_contender, config, s, out, progress) for s in config.sampler},
        **vars(config.comparison or ComparisonConfig()),
        seed=stage_seed(config.run.seed, "compare"),
        progress=progress,
        finished=finished,
        store=store,
    )
    results = store(found.results)
    figures = plots.write_comparison_figures(out, results)
    with write_atomically(out / "report.html") as stream:
        stream.write(report.comparison_report(results, config, figures).encode())
    return results
