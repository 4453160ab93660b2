"""The command line of the trainers: its help, and what is said when a run cannot start."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fastcl
from fastcl.cli import main

pytest.importorskip("fastcl.train")

from fastcl.train import prepare
from fastcl.train.methods import METHODS
from fastcl.train.options import parse


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


class TestCommandLine:
    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--data", "cats"], "'fashion-mnist' or a folder, got 'cats'"),
            (["--data", "c" * 5000], "ccc': there is no such folder"),
            (["--arch", "vgg"], "'vit_base', got 'vgg'"),
            (["--arch", "resnet18"], "for images of 1 channel(s), got 'resnet18'"),
            (["--optimizer", "adam"], "optimizer must be one of 'lars', 'sgd', 'adamw', got 'adam'"),
            (["--batch-size", "5000"], "batch_size must be between 2 and 1437"),
            (["--batch-size", "1"], "batch_size must be between 2 and 1437"),
            (["--epochs", "-3"], "error: epochs must be at least 1, got -3"),
            (["--epochs", "many"], "error: epochs must be a whole number, got 'many'"),
            (["--batch-size", "2.5"], "error: batch_size must be a whole number, got '2.5'"),
            (["--temperature", "warm"], "error: temperature must be a number, got 'warm'"),
            (["--temperature", "0"], "error: temperature must be at least 1e-06, got 0.0"),
            (["--temperature", "1e-30"], "error: temperature must be at least 1e-06, got 1e-30"),
            (["--lr", "0"], "error: lr must be above 0, got 0.0"),
            (["--seed", "9999999999"], "error: seed must be between 0 and 4294967295, got 9999999999"),
            (["--dim", "1"], "error: dim must be at least 2, got 1"),
            (["--small-crop-max", "0.01"], "error: small_crop_max must be between 0.05 and 1, got 0.01"),
            (["--crop-min", "7"], "error: crop_min must be between 0 and 1, got 7.0"),
            (["--lr", "nan"], "error: lr must be a number, got 'nan'"),
            (["--blur", "maybe"], "error: blur must be true or false, got 'maybe'"),
            (["--epochs"], "expected one argument"),
            (["--precision", "16-mixed"], "'bf16-mixed' on a CPU, got '16-mixed'"),
            (["--precision", "8"], "precision must be one of '32-true'"),
            (["--loss", "l2"], "loss must be one of 'nt_xent', 'decoupled', 'hard_negative', got 'l2'"),
            (["--encode-chunk", "3"], "encode_chunk must be at least 2 and divide a process's batch of 128"),
            (["--num-nodes", "2"], "num_nodes must be 1 unless torchrun starts the processes, got 2"),
            (["--resume", "--overwrite"], "resume and overwrite exclude each other"),
            (["--small-crops", "2"], "small_crops must be 0 for digits, got 2"),
            (["--jitter", "0.4"], "jitter must be 0.0 for digits, got 0.4"),
            (["--image-size", "16"], "image_size must be null for digits, got 16"),
            (["--limit", "1"], "data must have at least 2 training samples, got 1"),
            (["--accelerator", "tpu"], "accelerator must be one of 'auto', 'cpu', 'gpu', got 'tpu'"),
            (["--accelerator", "gpu"], "'auto' or 'cpu' on a machine without a GPU, got 'gpu'"),
            (["--data="], "error: data must be a text, got ''"),
            (["--out="], "error: out must be a path, got ''"),
            (["--nonsense", "1"], "--nonsense"),
            (["--config", "missing.yaml"], "missing.yaml"),
            (["--out", __file__], "out must be a folder to write to"),
        ],
    )
    def test_what_cannot_be_trained_is_said_in_one_line(
        self, arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as stop:
            main(["train", "simclr", "--out", str(tmp_path), *arguments])
        assert stop.value.code != 0
        output = capsys.readouterr()
        assert said in output.err
        assert len(output.err.splitlines()) == 1
        assert output.out == ""
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("method", "options", "said"),
        [
            ("swav", {"prototypes": 1}, "prototypes must be at least 2, got 1"),
            ("dino", {"target_temperature_end": 0}, "target_temperature_end must be at least 1e-06, got 0"),
            ("pcl", {"clusters": ()}, r"clusters must be whole numbers such as 20,10, got \(\)"),
            ("simclr", {"lr": 10**400}, "lr must be a number, got 10000"),
            ("deepcluster", {"clusters": 1}, "clusters must be at least 2, got 1"),
            ("clip", {"temperature": 1e-30}, "temperature must be at least 1e-06, got 1e-30"),
        ],
    )
    def test_a_methods_own_options_are_checked(
        self, method: str, options: dict[str, object], said: str, tmp_path: Path
    ) -> None:
        with pytest.raises(ValueError, match=said):
            prepare(method, out=tmp_path, **options)

    def test_a_file_may_give_texts_and_must_give_options(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config = tmp_path / "config.yaml"
        config.write_text("weight_decay: 1e-3\nblur: no\nsize: 3\n")  # YAML 1.1 takes 1e-3 for a text
        for content, said in (
            ("size: 3\n", "config must hold options of simclr, got 'size'"),
            ("- 3\n", "config must be a YAML file of options"),
            ("epochs: -3\n", "epochs must be at least 1, got -3"),
            ("epochs: true\n", "epochs must be a whole number, got True"),
            ("\x80", "config must be a YAML file, got "),
        ):
            config.write_text(content, "latin-1")
            with pytest.raises(SystemExit):
                main(["train", "simclr", f"--config={config}", f"--out={tmp_path / 'out'}"])
            (line,) = capsys.readouterr().err.splitlines()
            assert said in line
        config.write_text("weight_decay: 1e-3\nblur: no\nepochs: 7\n")
        assert parse("simclr", [f"--config={config}", "--epochs=8"]) == {
            **{"weight_decay": "1e-3", "blur": False, "epochs": "8"},
        }

    def test_python_may_give_texts_and_numpys_numbers_too(self, tmp_path: Path) -> None:
        settings = prepare("simclr", out=str(tmp_path / "x"), epochs="3", weight_decay="1e-3").settings
        assert settings.out == tmp_path / "x"
        assert (settings.epochs, settings.weight_decay) == (3, 1e-3)
        settings = prepare("simclr", out=tmp_path, epochs=np.int64(3), lr=np.float32(0.5)).settings
        assert [(type(x), x) for x in (settings.epochs, settings.lr)] == [(int, 3), (float, 0.5)]
        with pytest.raises(ValueError, match="epochs must be at least 1, got -3"):
            prepare("simclr", out=tmp_path, epochs=-3)
        with pytest.raises(TypeError, match="nonsense"):
            prepare("simclr", out=tmp_path, nonsense=1)

    def test_an_unknown_method_is_said_in_one_line(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as stop:
            main(["train", "magic"])
        assert stop.value.code != 0
        (line,) = capsys.readouterr().err.splitlines()
        assert "magic" in line
        assert "simclr" in line

    @pytest.mark.parametrize("method", METHODS)
    def test_help_lists_every_option_with_its_default(
        self, method: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as stop:
            main(["train", method, "--help"])
        assert stop.value.code == 0
        output = capsys.readouterr().out
        options = METHODS[method].defaults(METHODS[method].settings.kinds[0])
        for option in options:
            assert f"--{option.replace('_', '-')} " in output
        assert output.count("default:") == len(options)

    def test_help_shows_the_defaults_for_the_given_images(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config = tmp_path / "config.yaml"
        config.write_text("data: cifar10\n")
        for arguments in (["--data=cifar10"], ["--data", "cifar10"], ["--config", str(config)]):
            with pytest.raises(SystemExit):
                main(["train", "moco", *arguments, "--help"])
            assert "here small." in " ".join(capsys.readouterr().out.split())  # however wide the screen

    def test_help_lists_every_method_with_its_paper(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            main(["train", "--help"])
        lines = capsys.readouterr().out.splitlines()
        for name in METHODS:
            (line,) = (line for line in lines if line.split()[:1] == [name])
            assert re.search(r"\(.+ \d{4}, (arXiv \d{4}\.\d{5}|ICLR)\)$", line), line

    def test_info_says_what_is_available_and_needs_none_of_the_optional_packages(self) -> None:
        done = run_python(
            "import sys; sys.modules.update(lightning=None, torchvision=None)\n"
            "from fastcl.cli import main; main(['info'])"
        )
        assert done.returncode == 0, done.stderr
        assert "chunked    available" in done.stdout

    def test_python_runs_the_package(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(sys, "argv", ["python -m fastcl", "--version"])
        with pytest.raises(SystemExit) as stop:
            runpy.run_module("fastcl", run_name="__main__")
        assert stop.value.code == 0
        assert capsys.readouterr().out == f"fastcl {fastcl.__version__}\n"

    def test_torchvision_after_a_failed_import_of_ones_own(self) -> None:
        done = run_python(
            "try:\n    import torchvision\nexcept RuntimeError:\n    pass\n"
            "from fastcl.train import MoCo\nfrom lightning.pytorch import Trainer"
        )
        assert done.returncode == 0, done.stderr

    def test_the_script_of_the_documentation_can_import_what_it_needs(self) -> None:
        page = Path(__file__).parents[2].joinpath("docs/training.md").read_text()
        (script,) = re.findall(r"```python\n(from fastcl\.train [^`]*)```", page)
        imports = [line for line in script.splitlines() if line.startswith("from ")]
        assert len(imports) == 2
        done = run_python("\n".join(imports))
        assert done.returncode == 0, done.stderr

    def test_a_missing_optional_package_is_said_with_the_command_that_installs_it(self) -> None:
        done = run_python(
            "import sys; sys.modules.update(lightning=None)\n"
            "from fastcl.cli import main; main(['train', 'simclr'])"
        )
        assert done.returncode != 0
        (line,) = done.stderr.splitlines()
        assert "needs lightning" in line
        assert "pip install 'fastcl[train]'" in line
