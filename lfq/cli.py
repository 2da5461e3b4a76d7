"""The command line: `lfq run`, `compare`, `info`, `selftest`, `default`, and `--cmakedir` and its like."""

import contextlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

from ._optional import load
from .embedding import OPTIONS

DEFAULT_OUT = Path("lfq-run")
COMPARISON_OUT = Path("lfq-comparison")


@contextlib.contextmanager
def _signals(unit: str = "trajectory") -> Iterator[Callable[[], int]]:
    """Catch the first SIGINT or SIGTERM, for the run to stop where it is complete; a second ends the process at once.

    Parameters
    ----------
    unit : str
        What is still finished after the first.

    Yields
    ------
    callable
        Returns the number of the signal that came, or 0.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def watch() -> None:
        # Signals arrive through the pipe even while the main thread is inside a kernel.
        while (number := os.read(reader, 1)) and number[0]:
            if number[0] not in numbers:
                continue
            if came:
                os._exit(128 + number[0])
            came.append(number[0])
            name = signal.Signals(number[0]).name
            print(f"lfq: {name}: finishing the {unit}; once more to stop at once", file=sys.stderr)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield lambda: came[0] if came else 0
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.write(writer, b"\0")
        watcher.join()
        os.close(reader)
        os.close(writer)


@contextlib.contextmanager
def _progress_bars(signalled: Callable[[], int] = lambda: 0) -> Iterator:
    """A callback as `lfq.experiment` wants it that draws one bar per stage.

    It raises KeyboardInterrupt once `signalled` returns the number of a signal.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[remark]}", style="dim"),
    )
    bars = Progress(*columns, refresh_per_second=5)
    tasks: dict = {}

    def report(stage: str, done: int, total: int, remark: str) -> None:
        if stage not in tasks:
            bars.start()
            tasks[stage] = bars.add_task(stage, total=total, remark=remark)
        bars.update(tasks[stage], completed=done, remark=remark)
        if signalled():
            raise KeyboardInterrupt

    try:
        yield report
    finally:
        if tasks:
            bars.stop()


def _print_table(lines: list[list[str]], notes: list[str], left: str) -> None:
    """A table with its headings in the first line, turned round where it is too wide; notes; what is where."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    columns = zip(*lines, strict=True)
    widths = [max(len(word) for word in (*heading.split(), *cells)) for heading, *cells in columns]
    n_labels, needed = 2, sum(widths) + 3 * len(widths)
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, needed)
    if console.width < needed:
        lines, n_labels = [list(line) for line in zip(*lines, strict=True)], 1
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for index, heading in enumerate(lines[0]):
        justify = "left" if index < n_labels else "right"
        table.add_column(Text(heading), justify=justify, vertical="bottom", min_width=widths[index])
    for line in lines[1:]:
        table.add_row(*map(Text, line))
    console.print(table)
    for note in notes:
        console.print(Text(note, style="bold red" if note.startswith("!") else "dim"))
    console.print(Text(f"\n{left}"))


def _print_results(results: dict, out: Path) -> None:
    from .report import COLUMNS, footnotes, table_rows

    left = f"results.json, run.h5, flows and report.html are in {out}"
    _print_table([list(COLUMNS), *table_rows(results)], footnotes(results), left)


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return "none" if value is None else str(value)


def _application():
    typer = load("typer", "the command line")
    load("rich", "the command line")
    app = typer.Typer(
        help="Lattice phi^4: HMC, trivializing flows learned from coarser lattices, flow-HMC.",
        epilog="For build systems: --cmakedir, --includes, --libs, --pkgconfigdir.",
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    config_argument = typer.Argument(help="Configuration file; the paper's example without one.")

    @app.command()
    def run(
        config: Annotated[Path | None, config_argument] = None,
        out: Annotated[Path, typer.Option(help="Directory of the results, new or empty.")] = DEFAULT_OUT,
        resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
        overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the run in --out first.")] = False,
    ) -> int:
        """Train flows from coarser lattices and compare flow-HMC with HMC."""
        from .config import load_config
        from .experiment import run_experiment

        loaded = None if resume and config is None else load_config(config)
        with _signals() as signalled:
            try:
                with _progress_bars(signalled) as progress:
                    results = run_experiment(loaded, out, resume=resume, overwrite=overwrite, progress=progress)
            except KeyboardInterrupt:
                print(f"lfq: interrupted; to continue: lfq run --resume --out {out}", file=sys.stderr)
                return 128 + (signalled() or signal.SIGINT)
        _print_results(results, out)
        return 0

    @app.command()
    def compare(
        config: Annotated[Path | None, config_argument] = None,
        out: Annotated[Path, typer.Option(help="Directory of the results, new or empty.")] = COMPARISON_OUT,
        resume: Annotated[bool, typer.Option("--resume", help="Continue the comparison in --out.")] = False,
        overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the comparison in --out.")] = False,
    ) -> int:
        """Compare samplers of one theory, each tuned on its own, at equal budget."""
        import warnings

        from . import report
        from .comparison import DisagreementWarning, FailureWarning, completed
        from .config import load_config
        from .experiment import run_comparison

        loaded = None if resume and config is None else load_config(config)
        # Said in the table's notes and by the exit code.
        for category in (DisagreementWarning, FailureWarning):
            warnings.simplefilter("ignore", category)
        with _signals("block of samples") as signalled:
            try:
                with _progress_bars(signalled) as progress:
                    results = run_comparison(loaded, out, resume=resume, overwrite=overwrite, progress=progress)
            except KeyboardInterrupt:
                print(f"lfq: interrupted; to continue: lfq compare --resume --out {out}", file=sys.stderr)
                return 128 + (signalled() or signal.SIGINT)
        lines = [list(report.COMPARISON_COLUMNS), *report.comparison_rows(results)]
        _print_table(lines, report.comparison_notes(results), f"results.json, flows and report.html are in {out}")
        return 1 if results["disagreeing"] or len(completed(results)) < len(results["samplers"]) else 0

    @app.command()
    def info() -> int:
        """Print the version, the instruction set, the threads, and whether a GPU can be used."""
        import lfq

        for key, value in lfq.info().items():
            print(f"{key.replace('_', ' '):<24}{_shown(value)}")
        return 0

    @app.command()
    def selftest(config: Annotated[Path | None, config_argument] = None) -> int:
        """Check the physics on the parameters of a configuration, in seconds."""
        from .config import load_config
        from .selftest import checks

        n_failed = 0
        for check in checks(load_config(config)):
            n_failed += not check.passed
            print(check, flush=True)
        print(f"{n_failed} failed" if n_failed else "all passed")
        return 1 if n_failed else 0

    @app.command()
    def default() -> int:
        """Print the default configuration, a commented TOML file to start from."""
        from .config import default_toml

        print(default_toml(), end="")
        return 0

    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    arguments : sequence of str, optional
        Without the program's name; those of the process by default.

    Returns
    -------
    int
        0; 1 where a self-test or a sampler failed or samplers disagree; 2 after an error, told in one line on
        stderr; 130 or 143 when SIGINT or SIGTERM stopped it.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    # For build systems, with or without the packages of the command line.
    if all(argument in OPTIONS for argument in arguments):
        try:
            print(*(OPTIONS[argument]() for argument in arguments))
        except FileNotFoundError as error:
            return _fail(error)
        return 0
    try:
        application = _application()
    except ImportError as error:
        return _fail(error)
    from . import NotFiniteError
    from .config import ConfigError
    from .io import FileFormatError, ParameterError

    def show(message, category, *_, **__) -> None:
        print("lfq: warning:", " ".join(str(message).split()), file=sys.stderr)

    # With standalone_mode off, what is wrong with the arguments arrives as an exception.
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show
            code = application(arguments, prog_name="lfq", standalone_mode=False)
    except (ConfigError, FileFormatError, ImportError, OSError, ParameterError, RuntimeError, NotFiniteError) as error:
        return _fail(error)
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        return _fail(error.format_message())
    return code or 0


def _fail(error: object) -> int:
    print("lfq: error:", " ".join(str(error).split()), file=sys.stderr)
    return 2
