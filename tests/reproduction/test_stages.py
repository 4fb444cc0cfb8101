"""What a stage is known by: all that decides its result, and nothing else."""

import pytest

from eqvae_jax.reproduction import bench as benches
from eqvae_jax.reproduction.bench import ARMS, Bench
from eqvae_jax.reproduction.scales import SCALES
from eqvae_jax.reproduction.stages import Output, Stage, in_order

BENCH = Bench(SCALES["smoke"], seed=1)


def config_file(folder, steps):
    folder.mkdir(exist_ok=True)
    path = folder / "some.py"
    path.write_text("from ml_collections import ConfigDict\n"
                    f"def get_config():\n    return ConfigDict({{'n': {steps}}})\n")
    return path


def test_a_changed_config_is_another_stage(tmp_path):
    key = lambda name, steps: Stage("a", "main", (f"--config={config_file(tmp_path / name, steps)}",)).key
    assert key("here", 1) == key("there", 1) != key("elsewhere", 2)


def test_what_comes_before_decides_too():
    key = lambda flag: Stage("b", "encode", (Output(Stage("a", "sample", (flag,)), "--images=folder:{}"),)).key
    assert key("--seed=1") == key("--seed=1") != key("--seed=2")


def test_the_name_and_the_estimates_do_not_decide():
    assert Stage("a", "encode", ("--x",)).key == Stage("b", "encode", ("--x",), ("work", 3), 5).key
    assert Stage("a", "encode", ("--x",)).key != Stage("a", "sample", ("--x",)).key


def test_commands_name_the_results_of_other_stages(tmp_path):
    latents = BENCH.latents("sdvae", "eq")
    command = latents.command(tmp_path)
    assert command[1:3] == ["-m", "eqvae_jax.encode"]
    assert f"--autoencoder=workdir:{BENCH.autoencoder('sdvae', 'eq').folder(tmp_path)}" in command
    assert command[-1] == f"--output={latents.folder(tmp_path)}"
    samples = BENCH.samples("dit", "eq", "sdvae")
    assert samples.command(tmp_path)[-1] == f"--output={samples.folder(tmp_path)}/samples.npz"


def test_order_is_of_need_and_each_comes_once():
    order = in_order([BENCH.generation("dit", "eq"), BENCH.generation("dit", "control")])
    names = [stage.name for stage in order]
    assert len(set(names)) == len(names) and names.count("sdvae base seed 1") == 1
    for place, stage in enumerate(order):
        assert {needed.key for needed in stage.inputs} <= {before.key for before in order[:place]}


def test_arms_of_a_seed_share_their_start_and_differ_in_the_objective_alone():
    stages = [BENCH.autoencoder("sdvae", arm) for arm in ARMS]
    assert len({stage.key for stage in stages}) == len(ARMS)
    assert {stage.inputs[0].key for stage in stages} == {BENCH.base("sdvae").key}
    flags = [[a for a in stage.arguments if isinstance(a, str) and "equivariance" not in a and "loss" not in a
              and "model" not in a] for stage in stages]
    assert all(each == flags[0] for each in flags)


def test_the_control_has_as_many_steps_as_eq():
    steps = lambda arm: [a for a in BENCH.autoencoder("sdvae", arm).arguments if "training.steps" in str(a)]
    assert steps("control") == steps("eq") != []


def test_the_yardstick_is_the_same_for_all_seeds():
    assert Bench(SCALES["tiny"], 0).classifier().key == Bench(SCALES["tiny"], 2).classifier().key
    assert Bench(SCALES["tiny"], 0).base("sdvae").key != Bench(SCALES["tiny"], 2).base("sdvae").key


@pytest.mark.parametrize("scale", SCALES)
def test_rotation_alone_keeps_the_size(scale):
    """`rotation` is turning at the latents' full size, which is the image's side over the downsampling."""
    from eqvae_jax import recipes
    from eqvae_jax.autoencoders.presets import PRESETS

    for kind in ("sdvae", "vqgan"):
        stage = Bench(SCALES[scale]).autoencoder(kind, "rotation")
        config = recipes.load(stage.arguments[0].partition("=")[2])
        name = config.init.removeprefix("init:") or config.preset
        side = config.data.image_size // PRESETS[name].model.downsampling
        assert f"--config.equivariance.sizes=({side},)" in stage.arguments


@pytest.mark.parametrize("scale", ["smoke", "tiny", "small"])
def test_the_aligner_sees_whole_tokens(scale):
    """A token of REPA is a whole number of the classifier's places, of which there is one for 4 x 4 pixels."""
    from eqvae_jax import recipes
    from eqvae_jax.generators import dit

    scale = SCALES[scale]
    model = recipes.load(scale.generators["repa"]).model
    patch = model.patch_size or dit.preset(model.preset).patch_size
    assert (scale.image_size // 4) % (scale.sides["sdvae"] // patch) == 0


def test_published_weights_are_the_start_of_the_papers_scale():
    bench = Bench(SCALES["paper"])
    stage = bench.autoencoder("sdvae", "eq")
    assert "--config.init=ldm:kl-f8/model.ckpt" in stage.arguments and not stage.inputs
    assert "--autoencoder=ldm:kl-f8/model.ckpt" in bench.latents("sdvae", "before").arguments
    assert benches.PLAIN[0] not in stage.arguments
