"""Entry points: thin doors, light help, one-line errors, statuses of interruptions, nothing that only Linux has."""

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ouroboros3d.cli import COMMANDS, call, load
from ouroboros3d.cli.options import ConfigParser, Parser
from ouroboros3d.errors import UserError

ROOT = Path(__file__).parents[1]
DOORS = [ROOT / "train.py", ROOT / "inference.py", *sorted((ROOT / "scripts").glob("*.py"))]
DOORS = [path for path in DOORS if "from ouroboros3d" in path.read_text()]  # the others stand alone
MODULES = sorted(p.stem for p in (ROOT / "ouroboros3d" / "cli").glob("*.py") if p.stem not in ("__init__", "options"))

# Imports a command with the modules that only some systems have hidden, and asks for its help. What may not be
# imported for that is printed: torch, diffusers and transformers take seconds.
HELP = """
import importlib, sys
for name in ("resource", "fcntl", "termios", "pwd", "grp"):
    sys.modules[name] = None
try:
    importlib.import_module(sys.argv[1]).main(["--help"])
except SystemExit as stop:
    heavy = ("torch", "diffusers", "transformers", "trimesh", "matplotlib", "gradio")
    sys.exit(stop.code or ", ".join(name for name in heavy if name in sys.modules) or None)
"""


@pytest.mark.parametrize("module", [*(f"ouroboros3d.cli.{name}" for name in MODULES), "tests.parity.check"])
def test_help_needs_nothing_heavy_and_no_module_of_one_system(module):
    done = subprocess.run([sys.executable, "-c", HELP, module], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "usage" in done.stdout, done.stderr


@pytest.mark.parametrize("name", MODULES)
def test_a_wrong_argument_is_one_line(name, capsys):
    try:
        status = call(load(name).main, ["--no_such_option"])
    except SystemExit as stop:
        status = stop.code
    message = capsys.readouterr().err
    assert status == 2 and message.startswith("error: ") and message.count("\n") == 1


def test_a_choice_may_begin_with_a_dash():
    parser = Parser(None)
    parser.add_argument("--up", choices=("y", "-y"))
    parser.add_argument("files", nargs="*")
    for words in (["--up", "-y", "a"], ["a", "--up=-y"]):
        options = parser.parse_args(words)
        assert options.up == "-y" and options.files == ["a"]


def test_no_module_needs_one_system_to_be_imported():
    """What only some systems have is imported where it is used, and not at the top of a module."""
    some = {"resource", "fcntl", "termios", "pwd", "grp", "winreg", "msvcrt"}
    for path in (ROOT / "ouroboros3d").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = {a.name for a in node.names} if isinstance(node, ast.Import) else {getattr(node, "module", None)}
            assert not names & some, f"{path}: {names & some}"


@pytest.mark.parametrize("path", DOORS, ids=lambda p: p.name)
def test_doors_are_thin_and_lead_to_a_command(path):
    text = path.read_text()
    assert len(text.splitlines()) < 15
    (name,) = [n.args[0].value for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call) and n.args[1:] == []
               and getattr(n.func, "id", "") == "run"]  # fmt: skip
    assert name in MODULES or name == "tests.parity.check"


def test_every_command_has_a_door_and_every_sub_command_a_module():
    assert {path.stem for path in DOORS} - {"check_parity"} <= set(MODULES)
    assert {module for module, _ in COMMANDS.values()} <= set(MODULES)


def test_a_door_works_from_another_folder_without_a_path(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, str(ROOT / "scripts" / "evaluate.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "--list" in done.stdout, done.stderr


def test_the_installed_command_lists_what_there_is_and_names_what_there_is_not(tmp_path):
    def ask(*words):
        command = [sys.executable, "-m", "ouroboros3d", *words]
        return subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)

    assert all(f"  {name} " in ask("--help").stdout for name in COMMANDS)
    assert "ouroboros3d render_orbits" in ask("render_orbits", "--help").stdout  # the script's name
    wrong = ask("fly")
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: fly: no such command") and not wrong.stdout


def test_statuses(capsys):
    def fail(error):
        raise error

    assert call(lambda: None) == 0 and call(lambda: 3) == 3
    assert call(fail, UserError("what to do")) == 2
    assert capsys.readouterr().err == "error: what to do\n"
    assert call(fail, KeyboardInterrupt()) == 130
    capsys.readouterr()
    assert call(fail, ModuleNotFoundError("no", name="omegaconf")) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and "has no package omegaconf: " in told and told.count("\n") == 1
    with pytest.raises(ModuleNotFoundError):  # ours: a fault
        call(fail, ModuleNotFoundError("no", name="ouroboros3d.nothing"))
    with pytest.raises(SystemExit) as stopped:
        call(os.kill, os.getpid(), signal.SIGTERM)
    assert stopped.value.code == 143


def test_an_old_python_is_refused_in_one_line():
    code = "import sys; sys.version_info = (3, 8, 1); sys.path.insert(0, sys.argv[1]); import ouroboros3d"
    done = subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True)
    assert (
        done.returncode == 1 and done.stderr.startswith("error: Python 3.10 or newer") and done.stderr.count("\n") == 1
    )


def test_an_installed_package_has_every_folder_and_the_configurations():
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {p.parent.relative_to(ROOT).as_posix().replace("/", ".") for p in (ROOT / "ouroboros3d").rglob("*.py")}
    assert folders | {"ouroboros3d.configs", "ouroboros3d.checkpoints"} == set(settings["packages"])
    assert all((ROOT / folder).is_dir() for folder in settings["package-dir"].values())
    kept = {pattern.removeprefix("**/") for pattern in [*settings["package-data"]["*"], "*.py"]}
    files = [p for p in (ROOT / "ouroboros3d").rglob("*.*") if p.is_file() and "__pycache__" not in p.parts]
    assert not [p for p in files if f"*{p.suffix}" not in kept]  # what no pattern takes along


@pytest.mark.parametrize("name", ["code_size", "convert", "get_furniture", "validate_orbits", "view"])
def test_the_help_of_a_command_without_a_configuration_needs_no_package(name):
    hidden = "sys.modules.update(dict.fromkeys(('torch', 'numpy', 'omegaconf', 'tqdm', 'PIL')))"
    code = f"import sys; {hidden}; from ouroboros3d.cli import load; load({name!r}).main(['--help'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("given", "name"), [("fp32", "float32"), ("bfloat16", "bf16"), ("float16", "fp16"), ("fp16", "fp16")]
)
def test_a_precision_answers_to_all_its_names(given, name):
    parser = ConfigParser("", "configs/small.yaml")
    parser.add_dtype("precision")
    assert parser.parse_args(["--dtype", given]).dtype == name
    assert not [
        p for p in (ROOT / "ouroboros3d" / "cli").glob("*.py") if p.stem != "options" and '"--dtype"' in p.read_text()
    ]


@pytest.mark.parametrize("script", DOORS, ids=lambda path: path.stem)
def test_help_of_a_clone_says_what_a_command_does_before_anything_is_installed(script, tmp_path):
    hidden = "sys.modules.update(dict.fromkeys(('torch', 'numpy', 'omegaconf', 'tqdm', 'PIL')))"
    code = f"import runpy, sys; {hidden}; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, str(script), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "usage:" in done.stdout or "its options are listed where there is the package" in done.stdout
    own = ROOT / "ouroboros3d" / "cli" / script.name
    module = own if own.is_file() else ROOT / "tests" / "parity" / "check.py"
    assert ast.get_docstring(ast.parse(module.read_text())).splitlines()[0] in done.stdout
