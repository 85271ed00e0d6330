"""The command line: list, doctor, data, run, reproduce, robustness, serve, report, bench."""

import logging
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from workbench.errors import RecipeError, WorkbenchError

app = typer.Typer(
    help="A workbench for conditioned representations: train, compare and look at hypernetworks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Prepared public data sets and their manifests.", no_args_is_help=True)
app.add_typer(data_app, name="data")

Out = Annotated[Path, typer.Option(help="Output folder; runs go to its folder runs/.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N; never chosen silently.")]


@app.command("list")
def list_command() -> None:
    """List recipes with their sets, and data sets with whether they are on this machine."""
    from workbench.config import read_recipe, recipe_names
    from workbench.manifests import locate, manifest_names

    print("recipes")
    for name in recipe_names():  # as they are written: checking them would import every paper
        recipe = read_recipe(name)
        print(f"  {name:28} {','.join(recipe.get('sets') or []) or '-':10} {recipe.get('title', '-')}")
    print("data sets")
    print(f"  {'bundled':28} {'here':10} 320 hand-written sentences, shipped with the workbench")
    for name in manifest_names():
        print(f"  {name:28} {'found' if locate(name) else 'missing':10} workbench data show {name}")


@app.command()
def doctor() -> None:
    """Say what this machine has: versions, encoder, devices, notebook extension, data, browser."""
    from workbench.doctor import checks

    bad = 0
    for name, fine, text in checks():
        bad += not fine
        print(f"{'ok  ' if fine else 'MISS'} {name:18} {text}", flush=True)
    raise typer.Exit(1 if bad else 0)


@data_app.command("list")
def data_list() -> None:
    """List the data sets that have a manifest."""
    from workbench.manifests import locate, manifest_names, read_manifest

    for name in manifest_names():
        manifest = read_manifest(name)
        print(f"{name:16} {'found' if locate(name) else 'missing':8} {manifest.licence:18} {manifest.title}")


@data_app.command("show")
def data_show(name: str) -> None:
    """Print a data set's card: source, licence, intended use, files."""
    from workbench.manifests import read_manifest

    for key, value in read_manifest(name).model_dump(mode="json").items():
        print(f"{key}: {value}")


@data_app.command("verify")
def data_verify(
    names: Annotated[list[str] | None, typer.Argument(help="All that are here, if none given.")] = None,
) -> None:
    """Check hash, size, rows and columns of data sets, and encoders' accuracy; exit code 3 if one differs."""
    from workbench.manifests import locate, manifest_names, problems, read_manifest, verified_folder

    bad = 0
    for name in names or [name for name in manifest_names() if locate(name)]:
        manifest, folder = read_manifest(name), locate(name) or verified_folder(name)  # the latter says where
        found = problems(manifest, folder)
        bad += bool(found)
        print(f"{name}: " + ("ok" if not found else "\n  ".join(["differs", *found])))
        if manifest.checks and not found:
            from workbench.encoder_checks import verify_encoders  # opens torch

            for fine, line in verify_encoders(manifest.checks):
                bad += not fine
                print(f"  {line}")
    raise typer.Exit(3 if bad else 0)


@data_app.command("prepare")
def data_prepare(
    name: str, source: Annotated[Path, typer.Option(help="Folder that holds the prepared files.")]
) -> None:
    """Verify prepared files and copy them into the user's cache, where every recipe finds them."""
    from workbench.manifests import install

    print(f"{name}: {install(name, source)}")


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="A name from workbench list, or the path of a YAML file.")],
    seed: Annotated[
        list[int] | None, typer.Option(help="Instead of the recipe's seeds; may be repeated.")
    ] = None,
    device: Device = "cpu",
    out: Out = Path("reports"),
    data: Annotated[
        Path | None, typer.Option(help="Own data: a CSV or Parquet file, or a folder (README).")
    ] = None,
    label_range: Annotated[
        tuple[float, float] | None, typer.Option(help="Lowest and highest label of own pairs.")
    ] = None,
    fresh: Annotated[bool, typer.Option(help="Compute again even if this run is done.")] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that share the trainings; one a core if not given.")
    ] = None,
) -> None:
    """Train and evaluate all models of a recipe; the last line is the run's folder."""
    from workbench.processes import joined
    from workbench.report import write_run_report
    from workbench.runs import run_recipe
    from workbench.sharing import cores

    changes = _changes(recipe, seed, data, label_range)
    with joined(device) as own:
        settings = {"changes": changes, "fresh": fresh, "workers": workers or cores()}
        result = run_recipe(recipe, out=out, device=own, **settings)
    if result is None:
        return
    write_run_report(result)
    print(f"report: {result.folder.parent.parent / 'html' / (result.folder.name + '.html')}")
    print(f"run: {result.folder}")


def _changes(
    recipe: str, seed: list[int] | None, data: Path | None, label_range: tuple[float, float] | None
) -> dict[str, Any]:
    """Turn command-line options into recipe keys."""
    from workbench.papers import load_recipe

    changes: dict[str, Any] = {"seeds": seed} if seed else {}
    if data or label_range:
        known = load_recipe(recipe)
        before = known.data.model_dump(mode="json")
        if data:
            if before["source"] not in ("files", "table", "features", "shards"):
                # Other data than the recipe's: its bars and published numbers do not apply.
                changes |= {"bars": [], "published": [], "title": f"{known.title}, on own data: {data.stem}"}
            own = "features" if data.is_dir() else "table"  # of a zoo: arrays, or captioned pictures
            source = own if known.paper == "hyper_align" else "files"
            if before["source"] == "shards":
                source = "shards"
            before |= {"source": source, "name": data.stem, "path": str(data)}
        changes["data"] = {**before, **({"label_range": list(label_range)} if label_range else {})}
    return changes


@app.command()
def reproduce(
    recipes: Annotated[list[str] | None, typer.Argument(help="Recipe names; none for a whole set.")] = None,
    which: Annotated[
        str, typer.Option("--set", help="embedded, families, neighbours, tiny, benchmark, paper.")
    ] = "embedded",
    device: Device = "cpu",
    out: Out = Path("reports"),
    notebooks: Annotated[bool, typer.Option(help="Also execute the notebooks of the recipes.")] = True,
    jobs: Annotated[int, typer.Option(min=1, help="Recipes run at once; they share the cores.")] = 1,
) -> None:
    """Run a set of recipes and their notebooks and write the report; what is done already is reused."""
    from workbench.reproduce import reproduce_set

    settings = {"out": out, "device": device, "notebooks": notebooks, "jobs": jobs}
    print(f"report: {reproduce_set(recipes or [], which, **settings)}")


@app.command()
def robustness(
    recipe: Annotated[str, typer.Argument(help="Of a finished run; its newest is used.")],
    model: Annotated[str, typer.Argument(help="A model whose weights the run kept.")],
    out: Out = Path("reports"),
    data: Annotated[Path | None, typer.Option(help="Own pairs, as for workbench run.")] = None,
) -> None:
    """Score pairs under paraphrased, misspelt, negated, empty and off-topic conditions."""
    from workbench.papers import load_recipe, paper_of
    from workbench.robustness import measure_robustness
    from workbench.runs import find_run
    from workbench.tables import robustness_table

    known = load_recipe(recipe, _changes(recipe, None, data, None))
    if known.paper != "hyper_cl":
        raise RecipeError(
            f"recipe {known.name} is of paper {known.paper}; robustness is measured on pairs under "
            "conditions: give a recipe of paper hyper_cl"
        )
    opened = find_run(known.name, out).model(model)
    tables = paper_of(known.paper).load_data(known).content
    print(robustness_table(measure_robustness(opened, tables.get("test", tables["valid"]))).markdown())


@app.command()
def serve(
    out: Out = Path("reports"),
    port: Annotated[int, typer.Option(help="Of the pages; 0 takes a free one.")] = 5006,
    address: Annotated[str, typer.Option(help="Others than this machine's need the next two.")] = "127.0.0.1",
    origin: Annotated[
        list[str] | None, typer.Option(help="HOST:PORT as in a reader's address bar; may be repeated.")
    ] = None,
    password_file: Annotated[
        Path | None, typer.Option(help="Its first line is the password of the user workbench.")
    ] = None,
    device: Device = "cpu",
) -> None:
    """Serve the dashboards over the finished runs of an output folder; the first page lists them."""
    from workbench.views.serving import serve_apps

    serve_apps(out, port, address, origin, password_file, device)


@app.command()
def report(out: Out = Path("reports")) -> None:
    """Write the report over all finished runs of an output folder again."""
    from workbench.report import write_index

    print(f"report: {write_index(out)}")


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help="hyper_cl, hyper_clip, hyper_align, families, apps.")],
    out: Annotated[Path | None, typer.Option(help="Folder for NAME.json.")] = None,
    device: Device = "cpu",
) -> None:
    """Time the workbench beside the published way, in one process, with equal outputs asserted."""
    from workbench.bench import run_bench

    print(run_bench(name, out, device))


def main() -> None:
    """Run the command line; exit 2 with one message for what a person can mend, 130 or 143 on signals."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        app()
    except WorkbenchError as problem:
        print(f"workbench: {problem}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as ended:  # typer turns Ctrl-C into exit code 130
        if ended.code in (130, 143):
            print("workbench: stopped; the same command goes on from here", file=sys.stderr)
        raise
