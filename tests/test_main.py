"""The command as a user meets it: what it refuses and how, what it writes, how it goes on."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from ml_collections import ConfigDict

from eqvae_jax import main, weights
from eqvae_jax.autoencoders.presets import PRESETS
from eqvae_jax.run import autoencoder
from eqvae_jax.training.checkpoint import load_params, saved_steps

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "configs"))
import eq_sdvae  # noqa: E402
import eq_vqgan  # noqa: E402


def command(*arguments):
    """Runs the command; returns (exit status, what it printed, seconds)."""
    begun = time.monotonic()
    ended = subprocess.run([sys.executable, "-m", "eqvae_jax.main", *arguments], cwd=ROOT, capture_output=True,
                           text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    return ended.returncode, ended.stdout + ended.stderr, time.monotonic() - begun


def single(steps=4, model=eq_sdvae):
    """One training of the smoke variant, without its stages."""
    config = model.get_config("smoke")
    config.stages = {}
    config.training.steps = steps
    return config


def adversarial(steps, model=eq_sdvae):
    """The smoke variant with everything that has state: two networks, an average, accumulation."""
    config = single(steps, model)
    config.loss.update(disc_weight=0.5, disc_layers=1, disc_width=4)
    config.ema_decay, config.training.accumulate, config.checkpoint.every = 0.9, 2, 4
    return config


def test_the_full_recipe_without_data_says_what_to_get_at_once(tmp_path):
    status, printed, seconds = command("--config=configs/eq_sdvae.py", f"--workdir={tmp_path}")
    assert status == 1 and "Traceback" not in printed
    for needed in ("--config.data.train=folder:DIR", "--config.init=diffusers:", "--config.data.train=photos"):
        assert needed in printed
    assert seconds < 5 or os.getloadavg()[0] > 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag, message", [
    ("--config.trainig.steps=3", 'Did you mean "training"'),
    ("--config.training.stepz=3", 'Did you mean "steps"'),
    ("--config.training.steps=many", "invalid literal for int"),
])
def test_a_mistyped_flag_is_named(tmp_path, flag, message):
    status, printed, _ = command("--config=configs/eq_sdvae.py:smoke", f"--workdir={tmp_path}", flag)
    assert status != 0 and message in printed and "Traceback" not in printed


@pytest.mark.parametrize("change, message", [
    (lambda c: (c.update(init="workdir:run"), c.loss.update(perceptual_weight=1.0)), "--config.loss.lpips_weights"),
    (lambda c: c.update(init="ldm:file.ckpt"), "file.ckpt: no such file"),
    (lambda c: c.update(init="init:vqgan-smoke"), "configs/eq_vqgan.py"),
    (lambda c: c.data.update(evaluation_batch_size=0), "evaluation_batch_size"),
    (lambda c: c.update(init="workdir:nowhere"), "nowhere"),
    (lambda c: c.update(init="init:larger"), "no such preset"),
    (lambda c: c.data.update(train="folder:nowhere"), "nowhere"),
    (lambda c: c.data.update(image_size=33), "multiple of 2"),
    (lambda c: c.equivariance.update(p_equivariance=1.5), "probability"),
    (lambda c: c.training.update(accumulate=0), "at least 1"),
    (lambda c: c.model.update(dtype="float33"), "float33"),
])
def test_what_cannot_work_is_refused_before_anything_is_compiled(tmp_path, monkeypatch, change, message):
    config = single()
    change(config)
    monkeypatch.setattr("eqvae_jax.training.loop.train", lambda *_: pytest.fail("training began"))
    with pytest.raises((ValueError, OSError, RuntimeError), match=message):
        main.train(config, tmp_path)


def test_random_weights_do_without_the_perceptual_loss_and_record_it():
    config = single()
    config.loss.perceptual_weight = 1.0
    main.preflight(config)
    assert config.loss.perceptual_weight == 0.0


def test_loss_networks_come_from_the_file_of_init_where_it_has_them(monkeypatch, capsys):
    critic = weights.Critic({"conv_0": 1}, {"norm_1": 2}, width=4, layers=1)
    held = weights.LossWeights(critic, {"vgg": 3}, 0.25)
    asked = []

    def load_loss(reference, *, discriminator, lpips):
        asked.append((reference, discriminator, lpips))
        return held._replace(discriminator=held.discriminator if discriminator else None)

    monkeypatch.setattr(weights, "load_loss", load_loss)
    config = adversarial(2)
    config.init, config.loss.perceptual_weight = "ldm:model.ckpt", 1.0
    main.preflight(config)  # does not ask for LPIPS yet
    assert autoencoder.loss_networks(config) == ({"vgg": 3}, {"params": {"conv_0": 1}, "batch_stats": {"norm_1": 2}})
    assert asked == [("ldm:model.ckpt", True, True)]
    assert config.loss.logvar == 0.25 and "discriminator in it" in capsys.readouterr().out
    config.loss.logvar = 0.5  # what the user says stands
    assert autoencoder.loss_networks(config, resuming=True) == ({"vgg": 3}, None) and config.loss.logvar == 0.5

    held = weights.LossWeights(critic._replace(layers=3, width=64), None, None)
    with pytest.raises(ValueError, match="--config.loss.lpips_weights=download"):
        autoencoder.loss_networks(config)
    config.loss.perceptual_weight = 0.0
    with pytest.raises(ValueError, match="--config.loss.disc_width=64 --config.loss.disc_layers=3"):
        autoencoder.loss_networks(config)
    config.loss.from_init = False
    assert autoencoder.loss_networks(config) == (None, None)


def test_a_file_that_keeps_no_scale_gets_that_of_the_configs_preset():
    config, guess = single(), weights.AutoencoderSpec("kl", 0.18215, 0.0, "ldm:sdxl.safetensors", "")
    scale = lambda model: autoencoder.with_published_scale(config, model, guess).scale
    config.preset, config.init = "sdxl", "ldm:sdxl.safetensors"
    assert scale(PRESETS["sdxl"].model) == 0.13025
    assert scale(PRESETS["sd16"].model) == 0.18215  # another graph: not what the preset's scale is of
    config.init = "diffusers:sdxl"
    assert scale(PRESETS["sdxl"].model) == 0.18215  # this one said so itself


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The whole smoke variant, once: three trainings, comparison, report."""
    workdir = tmp_path_factory.mktemp("smoke")
    assert main.train_stages(eq_sdvae.get_config("smoke"), workdir) == 0
    return workdir


def test_stages_end_in_a_table_a_report_and_pictures(smoke, capsys):
    document = json.loads((smoke / "metrics.json").read_text())
    assert set(document["results"]) == {"before", "control", "eq"}
    page = (smoke / "report.html").read_text()
    assert "data:image/png;base64," in page and "control" in page
    for stage in ("before", "control", "eq"):
        rows = [json.loads(line) for line in (smoke / stage / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows if row["split"] == "train"] == [1, 2]
        assert any((smoke / stage / "tensorboard").iterdir())
    pngs = {path.stem for path in smoke.glob("*.png")}
    assert {"tau_1", "latent_pca", "reconstruction"} <= pngs


def test_sigterm_in_the_comparison_ends_it_and_the_same_command_does_only_that(smoke, monkeypatch, capsys):
    from eqvae_jax.evaluation import comparison

    def signalled(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    def unheard(*_):
        raise AssertionError("SIGTERM was left to who had it before")

    metrics = smoke / "metrics.json"
    before, logged = metrics.read_text(), (smoke / "eq" / "metrics.jsonl").read_text()
    metrics.unlink()
    outside = signal.signal(signal.SIGTERM, unheard)
    try:
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
            patch.setattr(comparison, "compare", signalled)
            main.train_stages(eq_sdvae.get_config("smoke"), smoke)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN  # until the process has ended
    finally:
        signal.signal(signal.SIGTERM, outside)
    assert end.value.code == 75 and not metrics.exists()
    assert "SIGTERM: stopped; all stages are trained" in capsys.readouterr().err
    assert main.train_stages(eq_sdvae.get_config("smoke"), smoke) == 0
    assert signal.getsignal(signal.SIGTERM) is outside
    assert (smoke / "eq" / "metrics.jsonl").read_text() == logged
    assert json.loads(metrics.read_text())["results"] == json.loads(before)["results"]


@pytest.mark.parametrize("stages", [False, True])
def test_what_stopped_a_training_is_the_exit_code_of_the_command(stages, tmp_path, monkeypatch):
    stopped = []
    monkeypatch.setattr(main, "train", lambda config, workdir: stopped.append(workdir) or 75)
    config = eq_sdvae.get_config("smoke") if stages else single()
    assert main.trained(config, tmp_path) == 75 and len(stopped) == 1  # and no stage after it


def test_fine_tuning_starts_from_the_stage_before(smoke):
    before, config, step = load_params(smoke / "before", "params")
    assert step == 2 and config["autoencoder"]["multipliers"] == [1, 2]
    control = json.loads((smoke / "control" / "config.json").read_text())
    assert control["init"] == f"workdir:{smoke}/before" and control["data"]["batch_size"] == 2


def test_a_run_that_was_killed_ends_as_one_that_was_not(tmp_path):
    """Killed with -9 after step 4 was saved; then parameters, optimizers, statistics and metrics agree to the bit."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    main.train(adversarial(6), whole)
    code = ("import sys; sys.path[:0] = ['tests', 'configs']; from test_main import adversarial, main; "
            f"config = adversarial(1000); config.checkpoint.keep = 1000; main.train(config, {str(parts)!r})")
    victim = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    while not saved_steps(parts) and victim.poll() is None:
        time.sleep(0.02)
    victim.kill()
    victim.wait()
    for later in saved_steps(parts)[1:]:  # it may have been quick: step 4 is where to go on from
        shutil.rmtree(parts / "checkpoints" / str(later))
    assert saved_steps(parts) == [4]

    config = adversarial(6)
    config.checkpoint.keep = 1000
    main.train(config, parts)
    assert saved_steps(parts) == [4, 6]
    states = []
    for workdir in (whole, parts):
        with ocp.CheckpointManager(workdir / "checkpoints", item_names=("state", "config")) as manager:
            states.append(manager.restore(6, args=ocp.args.Composite(state=ocp.args.StandardRestore()))["state"])
    assert {"params", "opt_state", "buffers"} <= set(states[0])
    jax.tree.map(np.testing.assert_array_equal, *states)
    timed = lambda name: "second" in name or name in ("input_wait", "goodput")
    rows = [[{name: value for name, value in json.loads(line).items() if not timed(name)}
             for line in (workdir / "metrics.jsonl").read_text().splitlines()] for workdir in (whole, parts)]
    assert rows[0] == rows[1] and rows[0][-1]["step"] == 6


@pytest.mark.parametrize("model", [eq_sdvae, eq_vqgan], ids=["kl", "vq"])
def test_every_config_field_is_read(tmp_path, monkeypatch, model):
    """A field that nothing reads would be a promise the program does not keep."""
    config = adversarial(2, model)
    config.loss.perceptual_weight = 1.0  # with random weights: looks for loss.lpips_weights, and does without
    config.checkpoint.update(best_metric="psnr", keep_best=1)
    with config.unlocked():
        config.loss.ignored = 1.0
    read, names = set(), {id(config): ""}
    names |= {id(section): f"{name}." for name, section in config.items() if isinstance(section, ConfigDict)}
    leaves = {prefix + key for prefix in names.values() for key in (config[prefix[:-1]] if prefix else config)}
    original = ConfigDict.__getitem__

    def recording(self, key):
        read.add(names.get(id(self), "elsewhere.") + str(key))
        return original(self, key)

    # The config is also written out whole, which reads every field and uses none.
    for module in ("workdir", "checkpoint"):
        monkeypatch.setattr(f"eqvae_jax.training.{module}.resolved",
                            lambda config: {"optimizer": {"schedule": config.optimizer.schedule}})
    # `dict(config.equivariance)` reads every field; draw_tau takes them by name and refuses what it does not know.
    monkeypatch.setattr(ConfigDict, "__getitem__", recording)
    main.train(config, tmp_path)
    monkeypatch.undo()
    assert leaves - read == {"loss.ignored", "stages"}  # stages is read by main() itself


def test_the_batch_of_a_run_outlives_a_change_of_devices(tmp_path):
    config = single(1)
    config.data.batch_size, config.training.accumulate = 4, 2
    main.train(config, tmp_path)
    config = single(2)
    config.training.accumulate = 2
    assert config.data.batch_size == 0 and config.data.batch_per_device * 2 == 4
    config.data.batch_per_device = 2
    main.train(config, tmp_path)
    assert config.data.batch_size == 4


def test_a_workdir_of_another_config_is_left_alone(tmp_path):
    main.train(single(1), tmp_path)
    config = single(2)
    config.loss.kl_weight = 0.5
    with pytest.raises(ValueError, match="loss.kl_weight: was 1e-06 -> now 0.5"):
        main.train(config, tmp_path)
    assert saved_steps(tmp_path) == [1]
