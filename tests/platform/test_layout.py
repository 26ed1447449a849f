"""The shape of the repository: packages, dependency arrows, pins, commands in the documents."""

import ast
import functools
import pkgutil
import re
import shlex
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from fakes.builds import run_pip
from fakes.repository import ROOT
from packaging.requirements import Requirement

import fulgurite
from fulgurite.systems import RESERVED_COMMANDS, systems

FOLDERS = {
    "": ROOT / "platform" / "fulgurite",
    **{name: ROOT / name for name in ("datamodules", "models", "callbacks", "configs")},
}
SOURCES = sorted(path for folder in FOLDERS.values() for path in folder.rglob("*.py"))
MAY_IMPORT = {
    "": set(),
    "datamodules": set(),
    "models": set(),
    "callbacks": {"models"},
    "configs": {"datamodules", "models", "callbacks"},
}
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")]
DOCUMENTS += ROOT.glob("models/*/README.md")
TESTS = sorted((ROOT / "tests").rglob("*.py"))
PRIVATE_DEFINITION = re.compile(
    r"\b(?:def|class) (_[A-Za-z]\w*)|^ *(_[A-Za-z]\w*)(?:: [^=\n]*)? = |\bself\.(_[A-Za-z]\w*)",
    re.MULTILINE,
)
#: Names that modules of ours define too, and tests have from others.
NOT_OURS = {
    "_asdict": "a public method of named tuples",
    "_replace": "a public method of named tuples",
    "_backward": "the end of the names of PyTorch's operators",
}
#: A helper that asserts says so by its name.
ASSERTION = re.compile(r"\bassert\b|\bpytest\.(?:raises|warns)\(|\b(?:assert|check)_\w+\(")

pytestmark = pytest.mark.skipif(
    not (ROOT / "pyproject.toml").is_file(), reason="needs the repository"
)


def module_of(path: Path) -> str:
    """``models/fedsir/module.py`` → ``fulgurite.models.fedsir.module``."""
    for name, folder in FOLDERS.items():
        if path.is_relative_to(folder):
            inside = path.relative_to(folder).with_suffix("").parts
            parts = [p for p in ("fulgurite", name, *inside) if p and p != "__init__"]
            return ".".join(parts)
    raise AssertionError(path)


@functools.cache
def imports_of(path: Path) -> set[str]:
    """Full names of all modules (and names) that a file imports, anywhere in it."""
    here = module_of(path).split(".")
    package = here if path.name == "__init__.py" else here[:-1]
    stub = path.with_suffix(".pyi")  # what a package imports on first use
    sources = [path, stub] if stub.is_file() else [path]
    found = set()
    for node in (n for s in sources for n in ast.walk(ast.parse(s.read_text(encoding="utf-8")))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{name}.{alias.name}" for alias in node.names}
    return found


def place(module: str) -> tuple[str, str]:
    """Folder and system of one of our modules; the platform is ''."""
    parts = [*module.split("."), "", ""]
    return (parts[1], parts[2]) if parts[1] in FOLDERS else ("", "")


def domain(module: str) -> str:
    """The system whose schemas a module of ``fulgurite.domains`` holds; '' for other modules."""
    parts = [*module.split("."), "", ""]
    return parts[2] if parts[1] == "domains" else ""


def test_platform_does_not_shadow_the_standard_library():
    assert not (ROOT / "platform" / "__init__.py").exists()
    assert not list(ROOT.glob("platform/*.py"))
    names = {path.stem for path in (ROOT / "platform").iterdir()}
    assert not names & sys.stdlib_module_names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows(path):
    folder, system = place(module_of(path))
    for name in imports_of(path):
        top = name.split(".")[0]
        assert top not in ("models", "datamodules", "callbacks", "configs"), (
            f"import fulgurite.{name}"
        )
        assert top not in ("torchvision", "timm", "pl_bolts"), f"{name} breaks beside CPU torch"
        if top != "fulgurite":
            continue
        if shared := domain(name):
            inside = domain(module_of(path)) or path.is_relative_to(FOLDERS[""] / "testing")
            its_own = folder in ("models", "datamodules", "callbacks") and system == shared
            assert inside or its_own, f"{name}: the schemas of another system"
            continue
        other, its_system = place(name)
        if other == folder:
            assert not system or its_system == system, f"{name}: one system imports another"
        elif other:
            assert other in MAY_IMPORT[folder], f"{folder or 'platform'} imports {name}"
            assert its_system == system, f"{name}: one system imports another"


def test_arrows_are_seen(tmp_path, monkeypatch):
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from .. import datamodules\n    from . import sibling\n")
    monkeypatch.setitem(FOLDERS, "models", tmp_path)
    assert imports_of(bad) == {"fulgurite.datamodules", "fulgurite.models.sibling"}
    assert place("fulgurite.datamodules.fedsir.noise") == ("datamodules", "fedsir")
    assert place("fulgurite.compare.plan") == ("", "")
    assert domain("fulgurite.domains.fedsir.Labels") == "fedsir"
    assert domain("fulgurite.compare.plan") == domain("fulgurite.domains") == ""


def import_graph(sources: list[Path]) -> dict[str, set[str]]:
    """The modules that each module imports, also for types alone and inside functions."""
    modules = {module_of(path): path for path in sources}
    graph = {}
    for module, path in modules.items():
        imported = set()
        for name in imports_of(path):
            while name and name not in modules:  # a name of a module
                name = name.rpartition(".")[0]
            imported.add(name)
        graph[module] = imported - {"", "fulgurite", module}
    return graph


def circles_of(graph: dict[str, set[str]]) -> set[tuple[str, ...]]:
    """Groups of modules of which each imports each other in the end."""
    reached: dict[str, set[str]] = {}
    for module in graph:
        visited, pending = set(), [module]
        while pending:
            following = graph[pending.pop()] - visited
            visited |= following
            pending += following
        reached[module] = visited
    return {
        tuple(sorted(other for other in reached[module] if module in reached[other]))
        for module in graph
        if module in reached[module]
    }


def test_no_modules_import_each_other():
    assert circles_of(import_graph(SOURCES)) == set()


def test_circles_are_seen():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}
    assert circles_of(graph) == {("b", "c")}


def private_definitions(text: str) -> set[str]:
    """Private functions, classes, variables and attributes that a module makes."""
    return {name for groups in PRIVATE_DEFINITION.findall(text) for name in groups if name}


def test_tests_use_what_is_public():
    private = set().union(*(private_definitions(path.read_text()) for path in SOURCES))
    used = {}
    for path in TESTS:
        text = path.read_text()
        words = set(re.findall(r"(?<![\w}])_[A-Za-z]\w*", text))
        if names := words & private - private_definitions(text) - NOT_OURS.keys():
            used[path.relative_to(ROOT).as_posix()] = sorted(names)
    assert used == {}, "test through public names, or name the function"


def test_private_names_are_seen():
    text = "class _A:\n    def _b(self): self._c: int = 0\n\n\n_D = 1\n_e: int = _f(_g == 2)\n"
    assert private_definitions(text) == {"_A", "_b", "_c", "_D", "_e"}


def silent_tests(text: str) -> list[str]:
    """Names of tests that assert nothing."""
    blocks = re.split(r"^(?=def |class |@)", text, flags=re.MULTILINE)
    if all(ASSERTION.search(block) for block in blocks if block.startswith("def test_")):
        return []  # to parse all files would take a second
    lines = text.splitlines()
    return [
        node.name
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        if not ASSERTION.search("\n".join(lines[node.lineno : node.end_lineno]))
    ]


def test_tests_assert_something():
    assert {path.name: names for path in TESTS if (names := silent_tests(path.read_text()))} == {}


def test_silent_tests_are_seen():
    loud = "def test_a():\n    check_it()\n\n\n@mark\ndef test_b():\n    assert 1\n"
    assert silent_tests(loud) == []
    assert silent_tests(loud + "def test_c():\n    run()\n\n\ndef f():\n    assert 1\n") == [
        "test_c"
    ]
    assert silent_tests('def test_d():\n    """\ndef f(): pass\n"""\n    assert 1\n') == []


def test_every_folder_with_code_is_a_package():
    for path in SOURCES:
        assert (path.parent / "__init__.py").is_file(), path.parent
    for folder in FOLDERS.values():
        assert (folder / "py.typed").is_file()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("build")
    run_pip(folder / "source", "wheel", "-w", str(folder))
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.slow  # it takes pip; the folders are checked above
def test_wheel_holds_the_folders(wheel):
    expected = set()
    for name, folder in FOLDERS.items():
        for path in folder.rglob("*"):
            shipped = path.suffix in (".py", ".pyi", ".yaml", ".j2", ".css", ".js")
            shipped = shipped or path.name in ("py.typed", "README.md")
            if shipped and "__pycache__" not in path.parts:
                inside = path.relative_to(folder).as_posix()
                expected.add("/".join(filter(None, ("fulgurite", name, inside))))
    found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert found == expected


@pytest.mark.parametrize("command", [["--help"], ["systems"], ["--version"]])
def test_light_commands_import_nothing_heavy(command, tmp_path):
    code = f"""
import sys
from fulgurite.__main__ import main
assert main({command}) == 0
heavy = {{"torch", "lightning", "numpy", "sklearn", "matplotlib", "wandb"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=tmp_path)


def test_constraints_fit_the_requirements():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert not [line for line in lines if "/" in line or "@" in line]
    pinned = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins.items()}
    extras = project["optional-dependencies"]
    named = [text for extra in ("test", "dev", "ice", "docs") for text in extras[extra]]
    for text in [*project["dependencies"], *named]:
        requirement = Requirement(text)
        if requirement.name != "fulgurite":
            version = pinned[re.sub(r"[-_.]+", "-", requirement.name).lower()]
            assert requirement.specifier.contains(version, prereleases=True), text
    assert "torchvision" not in pinned


def test_versions_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert project["version"] == fulgurite.__version__ == citation["version"]
    assert citation["license"] == project["license"]
    assert f"## [{fulgurite.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def commands_in(document: Path, program: str) -> list[list[str]]:
    """Command lines of a program in a document's code blocks and code spans."""
    text = document.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, flags=re.S | re.M)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    spans = re.findall(r"`([^`\n]+)`", prose)
    lines = [line.strip().removeprefix("$ ") for block in blocks for line in block.splitlines()]
    found = [line for line in [*lines, *spans] if line.split(" ")[0] == program and " " in line]
    return [shlex.split(line, comments=True) for line in found]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_in_the_documents_exist(document):
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([\w-]+):", makefile, flags=re.M))
    for command in commands_in(document, "make"):
        assert set(command[1:]) <= targets, command
    known = RESERVED_COMMANDS | {
        command.name for system in systems().values() for command in system.commands
    }
    for command in commands_in(document, "fulgurite"):
        names = command[1].split("|")
        assert all(n in known or n.startswith(("-", "<")) for n in names), command
        for name in re.findall(r"\b(\w+/[\w-]+\.yaml)\b", " ".join(command)):
            if (ROOT / "configs" / name.split("/")[0]).is_dir():
                assert (ROOT / "configs" / name).is_file(), command


def test_the_glossary_names_what_exists():
    names = re.findall(r"`(fulgurite(?:\.\w+)+)`", (ROOT / "docs/glossary.md").read_text())
    assert len(names) > 40
    for name in names:
        pkgutil.resolve_name(name)


def test_ci_runs_what_the_readme_names():
    script = (ROOT / ".ci" / "run").read_text()
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    for target in ("lint", "types", "test"):
        assert f"make_ {target}\n" in script


def test_a_class_name_stands_for_one_class():
    places = {}
    for path in SOURCES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(module_of(path))
    assert {name: modules for name, modules in places.items() if len(modules) > 1} == {}


def test_no_file_is_longer_than_a_subject():
    lines = {path: path.read_text(encoding="utf-8").count("\n") for path in SOURCES}
    assert {str(path): number for path, number in lines.items() if number > 450} == {}
