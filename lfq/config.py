"""The configuration of `lfq run` and `lfq compare`: TOML in, checked frozen dataclasses out.

Every error is a `ConfigError` that names the section, the key and what is wrong with it, before any
work starts.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import sys
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from ._optional import load

__all__ = [
    "ChainConfig",
    "ComparisonConfig",
    "Config",
    "ConfigError",
    "FlowConfig",
    "LadderConfig",
    "PriorConfig",
    "RunConfig",
    "SamplerConfig",
    "SamplingConfig",
    "TargetConfig",
    "TrainingConfig",
    "default_toml",
    "load_config",
    "parse_config",
]


MAX_CHARACTERS = 1 << 18
"""Longest configuration that is read."""

MAX_NAME = 64
"""Longest name of a prior or a sampler: some become names of files."""


class ConfigError(ValueError):
    """A configuration that cannot be run; the message reads ``config: [section] key: what is wrong``."""

    def __init__(self, section: str, key: str, problem: str):
        where = " ".join(part for part in (f"[{section}]" if section else "", key) if part)
        super().__init__(f"config: {where}: {problem}" if where else f"config: {problem}")


def _key(default: Any = dataclasses.MISSING, **checks: Any) -> Any:
    return field(default=default, metadata=checks)


@dataclass(frozen=True)
class RunConfig:
    """``[run]``: seed, type of the fields, threads (0: all)."""

    seed: int = _key(1, at_least=0, at_most=2**63 - 1)
    dtype: str = _key("float64", choices=("float64", "float32"))
    threads: int = _key(0, at_least=0)


@dataclass(frozen=True)
class TargetConfig:
    """``[target]``: the theory to sample."""

    shape: tuple[int, ...] = _key(at_least=2, lengths=(1, 4))
    beta: float = _key()
    lam: float = _key()


@dataclass(frozen=True)
class FlowConfig:
    """``[flow]``: arguments of `lfq.AffineFlow`."""

    kernel_size: int = _key(3, at_least=3, at_most=9, odd=True)
    n_blocks: int = _key(1, at_least=1)
    hidden: tuple[int, ...] = _key((), at_least=1, at_most=64, lengths=(0, 4))
    activation: str = _key("tanh", choices=("tanh", "leaky_relu"))
    bias: bool = _key(False)
    scale: str = _key("exp(-|s|)", choices=("exp(-|s|)", "exp(s)", "even", "site"))
    rescale: bool = _key(True)
    features: int | None = _key(None, at_least=1, at_most=8)
    sublattices: bool | None = _key(None)  # multiscale flows without hidden layers have them, others not
    order: str | None = _key(None)  # of couplings; by default as lfq.MultiscaleFlow says, else the checkerboard's


@dataclass(frozen=True)
class TrainingConfig:
    """``[training]``: arguments of `lfq.train`."""

    n_steps: int = _key(1000, at_least=1)
    batch_size: int = _key(500, at_least=2)
    learning_rate: float = _key(0.01, above=0)


@dataclass(frozen=True)
class ChainConfig:
    """``[prior_chains]``: the HMC that samples coarser lattices."""

    n_between: int = _key(20, at_least=1)
    tau: float = _key(1.0, above=0)
    n_steps: int = _key(10, at_least=1)
    n_warmup: int = _key(200, at_least=0)


@dataclass(frozen=True)
class PriorConfig:
    """``[[prior]]``: one prior to train from. `name` labels it in results and files; its kind by default."""

    kind: str = _key(choices=("gaussian", "lattice", "interleave", "upsample"))
    name: str = _key("", pattern=r"[A-Za-z0-9_-]*")
    beta: float | None = _key(None)
    width: float | None = _key(None, above=0)
    scale: float | None = _key(None, above=0)


@dataclass(frozen=True)
class SamplingConfig:
    """``[sampling]``: HMC of the target, and flow-HMC with every trained flow."""

    n_chains: int = _key(64, at_least=1)
    n_samples: int = _key(4000, at_least=8)
    n_warmup: int = _key(500, at_least=0)
    tau: float = _key(1.0, above=0)
    long_tau: float = _key(0.0, at_least=0)
    acceptance: float = _key(0.9, above=0, below=1)
    integrator: str = _key("leapfrog", choices=("leapfrog", "omf2", "omf4"))
    block_size: int = _key(500, at_least=1)


@dataclass(frozen=True)
class ComparisonConfig:
    """``[comparison]``: what `lfq compare` gives to each sampler."""

    seconds: float = _key(20.0, above=0)
    n_chains: int = _key(64, at_least=2)
    n_warmup: int = _key(200, at_least=0)
    acceptance: float = _key(0.8, above=0, below=1)


SAMPLER_KINDS = (
    "hmc",
    "swendsen-wang",
    "wolff",
    "fourier",
    "heat-bath",
    "flow-hmc",
    "independence",
    "reweighting",
    "annealing",
)
"""What a ``[[sampler]]`` can be."""


@dataclass(frozen=True)
class SamplerConfig:
    """``[[sampler]]``: one sampler of `lfq compare`. `name` labels it; its kind, and prior, by default.

    `tau` is where the search for the trajectory length begins; with `tune = false` it is kept, and only the number
    of steps is tuned. The number of Wolff clusters, `n_updates`, is kept then, too.
    """

    kind: str = _key(choices=SAMPLER_KINDS)
    name: str = _key("", pattern=r"[A-Za-z0-9_., +-]*")
    prior: str | None = _key(None)
    tau: float = _key(1.0, above=0)
    tune: bool = _key(True)
    length_spread: float = _key(0.0, at_least=0, below=1)
    integrator: str = _key("leapfrog", choices=("leapfrog", "omf2", "omf4"))
    n_updates: int = _key(1, at_least=1)
    cluster: str | None = _key(None, choices=("swendsen-wang", "wolff"))
    n_temperatures: int = _key(20, at_least=1)
    resample: float = _key(0.0, at_least=0, at_most=1)


@dataclass(frozen=True)
class LadderConfig:
    """``[ladder]``: theories from the coarsest to the target; a flow is trained for all but the first.

    With the prior "multiscale" it is a `lfq.MultiscaleFlow` with the blocks of ``[flow]``, trained for all of them.
    """

    shapes: tuple[tuple[int, ...], ...] = _key(at_least=2)
    betas: tuple[float, ...] = _key()
    prior: str = _key("interleave", choices=("interleave", "upsample", "multiscale"))


@dataclass(frozen=True)
class Config:
    """A whole run. Attributes are the sections of the TOML file."""

    target: TargetConfig
    run: RunConfig = RunConfig()
    flow: FlowConfig = FlowConfig()
    training: TrainingConfig = TrainingConfig()
    prior_chains: ChainConfig = ChainConfig()
    prior: tuple[PriorConfig, ...] = ()
    sampling: SamplingConfig = SamplingConfig()
    ladder: LadderConfig | None = None
    comparison: ComparisonConfig | None = None
    sampler: tuple[SamplerConfig, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and scalars, without the keys that are not set."""

        def plain(value: Any) -> Any:
            if dataclasses.is_dataclass(value):
                items = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
                return {name: plain(item) for name, item in items if item is not None}
            return [plain(item) for item in value] if isinstance(value, tuple) else value

        return plain(self)

    def to_toml(self) -> str:
        """TOML text that `parse_config` reads back as an equal configuration."""
        lines: list[str] = []
        for section, content in self.to_dict().items():
            for table in content if isinstance(content, list) else [content]:
                lines.append(f"[[{section}]]" if isinstance(content, list) else f"[{section}]")
                lines += [f"{key} = {_toml(value)}" for key, value in table.items()]
                lines.append("")
        return "\n".join(lines)

    def differences(self, other: Config) -> list[str]:
        """Keys, as ``[section] key``, whose values differ and can change a result."""
        mine, theirs = self._flat(), other._flat()
        harmless = ("[run] threads", "[sampling] block_size")
        return [key for key in mine | theirs if mine.get(key) != theirs.get(key) and key not in harmless]

    def _flat(self) -> dict[str, Any]:
        flat = {}
        for section, content in self.to_dict().items():
            if isinstance(content, list):
                for index, table in enumerate(content, 1):
                    flat |= {f"[{section} {index}] {key}": value for key, value in table.items()}
            else:
                flat |= {f"[{section}] {key}": value for key, value in content.items()}
        return flat


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return repr(value)


def _shown(value: Any) -> str:
    """A value from a file for an error message, however large it is."""
    try:
        text = repr(value)
    except ValueError:  # An integer of thousands of digits.
        text = "a huge integer"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _nearest(word: str, words: list[str]) -> str:
    if len(word) > 100:
        return ""
    match = difflib.get_close_matches(word, words, n=1, cutoff=0.0)
    return f"; the nearest is {match[0]}" if match else ""


def _convert(section: str, key: str, value: Any, kind: str) -> Any:
    def fail(expected: str) -> ConfigError:
        return ConfigError(section, key, f"expected {expected}, got {_shown(value)}")

    kind = kind.removesuffix(" | None")
    if kind.startswith("tuple["):
        if not isinstance(value, list):
            raise fail("a list")
        inner = kind.removeprefix("tuple[").removesuffix(", ...]")
        return tuple(_convert(section, key, item, inner) for item in value)
    if kind == "bool":
        if not isinstance(value, bool):
            raise fail("true or false")
    elif kind == "int":
        if not isinstance(value, int) or isinstance(value, bool):
            raise fail("an integer")
    elif kind == "float":
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise fail("a number")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise fail("a finite number")
        return number
    elif not isinstance(value, str):
        raise fail("a string")
    return value


def _check(section: str, key: str, value: Any, checks: dict[str, Any]) -> None:
    if isinstance(value, tuple):
        low, high = checks.get("lengths", (1, math.inf))
        if not low <= len(value) <= high:
            raise ConfigError(section, key, f"needs {low} to {high} entries, got {len(value)}")
        for item in value:
            _check(section, key, item, checks)
        return
    if "choices" in checks and value not in checks["choices"]:
        choices = ", ".join(checks["choices"])
        nearest = _nearest(value, checks["choices"])
        raise ConfigError(section, key, f"must be one of {choices}, got {_shown(value)}{nearest}")
    if "pattern" in checks and not re.fullmatch(checks["pattern"], value):
        raise ConfigError(section, key, f"may hold letters, digits, - and _ only, got {_shown(value)}")
    if "pattern" in checks and len(value) > MAX_NAME:
        raise ConfigError(section, key, f"may have {MAX_NAME} characters, got {len(value)}")
    if "at_least" in checks and value < checks["at_least"]:
        raise ConfigError(section, key, f"must be at least {checks['at_least']}, got {_shown(value)}")
    if "at_most" in checks and value > checks["at_most"]:
        raise ConfigError(section, key, f"must be at most {checks['at_most']}, got {_shown(value)}")
    if "above" in checks and value <= checks["above"]:
        raise ConfigError(section, key, f"must be above {checks['above']}, got {_shown(value)}")
    if "below" in checks and value >= checks["below"]:
        raise ConfigError(section, key, f"must be below {checks['below']}, got {_shown(value)}")
    if checks.get("odd") and value % 2 == 0:
        raise ConfigError(section, key, f"must be odd, got {value}")


def _table(section: str, kind: type, table: Any) -> Any:
    if not isinstance(table, dict):
        raise ConfigError(section, "", f"expected a table, got {_shown(table)}")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    values = {}
    for key, value in table.items():
        if key not in fields:
            raise ConfigError(section, key, f"unknown key{_nearest(key, list(fields))}")
        values[key] = _convert(section, key, value, fields[key].type)
        _check(section, key, values[key], fields[key].metadata)
    for key, f in fields.items():
        if f.default is dataclasses.MISSING and key not in values:
            raise ConfigError(section, key, "is missing")
    return kind(**values)


_SECTIONS = {
    "run": RunConfig,
    "target": TargetConfig,
    "flow": FlowConfig,
    "training": TrainingConfig,
    "prior_chains": ChainConfig,
    "sampling": SamplingConfig,
    "ladder": LadderConfig,
    "comparison": ComparisonConfig,
}

_PRIOR_KEYS = {
    "gaussian": {},
    "lattice": {"beta": None},
    "interleave": {"beta": None},
    "upsample": {"beta": None, "width": 0.1, "scale": 1.0},
}


def _prior(index: int, table: Any) -> PriorConfig:
    section = f"prior {index}"
    prior = _table(section, PriorConfig, table)
    keys = _PRIOR_KEYS[prior.kind]
    for key in ("beta", "width", "scale"):
        value = getattr(prior, key)
        if value is not None and key not in keys:
            raise ConfigError(section, key, f"means nothing to the kind {prior.kind}")
        if value is None and key in keys:
            if keys[key] is None:
                raise ConfigError(section, key, f"is missing: the kind {prior.kind} needs it")
            prior = dataclasses.replace(prior, **{key: keys[key]})
    return prior if prior.name else dataclasses.replace(prior, name=prior.kind)


def _sampler(index: int, table: Any) -> SamplerConfig:
    sampler = _table(f"sampler {index}", SamplerConfig, table)
    name = ", ".join(filter(None, (sampler.kind, sampler.cluster, sampler.prior)))
    return sampler if sampler.name else dataclasses.replace(sampler, name=name)


def _check_samplers(config: Config) -> None:
    names: set[str] = set()
    trained = [prior.name for prior in config.prior]
    for index, sampler in enumerate(config.sampler, 1):
        section = f"sampler {index}"
        if sampler.name in names:
            raise ConfigError(section, "name", f"{sampler.name!r} is taken: give this sampler another name")
        names.add(sampler.name)
        if sampler.cluster is not None and sampler.kind != "heat-bath":
            raise ConfigError(section, "cluster", f"means nothing to the kind {sampler.kind}")
        needs = sampler.kind in ("flow-hmc", "independence", "reweighting")
        if sampler.prior is None:
            if needs:
                raise ConfigError(section, "prior", f"is missing: the kind {sampler.kind} needs a [[prior]] by name")
            continue
        if not needs and sampler.kind != "annealing":
            raise ConfigError(section, "prior", f"means nothing to the kind {sampler.kind}")
        if sampler.prior not in trained:
            problem = f"no [[prior]] is named {sampler.prior!r}{_nearest(sampler.prior, trained)}"
            raise ConfigError(section, "prior", problem)


def _check_stable(section: str, beta: float, lam: float, ndim: int) -> None:
    if lam < 0:
        raise ConfigError(section, "lam", f"must not be negative: the action is unbounded below, got {lam}")
    if lam == 0 and abs(beta) * ndim >= 1:
        problem = f"the action with lam = 0 is unbounded below for |beta| >= 1/{ndim}, got {beta}"
        raise ConfigError(section, "beta", problem)


def _check_together(config: Config) -> None:
    _check_samplers(config)
    allowed = {"even": (1, 2, 4, 8)}.get(config.flow.scale, (None,))
    if config.flow.features not in allowed:
        raise ConfigError("flow", "features", f"must be one of {allowed} with scale {config.flow.scale!r}")
    if config.flow.sublattices and config.flow.hidden:
        raise ConfigError("flow", "sublattices", f"goes without hidden layers, got hidden = {list(config.flow.hidden)}")
    target, ndim = config.target, len(config.target.shape)
    _check_stable("target", target.beta, target.lam, ndim)
    names: set[str] = set()
    for index, prior in enumerate(config.prior, 1):
        section = f"prior {index}"
        if prior.name in names:
            raise ConfigError(section, "name", f"{prior.name!r} is taken: give this prior another name")
        names.add(prior.name)
        if prior.beta is not None:
            _check_stable(section, prior.beta, target.lam, ndim)
    if config.prior or config.ladder:
        odd = [extent for extent in target.shape if extent % 2]
        if odd:
            raise ConfigError("target", "shape", f"the flow's checkerboard needs even extents, got {odd[0]}")
    if config.ladder is None:
        return
    shapes, betas = config.ladder.shapes, config.ladder.betas
    taken = next((name for name in names if name == "ladder" or name.startswith("ladder-")), None)
    if taken:
        raise ConfigError("ladder", "", f"a prior is named {taken}, too")
    if len(shapes) < 2 or len(shapes) != len(betas):
        problem = f"needs as many as shapes and at least 2, got {len(betas)} and {len(shapes)}"
        raise ConfigError("ladder", "betas", problem)
    for coarse, fine in zip(shapes, shapes[1:], strict=False):
        if tuple(2 * extent for extent in coarse) != fine:
            raise ConfigError("ladder", "shapes", f"{list(fine)} is not twice {list(coarse)}")
    if shapes[-1] != target.shape or betas[-1] != target.beta:
        raise ConfigError("ladder", "shapes", "the last level must be the target, with its beta")
    for beta in betas:
        _check_stable("ladder", beta, target.lam, ndim)
    if config.ladder.prior != "multiscale":
        return
    odd = [extent for extent in shapes[0] if extent % 2]
    if odd:
        raise ConfigError("ladder", "shapes", f"the flow's checkerboard needs even extents, got {odd[0]}")
    for key in ("activation", "bias", "rescale"):
        if getattr(config.flow, key) != getattr(FlowConfig(), key):
            raise ConfigError("flow", key, "cannot be chosen for the prior multiscale of [ladder]")


def parse_config(text: str) -> Config:
    """Read a configuration from TOML text.

    Raises
    ------
    ConfigError
        Anything that cannot be run: TOML that does not parse, an unknown or missing key, a wrong type,
        a value out of range, or values that do not fit together.
    """
    toml = load("tomllib" if sys.version_info >= (3, 11) else "tomli", "a configuration file")
    if len(text) > MAX_CHARACTERS:
        raise ConfigError("", "", f"{len(text)} characters are above the limit of {MAX_CHARACTERS}")
    try:
        content = toml.loads(text)
    except (ValueError, RecursionError) as error:
        # Not only TOMLDecodeError: an integer of thousands of digits, a date that does not exist.
        raise ConfigError("", "", f"not valid TOML: {error}") from None
    sections: dict[str, Any] = {}
    for section, table in content.items():
        if section == "prior":
            if not isinstance(table, list):
                raise ConfigError("prior", "", "is a list of tables: write [[prior]]")
            sections["prior"] = tuple(_prior(index, entry) for index, entry in enumerate(table, 1))
        elif section == "sampler":
            if not isinstance(table, list):
                raise ConfigError("sampler", "", "is a list of tables: write [[sampler]]")
            sections["sampler"] = tuple(_sampler(index, entry) for index, entry in enumerate(table, 1))
        elif section in _SECTIONS:
            sections[section] = _table(section, _SECTIONS[section], table)
        else:
            raise ConfigError(section, "", f"unknown section{_nearest(section, [*_SECTIONS, 'prior', 'sampler'])}")
    if "target" not in sections:
        raise ConfigError("target", "", "is missing")
    config = Config(**sections)
    _check_together(config)
    return config


def load_config(path: str | os.PathLike | None = None) -> Config:
    """Read a configuration file, or the default of the package where `path` is None.

    Raises
    ------
    ConfigError
        As `parse_config`, or the file cannot be read.
    """
    if path is None:
        return parse_config(default_toml())
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(MAX_CHARACTERS + 1)
    except OSError as error:
        raise ConfigError("", "", f"cannot read {os.fspath(path)}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError("", "", f"{os.fspath(path)} is not text in UTF-8") from None
    return parse_config(text)


def default_toml() -> str:
    """The commented default configuration."""
    return resources.files(__package__).joinpath("default.toml").read_text(encoding="utf-8")
