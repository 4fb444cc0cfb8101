"""The command `eqvae`: what it offers, how quickly, and that it is the modules' own commands."""

import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

import eqvae_jax
from eqvae_jax import commands, recipes
from eqvae_jax.evaluation import choices

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"


def python(*arguments, cwd=ROOT):
    """Runs Python; returns (exit status, stdout, stderr)."""
    ended = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True,
                           env=os.environ | {"PYTHONPATH": str(ROOT)})
    return ended.returncode, ended.stdout, ended.stderr


def eqvae(capsys, monkeypatch, *arguments, own="eqvae"):
    """What `eqvae` does that needs no command's module: (exit status, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/eqvae", *arguments])
    with pytest.raises(SystemExit) as end:
        commands.run(own)
    return end.value.code, *capsys.readouterr()


def test_help_has_a_line_for_each_command(capsys, monkeypatch):
    status, out, _ = eqvae(capsys, monkeypatch, "--help")
    assert status == 0 and out.startswith("usage: eqvae COMMAND")
    for name, command in commands.COMMANDS.items():
        assert f"\n  {name:<10}  {command.does}\n" in out
    assert max(map(len, out.splitlines())) <= 120


def test_the_version_comes_first_and_jax_after(capsys, monkeypatch):
    status, out, _ = eqvae(capsys, monkeypatch, "--version")
    assert status == 0 and out.splitlines()[0] == f"eqvae_jax {eqvae_jax.__version__}"
    assert f"\njax {importlib.metadata.version('jax')}\n" in out and "\npython 3." in out


@pytest.mark.parametrize("own, arguments, says", [
    ("eqvae", ["trian"], "'trian' is no command of eqvae. Did you mean train? There are train, encode"),
    ("eqvae", ["--worksdir=x"], "'--worksdir=x' is no command of eqvae. There are train"),
    ("python -m eqvae_jax", [], "python -m eqvae_jax needs a command. There are train"),
])
def test_what_is_no_command_is_refused(capsys, monkeypatch, own, arguments, says):
    status, out, err = eqvae(capsys, monkeypatch, *arguments, own=own)
    assert status == 2 and not out and err.startswith("error: ") and says in err


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_every_command_explains_itself_by_its_name_without_jax(name):
    code = ("import sys; from eqvae_jax import commands\n"
            "try: commands.run()\n"
            "finally: print('jax' in sys.modules, file=sys.stderr)")
    status, out, err = python("-c", code, name, "--help")
    assert status == 0 and err == "False\n"
    assert f"usage: eqvae {name} " in out and f"    eqvae {name} " in out  # and an example at least
    assert "python -m" not in out
    status, out, _ = python("-m", commands.COMMANDS[name].module, "--help")
    assert status == 0 and f"usage: python -m {commands.COMMANDS[name].module} " in out


@pytest.mark.parametrize("module", ["main", "plan"])
def test_the_help_of_absls_commands_has_every_flag_they_define(module):
    defined = set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', (ROOT / "eqvae_jax" / f"{module}.py").read_text()))
    _, out, _ = python("-m", f"eqvae_jax.{module}", "--help")
    assert defined and defined <= set(re.findall(r"^  --(\w+)$", out, re.MULTILINE))


@pytest.mark.parametrize("arguments, status, says", [
    (["--config=configs/eq_sdvae.py:smoke", "--workdir=/nowhere/w", "--config.trainig.steps=1"], 1, 'mean "training"'),
    (["--config", "eq_sdvae:smoek", "--workdir=w"], 1, "eq_sdvae.py has no variant 'smoek'; it has: paper, quickstart"),
    (["--config=eq_sdave.py", "--workdir=w"], 1, "Did you mean eq_sdvae? There are dit, eq_sd3vae"),
    (["--config=eq_sdvae", "--workdir=w", "more"], 1, "unexpected arguments: more"),
    (["--config=eq_sdvae"], 1, "--workdir must have a value"),
    (["--config=eq_sdvae:smoke", "--workdir=gs://b/w"], 1, "mount the bucket"),
])
def test_train_is_main_in_all_that_it_refuses(tmp_path, arguments, status, says):
    ours = python("-m", "eqvae_jax", "train", *arguments, cwd=tmp_path)
    assert ours == python("-m", "eqvae_jax.main", *arguments, cwd=tmp_path)
    assert ours[0] == status and says in ours[2] and "Traceback" not in ours[2]


def test_a_name_in_a_text_becomes_that_of_the_caller(monkeypatch):
    text = " python -m eqvae_jax.main --a\nas of eqvae_jax.main: eqvae_jax.data.preparation, eqvae_jax.mains, eqvae_jax"
    monkeypatch.setattr(sys, "argv", ["eqvae plan"])
    assert commands.as_called(text) == (
        " eqvae train --a\nas of eqvae train: eqvae prepare, eqvae_jax.mains, eqvae_jax")
    assert (commands.program("plan"), commands.program("train")) == ("eqvae plan", "python -m eqvae_jax.main")
    monkeypatch.setattr(sys, "argv", ["pytest"])
    assert commands.as_called(text) == text


def test_the_choices_offered_are_those_there_are():
    from eqvae_jax.evaluation import metrics
    from eqvae_jax.features import inception

    assert choices.PROTOCOLS == tuple(inception.PROTOCOLS) and choices.UINT8 == tuple(metrics.UINT8_CONVENTIONS)


@pytest.mark.parametrize("reference", ["configs/eq_sdvae.py", "eq_sdvae.py", "eq_sdvae", "./configs/eq_sdvae.py"])
@pytest.mark.parametrize("variant", ["", ":smoke"])
def test_configs_are_found_from_any_directory(tmp_path, monkeypatch, reference, variant):
    monkeypatch.chdir(tmp_path)
    assert recipes.resolve(reference + variant) == f"{CONFIGS / 'eq_sdvae.py'}{variant}"
    assert recipes.load(reference + variant).preset == "sd"


def test_a_file_that_exists_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/sit.py").write_text("def get_config(variant='mine'): return variant")
    assert recipes.load("configs/sit.py") == "mine" and recipes.load("configs/sit.py:other") == "other"
    assert recipes.resolve("sit.py") == str(CONFIGS / "sit.py")
    (tmp_path / "sit").mkdir()  # a directory is no config
    assert recipes.resolve("sit") == str(CONFIGS / "sit.py")


@pytest.mark.parametrize("reference", ["other/eq_sdvae.py", "/configs/eq_sdvae.py", "configs/../eq_sdvae.py", "",
                                       ":smoke", "configs/eq_sdvae.yaml", "configs"])
def test_what_is_no_config_is_refused_with_the_names_of_all(tmp_path, monkeypatch, reference):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no such file, and no such config here.*There are dit, .*, sit\\."):
        recipes.resolve(reference)
    assert recipes.names() == sorted(path.stem for path in CONFIGS.glob("*.py"))


def test_a_config_that_fails_shows_where(tmp_path):
    (tmp_path / "broken.py").write_text("def get_config():\n    return missing\n")
    with pytest.raises(ValueError, match=r"(?s)broken.py cannot be used as a config.*line 2.*'missing' is not defined"):
        recipes.load(str(tmp_path / "broken.py"))
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ValueError, match="(?s)empty.py cannot be used as a config.*get_config"):
        recipes.load(str(tmp_path / "empty.py") + ":x")


def test_a_config_by_its_name_is_the_file_with_its_flags(tmp_path):
    code = ("import json, sys\nfrom absl import app\nfrom eqvae_jax import main\n"
            "app.run(lambda _: print(json.dumps(main.FLAGS.config.to_dict(), default=str)), "
            "flags_parser=main.parse_flags)")
    found = [python("-c", code, *config, "--config.training.steps=7", cwd=tmp_path)[1]
             for config in (["--config", "eq_sdvae:smoke"], [f"--config={CONFIGS}/eq_sdvae.py:smoke"])]
    assert found[0] == found[1] and json.loads(found[0])["training"]["steps"] == 7
