"""What imports bring along, write and reach for, seen from one fresh interpreter."""

import json
import subprocess
import sys

import pytest

#: By module: the names to take from it, what its import alone must not load, and what all must not.
LIGHT = {
    "fulgurite.models.fedsir": (
        ["class_spectra", "split_clients", "relabel", "distance_aware_weights"],
        ["torch"],
        ["lightning", "sklearn", "torch_geometric", "transformers"],
    ),
    "fulgurite.models.number_probing.backbones": (
        [],
        [],
        ["lightning", "sklearn", "transformers", "scipy"],
    ),
    "fulgurite.models.cs_arm_bn": (
        ["ContextBatchNorm2d", "convert_batchnorm", "context", "CSARMBN", "SmallResNet"],
        ["torch"],
        ["lightning", "pandas", "sklearn", "matplotlib"],
    ),
    "fulgurite.models.stream_cqsa": (
        ["chunked_cross_entropy", "Decoder"],
        ["torch"],
        ["lightning", "transformers"],
    ),
    "fulgurite.datamodules.ice_layers": (
        ["LayerFiles", "MarClimate", "NpzStacks", "KoenigPicks", "SyntheticFlights"],
        [],
        [
            *("lightning", "torch_geometric", "h5py", "netCDF4", "pyproj", "scipy", "pandas"),
            "sklearn",
        ],
    ),
    "fulgurite.compare.worker": (["serve"], ["torch", "numpy", "jsonargparse"], ["lightning"]),
}

SCRIPT = """
import importlib, json, os, pkgutil, socket, sys

def refuse(*args, **kwargs):
    raise AssertionError(f"network at import: {args}")

socket.getaddrinfo = socket.create_connection = socket.socket.connect = refuse
light = json.loads(sys.argv[1])

def tell_loaded(step, module, names):
    # in a fork, so that what one module imports does not hide what another does
    child = os.fork()
    if not child:
        try:
            loaded = importlib.import_module(module)
            for name in names:
                getattr(loaded, name)
            print(json.dumps([step, module, [*sys.modules]]), flush=True)
        finally:
            os._exit(0)
    os.waitpid(child, 0)

for module, names in light.items():
    if names:  # what only is imported is so below, and more cheaply
        tell_loaded("import", module, [])
import torch._dynamo  # what torch itself loads when it is first used, once for all forks
for module, names in light.items():
    tell_loaded("use", module, names)
modules = []
for folder in ("", ".models", ".datamodules", ".callbacks", ".configs"):
    package = importlib.import_module(f"fulgurite{folder}")
    inside = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    modules += [module.name for module in inside if not module.name.endswith("__main__")]
for module in modules:
    loaded = importlib.import_module(module)
    for name in getattr(loaded, "__all__", ()):  # also those that are imported on first use
        getattr(loaded, name)
print(json.dumps(["all", "", modules]))
"""


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """What a fresh interpreter had loaded after each step, what it said, and where it ran."""
    folder = tmp_path_factory.mktemp("fresh")
    names = {module: names for module, (names, _, _) in LIGHT.items()}
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, json.dumps(names)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder)
    steps = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    return {(step, module): {*loaded} for step, module, loaded in steps}, done.stderr, folder


@pytest.mark.parametrize("module", LIGHT)
def test_the_import_is_light(fresh, module):
    loaded, said, _ = fresh
    names, with_import, with_use = LIGHT[module]
    assert names or not with_import
    steps = {"import": [*with_import, *with_use], "use": with_use}
    for step, heavy in steps.items() if names else [("use", with_use)]:
        assert (step, module) in loaded, said
        assert not {*heavy} & loaded[step, module]


def test_imports_reach_for_no_network_and_write_nothing(fresh):
    loaded, said, folder = fresh
    assert ("all", "") in loaded, said
    assert len(loaded["all", ""]) > 300
    assert not list(folder.iterdir())
