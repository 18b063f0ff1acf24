"""Imports run one way, and what is public is documented."""

import ast
import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import lora_jax

ROOT = Path(lora_jax.__file__).parent
# From the bottom up: a module imports from its own line and the lines above it.
LAYERS = [
    ["paths", "layouts", "version", "tables", "context_mesh"],
    ["targets", "kernels"],
    ["schema"],
    ["node_parts"],
    ["weights"],
    ["quant", "products"],
    ["adapted"],
    ["nodes"],
    ["methods", "tracing"],
    ["extras"],
    ["transform", "adapt"],
    ["masks", "stacking", "arithmetic", "allocation", "data_inits", "fingerprint"],
    ["describe", "diagnosis", "frozen"],
    ["models"],
    ["data"],
    ["evaluation", "training", "interop", "parallel", "planning", "serving"],
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
FORBIDDEN = {
    "experiments", "configs", "torch", "transformers", "peft", "bitsandbytes", "tensorflow"
}  # fmt: skip
MODULES = sorted(ROOT.rglob("*.py"))


def imported(module: Path) -> set[str]:
    """Dotted names, also of imports inside functions."""
    names = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: import absolutely"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def part(dotted: str) -> str | None:
    """`lora_jax.models.llama` belongs to `models`; None for other packages."""
    first, _, rest = dotted.partition(".")
    return rest.partition(".")[0] if first == "lora_jax" and rest else None


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_private_module_is_imported(module):
    parts = {part for name in imported(module) for part in name.split(".")}
    assert not {part for part in parts if part.startswith("_") and not part.startswith("__")}


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(module):
    names = imported(module)
    assert not FORBIDDEN & {name.partition(".")[0] for name in names}
    own = module.relative_to(ROOT).with_suffix("").parts[0]
    if own == "__init__":
        return
    assert own in RANK, f"{own} has no place in LAYERS"
    above = {name for name in names if (p := part(name)) in RANK and RANK[p] > RANK[own]}
    assert not above, f"{own} imports {above}, which stand above it"


def test_every_part_that_exists_is_ranked():
    parts = {path.relative_to(ROOT).with_suffix("").parts[0] for path in MODULES} - {"__init__"}
    assert parts <= RANK.keys()


def test_part():
    assert part("lora_jax.models.llama") == "models" and part("lora_jax.paths") == "paths"
    assert part("jax.numpy") is None and part("lora_jax") is None


PUBLIC = [name for name in vars(lora_jax) if not name.startswith("_")]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_have_docstrings(name):
    thing = getattr(lora_jax, name)
    if inspect.ismodule(thing):
        return
    assert thing.__doc__ and not thing.__doc__.startswith(f"{name}(")


def test_the_designs_names_are_public():
    names = "lora_transform bind merge unmerge trainable_mask mask_optimizer stack unstack describe"
    assert {*names.split(), "linear", "embed", "LoRA", "Full"} <= set(PUBLIC)


LOADED = """
import sys, jax, flax.struct, optax
before = set(sys.modules)
import lora_jax
print(*sorted(set(sys.modules) - before))
"""


def test_importing_loads_no_backend_and_nothing_that_training_alone_needs():
    """At most 0.3 s above jax, flax.struct and optax, of which this is what does not depend on the
    clock: measured 0.24 s."""
    run = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=True)
    loaded = {name for name in run.stdout.split() if part(name) is None and name != "lora_jax"}
    roots = {name.partition(".")[0] for name in loaded}
    assert roots - set(sys.stdlib_module_names) <= {"jax"}
    assert not [name for name in loaded if "pallas" in name or "mosaic" in name]
    parts = {part(name) for name in run.stdout.split()} - {None}
    assert not parts & {"models", "data", "training", "interop", "parallel", "planning", "serving"}


def test_requirements_are_the_core_and_every_extra():
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    packaged = {name for names in (project["dependencies"], *extras) for name in names}
    lines = (ROOT.parent / "requirements.txt").read_text().splitlines()
    required = {line for line in lines if line and not line.startswith("#")}
    own = {name for name in packaged if name.startswith("lora_jax[")}
    assert packaged - own == required - {"chex>=0.1.91"}  # which the tests use
