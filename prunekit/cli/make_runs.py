"""Commands that make runs and recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from prunekit.cli.app import Overrides, OverwriteRun, RecipeName, RunFolder, app, make_console
from prunekit.errors import RecipeError
from prunekit.utils.exit_status import suggest_resume
from prunekit.utils.logging import is_quiet


@app.command()
def run(
    recipe: RecipeName,
    overrides: Overrides = None,
    out: Annotated[Path | None, Option(help="Run folder; default: runs/NAME.")] = None,
    resume: Annotated[bool, Option("--resume", help="Resume an existing run.")] = False,
    overwrite: OverwriteRun = False,
    start_from: Annotated[
        str | None,
        Option("--from", metavar="STAGE", help="Repeat this stage and all later ones (implies --resume)."),
    ] = None,
    until: Annotated[
        str | None,
        Option(metavar="STAGE", help="Stop before this stage, or before gradual_pruning; --resume continues."),
    ] = None,
) -> None:
    """Run a recipe: train, extract, slim, fine-tune, evaluate, export and report."""
    from prunekit.config.recipe import load

    loaded = load(recipe, overrides or [])
    from prunekit.pipeline.runner import run_recipe

    out = out or Path("runs") / loaded.name
    resume = resume or start_from is not None
    stop = [] if until is None else ["--until", until]
    with suggest_resume("run", recipe, *(overrides or []), "--out", out, *stop, "--resume"):
        console = make_console(quiet=is_quiet())
        run_recipe(loaded, out, console, resume=resume, overwrite=overwrite, start_from=start_from, until=until)


@app.command()
def sweep(
    recipe: RecipeName,
    settings: Annotated[
        list[str],
        Argument(metavar="KEY=VALUE,...", help="Values to combine, e.g. target.params_ratio=0.5,0.35 seed=0,1."),
    ],
    out: Annotated[Path | None, Option(help="Folder of the sweep; default: runs/RECIPE-sweep.")] = None,
    trials: Annotated[
        int | None, Option(metavar="N", help="Draw this many combinations at random; default: all.")
    ] = None,
    seed: Annotated[int, Option(help="Seed of --trials.")] = 0,
    engine: Annotated[str, Option(help="local: processes on this machine; ray: a Ray cluster.")] = "local",
    jobs: Annotated[int | None, Option(min=1, help="Runs at the same time; default: the number of cores.")] = None,
    threads: Annotated[int, Option(min=1, help="Threads of each run.")] = 1,
    resume: Annotated[bool, Option("--resume", help="Continue a sweep, also with more values.")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Only print the runs.")] = False,
) -> None:
    """Run a recipe once for each combination of values, share what they have in common, and report all runs."""
    from prunekit.commands.sweep import run_sweep

    out = out or Path("runs") / f"{Path(recipe).stem}-sweep"
    chosen = {"trials": trials, "seed": seed, "engine": engine, "jobs": jobs, "threads": threads}
    defaults = {"trials": None, "seed": 0, "engine": "local", "jobs": None, "threads": 1}
    given = [text for key, value in chosen.items() if value != defaults[key] for text in (f"--{key}", value)]
    with suggest_resume("sweep", recipe, *settings, *given, "--out", out, "--resume"):
        run_sweep(recipe, settings, out, make_console(), **chosen, resume=resume, dry_run=dry_run)


@app.command()
def validate(
    recipe: RecipeName,
    overrides: Overrides = None,
    print_: Annotated[bool, Option("--print", help="Also print the recipe with all defaults.")] = False,
) -> None:
    """Check a recipe without running it: keys, types, ranges, names and options."""
    from prunekit.config.recipe import load

    loaded = load(recipe, overrides or [])
    # As a comment the line keeps the output with --print valid YAML.
    print(f"# {recipe}: valid")
    if print_:
        print(loaded.dump(), end="")


@app.command(name="cp")
def cp(
    recipe: RecipeName,
    file: Annotated[Path, Argument(help="New file, or an existing folder.")],
    overwrite: Annotated[bool, Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    """Copy a recipe with its comments, to edit it."""
    from prunekit.commands.copy_recipe import copy_recipe

    print(copy_recipe(recipe, file, overwrite=overwrite))


@app.command()
def slim(
    run: RunFolder,
    overrides: Overrides = None,
    out: Annotated[Path | None, Option(help="New run folder; default: RUN-slim.")] = None,
    overwrite: OverwriteRun = False,
) -> None:
    """Prune a trained run again, e.g. with slim.threshold=5e-2, into a new run folder."""
    from prunekit.commands.import_model import derived_recipe

    recipe = derived_recipe(run, overrides or [])
    from prunekit.pipeline.runner import slim_run

    out = out or run.with_name(f"{run.resolve().name}-slim")
    with suggest_resume("slim", run, *(overrides or []), "--out", out, "--overwrite"):
        slim_run(run, recipe, out, make_console(quiet=is_quiet()), overwrite=overwrite)


@app.command()
def finetune(
    run: RunFolder,
    overrides: Overrides = None,
    out: Annotated[Path | None, Option(help="New run folder; default: RUN-finetuned.")] = None,
    overwrite: OverwriteRun = False,
) -> None:
    """Fine-tune, evaluate and export the slim model of a run into a new folder, e.g. with finetune.epochs=5."""
    from prunekit.commands.import_model import derived_recipe

    recipe = derived_recipe(run, overrides or [])
    from prunekit.pipeline.runner import finetune_run

    out = out or run.with_name(f"{run.resolve().name}-finetuned")
    with suggest_resume("run", out / "recipe.yaml", "--out", out, "--resume"):
        finetune_run(run, recipe, out, make_console(quiet=is_quiet()), overwrite=overwrite)


@app.command(name="import")
def import_(
    kind: Annotated[str, Argument(help="csnet: the published CSNet files.")],
    checkpoint: Annotated[Path, Argument(help=".pth.tar file.")],
    out: Annotated[Path, Option(help="New run folder.")],
    layout: Annotated[Path | None, Argument(help=".bin file; not needed for a dense model.")] = None,
    overwrite: OverwriteRun = False,
) -> None:
    """Create a run folder from a model that was trained elsewhere."""
    if kind != "csnet":
        raise RecipeError(f"import {kind}: unknown kind; use csnet, as in: prunekit import csnet FILE [LAYOUT] …")
    from prunekit.commands.import_model import import_run

    import_run(checkpoint, layout, out, make_console(), overwrite=overwrite)
