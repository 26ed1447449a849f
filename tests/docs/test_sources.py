"""Sources in the code lead to sections that the pages of the papers have."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
from fakes.repository import ROOT

FOLDERS = ("platform", "datamodules", "models", "callbacks", "configs", "benchmarks", "tests")

pytestmark = pytest.mark.skipif(
    not (ROOT / "docs" / "papers").is_dir(), reason="needs the repository"
)


@pytest.fixture(scope="module")
def citations():
    spec = importlib.util.spec_from_file_location("citations", ROOT / "docs" / "citations.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def labels():
    pages = (ROOT / "docs" / "papers").glob("*.md")
    return {label for page in pages for label in re.findall(r"\(([\w-]+)\)=", page.read_text())}


@pytest.fixture(scope="module")
def sources():
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    return {
        path: path.read_text(encoding="utf-8")
        for path in files
        if path.suffix in (".py", ".yaml") and path != Path(__file__)
    }


def test_each_cited_section_exists(citations, labels, sources):
    count = 0
    for path, text in sources.items():
        for citation in citations.find_citations(text):
            assert citation.label in labels, f"{path}: {citation}"
            count += 1
    assert count > 300


def test_each_mention_of_a_page_names_a_section(citations, sources):
    for path, text in sources.items():
        if path.is_relative_to(ROOT / "tests"):
            continue
        for page, after in re.findall(r"docs/papers/(\w+)\.md (\w+)", citations.flatten(text)):
            assert after in ("section", "sections", "Stage", "Stages"), f"{path}: {page} {after}"
            assert (ROOT / "docs" / "papers" / f"{page}.md").is_file()


def test_no_source_is_a_card(sources):
    for path, text in sources.items():
        for paragraph in re.findall(r"Source:(.*?)(?:\n\s*\n|\Z)", text, re.DOTALL):
            assert not re.search(r"\bcard section", paragraph), path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("docs/papers/fedsir.md Stage I, steps 3 and 5.", "stage-1 stage-1-step-3 stage-1-step-5"),
        ("docs/papers/fedsir.md Stages I to III.", "stage-1 stage-3"),
        ("docs/papers/fedsir.md section 3a.", "3a"),
        ("docs/papers/fedsir.md section 5, check 10 and more", "5 5-check-10"),
        ("docs/papers/fedsir.md\n    sections 1.2, 2.3\n    and 6", "1-2 2-3 6"),
        ("docs/papers/fedsir.md section 0 (7); rest", "0 0-7"),
    ],
)
def test_citations_are_read(citations, text, expected):
    assert [one.label for one in citations.find_citations(text)] == [
        f"fedsir-{label}" for label in expected.split()
    ]
