"""Runs notebooks and writes what they show into them, as Jupyter's "Restart and Run All" does.

    python assets/notebooks/run.py [NAME ...]

For who has no Jupyter, and for the test of notebooks. A cell is Python, or a line of a shell after
"!"; its last value is shown, and so are matplotlib's figures. The cell that is tagged
``parameters`` says what may be replaced, as papermill does it. Of what is printed lines of progress
are not stored, which tell how fast a machine was, nor where its folders lie.
"""

from __future__ import annotations

import argparse
import ast
import base64
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

NOTEBOOKS = Path(__file__).parent
ROOT = NOTEBOOKS.parents[1]
NAMES = ("draw", "own_pictures", "parts", "samplers")


def shell(command: str) -> str:
    """What ``command`` prints, in the environment of this Python; an error if it fails."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        command,
        shell=True,
        env=os.environ | {"PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{command}: status {done.returncode}\n{done.stdout}")
    return done.stdout


def read(name: str) -> dict[str, Any]:
    """The notebook, as the JSON that it is."""
    return json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())


def source(cell: dict[str, Any]) -> str:
    """The text of a cell."""
    return "".join(cell["source"])


def run(
    notebook: dict[str, Any], system: Callable[[str], str] = shell, **parameters: Any
) -> dict[str, Any]:
    """Runs the code cells in order, stores what they show, and returns what the names stand for.

    Args:
        notebook: as ``read`` gives it; its outputs are replaced.
        system: runs a command, and returns what it printed.
        parameters: in place of those of the cell that is tagged so.
    """
    import matplotlib

    matplotlib.use("agg")
    names: dict[str, Any] = {"__name__": "__main__"}
    shown: list[dict[str, Any]] = []
    names["display"] = lambda *values: shown.extend(map(_displayed, values))
    names["get_ipython"] = lambda: SimpleNamespace(
        system=lambda command: print(system(command.format_map(names)), end="")
    )
    count = 0
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        count, printed = count + 1, io.StringIO()
        shown.clear()
        with redirect_stdout(printed):
            value = _executed(source(cell), names)
        if "parameters" in cell["metadata"].get("tags", ()):
            if unknown := set(parameters) - set(names):
                raise ValueError(f"the notebook has no {', '.join(sorted(unknown))}")
            names |= parameters
        told = _told(printed.getvalue()).splitlines(keepends=True)
        outputs = [{"output_type": "stream", "name": "stdout", "text": told}] if told else []
        outputs += shown
        if value is not None:
            result = {"output_type": "execute_result", "execution_count": count}
            outputs.append(_displayed(value) | result)
        outputs += _figures()
        cell["execution_count"], cell["outputs"] = count, outputs
    return names


def _executed(text: str, names: dict[str, Any]) -> Any:
    """Runs a cell; the value of its last line, unless that is none or ends in a semicolon."""
    text = re.sub(
        r"^!((?:.*\\\n)*.*)$", lambda line: f"get_ipython().system({line[1]!r})", text, flags=re.M
    )
    tree = ast.parse(text)
    last = tree.body[-1] if tree.body else None
    if not isinstance(last, ast.Expr) or text.rstrip().endswith(";"):
        exec(compile(tree, "<cell>", "exec"), names)
        return None
    exec(compile(ast.Module(tree.body[:-1], []), "<cell>", "exec"), names)
    return eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)


def _told(text: str) -> str:
    """What of a cell's lines is stored."""
    for folder, told in ((f"{Path(sys.executable).parent}/", ""), (f"{ROOT}/", "")):
        text = text.replace(folder, told)
    return re.sub(r"^.* \w+/s\b.*\n", "", text, flags=re.M)


def _displayed(value: Any) -> dict[str, Any]:
    """A value as Jupyter shows it: as a picture if it is one."""
    data: dict[str, Any] = {"text/plain": [repr(value)]}
    if hasattr(value, "_repr_png_"):
        data = {"image/png": _png(value), "text/plain": [f"<{type(value).__name__}>"]}
    return {"output_type": "display_data", "data": data, "metadata": {}}


def _png(picture: Any) -> str:
    """A picture of Pillow in base64, in 256 colours: notebooks are small."""
    file = io.BytesIO()
    picture.convert("RGB").quantize(256).save(file, "png", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def _figures() -> list[dict[str, Any]]:
    """Matplotlib's open figures, which are closed."""
    from matplotlib import pyplot
    from PIL import Image

    found = []
    for number in pyplot.get_fignums():
        file = io.BytesIO()
        pyplot.figure(number).savefig(file, format="png", bbox_inches="tight")
        found.append(_displayed(Image.open(file)))
        found[-1]["data"]["text/plain"] = ["<Figure>"]
    pyplot.close("all")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[*NAMES, []], help="all by default")
    for name in parser.parse_args(arguments).names or NAMES:
        os.chdir(NOTEBOOKS)  # where Jupyter starts a notebook
        notebook = read(name)
        run(notebook)
        text = json.dumps(notebook, indent=1, ensure_ascii=False)
        (NOTEBOOKS / f"{name}.ipynb").write_text(text + "\n")
        print(name)


if __name__ == "__main__":
    main()
