"""The page and the README of each system: one template, and no number without its source."""

import itertools
import re

import pytest
from fakes.repository import ROOT

from fulgurite.systems import systems

SECTIONS = [
    "Paper",
    "What is implemented",
    "Method",
    "Data",
    "Hyperparameters",
    "How to run",
    "Results",
    "Ablations",
    "Limits",
]
RECORDED = re.compile(r"<!-- table: (\S+) -->\n.*?<!-- end of table -->", re.DOTALL)
NO_RECORD = re.compile(r"^\*Measured at commit `[0-9a-f]{7}`; records not kept\.\*$")

pytestmark = pytest.mark.skipif(
    not (ROOT / "docs" / "systems").is_dir(), reason="needs the repository"
)


@pytest.fixture(params=sorted(systems()))
def system(request):
    return request.param


def page_of(system):
    return (ROOT / "docs" / "systems" / f"{system}.md").read_text(encoding="utf-8")


def tables_without_record(text):
    """Tables with measured numbers that no record renders, each with the paragraph before it."""
    paragraphs = RECORDED.sub("", text).split("\n\n")
    return [
        (before, paragraph)
        for before, paragraph in itertools.pairwise(paragraphs)
        if paragraph.startswith("|") and re.search(r"\d\.\d", paragraph)
    ]


def test_each_page_has_the_sections_of_the_template(system):
    text = page_of(system)
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == SECTIONS
    assert "### What is not" in text
    method = text.partition("\n## Method\n")[2].partition("\n## ")[0]
    assert "$$" in method
    assert "of shape" in method


def test_each_table_of_results_has_a_record_or_says_that_none_was_kept(system):
    results = page_of(system).partition("\n## Results\n")[2].partition("\n## Limits\n")[0]
    for before, table in tables_without_record(results):
        assert NO_RECORD.match(before), f"{before}\n\n{table}"
