"""The commands: one module per entry point, each with a `main(arguments)`.

The scripts at the top of the repository and in scripts/ call `run`; the installed command `ouroboros3d` calls `main`,
which has those in COMMANDS as sub-commands, also under the names of their scripts.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from ouroboros3d.devices import OUT_OF_MEMORY
from ouroboros3d.errors import UserError
from ouroboros3d.files import ROOT

# Sub-command of `ouroboros3d` -> (module here, what it does).
COMMANDS = {
    "infer": ("inference", "turn pictures into 3D Gaussians"),
    "app": ("app", "start the web app: upload a picture, watch the loop, download the object"),
    "view": ("view", "show a 3D Gaussian .ply in the browser"),
    "train": ("train", "train on orbits of objects"),
    "evaluate": ("evaluate", "score a model on held-out orbits"),
    "ablate": ("ablate", "train, evaluate and print the paper's ablation tables"),
    "convert": ("convert", "convert a .ply of Gaussians to files for viewers and other tools"),
    "export": ("export", "write weights in the layout of diffusers or of the release"),
    "render": ("render_orbits", "render orbits of meshes"),
    "render_eval": ("render_eval", "render an evaluation set of meshes"),
    "validate": ("validate_orbits", "find broken orbits"),
    "shard": ("make_shards", "pack orbits into tar files"),
    "get_furniture": ("get_furniture", "fetch 509 free models"),
    "candidates": ("measure_candidates", "measure what choosing among candidates gains"),
    "get_u2netp": ("get_u2netp", "download the background-removal network again"),
    "get_objaverse": ("get_objaverse", "fetch models of Objaverse"),
    "train_parts": ("train_frozen_parts", "train the small model's VAE, image encoder or tiny decoder"),
    "plot": ("plot_metrics", "plot training curves"),
    "memory": ("memory_table", "print the memory that training needs per strategy"),
}


def run(name: str) -> NoReturn:
    """Runs the command of this module with the process's arguments, and exits with its status."""
    sys.exit(call(lambda: _main_of(name)(sys.argv[1:])))


def main() -> NoReturn:
    """`ouroboros3d COMMAND [arguments]`."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        lines = (f"  {command:{width}}  {text}" for command, (_, text) in COMMANDS.items())
        print("usage: ouroboros3d COMMAND [arguments]    (ouroboros3d COMMAND --help)\n", *lines, sep="\n")
        sys.exit(0)
    modules = {module: module for module, _ in COMMANDS.values()} | {k: module for k, (module, _) in COMMANDS.items()}
    if name not in modules:
        print(f"error: {name}: no such command; known: {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"ouroboros3d {name}", *sys.argv[2:]]
    run(modules[name])


def _main_of(name: str) -> Callable[[list[str]], int | None]:
    """The module's `main`. Where a package is missing, --help still says what the command does."""
    try:
        return load(name).main
    except ModuleNotFoundError as error:
        if not {"-h", "--help"} & set(sys.argv[1:]) or _is_ours(error):
            raise
        source = importlib.util.find_spec(_full(name)).origin
        text = ast.get_docstring(ast.parse(Path(source).read_text()))
        missing = f"its options are listed where there is the package {error.name}: {_cure()}"
        return lambda _: print(f"{text}\n\n{missing}")


def load(name: str):
    """The module of a command, by its name here or its full name."""
    return importlib.import_module(_full(name))


def _full(name: str) -> str:
    return name if "." in name else f"ouroboros3d.cli.{name}"


def call(main: Callable[..., int | None], *arguments, **options) -> int:
    """The status of a command: what it returns (None is 0); 2 after a UserError or without a package, which is one
    line on stderr; 130 and 143 when Ctrl-C or SIGTERM stopped it, so that a script of several stages stops too."""

    own = os.getpid()

    def terminated(*_) -> NoReturn:
        if os.getpid() != own:  # a process forked with this handler, ended before it set its own
            os._exit(143)
        raise SystemExit(143)  # unwinds, so that temporary files are removed

    before = signal.signal(signal.SIGTERM, terminated)
    try:
        return main(*arguments, **options) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what was finished is kept", file=sys.stderr)
        return 130
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported for this
            raise
        print(f"error: {OUT_OF_MEMORY}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if _is_ours(error):
            raise
        print(f"error: {sys.executable} has no package {error.name}: {_cure()}", file=sys.stderr)
        return 2
    finally:
        signal.signal(signal.SIGTERM, before)


def _is_ours(error: ModuleNotFoundError) -> bool:
    """Whether a module of this project is missing: a fault, not a package to install."""
    return not error.name or error.name.partition(".")[0] in ("ouroboros3d", "tests")


def _cure() -> str:
    activate = ROOT / ".venv" / "bin" / "activate"
    return f"source {activate}" if activate.is_file() else "pip install -r requirements.txt, or ./run.sh setup"
