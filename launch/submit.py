#!/usr/bin/env python3
"""Submits a run, or a sweep as a job array, through submitit; a job that is interrupted goes on by itself.

    python launch/submit.py CONFIG [key=value ...] --gpus-per-node 4 --tasks-per-node 4 --cpus-per-task 8 --time 240
    python launch/submit.py SWEEP [key=value ...] --gpus-per-node 1 --array-parallelism 8 --partition gpu [--dry-run]

A task is a rank. Each job of a sweep's array runs one cell, or several small ones in turn (--cells-per-task). Complete
cells are left out. Jobs carry their configs: files that change later change no job in the queue. A mistake in any cell
submits none.

A job gets a signal ahead of its time limit, and when Slurm preempts it. It then finishes or drops its round, writes a
checkpoint, goes back into the queue under its number, and later continues in the same files. A job that loses a node
continues in the same way, from its last checkpoint. `scancel` ends a job.

Logs lie in `jobs/` in the run's directory, or in the folder of the sweep's cells: a folder for each submission, in it a
file for each job and rank. Exit codes, here and of the jobs, are those of `fedpeft`.
"""

import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import submitit
import typer
from submitit.core.utils import FailedJobError, FailedSubmissionError, UncompletedJobError
from submitit.helpers import DelayedSubmission, TorchDistributedEnvironment
from submitit.slurm.slurm import _make_sbatch_string

from fedpeft_dist.cli import Overrides
from fedpeft_dist.config.errors import ConfigError, one_line
from fedpeft_dist.config.load import is_sweep
from fedpeft_dist.config.yaml_text import read_yaml
from fedpeft_dist.runtime.command import EXIT_MISTAKE, leave_interrupted, run_app, user_path
from fedpeft_dist.runtime.interrupts import listen_for_stop
from fedpeft_dist.runtime.streams import open_streams
from fedpeft_dist.sweeps.expansion import Cell, load_cells
from fedpeft_dist.sweeps.workers import cell_state, work_through
from fedpeft_dist.tracking.run_directory import COMPLETE, RunDirectory

# --- in the job --------------------------------------------------------------------------------------------------


@dataclass
class Job:
    """A job's work. submitit pickles it here, together with this class, and calls it in each rank of the job."""

    cells: list[Cell]
    folder: Path
    """The folder where the command was called, which relative paths in configs start from."""

    def __call__(self) -> None:
        open_streams()
        os.chdir(self.folder)
        here = submitit.JobEnvironment()
        if here.cluster == "local" and here.num_tasks > 1:
            ranks = TorchDistributedEnvironment()
            ranks.master_addr = "127.0.0.1"  # this machine's name need not resolve
            ranks.export(set_cuda_visible_devices=False, overwrite=True)
        warning = signal.Signals[f"SIG{here.USR_SIG}"]
        requeue = signal.getsignal(warning)
        was_warned = False
        with listen_for_stop(is_last=True) as stop:

            def remember(*_: Any) -> None:
                nonlocal was_warned
                was_warned = stop.received = True

            signal.signal(warning, remember)
            try:
                outcome = work_through(self.cells, stop)
            except ConfigError as error:  # each rank has a log of its own, so each of them says why it ends
                print(f"error: {one_line(error)}", file=sys.stderr)
                raise SystemExit(EXIT_MISTAKE) from None
        signal.signal(warning, signal.SIG_IGN)  # the work is done; a late warning would make the job fail
        if outcome.interrupted and here.global_rank == 0:
            if callable(requeue) and (_is_running(here.job_id) if here.cluster == "slurm" else was_warned):
                try:
                    requeue(warning, None)  # submitit's handler: it calls `checkpoint`, requeues, and ends this process
                except (UncompletedJobError, subprocess.SubprocessError) as error:  # --max-timeouts, or Slurm's refusal
                    print(error, file=sys.stderr)
            leave_interrupted("submit it again to go on")
        if outcome.failed:
            raise SystemExit(1)

    def checkpoint(self) -> DelayedSubmission:
        """The job to run after a requeue: this one again, because runs find their own checkpoints."""
        return DelayedSubmission(self)


def _is_running(job: str) -> bool:
    """Whether Slurm still lets this attempt of the job run.

    It does ahead of the time limit and of a preemption. It does not if it is ending the job itself, to cancel or to
    requeue it, or has already started the job again elsewhere. Processes on a lost node do not notice the latter.

    Args:
        job: ARRAY_TASK for a task of an array: one of the tasks has the array's own number, which would mean all.
    """
    command = ["squeue", "--noheader", "--jobs", job, "--Format", "State,RestartCnt"]
    for seconds in (10, 10, 10, 10, 0):  # the controller may be busy, or about to be back
        try:
            found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
            return found.stdout.split() == ["RUNNING", os.environ.get("SLURM_RESTART_COUNT", "0")]
        except OSError as error:
            reason = str(error)
            break
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            reason = error.stderr or str(error)
            time.sleep(seconds)
    print(f"squeue does not answer ({one_line(reason)}), so the job is not requeued", file=sys.stderr)
    return False


# --- the command -------------------------------------------------------------------------------------------------


class Cluster(str, Enum):
    slurm = "slurm"
    local = "local"
    debug = "debug"


SETTLED = (
    *("nodes", "ntasks", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time", "partition", "account", "qos"),
    *("constraint", "array", "signal", "output", "error", "open-mode", "chdir"),
    *("gpus", "gpus-per-task", "ntasks-per-gpu", "gpu-bind"),
)
"""Options of sbatch that this command sets itself. Those about GPUs ensure that a rank sees all GPUs of its job on its
node, and takes the GPU of its local rank."""

LOCAL_STARTS = 6
"""The most often that submitit starts a job on this machine."""

REQUEUE = Path(__file__).parents[1] / "slurm" / "requeue.sh"
"""A script that a job of several nodes runs at its end: if a node is lost, no rank is left to requeue the job."""

MAX_REQUEUES = 100
"""The most often that a job goes back into the queue for a lost node."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__.partition("\n")[0])
def submit(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG|SWEEP", help="A YAML file.", show_default=False, parser=user_path)
    ],
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of a job.")] = 1,
    tasks_per_node: Annotated[int, typer.Option(min=1, help="Ranks on a node, one for each GPU.")] = 1,
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="Without it, a job is given no GPU.")] = None,
    cpus_per_task: Annotated[int, typer.Option(min=1, help="CPUs of a rank.")] = 1,
    minutes: Annotated[
        int, typer.Option("--time", metavar="MINUTES", min=1, help="How long a job may run in one go.")
    ] = 60,
    partition: Annotated[str | None, typer.Option(help="This and the next three are Slurm's.")] = None,
    account: str | None = None,
    qos: str | None = None,
    constraint: str | None = None,
    array_parallelism: Annotated[int, typer.Option(min=1, help="Jobs of an array that run at a time.")] = 256,
    cells_per_task: Annotated[
        int | None, typer.Option(metavar="K", min=1, help="Cells that a job runs in turn; 1 on Slurm, else all.")
    ] = None,
    max_timeouts: Annotated[
        int, typer.Option(min=0, help="How often a job goes on after its time limit; at most 5 with local.")
    ] = 10,
    signal_delay: Annotated[
        int, typer.Option(metavar="SECONDS", min=1, help="How long before its time limit a job is told to stop.")
    ] = 120,
    setup: Annotated[
        list[str] | None, typer.Option(metavar="COMMAND|FILE", help="To run, or to source, first; repeatable.")
    ] = None,
    slurm: Annotated[
        list[str] | None, typer.Option(metavar="KEY[=VALUE]", help="Any other option of sbatch; repeatable.")
    ] = None,
    cluster: Annotated[
        Cluster, typer.Option(help="local: background processes on this machine; debug: here and now, with pdb.")
    ] = Cluster.slurm,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be submitted, and submit nothing.")
    ] = False,
) -> None:
    cells = load_cells(config, overrides or ())
    home = cells[0].directory.path
    if is_sweep(read_yaml(config)):
        home = home.parent
    waiting = list(find_unfinished(cells))
    if not waiting:
        print(f"nothing to submit: {len(cells)} complete in {home}")
        return
    size = cells_per_task or (1 if cluster is Cluster.slurm else len(waiting))
    jobs = [Job(waiting[i : i + size], Path.cwd()) for i in range(0, len(waiting), size)]
    ranks = nodes * tasks_per_node
    if ranks > 1 and len(jobs[0].cells) > 1:
        raise ConfigError(f"--cells-per-task: {size}, but {ranks} ranks run one cell together; give 1")
    if nodes > 1 and cluster is not Cluster.slurm:
        raise ConfigError(f"--nodes: {nodes}, but --cluster {cluster.value} is this machine; give 1")
    if ranks > 1 and cluster is Cluster.debug:
        raise ConfigError(f"--tasks-per-node: {ranks}, but --cluster debug is this process; give 1")
    if signal_delay >= 60 * minutes:
        raise ConfigError(f"--signal-delay: {signal_delay} s of the {60 * minutes} s that a job has; give less")
    if "%" in str(home.absolute()):
        raise ConfigError(
            f"{home.absolute()}: Slurm and submitit take % for a pattern in the paths of logs, which go below this "
            "folder; give output.root and output.name without %"
        )
    parameters: dict[str, Any] = {"signal_delay_s": signal_delay, "stderr_to_stdout": True}
    if cluster is not Cluster.slurm:
        parameters |= {"timeout_min": minutes, "tasks_per_node": tasks_per_node, "gpus_per_node": gpus_per_node or 0}
    else:
        # Since Slurm 22.05, srun no longer takes the CPUs from sbatch. Ranks that lose another have a minute to say why
        # they end.
        srun = [f"--cpus-per-task={cpus_per_task}", "--kill-on-bad-exit=0", "--wait=60"]
        parameters |= {
            "job_name": cells[0].name if len(cells) == 1 else config.stem,
            "time": minutes,
            "nodes": nodes,
            "ntasks_per_node": tasks_per_node,
            "cpus_per_task": cpus_per_task,
            "array_parallelism": array_parallelism,
            "srun_args": srun,
            "additional_parameters": {"requeue": True, **_parse_directives(slurm or ())},
        }
        asked = {"gpus_per_node": gpus_per_node, "partition": partition, "account": account, "qos": qos}
        asked |= {"constraint": constraint}
        parameters |= {key: value for key, value in asked.items() if value is not None}
    parameters |= _lines_around([_setup_line(text) for text in setup or ()], can_lose_node=nodes > 1)
    folder = home.absolute() / "jobs" / f"{datetime.now():%Y-%m-%d-%H%M%S}-{uuid.uuid4().hex[:4]}"
    if dry_run:
        show(jobs, cluster, folder, ranks, parameters)
        return
    RunDirectory(folder).check_writable()
    submitted = hand_in(jobs, cluster, folder, max_timeouts, parameters)
    if cluster is Cluster.debug:
        for job in submitted:
            job.results()
        return
    ids = list(dict.fromkeys(job.job_id.partition("_")[0] for job in submitted))
    print(f"submitted: {cluster.value} job {', '.join(ids)}; jobs: {len(jobs)}, cells: {len(waiting)}, ranks: {ranks}")
    print(f"logs:      {os.path.relpath(folder)}")
    follow = [f"tail -F {shlex.quote(os.path.relpath(submitted[0].paths.stdout))}"]
    if cluster is Cluster.slurm:
        follow.insert(0, f"squeue --jobs {ids[0]}")
    if len(cells) > 1:
        follow.append(shlex.join(["fedpeft", "sweep", "list", str(config), *(overrides or ())]))
    print(f"follow:    {'; '.join(follow)}")


def _lines_around(setup: list[str], can_lose_node: bool) -> dict[str, list[str]]:
    """The lines of a job's script before and after srun, as parameters of submitit's."""
    if not can_lose_node:
        return {"setup": setup} if setup else {}
    return {
        # The lines after srun must run, whatever the lines before it set.
        "setup": [*setup, "set +e"],
        "teardown": [
            "code=$?",
            *REQUEUE.read_text(encoding="utf-8").splitlines(),
            f'[ "${{SLURM_RESTART_COUNT:-0}}" -ge {MAX_REQUEUES} ] || ! has_lost_node $code ||',
            "    scontrol requeue $job",
            "exit $code",
        ],
    }


def show(jobs: Sequence[Job], cluster: Cluster, folder: Path, ranks: int, parameters: dict[str, Any]) -> None:
    """Prints what would be submitted."""
    if cluster is Cluster.slurm:
        command = f"{_python()} -u -m submitit.core._submit {shlex.quote(str(folder))}"
        print(_make_sbatch_string(command, folder, map_count=len(jobs) if len(jobs) > 1 else None, **parameters))
    for i, job in enumerate(jobs):
        print(f"# {cluster.value} job {i}, ranks: {ranks}, cells: {', '.join(cell.name for cell in job.cells)}")


def find_unfinished(cells: Sequence[Cell]) -> Iterator[Cell]:
    """
    Raises:
        ConfigError: a directory holds another run, or one that cannot go on.
    """
    for cell in cells:
        state = cell_state(cell)
        if state in ("other config", "damaged"):
            raise ConfigError(f"{cell.directory.path}: {state}: its run cannot go on; give another output.name or root")
        if state != COMPLETE:
            yield cell


def hand_in(
    jobs: Sequence[Job], cluster: Cluster, folder: Path, max_timeouts: int, parameters: dict[str, Any]
) -> list[submitit.Job]:
    """Submits the jobs.

    Raises:
        ConfigError: there is no Slurm here, or it refuses the jobs.
    """
    if cluster is Cluster.debug:
        return submitit.DebugExecutor(folder).submit_array(jobs)
    if cluster is Cluster.slurm:
        if not (shutil.which("sbatch") and shutil.which("srun")):
            raise ConfigError("--cluster: slurm, but sbatch or srun is not on this machine; give local or debug")
        executor = submitit.SlurmExecutor(folder, max_num_timeout=max_timeouts, python=_python())
        output = redirect_stderr(io.StringIO())  # submitit also prints there what it raises
    else:
        executor = submitit.LocalExecutor(folder, max_num_timeout=min(max_timeouts, LOCAL_STARTS - 1))
        output = _output_to(folder / "setup.out")
    executor.update_parameters(**parameters)
    try:
        with output:
            return executor.submit_array(jobs)
    except (FailedJobError, FailedSubmissionError) as error:
        shutil.rmtree(folder)
        with suppress(OSError):  # ends at the first folder that holds something else
            os.removedirs(folder.parent)
        said = [re.sub("^sbatch: (error: )?", "", line) for line in str(error).splitlines()]
        raise ConfigError(f"sbatch refuses: {'; '.join(said)}") from None


@contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Sends the output of processes started meanwhile to a file. They would keep a pipe to this command open."""
    kept = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
    with open(path, "wb") as file:
        for descriptor in kept:
            os.dup2(file.fileno(), descriptor)
    try:
        yield
    finally:
        for descriptor, copy in kept.items():
            os.dup2(copy, descriptor)
            os.close(copy)


def _python() -> str:
    """This Python, which ignores warnings until submitit listens: a job that dies of a warning is not requeued."""
    ignore = f'trap \'\' TERM {submitit.JobEnvironment.USR_SIG}; exec "$0" "$@"'
    return shlex.join(["sh", "-c", ignore, sys.executable])


def _setup_line(text: str) -> str:
    path = os.path.expanduser(text)
    return f". {shlex.quote(os.path.abspath(path))}" if os.path.isfile(path) else text


def _parse_directives(texts: Sequence[str]) -> dict[str, str | bool]:
    """Options of sbatch from `key=value` texts; a key alone is a switch."""
    found: dict[str, str | bool] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not re.fullmatch("[a-z][a-z-]*", key):
            raise ConfigError(f"--slurm: {text!r} is no option of sbatch; give key=value, such as mem=64G, or a key")
        if key in SETTLED:
            raise ConfigError(f"--slurm: {key!r} is settled by this command's own options; see --help")
        found[key] = value if equals else True
    return found


if __name__ == "__main__":
    run_app(app)
