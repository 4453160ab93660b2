"""The command line of the trainers: its help, and what is said when a run cannot start."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fastcl.cli import main

pytest.importorskip("fastcl.train")

from fastcl.train.methods import METHODS


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


class TestCommandLine:
    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--data", "cats"], "'fashion-mnist' or a folder, got 'cats'"),
            (["--arch", "vgg"], "'wide_resnet50_2', got 'vgg'"),
            (["--arch", "resnet18"], "for images of 1 channel(s), got 'resnet18'"),
            (["--optimizer", "adam"], "optimizer must be one of 'lars', 'sgd', 'adamw', got 'adam'"),
            (["--batch-size", "5000"], "batch_size must be between 2 and 1437"),
            (["--batch-size", "1"], "batch_size must be between 2 and 1437"),
            (["--epochs", "0"], "epochs"),
            (["--temperature", "warm"], "temperature"),
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
        options = METHODS[method].defaults("digits")
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
            assert "here small images" in " ".join(capsys.readouterr().out.split())  # however wide the screen

    def test_info_says_what_is_available_and_needs_none_of_the_optional_packages(self) -> None:
        done = run_python(
            "import sys; sys.modules.update(lightning=None, jsonargparse=None, torchvision=None)\n"
            "from fastcl.cli import main; main(['info'])"
        )
        assert done.returncode == 0, done.stderr
        assert "chunked    available" in done.stdout

    def test_a_missing_optional_package_is_said_with_the_command_that_installs_it(self) -> None:
        done = run_python(
            "import sys; sys.modules.update(lightning=None)\n"
            "from fastcl.cli import main; main(['train', 'simclr'])"
        )
        assert done.returncode != 0
        (line,) = done.stderr.splitlines()
        assert "needs lightning" in line
        assert "pip install 'fastcl[train]'" in line
