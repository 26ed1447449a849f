"""Files of the repository that other programs read: workflows, templates, hooks, the image."""

import re

import pytest
import yaml
from fakes.repository import ROOT

pytestmark = pytest.mark.skipif(not (ROOT / ".github").is_dir(), reason="needs the repository")


@pytest.fixture(scope="module")
def targets():
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def read_yaml(name):
    # YAML 1.1 reads the key `on` as true
    return {str(key): value for key, value in yaml.safe_load((ROOT / name).read_text()).items()}


@pytest.mark.parametrize("name", ["ci", "release"])
def test_workflows_run_what_exists(name, targets):
    workflow = read_yaml(f".github/workflows/{name}.yml")
    assert workflow["True"], "when it runs"
    commands = [
        step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step
    ]
    for command in commands:
        assert set(re.findall(r"\bmake ([\w-]+)", command)) <= targets
        for script in re.findall(r"\.ci/\w+", command):
            assert (ROOT / script).is_file()
    assert ".ci/run" in commands
    for job in workflow["jobs"].values():
        needs = job.get("needs", [])
        assert {needs} if isinstance(needs, str) else set(needs) <= workflow["jobs"].keys()


def test_a_release_has_the_version_of_the_package():
    steps = read_yaml(".github/workflows/release.yml")["jobs"]["check"]["steps"]
    pattern = re.search(r"s/(\^version.+?)/\\1/p", "".join(step.get("run", "") for step in steps))[
        1
    ]
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    expression = pattern.replace(r"\(", "(").replace(r"\)", ")")
    versions = [match[1] for line in lines if (match := re.match(expression, line))]
    assert versions == ["0.1.0"] == [read_yaml("CITATION.cff")["version"]]


@pytest.mark.parametrize("name", ["bug", "result", "idea"])
def test_forms_of_issues_are_whole(name):
    form = read_yaml(f".github/ISSUE_TEMPLATE/{name}.yml")
    assert form["name"]
    assert form["description"]
    fields = form["body"]
    assert len({field["id"] for field in fields}) == len(fields)
    for field in fields:
        assert field["type"] in ("textarea", "input")
        assert field["attributes"]["label"]
    assert any(field.get("validations", {}).get("required") for field in fields)


def test_hooks_check_what_the_lint_step_checks():
    hooks = {hook["id"]: hook for hook in read_yaml(".pre-commit-config.yaml")["repos"][0]["hooks"]}
    pin = re.search(r"^ruff==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[0]
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    for hook in hooks.values():
        assert hook.get("additional_dependencies", [pin]) == [pin]
        program = hook["entry"].removesuffix(" --force-exclude").removeprefix("python ")
        assert program in lint
    assert len(hooks) == len(lint.splitlines())


def test_the_image_installs_by_the_makefile_and_runs_the_demo(targets):
    text = (ROOT / "Dockerfile").read_text()
    assert {"venv", "demo"} <= targets
    assert re.search(r"^RUN .*\bmake venv$", text, re.MULTILINE)
    assert text.endswith('CMD ["make", "demo"]\n')
    version = re.search(r"^FROM python:(3\.\d+)-slim$", text, re.MULTILINE)[1]
    assert (
        version
        in read_yaml(".github/workflows/ci.yml")["jobs"]["all"]["strategy"]["matrix"]["python"]
    )
