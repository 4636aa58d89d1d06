"""The commands. Each is thin: it reads its arguments, calls one function and prints.

Exit codes: 0 done; 2 the user's mistake, told in one `error:` line; 75 interrupted at a round boundary, run the same
command to go on; 1 anything else. A command whose output nobody reads goes on, and its code does not change.
"""

import json
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedpeft_dist import __version__
from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.load import load_config, load_run_config
from fedpeft_dist.runtime.command import leave_interrupted, run_app, stoppable, user_path

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
sweep_app = typer.Typer(help="Work through many runs that one file describes.", no_args_is_help=True)
app.add_typer(sweep_app, name="sweep")


def path_argument(metavar: str, text: str) -> typer.models.ArgumentInfo:
    return typer.Argument(metavar=metavar, help=text, show_default=False, parser=user_path)


def path_option(metavar: str, text: str) -> typer.models.OptionInfo:
    return typer.Option(metavar=metavar, help=text, parser=user_path)


ConfigPath = Annotated[Path, path_argument("CONFIG", "A YAML file.")]
SweepPath = Annotated[Path, path_argument("SWEEP", "A sweep's YAML file.")]
RunPath = Annotated[Path, path_argument("RUN", "A run's directory.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE ...]", help="Keys to override.")]
Ranks = Annotated[int, typer.Option(min=1, help="The ranks of the run.")]
GiB = Annotated[float | None, typer.Option(help="GiB of each GPU.", show_default="this machine's device")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

# Heavy imports (torch, timm) stand inside the commands: `fedpeft --help` and a mistyped key answer at once.


def show_version(is_asked: bool) -> None:
    if is_asked:
        print(f"fedpeft_dist {__version__}")
        raise typer.Exit


@app.callback(help="Federated parameter-efficient fine-tuning: many clients side by side on one frozen backbone.")
def fedpeft(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=show_version)
    ] = False,
) -> None:
    pass


@app.command()
def train(config: ConfigPath, overrides: Overrides = None) -> None:
    """Run a config, or go on with it where it was interrupted; alone, or under torchrun or srun."""
    with stoppable() as stop:  # before the imports, which take seconds
        run_config = load_run_config(config, overrides or ())

        from fedpeft_dist.federation.run import run

        outcome = run(run_config, stop)
    if outcome == "interrupted":
        leave_interrupted()


@app.command()
def cost(config: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Print what a config trains and sends, without data or weights."""
    run_config = load_config(config, overrides or ())

    from fedpeft_dist.federation.ahead import compute_cost
    from fedpeft_dist.reports.forecast import cost_lines

    result = compute_cost(run_config)
    title = f"{config}: {run_config.method.name} on {run_config.backbone.name}"
    print(json.dumps(asdict(result)) if as_json else "\n".join([title, *cost_lines(run_config, result)]))


@app.command()
def fit(
    config: ConfigPath, overrides: Overrides = None, ranks: Ranks = 1, gpu_memory: GiB = None, as_json: AsJson = False
) -> None:
    """Print the memory, traffic and balance of a config on so many ranks, and what fits; nothing is trained."""
    run_config = load_config(config, overrides or ())

    from fedpeft_dist.federation.fit import compute_fit
    from fedpeft_dist.reports.forecast import fit_lines

    result = compute_fit(run_config, ranks, gpu_memory)
    print(json.dumps(asdict(result)) if as_json else "\n".join(fit_lines(run_config, result)))


@app.command()
def partition(
    config: ConfigPath,
    overrides: Overrides = None,
    picture: Annotated[Path, path_option("PATH", "Where the picture is written.")] = Path("partition.png"),
) -> None:
    """Show which client holds which classes: a table here and a picture in a file."""
    run_config = load_config(config, overrides or ())

    from fedpeft_dist.data import load_dataset
    from fedpeft_dist.data.partition import class_counts
    from fedpeft_dist.federation.setup import make_clients
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

    from fedpeft_dist.federation.ahead import plan_privacy
    from fedpeft_dist.privacy.statements import summarize
    from fedpeft_dist.reports.forecast import privacy_lines

    plan = plan_privacy(run_config)
    num_rounds = run_config.federation.rounds if plan is None else plan.num_rounds
    figures = None if plan is None else plan.figures(num_rounds)
    if plan is not None and plan.warning is not None:
        print(f"warning: {plan.warning}", file=sys.stderr)
    lines = [f"{config}: {section.name}, {num_rounds} rounds", *privacy_lines(run_config, figures)]
    print(json.dumps({**summarize(section, figures), "rounds": num_rounds}) if as_json else "\n".join(lines))


@app.command()
def evaluate(run: RunPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Evaluate what a run has trained, on the data its config evaluates on, wherever it was trained."""
    from fedpeft_dist.federation.setup import evaluate_run
    from fedpeft_dist.runtime import process
    from fedpeft_dist.tracking.run_directory import RunDirectory

    directory = RunDirectory.existing(run)
    here = process.fit_to_machine(load_config(directory.config_file).runtime)
    own = [f"runtime.device={here.device}", f"runtime.precision={here.precision}"]
    config = load_config(directory.config_file, [*own, *(overrides or ())])
    with process.start(config.runtime) as runtime:
        metrics = evaluate_run(config, directory, runtime)
    if runtime.is_main:
        print(json.dumps(metrics) if as_json else "\n".join(f"{k} {v:.4f}" for k, v in metrics.items()))


@app.command()
def export(
    run: RunPath,
    overrides: Overrides = None,
    export_format: Annotated[
        str,
        typer.Option("--format", metavar="FORMAT", help="timm, peft, safetensors, torch or onnx.", show_default=False),
    ] = ...,
    output: Annotated[Path | None, path_option("DIR", "The export's folder; RUN/export/FORMAT without it.")] = None,
) -> None:
    """Write what a run has trained for use elsewhere: a model, a program, a peft adapter, or named tensors."""
    from fedpeft_dist.export import export_run
    from fedpeft_dist.tracking.run_directory import RunDirectory

    directory = RunDirectory.existing(run)
    config = load_config(directory.config_file, overrides or ())
    folder, expression = export_run(config, directory, export_format, output)
    print(f"written: {folder}")
    print(f"reload:  {expression}")


@app.command()
def prefetch(config: ConfigPath, overrides: Overrides = None) -> None:
    """Fetch the weights and data of a config, or of a sweep's, where there is internet, and decode the images."""
    from fedpeft_dist.sweeps.expansion import load_cells

    configs = [cell.config for cell in load_cells(config, overrides or ())]

    from fedpeft_dist.backbones.timm_backbone import prefetch_weights
    from fedpeft_dist.data import prefetch_data

    weights = {("weights:", str(c.backbone)): (prefetch_weights, c.backbone) for c in configs}
    # The number of clients or of samples does not change which files a data set needs.
    same = {"clients": None, "max_train": None}
    data = {("data:", str(c.data.model_copy(update=same))): (prefetch_data, c.data) for c in configs}
    lines, failures = [], []
    for (kind, _), (fetch, section) in (weights | data).items():
        try:
            lines.append(f"{kind:<8} {fetch(section) or 'nothing to download'}")
            if lines.count(lines[-1]) == 1:
                print(lines[-1], flush=True)
        except ConfigError as error:
            failures.append(str(error))  # everything else is fetched first
    if failures:
        raise ConfigError("; ".join(dict.fromkeys(failures)))


@app.command()
def report(
    directory: Annotated[Path, path_argument("DIR", "Where runs are; searched recursively.")], as_json: AsJson = False
) -> None:
    """Compare the runs below a directory: tables here, and markdown, CSV and a page to look at (report.html) there."""
    from fedpeft_dist.reports.report import Report, json_report, write_report
    from fedpeft_dist.reports.tables import rich_tables

    found = Report(directory)
    if as_json:
        print(json.dumps(json_report(found)))
        return
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 160)  # a file or a pipe has no edge that a row should break at
    for table in found.printed_tables:
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
    output: Annotated[Path, path_option("PATH", "Where the weights go.")] = Path("glyph_vit.safetensors"),
    steps: Annotated[int, typer.Option(min=1, help="Training steps; fewer make a weaker backbone.")] = 6000,
) -> None:
    """Rebuild the embedded backbone, glyph_vit, from its recipe."""
    from fedpeft_dist.pretrain import pretrain as run_recipe

    run_recipe(output, steps=steps)


@sweep_app.command("list")
def sweep_list(sweep: SweepPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """List a sweep's cells, in the order of their indices, with how far each has got."""
    from fedpeft_dist.sweeps.expansion import load_cells
    from fedpeft_dist.sweeps.workers import cell_rows

    rows = cell_rows(load_cells(sweep, overrides or ()))
    if as_json:
        print(json.dumps(rows))
        return
    for row in rows:
        print(f"{row['index']:>4}  {row['state']:<11}  {row['name']}")
    counts = ", ".join(f"{count} {state}" for state, count in sorted(Counter(row["state"] for row in rows).items()))
    print(f"{len(rows)} cells: {counts}; below {Path(rows[0]['directory']).parent}")


@sweep_app.command("run")
def sweep_run(
    sweep: SweepPath,
    overrides: Overrides = None,
    index: Annotated[int | None, typer.Option(help="The one cell to run.", show_default=False)] = None,
    name: Annotated[
        str | None, typer.Option(help="With --index: refuse a cell of another name.", show_default=False)
    ] = None,
) -> None:
    """Run a sweep's cells in turn, or one of them. Cells that are complete, or in work elsewhere, are skipped."""
    from fedpeft_dist.sweeps.expansion import load_cells, pick_cell
    from fedpeft_dist.sweeps.workers import work_through

    if name is not None and index is None:
        raise ConfigError(f"--name: {name} goes with --index; give both, or neither")
    with stoppable() as stop:
        cells = load_cells(sweep, overrides or ())
        outcome = work_through(cells if index is None else [pick_cell(cells, index, sweep, name)], stop)
    if outcome.interrupted:
        leave_interrupted()
    if outcome.failed:
        raise SystemExit(1)


def main() -> None:
    """The console script."""
    run_app(app, "fedpeft")
