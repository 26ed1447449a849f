"""A comparison on a Ray cluster of this machine, one of whose nodes is lost."""

import json
import threading
import time
from collections import Counter
from functools import partial

import pytest
from fakes.clusters import two_nodes
from fakes.comparison import FILE, go, runs, write

from fulgurite import compare
from fulgurite.clusters.engines import Engine
from fulgurite.clusters.ray_tasks import NodeFault, Surroundings, run_on_node
from fulgurite.compare.command import main
from fulgurite.compare.plan_file import read_plan
from fulgurite.compare.ray_cluster import execute_anew
from fulgurite.compare.resources import Resources
from fulgurite.compare.worker import Job
from fulgurite.errors import ConfigError, MissingExtraError


@pytest.fixture
def cluster(place, monkeypatch):
    with two_nodes(monkeypatch) as cluster:
        yield cluster


@pytest.mark.slow
def test_a_lost_node_costs_nothing_and_the_table_is_that_of_the_pool(place, cluster, capsys):
    trouble = {"label": "bad", "args": {"method": "c", "trouble": "raise"}}
    methods = {**{m: FILE["methods"][m] for m in "ab"}, "c": trouble}
    file = write(place, methods=methods, args={"sleep": 1.5}, seeds=[0, 1])
    victim = cluster.nodes[0]

    def kill() -> None:
        while not (place / "runs.txt").exists() or len(runs(place)) < 3:  # some run by now
            time.sleep(0.05)
        cluster.remove_node(victim, allow_graceful=False)

    killer = threading.Thread(target=kill)
    killer.start()
    engine = Engine("ray", address=cluster.address)
    comparison = compare.run(file, engine=engine, out="ray", runner="fake_runner:main")
    killer.join()
    assert len(comparison.results) == 8
    assert len(comparison.failures) == 4  # a cell that fails is one that fails, once
    assert not (place / "ray" / ".ray-token").exists()
    fits = Counter(name for word, name, *_ in runs(place) if word == "fit")
    assert sum(fits.values()) in (12, 13)  # and at most what the node was at, a second time
    go(file, out="pool")
    for name in ("table.md", "summary.csv"):
        assert (place / "ray" / name).read_bytes() == (place / "pool" / name).read_bytes()
    before = len(runs(place))
    options = [file, "--engine=ray", f"--address={cluster.address}", "--out=ray"]
    assert main([*options, "--runner=fake_runner:main"]) == 1  # nothing is run again
    assert len(runs(place)) == before
    with pytest.raises(ConfigError, match="No node of the Ray cluster has 9 CPUs and 0 GPUs"):
        compare.run(
            write(place, resources={"cpus": 9}, seeds=[5]),
            engine=engine,
            out="ray",
            runner="fake_runner:main",
        )


def test_engines_and_their_options_are_refused_by_name(place, monkeypatch):
    file = write(place)
    with pytest.raises(ConfigError, match=r"--engine is 'rai'\. Did you mean 'ray'"):
        main([file, "--engine=rai"])
    with pytest.raises(ConfigError, match=r"No Ray cluster answers at 127\.0\.0\.1:1 "):
        go(file, engine=Engine("ray", address="127.0.0.1:1"))
    with pytest.raises(ConfigError, match="--address is 'auto', and --engine is 'pool'"):
        main([file, "--address=auto"])
    with pytest.raises(ConfigError, match="--workers is 0"):
        Engine(workers=0)
    with pytest.raises(ConfigError, match="--engine says how cells are run"):
        main([file, "--engine=ray", "--merge", "part"])
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"fulgurite\[ray\]"):
        main([file, "--engine=ray", "--out=out", "--runner=fake_runner:main"])


@pytest.mark.parametrize(
    ("resources", "says"),
    [
        ({"cpus": 0}, r"resources\.cpus is 0"),
        ({"cpus": True}, r"resources\.cpus is True"),
        ({"gpus": -1}, r"resources\.gpus is -1"),
        ({"gpus": 0.5}, r"resources\.gpus is 0\.5"),
        ({"gpu": 1}, "resources has the unknown key 'gpu'.*Did you mean 'gpus'"),
        ([1], "resources is not a mapping"),
    ],
)
def test_resources_are_refused_by_name(place, resources, says):
    with pytest.raises(ConfigError, match=says):
        read_plan(write(place, resources=resources))


def test_resources_are_kept_in_the_folder_and_change_no_cell(place):
    plan = read_plan(write(place, resources={"cpus": 2, "gpus": 1}))
    assert plan.resources == Resources(cpus=2, gpus=1)
    go(write(place, seeds=[0]), only=["a", "p=0.5"])
    before = len(runs(place))
    go(write(place, seeds=[0], resources={"cpus": 2}), only=["a", "p=0.5"])
    assert len(runs(place)) == before
    assert read_plan(place / "out" / "comparison.yaml").resources == Resources(cpus=2)


def surroundings_of(place, token="mine", folder=""):
    token_file = place / ".ray-token"
    return Surroundings(token_file, token, str(place / folder), {}, "the comparison's folder")


def test_a_node_without_the_folder_says_so(place):
    job = Job("a", [["fit"]], place / "run", log=place / "log", metric=None)
    run = partial(execute_anew, runner="fake_runner:main")
    (place / ".ray-token").write_text("another")
    fault = run_on_node(run, job, surroundings_of(place))
    assert isinstance(fault, NodeFault)
    assert "does not see the comparison's folder" in fault.reason
    assert not (place / "log").exists()
    (place / ".ray-token").write_text("mine")
    fault = run_on_node(run, job, surroundings_of(place, folder="no"))
    assert isinstance(fault, NodeFault)
    assert "has no folder" in fault.reason


def test_what_a_lost_attempt_left_is_not_gone_on_with(place):
    (place / "run").mkdir()
    (place / "run" / "half").write_text("of a file")
    (place / ".ray-token").write_text("mine")
    options = ["--method=a", "--p=0.5", "--seed_everything=0", f"--run.dir={place / 'run'}"]
    job = Job("a", [["fit", *options]], place / "run", log=place / "log", metric=None)
    run = partial(execute_anew, runner="fake_runner:main")
    result = run_on_node(run, job, surroundings_of(place))
    assert result.error == ""
    assert json.loads((place / "run" / "summary.json").read_text()) == result.metrics
    assert not (place / "run" / "half").exists()
