"""What editors and shells complete: the schema of configurations, and words of command lines."""

import json
import shutil
import subprocess

import pytest
import yaml
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from fulgurite.__main__ import main
from fulgurite.completion import candidates, options
from fulgurite.completion.scripts import SCRIPTS
from fulgurite.schema import describe_run
from fulgurite.schema.annotations import SchemaBuilder
from fulgurite.systems import config_path, list_configs, systems

RUNS = list_configs("run")


@pytest.fixture(scope="module")
def schema():
    described = json.loads(json.dumps(describe_run()))
    Draft202012Validator.check_schema(described)
    return described


@pytest.fixture
def complete(schema, monkeypatch):
    commands = {
        "compare": {"--dry-run": [], "--quick": []},
        "export": {"--out": [], "--to": ["onnx", "safetensors", "torch-export"]},
    }
    monkeypatch.setattr(
        candidates, "read_options", lambda _: {"schema": schema, "commands": commands}
    )
    return lambda words: candidates.list_candidates(f"fulgurite {words}", main)


def read(name):
    return yaml.safe_load(config_path(name).read_text())


def test_every_packaged_configuration_fits_the_schema(schema):
    validator = Draft202012Validator(schema)
    for name in RUNS:
        error = best_match(validator.iter_errors(read(name)))
        assert error is None, f"{name}: {error.json_path}: {error.message}"
    assert len(RUNS) > 30


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("trainer.max_epoch", 3, "'max_epoch' was unexpected"),
        ("trainer.max_epochs", "three", "'three' is not valid"),
        ("model.init_args.nettwork", 3, "'nettwork' was unexpected"),
        ("data.init_args.clients", 0, "minimum of 0"),
        ("data.init_args.images.augment", "flop", "is not one of ['none', 'shift', 'crop_flip']"),
        ("modle", {}, "'modle' was unexpected"),
    ],
)
def test_what_the_parser_refuses_is_underlined(schema, path, value, message):
    content = read("fedsir/digits.yaml")
    *parents, name = path.split(".")
    inner = content
    for parent in parents:
        inner = inner[parent]
    inner[name] = value
    error = best_match(Draft202012Validator(schema).iter_errors(content))
    assert message in error.message
    assert [*error.absolute_path] in (parents, [*parents, name])


def test_classes_of_users_take_any_arguments(schema):
    content = {"model": {"class_path": "mine.Model", "init_args": {"width": 8}}}
    assert Draft202012Validator(schema).is_valid(content)


def test_options_of_each_command_are_there(schema):
    options_of_commands = {"ckpt_path", "weights_only", "verbose", "return_predictions", "input"}
    shared = {"seed_everything", "run", "trainer", "model", "data"}
    assert schema["properties"].keys() == shared | options_of_commands


def test_options_say_what_they_are_for(schema):
    options_of = schema["$defs"]["fulgurite.datamodules.fedsir.FederatedDataModule"]
    clients = options_of["properties"]["clients"]
    assert clients["exclusiveMinimum"] == 0
    assert clients["default"] == 10
    assert "clients" in clients["description"].lower()
    assert schema["$defs"]["lightning.pytorch.Trainer"]["properties"]["devices"]["default"] == 1


@pytest.mark.parametrize(
    ("annotation", "fitting", "unfitting"),
    [
        (list[int], [[], [1, 2]], [["a"], 3]),
        (tuple[int, float], [[1, 2.5]], [[1], [1, 2, 3], ["a", 2]]),
        (dict[str, bool], [{"a": True}], [{"a": 1}, []]),
        (int | None, [1, None], [1.5, "1"]),
    ],
)
def test_annotations(annotation, fitting, unfitting):
    validator = Draft202012Validator(SchemaBuilder().describe(annotation))
    assert all(validator.is_valid(value) for value in fitting)
    assert not any(validator.is_valid(value) for value in unfitting)


def test_the_schema_is_written_whole(schema, tmp_path, capsys):
    path = tmp_path / "editor" / "fulgurite.schema.json"
    assert main(["schema", "--out", str(path)]) == 0
    assert main(["schema", "--out", str(path.with_suffix(".yaml"))]) == 2
    assert str(path) in capsys.readouterr().out
    assert json.loads(path.read_text()) == schema


# --- completion ----------------------------------------------------------------------------------

DIGITS = "fit --config fedsir/digits.yaml"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("comp", ["compare", "completion"]),
        ("compare --q", ["--quick"]),
        ("compare fedsir/compare_d", ["fedsir/compare_demo.yaml"]),
        ("sweep fedsir/", ["fedsir/sweep.yaml"]),
        ("federate ", ["app"]),
        ("completion ", ["bash", "fish", "zsh"]),
        ("export runs/a --to s", ["safetensors"]),
        ("fit --config fedsir/sm", ["fedsir/smoke.yaml"]),
        ("fit --config=fedsir/sm", ["--config=fedsir/smoke.yaml"]),
        ("test --ckpt_path ", ["best", "last"]),
        ("test --ckpt_path=b", ["--ckpt_path=best"]),
        ("fit --trainer.max_e", ["--trainer.max_epochs="]),
        ("fit --trainer.detect_anomaly=t", ["--trainer.detect_anomaly=true"]),
        (f"{DIGITS} --data.init_args.im", ["--data.init_args.images.", "--data.init_args.images="]),
        (f"{DIGITS} --data.init_args.images.au", ["--data.init_args.images.augment="]),
        (f"{DIGITS} --data.init_args.images.augment n", ["none"]),
        (f"{DIGITS} --data.init_args.images.augment=n", ["--data.init_args.images.augment=none"]),
        ("fit --nothing.", []),
        ("fit 'open", []),
        ("unknown ", []),
    ],
)
def test_words_are_completed(complete, words, expected):
    assert complete(words) == expected


def test_options_are_those_of_the_class_that_the_line_names(complete):
    before = f"{DIGITS} --model.init_args.method"
    assert "--model.init_args.method.init_args.identification." in complete(f"{before}.init_args.i")
    fed_prox = "fulgurite.models.fedsir.methods.FedProx"
    assert fed_prox in {word.partition("=")[2] for word in complete(f"{before}=fulg")}
    names = complete(f"{before}={fed_prox} --model.init_args.method.init_args.")
    assert "--model.init_args.method.init_args.mu=" in names
    assert not [name for name in names if "identification" in name]


def test_options_of_commands_are_those_of_their_help(monkeypatch, tmp_path, schema):
    monkeypatch.setenv("FULGURITE_CACHE", str(tmp_path))
    monkeypatch.setattr("fulgurite.schema.describe_run", lambda: schema)
    content = options.read_options(main)
    assert {"--dry-run", "--only", "--shard"} <= set(content["commands"]["compare"])
    assert content["commands"]["export"]["--to"] == ["onnx", "safetensors", "torch-export"]
    assert content["commands"].keys() == {
        *options.OTHER_COMMANDS,
        *(command.name for system in systems().values() for command in system.commands),
    }
    assert all("--help" in names for names in content["commands"].values())
    [path] = tmp_path.rglob("*.json")
    path.write_text(json.dumps({"schema": {}, "commands": {"kept": {}}}))
    assert options.read_options(main)["commands"] == {"kept": {}}  # not made again
    path.write_text("{")
    assert options.read_options(main) == content  # a damaged cache is


def test_bash_replaces_what_comes_after_the_sign():
    program = f"""
        fulgurite() {{ printf '%s\\n' --trainer.a=true --trainer.a=false; }}
        compopt() {{ :; }}
        {SCRIPTS["bash"]}
        COMP_LINE='fulgurite fit --trainer.a=' COMP_POINT=26
        _fulgurite && printf '%s ' "${{COMPREPLY[@]}}"
        COMP_LINE='fulgurite fit --tr' COMP_POINT=18
        _fulgurite && printf '%s ' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["true", "false", "--trainer.a=true", "--trainer.a=false"]
    assert not done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_are_what_the_shell_reads(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    done = subprocess.run([shell, "-n"], input=script, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
