"""Scripts that run in forks of this process, which has imported everything already."""

import sys

from fulgurite.testing.survival import Forked, start_call


def start_script(code: str, *arguments: object, folder) -> Forked:
    """Run a script in a fork, as ``python -c`` would in seconds.

    Args:
        code: The script.
        arguments: What it finds in ``sys.argv`` after its name.
        folder: Where its output is kept until its end.
    """

    def work() -> None:
        sys.argv = ["script", *map(str, arguments)]
        exec(compile(code, "script", "exec"), {"__name__": "__main__"})

    return start_call(work, folder)
