"""Runs that are not to be trusted say so, and what to change."""

import dataclasses
import warnings

import numpy as np
import pytest

import lfq
from lfq import health

THEORY = lfq.Phi4((8, 8), beta=0.5, lam=0.5)
HMC = lfq.HMC(THEORY, tau=1.0, n_steps=6)


def sample(hmc, n_samples=100, n_warmup=50, **keywords):
    return hmc.sample(16, n_samples, n_warmup=n_warmup, seed=1, **keywords)


def flow_hmc():
    flow = lfq.AffineFlow(3, 1, seed=2)
    return lfq.HMC(THEORY.pullback(flow), tau=1.0, n_steps=10)


@pytest.mark.parametrize(
    "hmc",
    [
        HMC,
        dataclasses.replace(HMC, dtype="float32", tau=4.0, n_steps=30),
        lfq.ClusterHMC(THEORY, n_steps=6),
        lfq.FourierHMC(THEORY, n_steps=6),
        flow_hmc(),
    ],
    ids=["hmc", "float32", "cluster", "fourier", "flow"],
)
def test_a_good_run_raises_no_concern(hmc):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = sample(hmc)
    assert 0.4 < run.acceptance < 1 and health.concerns(run) == []


def test_acceptance_one():
    with pytest.warns(health.RunWarning, match="acceptance 1: .* fewer n_steps"):
        sample(dataclasses.replace(HMC, n_steps=3000, tau=0.1), 80, 1)


def test_a_chain_that_never_moves_is_named():
    run = sample(HMC)
    accepted = run.accepted.copy()
    accepted[:, [3, 7]] = False
    (found,) = health.concerns(dataclasses.replace(run, accepted=accepted))
    assert found.startswith("acceptance 0: 2 of 16 chains never moved (3, 7): more n_steps")


def test_a_wrong_energy_is_noticed(monkeypatch):
    run = sample(HMC, 400)
    assert health.concerns(run) == []
    (found,) = health.concerns(dataclasses.replace(run, dh=run.dh + 0.05))
    assert "sigma from 1: more n_warmup" in found


def test_a_force_that_remembers_is_not_reversible(monkeypatch):
    run = sample(HMC)
    right = lfq.HMC._evolve

    def drifting(self, settings, latent, momenta):
        right(self, settings, latent, momenta)
        latent += 1e-6

    monkeypatch.setattr(lfq.HMC, "_evolve", drifting)
    (found,) = health.concerns(run)
    assert "forward and back" in found and "n_steps" in found


def test_irreversibility_counts_in_fields():
    assert health.irreversibility(HMC, HMC.start(4, 1)) < 1e-12
    single = dataclasses.replace(HMC, dtype="float32")
    assert 1e-8 < health.irreversibility(single, single.start(4, 1)) < 1e-4


def test_short_runs_are_not_judged():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample(dataclasses.replace(HMC, n_steps=100), 10, 1)


def test_the_last_good_state_comes_with_the_error():
    """A chain that diverges in its third block: the state after the second continues."""
    hmc, blocks = HMC, []
    advance = lfq.HMC.advance

    class Dying(lfq.HMC):
        def advance(self, state, *arguments, **keywords):
            if len(blocks) == 2:
                raise lfq.NotFiniteError("chain 0, trajectory 10: dH is NaN")
            return advance(self, state, *arguments, **keywords)

    dying = Dying(THEORY, tau=1.0, n_steps=6)
    with pytest.raises(lfq.NotFiniteError) as caught:
        for block in dying.blocks(hmc.start(4, 1), 15, block_size=5):
            blocks.append(block)
    assert caught.value.state is blocks[-1].state and caught.value.state.trajectory == 10
    assert isinstance(hmc.advance(caught.value.state, 1).state, lfq.State)


def test_float32_accumulates_dh_in_double():
    """At L = 1024 an energy is of the order 10^6, whose spacing in float32 is 1/16 to 1/8.

    One trajectory from the same fields and momenta in both precisions: dH may differ by what rounding of the
    fields makes, of the order eps |H|^(1/2) a step, and not by the spacing.
    """
    theory = lfq.Phi4((1024, 1024), beta=0.6, lam=0.5)
    both = []
    for dtype in ("float64", "float32"):
        hmc = lfq.HMC(theory, tau=0.5, n_steps=40, dtype=dtype)
        both.append(hmc.advance(hmc.start(2, seed=3), 1, 1, measure=False).dh)
    energy = theory.action(lfq.HMC(theory).start(1, seed=3).latent)[0]
    spacing = np.spacing(np.float32(abs(energy) + 0.5 * theory.volume))
    assert spacing >= 1 / 32 and np.abs(both[0]).max() > 0.1
    assert np.abs(both[1] - both[0]).max() < spacing / 4
