"""What a call costs from each language, and an action of one's own beside the built-in one.

    python -m benchmarks.overhead [--results FILE]     measure, and write JSON
    python -m benchmarks.overhead --draw               put the tables of that JSON into docs/embedding.md

One field at a time, float64, one thread, processor time: the kernel's own time is in every number, and what differs
between columns is the call. JAX and PyTorch are left out where they are not installed, C++ where there is no compiler.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numba import njit

import lfq
from lfq import _core, embedding, native

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "overhead.json"
GUIDE = ROOT / "docs" / "embedding.md"
SIZES = (8, 64)
KERNELS = ("action", "force", "flow forward")

CPP = """
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <lfq/action.hpp>
#include <lfq/phi4.hpp>

template <class F>
double seconds(F&& f) {
  long n = 1;
  for (double best = 1e9, took, repeats = 0;;) {
    const std::clock_t begin = std::clock();
    for (long i = 0; i < n; ++i) f();
    took = double(std::clock() - begin) / CLOCKS_PER_SEC;
    if (took < 0.02) { n *= 2; continue; }
    best = took / n < best ? took / n : best;
    if (++repeats == 9) return best;
  }
}

int main(int, char** argv) {
  const int32_t n = std::atoi(argv[1]), chains = 16;
  lfq::theory theory({n, n}, 0.6, 0.5);
  std::vector<lfq_layer> layers(3);
  for (int i = 0; i < 3; ++i) {
    layers[i].kind = i < 2 ? LFQ_LAYER_COUPLING : LFQ_LAYER_RESCALE;
    layers[i].ndim = 2;
    layers[i].extent[0] = layers[i].extent[1] = n;
    layers[i].parity = i & 1;
    layers[i].kernel_size = 3;
    layers[i].weight_offset = 18 * i;
  }
  lfq::flow flow(layers, std::vector<double>(37, 0.1), theory.volume());
  std::vector<double> phi(size_t(n) * n), out(phi.size());
  for (size_t i = 0; i < phi.size(); ++i) phi[i] = double(7 * i % 23) / 16 - 0.7;
  double s;
  std::printf("%g ", seconds([&] { theory.action(1, phi.data(), &s, 1); }));
  std::printf("%g ", seconds([&] { theory.force(1, phi.data(), out.data(), 1); }));
  std::printf("%g ", seconds([&] { flow.forward(1, phi.data(), out.data(), &s, 1); }));
  auto own = lfq::site_action<double>({n, n}, lfq::phi4_site<double>(0.6, 0.5));
  lfq::hmc_settings settings;
  settings.n_threads = 1;
  lfq::hmc<double> hmc(own.get(), settings);
  hmc.start(chains, 1);
  std::printf("%g\\n", seconds([&] { hmc.advance(1, 50, false); }) / (50 * chains));
}
"""


def seconds(call: Callable[[], object]) -> float:
    """Of one call, by the clock of the process, which stands still while others run: the best of nine repeats."""
    call()
    n, times = 1, []
    while len(times) < 9:
        begin = time.process_time()
        for _ in range(n):
            call()
        took = time.process_time() - begin
        if took < 0.02:
            n *= 2
        else:
            times.append(took / n)
    return min(times)


def cpp(size: int) -> list[float] | None:
    compiler = next((c for c in ("c++", "g++") if shutil.which(c)), None)
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as directory:
        source, program = Path(directory) / "overhead.cpp", Path(directory) / "overhead"
        source.write_text(CPP)
        flags = " ".join(embedding.OPTIONS[option]() for option in ("--includes", "--libs")).split()
        subprocess.run([compiler, "-std=c++17", "-O3", "-march=native", source, *flags, "-o", program], check=True)
        return [float(word) for word in subprocess.check_output([program, str(size)], text=True).split()]


def numba_loops(theory, flow, phi) -> list[float]:
    action, force, forward = native.lfq_phi4_action_f64, native.lfq_phi4_force_f64, native.lfq_flow_forward_f64
    record, flow = native.theory_record(theory), native.flow_record(flow, theory.shape)
    space = np.empty(
        max(
            native.workspace("phi4", "float64", record, 1, 1).size, native.workspace("flow", "float64", flow, 1, 1).size
        ),
        dtype=np.uint8,
    )
    values, out, n = np.empty(1), np.empty_like(phi), max(1, 200_000 // theory.volume)

    @njit
    def loop_action():
        for _ in range(n):
            action(record_address, 1, phi_address, values_address, space_address, size, 1)

    @njit
    def loop_force():
        for _ in range(n):
            force(record_address, 1, phi_address, out_address, space_address, size, 1)

    @njit
    def loop_forward():
        for _ in range(n):
            forward(flow_address, 1, phi_address, out_address, values_address, space_address, size, 1)

    # Addresses, since arrays that a function closes over would be copied into it.
    record_address, flow_address = record.ctypes.data, flow.ctypes.data
    phi_address, out_address, values_address = phi.ctypes.data, out.ctypes.data, values.ctypes.data
    space_address, size = space.ctypes.data, space.size
    times = []
    for loop in (loop_action, loop_force, loop_forward):
        loop()
        times.append(seconds(loop) / n)
    del record, flow
    return times


def calls(theory, flow, phi) -> dict[str, list[Callable[[], object]]]:
    """For each consumer the three calls."""
    found = {
        "Python": [lambda: theory.action(phi, 1), lambda: theory.force(phi, 1), lambda: flow.forward(phi, 1)],
    }
    try:
        import jax

        jax.config.update("jax_enable_x64", True)
        import lfq.jax

        functions = (
            lambda p: lfq.jax.action(theory, p),
            lambda p: lfq.jax.force(theory, p),
            lambda p: lfq.jax.forward(flow, p),
        )
        on_device = jax.numpy.asarray(phi)
        compiled = [jax.jit(function) for function in functions]
        found["JAX"] = [lambda f=f: jax.block_until_ready(f(on_device)) for f in compiled]
    except ImportError:
        pass
    try:
        import torch

        import lfq.torch

        torch.set_num_threads(1)
        tensor = torch.from_numpy(phi)
        found["PyTorch"] = [
            lambda: lfq.torch.action(theory, tensor),
            lambda: lfq.torch.force(theory, tensor),
            lambda: lfq.torch.forward(flow, tensor),
        ]
    except ImportError:
        pass
    return found


def own_actions(theory) -> dict[str, float]:
    """Seconds of a trajectory of 10 steps for one of 16 chains: the built-in action, and the same from Numba."""
    beta, lam = theory.beta, theory.lam
    own = lfq.CustomAction.from_sites(
        theory.shape,
        lambda p, forward: p * p * (lam * p * p + (1 - 2 * lam)) - beta * p * forward,
        lambda p, neighbours: beta * neighbours - p * (4 * lam * p * p + 2 * (1 - 2 * lam)),
    )
    found = {}
    for name, action in (("built-in", theory), ("Numba from_sites", own)):
        hmc = lfq.HMC(action, n_steps=10, n_threads=1)
        state = hmc.start(16, seed=1)
        found[name] = seconds(lambda h=hmc, s=state: h.advance(s, 1, 50, measure=False)) / (50 * 16)
    return found


def measure() -> dict:
    os.environ["LFQ_NUM_THREADS"] = "1"
    results: dict = {
        "machine": platform.machine(),
        "isa": _core.isa(),
        "python": sys.version.split()[0],
        "calls": {},
        "trajectories": {},
    }
    for size in SIZES:
        theory, flow = lfq.Phi4((size, size), 0.6, 0.5), lfq.AffineFlow()
        flow.weights = np.full(37, 0.1)
        phi = np.random.default_rng(1).normal(size=theory.shape) / 2
        table = {"Numba": numba_loops(theory, flow, phi)}
        own = own_actions(theory)
        measured = cpp(size)
        if measured:
            table["C++"], own["C++ functor"] = measured[:3], measured[3]
        for name, three in calls(theory, flow, phi).items():
            table[name] = [seconds(call) for call in three]
        results["calls"][size], results["trajectories"][size] = table, own
    return results


def tables(results: dict) -> dict[str, str]:
    """The two tables in Markdown, by the name of their place in the guide."""
    columns = [name for name in ("C++", "Numba", "Python", "JAX", "PyTorch") if name in results["calls"]["8"]]
    lines = [f"| microseconds per call | {' | '.join(columns)} |", f"|---|{'--:|' * len(columns)}"]
    for size in map(str, SIZES):
        for i, kernel in enumerate(KERNELS):
            cells = (f"{1e6 * results['calls'][size][name][i]:.3g}" for name in columns)
            lines.append(f"| {kernel}, {size} x {size} | {' | '.join(cells)} |")
    own = [name for name in ("built-in", "C++ functor", "Numba from_sites") if name in results["trajectories"]["8"]]
    more = [f"| microseconds per trajectory | {' | '.join(own)} |", f"|---|{'--:|' * len(own)}"]
    for size in map(str, SIZES):
        built_in = results["trajectories"][size]["built-in"]
        cells = []
        for name in own:
            value = results["trajectories"][size][name]
            ratio = "" if name == "built-in" else f" ({value / built_in:.1f} times)"
            cells.append(f"{1e6 * value:.3g}{ratio}")
        more.append(f"| {size} x {size} | {' | '.join(cells)} |")
    return {"calls": "\n".join(lines), "actions": "\n".join(more)}


def draw(results: dict) -> None:
    text = GUIDE.read_text()
    for name, table in tables(results).items():
        text, n = re.subn(
            rf"(<!-- table: {name} -->\n).*?(<!-- end -->)",
            lambda m, t=table: f"{m[1]}{t}\n{m[2]}",
            text,
            flags=re.DOTALL,
        )
        if n != 1:
            raise SystemExit(f"{GUIDE}: has no place for the table {name}")
    GUIDE.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--draw", action="store_true")
    arguments = parser.parse_args()
    if arguments.draw:
        return draw(json.loads(arguments.results.read_text()))
    arguments.results.write_text(json.dumps(measure(), indent=1) + "\n")


if __name__ == "__main__":
    main()
