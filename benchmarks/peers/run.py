"""lfq beside JAX, PyTorch and Numba on one core: equal answers first, then the table of ratios.

    python benchmarks/peers/run.py [--quick] [--out JSON]

Times are processor time of this process, medians of alternating repeats: another process on the core
stretches wall time, not processor time. Two threads against one are timed by the wall clock, the best of 25.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
if __name__ == "__main__":
    # Before any import that starts threads.
    if CORES:
        wanted = sys.argv[2].split(",") if sys.argv[1:2] == ["--threads"] else CORES[-1:]
        os.sched_setaffinity(0, {int(core) for core in wanted})
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    os.environ["JAX_PLATFORMS"] = "cpu"
    for name in ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"
sys.path.insert(0, str(HERE))

import numpy as np  # noqa: E402

import lfq  # noqa: E402
from lfq import _core  # noqa: E402

BETA, LAM, TAU, STEPS = 0.6, 0.5, 0.5, 10
EPS = TAU / STEPS
DTYPES = ("float64", "float32")
# Largest difference allowed, relative to the largest entry of what lfq says. Sums over 1e4 to 1e6 sites
# lose a few digits more than fields.
TOLERANCE = {"float64": {"fields": 1e-12, "sums": 1e-10}, "float32": {"fields": 2e-5, "sums": 2e-4}}


# ---- the work, in lfq ----------------------------------------------------------------------


def theory(L):
    return lfq.Phi4((L, L), BETA, LAM)


def paper_flow():
    flow = lfq.AffineFlow(seed=1)
    flow.weights = flow.weights / 2
    return flow


def deep_flow():
    return lfq.AffineFlow(
        n_blocks=8, hidden=(8, 8), activation="leaky_relu", bias=True, scale="exp(s)", rescale=False, seed=2
    )


def noise(L, n, dtype, seed=0, width=1.0):
    return (width * np.random.default_rng(seed).standard_normal((n, L, L))).astype(dtype)


def lfq_hmc(L, n, dtype, trajectories, flow=None, threads=1, steps=STEPS):
    t = theory(L).pullback(flow) if flow else theory(L)
    h = lfq.HMC(t, tau=EPS * steps, n_steps=steps, dtype=dtype, n_threads=threads)
    state = h.advance(h.start(n, 1, phi=noise(L, n, dtype, width=0.7)), 1, 1, measure=False).state
    return lambda: h.advance(state, 1, trajectories, measure=False)


def lfq_evolve(L, n, dtype, steps, flow=None):
    t = theory(L).pullback(flow) if flow else theory(L)
    h = lfq.HMC(t, tau=EPS * steps, n_steps=steps, dtype=dtype, n_threads=1)
    z, p = noise(L, n, dtype, 1, 0.7), noise(L, n, dtype, 2)
    return lambda: h.evolve(z, p)


def lfq_loss(L, n, dtype, flow):
    z, program, weights, record = noise(L, n, dtype, 3), flow.program((L, L)), flow.weights, theory(L)._record()
    action, log_det, gradient = np.empty(n), np.empty(n), np.empty(flow.n_weights)

    def call():
        _core.flow_loss(L * L, program, weights, record, z, action, log_det, gradient, 1)
        return (action - log_det).mean(), gradient

    return call


def lfq_sample(L, n, dtype, flow):
    z = noise(L, n, dtype, 3)
    return lambda: flow.forward(z, 1)


# ---- the work, in the peers ----------------------------------------------------------------


def numba_hmc(L, n, dtype, trajectories):
    import hmc_numba

    phi = hmc_numba.grouped(noise(L, n, dtype, width=0.7), hmc_numba.GROUP[dtype, L])
    seeds = iter(range(10**9))
    return lambda: hmc_numba.KERNELS[dtype]["hmc"](phi, BETA, LAM, EPS, STEPS, trajectories, next(seeds))


def _jax(dtype):
    import jax

    jax.config.update("jax_enable_x64", True)
    import flow_jax
    import hmc_jax

    return jax, lambda v: jax.numpy.asarray(v, dtype), hmc_jax, flow_jax


JAX_HMC_GROUP = {16: 256, 64: 16, 256: 1}


def jax_hmc(L, n, dtype, trajectories):
    jax, real, hmc, _ = _jax(dtype)
    phi, seeds = real(noise(L, n, dtype, width=0.7)), iter(range(10**9))
    arguments = (real(BETA), real(LAM), real(EPS), STEPS, trajectories, min(n, JAX_HMC_GROUP[L]))
    return lambda: jax.block_until_ready(hmc.hmc(phi, next(seeds), *arguments))


def jax_evolve(L, n, dtype, steps, flow):
    jax, real, _, flows = _jax(dtype)
    z, p = real(noise(L, n, dtype, 1, 0.7)), real(noise(L, n, dtype, 2))
    call = flows.evolve
    arguments = (real(flow.weights), real(BETA), real(LAM), real(EPS), steps, flows.FORM["step"], 1)
    return lambda: jax.block_until_ready(call(z, p, *arguments))


def jax_loss(L, n, dtype, flow, plain=False):
    jax, real, _, flows = _jax(dtype)
    form, group = ("conv", n) if plain else flows.LOSS[L, dtype]
    z, arguments = real(noise(L, n, dtype, 3)), (real(flow.weights), real(BETA), real(LAM), form, min(n, group))
    return lambda: jax.block_until_ready(flows.loss_gradient(z, *arguments))


def plain_jax_loss(L, n, dtype, flow):
    """The first way to write it: a circular convolution, the whole batch at once."""
    return jax_loss(L, n, dtype, flow, plain=True)


def jax_sample(L, n, dtype, flow):
    jax, real, _, flows = _jax(dtype)
    z, weights = real(noise(L, n, dtype, 3)), real(flow.weights)
    return lambda: jax.block_until_ready(flows.sample(z, weights, flows.FORM["sample"], 1))


def torch_loss(L, n, dtype, flow):
    import flow_torch
    import torch

    torch.set_num_threads(1)
    model = flow_torch.Flow(flow.weights, extent=L, dtype=dtype)
    z = torch.tensor(noise(L, n, dtype, 3))
    return lambda: model.loss_gradient(z, BETA, LAM)


# ---- cases ---------------------------------------------------------------------------------
#
# name: (make(lfq or peer's maker), arguments, work, unit, {peer: (maker, target ratio, rate with the target)}).
# A rate is in sites per second: of HMC and steps one update of one site in one leapfrog step.


def cases(quick):
    small = 4 if quick else 1
    out = {}
    then = {
        "jax": {"float64": (0.35, 0.36, 0.30), "float32": (0.71, 0.63, 0.69)},
        "numba": {"float64": (1.45, 1.3, 1.4), "float32": (2.0, 2.4, 2.4)},
    }
    for dtype in DTYPES:
        for i, (L, n, t) in enumerate(((16, 256, 40), (64, 256, 8), (256, 32, 8))):
            target = {"jax": 8 if dtype == "float32" or L == 64 else None}
            target["numba"] = 2 if (dtype, L) == ("float64", 64) else None
            makers = {"jax": jax_hmc, "numba": numba_hmc}
            n, t = (n // small, t) if L > 16 else (n, t)
            peers = {p: (makers[p], target[p], then[p][dtype][i] * 1e9) for p in makers}
            name = f"HMC, L = {L}, {n} chains, {dtype}"
            out[name] = (lfq_hmc, (L, n, dtype, t), t * STEPS * n * L * L, peers)
        f, d = paper_flow(), deep_flow()
        pick = lambda a, b, dtype=dtype: {"float64": a, "float32": b}[dtype] * 1e6  # noqa: E731
        n = 64 // small
        peers = {"jax": (jax_evolve, 6, pick(55, 129))}
        out[f"flow-HMC leapfrog step, L = 64, {n} chains, {dtype}"] = (
            lfq_evolve, (64, n, dtype, STEPS, f), STEPS * n * 4096, peers)  # fmt: skip
        n = 1024 // small
        peers = {"jax": (jax_loss, 8, pick(22, 51))}
        out[f"training step, paper's net, L = 64, batch {n}, {dtype}"] = (
            lfq_loss, (64, n, dtype, f), n * 4096, peers)  # fmt: skip
        peers = {"jax": (jax_loss, 15, pick(9.5, 15)), "jax, plain": (plain_jax_loss, None, None)}
        out[f"training step, paper's net, L = 8, batch 1024, {dtype}"] = (
            lfq_loss, (8, 1024, dtype, f), 1024 * 64, peers)  # fmt: skip
        n = 64
        peers = {"torch": (torch_loss, 5, pick(0.086, 0.23))}
        out[f"training step, 16 couplings 8-8, L = 16, batch {n}, {dtype}"] = (
            lfq_loss, (16, n, dtype, d), n * 256, peers)  # fmt: skip
        n = 256 // small
        peers = {"jax": (jax_sample, None, pick(44, 122))}
        out[f"flow sampling, L = 64, {n} fields, {dtype}"] = (lfq_sample, (64, n, dtype, f), n * 4096, peers)
    return out


# ---- equal answers -------------------------------------------------------------------------


def _difference(ours, theirs):
    ours, theirs = np.asarray(ours, float), np.asarray(theirs, float)
    if ours.shape != theirs.shape:
        return float("inf")
    worst = np.abs(ours - theirs).max() / np.abs(ours).max()
    return float(worst) if np.isfinite(worst) else float("inf")


def check_hmc_numba(dtype, difference):
    import hmc_numba

    kernels = hmc_numba.KERNELS[dtype]
    for L in (16, 64, 256):
        c = hmc_numba.GROUP[dtype, L]
        n = max(4, c)
        phi, p = noise(L, n, dtype, 1, 0.7), noise(L, n, dtype, 2)
        x, q = hmc_numba.grouped(phi, c), hmc_numba.grouped(p, c)
        t = theory(L)
        difference("sums", "action", t.action(phi), kernels["actions"](x, BETA, LAM).reshape(-1))
        difference("fields", "force", t.force(phi), hmc_numba.ungrouped(kernels["forces"](x, BETA, LAM)))
        ours = lfq.HMC(t, tau=TAU, n_steps=STEPS, dtype=dtype, n_threads=1).evolve(phi, p)
        kernels["evolve"](x, q, BETA, LAM, EPS, STEPS)
        difference("fields", "trajectory", ours[0], hmc_numba.ungrouped(x))
        difference("fields", "trajectory", ours[1], hmc_numba.ungrouped(q))
    z = np.empty(2**18, dtype)
    (hmc_numba.normals_f64 if dtype == "float64" else hmc_numba.normals_f32)(np.uint64(7), z)
    if not (abs(z.mean()) < 0.01 and abs(z.std() - 1) < 0.01 and abs((z**4).mean() - 3) < 0.1):
        difference("sums", "normals", np.ones(1), np.array([np.inf]))


def check_hmc_jax(dtype, difference):
    _, real, hmc, _ = _jax(dtype)
    for L in (16, 64):
        phi, p, t = noise(L, 4, dtype, 1, 0.7), noise(L, 4, dtype, 2), theory(L)
        difference("sums", "action", t.action(phi), hmc.action(real(phi), real(BETA), real(LAM)))
        difference("fields", "force", t.force(phi), hmc.force(real(phi), real(BETA), real(LAM)))
        ours = lfq.HMC(t, tau=TAU, n_steps=STEPS, dtype=dtype, n_threads=1).evolve(phi, p)
        theirs = hmc.evolve(real(phi), real(p), real(BETA), real(LAM), real(EPS), STEPS, 2)
        difference("fields", "trajectory", ours[0], theirs[0])
        difference("fields", "trajectory", ours[1], theirs[1])


def check_flow_jax(dtype, difference):
    _, real, _, flows = _jax(dtype)
    flow = paper_flow()
    for L, n in ((64, 8), (8, 256)):
        x, log_det = lfq_sample(L, n, dtype, flow)()
        theirs = flows.sample(real(noise(L, n, dtype, 3)), real(flow.weights), flows.FORM["sample"], 1)
        difference("fields", "flow x", x, theirs[0])
        difference("sums", "log_det", log_det, theirs[1])
        ours = lfq_loss(L, n, dtype, flow)()
        for maker in (jax_loss, plain_jax_loss):
            theirs = maker(L, n, dtype, flow)()
            difference("sums", "loss", ours[0], theirs[0])
            difference("sums", "loss gradient", ours[1], theirs[1])
    # The force jumps where s changes sign, and rounding decides the side: float32 over one step only.
    steps = STEPS if dtype == "float64" else 1
    ours, theirs = lfq_evolve(64, 4, dtype, steps, flow)(), jax_evolve(64, 4, dtype, steps, flow)()
    difference("fields", "flow-HMC steps", ours[0], theirs[0])


def check_flow_torch(dtype, difference):
    import flow_torch
    import torch

    flow = deep_flow()
    ours = lfq_loss(16, 64, dtype, flow)()
    x, log_det = lfq_sample(16, 64, dtype, flow)()
    model = flow_torch.Flow(flow.weights, dtype=dtype)
    with torch.no_grad():
        theirs = model.forward(torch.tensor(noise(16, 64, dtype, 3)))
    difference("fields", "flow x", x, theirs[0].numpy())
    difference("sums", "log_det", log_det, theirs[1].numpy())
    loss, gradient = torch_loss(16, 64, dtype, flow)()
    difference("sums", "loss", ours[0], loss.item())
    difference("sums", "loss gradient", ours[1], np.concatenate([g.numpy().ravel() for g in gradient]))


CHECKS = {
    numba_hmc: check_hmc_numba,
    jax_hmc: check_hmc_jax,
    jax_evolve: check_flow_jax,
    jax_loss: check_flow_jax,
    plain_jax_loss: check_flow_jax,
    jax_sample: check_flow_jax,
    torch_loss: check_flow_torch,
}


def check_answers():
    """{(peer's maker, dtype): "" or what differs}, and the largest differences found."""
    verdict, found = {}, {}
    for dtype in DTYPES:
        for check in dict.fromkeys(CHECKS.values()):
            wrong = []

            def difference(kind, what, ours, theirs, dtype=dtype, check=check, wrong=wrong):
                d = _difference(ours, theirs)
                key = f"{check.__name__[6:]} {dtype} {what}"
                found[key] = max(found.get(key, 0.0), d)
                if not d <= TOLERANCE[dtype][kind]:
                    wrong.append(f"{what} differs by {d:.1e}")

            try:
                check(dtype, difference)
            except ImportError as error:
                if error.name not in ("jax", "jaxlib", "numba", "torch"):
                    raise
                wrong.append("not installed")
            for maker in (m for m, c in CHECKS.items() if c is check):
                verdict[maker, dtype] = "; ".join(dict.fromkeys(wrong))
    return verdict, found


# ---- times ---------------------------------------------------------------------------------


def alternate(calls, repeats, clock=time.process_time, least=0.02):
    """Median seconds of every call, taken in turns. The one named "worker" repeats and times by itself."""
    inner, times = {}, {name: [] for name in calls}
    for name, call in calls.items():
        call()
        begin = clock()
        call()
        inner[name] = 1 if name == "worker" else max(1, int(least / max(clock() - begin, 1e-5)))
    for _ in range(repeats):
        for name, call in calls.items():
            begin = clock()
            for _ in range(inner[name]):
                call()
            times[name].append((clock() - begin) / inner[name])
    return {name: statistics.median(t) for name, t in times.items()}


class Worker:
    """lfq on another instruction set, in a process of its own that does one call at a time when told."""

    def __init__(self, isa, quick):
        environment = {**os.environ, "LFQ_ISA": isa}
        command = [sys.executable, str(HERE / "run.py"), "--worker", *["--quick"] * quick]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment, text=True)
        self.isa = self.process.stdout.readline().strip()

    def seconds(self, case):
        """Processor seconds of one call."""
        self.process.stdin.write(case + "\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def serve(quick):
    """The other end of a `Worker`."""
    print(_core.isa(), flush=True)
    known, call, name = cases(quick), None, None
    for line in sys.stdin:
        if line.strip() != name:
            name = line.strip()
            make, arguments, _, _ = known[name]
            call = make(*arguments)
            call()
        begin, count = time.process_time(), 0
        while count == 0 or time.process_time() - begin < 0.02:
            call()
            count += 1
        print((time.process_time() - begin) / count, flush=True)


def time_cases(quick, repeats, verdict):
    lines = []
    worker = Worker("x86-64-v3", quick) if "x86-64-v3" in _core.isas().split(",") else None
    for name, (make, arguments, work, peers) in cases(quick).items():
        dtype = name.rsplit(", ", 1)[1]
        calls = {"lfq": make(*arguments)}
        for peer, (maker, _, _) in peers.items():
            if not verdict[maker, dtype]:
                calls[peer] = maker(*arguments)
        other = []
        if worker:
            calls["worker"] = lambda name=name, other=other: other.append(worker.seconds(name))
        seconds = alternate(calls, repeats)
        line = {"case": name, "lfq": work / seconds["lfq"]}
        if worker:
            line[worker.isa] = work / statistics.median(other[2:])
        line["peers"] = {
            peer: {
                "rate": work / seconds[peer] if peer in seconds else None,
                "ratio": seconds[peer] / seconds["lfq"] if peer in seconds else None,
                "why_not": verdict[maker, dtype],
                "target": target,
                "rate_with_target": then,
            }
            for peer, (maker, target, then) in peers.items()
        }
        lines.append(line)
        shown = {k: f"{p['ratio']:.1f}" for k, p in line["peers"].items() if p["ratio"]}
        print(f"{name}: {_rate(line['lfq'])}, ratios {shown}", file=sys.stderr, flush=True)
    if worker:
        worker.close()
    return lines


def measure_lfq(quick, repeats):
    """lfq against itself and against what bounds it: {what: (value, target in words, reached)}."""
    out, small = {}, 4 if quick else 1
    for dtype in DTYPES:
        L, n = 64, 256 // small
        normals = np.empty((n, L, L), dtype)
        calls = {
            "trajectory": lfq_hmc(L, n, dtype, 4),
            "longer": lfq_hmc(L, n, dtype, 4, steps=3 * STEPS),
            "normals": lambda x=normals, n=n: _core.normal(1, _core.PURPOSES["momenta"], 0, 0, n, x, 1),
            "plain": lfq_hmc(L, 64, dtype, 4),
            "flow": lfq_hmc(L, 64, dtype, 1, paper_flow()),
        }
        s = alternate(calls, repeats)
        share, cost = 4 * s["normals"] / s["trajectory"], s["flow"] / (s["plain"] / 4)
        rest = 1 - (s["longer"] - s["trajectory"]) / 2 / s["trajectory"]
        out[f"normals in a call of their own / 10-step trajectory, L = 64, {dtype}"] = (
            share, "at most 0.15", share <= 0.15)  # fmt: skip
        out[f"all but the steps (refresh, energies, accept, copies) in it, by 10 against 30 steps, {dtype}"] = (
            rest, "refresh at most 0.15", rest <= 0.15)  # fmt: skip
        out[f"flow-HMC / HMC, cost of a 10-step trajectory, L = 64, {dtype}"] = (cost, "at most 8", cost <= 8)
        few, many = lfq_hmc(16, 64, dtype, 4096 // small), lfq_hmc(16, 4096, dtype, 64 // small)
        s = alternate({"few": few, "many": many}, repeats)
        ratio = s["few"] / s["many"]
        out[f"speed with 4096 chains / with 64, L = 16, {dtype}"] = (ratio, "at least 0.97", ratio >= 0.97)
        try:
            import hmc_numba

            for L, n in ((16, 256), (64, 64), (256, 8), (1024, 2)):
                x, p = noise(L, n, dtype, 1, 0.7)[..., None], noise(L, n, dtype, 2)[..., None]
                stream, calls = hmc_numba.KERNELS[dtype]["stream"], {}
                for steps in (20, 60):
                    calls["lfq", steps] = lfq_evolve(L, n, dtype, steps)
                    calls["stream", steps] = partial(stream, x, p, LAM, EPS, steps)
                s = alternate(calls, repeats + 2)
                step = {who: (s[who, 60] - s[who, 20]) / (40 * n * L * L) for who in ("lfq", "stream")}
                bound = step["stream"] / step["lfq"]
                out[f"one step ({1e-9 / step['lfq']:.1f} G/s) / kick and drift alone, L = {L}, {dtype}"] = (
                    bound, "at least 0.6", bound >= 0.6)  # fmt: skip
        except ImportError:
            pass
    if len(CORES) > 1:
        # A process of its own, on all cores from the start: threads keep the affinity they are born with.
        command = [sys.executable, str(HERE / "run.py"), "--threads", ",".join(map(str, CORES))]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        for name, ratio in json.loads(done.stdout).items():
            out[f"2 threads / 1 thread (wall clock), {name}"] = (ratio, "at least 1.9", ratio >= 1.9)
    return {k: {"value": v, "target": t, "reached": bool(r)} for k, (v, t, r) in out.items()}


def threads():
    """Speed with two threads over that with one: the best of many turns each, since both cores must be free."""
    out = {}
    for dtype in DTYPES:
        for name, flow, n, count in (("HMC, L = 64", None, 128, 8), ("flow-HMC, L = 64", paper_flow(), 256, 1)):
            calls, best = {t: lfq_hmc(64, n, dtype, count, flow, t) for t in (1, 2)}, {1: 1e9, 2: 1e9}
            for _ in range(25):
                for t, call in calls.items():
                    begin = time.perf_counter()
                    call()
                    best[t] = min(best[t], time.perf_counter() - begin)
            out[f"{name}, {dtype}"] = best[1] / best[2]
    print(json.dumps(out))


# ---- report --------------------------------------------------------------------------------


def machine():
    model = "unknown processor"
    if Path("/proc/cpuinfo").exists():
        lines = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
        model = lines[0].split(":", 1)[1].strip() if lines else model
    return f"{model}, {os.cpu_count()} cores"


def versions():
    out = {"python": sys.version.split()[0], "lfq": f"{_core.version()} ({_core.isa()})"}
    for package in ("numpy", "jax", "torch", "numba"):
        try:
            out[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            out[package] = "not installed"
    return out


def _rate(value):
    if value is None:
        return "-"
    return f"{value / 1e9:.2f} G" if value >= 1e9 else f"{value / 1e6:.3g} M"


def markdown(result):
    lines = [
        f"{result['machine']}; {result['date']}; load {result['load']:.1f}; "
        + ", ".join(f"{k} {v}" for k, v in result["versions"].items()),
        "",
        "| work | lfq, sites/s | x86-64-v3 / best | peer | peer, sites/s | with the target | ratio | target | reached "
        "|",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for line in result["cases"]:
        other = line.get("x86-64-v3")
        for peer, p in line["peers"].items():
            ratio = p["why_not"] or f"{p['ratio']:.1f}"
            target = "-" if p["target"] is None else p["target"]
            reached = "-" if None in (p["target"], p["ratio"]) else ("yes" if p["ratio"] >= p["target"] else "no")
            v3 = f"{other / line['lfq']:.2f}" if other else "-"
            lines.append(
                f"| {line['case']} | {_rate(line['lfq'])} | {v3} | {peer} | {_rate(p['rate'])} | "
                f"{_rate(p['rate_with_target'])} | {ratio} | {target} | {reached} |"
            )
    lines += ["", "| lfq by itself | value | target | reached |", "|---|---|---|---|"]
    for name, entry in result["lfq"].items():
        lines.append(f"| {name} | {entry['value']:.2f} | {entry['target']} | {'yes' if entry['reached'] else 'no'} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description="lfq beside JAX, PyTorch and Numba: the table of ratios")
    parser.add_argument("--quick", action="store_true", help="smaller batches; for trying it out")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "peers.json")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--threads", metavar="CORES", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.threads:
        threads()
        return
    if options.worker:
        serve(options.quick)
        return
    verdict, differences = check_answers()
    result = {
        "machine": machine(),
        "date": datetime.date.today().isoformat(),
        "load": round(os.getloadavg()[0], 2),
        "versions": versions(),
        "repeats": 5,
        "clock": "process_time",
        "quick": options.quick,
        "tolerance": TOLERANCE,
        "differences": differences,
        "cases": time_cases(options.quick, 5, verdict),
        "lfq": measure_lfq(options.quick, 5),
    }
    print(markdown(result))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    if any(why not in ("", "not installed") for why in verdict.values()):
        sys.exit("answers differ; see the table")


if __name__ == "__main__":
    main()
