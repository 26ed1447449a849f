"""Names of parameters and variables that say nothing of their content, counted in the lint step.

``python .ci/words.py [--list] [FOLDER ...]`` counts the names that functions assign or take and
that are one of :data:`DEAD`. It fails above :data:`LIMIT`, and on any use of :data:`FORBIDDEN`.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

SOURCES = ("platform", "datamodules", "models", "callbacks")
DEAD = frozenset(
    {
        "asked", "both", "chosen", "each", "found", "given", "held", "kept", "known", "least",
        "left", "made", "most", "own", "place", "rest", "said", "seen", "share", "shown", "spread",
        "wanted", "what", "where", "whole",
    }
)  # fmt: skip
FORBIDDEN = frozenset({"mend", "mends", "mended"})
LIMIT = 0.003  # of all names


def find_names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield each name that is assigned or is a parameter, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno


def main() -> int:
    """Count, print, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", default=SOURCES)
    parser.add_argument("--list", action="store_true", help="print every dead name")
    options = parser.parse_args()
    total = 0
    dead: Counter[str] = Counter()
    forbidden = []
    for folder in options.folders:
        root = Path(folder)
        for path in sorted(root.rglob("*.py")) if root.is_dir() else [root]:
            for name, line in find_names(ast.parse(path.read_text(encoding="utf-8"))):
                total += 1
                word = name.strip("_")
                if word in FORBIDDEN:
                    forbidden.append(f"{path}:{line}: {name}")
                if word in DEAD:
                    dead[word] += 1
                    if options.list:
                        print(f"{path}:{line}: {name}")
    count = sum(dead.values())
    share = count / max(1, total)
    common = ", ".join(f"{word} {number}" for word, number in dead.most_common(8))
    print(f"{count} of {total} names say nothing of their content ({100 * share:.2f} %): {common}")
    for line in forbidden:
        print(f"{line} is forbidden")
    return int(share > LIMIT or bool(forbidden))


if __name__ == "__main__":
    sys.exit(main())
