"""The packages: what imports what has no circles, and names that begin with an underscore stay where they are."""

import ast
import re
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

from tests.conftest import ROOT

SOURCES = [Path(x) for x in subprocess.check_output(["git", "ls-files", "*.py"], cwd=ROOT, text=True).split()]
# A folder is one package; each file of the root is one by itself.
PACKAGES = {path.parts[0].removesuffix(".py") for path in SOURCES} - {"tests", "examples"}

# Used where they are installed, each with a message of its own or a test that is skipped.
OPTIONAL = {
    "en_core_web_sm", "fastembed", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "peft", "ray", "torchjd", "vaderSentiment",
}  # fmt: skip


@cache
def imports(path: Path) -> list[tuple[str, str]]:
    """Returns every (module, name) that a file imports, wherever it does; the name is empty for `import module`."""
    found = []
    for node in ast.walk(ast.parse((ROOT / path).read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found += [(x.name, "") for x in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.module or "", x.name) for x in node.names]
    return found


def test_packages_import_each_other_in_no_circle():
    graph: dict[str, set[str]] = {package: set() for package in PACKAGES}
    for path in SOURCES:
        package = path.parts[0].removesuffix(".py")
        if package in PACKAGES:
            used = {module.partition(".")[0] for module, _ in imports(path)} & (PACKAGES | {"tests"})
            graph[package] |= {x for x in used if x != package}
    assert not any("tests" in used for used in graph.values()), "what is released needs no test"
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_private_names_stay_in_their_package():
    """A name with an underscore that one package defines is read by no other."""
    defined: dict[str, set[str]] = {}
    read: dict[str, set[str]] = {}
    for path in SOURCES:
        package = path.parts[0].removesuffix(".py")
        if package not in PACKAGES:
            continue
        for node in ast.walk(ast.parse((ROOT / path).read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                defined.setdefault(package, set()).add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                defined.setdefault(package, set()).add(node.attr)
            elif isinstance(node, ast.Attribute):
                read.setdefault(package, set()).add(node.attr)
            elif isinstance(node, ast.ImportFrom):
                read.setdefault(package, set()).update(x.name for x in node.names)
    private = {x: package for package, names in defined.items() for x in names if x.startswith("_") and not x.endswith("__")}
    others = {
        (package, x) for package, names in read.items() for x in names & set(private) if x not in defined.get(package, ())
    }
    assert not others, others


def declared(name: str) -> set[str]:
    """Returns the packages that a file of requirements names, and those of the file that it includes."""
    lines = (ROOT / name).read_text("utf-8").splitlines()
    included = [line.removeprefix("-r ") for line in lines if line.startswith("-r ")]
    names = {normal(found[0]) for line in lines if (found := re.match(r"\w[\w.-]*", line))}
    return names.union(*map(declared, included))


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_what_is_imported_is_declared():
    jobs = ("requirements.txt", "requirements-train.txt", "requirements-dev.txt", "requirements-serving.txt")
    used: dict[str, set[str]] = {file: set() for file in jobs}
    for path in SOURCES:
        files = dict.fromkeys(("tests", "benchmarks", "demo", "examples"), "requirements-dev.txt")
        files["serving"] = "requirements-serving.txt"
        own_file = files.get(path.parts[0], "requirements-train.txt")
        used["requirements.txt" if len(path.parts) == 1 or path.parts[0] == "bulk" else own_file] |= {
            module.partition(".")[0] for module, _ in imports(path) if module
        }
    installed = packages_distributions()
    for file, modules in used.items():
        others = modules - set(sys.stdlib_module_names) - PACKAGES - OPTIONAL - {"tests", "examples"}
        missing = {x for x in others if not {normal(y) for y in installed.get(x, [x])} & declared(file)}
        assert not missing, f"{file} lacks {sorted(missing)}"
