"""The measurements for a GPU, in the form that runs without one."""

import json
import subprocess
import sys

import pytest
from benchmarks import gpu


def test_what_finds_no_time_is_named(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path), "--seconds", "0", "--parts", "kernels"]) == 1
    assert "kernels: no time left" in capsys.readouterr().out
    assert "The part ended early: no time left." in (tmp_path / "gpu.md").read_text()


def test_each_answer_is_on_the_disk_before_the_next(tmp_path, monkeypatch):
    def questions():
        yield {"answer": 1.23456}
        assert json.loads((tmp_path / "rows").read_text())["answer"] == 1.23456
        yield {"answer": "a|b"}
        raise RuntimeError("an illegal memory access")

    monkeypatch.setitem(gpu.PARTS, "kernels", gpu.Part(questions, 5, "Kernels"))
    with pytest.raises(RuntimeError, match="illegal"):
        gpu.ask("kernels", tmp_path / "rows")
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert "| answer |\n| --- |\n| 1.23 |\n| a/b |" in gpu.page(rows)


@pytest.mark.slow
def test_all_parts_run_without_a_gpu(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path), "--seconds", "900"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert [row["part"] for row in rows if "ended" in row] == list(gpu.PARTS)
    assert all(row["ended"] == "ok" for row in rows if "ended" in row)
    assert all(row["right"] for row in rows if "right" in row)
    smoke = [row for row in rows if row["part"] == "smoke" and "system" in row]
    assert all(row["status"] == [0, 0] and row["equal twice"] for row in smoke)
    training = [row for row in rows if row["part"] == "training" and "way" in row]
    assert [row["status"] for row in training] == [0, 0]
