"""Speed of the CUDA kernels, beside CuPy arrays and, where they are installed for the GPU, JAX and PyTorch.

    python -m benchmarks.gpu --build    # builds this checkout, GPU tests, then everything; benchmarks/results/gpu.json
    python -m benchmarks.gpu            # the same of what is built
    python -m benchmarks.gpu --tables   # from that the tables of benchmarks/README.md

Device events give the times: the median of several samples after a warm-up, on a stream that does nothing else.
A site-update is one leapfrog step of one site; trajectories include refresh, energies and accept step.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def build() -> None:
    """The libraries of this checkout, with CUDA, laid into its package."""
    arguments = f"{os.environ.get('LFQ_CMAKE_ARGS', '')} -DLFQ_CUDA=ON"
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(
        command, check=True, cwd=HERE.parent, env=os.environ | {"LFQ_CMAKE_ARGS": arguments}, stdout=sys.stderr
    )


if __name__ == "__main__" and "--build" in sys.argv:
    build()

import numpy as np  # noqa: E402

import lfq  # noqa: E402, which cannot be imported before it is built
from lfq import _cuda, _gpu  # noqa: E402

BETA, LAM, STEPS = 0.634, 0.5, 10
FLOW_SIZES = (((16, 16), 65536), ((64, 64), 8192))  # that fill the chip

GPU_TESTS = ("test_gpu.py", "test_cuda.py", "embed/test_embed_cuda.py")

# A multiprocessor's multiply-adds a clock, by compute capability; others are not known here.
MULTIPLY_ADDS = {"90": {"float64": 64, "float32": 128}}


def seconds(call, repeats: int = 7, least: float = 0.02) -> float:
    """Median device time of a call, which is repeated within a sample until that takes `least` seconds."""
    import cupy as cp

    def sample(inner: int) -> float:
        start, stop = cp.cuda.Event(), cp.cuda.Event()
        start.record()
        for _ in range(inner):
            call()
        stop.record()
        stop.synchronize()
        return cp.cuda.get_elapsed_time(start, stop) / 1e3

    sample(1)
    inner, used = 1, sample(1)
    while used < least:
        inner = max(inner + 1, int(1.3 * inner * least / max(used, least / 1000)))
        used = sample(inner)
    return statistics.median(sample(inner) for _ in range(repeats)) / inner


def machine() -> dict:
    import cupy as cp

    device = cp.cuda.Device()
    attributes, runtime = device.attributes, cp.cuda.runtime
    clock = attributes["ClockRate"] * 1e3  # nominal
    processors = attributes["MultiProcessorCount"]
    per_clock = MULTIPLY_ADDS.get(device.compute_capability, {})
    # Large enough that the second-level cache holds little of it.
    big, other = cp.empty(2**28), cp.empty(2**28)
    copy = 2 * big.nbytes / seconds(lambda: cp.copyto(other, big))
    return {
        "device": runtime.getDeviceProperties(device.id)["name"].decode(),
        "driver": runtime.driverGetVersion(),
        "runtime": runtime.runtimeGetVersion(),
        "architectures": _cuda.library().architectures,
        "multiprocessors": processors,
        "clock_hz": clock,
        "copy_bytes_per_s": copy,
        "multiply_adds_per_s": {dtype: n * processors * clock for dtype, n in per_clock.items()},
    }


def _fields(shape, n, dtype):
    """Fields that HMC has thermalised a little."""
    hmc = lfq.HMC(lfq.Phi4(shape, BETA if len(shape) == 2 else 0.35, LAM), n_steps=STEPS, dtype=dtype, device="cuda")
    return hmc.advance(hmc.start(n, seed=1), 1, 5, measure=False).state


def _trajectories(theory, state, dtype, count):
    """`count` trajectories by the kernels alone, nothing copied to the host."""
    hmc = lfq.HMC(theory, n_steps=STEPS, dtype=dtype, device="cuda")
    settings = hmc._settings(1, count, 1, 0, state.trajectory)
    z, n = state.latent.copy(), state.n_chains
    record, dh = theory._physical._record(), _gpu.empty((count, n))
    layers, weights = theory._program()
    if layers is None:
        resident = _cuda.library().call("resident", dtype, record)
        scratch = ("hmc", record, 0 if resident else n)
        return lambda: _gpu.call(
            "hmc", dtype, record, settings, 0, n, z.data.ptr, dh.data.ptr, None, None, None, workspace=scratch
        )
    flow, device_layers, alive = _gpu.flow_record(theory.volume, layers, weights)
    phi = _gpu.empty(z.shape, dtype)

    def call(_alive=alive):
        _gpu.call(
            "flow_hmc",
            dtype,
            flow,
            device_layers,
            record,
            settings,
            n,
            z.data.ptr,
            phi.data.ptr,
            dh.data.ptr,
            None,
            None,
            None,
            workspace=("flow", flow, n),
        )

    return call


def hmc_cases(found: dict) -> list[dict]:
    rows = []
    for dtype in ("float64", "float32"):
        size = np.dtype(dtype).itemsize
        for shape, n, count in (
            ((8, 8), 65536, 20),
            ((16, 16), 16384, 20),
            ((64, 64), 4096, 10),
            ((128, 128), 2048, 5),
            ((4096, 4096), 1, 1),
            ((16, 16, 16), 2048, 10),
            ((256, 256, 256), 1, 1),
        ):
            theory = lfq.Phi4(shape, BETA if len(shape) == 2 else 0.35, LAM)
            resident = bool(_cuda.library().call("resident", dtype, theory._record()))
            call = _trajectories(theory, _fields(shape, n, dtype), dtype, count)
            updates = theory.volume * n * count * STEPS
            rate = updates / seconds(call)
            row = {
                "kernel": "HMC",
                "shape": shape,
                "chains": n,
                "dtype": dtype,
                "resident": resident,
                "site_updates_per_s": rate,
            }
            if resident:
                # Four multiply-adds and 2 D additions, each of which takes a multiply-add's place.
                peak = found["multiply_adds_per_s"].get(dtype)
                row["of_arithmetic_bound"] = rate * (4 + 2 * theory.ndim) / peak if peak else None
            else:
                row["bytes_per_s"] = rate * 4 * size
                row["of_copy_bandwidth"] = row["bytes_per_s"] / found["copy_bytes_per_s"]
            rows.append(row)
    return rows


def field_cases(found: dict) -> list[dict]:
    rows = []
    for dtype in ("float64", "float32"):
        size, shape, n = np.dtype(dtype).itemsize, (64, 64), 8192
        theory, phi = lfq.Phi4(shape, BETA, LAM), _fields(shape, n, dtype).latent
        for name, call, arrays in (
            ("action", lambda theory=theory, phi=phi: theory.action(phi), 1),
            ("force", lambda theory=theory, phi=phi: theory.force(phi), 2),
            ("observables", lambda theory=theory, phi=phi: theory.measure(phi), 1),
            ("normals", lambda n=n, phi=phi: _gpu.normal(1, 0, 0, 0, n, phi), 1),
        ):
            used = seconds(call)
            rows.append(
                {
                    "kernel": name,
                    "shape": shape,
                    "chains": n,
                    "dtype": dtype,
                    "sites_per_s": phi.size / used,
                    "of_copy_bandwidth": arrays * phi.size * size / used / found["copy_bytes_per_s"],
                }
            )
    return rows


def flow_cases() -> list[dict]:
    rows, flow = [], lfq.AffineFlow(seed=1)
    for dtype in ("float64", "float32"):
        for shape, n in FLOW_SIZES:
            theory = lfq.Phi4(shape, BETA, LAM)
            z = _fields(shape, n, dtype).latent
            layers, weights = flow.program(shape), _gpu.asarray(flow.weights, "weights")
            action, log_det, gradient = _gpu.empty(n), _gpu.empty(n), _gpu.empty(weights.size)

            def loss(layers=layers, weights=weights, theory=theory, z=z, out=(action, log_det, gradient)):
                _gpu.flow_loss(theory.volume, layers, weights, theory._record(), z, *out)

            state = lfq.State(flow.inverse(z)[0], 0, 1)
            plain = seconds(_trajectories(theory, lfq.State(z, 0, 1), dtype, 4)) / 4
            pulled = seconds(_trajectories(theory.pullback(flow), state, dtype, 4)) / 4
            common = {"shape": shape, "chains": n, "dtype": dtype, "flow": "kernel 3, no hidden layer"}
            rows += [
                {"kernel": "flow forward", **common, "sites_per_s": z.size / seconds(lambda z=z: flow.forward(z))},
                {"kernel": "flow inverse", **common, "sites_per_s": z.size / seconds(lambda z=z: flow.inverse(z))},
                {"kernel": "loss gradient", **common, "sites_per_s": z.size / seconds(loss)},
                {"kernel": "training step", **common, "sites_per_s": z.size / _training_step(flow, theory, dtype, n)},
                {
                    "kernel": "flow-HMC",
                    **common,
                    "site_updates_per_s": z.size * STEPS / pulled,
                    "over_hmc": pulled / plain,
                },
            ]
    return rows


def _training_step(flow, theory, dtype, n) -> float:
    """Seconds of a whole step of lfq.train from Gaussian latents: those, loss, gradient, Adam."""
    import time

    def used(n_steps: int) -> float:
        begin = time.perf_counter()
        lfq.train(
            flow, lfq.Gaussian(theory.shape), theory, n_steps, n, dtype=dtype, seed=1, n_evaluation=2, device="cuda"
        )
        return time.perf_counter() - begin

    used(2)
    return statistics.median((used(60) - used(10)) / 50 for _ in range(3))


def multiscale_cases() -> list[dict]:
    """Flow-HMC through maps whose latents are those of all lattices."""
    rows = []
    for dtype in ("float64", "float32"):
        for extent, n in ((8, 65536), (16, 16384), (32, 4096), (64, 1024)):
            theory = lfq.Phi4((extent, extent), BETA, LAM)
            flow = lfq.MultiscaleFlow(extent.bit_length() - 1, seed=1)
            phi = _fields(theory.shape, n, dtype).latent
            latent = flow.inverse(phi)[0]
            plain = seconds(_trajectories(theory, lfq.State(phi, 0, 1), dtype, 4)) / 4
            pulled = seconds(_trajectories(theory.pullback(flow), lfq.State(latent, 0, 1), dtype, 1), 3)
            rows.append(
                {
                    "kernel": "flow-HMC",
                    "shape": theory.shape,
                    "chains": n,
                    "dtype": dtype,
                    "flow": "multiscale",
                    "site_updates_per_s": phi.size * STEPS / pulled,
                    "over_hmc": pulled / plain,
                }
            )
    return rows


def cupy_hmc(dtype, shape, n) -> float:
    """Site-updates/s of leapfrog steps on CuPy arrays, everything else left out."""
    import cupy as cp

    phi = _fields(shape, n, dtype).latent
    momenta, eps = cp.zeros_like(phi), np.dtype(dtype).type(0.1)

    def step():
        around = sum(cp.roll(phi, shift, axis) for axis in (1, 2) for shift in (1, -1))
        momenta[...] += eps * (BETA * around - 2 * phi * (1 - 2 * LAM + 2 * LAM * phi * phi))
        phi[...] += eps * momenta

    return phi.size / seconds(step)


def _wall(call, wait, repeats=5) -> float:
    """Seconds of a call of another library, which has its own streams."""
    import time

    wait(call())
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        for _ in range(10):
            out = call()
        wait(out)
        times.append((time.perf_counter() - begin) / 10)
    return statistics.median(times)


def peer_cases() -> list[dict]:
    """Other implementations of the same work; those not installed for the GPU are left out, by name."""
    rows = [
        {
            "kernel": "HMC",
            "library": "CuPy arrays",
            "shape": shape,
            "chains": n,
            "dtype": dtype,
            "site_updates_per_s": cupy_hmc(dtype, shape, n),
        }
        for dtype in ("float64", "float32")
        for shape, n in (((64, 64), 4096), ((4096, 4096), 1))
    ]
    sys.path.insert(0, str(HERE / "peers"))
    flow = lfq.AffineFlow(seed=1)
    try:
        import jax

        if jax.default_backend() != "gpu":
            raise ImportError("JAX sees no GPU")
        jax.config.update("jax_enable_x64", True)
        import flow_jax
        import hmc_jax
        import jax.numpy as jnp

        for dtype in ("float64", "float32"):
            z, real = jnp.asarray(_gpu.to_host(_fields((64, 64), 4096, dtype).latent)), jnp.dtype(dtype).type
            used = _wall(
                lambda z=z, real=real: hmc_jax.hmc(z, 1, real(BETA), real(LAM), real(0.1), STEPS, 10, len(z)),
                jax.block_until_ready,
            )
            rows.append(
                {
                    "kernel": "HMC",
                    "library": f"JAX {jax.__version__}",
                    "shape": (64, 64),
                    "chains": 4096,
                    "dtype": dtype,
                    "site_updates_per_s": z.size * STEPS * 10 / used,
                }
            )
            z, weights = (
                jnp.asarray(_gpu.to_host(_fields(*FLOW_SIZES[0], dtype).latent)),
                jnp.asarray(flow.weights, dtype),
            )
            used = min(
                _wall(
                    lambda z=z, w=weights, real=real, form=form: flow_jax.loss_gradient(
                        z, w, real(BETA), real(LAM), form, len(z)
                    ),
                    jax.block_until_ready,
                )
                for form in ("roll", "conv")
            )
            rows.append(
                {
                    "kernel": "loss gradient",
                    "library": f"JAX {jax.__version__}",
                    "shape": FLOW_SIZES[0][0],
                    "chains": FLOW_SIZES[0][1],
                    "dtype": dtype,
                    "sites_per_s": z.size / used,
                }
            )
    except ImportError as error:
        rows.append({"library": "JAX", "left_out": str(error)})
    try:
        import torch
        from torch.nn import functional

        if not torch.cuda.is_available():
            raise ImportError("PyTorch sees no GPU")
        for dtype in ("float64", "float32"):
            real = getattr(torch, dtype)
            z = torch.as_tensor(_gpu.to_host(_fields(*FLOW_SIZES[0], dtype).latent), dtype=real, device="cuda")
            taps = [
                torch.tensor(
                    flow.weights[18 * k : 18 * k + 18].reshape(2, 1, 3, 3), dtype=real, device="cuda"
                ).requires_grad_()
                for k in (0, 1)
            ]
            scale = torch.zeros((), dtype=real, device="cuda", requires_grad=True)
            active = [torch.tensor(np.indices((16, 16)).sum(axis=0) % 2 == k, device="cuda").to(real) for k in (0, 1)]

            def loss(z=z, taps=taps, scale=scale, active=active):
                x, log_det = z[:, None], 256 * scale
                for w, a in zip(taps, active, strict=True):
                    net = torch.tanh(functional.conv2d(functional.pad(x * (1 - a), (1,) * 4, mode="circular"), w))
                    q, t = -net[:, :1].abs() * a, net[:, 1:] * a
                    x, log_det = x * torch.exp(q) + t, log_det + q.sum(dim=(1, 2, 3))
                x = torch.exp(scale) * x[:, 0]
                x2, around = x * x, torch.roll(x, -1, 1) + torch.roll(x, -1, 2)
                s = (x2 * (1 - 2 * LAM + LAM * x2) - BETA * x * around).sum(dim=(1, 2))
                return torch.autograd.grad((s - log_det).mean(), [*taps, scale])

            used = _wall(loss, lambda out: torch.cuda.synchronize())
            rows.append(
                {
                    "kernel": "loss gradient",
                    "library": f"PyTorch {torch.__version__}",
                    "shape": FLOW_SIZES[0][0],
                    "chains": FLOW_SIZES[0][1],
                    "dtype": dtype,
                    "sites_per_s": z.numel() / used,
                }
            )
    except ImportError as error:
        rows.append({"library": "PyTorch", "left_out": str(error)})
    return rows


def _paired(rows: list[dict]) -> dict:
    """Rows by (kernel, map or library, shape, chains), those of both types side by side."""
    found = {}
    for row in rows:
        key = row["kernel"], row.get("flow") or row.get("library", ""), tuple(row["shape"]), row["chains"]
        found.setdefault(key, {})[row["dtype"]] = row
    return found


def _rate(row: dict) -> float:
    return row.get("site_updates_per_s") or row["sites_per_s"]


def rate_table(result: dict) -> str:
    """Rates in Markdown."""
    lines = ["| kernel | lattice, chains | float64, 1e9 /s | float32, 1e9 /s | of the bound |", "|---|---|--:|--:|--:|"]
    for (kernel, of, shape, chains), pair in _paired(result["rates"]).items():
        rows = [pair[dtype] for dtype in ("float64", "float32")]
        name, place = f"{kernel}, {of}" if of else kernel, " x ".join(map(str, shape))
        if kernel == "HMC":
            name += ", resident" if all(row["resident"] for row in rows) else ", tiled"
            if rows[1]["resident"] and not rows[0]["resident"]:
                name = "HMC, tiled and resident"
        shares = [row.get("of_arithmetic_bound") or row.get("of_copy_bandwidth") for row in rows]
        share = " / ".join(f"{value:.2f}" for value in shares) if all(shares) else ""
        if "over_hmc" in rows[0]:
            share = " / ".join(f"{row['over_hmc']:.3g}" for row in rows) + " times HMC"
        lines.append(
            f"| {name} | {place}, {chains} | {_rate(rows[0]) / 1e9:.3g} | {_rate(rows[1]) / 1e9:.3g} | {share} |"
        )
    return "\n".join(lines)


def peer_table(result: dict) -> str:
    """lfq over other implementations of the same work, in Markdown."""
    own = {key[:1] + key[2:]: pair for key, pair in _paired(result["rates"]).items() if key[1] != "multiscale"}
    lines = [
        "| kernel | lattice, chains | library | its float64, float32, 1e9 /s | lfq over it |",
        "|---|---|---|--:|--:|",
    ]
    peers = [row for row in result["peers"] if "kernel" in row]
    for (kernel, library, shape, chains), pair in _paired(peers).items():
        rows = [pair[dtype] for dtype in ("float64", "float32")]
        ratios = [_rate(own[kernel, shape, chains][row["dtype"]]) / _rate(row) for row in rows]
        rates = ", ".join(f"{_rate(row) / 1e9:.3g}" for row in rows)
        place = " x ".join(map(str, shape))
        lines.append(f"| {kernel} | {place}, {chains} | {library} | {rates} | {ratios[0]:.3g}, {ratios[1]:.3g} |")
    return "\n".join(lines)


def write_tables(result: dict, path: Path) -> None:
    """Both tables, between their marks in a README."""
    from .report import write_readme

    write_readme(path, {"gpu rates": rate_table(result), "gpu peers": peer_table(result)})


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gpu.json")
    parser.add_argument("--build", action="store_true", help="build the libraries of this checkout first")
    parser.add_argument("--no-tests", action="store_true", help="do not run the GPU tests first")
    parser.add_argument("--tables", action="store_true", help="only the tables of benchmarks/README.md, from --out")
    arguments = parser.parse_args()
    if arguments.tables:
        write_tables(json.loads(arguments.out.read_text()), HERE / "README.md")
        return 0
    reason = _gpu.missing()
    if reason is not None:
        print(f"benchmarks.gpu: {reason}; nothing was measured", file=sys.stderr)
        return 2
    if not arguments.no_tests:
        tests = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", *(HERE.parent / "tests" / name for name in GPU_TESTS)],
            env=os.environ | {"LFQ_REQUIRE_GPU": "1", "PYTHONPATH": str(HERE.parent)},
        )
        if tests.returncode:
            return tests.returncode
    found = machine()
    result = {
        "date": datetime.date.today().isoformat(),
        "lfq": lfq.__version__,
        "machine": found,
        "rates": hmc_cases(found) + field_cases(found) + flow_cases() + multiscale_cases(),
        "peers": peer_cases(),
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    for row in [found, *result["rates"], *result["peers"]]:
        print(
            "  ".join(
                f"{key}={value:.3g}" if isinstance(value, float) else f"{key}={value}" for key, value in row.items()
            )
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
