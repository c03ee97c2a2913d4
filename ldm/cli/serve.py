"""``ldm serve --model DIR --out pictures``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ldm.cli.failure import at_hand, fail, there
from ldm.threads import share_memory

KEY = "LDM_SERVE_KEY"
"""The key's place in the environment."""
_LOCAL = ("127.0.0.1", "localhost", "::1")
_SHORT = 8  # characters of a key, at least
_EXTRA = "ldm serve needs what the extra brings: pip install 'ldm[serve]'"


def _key(file: Path | None) -> str | None:
    """The key of a file, or of the environment."""
    if file is None:
        key = os.environ.get(KEY)
    else:
        if not (there(file, "--key ") and file.is_file()):
            fail(f"--key {file}: there is no such file; it holds the key, in one line")
        key = file.read_text(encoding="utf-8").strip()
    if key is not None and (len(key) < _SHORT or not key.isascii() or not key.isprintable()):
        fail(f"the key must be {_SHORT} or more printable characters of ASCII, in one line")
    return key


def serve(
    model: Annotated[
        list[Path] | None,
        typer.Option(
            help="Pipeline folder, a model in one file, or OWNER/NAME[@REVISION] of the Hub; the"
            " first is the one that is drawn with. May be repeated."
        ),
    ] = None,
    models: Annotated[
        Path | None, typer.Option(help="A folder of further models, which requests may name.")
    ] = None,
    loras: Annotated[
        Path | None, typer.Option(help="A folder of LoRAs, files or folders, which they may name.")
    ] = None,
    runs: Annotated[
        Path | None, typer.Option(help="A folder of runs, which a page shows as they train.")
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(help="Data of trainings, which a page checks and shows. May be repeated."),
    ] = None,
    manage: Annotated[
        bool,
        typer.Option(
            "--manage",
            help="Let the pages stop runs, ask them for samples, draw with their results, and"
            " change captions.",
        ),
    ] = False,
    out: Annotated[
        Path, typer.Option(help="Where pictures and jobs are kept, and found again.")
    ] = Path("served"),
    host: Annotated[str, typer.Option(help="Address; any but this machine's own needs a key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port.")] = 7860,
    key: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help=f"A file with the key that everybody has to know; else {KEY}."
        ),
    ] = None,
    name: Annotated[
        list[str] | None,
        typer.Option(help="A host name by which the server may be called. May be repeated."),
    ] = None,
    queue: Annotated[
        float,
        typer.Option(
            min=1,
            help="Work that may wait: pictures x steps, twice that of guided ones, at the model's"
            " own size.",
        ),
    ] = 20_000.0,
    pixels: Annotated[int, typer.Option(min=1, help="Of a picture at most.")] = 1024 * 1024,
    steps: Annotated[int, typer.Option(min=1, help="Of a sampler at most.")] = 200,
    count: Annotated[int, typer.Option(min=1, help="Pictures of a job at most.")] = 16,
    drain: Annotated[
        int, typer.Option(min=0, help="Seconds for what is being drawn when a signal ends it.")
    ] = 60,
    exact: Annotated[
        bool,
        typer.Option(
            "--exact",
            help="Evaluate in batches of one size: where /healthz says that company changes"
            " pictures, it does not.",
        ),
    ] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
) -> None:
    """Serves a page and APIs that draw: the native one, OpenAI's images, AUTOMATIC1111's."""
    secret = _key(key)
    if host not in _LOCAL and secret is None:
        fail(f"--host {host}: others reach the server there: give it a key, as --key or {KEY}")
    hosts = [*(name or []), *([] if secret is not None and not name else _LOCAL)]
    if not model and models is None:
        fail("--model is missing: the folder of the model that draws")
    for option, folder in (("--models", models), ("--loras", loras), ("--runs", runs)):
        if folder is not None and not (there(folder, f"{option} ") and folder.is_dir()):
            fail(f"{option} {folder}: there is no such folder")
    for path in data or []:
        if not there(path, "--data "):
            fail(f"--data {path}: there is no such folder or file")
    if manage and runs is None and not data:
        fail("--manage goes with --runs or --data, which it lets the pages change")
    paths = [at_hand(path, "--model ", file=True) for path in model or []]
    share_memory()
    try:
        import diffusers
        import transformers

        from ldm.serving.api.app import create_app
        from ldm.serving.api.page import Page
        from ldm.serving.api.run import run
        from ldm.serving.api.watching import Watching
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("fastapi", "uvicorn", "prometheus_client"):
            fail(_EXTRA)
        raise
    from ldm.engine.precision import device_at_hand
    from ldm.serving.limits import Limits
    from ldm.serving.service import Service
    from ldm.serving.shelf import Shelf, models_of
    from ldm.storage.lock import InUseError, lock

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    where = device or str(device_at_hand())
    try:
        found = models_of(paths, models)
        if not found:
            fail(f"--models {models}: there is no model in it")
        out.mkdir(parents=True, exist_ok=True)
        held = lock(out)
        limits = Limits(count=count, steps=steps, pixels=pixels, work=queue)
        service = Service(Shelf(found, loras), out, limits, where, exact)
        watch = Watching.of(runs, data or [], manage=manage)
        service.start()
    except InUseError as error:
        fail(f"--out {out}: {error}")
    except (RuntimeError, AssertionError) as error:  # torch's own words for "not there"
        fail(f"--device {where}: {error}")
    except (ValueError, OSError) as error:
        fail(error)
    shown = f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def ready() -> None:
        told = "exact" if service.exact else "NOT exact: company changes pictures, see --exact"
        print(f"ready: {shown} ({', '.join(found)}; {told}; pictures in {out})", flush=True)

    app = create_app(service, key=secret, hosts=hosts, page=Page(), watch=watch)
    run(app, service, host, port, drain=drain, ready=ready)
    del held
