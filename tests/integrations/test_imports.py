"""What an import of fastcl brings, and that nothing of this checkout is in another library's way."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import fastcl

CHECKOUT = Path(fastcl.__file__).parents[1]
PEERS = {
    "lightly": "lightly",
    "open_clip": "open_clip_torch",
    "pytorch_metric_learning": "pytorch-metric-learning",
    "sentence_transformers": "sentence-transformers",
    "transformers": "transformers",
}


def run(code):
    """What ``code`` prints in a process of its own, started from the checkout."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=CHECKOUT, check=True, capture_output=True, text=True).stdout


def test_no_adapter_is_forgotten():
    adapters = {path.stem for path in (CHECKOUT / "fastcl" / "integrations").glob("[!_]*.py")}
    assert adapters == {*PEERS, "vision"}


def test_fastcl_and_its_integrations_import_no_peer():
    found = run(
        "import sys, fastcl, fastcl.integrations\n"
        f"print(*(name for name in {(*PEERS, 'torchvision')} if name in sys.modules))"
    )
    assert found.split() == []


def test_a_missing_peer_is_named_with_the_way_to_install_it():
    found = run(
        "import importlib, sys\n"
        f"for name in {tuple(PEERS)}:\n"
        "    sys.modules.update(torchvision=None, **{name: None})\n"
        "    try: importlib.import_module(f'fastcl.integrations.{name}')\n"
        "    except ModuleNotFoundError as error: print(error)"
    )
    lines = found.splitlines()
    assert len(lines) == len(PEERS)
    for line, (name, package) in zip(lines, PEERS.items(), strict=True):
        assert f"no {name} here: pip install '{package}>=" in line


@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed: extra 'peers'")
def test_transformers_is_imported_from_the_checkout():
    """It looks for packages by names that a folder here could have, as ``kernels`` once did."""
    assert run("import transformers; print(transformers.AutoConfig.__name__)").split() == ["AutoConfig"]
