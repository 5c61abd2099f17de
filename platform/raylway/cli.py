"""The words that people type; the one place that prints errors and sets exit codes.

Exit codes: 0 done, 1 failed, 2 the user's mistake, 130 interrupted. Results go to standard output, all else to standard
error. Ray and torch are imported by the commands that use them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from raylway import __version__
from raylway.errors import RunFailed, UserError

app = typer.Typer(
    name="raylway",
    help="One job file takes raw data to a served model, on Ray.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)

JobFile = Annotated[Path, typer.Argument(metavar="JOB", help="A job file, such as jobs/flights.yaml.")]
RunName = Annotated[
    str, typer.Argument(metavar="RUN", help="A run folder, a run id or its beginning, a job's name, or 'latest'.")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key: train.optimizer.lr=0.01.")
]
ReadAs = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Read SOURCE otherwise than the run does: data.read.decimal=,"),
]
Json = Annotated[bool, typer.Option("--json", help="Progress and result as JSON, one object a line.")]
Storage = Annotated[
    str, typer.Option("--storage", metavar="PLACE", help="Where runs are looked for: a folder, or s3://bucket/path.")
]


@app.command()
def run(job: JobFile, set_: Overrides = None, json_: Json = False) -> None:
    """Prepare, train, evaluate, bundle and report: does what is not done yet, and resumes what was broken off."""
    _stages(job, set_, json_, "report")


@app.command()
def check(
    job: JobFile,
    set_: Overrides = None,
    sample: Annotated[bool, typer.Option("--sample", help="Each column with its range, examples and why.")] = False,
    json_: Json = False,
) -> None:
    """Check a job file and show every inferred and derived value; starts nothing."""
    from raylway.job.load import load_job
    from raylway.launch.check import check as check_job

    findings = check_job(load_job(job, set_ or ()))
    print(json.dumps(findings.as_dict()) if json_ else findings.as_text(whole_report=sample))


@app.command()
def prepare(job: JobFile, set_: Overrides = None, json_: Json = False) -> None:
    """Read, clean, split and transform the data; done once for the same data and settings."""
    _stages(job, set_, json_, "prepare")


@app.command()
def train(job: JobFile, set_: Overrides = None, json_: Json = False) -> None:
    """Prepare and train."""
    _stages(job, set_, json_, "train")


@app.command()
def evaluate(job: JobFile, set_: Overrides = None, json_: Json = False) -> None:
    """Prepare, train and evaluate on the test rows."""
    _stages(job, set_, json_, "evaluate")


@app.command("verify-resume")
def verify_resume(
    job: JobFile,
    kills: Annotated[int, typer.Option(min=1, max=100, help="How often the second training is killed.")] = 3,
    seed: Annotated[int | None, typer.Option(help="Of the steps at which it is; drawn if left out.")] = None,
    set_: Overrides = None,
    json_: Json = False,
) -> None:
    """Train once whole and once killed at random steps, and compare both bit for bit; exits 1 on any difference."""
    from raylway.job.load import load_job
    from raylway.launch.verify import verify_resume as verify

    found = verify(load_job(job, set_ or ()), job, set_ or [], kills, seed, _reporter(json_))
    print(_as_json(found) if json_ else found.as_text())
    if not found.passed:
        raise typer.Exit(1)


@app.command()
def report(run: RunName, storage: Storage = "runs") -> None:
    """Write a run's report.html anew and print where it is."""
    from raylway.features.prepared import MANIFEST, Prepared
    from raylway.report.report import write
    from raylway.runs.run import PREPARED, find_run
    from raylway.storage import existing_root

    found = find_run(existing_root(storage), run)
    folder = found.folder.parent.parent / PREPARED / found.record.fingerprint
    if not (folder / MANIFEST).exists():
        raise UserError(
            "the run's prepared data is gone",
            where=str(folder),
            expected="what the run was trained on",
            found="no such folder, or one that is not whole",
            fix="run the job again to make it anew",
        )
    print(write(found, Prepared(folder)))


@app.command()
def runs(storage: Storage = "runs", json_: Json = False) -> None:
    """List the runs, the oldest first."""
    from raylway.runs.run import all_runs, summary
    from raylway.storage import existing_root

    found_runs = all_runs(existing_root(storage))
    if not found_runs:
        print(f"no runs below {storage}; --storage names another folder", file=sys.stderr)
    for found in found_runs:
        facts = summary(found)
        print(json.dumps(facts) if json_ else "  ".join(f"{value}" for value in facts.values()))


@app.command()
def predict(
    run: RunName,
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Rows to answer: whatever data.source takes.")],
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help="A .csv, .jsonl or .parquet file; with a slash at the end a folder."),
    ] = None,
    format_: Annotated[
        str | None, typer.Option("--format", help="Write a folder of parts: csv, jsonl or parquet.")
    ] = None,
    set_: ReadAs = None,
    storage: Storage = "runs",
    json_: Json = False,
) -> None:
    """Answer every row of a source with a run's model; prints CSV unless --output names a place."""
    from raylway.data.inputs import job_of
    from raylway.predict.output import output_of
    from raylway.predict.predict import predict as answer
    from raylway.runs.run import find_run
    from raylway.storage import existing_root

    place = output_of(output, format_)
    found = find_run(existing_root(storage), run, with_bundle=True)
    done = answer(job_of(found.job, set_ or ()), found.bundle, source, place, _reporter(json_))
    if output is not None:
        print(f"{done.answered:,} rows answered: {output}", file=sys.stderr)
    if done.rejected:
        for row in [] if output else done.first:
            print(f"{row.file}:{row.line}: {f'{row.column}: ' if row.column else ''}{row.reason}", file=sys.stderr)
        where = f"; {place.rejects} says why" if output else ""
        print(f"{done.rejected:,} of {done.answered + done.rejected:,} rows got no answer{where}", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
def drift(
    run: RunName,
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="New rows: whatever data.source takes.")],
    set_: ReadAs = None,
    storage: Storage = "runs",
    json_: Json = False,
) -> None:
    """Compare a source with the rows that a run's model was trained on; exits 1 past the stated limits."""
    from raylway.bundle.contents import load
    from raylway.data.drift import as_text
    from raylway.data.drift import drift as compare
    from raylway.data.inputs import job_of
    from raylway.runs.run import find_run
    from raylway.storage import existing_root

    of_run = find_run(existing_root(storage), run, with_bundle=True)
    found = compare(load(of_run.bundle).record, source, job_of(of_run.job, set_ or ()).job)
    print(_as_json(found) if json_ else as_text(found))
    if found.drifted:
        raise typer.Exit(1)


@app.command()
def quarantine(
    run: RunName,
    limit: Annotated[int, typer.Option(min=0, help="List so many rows of each kind; all are counted.")] = 20,
    storage: Storage = "runs",
    json_: Json = False,
) -> None:
    """Count and list the rows that were set aside, with file, line, column, reason and cell; RUN may be a job file."""
    from raylway.data import trace

    prepared = _prepared_of(run, storage)[0]
    found = trace.quarantined(prepared, limit)
    print(_as_json(found) if json_ else trace.quarantine_text(found, prepared.manifest.account.missing))


@app.command()
def show(
    run: RunName,
    row: Annotated[str, typer.Option("--row", metavar="ID", help="A row id, or file:line.")],
    storage: Storage = "runs",
    json_: Json = False,
) -> None:
    """Follow one row: its record in the source, what became of it, its encoded values, and its prediction."""
    import dataclasses

    from raylway.data import trace

    prepared, loaded, predictions = _prepared_of(run, storage)
    found = trace.trace(prepared, loaded, row, predictions)
    print(_as_json(dataclasses.asdict(found)) if json_ else trace.as_text(found))


@app.command()
def serve(  # noqa: PLR0913, PLR0917 - a parameter is an option
    runs: Annotated[
        list[str] | None,
        typer.Argument(metavar="RUN...", help="Runs as above; several answer below the names of their jobs."),
    ] = None,
    storage: Storage = "runs",
    host: Annotated[str | None, typer.Option(help="Address to listen on; loopback unless told otherwise.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="HTTP port; 8000 unless told otherwise.")] = None,
    keys: Annotated[Path | None, typer.Option(metavar="FILE", help="API keys; without them everybody may ask.")] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Put RUN in the place of the run of its job that is served now.")
    ] = False,
    rollback: Annotated[
        bool, typer.Option("--rollback", help="Return to what --replace has replaced; RUN is the job's name.")
    ] = False,
    config: Annotated[
        bool, typer.Option("--config", help="Write the Serve config file instead, to a RUN that ends in .yaml if any.")
    ] = False,
    json_: Json = False,
) -> None:
    """Serve runs' bundles over HTTP until Ctrl-C."""
    from raylway.launch import replacing, serving
    from raylway.runs.run import find_run
    from raylway.storage import existing_root

    names = runs or []
    if replace + rollback + config > 1:
        raise UserError("only one of --replace, --rollback and --config at a time", where="raylway serve")
    if rollback or replace:
        replacing.refuse(host=host, port=port, keys=keys if rollback else None)
    if rollback:
        replacing.rollback(_one(names), _reporter(json_))
        return
    files = [Path(name) for name in names if config and name.endswith((".yaml", ".yml"))]
    names = [name for name in names if Path(name) not in files]
    if not names:
        raise UserError("name a run", where="raylway serve", fix="list them with: raylway runs")
    root = existing_root(storage)
    models = serving.models_of([find_run(root, name, with_bundle=True) for name in names])
    host, port = host or "127.0.0.1", port or 8000
    if config:
        serving.write_config(models, host, port, keys, files, _reporter(json_))
    elif replace:
        replacing.replace(models, _reporter(json_), keys)
    else:
        serving.serve(models, host, port, _reporter(json_), keys)


@app.command()
def export(
    run: RunName,
    format_: Annotated[str, typer.Option("--format", help="onnx, or torch-export.")] = "onnx",
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE", help="Where to; NAME-VERSION.onnx or .pt2 here.")
    ] = None,
    storage: Storage = "runs",
) -> None:
    """Write a run's model with its transform as one file for other runtimes, checked against the bundle."""
    from raylway.export.export import export as write
    from raylway.runs.run import find_run
    from raylway.storage import existing_root

    done = write(find_run(existing_root(storage), run, with_bundle=True).bundle, format_, output)
    print(done.place)
    differ = f"differ by at most {done.largest_difference:.1g}"
    print(f"checked: its answers to {done.rows} rows and those of the bundle {differ}", file=sys.stderr)


@app.command()
def submit(
    job: JobFile,
    address: Annotated[str | None, typer.Option(help="The cluster, such as http://127.0.0.1:8265.")] = None,
    set_: Overrides = None,
) -> None:
    """Run a job file on a Ray cluster: uploads the current folder, follows the log, exits as the job did."""
    from raylway.launch import jobs

    raise typer.Exit(jobs.submit(job, address, set_ or []))


@app.command()
def schema() -> None:
    """Print the JSON Schema of the job file."""
    from raylway.job.schema import Job

    print(json.dumps(Job.model_json_schema(by_alias=True), indent=2))


def _as_json(found: Any) -> str:
    import msgspec

    return json.dumps(json.loads(msgspec.json.encode(found)))


def _prepared_of(name: str, storage: str) -> tuple[Any, Any, Any]:
    """The prepared data behind a run or a job file, the job, and the run's predictions if it is a run."""
    from raylway.data.prepare import fingerprint
    from raylway.features.prepared import MANIFEST, Prepared
    from raylway.job.load import load_job
    from raylway.runs.run import PREPARED, find_run
    from raylway.storage import existing_root

    predictions = None
    if name.endswith((".yaml", ".yml")) and Path(name).is_file():
        loaded = load_job(Path(name), ())
        folder = existing_root(loaded.job.storage) / PREPARED / fingerprint(loaded)
    else:
        found = find_run(existing_root(storage), name)
        loaded, predictions = load_job(found.job), found.predictions
        folder = found.folder.parent.parent / PREPARED / found.record.fingerprint
    if not (folder / MANIFEST).exists():
        raise UserError(
            "the prepared data is not there",
            where=str(folder),
            expected=f"what raylway prepare makes of {name}",
            found="no such folder, or one that is not whole",
            fix="make it with: raylway prepare JOB",
        )
    return Prepared(folder), loaded, predictions


def _one(names: list[str]) -> str | None:
    if len(names) > 1:
        raise UserError("one at a time", where="raylway serve --rollback", found=", ".join(names))
    return names[0] if names else None


def _version(wanted: bool) -> None:
    if wanted:
        print(f"raylway {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


def _reporter(json_: bool) -> Any:
    from raylway.runs.progress import Reporter

    return Reporter("json" if json_ else None)


def _stages(job: Path, overrides: list[str] | None, json_: bool, last: str) -> None:
    from raylway import pipeline
    from raylway.job.load import load_job
    from raylway.launch.start import ended_by_sigterm
    from raylway.runs.run import summary

    try:
        with ended_by_sigterm():
            found = pipeline.run(load_job(job, overrides or ()), _reporter(json_), last)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where this one stopped", file=sys.stderr)
        raise
    if found is None:
        return
    if json_:
        print(json.dumps(summary(found)))
    elif last == "report":
        print(f"report: {found.report}\nserve:  raylway serve {found.folder}")


def main() -> None:
    """Run the command line and exit; typer itself answers wrong options (2) and Ctrl-C (130)."""
    try:
        app()
    except (UserError, RunFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
