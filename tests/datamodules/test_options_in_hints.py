"""Options that errors of data advise are options that there are."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

from fulgurite.datamodules import cs_arm_bn, fedsir

# an option as it stands in a message, or after a constant with its beginning
NAMED = re.compile(r"(?:\{(_[A-Z]+)\}|--data\.init_args)((?:\.\w+)*)")
CONSTANT = re.compile(r'^(_[A-Z]+) = "(--data\.init_args.*)"', re.MULTILINE)
#: What derives from a class can stand where the option says.
KINDS = {
    fedsir: {"source": "ImageSource", "partition": "Partition", "noise": "FederationNoise"},
    cs_arm_bn: {"source": "sources.PlateSource", "split": "splits.Split"},
}


def resolve(package, name):
    module, _, attribute = name.rpartition(".")
    owner = importlib.import_module(f"{package.__name__}.{module}") if module else package
    return getattr(owner, attribute)


def options(classes):
    return {name for cls in classes for name in inspect.signature(cls).parameters}


@pytest.mark.parametrize("package", [fedsir, cs_arm_bn])
def test_options_of_data_that_hints_name_are_there(package):
    exported = [getattr(package, name) for name in dir(package)]
    classes = [item for item in exported if inspect.isclass(item)]
    known = {
        key: options(cls for cls in classes if issubclass(cls, resolve(package, base)))
        for key, base in KINDS[package].items()
    }
    count = 0
    for path in sorted(Path(package.__file__).parent.glob("*.py")):
        text = path.read_text()
        beginnings = {"": "--data.init_args", **dict(CONSTANT.findall(text))}
        for constant, rest in NAMED.findall(text):
            if constant not in beginnings:
                continue
            option = beginnings[constant] + rest
            keys = option.removeprefix("--data.init_args.").split(".")
            if len(keys) > 2 and keys[0] in known and keys[1] == "init_args":
                count += 1
                assert keys[2] in known[keys[0]], f"{path.name}: {option}"
    assert count > 10
