"""The pipelines of `lfq run` and `lfq compare`: train a flow from every prior, then sample and compare.

Every stage stores its result as it completes, and a run that was interrupted continues with the same
random numbers: the outcome is that of an uninterrupted one, bit for bit.
"""

from __future__ import annotations

import copy
import fcntl
import hashlib
import json
import math
import os
import platform
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import lfq

from ._kernels import check_count
from ._optional import load
from .comparison import MOST_SAMPLES, Contender, chain_record, compare, judge, pay_off
from .config import (
    ComparisonConfig,
    Config,
    ConfigError,
    PriorConfig,
    SamplerConfig,
    load_config,
    parse_config,
)
from .health import RunWarning, concerns
from .hmc import HMC, Block, Run, State, restored_state
from .io import (
    FileFormatError,
    RecoveryWarning,
    RunFile,
    check_parameters,
    load_checkpoint,
    load_tensors,
    remove_checkpoint,
    save_checkpoint,
    save_tensors,
    write_atomically,
)
from .observables import OBSERVABLES

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
            if not isinstance(scalars, dict):
                raise ValueError("its numbers are not a table")
            theory = lfq.Phi4(tuple(scalars.pop("shape")), scalars.pop("beta"), scalars.pop("lam"))
            if not all(isinstance(number, float) and math.isfinite(number) for number in scalars.values()):
                raise ValueError("its numbers are not numbers")
            return cls(name=name, theory=theory, flow=flow, **groups, **scalars)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
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


def multiscale_flow(config: Config) -> lfq.MultiscaleFlow:
    """The untrained flow for the first theory of ``[ladder]``, from the smallest lattice that its extents allow."""
    shape, settings, n_levels = config.ladder.shapes[0], config.flow, 1
    while all(extent % 2 ** (n_levels + 1) == 0 for extent in shape):
        n_levels += 1
    with _section("flow"):
        seed = stage_seed(config.run.seed, "weights")
        return lfq.MultiscaleFlow(
            n_levels, settings.n_blocks, settings.scale, settings.kernel_size, settings.hidden, settings.features,
            seed=seed, ndim=len(shape), sublattices=settings.sublattices, order=settings.order,
        )  # fmt: skip


def initial_flow(config: Config) -> lfq.AffineFlow:
    """The untrained flow of ``[flow]``."""
    keys = {key: value for key, value in vars(config.flow).items() if (key, value) != ("order", None)}
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


def _check_memory(config: Config) -> None:
    """Refuse what cannot fit into the memory of the machine."""
    sampling, training, volume = config.sampling, config.training, math.prod(config.target.shape)
    samples = min(sampling.block_size, sampling.n_samples) + 10 * min(sampling.n_samples, MOST_SAMPLES)
    numbers = sampling.n_chains * (6 * volume + 2 * samples * len(OBSERVABLES))
    if config.prior or config.ladder:
        numbers += 6 * training.batch_size * volume + 10 * training.n_steps
    have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if 8 * numbers > have:
        need = f"about {8 * numbers / 1e9:.3g} GB of memory, and this machine has {have / 1e9:.3g}"
        raise ConfigError("", "", f"chains and batches of this size need {need}")


def _check_buildable(config: Config) -> None:
    """Construct everything once, so that what only lfq itself can judge fails before any work."""
    _check_memory(config)
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


def _run_file(config: Config, out: Path, attributes: dict[str, Any], **keywords) -> RunFile:
    return RunFile(
        out / "run.h5",
        list(sampler_names(config)),
        n_samples=config.sampling.n_samples,
        n_chains=config.sampling.n_chains,
        attributes=attributes,
        **keywords,
    )


def _lock(out: Path) -> int:
    """Keep other processes from running in the directory until the handle is closed, or this process ends."""
    handle = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise ExperimentError(f"{out}: in use by another process") from None
    return handle


OWN_FILES = ("run.h5", "config.toml", "results.json", "report.html", "*.png")
OWN_FOLDERS = ("flows", "training", "checkpoints")


def _own(out: Path, prefix: str = "") -> list[Path]:
    """Files that lfq made in a directory; with the prefix "." those it died in writing."""
    patterns = [*OWN_FILES, *(f"{folder}/{prefix}*.safetensors*" for folder in OWN_FOLDERS)]
    if prefix:
        patterns = [f"{prefix}{name}.*" for name in OWN_FILES] + patterns[len(OWN_FILES) :]
    return [file for pattern in patterns for file in out.glob(pattern)]


def _remove_run(out: Path) -> None:
    """Delete what `lfq run` or `lfq compare` left in a directory, and nothing else."""
    for file in _own(out) + _own(out, "."):
        file.unlink()
    for name in OWN_FOLDERS:
        if (out / name).is_dir():
            (out / name).rmdir()


def _holds(out: Path) -> str:
    """What lfq has left in a directory: "run", "comparison", "beginning" (it died at once), or nothing."""
    if not (out / "checkpoints").is_dir():
        return ""
    if (out / "run.h5").exists() or (out / "checkpoints" / "run.safetensors").exists():
        return "run"
    return "comparison" if (out / "config.toml").exists() else "beginning"


def _claim(out: Path, kind: str, overwrite: bool) -> int:
    """Make the directory of a new run or comparison and lock it; an earlier one of its kind goes with `overwrite`."""
    out.mkdir(parents=True, exist_ok=True)
    lock, held = _lock(out), _holds(out)
    try:
        if overwrite and held in (kind, "beginning"):
            foreign = sorted({file for file in out.rglob("*") if file.is_file()} - {*_own(out), *_own(out, ".")})
            if foreign:
                raise ExperimentError(f"{foreign[0]} is not of a {kind} of lfq: --overwrite deletes those only")
            _remove_run(out)
        if any(out.iterdir()):
            if held == kind:
                how = "--resume continues it, --overwrite deletes it, --out takes another place"
                raise ExperimentError(f"{out} already holds a {kind}: {how}")
            raise ExperimentError(f"{out} is not empty: --out takes another place")
    except BaseException:
        os.close(lock)
        raise
    return lock


def _new_directory(config: Config, out: Path, overwrite: bool) -> tuple[int, RunFile]:
    try:
        lock = _claim(out, "run", overwrite)
        try:
            n_samples, n_chains = config.sampling.n_samples, config.sampling.n_chains
            needed = len(sampler_names(config)) * n_samples * n_chains * 8 * (len(OBSERVABLES) + 2)
            free = shutil.disk_usage(out).free
            if needed > free:
                raise ExperimentError(f"{out}: run.h5 needs {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB are free")
            attributes = {"config": config.to_toml(), "versions": json.dumps(versions()), "seed": config.run.seed}
            for folder in OWN_FOLDERS:
                (out / folder).mkdir()
            file = _run_file(config, out, attributes, create=True)
            for _ in range(2):  # The second keeps the first, so that damage to one is no loss.
                save_checkpoint(out / "checkpoints" / "run.safetensors", {}, attributes)
        except BaseException:
            _remove_run(out)
            os.close(lock)
            raise
        return lock, file
    except OSError as error:
        raise ExperimentError(f"cannot write to {out}: {error.strerror or error}") from None


def _old_directory(config: Config | None, out: Path) -> tuple[Config, int, RunFile]:
    found = load_checkpoint(out / "checkpoints" / "run.safetensors") if out.is_dir() else []
    if not found:
        raise ExperimentError(f"{out} holds no run to resume")
    attributes = found[0][1]
    try:
        stored = parse_config(attributes["config"])
        made_by = json.loads(attributes["versions"])["hdf5"]
    except (KeyError, TypeError, ValueError) as error:
        raise FileFormatError(f"{out}: not the record of a run: {error}") from None
    if config is not None:
        _check_same(stored, config, out)
    lock, missing = _lock(out), not (out / "run.h5").exists()
    try:
        for file in _own(out, "."):
            file.unlink()
        if missing:
            _recover(f"{out / 'run.h5'} is gone: sampling again")
        file = _run_file(stored, out, attributes, create=missing, mend=made_by == versions()["hdf5"])
    except BaseException:
        os.close(lock)
        raise
    return config or stored, lock, file


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
    found["hdf5"] = load("h5py", "a run file").version.hdf5_version
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
    try:
        return Training.load(path, name, lfq.load_flow(out / "flows" / f"{name}.safetensors"))
    except (FileFormatError, FileNotFoundError) as error:
        _recover(f"{error}; training again")
        return None


def _recover(what: str) -> None:
    warnings.warn(what, RecoveryWarning, stacklevel=3)


def _checkpoints(path: str | os.PathLike, otherwise: str) -> list[tuple[dict[str, np.ndarray], dict[str, Any]]]:
    """The good checkpoints; where all are damaged they go, and the work is done again."""
    try:
        return load_checkpoint(path)
    except FileFormatError as error:
        _recover(f"{error}; {otherwise}")
        remove_checkpoint(path)
        return []


def _training_checkpoint(out: Path, name: str) -> Path:
    return out / "checkpoints" / f"train-{name}.safetensors"


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
        _checkpoints(_training_checkpoint(out, prior.name), "training again")
        fit = lfq.train(
            initial_flow(config),
            prior=make_prior(config, prior),
            target=target,
            checkpoint=_training_checkpoint(out, prior.name),
            **_training_keywords(config, stage, progress),
        )
        done = _record(fit, prior.name, target, out, config.run.seed)
        remove_checkpoint(_training_checkpoint(out, prior.name))
    progress(stage, config.training.n_steps, config.training.n_steps, f"ESS {done.ess:.2f}")
    return done


def train_ladder(config: Config, out: Path, progress: Progress) -> list[Training]:
    """Train the levels of ``[ladder]``, or read the records in `out`; the last one is the target's."""
    theories = [
        lfq.Phi4(shape, beta=beta, lam=config.target.lam)
        for shape, beta in zip(config.ladder.shapes, config.ladder.betas, strict=True)
    ]
    multiscale = config.ladder.prior == "multiscale"
    targets = theories if multiscale else theories[1:]
    names = [f"ladder-{'x'.join(map(str, theory.shape))}" for theory in targets]
    done = [_recorded(name, out) for name in names]
    checkpoint = _training_checkpoint(out, "ladder")
    if None in done:
        for level in range(len(names)):
            _checkpoints(f"{checkpoint}-{level}", "training again")
        options = {} if multiscale else {"prior": config.ladder.prior, "chain": vars(config.prior_chains)}
        fits = lfq.train_ladder(
            multiscale_flow(config) if multiscale else initial_flow(config),
            theories,
            checkpoint=checkpoint,
            **options,
            **_training_keywords(config, "train ladder", progress),
        )
        done = [
            _record(fit, name, theory, out, config.run.seed)
            for fit, name, theory in zip(fits, names, targets, strict=True)
        ]
        for level in range(len(fits)):
            remove_checkpoint(f"{checkpoint}-{level}")
    progress("train ladder", config.training.n_steps, config.training.n_steps, f"ESS {done[-1].ess:.2f}")
    return done


CHECKPOINT_SECONDS = 60.0
"""Longest time of sampling that is lost with the process; ``[sampling] block_size`` can make it shorter."""


@dataclass
class _Progress:
    """How far the sampling of one sampler has come; what its checkpoint says."""

    phase: str = ""  # "tuned", "approach" (fields by plain HMC), "warm up", "sample"
    done: int = 0
    n_steps: int = 0
    seconds: float = 0.0
    checksums: dict[str, int] = field(default_factory=dict)


def sample(config: Config, out: Path, file: RunFile, name: str, theory, progress: Progress) -> Run:
    """Tune, warm up and sample, streaming into `file`; continues where the checkpoint in `out` stands.

    Parameters
    ----------
    config : Config
    out : Path
    file : RunFile
    name : str
        Of the sampler's group.
    theory : lfq.Phi4 or its pullback by a flow
    progress : callable
        A KeyboardInterrupt that it raises stops the run, after a checkpoint.

    Raises
    ------
    NotFiniteError
        After the last good state was stored; names it.
    """
    settings, stage = config.sampling, name.replace("_", " ")
    path = out / "checkpoints" / f"{name}.safetensors"
    hmc = make_hmc(config, theory, name)
    at, state = _restore(config, path, file, name, hmc)

    fixed = hmc.parameters

    def store() -> None:
        numbers = {"trajectory": state.trajectory, "seed": state.seed, "first_chain": 0} if state else {}
        file.sync()
        save_checkpoint(path, {"latent": state.latent} if state else {}, vars(at) | numbers | {"parameters": fixed})
        if at.phase == "sample":
            file.announce(name, at.done)

    def tell(remark: str) -> None:
        try:
            progress(stage, at.done if at.phase == "sample" else 0, settings.n_samples, remark)
        except KeyboardInterrupt:
            store()
            raise

    def advance(sampler: HMC, count: int) -> None:
        """Continue the phase to its end, with checkpoints on the way."""
        nonlocal state
        tell("warming up" if at.phase != "sample" else f"{at.n_steps} steps")
        while at.done < count:
            begin = time.monotonic()
            try:
                for block in sampler.blocks(state, min(count - at.done, settings.block_size)):
                    remark = "warming up"
                    if at.phase == "sample":
                        at.checksums = file.write(name, at.done, block, at.checksums)
                        at.seconds += block.seconds
                        remark = f"{at.n_steps} steps, acceptance {block.accepted.mean():.2f}"
                    state, at.done = block.state, at.done + len(block.dh)
                    tell(remark)
                    if time.monotonic() - begin > CHECKPOINT_SECONDS:
                        break
            except lfq.NotFiniteError as error:
                store()
                kept = f"the state before it, of trajectory {state.trajectory}, is kept in {path}"
                raise lfq.NotFiniteError(f"{stage}: {error}; {kept}") from None
            store()

    if not at.phase:
        progress(stage, 0, settings.n_samples, "tuning")
        seed = stage_seed(config.run.seed, f"tune {name}")
        tuned = hmc.tune(acceptance=settings.acceptance, n_chains=settings.n_chains, seed=seed)
        at = _Progress("tuned", n_steps=tuned.n_steps)
        store()
    hmc = replace(hmc, n_steps=at.n_steps)
    if at.phase in ("tuned", "approach"):
        # Fields of the target: what a poor flow makes of normal latents can be far from any of them.
        n_steps = load_checkpoint(out / "checkpoints" / "hmc.safetensors")[0][1]["n_steps"]
        plain = replace(make_hmc(config, target_theory(config)), n_steps=n_steps)
        if at.phase == "tuned":
            state = plain.start(settings.n_chains, stage_seed(config.run.seed, f"warm up {name}"))
            at.phase = "approach"
        advance(plain, settings.n_warmup)
        seed = stage_seed(config.run.seed, f"sample {name}")
        at.phase, at.done, state = "warm up", 0, hmc.start(settings.n_chains, seed, phi=state.latent)
    if at.phase == "warm up":
        advance(hmc, settings.n_warmup)
        at.phase, at.done = "sample", 0
    advance(hmc, settings.n_samples)
    fields = theory.field(state.latent) if isinstance(theory, lfq.PulledBack) else None
    every = -(-at.done // MOST_SAMPLES)
    samples = file.samples(name, at.done, every)
    block = Block(**samples, seconds=at.seconds, state=state, fields=fields)
    return replace(Run.from_blocks(theory, hmc, [block]), kept=every)


def _restore(config: Config, path: Path, file: RunFile, name: str, hmc: HMC) -> tuple[_Progress, State | None]:
    """Where the sampler stands: the newest checkpoint whose samples are intact, or its beginning."""
    found = _checkpoints(path, "sampling again")
    for index, (tensors, record) in enumerate(found):
        check_parameters(path, record.get("parameters"), hmc.parameters)
        try:
            at = _Progress(**{f.name: record[f.name] for f in fields(_Progress)})
            state = None if at.phase == "tuned" else restored_state(path, tensors, record, hmc.theory.shape)
            if at.phase not in ("tuned", "approach", "warm up", "sample") or not isinstance(at.seconds, float):
                raise ValueError(f"phase {at.phase!r} of {at.seconds!r} seconds")
            if state and (len(state.latent), state.latent.dtype) != (config.sampling.n_chains, config.run.dtype):
                raise ValueError(f"{len(state.latent)} chains in {state.latent.dtype}")
            check_count(at.done, "done", 0, max(config.sampling.n_samples, config.sampling.n_warmup))
            replace(hmc, n_steps=at.n_steps)
        except (KeyError, TypeError, ValueError) as error:
            raise FileFormatError(f"{path}: not the checkpoint of a sampler: {error}") from None
        if at.phase != "sample" or file.intact(name, at.done, at.checksums):
            if index:
                _recover(f"{file.path}: samples of {name} are damaged; continuing from {at.phase} {at.done}")
            return at, state
    if found:
        _recover(f"{file.path}: samples of {name} are damaged; sampling again")
    return _Progress(), None


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
    return {"name": name, "prior": prior} | chain_record(name, run) | {"concerns": concerns(run)}


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
    config: Config | None,
    out: str | os.PathLike,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train, sample, and leave results, figures and a report in a directory.

    Parameters
    ----------
    config : Config or None
        None with `resume` takes the stored one.
    out : path-like
        A new or empty directory, or with `resume` that of an interrupted run.
    resume : bool
        Skip what is finished and continue where the checkpoints stand.
    overwrite : bool
        Delete the run that is in the directory first.
    progress : callable, optional
        Called as ``progress(stage, done, total, remark)``. A KeyboardInterrupt that it raises stops the run,
        after a checkpoint.

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
        A file of the run to resume is damaged, and nothing can stand in for it.
    ImportError
        An optional package is missing.

    Warns
    -----
    RecoveryWarning
        A file was damaged, and an older one is used or the work done again.
    """
    progress = progress or (lambda *_: None)
    out = Path(out)
    if config is None and not resume:
        raise TypeError("run_experiment: a new run needs a configuration")
    if resume and overwrite:
        raise ExperimentError("--resume and --overwrite exclude each other")
    if config is not None:
        _check_buildable(config)
    for package, purpose in PACKAGES.items():
        load(package, purpose)
    if resume:
        config, lock, file = _old_directory(config, out)
        _check_buildable(config)
    else:
        lock, file = _new_directory(config, out, overwrite)
    try:
        with file:
            return _run(config, out, file, progress)
    finally:
        os.close(lock)


def _run(config: Config, out: Path, file: RunFile, progress: Progress) -> dict[str, Any]:
    from . import plots, report

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
        runs[name] = sample(config, out, file, name, theory, progress)

    progress("figures and report", 0, 1, "")
    results = collect(config, trainings, runs)
    for sampler in results["samplers"]:
        for concern in sampler["concerns"]:
            label = sampler["name"] if sampler["prior"] is None else f"{sampler['name']}, {sampler['prior']}"
            warnings.warn(f"{label}: {concern}", RunWarning, stacklevel=2)
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


def make_sampler(config: Config, sampler: SamplerConfig, theory: lfq.Phi4, flow=None, prior=None):
    """The sampler of one ``[[sampler]]``, not tuned yet."""
    common = {"dtype": config.run.dtype, "n_threads": config.run.threads or None}
    moves = {"tau": sampler.tau, "integrator": sampler.integrator, "length_spread": sampler.length_spread}
    makers = {
        "hmc": lambda: HMC(theory, **moves, **common),
        "swendsen-wang": lambda: lfq.ClusterHMC(theory, n_updates=sampler.n_updates, **moves, **common),
        "wolff": lambda: lfq.ClusterHMC(theory, cluster="wolff", n_updates=sampler.n_updates, **moves, **common),
        "fourier": lambda: lfq.FourierHMC(theory, **moves, **common),
        "heat-bath": lambda: lfq.HeatBath(theory, cluster=sampler.cluster, n_updates=sampler.n_updates, **common),
        "flow-hmc": lambda: HMC(theory.pullback(flow), **moves, **common),
        "independence": lambda: lfq.IndependenceMetropolis(theory, flow, prior, **common),
        "reweighting": lambda: lfq.Reweighting(theory, flow, prior, **common),
        "annealing": lambda: lfq.Annealing(
            theory,
            flow,
            prior,
            sampler.n_temperatures,
            tau=sampler.tau,
            resample=sampler.resample,
            **common,
        ),
    }
    with _section(f"sampler {sampler.name}"):
        return makers[sampler.kind]()


def _contender(config: Config, sampler: SamplerConfig, out: Path, progress: Progress) -> Contender:
    """The sampler of one ``[[sampler]]``, its flow trained, or read from `out`."""
    training, prior = None, None
    if sampler.prior is not None:
        chosen = next(p for p in config.prior if p.name == sampler.prior)
        training, prior = train(config, chosen, out, progress), make_prior(config, chosen)
    made = make_sampler(config, sampler, target_theory(config), training and training.flow, prior)
    if isinstance(made, HMC) and not sampler.tune:
        comparison = config.comparison or ComparisonConfig()
        with _section(f"sampler {sampler.name}"):
            made = made.tune(comparison.acceptance, comparison.n_chains, stage_seed(config.run.seed, "tune"))
    return Contender(made, training.seconds if training else 0.0, sampler.tune, prior)


def _new_comparison(config: Config, out: Path, overwrite: bool) -> int:
    try:
        lock = _claim(out, "comparison", overwrite)
        try:
            for folder in OWN_FOLDERS:
                (out / folder).mkdir()
            with write_atomically(out / "config.toml") as stream:
                stream.write(config.to_toml().encode())
        except BaseException:
            _remove_run(out)
            os.close(lock)
            raise
        return lock
    except OSError as error:
        raise ExperimentError(f"cannot write to {out}: {error.strerror or error}") from None


def _old_comparison(config: Config | None, out: Path) -> tuple[Config, int, list]:
    """The configuration, the lock, and the records of samplers that an interrupted comparison has finished."""
    if _holds(out) != "comparison":
        raise ExperimentError(f"{out} holds no comparison to resume")
    kept = load_config(out / "config.toml")
    if config is not None:
        _check_same(kept, config, out)
    lock = _lock(out)
    try:
        for file in _own(out, "."):
            file.unlink()
        return config or kept, lock, _records(kept, out / "results.json")
    except BaseException:
        os.close(lock)
        raise


def _records(config: Config, path: Path) -> list[dict[str, Any]]:
    """The records in the results of a comparison, of what did not fail; that is tried again."""
    from .report import comparison_rows

    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        records = [record for record in found["samplers"] if "error" not in record]
        if {record["name"] for record in records} - {sampler.name for sampler in config.sampler}:
            raise ValueError("of other samplers")
        # Whatever is missing in them is missed here.
        judge(copy.deepcopy(records))
        comparison_rows({"samplers": records})
        return records
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise FileFormatError(f"{path}: not the results of a comparison ({error!r})") from None


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
        Called as ``progress(stage, done, total, remark)``. A KeyboardInterrupt that it raises stops the comparison;
        ``results.json`` then holds the samplers that are finished.

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
    progress, out = progress or (lambda *_: None), Path(out)
    if config is None and not resume:
        raise TypeError("run_comparison: a new comparison needs a configuration")
    if resume and overwrite:
        raise ExperimentError("--resume and --overwrite exclude each other")
    if config is not None:
        if config.ladder:
            raise ConfigError("ladder", "", "is for `lfq run`, not `lfq compare`")
        if not config.sampler:
            flows = [SamplerConfig("flow-hmc", f"flow-hmc, {prior.name}", prior.name) for prior in config.prior]
            config = replace(config, sampler=(*DEFAULT_SAMPLERS, *flows))
        _check_buildable(replace(config, sampler=(), comparison=None))
    for package, purpose in PACKAGES.items():
        load(package, purpose)
    if resume:
        config, lock, finished = _old_comparison(config, out)
    else:
        lock, finished = _new_comparison(config, out, overwrite), []
    try:
        return _compare(config, out, finished, progress)
    finally:
        os.close(lock)


def _compare(config: Config, out: Path, finished: list[dict[str, Any]], progress: Progress) -> dict[str, Any]:
    from . import plots, report

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
