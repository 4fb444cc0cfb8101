"""Every module imports, and imports run one way: from pixels to numbers, never back."""

import ast
import importlib
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / "eqvae_jax"
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py"))

# Part of the package -> the parts it may import. The doors (main, evaluate, report) wire, and may import all; commands
# knows them by name only.
ALLOWED = {
    "commands": set(),
    "recipes": set(),
    "backend": set(),
    "atomic": set(),
    "distributed": set(),
    "equivariance": set(),
    "hardware": set(),
    "planning": {"hardware", "training"},
    "features": set(),
    "data": {"commands"},
    "generators": {"training"},
    "training": {"hardware"},
    "autoencoders": {"equivariance", "features", "training"},
    "weights": {"features", "autoencoders", "generators", "training"},
    "evaluation": {"equivariance", "features", "autoencoders", "generators", "weights", "data",
                   "training"},
}
DOORS = {"__main__", "main", "run", "encode", "sample", "evaluate", "report", "convert", "plan", "reproduce",
         "reproduction"}


def part(module):
    return module.split(".")[1] if "." in module else ""


def imports_of(module):
    path = PACKAGE.parent / (module.replace(".", "/") + ".py")
    path = path if path.exists() else PACKAGE.parent / module.replace(".", "/") / "__init__.py"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            if node.module == "eqvae_jax":
                yield from (f"eqvae_jax.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("module", MODULES)
def test_imports(module):
    importlib.import_module(module)


@pytest.mark.parametrize("module", [m for m in MODULES if part(m) and part(m) not in DOORS])
def test_imports_run_one_way(module):
    used = {part(name) for name in imports_of(module) if name.startswith("eqvae_jax.")}
    assert used <= ALLOWED[part(module)] | {part(module), "atomic", "distributed"}


@pytest.mark.parametrize("module", MODULES)
def test_the_package_needs_neither_torch_nor_tensorflow(module):
    roots = {name.split(".")[0] for name in imports_of(module)}
    assert not roots & {"torch", "torchvision", "torchmetrics", "torch_fidelity", "pytorch_fid", "diffusers",
                        "transformers", "tensorflow"}
