"""The house as DESIGN draws it: few modules at the top, no circle of imports, data walks one way.

All of it is read from the source, so nothing heavy is imported. Function-level imports count as
well; only what stands under TYPE_CHECKING does not.
"""

import ast
import functools
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "fastft"
MOST_AT_THE_TOP = 14
STAGES = (
    "planning", "data", "engines", "kernels", "runs", "inference", "training", "exporting",
    "verification", "verbs", "quickstart", "bench", "cli",
)  # fmt: skip
"""A stage imports from those before it and from the ground floor, never from one after it."""
GROUND = {
    "errors", "files", "secrets", "config", "families", "hardware", "hub", "models", "progress",
    "console", "child",
}  # fmt: skip


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@functools.cache
def imports_of(module: str) -> frozenset[str]:
    """The modules of fastft that `module` names in an import, wherever in the file."""
    found: set[str] = set()

    def walk(node):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            if isinstance(child, ast.Import):
                found.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module:
                for alias in child.names:
                    deeper = f"{child.module}.{alias.name}"
                    found.add(deeper if deeper in MODULES else child.module)
            walk(child)

    walk(ast.parse(MODULES[module].read_text(encoding="utf-8")))
    return frozenset(found & MODULES.keys() - {module})


def stage_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "fastft"


def test_few_modules_lie_at_the_top():
    at_the_top = sorted(path.stem for path in PACKAGE.glob("*.py"))
    assert len(at_the_top) <= MOST_AT_THE_TOP, at_the_top


def test_no_circle_of_imports():
    done: set[str] = set()

    def visit(module, way):
        if module in way:
            raise AssertionError(" -> ".join([*way[way.index(module) :], module]))
        if module not in done:
            for other in sorted(imports_of(module)):
                visit(other, [*way, module])
            done.add(module)

    for module in MODULES:
        visit(module, [])


def test_a_stage_imports_only_from_those_before_it():
    order = dict.fromkeys(GROUND, -1) | {stage: i for i, stage in enumerate(STAGES)}
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert folders <= {*STAGES, *GROUND}
    backwards = [
        f"{module} imports {other}"
        for module in MODULES
        for other in imports_of(module)
        if stage_of(module) in order
        and order.get(stage_of(other), -1) > order[stage_of(module)]
        and not module.endswith("__main__")
    ]
    assert backwards == []


def test_no_package_binds_a_name_of_one_of_its_modules():
    """`import fastft.exporting.weights as w` must give the module, whatever was used before."""
    code = """
import importlib, sys
packages = sys.argv[1].split()
for name in packages:
    module = importlib.import_module(name)
    for public in getattr(module, "__all__", None) or [n for n in dir(module) if n[0] != "_"]:
        getattr(module, public, None) if name != "fastft" else None
print([f"{name}.{sub}" for name in packages for sub in sys.argv[2].split()
       if sub.rpartition(".")[0] == name
       and not isinstance(vars(sys.modules[name]).get(sub.rpartition(".")[2], sys), type(sys))])
"""
    packages = [name for name, path in MODULES.items() if path.name == "__init__.py"]
    light = [name for name in packages if not name.startswith("fastft.kernels")]
    done = subprocess.run(
        [sys.executable, "-c", code, " ".join(light), " ".join(MODULES)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"
    verbs = set(_public_names())
    assert verbs.isdisjoint(name.rpartition(".")[2] for name in MODULES if name.count(".") == 1)


def _public_names():
    import fastft

    return fastft.__all__
