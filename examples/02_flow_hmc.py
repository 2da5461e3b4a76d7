"""Train a flow from interleaved coarser lattices, then sample the same theory with HMC and flow-HMC."""

import lfq
from lfq.analysis import cost_per_independent_sample, summarize

target = lfq.Phi4((16, 16), beta=0.634, lam=0.5)
coarse = lfq.Phi4((8, 8), beta=0.576, lam=0.5)
flow = lfq.AffineFlow(kernel_size=3, n_blocks=1)
fit = lfq.train(
    flow, prior=lfq.Interleave(coarse), target=target, n_steps=1000, batch_size=500, seed=2, progress=True
)
print(f"trained in {fit.seconds:.1f} s; ESS {fit.ess:.3g}, acceptance {fit.acceptance:.3g}")

for name, theory in [("HMC", target), ("flow-HMC", target.pullback(fit.flow))]:
    hmc = lfq.HMC(theory, tau=1.0).tune(acceptance=0.9)
    run = hmc.sample(n_chains=64, n_samples=5000, n_warmup=500, seed=3)
    table = summarize(run)
    cost = cost_per_independent_sample(run, table)
    print(
        f"{name:>8}: {hmc.n_steps} steps, acceptance {run.acceptance:.2f}, chi = {table['chi'].value:.2f}, "
        f"tau_int(M^2) = {table['M2'].tau_int:.1f}, {cost.seconds:.2e} s and {cost.force_evaluations:.0f} forces "
        f"per independent sample"
    )
