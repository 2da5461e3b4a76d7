"""All benchmarks without ASV, with the bounds of the machine measured in the same run.

python -m benchmarks.report            # four minutes; benchmarks/results/cpu.json and tables on stdout
python -m benchmarks.report --readme   # and the tables in benchmarks/README.md
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np

import lfq
from lfq import _core

from . import cases, costs, machine
from .timing import throughput

HERE = Path(__file__).parent
DTYPES = ("float64", "float32")
V3 = "x86-64-v3"
# Numba's bounds must use the vectors of the instruction set that lfq is made to use.
V3_ENVIRONMENT = {
    "LFQ_ISA": V3,
    "NUMBA_CPU_NAME": V3,
    "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma,+bmi,+bmi2,+lzcnt,+f16c,+movbe,+popcnt,+sse4.2",
}


def level(size: float, sizes: dict[str, int]) -> str:
    """The smallest cache that holds `size` bytes and leaves a fifth to others."""
    return next((name for name, capacity in sizes.items() if size <= 0.8 * capacity), "DRAM")


def bound(work: cases.Work, dtype: str, limits: dict) -> tuple[float, str, str]:
    """Units per second one core can reach, what binds, and where the work area lies."""
    speeds = {name: max(found.values()) for name, found in limits["bandwidth"].items()}
    at = level(work.group_bytes, limits["caches"])
    seconds, by = costs.seconds(
        work.phases,
        np.dtype(dtype).itemsize,
        limits["arithmetic"][dtype],
        speeds[at],
        speeds[level(work.array_bytes, limits["caches"])],
    )
    return 1 / seconds, at if by == "cache" else by, at


def measure(keys, n_threads: int, repeats: int, progress) -> dict:
    """Rates of (kernel, lattice, dtype), the better of two rounds: {key: (Rate, Work)}.

    A shared processor runs more slowly for seconds at a time, longer than all samples of a rate.
    """
    found = {}
    for _ in range(2):
        for key in keys:
            work = cases.build(*key, n_threads)
            rate = throughput(work.call, work.amount, n_threads, repeats)
            if key not in found or rate.value > found[key][0].value:
                found[key] = rate, work
            progress(" ".join(key) + f", {n_threads} threads")
    return found


def all_cases(kernels) -> list[tuple[str, str, str]]:
    return [(k, lattice, dtype) for k in kernels for lattice in cases.KERNELS[k].lattices for dtype in DTYPES]


def better(a: dict, b: dict) -> dict:
    """The larger of two measurements of the machine, entry by entry."""
    return {key: better(a[key], b[key]) if isinstance(a[key], dict) else max(a[key], b[key]) for key in a}


def one_thread(kernels, repeats: int, progress) -> tuple[dict, list[dict]]:
    """Bounds of the machine, measured before and after, and the rows of one thread."""
    limits = machine.measure()
    found = measure(all_cases(kernels), 1, repeats, progress)
    limits = better(limits, machine.measure())
    rows = []
    for (kernel, lattice, dtype), (rate, work) in found.items():
        most, by, at = bound(work, dtype, limits)
        rows.append(
            {
                "kernel": kernel, "lattice": lattice, "dtype": dtype, "unit": cases.KERNELS[kernel].unit,
                "rate": rate.value, "spread": rate.spread, "bound": most, "bound_by": by, "work_area_in": at,
                "fraction": rate.value / most, "counts": costs.as_table_row(work.phases),
            }
        )  # fmt: skip
    return limits, rows


def all_threads(keys, single: dict, repeats: int, progress) -> list[dict]:
    """The rows of all threads, with their ratio to one."""
    n_threads = _core.max_threads()
    return [
        {
            "kernel": key[0],
            "lattice": key[1],
            "dtype": key[2],
            "rate": rate.value,
            "spread": rate.spread,
            "share": rate.share,
            "ratio": rate.value / single[key]["rate"],
        }
        for key, (rate, _) in measure(keys, n_threads, repeats, progress).items()
    ]


def forced_v3(kernels, repeats: int, progress) -> dict | None:
    """The rows of one thread on AVX2, from a process of its own; None where there is no such choice."""
    if V3 not in _core.isas().split(",") or _core.isa() == V3:
        return None
    progress(f"{V3} in a process of its own")
    command = [
        sys.executable,
        "-m",
        "benchmarks.report",
        "--worker",
        "--repeats",
        str(repeats),
        "--kernels",
        *kernels,
    ]
    done = subprocess.run(
        command,
        cwd=HERE.parent,
        env=os.environ | V3_ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def complete(kernels, repeats: int, progress) -> dict:
    """The whole report."""
    limits, rows = one_thread(kernels, repeats, progress)
    several = _core.max_threads() > 1
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": {
            "model": machine.model_name(),
            "cores": os.cpu_count(),
            "threads": _core.max_threads(),
        },
        "versions": {
            "lfq": lfq.__version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "numba": numba.__version__,
        },
        "isa": _core.isa(),
        "limits": limits,
        "one_thread": rows,
        "all_threads": all_threads(all_cases(kernels), by_case(rows), repeats, progress) if several else None,
        V3: forced_v3(kernels, repeats, progress),
    }


def by_case(rows: list[dict]) -> dict:
    return {(row["kernel"], row["lattice"], row["dtype"]): row for row in rows}


def _pair(values, form: str) -> str:
    return " / ".join("-" if v is None else format(v, form) for v in values)


def machine_table(result: dict) -> str:
    limits, narrow = result["limits"], (result["x86-64-v3"] or {}).get("limits")
    lines = [f"| one core | {result['isa']} |" + (f" {V3} |" if narrow else "")]
    lines.append("|---|---|" + ("---|" if narrow else ""))
    columns = [limits] + [narrow] * bool(narrow)

    def add(name, get, form=".1f"):
        lines.append(f"| {name} | " + " | ".join(_pair(get(c), form) for c in columns) + " |")

    for key, name in (
        ("fma", "multiply-adds, f64 / f32, G/s"),
        ("issue", "all operations, multiply-adds and additions mixed, G/s"),
        ("divide", "divisions, G/s"),
        ("sqrt", "square roots, G/s"),
    ):
        add(name, lambda c, key=key: [c["arithmetic"][d][key] / 1e9 for d in DTYPES])
    for name in limits["bandwidth"]:
        add(
            f"{name}: copy / update in place, GB/s",
            lambda c, name=name: [c["bandwidth"][name][k] / 1e9 for k in ("copy", "update")],
            ".0f",
        )
    return "\n".join(lines)


def _share(row: dict) -> str:
    return f"{row['ratio']:.2f}" + (f" ({row['share']:.2f})" if row["share"] < 0.9 else "")


def rate_table(result: dict) -> str:
    rows, many = by_case(result["one_thread"]), by_case(result["all_threads"] or [])
    narrow = by_case((result["x86-64-v3"] or {}).get("one_thread", []))
    n = result["machine"]["threads"]
    head = ["kernel", "lattice", "f64, M/s", "of bound", "f32, M/s", "of bound", "bound by, f64 / f32"]
    head += [f"{n} threads / 1, f64, f32"] * bool(many) + ["v3 / v4, f64, f32"] * bool(narrow)
    lines = ["| " + " | ".join(head) + " |", "|---|---" + "|--:" * 4 + "|---" * (len(head) - 6) + "|"]
    last = None
    for kernel, lattice, dtype in rows:
        if dtype != DTYPES[0]:
            continue
        keys = [(kernel, lattice, d) for d in DTYPES]
        pair = [rows[key] for key in keys]
        title = cases.KERNELS[kernel].title if kernel != last else ""
        last = kernel
        cells = [title, lattice]
        for r in pair:
            cells += [f"{r['rate'] / 1e6:{'.3g' if r['rate'] < 1e8 else '.0f'}}", f"{r['fraction']:.0%}"]
        cells.append(" / ".join(r["bound_by"] for r in pair))
        if many:
            cells.append(", ".join(_share(many[key]) for key in keys))
        if narrow:
            cells.append(
                ", ".join(f"{narrow[key]['rate'] / r['rate']:.2f}" for key, r in zip(keys, pair, strict=True))
            )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def derived_table(result: dict) -> str:
    """Ratios between kernels of one run."""
    rows = by_case(result["one_thread"])
    bandwidth, caches = result["limits"]["bandwidth"], result["limits"]["caches"]

    def ratio(a, b, lattice, dtype):
        found = [rows.get((k, lattice, dtype)) for k in (a, b)]
        return None if None in found else found[0]["rate"] / found[1]["rate"]

    def stencil(lattice, dtype):
        row = rows.get(("leapfrog", lattice, dtype))
        if row is None:
            return None
        at = row["work_area_in"] if row["work_area_in"] in caches else "DRAM"
        return row["rate"] / (bandwidth[at]["update"] / (4 * np.dtype(dtype).itemsize))

    def complement(x):
        return None if x is None else 1 - x

    lines = [
        "| one thread, f64 / f32 | " + " | ".join(lattices := ["8^2", "16^2", "64^2", "256^2", "32^3"]) + " |"
    ]
    lines.append("|---" * (1 + len(lattices)) + "|")
    for name, get, form in (
        ("leapfrog step / kick and drift without stencil, same level of memory", stencil, ".0%"),
        (
            "time of a trajectory outside its 10 leapfrog steps",
            lambda lat, d: complement(ratio("hmc", "leapfrog", lat, d)),
            ".0%",
        ),
        (
            "measuring after each trajectory: rate falls to",
            lambda lat, d: ratio("hmc_measured", "hmc", lat, d),
            ".0%",
        ),
        ("flow-HMC step / HMC step, time", lambda lat, d: ratio("hmc", "flow_hmc", lat, d), ".1f"),
        ("accelerated step / HMC step, time", lambda lat, d: ratio("hmc", "fourier_hmc", lat, d), ".1f"),
        ("heat-bath sweep / leapfrog step, time", lambda lat, d: ratio("leapfrog", "heat_bath", lat, d), ".1f"),
        ("Swendsen-Wang sweep / leapfrog step, time", lambda lat, d: ratio("leapfrog", "swendsen_wang", lat, d), ".1f"),
    ):
        cells = [_pair([get(lat, d) for d in DTYPES], form) for lat in lattices]
        lines.append(f"| {name} | " + " | ".join("" if cell == "- / -" else cell for cell in cells) + " |")
    return "\n".join(lines)


def counts_table(result: dict) -> str:
    """Operations and entries per site: largest 2-d lattice, float64; float32 where it differs."""
    rows, lines = by_case(result["one_thread"]), []
    names = ("fma", "add", "other", "divide", "sqrt", "group", "array")
    lines.append("| kernel (f64; f32 where it differs) | " + " | ".join(names) + " |")
    lines.append("|---" + "|--:" * len(names) + "|")
    for kernel, found in cases.KERNELS.items():
        lattice = [name for name in found.lattices if name.endswith("^2")][-1]
        pair = [rows.get((kernel, lattice, d)) for d in DTYPES]
        if None in pair:
            continue
        cells = []
        for name in names:
            a, b = (p["counts"][name] for p in pair)
            a, b = (f"{v:.0f}" if v >= 100 else f"{v:.3g}" for v in (a, b))
            cells.append(a if a == b else f"{a}; {b}")
        lines.append(f"| {found.title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_readme(path: Path, tables: dict[str, str]) -> None:
    """Replace what lies between `<!-- name -->` and `<!-- /name -->`."""
    text = path.read_text()
    for name, table in tables.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if begin in text:
            head, rest = text.split(begin, 1)
            text = head + begin + "\n" + table + "\n" + end + rest.split(end, 1)[1]
    path.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.split("\n")[0])
    every = list(cases.KERNELS)
    parser.add_argument(
        "--kernels", nargs="+", choices=every, default=every, metavar="KERNEL", help="of " + ", ".join(every)
    )
    parser.add_argument("--repeats", type=int, default=7, help="samples behind each median (default: 7)")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "cpu.json")
    parser.add_argument("--readme", action="store_true", help="rewrite the tables of benchmarks/README.md")
    parser.add_argument(
        "--again",
        action="store_true",
        help="measure again what several threads did with less than 90%% of the processors",
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    kernels, repeats = arguments.kernels, arguments.repeats

    def progress(text):
        if sys.stderr.isatty():
            print(f"\r{text:70.70s}", end="", file=sys.stderr, flush=True)

    if arguments.worker:
        limits, rows = one_thread(kernels, repeats, progress)
        print(json.dumps({"isa": _core.isa(), "limits": limits, "one_thread": rows}))
        return
    if arguments.again:
        result = json.loads(arguments.out.read_text())
        single, many = by_case(result["one_thread"]), by_case(result["all_threads"] or [])
        keys = [key for key, row in many.items() if row["share"] < 0.9]
        for row in all_threads(keys, single, repeats, progress):
            key = row["kernel"], row["lattice"], row["dtype"]
            if row["share"] > many[key]["share"]:
                many[key].update(row)
    else:
        result = complete(kernels, repeats, progress)
    progress("")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    found, versions = result["machine"], result["versions"]
    name = (
        f"{found['model']}, {found['cores']} cores, {result['date']}, {result['isa']}, "
        f"lfq {versions['lfq']}, NumPy {versions['numpy']}, Numba {versions['numba']}"
    )
    tables = {
        "machine": f"{name}\n\n" + machine_table(result),
        "rates": rate_table(result),
        "derived": derived_table(result),
        "counts": counts_table(result),
    }
    print("\n\n".join(tables.values()))
    if arguments.readme:
        write_readme(HERE / "README.md", tables)


if __name__ == "__main__":
    main()
