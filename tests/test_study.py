"""The study of examples/study: a configuration end to end, and the page from the committed results."""

import importlib.util
import json
from pathlib import Path

import pytest

for package in ("matplotlib", "pyerrors"):
    pytest.importorskip(package)

ROOT = Path(__file__).parents[1]

CONFIG = """
[run]
seed = 3
dtype = "float32"

[target]
shape = [4, 4]
beta = 0.49
lam = 0.5

[training]
n_steps = 20
batch_size = 32

[prior_chains]
n_warmup = 20

[[prior]]
kind = "gaussian"

[[prior]]
kind = "upsample"
beta = 0.4

[sampling]
n_chains = 16
n_samples = 6000
n_warmup = 20

[[sampler]]
kind = "hmc"
tune = false

[[sampler]]
kind = "swendsen-wang"
tune = false

[[sampler]]
name = "upsample"
kind = "flow-hmc"
prior = "upsample"
tune = false

[study]
n_tau_int = 2500
"""

AFTER = """weights = "L04-first"
train = false
compose = ["L04-first"]
through_map = true
"""


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("study", ROOT / "examples" / "study" / "study.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def results(study, tmp_path_factory):
    """A directory with two runs, the second of which starts from the first one's flows."""
    found = tmp_path_factory.mktemp("study")
    configs = {"L04-first.toml": CONFIG, "L04-second.toml": CONFIG + AFTER}
    for name, text in configs.items():
        (found / name).write_text(text)
    study.main(["run", *(str(found / name) for name in configs), "--results", str(found)])
    return found


def test_a_configuration_runs_and_others_start_from_its_flows(study, results):
    first, second = (json.loads((results / f"L04-{n}.json").read_text()) for n in ("first", "second"))
    assert study.depth(results / "L04-second.toml") == 1
    assert len(first["trainings"]["upsample"]["history"]["loss"]) == len(
        first["trainings"]["upsample"]["history"]["step"]
    )
    assert second["trainings"]["upsample"]["weights"] == first["trainings"]["upsample"]["weights"]
    for record in (first, second):
        assert all(s["long_enough"] for s in record["samplers"])
        # Chi-square of four degrees of freedom: 30 is five sigma.
        assert all(s["chi2"] < 30 for s in record["samplers"])
    steps = [r["samplers"][2]["n_steps"] for r in (first, second)]
    assert steps[0] != steps[1]


def test_every_flow_gets_its_unit_costs(study, results):
    study.units(results, repeats=1)
    units = json.loads((results / "units.json").read_text())["units"]
    assert set(units) == {"L04-first", "L04-second"}
    assert all(set(run) == {"gaussian", "upsample"} for run in units.values())
    for unit in (unit for run in units.values() for unit in run.values()):
        assert set(unit) == {"plain_s", "force", "training_step", "warm_up"}
        assert all(value >= 0 for value in unit.values())


def test_the_page_shows_the_committed_results(study, tmp_path):
    docs = ROOT / "docs"
    page = (docs / "study.md").read_text()
    blank = page
    for name in study.TABLES:
        head, rest = blank.split(f"<!-- {name} -->", 1)
        blank = f"{head}<!-- {name} --><!-- /{name} -->{rest.split(f'<!-- /{name} -->', 1)[1]}"
    assert blank != page
    (tmp_path / "study.md").write_text(blank)
    study.main(["draw", "--results", str(docs / "study"), "--docs", str(tmp_path)])
    assert (tmp_path / "study.md").read_text() == page
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        path.name for path in (docs / "figures").glob("study-*.png")
    }


def test_every_result_is_that_of_its_configuration(study):
    results = ROOT / "docs" / "study"
    for path in study.CONFIGS.glob("*.toml"):
        record = study.stored(results, path.stem)
        config, own = study.load(path)
        assert record["config"] == config.to_toml()
        assert record["study"] == json.loads(json.dumps(vars(own)))
    assert sum(path.stat().st_size for path in results.iterdir()) < 2**20
