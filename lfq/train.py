"""Training: reverse Kullback-Leibler divergence with the prior's normalisation dropped, and Adam.

The loop over steps runs inside Numba and calls the kernels of liblfq by name, so Python costs nothing
per step.
"""

from __future__ import annotations

import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numba import njit

from . import _core, _cuda, _gpu, native
from ._kernels import check_count, check_seed, check_threads, is_finite, real_dtype
from .actions import Phi4
from .custom import CustomAction
from .flows import Compose, Flow, MultiscaleFlow
from .hmc import HMC
from .io import FileFormatError, check_parameters, load_checkpoint, save_checkpoint
from .priors import Gaussian, Interleave, Lattice, Prior, Upsample

__all__ = ["Fit", "effective_sample_size", "independence_acceptance", "train", "train_ladder"]

_FIRST_TRAJECTORY = _core.hmc_dtype.fields["first_trajectory"][1] // 8
_HISTORY = ("loss", "ess", "std_log_w", "learning_rate")
_LATENT = _core.PURPOSES["latent"]
_DONE, _FAILED_KERNEL, _FAILED_LOSS, _FAILED_CHAIN = 0, 1, 2, 3


@njit(cache=True, nogil=True)
def effective_sample_size(log_w):
    """ESS per sample, (sum w)^2 / (N sum w^2), of unnormalised log-weights (N,); in (0, 1]."""
    largest = log_w.max()
    total = square = 0.0
    for value in log_w:
        w = math.exp(value - largest)
        total += w
        square += w * w
    return total * total / (log_w.size * square)


@njit(cache=True, nogil=True)
def _loop(
    flow, weights, first_moment, second_moment, target, custom, n_steps, first_step, total_steps, learning_rate,
    coarse, chains, hmc_settings, hmc_words, n_between, coarse_action,
    noise, seed, latent, target_action, log_det, gradient,
    hmc_space, action_space, flow_space, n_threads, history,
):  # fmt: skip
    n, volume = latent.shape
    n_coarse = volume - noise.shape[1]
    copies = coarse_action.size // n
    for step in range(first_step, first_step + n_steps):
        # The next batch of the base: chains move on, noise is new.
        status = 0
        if n_coarse > 0:
            status |= native.advance(coarse, hmc_settings, chains, hmc_space, n_threads)
            hmc_words[_FIRST_TRAJECTORY] += n_between
            status |= native.action(coarse, chains, coarse_action, action_space, n_threads)
            latent[:, :n_coarse] = chains.reshape((n, n_coarse))
        if n_coarse < volume:
            status |= native.normal(seed, _LATENT, step, noise, n_threads)
            latent[:, n_coarse:] = noise
        if custom:
            status |= native.custom_loss(flow, target, latent, target_action, log_det, gradient, flow_space, n_threads)
        else:
            status |= native.loss(flow, target, latent, target_action, log_det, gradient, flow_space, n_threads)
        if status != 0:
            return step, _FAILED_KERNEL

        log_w = np.empty(n)
        for i in range(n):
            log_r = -0.5 * noise.shape[1] * math.log(2 * math.pi)
            for j in range(copies):
                log_r -= coarse_action[i * copies + j]
            for j in range(noise.shape[1]):
                log_r -= 0.5 * float(noise[i, j]) ** 2
            log_w[i] = log_det[i] - target_action[i] - log_r
        if not (np.isfinite(log_w).all() and np.isfinite(gradient).all()):
            return step, _FAILED_LOSS
        rate = 0.5 * learning_rate * (1 + math.cos(math.pi * step / total_steps))
        history[0, step] = -log_w.mean()
        history[1, step] = effective_sample_size(log_w)
        history[2, step] = log_w.std()
        history[3, step] = rate

        # Adam (arXiv:1412.6980) with its default moments.
        correction1 = 1 - 0.9 ** (step + 1)
        correction2 = 1 - 0.999 ** (step + 1)
        for i in range(weights.size):
            g = gradient[i]
            first_moment[i] = 0.9 * first_moment[i] + 0.1 * g
            second_moment[i] = 0.999 * second_moment[i] + 0.001 * g * g
            weights[i] -= rate * (first_moment[i] / correction1) / (math.sqrt(second_moment[i] / correction2) + 1e-8)
    return first_step + n_steps, _DONE


class _DeviceLoop:
    """`_loop` with all arrays on the GPU; the host waits only at the end of `run`."""

    def __init__(self, base, target, program, weights, n, n_steps, learning_rate, seed, dtype, settings):
        volume, copies = target.volume, base.n_copies
        self._seed, self._dtype, self._between = seed, dtype, base.n_between
        self._target, self._settings, self._program = target._record(), settings, program
        self._coarse = base.theory._record() if base.theory else None
        self._n_coarse = volume - base.n_noise
        self._chains = None
        self._weights = _gpu.empty(weights.size)
        self._coarse_action, self._dh = _gpu.empty(n * copies), _gpu.empty((base.n_between, n * copies))
        self._latent = _gpu.empty((n, volume), dtype)
        # Latents that are nothing but noise are drawn in place.
        self._noise = self._latent if self._coarse is None else _gpu.empty((n, base.n_noise), dtype)
        self._action, self._log_det, self._log_w = (_gpu.empty(n) for _ in range(3))
        self._gradient, self._moments = _gpu.empty(weights.size), _gpu.empty((2, weights.size))
        self._history, self._failed = _gpu.empty((len(_HISTORY), n_steps)), _gpu.empty(1, np.int64)
        self._dh_total = _gpu.empty(())
        self._failed[...] = -1
        self._dh_total[...] = 0
        self._flow, self._layers, self._alive = _gpu.flow_record(volume, program, self._weights)
        record = self._record = np.zeros(1, dtype=_cuda.TRAINING_RECORD)
        record["n"], record["n_noise"], record["n_weights"], record["copies"] = n, base.n_noise, weights.size, copies
        record["total_steps"], record["learning_rate"] = n_steps, learning_rate
        for name, array in {
            "coarse_action": self._coarse_action, "target_action": self._action, "log_det": self._log_det,
            "gradient": self._gradient, "weights": self._weights, "first_moment": self._moments[0],
            "second_moment": self._moments[1], "log_w": self._log_w, "history": self._history,
            "failed_step": self._failed,
        }.items():  # fmt: skip
            record[name] = array.data.ptr

    def upload(self, weights, moments, chains, history, **_) -> None:
        """Start from a checkpoint's arrays."""
        if self._coarse is not None:
            self._chains = _gpu.asarray(chains, "chains").copy()
        for array, values in ((self._weights, weights), (self._moments, moments), (self._history, history)):
            array[...] = _gpu.asarray(values, "checkpoint")

    def download(self, weights, moments, chains, **_) -> None:
        """Fill a checkpoint's arrays; `run` has brought the history already."""
        if self._chains is not None:
            _gpu.to_host(self._chains, out=chains)
        _gpu.to_host(self._weights, out=weights)
        _gpu.to_host(self._moments, out=moments)

    def _step(self, step: int) -> None:
        n, dtype, chains, split = len(self._latent), self._dtype, self._chains, self._n_coarse
        if chains is not None:
            resident = _cuda.library().call("resident", dtype, self._coarse)
            _gpu.call(
                "hmc", dtype, self._coarse, self._settings, 0, len(chains), chains.data.ptr, self._dh.data.ptr, None,
                None, None, workspace=("hmc", self._coarse, 0 if resident else len(chains)),
            )  # fmt: skip
            # Any dH that is not finite stays visible here.
            self._dh_total[...] += self._dh.sum()
            self._settings["first_trajectory"] += self._between
            _gpu.phi4_action(self._coarse, chains, self._coarse_action)
            self._latent[:, :split] = chains.reshape(n, split)
        if split < self._latent.shape[1]:
            _gpu.normal(self._seed, _LATENT, step, 0, n, self._noise)
            if self._noise is not self._latent:
                self._latent[:, split:] = self._noise
        _gpu.call(
            "flow_loss", dtype, self._flow, self._layers, self._target, n, self._latent.data.ptr, self._action.data.ptr,
            self._log_det.data.ptr, self._gradient.data.ptr, workspace=("flow", self._flow, n),
        )  # fmt: skip
        self._record["step"] = step
        _gpu.call("train_step", dtype, self._record, self._noise.data.ptr)

    def run(self, count: int, first: int, history: np.ndarray) -> tuple[int, int]:
        for step in range(first, first + count):
            self._step(step)
        _gpu.to_host(self._history, out=history)
        failed = int(_gpu.to_host(self._failed)[0])
        if failed >= 0:
            return failed, _FAILED_LOSS
        if not np.isfinite(float(_gpu.to_host(self._dh_total))):
            return first, _FAILED_CHAIN
        return first + count, _DONE


@dataclass(frozen=True)
class Fit:
    """A trained flow.

    Attributes
    ----------
    flow : Flow
        From the prior's samples to the target's fields.
    prior : Prior
        With its trained width and scale, where it has them.
    target : Phi4 or CustomAction
    ess, acceptance, std_log_w : float
        Effective sample size per sample, acceptance of the independence Metropolis chain and standard
        deviation of log w, on fresh samples.
    history : dict of str to ndarray, shape (n_steps,)
        loss (up to the constant of a lattice prior), ess and std_log_w of each batch, learning_rate, and
        seconds since the start.
    seconds : float
        Wall time of the training, the prior's chains and their thermalisation included.
    """

    flow: Flow
    prior: Prior
    target: Phi4 | CustomAction
    ess: float
    acceptance: float
    std_log_w: float
    history: dict[str, np.ndarray]
    seconds: float


def independence_acceptance(log_w, seed: int = 0) -> float:
    """Acceptance of the Metropolis chain that proposes each sample in turn.

    Parameters
    ----------
    log_w : array_like, shape (N,)
        log w = -S(f(z)) - log r(z) + log|det df/dz|, N >= 2.
    """
    log_w = np.asarray(log_w, dtype=np.float64)
    if log_w.ndim != 1 or log_w.size < 2:
        raise ValueError(f"log_w: must hold at least two weights, got shape {log_w.shape}")
    thresholds = np.log(np.random.default_rng(seed).random(log_w.size))
    current, accepted = log_w[0], 0
    for proposed, threshold in zip(log_w[1:], thresholds[1:], strict=True):
        if threshold < proposed - current:
            current, accepted = proposed, accepted + 1
    return accepted / (log_w.size - 1)


def train(
    flow: Flow,
    prior: Prior,
    target: Phi4 | CustomAction,
    n_steps: int = 1000,
    batch_size: int = 500,
    learning_rate: float = 0.01,
    seed: int = 0,
    dtype="float64",
    n_threads: int | None = None,
    n_evaluation: int | None = None,
    progress: bool | Callable[[int, int, float, float], None] = False,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_seconds: float = 60.0,
    device: str = "cpu",
) -> Fit:
    """Train a flow to map samples of a prior to those of a theory.

    Minimises < log r(z) - log|det J| + S(f(z)) > over z ~ r with Adam and a cosine schedule
    (arXiv:2302.08408 sec. 3, arXiv:2310.03381). Samples are new in every step.

    Parameters
    ----------
    flow : Flow
        Where to start; not changed.
    prior : Prior
    target : Phi4 or CustomAction
        Of the prior's shape.
    n_steps, batch_size : int
    learning_rate : float
        At the first step; falls to zero as (1 + cos) / 2.
    seed : int
    dtype : {"float64", "float32"}
        Of fields; weights, log-determinants and actions are double in both.
    n_threads : int, optional
    n_evaluation : int, optional
        Fresh samples behind ess, acceptance and std_log_w; by default ten batches.
    progress : bool or callable
        True for a line on stderr, or called as progress(step, n_steps, loss, ess). A KeyboardInterrupt that it
        raises stops the training after it was stored in `checkpoint`.
    checkpoint : path-like, optional
        File in which weights, moments and the prior's chains are kept while training, and the one before beside
        it. Where it exists, training goes on from there, and ends in the same bits; threads may differ, and so may
        the device, which changes the rounding.
    checkpoint_seconds : float
        Time between two of them.
    device : {"cpu", "cuda"}
        With "cuda" all of a step happens on the current GPU: the prior's chains, the flow, the loss, Adam.

    Returns
    -------
    Fit

    Raises
    ------
    ValueError, TypeError
        Bad arguments, before any work.
    ParameterError
        The checkpoint is of a training with other parameters, which are named.
    NotFiniteError
        The loss became NaN or Inf; names the step, and the last good one that `checkpoint` has.
    FileFormatError
        The checkpoint and the one before are damaged.
    """
    if not isinstance(flow, Flow):
        raise TypeError(f"flow: must be a Flow, got {type(flow).__name__}")
    if not isinstance(prior, Prior):
        raise TypeError(f"prior: must be a Prior, got {type(prior).__name__}")
    if not isinstance(target, (Phi4, CustomAction)):
        raise TypeError(f"target: must be a Phi4 or a CustomAction, got {type(target).__name__}")
    if prior.shape != target.shape:
        raise ValueError(f"prior: its lattice is {prior.shape}, the target's is {target.shape}")
    n_steps = check_count(n_steps, "n_steps", 1, 10**8)
    n = check_count(batch_size, "batch_size", 2, 10**8)
    if not (is_finite(learning_rate) and learning_rate > 0):
        raise ValueError(f"learning_rate: must be positive, got {learning_rate!r}")
    seed, dtype, threads = check_seed(seed), real_dtype(dtype), check_threads(n_threads)
    n_evaluation = 10 * n if n_evaluation is None else check_count(n_evaluation, "n_evaluation", 2)
    report = _progress_line if progress is True else progress or None
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device: must be one of cpu, cuda, got {device!r}")
    on_gpu, custom = device == "cuda", isinstance(target, CustomAction)
    if on_gpu and custom:
        raise ValueError("device: a CustomAction is trained for on the cpu only, got 'cuda'")
    if on_gpu:
        _gpu.require('device "cuda"')

    base = prior.base
    whole = flow.copy() if prior.map is None else Compose([prior.map.copy(), flow.copy()])
    program, weights = whole.program(target.shape), whole.weights
    volume = target.volume
    flow_record = np.zeros(1, dtype=native.FLOW_RECORD)
    flow_record["volume"], flow_record["n_weights"], flow_record["n_layers"] = (
        volume,
        weights.size,
        program.size,
    )
    flow_record["layers"], flow_record["weights"] = program.ctypes.data, weights.ctypes.data
    theory = target._record(dtype) if custom else target._record()

    no_chains = Phi4(target.shape, 0.0, 0.0)
    coarse = (base.theory or no_chains)._record()
    chain_count = n * base.n_copies
    settings = (base.hmc(dtype, n_threads) if base.theory else HMC(no_chains))._settings(1, base.n_between, seed)
    history = np.zeros((len(_HISTORY), n_steps))
    seconds = np.zeros(n_steps)
    spaces = [
        native.workspace("hmc", dtype, None, coarse, chain_count, threads),
        native.workspace("phi4", dtype, coarse, chain_count, threads),
        native.workspace("custom", dtype, flow_record, theory, n, threads)
        if custom
        else native.workspace("flow", dtype, flow_record, n, threads),
    ]
    buffers = {
        "chains": np.empty((chain_count, base.theory.volume if base.theory else 0), dtype=dtype),
        "coarse_action": np.zeros(chain_count),
        "noise": np.empty((n, base.n_noise), dtype=dtype),
        "latent": np.empty((n, volume), dtype=dtype),
    }

    def run(count: int, first: int) -> tuple[int, int]:
        return _loop(
            flow_record.ctypes.data, weights, moments[0], moments[1], theory.ctypes.data, custom, count, first, n_steps,
            float(learning_rate), coarse.ctypes.data, buffers["chains"], settings.ctypes.data,
            settings.view(np.uint64), base.n_between, buffers["coarse_action"],
            buffers["noise"], seed, buffers["latent"], np.empty(n), np.empty(n), np.empty(weights.size),
            *spaces, threads, history,
        )  # fmt: skip

    moments = np.zeros((2, weights.size))
    if on_gpu:
        loop = _DeviceLoop(base, target, program, weights, n, n_steps, float(learning_rate), seed, dtype, settings)
    else:
        run(0, 0)  # compiles the loop outside the clock
    step, chunk, begin = 0, 1, time.perf_counter()
    parameters = _parameters(flow, prior, target, n_steps, n, float(learning_rate), seed, dtype)
    tensors = {
        "weights": weights,
        "moments": moments,
        "chains": buffers["chains"],
        "history": history,
        "seconds": seconds,
    }
    stored = None if checkpoint is None else _stored(checkpoint, parameters, tensors)
    if stored:
        step, settings["first_trajectory"], begin = stored["step"], stored["trajectory"], begin - stored["elapsed"]
    elif base.theory is not None:
        state = base.start(n, seed, dtype, n_threads, device=device)
        latent = _gpu.to_host(state.latent) if on_gpu else state.latent
        buffers["chains"][:] = latent.reshape(chain_count, -1)
        settings["first_trajectory"] = state.trajectory
    if on_gpu:
        loop.upload(**tensors)

    def store() -> None:
        if checkpoint is not None:
            if on_gpu:
                loop.download(**tensors)
            record = {
                "step": step,
                "trajectory": int(settings["first_trajectory"][0]),
                "elapsed": time.perf_counter() - begin,
                "parameters": parameters,
            }
            save_checkpoint(checkpoint, tensors, record)

    if not stored:
        store()
    last_stored = step, time.perf_counter()
    while step < n_steps:
        before = time.perf_counter()
        count = min(chunk, n_steps - step)
        reached, status = loop.run(count, step, history) if on_gpu else run(count, step)
        if status != _DONE:
            reason = {
                _FAILED_KERNEL: native.last_error, _FAILED_LOSS: lambda: "the loss is NaN or Inf",
                _FAILED_CHAIN: lambda: "dH of a coarse chain is NaN or Inf, at this step or soon after",
            }[status]()  # fmt: skip
            kept = f"; step {last_stored[0]} is kept in {checkpoint}" if checkpoint is not None else ""
            raise _core.NotFiniteError(f"training step {reached}: {reason}; try a smaller learning rate{kept}")
        now = time.perf_counter()
        seconds[step:reached] = (before - begin) + (now - before) * np.arange(1, count + 1) / count
        step = reached
        chunk = max(1, min(4 * chunk, int(count * 0.25 / max(now - before, 1e-6))))
        if now - last_stored[1] > checkpoint_seconds or step == n_steps:
            store()
            last_stored = step, time.perf_counter()
        if report:
            try:
                report(step, n_steps, float(history[0, step - 1]), float(history[1, step - 1]))
            except KeyboardInterrupt:
                store()
                raise
    elapsed = time.perf_counter() - begin

    if on_gpu:
        loop.download(**tensors)
    whole.weights = weights
    trained, map_weights = whole, np.empty(0)
    if prior.map is not None:
        trained, map_weights = whole.flows[1], whole.flows[0].weights
    log_w = _evaluate(
        whole, prior, target, n, n_evaluation, seed, dtype, n_threads, buffers["chains"], settings, n_steps, device
    )
    found = dict(zip(_HISTORY, history, strict=True))
    return Fit(
        flow=trained,
        prior=prior.with_map_weights(map_weights),
        target=target,
        ess=float(effective_sample_size(log_w)),
        acceptance=independence_acceptance(log_w, seed),
        std_log_w=float(log_w.std()),
        history=found | {"seconds": seconds},
        seconds=elapsed,
    )


def _parameters(flow, prior, target, n_steps, batch_size, learning_rate, seed, dtype) -> dict[str, Any]:
    """All that decides what a training becomes, as plain data."""
    found = {f"target {key}": value for key, value in target.describe().items()} | prior.describe()
    return found | {
        "flow": flow.describe(),
        "n_steps": n_steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "seed": seed,
        "dtype": str(dtype),
    }


def _stored(path, parameters: dict[str, Any], tensors: dict[str, np.ndarray]) -> dict[str, Any] | None:
    """Fill `tensors` from the newest good checkpoint and return its record; None where there is none."""
    for found, record in load_checkpoint(path):
        check_parameters(path, record.get("parameters"), parameters)
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        try:
            if {name: (tensor.shape, tensor.dtype) for name, tensor in found.items()} != shapes:
                raise ValueError("its arrays have other shapes")
            check_count(record["step"], "step", 0, parameters["n_steps"])
            check_count(record["trajectory"], "trajectory", 0, 2**56 - 1)
            if not (isinstance(record["elapsed"], float) and math.isfinite(record["elapsed"])):
                raise ValueError("its time is not a number")
        except (KeyError, TypeError, ValueError) as error:
            raise FileFormatError(f"{path}: not the checkpoint of a training: {error}") from None
        for name, tensor in found.items():
            tensors[name][...] = tensor
        return record
    return None


def _evaluate(whole, prior, target, n, n_samples, seed, dtype, n_threads, chains, settings, first_step, device):
    """log w of fresh samples: the prior's chains move on as in training."""
    base, parts = prior.base, []
    trajectory = int(settings["first_trajectory"][0])
    for batch in range(-(-n_samples // n)):
        latent = base.noise(n, seed, first_step + batch, dtype, n_threads)
        if device == "cuda":
            latent = _gpu.asarray(latent, "noise")
        if base.theory is not None:
            hmc = base.hmc(dtype, n_threads, device)
            state = hmc.start(len(chains), seed, phi=chains.reshape(-1, *base.theory.shape))
            block = hmc.advance(replace(state, trajectory=trajectory), 1, base.n_between)
            chains, trajectory = block.state.latent, block.state.trajectory
            latent = np.concatenate([chains.reshape(n, -1), latent], axis=1)
        x, log_det = whole.forward(latent.reshape(n, *target.shape), n_threads)
        log_w = log_det - target.action(x, n_threads) - base.log_prob(latent, n_threads)
        parts.append(log_w if device == "cpu" else _gpu.to_host(log_w))
    return np.concatenate(parts)[:n_samples]


def _progress_line(step: int, n_steps: int, loss: float, ess: float) -> None:
    end = "\n" if step == n_steps else ""
    print(f"\rstep {step}/{n_steps}, loss {loss:.3f}, ESS {ess:.3f}", end=end, file=sys.stderr, flush=True)


def train_ladder(
    flow: Flow,
    theories: Sequence[Phi4],
    prior: str = "interleave",
    chain: dict | None = None,
    progress: bool | Callable[[int, int, float, float], None] = False,
    checkpoint: str | os.PathLike | None = None,
    **training,
) -> list[Fit]:
    """Train level by level up a ladder of ever finer lattices.

    Level i maps configurations of theories[i] (made by HMC) to theories[i + 1], starting from the
    weights of the level below. A `MultiscaleFlow` maps noise alone: it is trained for theories[0], then, refined by
    one level each time, for the others, all its levels together. It learns best from small lattices at the coupling of
    the largest one, whose short distances it then knows.

    Parameters
    ----------
    flow : Flow
        Where the first level starts.
    theories : sequence of Phi4
        Coarsest first, each of half the extents of the next ("lattice": of the same extents).
    prior : {"interleave", "upsample", "lattice"}
        Not of a `MultiscaleFlow`.
    chain : dict, optional
        Keywords of the priors' chains, likewise.
    checkpoint : path-like, optional
        As of `train`, level i in a file whose name ends in ``-i``: complete levels are not trained again.
    progress, **training
        Passed to `train`; n_steps, batch_size and learning_rate may be sequences with a value for each level. The seed
        of level i is seed + i.

    Returns
    -------
    list of Fit
        One for each theory but the first; of a `MultiscaleFlow`, for each theory.
    """
    kinds = {"interleave": Interleave, "upsample": Upsample, "lattice": Lattice}
    if prior not in kinds:
        raise ValueError(f"prior: must be one of {', '.join(kinds)}, got {prior!r}")
    theories = list(theories)
    if len(theories) < 2 or not all(isinstance(theory, Phi4) for theory in theories):
        raise ValueError("theories: a ladder needs at least two theories")
    if isinstance(flow, MultiscaleFlow):
        return _train_levels(flow, theories, progress, checkpoint, **training)
    priors = [kinds[prior](theory, **(chain or {})) for theory in theories[:-1]]
    for below, target in zip(priors, theories[1:], strict=True):
        if below.shape != target.shape:
            raise ValueError(
                f"theories: {target.shape} does not follow from the level below, which makes {below.shape}"
            )
    seed, fits = check_seed(training.pop("seed", 0)), []
    each = _of_levels(training, checkpoint, len(priors))
    for level, (below, target) in enumerate(zip(priors, theories[1:], strict=True)):
        fits.append(train(flow, below, target, seed=seed + level, progress=progress, **each[level]))
        flow = fits[-1].flow
    return fits


def _of_levels(training: dict, checkpoint, n_levels: int) -> list[dict]:
    """The arguments of `train` for each level."""
    each = []
    for level in range(n_levels):
        each.append(dict(training))
        if checkpoint is not None:
            each[-1]["checkpoint"] = f"{os.fspath(checkpoint)}-{level}"
    for name in ("n_steps", "batch_size", "learning_rate"):
        values = training.get(name)
        if isinstance(values, list | tuple | np.ndarray):
            if len(values) != n_levels:
                raise ValueError(f"{name}: {len(values)} values for {n_levels} levels")
            for arguments, value in zip(each, values, strict=True):
                arguments[name] = value
    return each


def _train_levels(flow: MultiscaleFlow, theories, progress, checkpoint, seed=0, **training) -> list[Fit]:
    for coarse, fine in itertools.pairwise(theories):
        if tuple(2 * extent for extent in coarse.shape) != fine.shape:
            raise ValueError(f"theories: {fine.shape} is not twice the extents of the level below, {coarse.shape}")
    seed, fits = check_seed(seed), []
    each = _of_levels(training, checkpoint, len(theories))
    for level, theory in enumerate(theories):
        if fits:
            flow = fits[-1].flow.refined()
        fits.append(train(flow, Gaussian(theory.shape), theory, seed=seed + level, progress=progress, **each[level]))
    return fits
