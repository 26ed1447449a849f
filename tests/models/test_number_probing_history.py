"""Runs against the steps: what `fulgurite probe-history` reads, averages and draws."""

import json

import pytest

from fulgurite.errors import ConfigError, DataError
from fulgurite.models.number_probing.reports.history import find_runs, main, read_run, summary


def write_run(folder, kappa, steps=(0, 100, 200), exact=True):
    """The files of a run, as ModularProbe and the CSV logger write them."""
    folder.mkdir(parents=True)
    lines = ["step,period,verdict,kappa,kappa_contiguous,local_ratio"]
    for step in steps:
        for t in (2, 10):
            progress = step / steps[-1]
            lines.append(f"{step},{t},nothing,{kappa * progress},{kappa / t},{1 + progress}")
    (folder / "probe.csv").write_text("\n".join(lines) + "\n")
    metrics = ["epoch,step,train/loss,val/exact"]
    for step in steps[1:]:
        metrics += [f"0,{step - 1},0.5,", f"0,{step - 1},,{step / steps[-1] if exact else ''}"]
    (folder / "metrics.csv").write_text("\n".join(metrics) + "\n")
    return folder


def write_comparison(folder, cells):
    (folder / "results").mkdir(parents=True)
    for (method, seed), kappa in cells.items():
        name = f"{method}__seed={seed}"
        write_run(folder / "cells" / name, kappa)
        record = {"id": name, "method": method, "setting": {}, "seed": seed}
        (folder / "results" / f"{name}.json").write_text(json.dumps(record))
    return folder


def test_a_run_is_read_with_the_score_at_the_probes_steps(tmp_path):
    run = read_run(write_run(tmp_path / "run", 0.8))
    assert run.series("kappa", 10) == pytest.approx({0: 0.0, 100: 0.4, 200: 0.8})
    assert run.series("kappa", 7) == {}
    assert (run.score_name, run.score) == ("val/exact", {100: 0.5, 200: 1.0})
    assert read_run(write_run(tmp_path / "other", 0.8, exact=False)).score == {}


def test_methods_of_a_comparison_are_averaged_over_their_seeds(tmp_path):
    folder = write_comparison(tmp_path, {("a", 0): 0.2, ("a", 1): 0.4, ("b", 0): -0.5})
    (folder / "cells" / "unfinished").mkdir()  # a killed cell has no record
    runs = {k: [read_run(f) for f in fs] for k, fs in find_runs(folder).items()}
    rows = {row["method"]: row for row in summary(runs, [2, 10])}
    assert rows["a"]["runs"] == 2
    assert rows["a"]["kappa_10"] == "0.30 ± 0.14"
    assert rows["a"]["kappa_contiguous_2"] == "0.15 ± 0.07"
    assert rows["b"]["kappa_2"] == "-0.50"
    assert rows["b"]["steps"] == 200


@pytest.mark.figures
def test_the_command_draws_and_records(tmp_path, capsys):
    folder = write_comparison(tmp_path, {("a", 0): 0.2, ("a", 1): 0.4, ("b", 0): -0.5})
    assert main([str(folder), "--periods", "2,7"]) == 0
    printed = capsys.readouterr().out
    assert "0.30 ± 0.14" in printed
    assert "was not probed at T = [7]" in printed
    assert (folder / "history" / "history.png").stat().st_size > 10_000
    table = (folder / "history" / "history.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in table] == ["method", "a", "b"]
    assert main([str(folder), "--only", "b", "--out", str(tmp_path / "o")]) == 0
    assert len((tmp_path / "o" / "history.csv").read_text().splitlines()) == 2


def test_single_runs_are_named_by_their_folders(tmp_path):
    for name in ("x/1", "x/2"):
        write_run(tmp_path / name, 0.5)
    assert list(find_runs(tmp_path)) == ["x/1", "x/2"]
    assert list(find_runs(tmp_path / "x" / "1")) == ["."]


def test_what_is_no_run(tmp_path):
    with pytest.raises(DataError, match=r"no probe\.csv"):
        main([str(tmp_path)])
    write_run(tmp_path / "run", 0.5)
    with pytest.raises(ConfigError, match="--only names c"):
        main([str(tmp_path), "--only", "c"])
    with pytest.raises(ConfigError, match="--periods two"):
        main([str(tmp_path), "--periods", "two"])
    (tmp_path / "run" / "probe.csv").write_text("step,period,kappa\n1,x,0.5\n")
    with pytest.raises(DataError, match=r"probe\.csv is no table of ModularProbe"):
        main([str(tmp_path)])
    (tmp_path / "run" / "probe.csv").write_text("")
    with pytest.raises(DataError, match=r"probe\.csv cannot be read \(it is empty\)"):
        main([str(tmp_path)])
