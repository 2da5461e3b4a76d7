"""The command line, end to end on a small lattice."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import warnings
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from killer import survive

import lfq
from lfq import cli, config, experiment, io, report, selftest
from lfq.health import RunWarning

for package in ("h5py", "matplotlib", "pyerrors", "rich", "typer"):
    pytest.importorskip(package)

SAMPLING = "[sampling]\nn_chains = 16\nn_samples = 120\nn_warmup = 40\nblock_size = 40\n"
TARGET = "[target]\nshape = [8, 8]\nbeta = 0.576\nlam = 0.5\n"
TINY = (
    TARGET
    + SAMPLING
    + """
[training]
n_steps = 60
batch_size = 32

[prior_chains]
n_between = 2
n_warmup = 20

[[prior]]
kind = "gaussian"

[[prior]]
kind = "lattice"
beta = 0.53

[[prior]]
kind = "interleave"
beta = 0.5

[[prior]]
kind = "upsample"
beta = 0.5
"""
)
PRIORS = [None, "gaussian", "lattice", "interleave", "upsample"]
FIGURES = ["training", "tau_int", "cost", "autocorrelation", "configurations"]


def write_config(directory, text=TINY):
    path = directory / "config.toml"
    path.write_text(text)
    return path


def lfq_main(*arguments):
    return cli.main([str(argument) for argument in arguments])


def the_error(capsys):
    """The one line on stderr."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("lfq: error: ")
    return lines[0]


def strict_json(path):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A directory with a finished run."""
    directory = tmp_path_factory.mktemp("finished")
    out = directory / "out"
    assert lfq_main("run", write_config(directory), "--out", out) == 0
    return out


def test_results_follow_the_schema(finished):
    results = strict_json(finished / "results.json")
    assert results["version"] == lfq.__version__
    assert results["config"]["target"] == {"shape": [8, 8], "beta": 0.576, "lam": 0.5}
    assert [level["prior"] for level in results["levels"]] == PRIORS[1:]
    for level in results["levels"]:
        assert (level["L"], level["beta"], level["lam"], level["steps"]) == (8, 0.576, 0.5, 60)
        assert 0 < level["ess"] <= 1 and 0 <= level["acceptance"] <= 1
        assert level["std_log_w"] > 0 and level["train_seconds"] > 0
    assert [sampler["prior"] for sampler in results["samplers"]] == PRIORS
    for sampler in results["samplers"]:
        assert sampler["name"] == ("HMC" if sampler["prior"] is None else "flow-HMC")
        assert (sampler["L"], sampler["beta"], sampler["lam"]) == (8, 0.576, 0.5)
        assert (sampler["n_chains"], sampler["n_samples"]) == (16, 120)
        assert 0.8 < sampler["acceptance"] <= 1
        value, error = sampler["exp_minus_dh"]
        assert abs(value - 1) < 5 * error
        for entry in sampler["observables"].values():
            assert set(entry) == {"value", "error", "tau_int", "tau_int_error"}
        slowest = max(sampler["observables"][name]["tau_int"] for name in ("M2", "phi2", "phi2_smeared"))
        seconds = 2 * slowest * sampler["seconds_per_trajectory"]
        assert sampler["cost_per_independent_sample_s"] == pytest.approx(seconds)
        forces = 2 * slowest * sampler["force_evaluations_per_trajectory"]
        assert sampler["cost_per_independent_sample_force_evaluations"] == pytest.approx(forces)
        assert sampler["long_enough"] == (16 * 120 >= 1000 * slowest)


def test_samplers_agree_with_the_reference(finished):
    # phi2 of L = 8 and beta = 0.576 from independent code.
    for sampler in strict_json(finished / "results.json")["samplers"]:
        found = sampler["observables"]["phi2"]
        assert abs(found["value"] - 0.6363605) < 5 * found["error"]


def test_training_pays_off_when_it_does(finished):
    plain, *others = strict_json(finished / "results.json")["samplers"]
    for sampler in others:
        gain = plain["cost_per_independent_sample_s"] - sampler["cost_per_independent_sample_s"]
        if gain > 0:
            assert sampler["samples_to_pay_off"] == pytest.approx(sampler["train_seconds"] / gain)
        else:
            assert sampler["samples_to_pay_off"] is None


def test_run_file_holds_the_observables_of_every_chain(finished):
    import h5py

    results = strict_json(finished / "results.json")
    with h5py.File(finished / "run.h5") as file:
        assert config.parse_config(file.attrs["config"]).to_dict() == results["config"]
        assert json.loads(file.attrs["versions"])["lfq"] == lfq.__version__ and file.attrs["seed"] == 1
        groups = ["hmc", *(f"flow_hmc_{prior}" for prior in PRIORS[1:])]
        assert sorted(file["samplers"]) == sorted(groups)
        for name, sampler in zip(groups, results["samplers"], strict=True):
            phi2 = file["samplers"][name]["observables"]["phi2"][...]
            assert phi2.shape == (120, 16)
            assert phi2.mean() == pytest.approx(sampler["observables"]["phi2"]["value"], rel=1e-12)
            assert file["samplers"][name]["accepted"][...].mean() == pytest.approx(sampler["acceptance"])


def test_flows_can_be_loaded_and_used(finished):
    results = strict_json(finished / "results.json")
    target = lfq.Phi4((8, 8), beta=0.576, lam=0.5)
    prior = lfq.Lattice(dataclasses.replace(target, beta=0.53))
    flow = lfq.load_flow(finished / "flows" / "lattice.safetensors")
    z = prior.sample(2000, seed=3)
    x, log_det = flow.forward(z)
    log_w = log_det - target.action(x) - prior.log_prob(z)
    w = np.exp(log_w - log_w.max())
    ess = w.sum() ** 2 / (w.size * (w**2).sum())
    assert ess == pytest.approx(results["levels"][1]["ess"], rel=0.25)


def test_figures_are_drawn(finished):
    from matplotlib.image import imread

    for name in FIGURES:
        image = imread(finished / f"{name}.png")
        height, width, _ = image.shape
        assert width >= 800 and height >= 400
        assert 0.005 < (image[..., :3].min(axis=-1) < 0.9).mean() < 0.95
        assert len({tuple(pixel) for pixel in image[::4, ::4].reshape(-1, image.shape[-1])}) > 20


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.links, self.cells, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.links += [value for key, value in attributes if key in ("src", "href")]
        assert tag not in ("script", "link", "iframe")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "td":
            self.cells.append(data)


def test_the_report_stands_alone(finished):
    text = (finished / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert len(page.links) == len(FIGURES)
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not re.search(r"https?://|url\(|@import", text)
    rows = report.table_rows(strict_json(finished / "results.json"))
    assert set(filter(None, sum(rows, []))) <= set(page.cells)
    assert "kernel_size = 3" in text and lfq.__version__ in text


def test_the_report_escapes_text():
    assert report._table(("<a>",), [["<script>&"]]).count("<script>") == 0


def test_the_table_marks_runs_that_are_too_short(finished):
    results = strict_json(finished / "results.json")
    for sampler in results["samplers"]:
        sampler["long_enough"] = sampler["prior"] != "lattice"
    rows = report.table_rows(results)
    assert [row[0] for row in rows] == ["HMC", "flow-HMC", "flow-HMC*", "flow-HMC", "flow-HMC"]
    assert all(len(row) == len(report.COLUMNS) for row in rows)
    assert any("1000 tau_int" in note for note in report.footnotes(results))


@pytest.mark.parametrize("width", ["70", "200"])
def test_the_printed_table_is_complete(finished, capsys, monkeypatch, width):
    from rich.console import Console

    monkeypatch.setenv("COLUMNS", width)
    monkeypatch.setattr(Console, "is_terminal", True)
    results = strict_json(finished / "results.json")
    cli._print_results(results, finished)
    printed = capsys.readouterr().out
    for row in report.table_rows(results):
        assert all(cell in printed for cell in row)


def test_a_run_is_not_overwritten(finished, tmp_path, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert lfq_main("run", write_config(tmp_path), "--out", finished) == 2
    assert re.search("already holds a run: --resume", the_error(capsys))
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_overwrite_deletes_a_run_and_nothing_else(tmp_path, capsys):
    path, out = write_config(tmp_path, TARGET + SAMPLING), tmp_path / "out"
    stop = KeyboardInterrupt

    def interrupt(stage, done, total, remark):
        if done == 80:
            raise stop

    with pytest.raises(stop):
        experiment.run_experiment(config.load_config(path), out, progress=interrupt)
    before = (out / "run.h5").stat().st_mtime_ns
    (out / "flows" / "notes.txt").write_text("mine")
    assert lfq_main("run", path, "--out", out, "--overwrite") == 2
    assert "notes.txt is not of a run of lfq" in the_error(capsys)
    assert (out / "run.h5").stat().st_mtime_ns == before
    (out / "flows" / "notes.txt").unlink()
    assert lfq_main("run", path, "--out", out, "--overwrite", "--resume") == 2
    assert "exclude each other" in the_error(capsys)
    with pytest.raises(stop):
        experiment.run_experiment(config.load_config(path), out, overwrite=True, progress=interrupt)
    assert (out / "run.h5").stat().st_mtime_ns != before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    assert lfq_main("run", path, "--out", tmp_path / "other", "--overwrite") == 2
    assert "is not empty" in the_error(capsys) and (tmp_path / "other" / "thesis.tex").exists()


def test_two_processes_cannot_run_in_one_directory(tmp_path, capsys):
    path, out = write_config(tmp_path, TARGET + SAMPLING), tmp_path / "out"
    codes = []

    def meanwhile(stage, done, total, remark):
        if not codes:
            codes.append(lfq_main("run", path, "--resume", "--out", out))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        experiment.run_experiment(config.load_config(path), out, progress=meanwhile)
    assert codes == [2] and "in use by another process" in the_error(capsys)


def test_other_peoples_files_are_left_alone(tmp_path, capsys):
    path = write_config(tmp_path)
    assert lfq_main("run", path, "--out", tmp_path) == 2
    assert "is not empty" in the_error(capsys)
    assert list(tmp_path.iterdir()) == [path]


def test_unwritable_directories(tmp_path, capsys):
    path = write_config(tmp_path)
    assert lfq_main("run", path, "--out", path / "below") == 2
    assert "cannot write to" in the_error(capsys)
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
        assert lfq_main("run", path, "--out", tmp_path / "locked") == 2
        assert "cannot write to" in the_error(capsys)


def test_a_disk_too_small_is_noticed_before_any_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(experiment.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert lfq_main("run", write_config(tmp_path), "--out", tmp_path / "out") == 2
    assert "run.h5 needs" in the_error(capsys)


# ---- resuming -----------------------------------------------------------------------------------


def assert_same_run(one, other):
    """Everything random is equal to the last bit."""
    import h5py

    with h5py.File(one / "run.h5") as a, h5py.File(other / "run.h5") as b:
        names = []
        a["samplers"].visit(names.append)
        datasets = [name for name in names if isinstance(a["samplers"][name], h5py.Dataset)]
        assert len(datasets) == 5 * (len(lfq.observables.OBSERVABLES) + 3)
        for name in datasets:
            np.testing.assert_array_equal(a["samplers"][name], b["samplers"][name], err_msg=name)
    for sampler in ("hmc", *(f"flow_hmc_{prior}" for prior in PRIORS[1:])):
        states = [io.load_checkpoint(out / "checkpoints" / f"{sampler}.safetensors")[0] for out in (one, other)]
        np.testing.assert_array_equal(*(tensors["latent"] for tensors, _ in states))
        assert states[0][1] | {"seconds": 0} == states[1][1] | {"seconds": 0}
    for prior in PRIORS[1:]:
        flows = [io.load_tensors(out / "flows" / f"{prior}.safetensors")[0]["weights"] for out in (one, other)]
        np.testing.assert_array_equal(*flows)
        histories = [io.load_tensors(out / "training" / f"{prior}.safetensors")[0] for out in (one, other)]
        for name in histories[0]:
            if name != "history/seconds":
                np.testing.assert_array_equal(histories[0][name], histories[1][name], err_msg=name)
    tables = [strict_json(out / "results.json")["samplers"] for out in (one, other)]
    for a, b in zip(*tables, strict=True):
        assert a["observables"] == b["observables"] and a["exp_minus_dh"] == b["exp_minus_dh"]


def test_a_run_interrupted_everywhere_ends_the_same(finished, tmp_path):
    """Stopped by its callback again and again, with other threads and blocks each time."""
    settings, out, calls = config.parse_config(TINY), tmp_path / "out", 0

    def interrupt(stage, done, total, remark):
        nonlocal calls
        calls += 1
        if calls % 19 == 0:
            raise KeyboardInterrupt

    interruptions = 0
    while True:
        changed = dataclasses.replace(
            settings,
            run=dataclasses.replace(settings.run, threads=1 + interruptions % 3),
            sampling=dataclasses.replace(settings.sampling, block_size=(40, 7, 64)[interruptions % 3]),
        )
        try:
            experiment.run_experiment(changed, out, resume=interruptions > 0, progress=interrupt)
            break
        except KeyboardInterrupt:
            interruptions += 1
    assert interruptions > 4
    assert_same_run(finished, out)


def test_samples_reach_the_disk_before_the_checkpoint_that_counts_them(tmp_path, monkeypatch):
    out, calls = tmp_path / "out", []

    def traced(name, real):
        def call(*arguments, **keywords):
            where = os.readlink(f"/proc/self/fd/{arguments[0]}") if name != "replace" else str(arguments[1])
            calls.append((name, where))
            return real(*arguments, **keywords)

        return call

    for name in ("pwrite", "fsync", "replace"):
        monkeypatch.setattr(os, name, traced(name, getattr(os, name)))
    experiment.run_experiment(config.parse_config(TARGET + SAMPLING), out)
    unsynced = counted = 0
    for call in calls:
        if call == ("pwrite", str(out / "run.h5")):
            unsynced += 1
        elif call == ("fsync", str(out / "run.h5")):
            unsynced = 0
        elif call == ("replace", str(out / "checkpoints" / "hmc.safetensors")):
            counted += 1
            assert unsynced == 0
    assert counted > 4


def test_a_run_killed_at_random_ends_in_the_same_bits(finished, tmp_path, n_kills):
    """HMC, flow-HMC and trainings, with another block size and other threads after each kill."""
    out = tmp_path / "out"

    def code(attempt):
        text = TINY.replace("block_size = 40", f"block_size = {(40, 9, 64)[attempt % 3]}")
        path = write_config(tmp_path, text + f"[run]\nthreads = {1 + attempt % 2}\n")
        how = "--resume" if (out / "checkpoints" / "run.safetensors").exists() else "--overwrite"
        arguments = ["run", str(path), how, "--out", str(out)]
        return f"import sys; from lfq import cli; sys.exit(cli.main({arguments}))"

    survive(code, n_kills, 0.03)
    assert_same_run(finished, out)


def test_an_interruption_says_how_to_continue(tmp_path, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "train", interrupted)
    assert lfq_main("run", write_config(tmp_path), "--out", tmp_path / "out") == 130
    assert f"lfq run --resume --out {tmp_path / 'out'}" in capsys.readouterr().err


def test_resume_refuses_another_configuration(finished, tmp_path, capsys):
    path = write_config(tmp_path, TINY.replace("beta = 0.53", "beta = 0.54").replace("n_steps = 60", "n_steps = 61"))
    assert lfq_main("run", path, "--resume", "--out", finished) == 2
    error = the_error(capsys)
    assert "[training] n_steps" in error and "[prior 2] beta" in error


def test_resume_accepts_another_number_of_threads(finished, tmp_path):
    path = write_config(tmp_path, TINY + "[run]\nthreads = 1\n")
    before = (finished / "run.h5").read_bytes()
    assert lfq_main("run", path, "--resume", "--out", finished) == 0
    assert (finished / "run.h5").read_bytes() == before


def test_resume_needs_a_run(tmp_path, capsys):
    for out in (tmp_path, tmp_path / "absent"):
        assert lfq_main("run", "--resume", "--out", out) == 2
        assert "holds no run to resume" in the_error(capsys)


# ---- other shapes of a run ------------------------------------------------------------------------


def test_hmc_alone(tmp_path):
    results = experiment.run_experiment(config.parse_config(TARGET + SAMPLING), tmp_path / "out")
    assert results["levels"] == [] and [sampler["name"] for sampler in results["samplers"]] == ["HMC"]


def test_ladder_in_float32(tmp_path):
    text = TARGET + SAMPLING + '[run]\ndtype = "float32"\n[training]\nn_steps = 30\nbatch_size = 32\n'
    text += "[ladder]\nshapes = [[2, 2], [4, 4], [8, 8]]\nbetas = [0.4, 0.5, 0.576]\n"
    out = tmp_path / "out"
    results = experiment.run_experiment(config.parse_config(text), out)
    assert [(level["prior"], level["L"]) for level in results["levels"]] == [
        ("ladder-4x4", 4),
        ("ladder-8x8", 8),
    ]
    plain, flow = results["samplers"]
    assert flow["prior"] == "ladder"
    assert flow["train_seconds"] == pytest.approx(sum(level["train_seconds"] for level in results["levels"]))
    again = experiment.run_experiment(None, out, resume=True)
    assert again["samplers"][1]["observables"] == flow["observables"]


def test_multiscale_ladder(tmp_path):
    text = TARGET + SAMPLING + '[flow]\nscale = "site"\nn_blocks = 2\n[training]\nn_steps = 30\nbatch_size = 32\n'
    text += '[ladder]\nshapes = [[4, 4], [8, 8]]\nbetas = [0.5, 0.576]\nprior = "multiscale"\n'
    results = experiment.run_experiment(config.parse_config(text), tmp_path / "out")
    assert [(level["prior"], level["L"]) for level in results["levels"]] == [("ladder-4x4", 4), ("ladder-8x8", 8)]
    flow = lfq.load_flow(tmp_path / "out" / "flows" / "ladder-8x8.safetensors")
    assert isinstance(flow, lfq.MultiscaleFlow) and flow.n_levels == 3
    assert flow.flows[-1].sublattices
    assert results["samplers"][1]["prior"] == "ladder"


def test_sublattices_of_the_flow(tmp_path):
    """Multiscale flows have them unless told otherwise or given hidden layers, others only if told."""
    ladder = '[ladder]\nshapes = [[4, 4], [8, 8]]\nbetas = [0.5, 0.576]\nprior = "multiscale"\n'

    def flows(keys):
        settings = config.parse_config(TARGET + "[flow]\n" + keys + ladder)
        return experiment.initial_flow(settings), experiment.multiscale_flow(settings).flows[-1]

    for keys, wanted in [
        ("", (False, True)),
        ("hidden = [2]\n", (False, False)),
        ("sublattices = true\n", (True, True)),
        ("sublattices = false\n", (False, False)),
    ]:
        assert tuple(flow.sublattices for flow in flows(keys)) == wanted, keys
    assert flows("")[1].order == lfq.MultiscaleFlow(1).flows[-1].order != flows("")[0].order == "ce|o o|ce"
    assert [flow.order for flow in flows('sublattices = true\norder = "e|c o|ce"\n')] == ["e|c o|ce"] * 2
    text = TARGET + SAMPLING + "[flow]\nsublattices = true\n[training]\nn_steps = 5\nbatch_size = 8\n"
    experiment.run_experiment(config.parse_config(text + '[[prior]]\nkind = "gaussian"\n'), tmp_path / "out")
    assert lfq.load_flow(tmp_path / "out" / "flows" / "gaussian.safetensors").sublattices


def test_three_dimensions(tmp_path):
    text = TARGET.replace("8, 8", "4, 4, 4").replace("0.576", "0.3") + SAMPLING
    text += '[training]\nn_steps = 5\nbatch_size = 8\n[[prior]]\nkind = "upsample"\nbeta = 0.2\n'
    results = experiment.run_experiment(config.parse_config(text), tmp_path / "out")
    assert len(results["samplers"]) == 2


# ---- the other commands ---------------------------------------------------------------------------


def test_info(capsys):
    assert lfq_main("info") == 0
    printed = capsys.readouterr().out
    for word in ("version", lfq.__version__, "isa", "threads", "cuda built", "gpu"):
        assert word in printed


def test_default_is_a_configuration(capsys):
    assert lfq_main("default") == 0
    assert config.parse_config(capsys.readouterr().out) == config.load_config()


def test_module_and_help():
    result = subprocess.run([sys.executable, "-m", "lfq"], capture_output=True, text=True, timeout=120, check=True)
    assert all(command in result.stdout for command in ("run", "info", "selftest", "default"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "absent.toml"], "cannot read absent.toml"),
        (["run", "--nonsense"], "No such option"),
        (["nonsense"], "No such command"),
        (["run", "a", "b"], "unexpected extra argument"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    assert lfq_main(*arguments) == 2
    assert message in the_error(capsys)


def test_bad_configurations_leave_no_trace(tmp_path, capsys):
    path = write_config(tmp_path, TINY.replace("n_chains = 16", "n_chain = 16"))
    for command in (("run", path, "--out", tmp_path / "out"), ("selftest", path)):
        assert lfq_main(*command) == 2
        assert the_error(capsys) == "lfq: error: config: [sampling] n_chain: unknown key; the nearest is n_chains"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("package", ["typer", "rich", "h5py", "pyerrors", "matplotlib"])
def test_missing_packages_are_named_before_any_work(package, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    assert lfq_main("run", write_config(tmp_path), "--out", tmp_path / "out") == 2
    error = the_error(capsys)
    assert package in error and "pip install 'lfq[app]'" in error
    assert not (tmp_path / "out").exists()


def test_importing_lfq_loads_nothing_optional():
    code = (
        "import sys, lfq\n"
        "optional = {'h5py', 'matplotlib', 'pyerrors', 'rich', 'tomli', 'typer', 'cupy'}\n"
        "assert not optional & set(sys.modules), optional & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], timeout=120, check=True)


# ---- self-test ------------------------------------------------------------------------------------


def test_selftest_passes(tmp_path, capsys):
    assert lfq_main("selftest", write_config(tmp_path)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "all passed" and len(lines) == 22
    assert all(line.startswith("pass") for line in lines[:-1])


def test_selftest_checks_the_samplers_of_a_comparison(tmp_path, capsys):
    text = TARGET + "".join(f'[[sampler]]\nkind = "{kind}"\n' for kind in ("wolff", "heat-bath", "fourier"))
    assert lfq_main("selftest", write_config(tmp_path, text)) == 0
    printed = capsys.readouterr().out
    for name in ("wolff", "heat-bath", "fourier"):
        assert f"pass  {name}: restarts" in printed and f"pass  {name}: virial" in printed
    assert "fourier: trajectory there and back" in printed


@pytest.mark.parametrize(
    "text",
    [
        TARGET + '[run]\ndtype = "float32"\n',
        TARGET.replace("8, 8", "5, 7"),
        TARGET.replace("8, 8", "4, 4, 4").replace("0.576", "0.3")
        + '[flow]\nscale = "even"\nfeatures = 2\nhidden = [2]\n',
        TARGET.replace("8, 8", "64, 64") + '[flow]\nscale = "site"\nn_blocks = 3\n[sampling]\nintegrator = "omf2"\n',
    ],
)
def test_selftest_passes_on_other_parameters(text):
    assert [check for check in selftest.checks(config.parse_config(text)) if not check.passed] == []


def wrong_force(monkeypatch):
    right = lfq.Phi4.force
    monkeypatch.setattr(lfq.Phi4, "force", lambda self, phi: 1.0001 * right(self, phi))


def wrong_flow_force(monkeypatch):
    right = lfq.PulledBack.force
    monkeypatch.setattr(lfq.PulledBack, "force", lambda self, z: right(self, z) + 1e-3)


def wrong_log_determinant(monkeypatch):
    right = lfq.AffineFlow.forward

    def forward(self, z):
        x, log_det = right(self, z)
        return x, 1.001 * log_det

    monkeypatch.setattr(lfq.AffineFlow, "forward", forward)


def wrong_gradient(monkeypatch):
    right = lfq.AffineFlow.vjp

    def vjp(self, *arguments, **keywords):
        dz, dweights = right(self, *arguments, **keywords)
        return dz, dweights * (1 + 1e-3 * np.arange(dweights.size))

    monkeypatch.setattr(lfq.AffineFlow, "vjp", vjp)


def wrong_normalisation(monkeypatch):
    right = lfq.Gaussian.log_prob
    monkeypatch.setattr(lfq.Gaussian, "log_prob", lambda self, z: right(self, z) + 0.5)


def wrong_coupling(monkeypatch):
    right = lfq.Phi4._record

    def record(self):
        found = right(self)
        found["lam"] *= 1.05
        return found

    monkeypatch.setattr(lfq.Phi4, "_record", record)


def wrong_acceptance(monkeypatch):
    right = lfq.HMC.advance

    def advance(self, *arguments, **keywords):
        block = right(self, *arguments, **keywords)
        return dataclasses.replace(block, dh=block.dh + 0.05)

    monkeypatch.setattr(lfq.HMC, "advance", advance)


def wrong_hopping(monkeypatch):
    right = lfq.HMC.advance

    def advance(self, *arguments, **keywords):
        block = right(self, *arguments, **keywords)
        return dataclasses.replace(block, observables=block.observables | {"M": 1.1 * block.observables["M"]})

    monkeypatch.setattr(lfq.HMC, "advance", advance)


def forgetful_checkpoint(monkeypatch):
    right = lfq.HMC.load
    monkeypatch.setattr(lfq.HMC, "load", lambda self, path: dataclasses.replace(right(self, path), trajectory=0))


def forgetful_training(monkeypatch):
    right = io.save_checkpoint

    def save(path, tensors, record):
        right(path, tensors | {"moments": 0 * tensors["moments"]} if "moments" in tensors else tensors, record)

    monkeypatch.setattr(sys.modules["lfq.train"], "save_checkpoint", save)


def one_stream_for_all(monkeypatch):
    right = lfq._core.normal

    def normal(seed, purpose, trajectory, first_chain, n_chains, out, n_threads):
        right(seed, 0, trajectory, first_chain, n_chains, out, n_threads)

    monkeypatch.setattr(lfq._core, "normal", normal)


def diverging_flow(monkeypatch):
    right = lfq.HMC.sample

    def sample(self, *arguments, **keywords):
        if isinstance(self.theory, lfq.PulledBack):
            raise lfq.NotFiniteError("dH is nan in chain 3")
        return right(self, *arguments, **keywords)

    monkeypatch.setattr(lfq.HMC, "sample", sample)


@pytest.mark.parametrize(
    ("breakage", "named"),
    [
        (forgetful_checkpoint, "restarts give the bits"),
        (forgetful_training, "training: a restart"),
        (one_stream_for_all, "no block occurs twice"),
        (wrong_force, "force = -dS/dphi"),
        (wrong_flow_force, "flow-HMC force"),
        (wrong_log_determinant, "log-determinant"),
        (wrong_gradient, "gradient of the loss"),
        (wrong_normalisation, "<w> = Z"),
        (wrong_coupling, "virial"),
        (wrong_acceptance, "exp(-dH)"),
        (wrong_hopping, "free propagator"),
        (diverging_flow, "flow-HMC: dH is nan in chain 3"),
    ],
)
def test_selftest_fails_on_broken_physics(breakage, named, monkeypatch):
    breakage(monkeypatch)
    settings = config.parse_config(TARGET + '[[prior]]\nkind = "gaussian"\n')
    failed = (check for check in selftest.checks(settings) if not check.passed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RunWarning)
        assert any(named in check.name for check in failed)


def test_a_failed_selftest_sets_the_exit_code(tmp_path, capsys, monkeypatch):
    failure = selftest.Check("energy", float("nan"), 1.0, "standard errors")
    monkeypatch.setattr(selftest, "checks", lambda _: iter([failure]))
    assert lfq_main("selftest", write_config(tmp_path)) == 1
    assert re.search("FAIL  energy.*nan.*1 failed", capsys.readouterr().out, re.DOTALL)
