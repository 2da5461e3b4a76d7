"""The comparison of samplers: what it measures, whom it names, and what it leaves."""

import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass, replace

import numpy as np
import pytest
from test_weighted import one_sided_flow, scaled_gaussian

import lfq
from lfq import cli, comparison, experiment, io, plots, report
from lfq.analysis import SLOW_OBSERVABLES
from lfq.config import load_config

for package in ("h5py", "matplotlib", "pyerrors", "rich", "typer"):
    pytest.importorskip(package)

SMALL = lfq.Phi4((8, 8), beta=0.576, lam=0.5)
BUDGET = {"seconds": 0.2, "n_chains": 16, "n_warmup": 50}


@pytest.fixture(scope="module")
def found():
    """HMC, clusters, a flow of little use, and annealing, compared."""
    flow = lfq.train(lfq.AffineFlow(), lfq.Gaussian((8, 8)), SMALL, n_steps=60, batch_size=64, seed=1).flow
    samplers = {
        "HMC": lfq.HMC(SMALL),
        "clusters": lfq.ClusterHMC(SMALL),
        "flow-HMC": lfq.Contender(lfq.HMC(SMALL.pullback(flow)), training_seconds=3.0),
        "independence": lfq.Contender(lfq.IndependenceMetropolis(SMALL, flow), training_seconds=3.0),
        "annealing": lfq.Annealing(SMALL, n_temperatures=40),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error", lfq.DisagreementWarning)
        return lfq.compare(SMALL, samplers, **BUDGET)


def test_costs_follow_from_their_definition(found):
    records = {record["name"]: record for record in found.results["samplers"]}
    for name, record in records.items():
        assert record["n_effective_per_second"] == pytest.approx(1 / record["cost_per_independent_sample_s"])
        run = found.runs[name]
        if name == "annealing":
            assert record["cost_per_independent_sample_s"] == pytest.approx(run.seconds / run.n_effective)
            continue
        slowest = max(record["observables"][key]["tau_int"] for key in SLOW_OBSERVABLES)
        seconds, forces = record["seconds_per_trajectory"], record["force_evaluations_per_trajectory"]
        assert record["cost_per_independent_sample_s"] == pytest.approx(2 * slowest * seconds)
        assert record["cost_per_independent_sample_force_evaluations"] == pytest.approx(2 * slowest * forces)
        assert record["long_enough"] == (run.n_samples * run.n_chains * run.thin >= 1000 * slowest)
    assert records["HMC"]["trajectory_length"] > 1 and 0.5 < records["HMC"]["acceptance"] < 0.97
    assert "reverse_ess" in records["flow-HMC"] and "reverse_ess" not in records["HMC"]


def test_training_pays_off_against_the_best_without(found):
    records = found.results["samplers"]
    cheapest = min(r["cost_per_independent_sample_s"] for r in records if not r["train_seconds"])
    for record in records:
        assert ("samples_to_pay_off" in record) == (record["train_seconds"] > 0)
        if record["train_seconds"]:
            gain = cheapest - record["cost_per_independent_sample_s"]
            wanted = 3.0 / gain if gain > 0 else None
            assert record["samples_to_pay_off"] == (pytest.approx(wanted) if wanted else None)
            assert record["n_effective_per_second_with_training"] < record["n_effective_per_second"]


def test_samplers_agree(found):
    """phi2 of L = 8, beta = 0.576 from an independent code, 5 sigma; and none is named."""
    assert found.results["disagreeing"] == []
    for record in found.results["samplers"]:
        if comparison._judged(record):
            value = record["observables"]["phi2"]
            assert abs(value["value"] - 0.6363605) < 5 * value["error"]
            assert record["chi2"] < 29 and abs(record["sign"]) < 5 * record["sign_error"]
        else:
            assert record["chi2"] is None


def test_the_table_has_every_sampler(found):
    text = str(found)
    for record in found.results["samplers"]:
        assert re.search(rf"^{re.escape(record['name'])}\*? ", text, flags=re.MULTILINE)
    rows = report.comparison_rows(found.results)
    assert {len(row) for row in rows} == {len(report.COMPARISON_COLUMNS)}
    # The flow's proposals are hardly ever accepted: the run is marked, and tau_int is a bound.
    independence = next(row for row in rows if row[0].startswith("independence"))
    assert independence[0].endswith("*") and independence[3].startswith("> ")


def test_costs_are_drawn_against_the_extent(found):
    """A line for every sampler that can be judged, at its cost per site and in forces."""
    figure = plots.draw_scaling([found.results])
    seconds, forces = figure.axes
    judged = [record for record in found.results["samplers"] if record["judged"]]
    assert len(seconds.lines) == len(forces.lines) == len(judged) >= 3
    for line, record in zip(seconds.lines, judged, strict=True):
        assert line.get_xydata()[0] == pytest.approx([8, 1e9 * record["cost_per_independent_sample_s"] / 64])
    for line, record in zip(forces.lines, judged, strict=True):
        assert line.get_ydata()[0] == pytest.approx(record["cost_per_independent_sample_force_evaluations"])


@dataclass(frozen=True)
class Biased(lfq.HMC):
    """HMC of a theory whose beta is 5% off, under the name of another."""

    def _run(self, settings, latent, phi, dh, accepted, flipped, values):
        wrong = lfq.HMC(replace(self.theory, beta=1.05 * self.theory.beta), self.tau, self.n_steps)
        wrong._run(settings, latent, phi, dh, accepted, flipped, values)


@dataclass(frozen=True)
class Diverging(lfq.HMC):
    """HMC that works as long as nothing is measured."""

    def advance(self, state, n_samples, thin=1, measure=True):
        if measure:
            raise lfq.NotFiniteError("dH is nan in chain 3 (trajectory 9)")
        return super().advance(state, n_samples, thin, measure)


def test_a_failure_ends_one_sampler_alone():
    """Whether it diverges or cannot even be made: it is in the table with its error, and the others are compared."""

    def broken():
        raise RuntimeError("no such flow")

    samplers = {
        "diverging": lfq.Contender(Diverging(SMALL), tune=False),
        "HMC": lfq.Contender(lfq.HMC(SMALL, tau=3.0, n_steps=16), tune=False),
        "broken": broken,
        "clusters": lambda: lfq.Contender(lfq.ClusterHMC(SMALL, tau=2.0), tune=False),
    }
    with pytest.warns(lfq.FailureWarning) as caught:
        found = lfq.compare(SMALL, samplers, **BUDGET)
    told = [str(warning.message) for warning in caught]
    assert "diverging failed: NotFiniteError: dH is nan in chain 3 (trajectory 9)" in told and len(told) == 2
    assert list(found.runs) == ["HMC", "clusters"] and found.results["disagreeing"] == []
    records = {record["name"]: record for record in found.results["samplers"]}
    assert list(records) == list(samplers)
    assert records["broken"]["error"] == "RuntimeError: no such flow"
    assert [record["name"] for record in comparison.completed(found.results)] == ["HMC", "clusters"]
    assert records["HMC"]["chi2"] is not None and records["HMC"]["judged"]
    text = str(found)
    assert re.search(r"^diverging! +failed", text, flags=re.MULTILINE)
    assert "FAILED: broken: RuntimeError: no such flow" in text


def test_finished_samplers_are_not_run_again():
    """`store` sees every sampler as it finishes; a comparison from what it saw runs only the others."""
    contenders = {"HMC": lfq.HMC(SMALL, tau=3.0, n_steps=16), "clusters": lfq.ClusterHMC(SMALL, tau=2.0)}
    contenders = {name: lfq.Contender(sampler, tune=False) for name, sampler in contenders.items()}
    seen = []
    whole = lfq.compare(SMALL, contenders, **BUDGET, store=lambda found: seen.append(json.loads(json.dumps(found))))
    assert [(len(found["samplers"]), found["unfinished"]) for found in seen] == [(1, ["clusters"]), (2, [])]
    assert seen[1] == json.loads(json.dumps(whole.results))

    rest = lfq.compare(SMALL, contenders, **BUDGET, finished=seen[0]["samplers"])
    assert list(rest.runs) == ["clusters"]
    assert [record["name"] for record in rest.results["samplers"]] == ["HMC", "clusters"]
    first, again = whole.results["samplers"][0], rest.results["samplers"][0]
    assert again["observables"] == first["observables"] and again["chi2"] is not None
    with pytest.raises(ValueError, match="finished: SMC is none"):
        lfq.compare(SMALL, contenders, **BUDGET, finished=[{"name": "SMC"}])


@pytest.mark.parametrize("n_right", [1, 2])
def test_a_wrong_sampler_is_named(n_right):
    """Though it is as precise as the others; of two that disagree both are named."""
    right = {"HMC": lfq.HMC(SMALL, tau=3.0, n_steps=16), "clusters": lfq.ClusterHMC(SMALL, tau=2.0, n_steps=10)}
    samplers = dict(list(right.items())[:n_right]) | {"biased": Biased(SMALL, tau=3.0, n_steps=16)}
    contenders = {name: lfq.Contender(sampler, tune=False) for name, sampler in samplers.items()}
    with pytest.warns(lfq.DisagreementWarning, match="biased disagree" if n_right == 2 else "HMC and biased disagree"):
        result = lfq.compare(SMALL, contenders, **BUDGET).results
    assert result["disagreeing"] == (["biased"] if n_right == 2 else ["HMC", "biased"])
    assert "biased!" in report.comparison_text(result) and "DISAGREEMENT" in report.comparison_text(result)


def test_chi_square_is_one():
    """Of right samplers: mean 4 and the tail of a chi-square, over 40 pairs of runs; 4 sigma."""
    values = []
    for seed in range(40):
        runs = {str(i): lfq.HMC(SMALL, tau=3.0, n_steps=14).sample(16, 150, 40, seed=2 * seed + i) for i in range(2)}
        chi2, bad = comparison.agreement(runs)
        assert not bad
        values.append(chi2["0"])
    assert abs(np.mean(values) - 4) < 4 * math.sqrt(8 / 40)
    assert comparison.chi2_probability(0.0) == 1
    assert comparison.chi2_probability(13.2767) == pytest.approx(0.01, rel=1e-4)  # tables


def test_a_frozen_sign_is_noticed():
    """The broken phase: HMC alone does not cross between the two signs, clusters do."""
    theory = lfq.Phi4((8, 8), beta=0.9, lam=0.5)
    samplers = {
        "HMC": lfq.Contender(lfq.HMC(theory, n_steps=10), tune=False),
        "clusters": lfq.Contender(lfq.ClusterHMC(theory, n_steps=10), tune=False),
    }
    result = lfq.compare(theory, samplers, **BUDGET).results
    hmc, clusters = result["samplers"]
    assert hmc["sign_changes"] < 1e-3 < 0.3 < clusters["sign_changes"]
    assert clusters["sign_tau_int"] < 1
    notes = " ".join(report.comparison_notes(result))
    assert "HMC: the sign of M hardly ever changed" in notes


def test_a_lost_phase_is_noticed():
    """A flow to one of two ordered states: its own weights look well, and so do |M| and phi^2."""
    theory = lfq.Phi4((2, 2), beta=0.9, lam=0.5)
    samplers = {
        "clusters": lfq.Contender(lfq.ClusterHMC(theory, n_steps=6), tune=False),
        "reweighting": lfq.Reweighting(theory, one_sided_flow()),
    }
    result = lfq.compare(theory, samplers, **BUDGET).results
    clusters, flow = result["samplers"]
    assert flow["judged"] and flow["agrees"] and flow["flow_ess"] > 0.1 and flow["reverse_ess"] < 1e-6
    notes = [note for note in report.comparison_notes(result) if note.startswith("!")]
    assert any("COLLAPSE: the flow of reweighting" in note for note in notes)
    assert sum("BROKEN SYMMETRY" in note for note in notes) == 1
    assert any("in reweighting, not to zero" in note for note in notes)


def test_a_flow_that_covers_the_theory_is_not_accused():
    """lam = 0 and a flow of the right width: no note of a collapse."""
    theory = lfq.Phi4((4, 4), beta=0.1, lam=0.0)
    samplers = {"reweighting": lfq.Reweighting(theory, scaled_gaussian(0.75))}
    result = lfq.compare(theory, samplers, **BUDGET).results
    assert result["samplers"][0]["reverse_ess"] > 0.3
    assert not any("COLLAPSE" in note or "SYMMETRY" in note for note in report.comparison_notes(result))


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        (dict(theory="phi4"), TypeError, "theory"),
        (dict(samplers={}), TypeError, "samplers"),
        (dict(samplers=[lfq.HMC(SMALL)]), TypeError, "samplers"),
        (dict(samplers={"other": lfq.HMC(replace(SMALL, beta=0.5))}), ValueError, "other samples another theory"),
        (dict(samplers={"a": "hmc"}), TypeError, "sampler"),
        (dict(seconds=0), ValueError, "seconds"),
        (dict(n_chains=1), ValueError, "n_chains"),
        (dict(acceptance=1.0), ValueError, "acceptance"),
        (dict(seed=-1), ValueError, "seed"),
    ],
)
def test_bad_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        lfq.compare(**{"theory": SMALL, "samplers": {"HMC": lfq.HMC(SMALL)}, **arguments})


def test_training_seconds_are_not_negative():
    with pytest.raises(ValueError, match="training_seconds"):
        lfq.Contender(lfq.HMC(SMALL), training_seconds=-1)


# ---- the command line -----------------------------------------------------------------------

CONFIG = """
[target]
shape = [4, 4]
beta = 0.5
lam = 0.5

[training]
n_steps = 100
batch_size = 64

[[prior]]
kind = "gaussian"

[comparison]
seconds = 0.2
n_chains = 16
n_warmup = 20

[[sampler]]
kind = "hmc"
length_spread = 0.2

[[sampler]]
kind = "wolff"
tune = false
n_updates = 2

[[sampler]]
kind = "heat-bath"
cluster = "swendsen-wang"

[[sampler]]
kind = "flow-hmc"
prior = "gaussian"

[[sampler]]
kind = "reweighting"
prior = "gaussian"

[[sampler]]
kind = "annealing"
n_temperatures = 5
resample = 0.5
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("comparison")
    (directory / "config.toml").write_text(CONFIG)
    assert cli.main(["compare", str(directory / "config.toml"), "--out", str(directory / "out")]) == 0
    return directory / "out"


def test_compare_leaves_results_figures_and_a_report(finished):
    results = json.loads((finished / "results.json").read_text())
    names = ["hmc", "wolff", "heat-bath, swendsen-wang", "flow-hmc, gaussian", "reweighting, gaussian", "annealing"]
    assert [record["name"] for record in results["samplers"]] == names
    assert results["config"]["target"]["shape"] == [4, 4] and results["machine"]["threads"]
    assert results["levels"][0]["prior"] == "gaussian"
    trained = [record["name"] for record in results["samplers"] if record["train_seconds"] > 0]
    assert trained == ["flow-hmc, gaussian", "reweighting, gaussian"]
    for figure in ("cost", "throughput", "tau_int", "autocorrelation"):
        assert (finished / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
    page = (finished / "report.html").read_text()
    assert all(name in page for name in names) and "://" not in page
    assert lfq.load_flow(finished / "flows" / "gaussian.safetensors").n_weights == 37


QUICK = (
    CONFIG.split("[training]")[0]
    + """
[comparison]
seconds = 0.1
n_chains = 8
n_warmup = 10

[[sampler]]
kind = "hmc"
tune = false

[[sampler]]
kind = "swendsen-wang"
tune = false
"""
)


def test_an_interrupted_comparison_continues(tmp_path, monkeypatch, capsys):
    """What was finished is kept to the last bit, the rest is run, and the report is complete."""
    config, out = tmp_path / "config.toml", tmp_path / "out"
    config.write_text(QUICK)
    run = comparison._Bench.run

    def interrupted(bench, name, contender):
        if name == "swendsen-wang":
            raise KeyboardInterrupt
        return run(bench, name, contender)

    monkeypatch.setattr(comparison._Bench, "run", interrupted)
    assert cli.main(["compare", str(config), "--out", str(out)]) == 130
    assert f"lfq compare --resume --out {out}" in capsys.readouterr().err
    half = json.loads((out / "results.json").read_text())
    assert [record["name"] for record in half["samplers"]] == ["hmc"] and half["unfinished"] == ["swendsen-wang"]
    assert not (out / "report.html").exists()

    monkeypatch.setattr(comparison._Bench, "run", run)
    assert cli.main(["compare", "--resume", "--out", str(out)]) == 0
    whole = json.loads((out / "results.json").read_text())
    assert [record["name"] for record in whole["samplers"]] == ["hmc", "swendsen-wang"] and whole["unfinished"] == []
    assert whole["samplers"][0]["observables"] == half["samplers"][0]["observables"]
    assert "swendsen-wang" in (out / "report.html").read_text()

    config.write_text(QUICK.replace("n_chains = 8", "n_chains = 12"))
    assert cli.main(["compare", str(config), "--resume", "--out", str(out)]) == 2
    assert "[comparison] n_chains" in capsys.readouterr().err
    assert json.loads((out / "results.json").read_text()) == whole
    assert cli.main(["compare", str(config), "--overwrite", "--out", str(out)]) == 0
    assert json.loads((out / "results.json").read_text())["n_chains"] == 12


SLOW_CLUSTERS = (
    QUICK.split("[comparison]")[0]
    + """
[comparison]
seconds = 300.0
n_chains = 8
n_warmup = 1

[training]
n_steps = 1000000

[[prior]]
kind = "gaussian"

[[sampler]]
kind = "hmc"
tune = false

[[sampler]]
kind = "{second}"
tune = false
"""
)


def signalled(directory, second, ready, number):
    """`lfq compare` of HMC, which is done in no time, and one that is not; a signal once it is `ready`."""
    (directory / "config.toml").write_text(SLOW_CLUSTERS.format(second=second))
    command = [sys.executable, "-m", "lfq", "compare", "config.toml", "--out", "out"]
    process = subprocess.Popen(command, cwd=directory, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    end = time.monotonic() + 240
    while not ready():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert f"lfq: {number.name}: finishing the block of samples" in said
    assert said.splitlines()[-1] == "lfq: interrupted; to continue: lfq compare --resume --out out"
    return process.returncode


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_comparison(number, code, tmp_path):
    """At the end of a block of samples, with what is finished in the results."""
    out = tmp_path / "out"
    second = 'wolff"\nn_updates = 2000\nname = "clusters'
    assert signalled(tmp_path, second, (out / "results.json").exists, number) == code
    results = json.loads((out / "results.json").read_text())
    assert [record["name"] for record in results["samplers"]] == ["hmc"]
    assert results["unfinished"] == ["clusters"]
    assert not (out / "report.html").exists() and not list(out.glob(".*"))


def test_a_signal_ends_the_training_of_a_comparison(tmp_path):
    path = tmp_path / "out" / "checkpoints" / "train-gaussian.safetensors"
    assert signalled(tmp_path, 'flow-hmc"\nprior = "gaussian', path.exists, signal.SIGTERM) == 143
    assert 0 < io.load_checkpoint(path)[0][1]["step"] < 10**6
    assert json.loads((tmp_path / "out" / "results.json").read_text())["unfinished"] == ["flow-hmc, gaussian"]


def test_a_comparison_stopped_at_once_has_results(tmp_path):
    """Of no sampler: by its progress, before the first is done."""

    def stop(*_):
        raise KeyboardInterrupt

    (tmp_path / "config.toml").write_text(QUICK)
    with pytest.raises(KeyboardInterrupt):
        experiment.run_comparison(load_config(tmp_path / "config.toml"), tmp_path / "out", progress=stop)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["samplers"] == [] and results["unfinished"] == ["hmc", "swendsen-wang"]
    assert cli.main(["compare", "--resume", "--out", str(tmp_path / "out")]) == 0


def test_two_processes_cannot_compare_in_one_directory(tmp_path, capsys):
    (tmp_path / "config.toml").write_text(QUICK)
    out, codes = tmp_path / "out", []

    def meanwhile(*_):
        for command in (["compare", "--resume"], ["compare", "--overwrite"], ["run"], ["run", "--overwrite"]):
            configured = [] if "--resume" in command else [str(tmp_path / "config.toml")]
            codes.append(cli.main([*command, *configured, "--out", str(out)]))
        raise KeyboardInterrupt

    config = load_config(tmp_path / "config.toml")
    (tmp_path / "config.toml").write_text(QUICK.split("[comparison]")[0])
    with pytest.raises(KeyboardInterrupt):
        experiment.run_comparison(config, out, progress=meanwhile)
    assert codes == [2] * 4 and capsys.readouterr().err.count("in use by another process") == 4
    # The lock goes with the comparison that held it.
    assert cli.main(["compare", "--resume", "--out", str(out)]) == 0


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-20],
        lambda text: "[]",
        lambda text: "[" * 100000,
        lambda text: text.replace('"samplers"', '"sampler"'),
        lambda text: text.replace('"name": "flow-hmc, gaussian"', '"name": "other"'),
        lambda text: text.replace('"cost_per_independent_sample_s"', '"cost"'),
        lambda text: text.replace('"judged": true', '"judged": 7').replace('"means"', '"mean"'),
        lambda text: re.sub('"tau_int": [0-9.e-]+', '"tau_int": "x"', text),
        lambda text: re.sub(r'"covariance": \[', '"covariance": [[1.0], ', text, count=1),
    ],
)
def test_damaged_results_are_refused(damage, finished, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    text = damage((finished / "results.json").read_text())
    (out / "results.json").write_text(text)
    assert cli.main(["compare", "--resume", "--out", str(out)]) == 2
    assert "results.json: not the results of a comparison" in capsys.readouterr().err
    assert (out / "results.json").read_text() == text


def test_concerns_are_told(tmp_path, capsys):
    """Trajectories so short that none is rejected: warned of, in the notes, and again after a resume."""
    (tmp_path / "config.toml").write_text(QUICK.replace('kind = "hmc"', 'kind = "hmc"\ntau = 0.001'))
    arguments = ["compare", str(tmp_path / "config.toml"), "--out", str(tmp_path / "out")]
    for command in (arguments, [*arguments, "--resume"]):
        assert cli.main(command) == 0
        told = capsys.readouterr()
        assert told.err.count("lfq: warning: hmc: acceptance 1: every trajectory was accepted") == 1
        assert "hmc: acceptance 1" in " ".join(told.out.split())
    hmc, clusters = json.loads((tmp_path / "out" / "results.json").read_text())["samplers"]
    assert len(hmc["concerns"]) == 1 and clusters["concerns"] == []
    assert "acceptance 1" in (tmp_path / "out" / "report.html").read_text()


def test_overwrite_deletes_a_comparison_and_nothing_else(tmp_path, capsys):
    (tmp_path / "config.toml").write_text(QUICK)
    (tmp_path / "run.toml").write_text(QUICK.split("[comparison]")[0])
    out = tmp_path / "out"
    arguments = ["compare", str(tmp_path / "config.toml"), "--out", str(out)]
    assert cli.main(arguments) == 0
    before = (out / "results.json").read_bytes()
    (out / "flows" / "notes.txt").write_text("mine")
    assert cli.main([*arguments, "--overwrite"]) == 2
    assert "notes.txt is not of a comparison of lfq" in capsys.readouterr().err
    (out / "flows" / "notes.txt").unlink()
    assert cli.main(["run", str(tmp_path / "run.toml"), "--overwrite", "--out", str(out)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert (out / "results.json").read_bytes() == before
    assert cli.main([*arguments, "--overwrite"]) == 0
    assert (out / "results.json").read_bytes() != before


def test_a_failed_sampler_is_told_and_tried_again(tmp_path, monkeypatch, capsys):
    """The exit code is 1, and a later --resume runs what failed."""
    (tmp_path / "config.toml").write_text(QUICK)
    run = comparison._Bench.run

    def failing(bench, name, contender):
        if name == "hmc":
            raise lfq.NotFiniteError("dH is nan")
        return run(bench, name, contender)

    monkeypatch.setattr(comparison._Bench, "run", failing)
    arguments = ["compare", str(tmp_path / "config.toml"), "--out", str(tmp_path / "out")]
    assert cli.main(arguments) == 1
    assert "FAILED: hmc: NotFiniteError: dH is nan" in capsys.readouterr().out
    assert "NotFiniteError" in (tmp_path / "out" / "report.html").read_text()
    monkeypatch.setattr(comparison._Bench, "run", run)
    assert cli.main([*arguments, "--resume"]) == 0


@pytest.mark.parametrize("option", [[], ["--overwrite"], ["--resume"]])
def test_other_files_are_left_alone(option, tmp_path, capsys):
    """A directory that holds anything but a comparison is refused, whatever is asked."""
    (tmp_path / "config.toml").write_text(QUICK)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("all of it")
    assert cli.main(["compare", str(tmp_path / "config.toml"), "--out", str(tmp_path / "out"), *option]) == 2
    assert ("no comparison to resume" if "--resume" in option else "not empty") in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_compare_prints_its_table(finished, capsys, tmp_path):
    assert cli.main(["compare", str(finished / "config.toml"), "--out", str(finished)]) == 2
    assert "--overwrite deletes it" in capsys.readouterr().err
    assert cli.main(["compare", "--resume", "--overwrite", "--out", str(finished)]) == 2
    assert "exclude each other" in capsys.readouterr().err
    (tmp_path / "small.toml").write_text(CONFIG.split("[training]")[0] + "[comparison]\nseconds = 0.1\nn_chains = 8\n")
    assert cli.main(["compare", str(tmp_path / "small.toml"), "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("hmc", "swendsen-wang", "wolff", "results.json", "chi^2"))


@pytest.mark.parametrize(
    "text, message",
    [
        ('[[sampler]]\nkind = "metropolis"', "[sampler 1] kind"),
        ('[[sampler]]\nkind = "flow-hmc"', "[sampler 1] prior: is missing"),
        ('[[sampler]]\nkind = "hmc"\nprior = "gaussian"', "means nothing"),
        ('[[prior]]\nkind = "gaussian"\n[[sampler]]\nkind = "flow-hmc"\nprior = "gausian"', "the nearest is gaussian"),
        ('[[sampler]]\nkind = "hmc"\n[[sampler]]\nkind = "hmc"', "[sampler 2] name"),
        ('[[sampler]]\nkind = "hmc"\ncluster = "wolff"', "[sampler 1] cluster: means nothing"),
        ("[comparison]\nseconds = 0.0", "[comparison] seconds"),
        ('[sampler]\nkind = "hmc"', "[[sampler]]"),
    ],
)
def test_mistakes_in_the_configuration(text, message, tmp_path, capsys):
    (tmp_path / "config.toml").write_text("[target]\nshape = [4, 4]\nbeta = 0.5\nlam = 0.5\n" + text)
    assert cli.main(["compare", str(tmp_path / "config.toml"), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_run_refuses_the_samplers_of_compare(tmp_path, capsys):
    (tmp_path / "config.toml").write_text(CONFIG)
    assert cli.main(["run", str(tmp_path / "config.toml"), "--out", str(tmp_path / "out")]) == 2
    assert "lfq compare" in capsys.readouterr().err
