"""``ldm card RUN`` and ``ldm push RUN OWNER/NAME``: what the Hub shows of a model, and the model on
the Hub.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ldm.cli.failure import fail, there

_Run = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run, or a folder that one has written.")
]
_License = Annotated[
    str | None,
    typer.Option(
        "--license", help="An identifier of the Hub, as apache-2.0; else that of the card before."
    ),
]
_Figures = Annotated[
    Path | None, typer.Option(help="What `ldm evaluate --out` wrote: its table goes in as well.")
]


def card(
    run: _Run,
    license: _License = None,
    figures: _Figures = None,
    name: Annotated[str | None, typer.Option(help="Of the model; else that of RUN.")] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Also a README.md that was written by hand.")
    ] = False,
) -> None:
    """Writes README.md into a model's folder: how to draw with it, its newest sheet, its figures,
    and the config, data and versions of the run that made it.
    """
    folder, made_by = _placed(run)
    if figures is not None and not there(figures / "figures.json", "--figures "):
        fail(f"--figures {figures}: it holds no figures.json of ldm evaluate")

    from ldm.formats.card import write

    try:
        file = write(folder, made_by, name=name, license=license, figures=figures, replace=replace)
    except (ValueError, OSError) as error:
        fail(error)
    print(file)


def push(
    run: _Run,
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Of the Hub.")],
    private: Annotated[
        bool, typer.Option("--private", help="Seen by its owner alone, if it is made by this.")
    ] = False,
    license: _License = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    pull_request: Annotated[
        bool, typer.Option("--pull-request", help="Ask its owner, in place of a commit.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Without asking.")] = False,
) -> None:
    """Uploads a model's folder as a repository of the Hub, in one commit: the model and its card,
    without a run's training state.
    """
    folder, made_by = _placed(run)

    from ldm.formats import hub
    from ldm.formats.card import NAME, write

    try:
        hub.complete(folder)
        if license or not (folder / NAME).is_file():
            name = repository.rpartition("/")[2]
            print(write(folder, made_by, name=name, license=license))
        files = hub.published(folder)
        size = sum(file.stat().st_size for file in files)
        print(f"{folder}: {len(files)} files, {size / 1e6:.1f} MB, to {repository}")
        if not yes:
            _confirmed(repository)
        print(
            hub.upload(
                folder,
                repository,
                commit_message=message,
                private=private or None,
                create_pr=pull_request,
            )  # fmt: skip
        )
    except (ValueError, OSError) as error:
        fail(error)


def _confirmed(repository: str) -> None:
    if not sys.stdin.isatty():
        fail(f"{repository}: nobody can be asked here whether to upload: pass --yes")
    typer.confirm("Upload?", abort=True)


def _placed(run: Path) -> tuple[Path, Path | None]:
    if not there(run):
        fail(f"{run}: there is no such folder")

    from ldm.formats.card import placed

    return placed(run)
