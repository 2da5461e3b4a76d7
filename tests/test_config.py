"""Configurations: the default, and every mistake named before any work starts."""

import dataclasses

import pytest

from lfq import config
from lfq.config import Config, ConfigError, load_config, parse_config

TARGET = "[target]\nshape = [16, 16]\nbeta = 0.634\nlam = 0.5\n"


def test_the_default_is_the_example_of_the_paper():
    default = load_config()
    assert (default.target.shape, default.target.beta, default.target.lam) == ((16, 16), 0.634, 0.5)
    assert (default.flow.kernel_size, default.flow.n_blocks, default.flow.hidden) == (3, 1, ())
    assert (default.training.n_steps, default.training.batch_size) == (1000, 500)
    assert [(prior.kind, prior.beta) for prior in default.prior] == [
        ("gaussian", None),
        ("lattice", 0.602),
        ("interleave", 0.576),
        ("upsample", 0.576),
    ]
    sampling = default.sampling
    assert (sampling.n_chains, sampling.tau, sampling.acceptance) == (64, 1.0, 0.9)
    # tau_int of M^2 is 28 here: enough for a thousand of them.
    assert default.sampling.n_chains * default.sampling.n_samples > 1000 * 28


def test_left_out_keys_have_the_values_of_the_default_file():
    default = load_config()
    sampling = dataclasses.replace(default.sampling, long_tau=0.0)
    assert Config(target=default.target) == dataclasses.replace(default, prior=(), sampling=sampling)
    assert parse_config(TARGET) == Config(target=default.target)


def test_toml_round_trip():
    text = TARGET + (
        '[run]\nseed = 9223372036854775807\ndtype = "float32"\n'
        "[flow]\nhidden = [8, 8]\nbias = true\nsublattices = false\n[training]\nlearning_rate = 1e-5\n"
        '[[prior]]\nkind = "upsample"\nname = "u-1"\nbeta = 0.5\nwidth = 0.2\n'
        '[ladder]\nshapes = [[8, 8], [16, 16]]\nbetas = [0.576, 0.634]\nprior = "upsample"\n'
    )
    parsed = parse_config(text)
    assert (parsed.prior[0].width, parsed.prior[0].scale) == (0.2, 1.0)
    assert parsed.flow.sublattices is False
    assert parsed.ladder.betas == (0.576, 0.634)
    assert parse_config(parsed.to_toml()) == parsed
    for default in (load_config(), parse_config(TARGET)):
        assert parse_config(default.to_toml()) == default


def test_integers_are_numbers():
    assert parse_config(TARGET.replace("0.5", "1")).target.lam == 1.0


def test_the_ladder_in_the_default_file_is_right():
    lines = config.default_toml().splitlines()
    commented = ("# [ladder]", "# prior", "# shapes", "# betas")
    ladder = [line.removeprefix("# ") for line in lines if line.startswith(commented)]
    text = TARGET.replace("16, 16", "32, 32").replace("0.634", "0.6614") + "\n".join(ladder)
    assert parse_config(text).ladder.shapes == ((8, 8), (16, 16), (32, 32))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = ", r"not valid TOML"),
        ("", r"\[target\]: is missing"),
        (TARGET + "[sampeling]\n", r"\[sampeling\]: unknown section; the nearest is sampling"),
        (TARGET + "[sampling]\nn_chain = 3", r"\[sampling\] n_chain: unknown key; the nearest is n_chains"),
        (
            TARGET + '[[prior]]\nkind = "gaussian"\nbeat = 1',
            r"\[prior 1\] beat: unknown key; the nearest is beta",
        ),
        ("run = 3\n" + TARGET, r"\[run\]: expected a table"),
        (TARGET + '[prior]\nkind = "gaussian"', r".prior.: is a list of tables: write ..prior.."),
        ("[target]\nshape = [16, 16]\nlam = 0.5", r"\[target\] beta: is missing"),
        (TARGET.replace("0.634", '"high"'), r"\[target\] beta: expected a number, got 'high'"),
        (TARGET.replace("0.634", "true"), r"\[target\] beta: expected a number"),
        (TARGET.replace("0.634", "nan"), r"\[target\] beta: expected a finite number"),
        (TARGET.replace("0.634", "inf"), r"\[target\] beta: expected a finite number"),
        (TARGET.replace("[16, 16]", "16"), r"\[target\] shape: expected a list"),
        (TARGET.replace("[16, 16]", "[]"), r"\[target\] shape: needs 1 to 4 entries"),
        (TARGET.replace("[16, 16]", "[2, 2, 2, 2, 2]"), r"\[target\] shape: needs 1 to 4 entries"),
        (TARGET.replace("[16, 16]", "[16, 16.0]"), r"\[target\] shape: expected an integer, got 16.0"),
        (TARGET.replace("[16, 16]", "[16, -16]"), r"\[target\] shape: must be at least 2, got -16"),
        (
            TARGET.replace("[16, 16]", "[16, 15]") + '[[prior]]\nkind = "gaussian"',
            r"\[target\] shape: .*even.*15",
        ),
        (
            TARGET.replace("lam = 0.5", "lam = -0.1"),
            r"\[target\] lam: must not be negative: .*unbounded below, got -0.1",
        ),
        (
            TARGET.replace("lam = 0.5", "lam = 0"),
            r"\[target\] beta: .*lam = 0 is unbounded below for \|beta\| >= 1/2",
        ),
        (TARGET + "[run]\nseed = -1", r"\[run\] seed: must be at least 0"),
        (TARGET + "[run]\nseed = 9223372036854775808", r"\[run\] seed: must be at most"),
        (TARGET + "[run]\nthreads = -1", r"\[run\] threads: must be at least 0"),
        (TARGET + '[run]\ndtype = "float46"', r"\[run\] dtype: must be one of .*the nearest is float64"),
        (TARGET + "[flow]\nkernel_size = 4", r"\[flow\] kernel_size: must be odd, got 4"),
        (TARGET + "[flow]\nkernel_size = 11", r"\[flow\] kernel_size: must be at most 9"),
        (TARGET + "[flow]\nn_blocks = 0", r"\[flow\] n_blocks: must be at least 1"),
        (TARGET + "[flow]\nn_blocks = -1", r"\[flow\] n_blocks: must be at least 1, got -1"),
        (TARGET + "[flow]\nhidden = [8, 0]", r"\[flow\] hidden: must be at least 1, got 0"),
        (TARGET + "[flow]\nhidden = [1, 1, 1, 1, 1]", r"\[flow\] hidden: needs 0 to 4 entries"),
        (TARGET + '[flow]\nactivation = "relu"', r"\[flow\] activation: must be one of tanh, leaky_relu"),
        (TARGET + "[flow]\nbias = 1", r"\[flow\] bias: expected true or false"),
        (TARGET + "[flow]\nscale = 1.0", r"\[flow\] scale: expected a string"),
        (TARGET + "[training]\nn_steps = -5", r"\[training\] n_steps: must be at least 1, got -5"),
        (TARGET + "[training]\nbatch_size = 0", r"\[training\] batch_size: must be at least 2"),
        (TARGET + "[training]\nbatch_size = 1e3", r"\[training\] batch_size: expected an integer"),
        (TARGET + "[training]\nlearning_rate = 0", r"\[training\] learning_rate: must be above 0"),
        (TARGET + "[prior_chains]\nn_between = 0", r"\[prior_chains\] n_between: must be at least 1"),
        (TARGET + "[prior_chains]\nn_warmup = -1", r"\[prior_chains\] n_warmup: must be at least 0"),
        (TARGET + "[sampling]\nn_chains = -64", r"\[sampling\] n_chains: must be at least 1, got -64"),
        (TARGET + "[sampling]\nn_samples = 4", r"\[sampling\] n_samples: must be at least 8"),
        (TARGET + "[sampling]\ntau = -1.0", r"\[sampling\] tau: must be above 0"),
        (TARGET + "[sampling]\nacceptance = 1", r"\[sampling\] acceptance: must be below 1"),
        (TARGET + '[sampling]\nintegrator = "leap"', r"\[sampling\] integrator: .*the nearest is leapfrog"),
        (TARGET + "[[prior]]\nbeta = 1.0", r"\[prior 1\] kind: is missing"),
        (
            TARGET + '[[prior]]\nkind = "interleaf"\nbeta = 1',
            r"\[prior 1\] kind: .*the nearest is interleave",
        ),
        (
            TARGET + '[[prior]]\nkind = "interleave"',
            r"\[prior 1\] beta: is missing: the kind interleave needs it",
        ),
        (
            TARGET + '[[prior]]\nkind = "gaussian"\nbeta = 1.0',
            r"\[prior 1\] beta: means nothing to the kind gaussian",
        ),
        (TARGET + '[[prior]]\nkind = "lattice"\nbeta = 1\nwidth = 0.1', r"\[prior 1\] width: means nothing"),
        (
            TARGET + '[[prior]]\nkind = "upsample"\nbeta = 1.0\nwidth = 0',
            r"\[prior 1\] width: must be above 0",
        ),
        (TARGET + '[[prior]]\nkind = "gaussian"\nname = "../x"', r"\[prior 1\] name: may hold letters"),
        (TARGET + 2 * '[[prior]]\nkind = "gaussian"\n', r"\[prior 2\] name: 'gaussian' is taken"),
        (
            TARGET + '[flow]\nbias = true\n[ladder]\nshapes = [[8, 8], [16, 16]]\nbetas = [0.576, 0.634]\n'
            'prior = "multiscale"',
            r"\[flow\] bias: .*multiscale",
        ),
        (TARGET + '[flow]\nscale = "even"', r"\[flow\] features: .*scale 'even'"),
        (TARGET + "[flow]\nsublattices = 1", r"\[flow\] sublattices: expected true or false"),
        (
            TARGET + "[flow]\nsublattices = true\nhidden = [4]",
            r"\[flow\] sublattices: goes without hidden layers, got hidden = \[4\]",
        ),
        (TARGET + "[ladder]\nshapes = [[16, 16]]\nbetas = [0.634]", r"\[ladder\] betas: .*at least 2"),
        (
            TARGET + "[ladder]\nshapes = [[4, 4], [16, 16]]\nbetas = [0.5, 0.634]",
            r"\[ladder\] shapes: \[16, 16\] is not twice",
        ),
        (
            TARGET + "[ladder]\nshapes = [[4, 4], [8, 8]]\nbetas = [0.5, 0.6]",
            r"\[ladder\] shapes: the last level",
        ),
    ],
)
def test_mistakes_are_named(text, message):
    with pytest.raises(ConfigError, match="^config: " + message) as caught:
        parse_config(text)
    assert "\n" not in str(caught.value)


def test_unreadable_files(tmp_path):
    with pytest.raises(ConfigError, match="cannot read .*absent.toml: No such file"):
        load_config(tmp_path / "absent.toml")
    (tmp_path / "latin.toml").write_bytes(b"# \xe9")
    with pytest.raises(ConfigError, match="not text in UTF-8"):
        load_config(tmp_path / "latin.toml")


def test_differences_name_the_keys_that_matter():
    default = load_config()
    assert default.differences(default) == []
    more_threads = dataclasses.replace(default, run=dataclasses.replace(default.run, threads=1))
    assert default.differences(more_threads) == []
    other = dataclasses.replace(default, target=dataclasses.replace(default.target, beta=0.6))
    assert default.differences(other) == ["[target] beta"]
    assert default.differences(dataclasses.replace(default, prior=default.prior[:-1])) == [
        f"[prior 4] {key}" for key in ("kind", "name", "beta", "width", "scale")
    ]
