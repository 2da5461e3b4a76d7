"""Every CUDA kernel, on small lattices as far as they have it: for a tool that watches a program.

compute-sanitizer --tool memcheck python tests/on_gpu.py    # and racecheck, initcheck, synccheck
"""

import cupy
import numpy as np

import lfq

LATTICES = [(16, 16), (8, 8), (24, 8), (64, 64), (10, 6), (8, 4, 4), (4, 4, 4, 4), (30,)]
LATTICES += [(256, 256), (246, 255), (40, 40, 44)]
FLOWS = [
    (lfq.AffineFlow(seed=1), (16, 16)),
    (lfq.AffineFlow(seed=1, bias=True, rescale=False), (8, 64)),
    (lfq.AffineFlow(seed=1), (10, 6)),
    (lfq.AffineFlow(seed=1), (64, 64)),
    (lfq.AffineFlow(hidden=(4,), seed=1), (8, 8)),
    (lfq.MultiscaleFlow(3, seed=1), (8, 8)),
    (lfq.MultiscaleFlow(4, seed=1), (16, 16)),
]


def main():
    rng = np.random.default_rng(0)
    for dtype in ("float32", "float64"):
        for shape in LATTICES:
            theory = lfq.Phi4(shape, 0.5 / len(shape), 0.5)
            hmc = lfq.HMC(theory, n_steps=3, dtype=dtype, device="cuda")
            hmc.advance(hmc.start(3, seed=1), 2, 2)
            phi = cupy.asarray(rng.normal(size=(3, *shape)).astype(dtype))
            theory.measure(phi), theory.force(phi), hmc.evolve(phi, phi)
        for flow, shape in FLOWS:
            theory = lfq.Phi4(shape, 0.5, 0.5)
            latents = cupy.asarray(rng.normal(size=(5, *shape)).astype(dtype))
            fields, _ = flow.forward(latents)
            flow.inverse(fields), flow.vjp(latents, fields, 0.5, weights=True)
            through = theory.pullback(flow)
            through.force(latents), through.action(latents)
            hmc = lfq.HMC(through, n_steps=2, tau=0.5, dtype=dtype, device="cuda")
            hmc.advance(lfq.State(latents, 0, 1), 2, 1)
    coarse, target = lfq.Phi4((4, 4), 0.5, 0.5), lfq.Phi4((8, 8), 0.55, 0.5)
    prior = lfq.Interleave(coarse, n_between=1, n_warmup=1)
    lfq.train(lfq.AffineFlow(seed=2), prior, target, 3, 8, seed=3, n_evaluation=16, device="cuda")
    cupy.cuda.Device().synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main()
