"""A comparison whose runs take no time: files, runners, and a folder for them."""

from pathlib import Path

import pytest
import yaml

from fulgurite import compare
from fulgurite.clusters.engines import Engine

PARSE = """
import yaml

from fulgurite.systems import resolve_config


def parse(argv):
    options = dict(word[2:].split("=", 1) for word in argv[1:] if "=" in word)
    files = [argv[i + 1] for i, word in enumerate(argv) if word == "--config"]
    files = [yaml.safe_load(resolve_config(file).read_text()) for file in files]
    return {"data": options.pop("data", None), "files": files, "options": options}
"""

RUNNER = """
import json, os, pathlib, sys, time


def main(argv):
    command, options = argv[0], {}
    words = argv[1:]
    while words:
        word = words.pop(0)
        key, eq, value = word[2:].partition("=")
        options.setdefault(key, value if eq else words.pop(0))
    run = pathlib.Path(options["run.dir"])
    with open(os.environ["RUNS"], "a") as file:
        print(command, run.name, os.environ.get("CUDA_VISIBLE_DEVICES"), os.getpid(), file=file)
    print("hello from", command)
    os.system("echo hello from a child")
    seed, method, p = int(options["seed_everything"]), options["method"], float(options["p"])
    if command == "test":
        assert options["ckpt_path"] == "last"
        metrics = {"test/acc": VALUES[method] - p + SCALE[method] * SEED[seed]}
        (run / "test_metrics.json").write_text(json.dumps(metrics))
        return 0
    run.mkdir(parents=True)
    time.sleep(float(options.get("sleep", 0)))
    trouble = options.get("trouble") if os.environ.get("TROUBLE") != "off" else None
    if trouble == "raise":
        raise ValueError("the loss is a potato")
    if trouble == "exit":
        sys.exit(2)
    if trouble == "status":
        print("fulgurite: error: The moon is made of cheese.", file=sys.stderr)
        return 3
    if trouble == "kill":
        os.kill(os.getpid(), 9)
    if trouble == "nothing":
        (run / "summary.json").write_text("{}")
        return 0
    (run / "summary.json").write_text(json.dumps({"train/loss": 0.5, "test/acc": -1.0}))
    return 0


VALUES = {"a": 0.9, "b": 0.95, "c": 0.5}
SEED = {0: 0.01, 1: -0.02, 2: 0.03}
SCALE = {"a": 1.0, "b": 1.2, "c": 0.9}
"""

FILE = {
    "title": "A title",
    "config": "base.yaml",
    "methods": {
        "a": {"label": "Method A", "args": {"method": "a"}},
        "b": {"label": "Method B", "args": {"method": "b"}},
        "c": {"args": {"method": "c"}},
    },
    "settings": {"p": {"key": "p", "values": [0.25, 0.5]}},
    "seeds": [0, 1, 2],
    "seed_keys": ["seed_everything"],
    "baseline": "a",
    "quick": {"seeds": [0], "methods": ["a", "b"], "settings": {"p": [0.5]}},
}


def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with runner modules and a configuration, in which the test then is."""
    (tmp_path / "fake_runner.py").write_text(PARSE + RUNNER)
    (tmp_path / "shared_runner.py").write_text(PARSE + SHARED_RUNNER)
    (tmp_path / "base.yaml").write_text("model: some\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("RUNS", str(tmp_path / "runs.txt"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(place: Path, **changes) -> str:
    path = place / "compare.yaml"
    path.write_text(yaml.safe_dump({**FILE, **changes}, sort_keys=False))
    return str(path)


def go(file: str, *, workers: int = 2, **options) -> compare.Comparison:
    """Run a comparison by the fake runner in ``out``."""
    engine = Engine(workers=workers)
    return compare.run(
        file, **{"engine": engine, "out": "out", "runner": "fake_runner:main", **options}
    )


def runs(place: Path) -> list[list[str]]:
    return [line.split() for line in (place / "runs.txt").read_text().splitlines()]


SHARED_RUNNER = """
import json, os, pathlib


def main(argv):
    command, *options = argv
    given, words = {}, list(options)
    while words:
        word = words.pop(0)
        key, eq, value = word[2:].partition("=")
        given[key] = value if eq else words.pop(0)
    with open(os.environ["RUNS"], "a") as file:
        print(command, given["method"], given["lr"], given["seed_everything"], file=file)
    run = pathlib.Path(given["run.dir"])
    run.mkdir(parents=True, exist_ok=command == "predict")
    if command == "predict":
        weights = pathlib.Path(given["ckpt_path"]).read_text()
        (run / "predict").mkdir()
        (run / "predict" / "filled").write_text(f"filled({weights},{given['part']})")
        return 0
    if command == "fit":
        if given.get("trouble") == given["lr"] and os.environ.get("TROUBLE") != "off":
            raise ValueError("the loss is a potato")
        before = pathlib.Path(given["start"]).read_text() + ">" if "start" in given else ""
        (run / "checkpoints").mkdir()
        (run / "checkpoints" / "last.ckpt").write_text(before + given["method"] + given["lr"])
        return 0
    # seed 0 likes the small rate, others the large one; "adapts" turns that round
    weights = pathlib.Path(given["ckpt_path"]).read_text()
    likes = ("0.1" if int(given["seed_everything"]) else "0.01", "nan")
    good = weights.endswith(likes) != (given.get("adapts") == "true")
    found = {"val/acc": 0.8 if good else 0.3}
    if "diverges" in given:
        found = {"val/acc": float("nan")}
    if command == "test":
        found = {"test/acc": float(len(weights)), "test/shift": float(given["shift"])}
    (run / f"{command}_metrics.json").write_text(json.dumps(found))
    return 0
"""

SHARED = {
    "config": "base.yaml",
    "methods": {
        "erm": {"args": {"method": "erm"}},
        "adapted": {"args": {"method": "erm"}, "test_args": {"adapts": True}},
        "on_top": {"args": {"method": "top"}, "after": {"erm": "start"}},
    },
    "tests": {"shift": {"key": "shift", "values": [0, 1, 2]}},
    "tune": {"metric": "val/acc", "grid": {"lr": {"key": "lr", "values": [0.01, 0.1]}}},
    "also": ["test/shift"],
    "sizes": ["shift", "images"],
    "names": {"images": "images scored"},
    "settings": None,
    "baseline": "erm",
    "seeds": [0, 1],
    "quick": None,
}
