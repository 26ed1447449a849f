"""Links between the pages of the repository lead somewhere."""

import pytest
from fakes.pages import PAGES, anchors, links
from fakes.repository import ROOT

MORE = [ROOT / "CONTRIBUTING.md", ROOT / "results" / "README.md"]
MORE += sorted((ROOT / "docs" / "tutorials").glob("*.md"))
MORE += sorted((ROOT / ".github").rglob("*.md"))

pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="needs the repository")


@pytest.mark.parametrize("page", [*PAGES, *MORE], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings_that_exist(page):
    for target in links(page):
        if target in anchors(page):  # a label of MyST
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), target
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path), target
