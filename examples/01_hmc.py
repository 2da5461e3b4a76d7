"""Plain HMC of phi^4 on a 16 x 16 lattice, tuned to 90% acceptance, with errors and autocorrelation times."""

import lfq

theory = lfq.Phi4((16, 16), beta=0.634, lam=0.5)
hmc = lfq.HMC(theory, tau=1.0).tune(acceptance=0.9)
run = hmc.sample(n_chains=64, n_samples=5000, n_warmup=500, seed=1)
print(f"{hmc.n_steps} leapfrog steps; <exp(-dH)> = {run.exp_minus_dh()}")
print(run.summary())
