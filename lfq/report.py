"""The tables of a run and of a comparison, and a report.html that needs nothing but itself."""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import Any

from .analysis import with_error
from .comparison import COLLAPSED, JUDGED_TAU, completed
from .config import Config

__all__ = [
    "COLUMNS",
    "COMPARISON_COLUMNS",
    "comparison_notes",
    "comparison_report",
    "comparison_rows",
    "comparison_text",
    "footnotes",
    "html_report",
    "table_rows",
]

COLUMNS = (
    "sampler",
    "prior",
    "flow ESS",
    "accept",
    "steps",
    "tau_int M^2",
    "tau_int phi^2",
    "tau_int smeared",
    "traj / s",
    "cost [ms]",
    "cost [forces]",
    "training [s]",
    "pays off [samples]",
)
"""Headings of the table; `footnotes` explains them."""

COMPARISON_COLUMNS = (
    "sampler",
    "settings",
    "accept",
    "tau_int M^2",
    "tau_int phi^2",
    "tau_int smeared",
    "cost [ms]",
    "cost [forces]",
    "ESS / s",
    "with training",
    "training [s]",
    "pays off [samples]",
    "sign of M",
    "tau_int sign",
    "reverse ESS",
    "chi^2 / 4",
)
"""Headings of the table of `lfq compare`; `comparison_notes` explains them."""

MARK = "*"
WRONG = "!"


def _pay_off(sampler: dict[str, Any]) -> str:
    if "samples_to_pay_off" not in sampler:
        return ""
    samples = sampler["samples_to_pay_off"]
    return "never" if samples is None else _short(samples)


def _short(number: float) -> str:
    """Three significant digits, with an exponent only where zeros would pile up."""
    return f"{float(f'{number:.3g}'):.0f}" if 100 <= number < 1e7 else f"{number:.3g}"


def table_rows(results: dict[str, Any]) -> list[list[str]]:
    """The comparison as text, one row per sampler, in the order of `COLUMNS`.

    Parameters
    ----------
    results : dict
        As `lfq.experiment.collect` returns it.
    """
    rows = []
    for sampler in results["samplers"]:
        taus = [sampler["observables"][name] for name in ("M2", "phi2", "phi2_smeared")]
        rows.append(
            [
                sampler["name"] + ("" if sampler["long_enough"] else MARK),
                sampler["prior"] or "",
                "" if sampler["prior"] is None else f"{sampler['ess']:.2g}",
                f"{sampler['acceptance']:.3f}",
                str(sampler["n_steps"]),
                *(with_error(tau["tau_int"], tau["tau_int_error"]) for tau in taus),
                _short(1 / sampler["seconds_per_trajectory"]),
                _short(1e3 * sampler["cost_per_independent_sample_s"]),
                _short(sampler["cost_per_independent_sample_force_evaluations"]),
                "" if sampler["prior"] is None else f"{sampler['train_seconds']:.1f}",
                _pay_off(sampler),
            ]
        )
    return rows


def footnotes(results: dict[str, Any]) -> list[str]:
    """What a reader of the table must know, one sentence each."""
    first = results["samplers"][0]
    notes = [
        "tau_int = 1/2 + sum rho(t) of M^2, phi^2 and smeared phi^2, in trajectories of length "
        f"{first['trajectory_length']:g} unless said. A flow that stretches the latents takes longer steps in the "
        "field: compare it with the plain HMC of greater length too.",
        "Cost of an independent sample: 2 tau_int trajectories of the slowest of the three, in wall time "
        f"with {first['n_chains']} chains on {results['machine']['threads']} threads and in force "
        "evaluations; training, which pays off after so many samples against the cheaper plain HMC, not included.",
    ]
    if not all(sampler["long_enough"] for sampler in results["samplers"]):
        notes.append(f"{MARK} shorter than 1000 tau_int over all chains: its errors are not reliable.")
    for sampler in results["samplers"]:
        label = sampler["name"] if sampler["prior"] is None else f"{sampler['name']}, {sampler['prior']}"
        notes += [f"{label}: {concern}." for concern in sampler["concerns"]]
    return notes


def comparison_rows(results: dict[str, Any]) -> list[list[str]]:
    """The table of `lfq compare` as text, one row per sampler, in the order of `COMPARISON_COLUMNS`.

    Parameters
    ----------
    results : dict
        Of `lfq.Comparison`.
    """

    def maybe(value, write) -> str:
        return "" if value is None else write(value)

    rows = []
    for sampler in results["samplers"]:
        if "error" in sampler:
            rows.append([sampler["name"] + WRONG, "failed", *[""] * (len(COMPARISON_COLUMNS) - 2)])
            continue
        taus = [sampler["observables"][name] for name in ("M2", "phi2", "phi2_smeared")]
        trained = sampler["train_seconds"] > 0
        marks = ("" if sampler["long_enough"] else MARK) + ("" if sampler.get("agrees", True) else WRONG)
        rows.append(
            [
                sampler["name"] + marks,
                sampler["settings"],
                maybe(sampler["acceptance"], "{:.3f}".format),
                *(maybe(t["tau_int"], lambda tau, t=t, s=sampler: _tau_int(tau, t["tau_int_error"], s)) for t in taus),
                _short(1e3 * sampler["cost_per_independent_sample_s"]),
                _short(sampler["cost_per_independent_sample_force_evaluations"]),
                _short(sampler["n_effective_per_second"]),
                _short(sampler["n_effective_per_second_with_training"]) if trained else "",
                f"{sampler['train_seconds']:.1f}" if trained else "",
                _pay_off(sampler),
                _measured(sampler["sign"], sampler["sign_error"]) if sampler["judged"] else "",
                maybe(sampler["sign_tau_int"], _short),
                maybe(sampler.get("reverse_ess"), "{:.2g}".format),
                maybe(sampler.get("chi2"), lambda chi2: f"{chi2 / 4:.2f}"),
            ]
        )
    return rows


def _tau_int(tau: float, error: float, sampler: dict[str, Any]) -> str:
    """With its error, or as a lower bound where the run is too short to know."""
    return with_error(tau, error) if sampler["judged"] else f"> {_short(tau)}"


def comparison_notes(results: dict[str, Any]) -> list[str]:
    """What a reader of the table must know, one sentence each."""
    notes = [
        f"Every sampler: {results['seconds']:g} s of sampling with {results['n_chains']} chains side by side, tuned "
        "on its own to least cost. tau_int = 1/2 + sum rho(t), in trajectories.",
        "Cost of an independent sample: 2 tau_int trajectories of the slowest of M^2, phi^2 and smeared phi^2, in "
        "wall time and in force evaluations (through a flow: of its latents; a sweep, of clusters or of a heat bath, "
        "counts as one). "
        "ESS / s is its inverse; 'with training' divides the run's independent samples by sampling and training time.",
        "The sign of M averages to zero, and its tau_int tells how long the sampler stays in one phase. Reverse ESS: "
        "of the flow, from fields of HMC with clusters; near zero where the flow misses part of them. chi^2 / 4: of "
        f"phi^2, nn, |M| and smeared phi^2 against all others, for runs of more than {JUDGED_TAU} tau_int.",
    ]
    samplers = completed(results)
    notes += [f"{WRONG} FAILED: {s['name']}: {s['error']}" for s in results["samplers"] if "error" in s]
    if not all(s["long_enough"] for s in samplers):
        notes.append(
            f"{MARK} shorter than 1000 tau_int over all chains, or weights without a variance: errors are not reliable."
        )
    notes += [f"{s['name']}: {concern}." for s in samplers for concern in s.get("concerns", ())]
    frozen = [
        s["name"]
        for s in samplers
        if s["sign_changes"] is not None and not s["sign_changes"] * s["n_samples"] * s["n_chains"] > 10
    ]
    if frozen:
        notes.append(
            f"{', '.join(frozen)}: the sign of M hardly ever changed. Chains stay in the phase they began in, and what "
            "depends on the sign is not sampled."
        )
    for s in samplers:
        own, reverse = s.get("flow_ess"), s.get("reverse_ess")
        if own is not None and reverse is not None and reverse < COLLAPSED * own:
            notes.append(
                f"{WRONG} COLLAPSE: the flow of {s['name']} leaves out part of the theory's fields: its ESS is "
                f"{own:.2g} by fields of its own, and {reverse:.2g} by those of HMC with clusters."
            )
        if s["judged"] and None not in (s["sign"], s["sign_error"]) and abs(s["sign"]) > 5 * s["sign_error"]:
            notes.append(
                f"{WRONG} BROKEN SYMMETRY: the sign of M averages to {_measured(s['sign'], s['sign_error'])} in "
                f"{s['name']}, not to zero: a phase is missing, or has the wrong weight."
            )
    if results["disagreeing"]:
        notes.append(
            f"{WRONG} DISAGREEMENT: the expectation values of {' and '.join(results['disagreeing'])} are not those "
            "of the other samplers (probability below 1e-5): wrong, or far shorter than the errors tell."
        )
    return notes


def comparison_text(results: dict[str, Any]) -> str:
    """The table and its notes as plain text."""
    lines = [list(COMPARISON_COLUMNS), *comparison_rows(results)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = [
        "  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]
    return "\n".join([*rows, "", *comparison_notes(results)])


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; }
body { max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th { vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
figure { margin: 1.5rem 0; } img { max-width: 100%; } figcaption, .note { color: #555; font-size: 0.9rem; }
pre { background: #f5f5f5; padding: 1rem; overflow-x: auto; font-size: 0.8rem; }
"""


def _table(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    lines = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
    body = "".join(f"<tr>{line}</tr>\n" for line in lines)
    table = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table>"
    return f'<div class="scroll">{table}</div>'


def _measured(value: float | None, error: float | None) -> str:
    return "undefined" if value is None or error is None else with_error(value, error)


def _observables(results: dict[str, Any]) -> str:
    samplers = completed(results)
    columns = ("observable", *(s["name"] + (f", {s['prior']}" if s["prior"] else "") for s in samplers))
    rows = []
    missing = {"value": None, "error": None}
    for name in max((sampler["observables"] for sampler in samplers), key=len, default=()):
        entries = [sampler["observables"].get(name, missing) for sampler in samplers]
        rows.append([name] + [_measured(entry["value"], entry["error"]) for entry in entries])
    rows.append(["exp(-dH)"] + [_measured(*sampler.get("exp_minus_dh", (None, None))) for sampler in samplers])
    return _table(columns, rows)


def html_report(results: dict[str, Any], config: Config, figures: dict[str, Path]) -> str:
    """One HTML page with the table, the figures, the configuration and the machine.

    Parameters
    ----------
    results : dict
        As `lfq.experiment.collect` returns it.
    config : Config
    figures : dict of str to Path
        PNG files by caption; embedded.
    """
    return _page(
        f"Flow-HMC and HMC on the {_lattice(config)} lattice",
        f"""Flows trained {config.training.n_steps} steps of
{config.training.batch_size}; samplers tuned to {100 * config.sampling.acceptance:g}% acceptance.""",
        _table(COLUMNS, table_rows(results)),
        footnotes(results),
        results,
        config,
        figures,
    )


def comparison_report(results: dict[str, Any], config: Config, figures: dict[str, Path]) -> str:
    """The same for `lfq compare`."""
    flows = f"Flows trained {config.training.n_steps} steps of {config.training.batch_size}." if config.prior else ""
    return _page(
        f"Samplers of phi^4 on the {_lattice(config)} lattice",
        flows,
        _table(COMPARISON_COLUMNS, comparison_rows(results)),
        comparison_notes(results),
        results,
        config,
        figures,
    )


def _lattice(config: Config) -> str:
    return " × ".join(map(str, config.target.shape))


def _page(title, remark, table, notes, results, config: Config, figures) -> str:
    target = config.target
    images = "\n".join(
        f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,'
        f'{base64.b64encode(path.read_bytes()).decode()}"><figcaption>{html.escape(caption)}</figcaption></figure>'
        for caption, path in figures.items()
    )
    facts = [[key, value] for key, value in (results["machine"] | results["versions"]).items()]
    notes = "\n".join(f'<p class="note">{html.escape(note)}</p>' for note in notes)
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{_STYLE}</style></head>
<body>
<h1>{html.escape(title)}</h1>
<p>phi^4 at beta = {target.beta:g}, lam = {target.lam:g}: S = sum [ -beta sum_mu phi_x phi_x+mu
+ (1 - 2 lam) phi^2 + lam phi^4 ]. {html.escape(remark)}</p>
<h2>Cost of an independent sample</h2>
{table}
{notes}
<h2>Figures</h2>
{images}
<h2>Expectation values</h2>
{_observables(results)}
<h2>Configuration</h2>
<pre>{html.escape(config.to_toml())}</pre>
<h2>Versions and machine</h2>
{_table(("", ""), facts)}
</body>
</html>
"""
