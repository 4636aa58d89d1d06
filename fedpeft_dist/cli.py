"""The commands. Each is thin: it reads its arguments, calls one function and prints.

Exit codes: 0 done; 2 the user's mistake, told in one `error:` line; 75 interrupted at a round boundary, run the same
command to go on; 1 anything else. Where nobody reads what a command prints, it goes on and its code does not change.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.load import default_run_name, load_config, with_values
from fedpeft_dist.config.paths import expand_path
from fedpeft_dist.runtime.errors import FirstToldError, PeerLostError, ToldElsewhereError
from fedpeft_dist.runtime.streams import lost_output, open_streams

EXIT_MISTAKE, EXIT_INTERRUPTED = 2, 75
GRACE_SECONDS = 5
UsageError = typer.BadParameter.__base__  # click's own or the copy that newer versions of typer carry

app = typer.Typer(
    name="fedpeft",
    help="Federated parameter-efficient fine-tuning: many clients side by side on one frozen backbone.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def user_path(text: str | Path) -> Path:
    """The parser of arguments that are paths. A path that exists as it is written is taken so.

    Raises:
        BadParameter: what no path can be.
    """
    try:
        return Path(text if os.path.lexists(text) else expand_path(str(text)))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


ConfigPath = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="A YAML file.", show_default=False, parser=user_path)
]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE ...]", help="Keys to override.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

# Heavy imports (torch, timm) stand inside the commands: `fedpeft --help` and a mistyped key answer at once.


@app.command()
def train(config: ConfigPath, overrides: Overrides = None) -> None:
    """Run a config, or go on with it where it was interrupted; alone, or under torchrun or srun."""
    from fedpeft_dist.runtime.interrupts import listen_for_stop
    from fedpeft_dist.runtime.launch import follow_agent

    with listen_for_stop(is_last=True) as stop:  # before the imports, which take seconds
        follow_agent()
        run_config = load_config(config, overrides or ())
        if run_config.output.name is None:
            run_config = with_values(run_config, "output", name=default_run_name(config, run_config))

        from fedpeft_dist.federation.run import start_and_run

        outcome = start_and_run(run_config, stop)
    _warn_of_lost_progress()
    if outcome == "interrupted":
        _leave_interrupted()


@app.command()
def cost(config: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Print what a config trains and sends, without data or weights."""
    run_config = load_config(config, overrides or ())

    from fedpeft_dist.federation.cost import compute_cost
    from fedpeft_dist.lanes.wire import MIB

    result = compute_cost(run_config)
    if as_json:
        print(json.dumps(asdict(result)))
        return
    federation = run_config.federation
    print(f"{config}: {run_config.method.name} on {run_config.backbone.name}")
    print(f"  trained parameters   {result.trainable_parameters:>14,} of {result.backbone_parameters:,}")
    for label, size in (
        ("a client", result.uplink_bytes_per_client),
        (f"a round of {federation.cohort} clients", result.uplink_bytes_per_round),
        (f"{federation.rounds} rounds", result.uplink_bytes_total),
    ):
        print(f"  uplink, {label:<24} {size / MIB:>14,.3f} MiB")
    print(f"  share of full fine-tuning's bytes {100 * result.share_of_full:.3f} %")


@app.command()
def partition(
    config: ConfigPath,
    overrides: Overrides = None,
    picture: Annotated[
        Path, typer.Option(metavar="PATH", help="Where the picture is written.", parser=user_path)
    ] = Path("partition.png"),
) -> None:
    """Show which client holds which classes: a table here and a picture in a file."""
    run_config = load_config(config, overrides or ())

    from fedpeft_dist.data import load_dataset
    from fedpeft_dist.data.partition import class_counts
    from fedpeft_dist.federation.simulation import make_clients
    from fedpeft_dist.lanes.random import derive_seed
    from fedpeft_dist.runtime.files import write_atomically
    from fedpeft_dist.tracking.partition_view import MAX_CLIENTS, partition_figure, partition_table

    dataset = load_dataset(run_config.data, derive_seed(run_config.seed, "data"))
    clients, _ = make_clients(run_config, dataset.train)
    counts = class_counts(clients, dataset.train.labels, dataset.num_classes, MAX_CLIENTS)
    figure = partition_figure(counts, clients.num_clients)
    try:
        write_atomically(picture, lambda path: figure.savefig(path, dpi=120))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--picture {picture}: cannot be written ({error})") from None
    Console().print(partition_table(counts, clients.num_clients))
    print(f"picture: {picture}")


@app.command()
def privacy(config: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Print what a config spends of its privacy budget, and with how much noise, without training."""
    run_config = load_config(config, overrides or ())
    section = run_config.privacy
    if section.name == "none":
        raise ConfigError("privacy.name: none leaves nothing to account for; give privacy.name: sample or user")

    from fedpeft_dist.federation.privacy_ahead import plan_ahead
    from fedpeft_dist.privacy.statements import describe, summarize

    plan = plan_ahead(run_config)
    num_rounds = run_config.federation.rounds if plan is None else plan.num_rounds
    figures = None if plan is None else plan.figures(num_rounds)
    if plan is not None and plan.warning is not None:
        print(f"warning: {plan.warning}", file=sys.stderr)
    if as_json:
        print(json.dumps({**summarize(section, figures), "rounds": num_rounds}))
        return
    print(f"{config}: {section.name}, {num_rounds} rounds")
    for name, value in ({} if figures is None else figures).items():
        if name not in ("name", "clients", "ranges"):
            print(f"  {name:<21} {value if isinstance(value, str) else f'{value:.6g}':>10}")
    if figures is not None and "clients" in figures:
        quantiles = figures["clients"]
        print(f"  {'over the clients':<21} {' '.join(f'{label:>10}' for label in quantiles)}")
        for name in quantiles["max"]:
            print(f"  {name:<21} {' '.join(f'{row[name]:>10.6g}' for row in quantiles.values())}")
        ranges = ", ".join(f"{name} {least:.6g} to {most:.6g}" for name, (least, most) in figures["ranges"].items())
        print(f"Each column is one client, at that quantile of epsilon. Clients that take part have {ranges}.")
    print("\n".join(describe(section, figures)))


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's directory.", parser=user_path)],
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate what a run has trained, on what its config evaluates on, wherever it was trained."""
    from fedpeft_dist.federation.simulation import evaluate_run
    from fedpeft_dist.runtime import process
    from fedpeft_dist.tracking.run_directory import RunDirectory

    directory = RunDirectory(run)
    if not directory.config_file.exists():
        raise ConfigError(f"{run}: no run's directory, it has no config.yaml")
    here = process.fit_to_machine(load_config(directory.config_file).runtime)
    own = [f"runtime.device={here.device}", f"runtime.precision={here.precision}"]
    config = load_config(directory.config_file, [*own, *(overrides or ())])
    with process.start(config.runtime) as runtime:
        metrics = evaluate_run(config, directory, runtime)
    if runtime.is_main:
        print(json.dumps(metrics) if as_json else "\n".join(f"{k} {v:.4f}" for k, v in metrics.items()))


@app.command()
def export(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run's directory.", show_default=False, parser=user_path)
    ],
    overrides: Overrides = None,
    export_format: Annotated[
        str, typer.Option("--format", metavar="FORMAT", help="timm, peft or safetensors.", show_default=False)
    ] = ...,
    output: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The export's folder; RUN/export/FORMAT without it.", parser=user_path),
    ] = None,
) -> None:
    """Write what a run has trained for use elsewhere: in timm, in Hugging Face peft, or as named tensors."""
    from fedpeft_dist.export import export_run
    from fedpeft_dist.tracking.run_directory import RunDirectory

    directory = RunDirectory(run)
    if not directory.config_file.exists():
        raise ConfigError(f"{run}: no run's directory, it has no config.yaml")
    folder, expression = export_run(
        load_config(directory.config_file, overrides or ()), directory, export_format, output
    )
    print(f"written: {folder}")
    print(f"reload:  {expression}")


@app.command()
def prefetch(config: ConfigPath, overrides: Overrides = None) -> None:
    """Fetch the weights and data of a config, or of a sweep's, where there is internet, and decode the images."""
    from fedpeft_dist.config.load import is_sweep, read_yaml

    if is_sweep(read_yaml(config)):
        from fedpeft_dist.sweeps import load_sweep

        configs = [cell.config for cell in load_sweep(config, overrides or ())]
    else:
        configs = [load_config(config, overrides or ())]

    from fedpeft_dist.backbones.timm_backbone import prefetch_weights
    from fedpeft_dist.data import prefetch_data

    failures = []
    steps = [("weights", prefetch_weights, [c.backbone for c in configs])]
    steps.append(("data", prefetch_data, [c.data for c in configs]))
    for what, fetch, sections in steps:
        results = {}
        for section in sections:  # what the cells of a sweep have in common is fetched once
            files = section.model_copy(update={key: None for key in ("clients", "max_train") if hasattr(section, key)})
            if str(files) in results:
                continue
            try:
                results[str(files)] = fetch(section)
            except ConfigError as error:  # the rest may still be had
                failures.append(str(error))
        for place in dict.fromkeys(results.values()):
            print(f"{what + ':':<8} {place or 'nothing to download'}", flush=True)
    if failures:
        raise ConfigError("; ".join(dict.fromkeys(failures)))


@app.command()
def report(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Where runs are; searched recursively.", parser=user_path)
    ],
    as_json: AsJson = False,
) -> None:
    """Compare the runs below a directory: tables here, and markdown, CSV and a page to look at (report.html) there."""
    from fedpeft_dist.reports.formats import rich_tables
    from fedpeft_dist.reports.report import json_report, make_report, printed_tables, write_report

    found = make_report(directory)
    if as_json:
        print(json.dumps(json_report(found)))
        return
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 160)  # a file or a pipe has no edge that a row should break at
    for table in printed_tables(found):
        for piece in rich_tables(table, console.width):
            console.print(piece)
            console.print()
    try:
        written = write_report(directory, found)
    except OSError as error:
        raise ConfigError(f"{directory}: the report cannot be written there ({error})") from None
    for path in written:
        print(f"written: {path}")


@app.command()
def pretrain(
    output: Annotated[Path, typer.Option(metavar="PATH", help="Where the weights go.", parser=user_path)] = Path(
        "glyph_vit.safetensors"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Training steps; fewer make a weaker backbone.")] = 6000,
) -> None:
    """Rebuild the embedded backbone, glyph_vit, from its recipe."""
    from fedpeft_dist.pretrain import pretrain as run_recipe

    run_recipe(output, steps=steps)


sweep_app = typer.Typer(help="Work through many runs that one file describes.", no_args_is_help=True)
app.add_typer(sweep_app, name="sweep")
SweepPath = Annotated[
    Path, typer.Argument(metavar="SWEEP", help="A sweep's YAML file.", show_default=False, parser=user_path)
]


@sweep_app.command("list")
def sweep_list(sweep: SweepPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """List a sweep's cells, in the order of their indices, with how far each has got."""
    from fedpeft_dist.sweeps import cell_rows, count_states, load_sweep

    rows = cell_rows(load_sweep(sweep, overrides or ()))
    if as_json:
        print(json.dumps(rows))
        return
    for row in rows:
        print(f"{row['index']:>4}  {row['state']:<11}  {row['name']}")
    print(f"{len(rows)} cells: {count_states(rows)}; below {Path(rows[0]['directory']).parent}")


@sweep_app.command("run")
def sweep_run(
    sweep: SweepPath,
    overrides: Overrides = None,
    index: Annotated[int | None, typer.Option(help="The one cell to run.", show_default=False)] = None,
) -> None:
    """Run a sweep's cells one after another, or one of them; what is complete is skipped, so are cells in work."""
    from fedpeft_dist.runtime.interrupts import listen_for_stop
    from fedpeft_dist.runtime.launch import follow_agent
    from fedpeft_dist.sweeps import load_sweep, pick_cell, work_through

    with listen_for_stop(is_last=True) as stop:
        follow_agent()
        cells = load_sweep(sweep, overrides or ())
        outcome = work_through(cells if index is None else [pick_cell(cells, index, sweep)], stop)
    _warn_of_lost_progress()
    if outcome.interrupted:
        _leave_interrupted()
    if outcome.failed:
        raise SystemExit(1)


def main() -> None:
    """The console script: runs a command and turns what goes wrong into an exit code."""
    open_streams()
    try:
        if app(standalone_mode=False):  # newer versions of typer turn Ctrl-C into a code that they return
            raise SystemExit(1)
        if reason := lost_output():
            print(f"error: stdout: cannot be written ({reason})", file=sys.stderr)
            raise SystemExit(1)
    except ConfigError as error:
        _fail(error, str(error))
    except UsageError as error:
        if not error.format_message():  # the help has been printed in its place
            raise SystemExit(EXIT_MISTAKE) from None
        _fail(error, error.format_message())
    except PeerLostError as error:
        if error.is_told:
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except (typer.Abort, KeyboardInterrupt):
        raise SystemExit(1) from None


def _warn_of_lost_progress() -> None:
    """What a run prints is its progress; what it did is in its files, so its exit code does not change."""
    if reason := lost_output():
        print(f"warning: stdout: cannot be written ({reason}); the run went on without it", file=sys.stderr)


def _leave_interrupted() -> NoReturn:
    from fedpeft_dist.runtime.launch import find_launch

    if find_launch().rank == 0:
        print("interrupted; run the same command to go on", file=sys.stderr)
    raise SystemExit(EXIT_INTERRUPTED)


def _fail(error: Exception, message: str) -> NoReturn:
    from fedpeft_dist.runtime.launch import find_launch

    launch = find_launch()
    # torchrun ends all ranks as soon as one has failed: who tells goes first, who does not leaves it the time to.
    is_silent = isinstance(error, ToldElsewhereError)
    if is_silent or (launch.local_rank and not isinstance(error, FirstToldError)):
        time.sleep(GRACE_SECONDS)
        # Before the group was formed every rank has made the same mistake, and one rank a machine has told it. Who is
        # still there was alone with its mistake, but not under srun, which lets all of them end by themselves.
        is_silent = is_silent or launch.is_step
    if not is_silent:
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(EXIT_MISTAKE)
