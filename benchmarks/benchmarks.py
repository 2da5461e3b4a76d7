"""ASV benchmarks: throughput of every kernel; see README.md here."""

from __future__ import annotations

from lfq import _core

from . import cases
from .timing import throughput


class _Throughput:
    kernel = ""
    param_names = ["lattice", "dtype", "threads"]
    timeout = 120

    def setup(self, lattice, dtype, threads):
        self.n_threads = _core.max_threads() if threads == "all" else threads
        self.work = cases.build(self.kernel, lattice, dtype, self.n_threads)

    def track_rate(self, lattice, dtype, threads):
        return throughput(self.work.call, self.work.amount, self.n_threads).value


def _benchmark(kernel: str):
    found = cases.KERNELS[kernel]
    members = {
        "__doc__": f"{found.title}, {found.unit}",
        "__module__": __name__,
        "kernel": kernel,
        "unit": found.unit,
        "params": (list(found.lattices), ["float64", "float32"], [1, "all"]),
    }
    name = "".join(part.capitalize() for part in kernel.split("_"))
    return type(name, (_Throughput,), members)


Action = _benchmark("action")
Force = _benchmark("force")
Observables = _benchmark("observables")
Normals = _benchmark("normals")
Leapfrog = _benchmark("leapfrog")
Hmc = _benchmark("hmc")
HmcMeasured = _benchmark("hmc_measured")
HeatBath = _benchmark("heat_bath")
SwendsenWang = _benchmark("swendsen_wang")
Wolff = _benchmark("wolff")
FourierHmc = _benchmark("fourier_hmc")
Annealing = _benchmark("annealing")
Independence = _benchmark("independence")
Forward = _benchmark("forward")
Vjp = _benchmark("vjp")
Sampling = _benchmark("sampling")
Training = _benchmark("training")
TrainingDeep = _benchmark("training_deep")
Train = _benchmark("train")
FlowHmc = _benchmark("flow_hmc")
MultiscaleHmc = _benchmark("multiscale_hmc")
