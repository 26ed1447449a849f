"""Reports as one HTML file, which opens without a network."""

import errno
import html
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from fulgurite.compare.comparison import Comparison
from fulgurite.compare.report import report_main, run_summary
from fulgurite.errors import ConfigError
from fulgurite.html_report import write_report
from fulgurite.html_report.charts import Interval, interval_chart, line_chart
from fulgurite.html_report.run_page import RunRecords

VOID = {"meta", "link", "img"}
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
    "1f15c4890000000d49444154789c626001000000ffff03000006000557bfabd40000000049454e44ae426082"
)


class Page(HTMLParser):
    """Checks that elements are closed in order, and collects tables and addresses."""

    def __init__(self, text):
        super().__init__()
        self.open, self.addresses, self.rows, self.ids, self.text = [], [], [], set(), ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.addresses += [values[key] for key in ("src", "href") if values.get(key)]
        self.ids.add(values.get("id"))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.rows and self.rows[-1] and ("td" in self.open or "th" in self.open):
            self.rows[-1][-1] += data


def read(path):
    return Page(Path(path).read_text(encoding="utf-8"))


def write_run(folder, *, lr=0.1, accuracies=(0.5, 0.7, 0.9), name="digits"):
    (folder / "figures").mkdir(parents=True)
    config = {"model": {"init_args": {"lr": lr}}, "run": {"system": "fedsir", "name": name}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    facts = {"seed": 3, "time": "2026-01-01", "versions": {"fulgurite": "0.1.0", "torch": "2.13"}}
    (folder / "environment.json").write_text(json.dumps(facts))
    lines = ["epoch,step,train/loss,val/loss,val/acc"]
    for epoch, accuracy in enumerate(accuracies):
        lines.append(f"{epoch},{10 * epoch},{1 - accuracy},,")
        lines.append(f"{epoch},{10 * epoch},,{1.1 - accuracy},{accuracy}")
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    summary = {"val/acc": accuracies[-1], "val/loss": 1.1 - accuracies[-1]}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "figures" / "clients.png").write_bytes(PNG)
    return folder


@pytest.fixture
def comparison(tmp_path):
    """The folder of a comparison of two methods, with one failure."""
    from fulgurite.compare import read_plan

    (tmp_path / "base.yaml").write_text("seed_everything: 0\n")
    file = tmp_path / "plan.yaml"
    content = {
        "title": "A <b>title</b> & more",
        "config": "base.yaml",
        "metric": "test/acc",
        "mode": "max",
        "baseline": "a",
        "costs": ["cost/rounds"],
        "names": {"p": "rate of wrong labels"},
        "methods": {"a": {"label": "Method A"}, "b": {"label": "<script>alert(1)</script>"}},
        "settings": {"p": {"key": "p", "values": [0.25, 0.5]}},
        "seeds": [0, 1, 2],
        "seed_keys": ["seed_everything"],
    }
    file.write_text(yaml.safe_dump(content))
    folder = tmp_path / "out"
    plan = read_plan(str(file))
    Comparison(plan, folder, {}, {}).save_plan()
    for kind in ("results", "failed"):
        (folder / kind).mkdir()
    for method, level in (("a", 0.5), ("b", 0.8)):
        for p in ("0.25", "0.5"):
            for seed in range(3):
                name = f"{method}__p={p}__seed={seed}"
                record = {"id": name, "method": method, "setting": {"p": p}, "seed": seed}
                record |= {
                    "digest": "0",
                    "version": "0.1.0",
                    "finished": "2026-01-01T00:00:00+0000",
                    "seconds": 2.0,
                }
                if (method, p, seed) == ("b", "0.5", 2):
                    failed = record | {"error": "the loss is a potato", "metrics": {}}
                    (folder / "failed" / f"{name}.json").write_text(json.dumps(failed))
                    continue
                value = level + (0.01, -0.02, 0.02)[seed] * (1 if method == "a" else 1.5)
                record["metrics"] = {"test/acc": value, "cost/rounds": 20.0 + seed}
                (folder / "results" / f"{name}.json").write_text(json.dumps(record))
    return folder


def test_a_run_is_shown_whole(tmp_path):
    folder = write_run(tmp_path / "run")
    path = write_report([folder])
    assert path == folder / "report.html"
    page = read(path)
    assert ["val/acc", "0.9"] in page.rows
    assert ["versions.torch", "2.13"] in page.rows
    assert "lr: 0.1" in page.text
    text = path.read_text()
    assert text.count("<polyline") == 3  # train and validation loss, accuracy
    assert "data:image/png;base64," in text


def test_a_run_of_few_epochs_is_drawn_against_its_steps(tmp_path):
    folder = write_run(tmp_path / "run")
    lines = ["epoch,step,train/loss", *(f"0,{10 * k},{1 / (k + 1)}" for k in range(5))]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    text = write_report([folder]).read_text()
    assert 'aria-label="loss against step"' in text
    assert "against epoch" not in text


def test_runs_of_few_and_of_many_epochs_are_drawn_against_one_axis(tmp_path):
    folders = [write_run(tmp_path / "many"), write_run(tmp_path / "few")]
    lines = ["epoch,step,train/loss", *(f"0,{10 * k},{1 / (k + 1)}" for k in range(5))]
    (folders[1] / "metrics.csv").write_text("\n".join(lines) + "\n")
    text = write_report(folders).read_text()
    assert 'aria-label="train/loss against step"' in text
    assert "against epoch" not in text


def test_a_report_that_cannot_be_written_is_shown_and_names_its_own_option(
    comparison, monkeypatch, capsys
):
    def refuse(path, content):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr("fulgurite.compare.report.write_text", refuse)
    monkeypatch.setattr("fulgurite.html_report.page.write_text", refuse)
    with pytest.raises(ConfigError, match="Read-only file system") as error:
        report_main([str(comparison)])
    assert "--out" not in str(error.value)
    assert "| Method A |" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="--html=FILE"):
        report_main([str(comparison), "--html"])


def test_a_metric_that_is_no_number_differs_from_none(tmp_path):
    folders = [write_run(tmp_path / name) for name in ("one", "two")]
    for folder, metrics in zip(folders, ('{"val/loss": NaN}', '{"val/acc": 0.5}'), strict=True):
        (folder / "summary.json").write_text(metrics)
    page = read(write_report(folders))
    assert ["val/loss", "nan", ""] in page.rows
    assert ["val/acc", "", "0.5"] in page.rows


def test_nothing_is_loaded_from_elsewhere(tmp_path, comparison):
    for folders in ([write_run(tmp_path / "run")], [comparison]):
        page = read(write_report(folders, tmp_path / "x.html"))
        links = [a for a in page.addresses if not a.startswith("data:")]
        assert all(link.startswith("#") and link[1:] in page.ids for link in links)
        text = (tmp_path / "x.html").read_text()
        assert not re.search(r"(@import|url\(|fetch\(|XMLHttpRequest|<link[^>]+stylesheet)", text)


def test_runs_beside_each_other_show_what_differs(tmp_path):
    folders = [
        write_run(tmp_path / "one"),
        write_run(tmp_path / "two", lr=0.2, accuracies=(0.4, 0.6, 0.8)),
    ]
    page = read(write_report(folders, tmp_path / "both.html"))
    assert ["metric", "one", "two"] in page.rows
    assert ["val/acc", "0.9", "0.8"] in page.rows
    differing = [row for row in page.rows if row[0].startswith(("model.", "run."))]
    assert differing == [["model.init_args.lr", "0.1", "0.2"]]
    assert not (tmp_path / "one" / "report.html").exists()


def test_a_comparison_has_tables_with_what_is_tested(comparison):
    page = read(write_report([comparison]))
    (first,) = [row for row in page.rows if row[:1] == ["Method A"] and "±" in row[1]]
    assert first == ["Method A", "0.5033 ± 0.0208", "0.5033 ± 0.0208"]
    script = [row for row in page.rows if row and row[0] == "<script>alert(1)</script>"]
    assert any("▲" in cell for row in script for cell in row)
    assert [cell.rpartition(" ")[2] for row in script[:2] for cell in row[2:]] == ["(n=2)"] * 2
    assert ["b__p=0.5__seed=2", "the loss is a potato"] in page.rows
    assert "11 of 12 finished" in page.text
    assert "p: rate of wrong labels." in page.text
    # what users call a method is text, never markup
    assert (comparison / "report.html").read_text().count("<script>") == 1


def test_intervals_hold_the_mean_at_95_percent(comparison):
    from fulgurite.html_report.comparison_page import estimate_interval

    entries = Comparison.read(comparison).entries()
    entry = entries["a", (("p", "0.25"),)]
    low, high = estimate_interval(entry)
    half = 4.302652729911275 * entry.mean_std.std / math.sqrt(3)
    assert (low, high) == pytest.approx((entry.mean_std.mean - half, entry.mean_std.mean + half))


def test_a_report_takes_the_place_of_no_other_file(tmp_path):
    run = write_run(tmp_path / "a")
    before = (run / "config.yaml").read_bytes()
    with pytest.raises(ConfigError, match=r"config\.yaml does not end in \.html"):
        report_main([str(run), f"--html={run / 'config.yaml'}"])
    assert (run / "config.yaml").read_bytes() == before


def test_a_row_that_was_being_written_is_no_row(tmp_path):
    run = write_run(tmp_path / "a")
    file = run / "metrics.csv"
    file.write_text("epoch,step,train/loss\n0,1,0.75\n1,2,0.2")  # 0.25, if all had been written
    (run / "summary.json").unlink(missing_ok=True)
    assert "| train/loss | 0.75 |" in run_summary(run)
    assert RunRecords(run, "a").curves("step") == {"train/loss": [(1.0, 0.75)]}


def test_what_holds_no_report_is_refused(tmp_path, comparison):
    run = write_run(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"holds no run \(config.yaml is not there\)"):
        write_report([tmp_path])
    with pytest.raises(ConfigError, match="reported alone"):
        write_report([run, comparison])
    with pytest.raises(ConfigError, match="named twice"):
        write_report([run, run])
    (run / "metrics.csv").write_text("epoch,step,val/acc\n0,0,much\n1,1,more\n")
    with pytest.raises(ConfigError, match=r"metrics\.csv holds no table"):
        write_report([run])
    (run / "environment.json").write_text("{")
    with pytest.raises(ConfigError, match=r"environment\.json is damaged"):
        write_report([run])
    assert not (run / "report.html").exists()


def test_the_command_line(tmp_path, comparison, capsys):
    run = write_run(tmp_path / "run")
    assert report_main([str(run), "--html"]) == 0
    assert capsys.readouterr().out == f"Report: {run / 'report.html'}\n"
    assert report_main([str(comparison), "--html", str(tmp_path / "new" / "a.html")]) == 0
    assert (tmp_path / "new" / "a.html").is_file()
    assert report_main([str(run)]) == 0
    assert "fedsir/digits" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"--html names .*run, a folder.*behind the folders"):
        report_main(["--html", str(run), str(run)])


def test_charts_of_nothing_and_of_odd_values():
    assert line_chart({"a": []}, "epoch", "loss") == ""
    assert line_chart({"a": [(0, math.nan)]}, "epoch", "loss") == ""
    text = line_chart({"<a>": [(0, 1.0), (1, math.inf), (2, 3.0)]}, "epoch", "a & b")
    assert "&lt;a&gt;" in text
    assert "inf" not in text
    assert "nan" not in text
    assert interval_chart([], "x") == ""
    text = interval_chart(
        [Interval("a", math.nan, math.nan, math.nan), Interval("b", 1, 0, 2)], "x"
    )
    assert text.count("<circle") == 1


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def browse(path, *options, width=1280):
    browser = next((b for b in map(shutil.which, BROWSERS) if b), None)
    if browser is None:
        pytest.skip("no Chromium is installed")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--window-size={width},2000", f"--user-data-dir={path.parent / 'profile'}"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=2000", *options, path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    return done.stdout


PROBE = """<script>
document.querySelectorAll("th button")[1].click();
document.querySelectorAll("th button")[1].click();
document.getElementById("theme").click();
document.title = JSON.stringify({
  rows: [...document.querySelector("tbody").rows].map((row) => row.cells[0].textContent),
  theme: document.documentElement.dataset.theme,
  wider: document.documentElement.scrollWidth - window.innerWidth,
});
</script></body>"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_a_page_is_as_wide_as_its_window(comparison, tmp_path, width):
    """In a frame, since no window of Chromium is narrower than 500 pixels."""
    for folder in (comparison, write_run(tmp_path / "run")):
        page = html.escape(write_report([folder]).read_text(), quote=True)
        measure = (
            "const page = document.querySelector('iframe').contentDocument.documentElement;"
            "document.title = [page.ownerDocument.defaultView.innerWidth, page.scrollWidth]"
        )
        framed = tmp_path / "framed.html"
        framed.write_text(
            f'<title></title><iframe style="border: 0; width: {width}px; height: 900px"'
            f' srcdoc="{page}"></iframe><script>onload = () => {{ {measure} }}</script>'
        )
        title = re.match("<html><head><title>(.*?)</title>", browse(framed, "--dump-dom"))[1]
        window, content = map(int, title.split(","))
        assert window == width
        assert content <= width


@pytest.mark.slow
@pytest.mark.parametrize("width", [500, 1280])  # Chromium's least width is 500
def test_a_browser_sorts_and_darkens_without_an_error(comparison, tmp_path, width):
    path = write_report([comparison])
    probed = tmp_path / "probed.html"
    probed.write_text(path.read_text().replace("</body>", PROBE))
    dom = browse(probed, "--dump-dom", width=width)
    facts = json.loads(
        re.search(r"<title>(.*?)</title>", dom)[1].replace("&lt;", "<").replace("&gt;", ">")
    )
    assert facts["rows"] == ["<script>alert(1)</script>", "Method A"]  # descending
    assert facts["theme"] == "dark"
    assert facts["wider"] <= 0  # tables scroll, the page does not
