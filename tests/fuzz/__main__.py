"""``python -m tests.fuzz --count N --seed S [--format F ...] [--input K]``."""

import argparse
import sys
import time

from .harness import READ, REFUSED, make_input, report, run
from .targets import make_targets


def main():
    """Try damaged files of each format; the status is 1 if any was not read or refused by name."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    add = parser.add_argument
    add("--count", type=int, default=1000, help="inputs of all formats (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the damage (default: %(default)s)")
    add("--first", type=int, default=0, help="number of the first input of a format")
    add("--format", nargs="+", help="these formats only")
    add("--seconds", type=float, help="stop each format after about so long")
    add("--input", type=int, help="read this input of one format here, and show what is raised")
    args = parser.parse_args()
    targets = make_targets()
    if unknown := set(args.format or ()) - set(targets):
        parser.error(f"there is no format {unknown.pop()}; there are {', '.join(targets)}")
    chosen = [target for name, target in targets.items() if name in (args.format or targets)]
    if args.input is not None:
        return _show(chosen[0], args.seed, args.input)
    outcomes = {}
    for target in chosen:
        begun = time.monotonic()
        share = -(-args.count // len(chosen))
        outcomes[target.name] = run(target, args.seed, args.first, args.first + share, args.seconds)
        counts = dict(outcomes[target.name].counts)
        spent = time.monotonic() - begun
        print(f"{target.name}: {spent:.0f} s, {counts}", file=sys.stderr, flush=True)
    total = report(outcomes)
    return int(total.tried > total.counts[READ] + total.counts[REFUSED])


def _show(target, seed, number):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "fuzzed"
        for name, content in make_input(target, seed, number).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
            print(name, len(content), content[:400])
        print(target.read(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
