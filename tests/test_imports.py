"""Who may import whom: only what stands further left in LAYERS, or in the same package."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ouroboros3d"
LAYERS = [
    {"camera_defaults", "errors", "processes", "tensors", "timing"},
    {"devices", "files"},
    {"cameras", "gaussians"},
    {"config", "geometry", "interfaces"},
    {"feedback"},
    {"diffusion", "models", "rendering", "visualize"},
    {"data", "export", "sampler"},
    {"build", "datagen", "objective"},  # build: the composition root
    {"inference"},
    {"needs"},
    {"pipeline"},
    {"evaluation"},
    {"training"},
    {"app"},
    {"cli"},
    {"__main__"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def module_files() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def layer_of(path: Path) -> str:
    """`models` for ouroboros3d/models/lgm.py, `sampler` for ouroboros3d/sampler.py."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_layers(path: Path) -> set[str]:
    """The parts of ouroboros3d that a file imports anywhere, also inside functions, but not for types alone."""
    names: set[str] = set()
    tree = ast.parse(path.read_text())
    tree.body = [n for n in tree.body if not (isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            names.add(layer_of(path))  # a relative import stays in its package
        elif isinstance(node, ast.ImportFrom) and node.module == "ouroboros3d":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ouroboros3d."):
            names.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names |= {a.name.split(".")[1] for a in node.names if a.name.startswith("ouroboros3d.")}
    return names - {"__version__", "Ouroboros3DPipeline"}


def test_the_reader_of_imports_finds_all_kinds(tmp_path):
    path = PACKAGE / "models" / "example.py"

    class Example(type(path)):
        def read_text(self, *_args):
            return (
                "import ouroboros3d.sampler\nfrom ouroboros3d import diffusion, config\n"
                "def f():\n    from ouroboros3d.data.image import x\nfrom .lgm import y\nimport torch\n"
            )

    assert imported_layers(Example(path)) == {"sampler", "diffusion", "config", "data", "models"}


def test_every_module_has_a_layer():
    assert {layer_of(path) for path in module_files()} <= set(RANK)


@pytest.mark.parametrize("path", module_files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_left(path):
    own = layer_of(path)
    for name in imported_layers(path) - {own}:
        assert RANK[name] < RANK[own], f"{path.name} imports {name}, which is not below {own}"


def test_models_and_rendering_never_import_each_other():
    """Implied by the layers; said for itself because swapping either must touch one file."""
    for one, other in (("models", "rendering"), ("rendering", "models")):
        assert all(other not in imported_layers(path) for path in (PACKAGE / one).glob("*.py"))


def test_the_trainer_knows_no_network():
    allowed = {"config", "devices", "errors", "files", "timing", "training", "visualize"}
    assert imported_layers(PACKAGE / "training" / "trainer.py") <= allowed


def test_the_loop_knows_no_particular_renderer():
    for name in ("sampler", "objective"):
        assert "rendering" not in imported_layers(PACKAGE / f"{name}.py")
