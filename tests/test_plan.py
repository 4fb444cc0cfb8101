"""The door: every config planned on eight devices of a CPU, its errors, and a TPU slice where its compiler is there."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from eqvae_jax import plan
from eqvae_jax.planning import topology
from eqvae_jax.run.planning import parse_latents

ROOT = pathlib.Path(__file__).resolve().parents[1]
# config:variant -> changes; of eq_* two kinds of models, of sit what splits parameters.
PLANNED = {
    "eq_sdvae:smoke": {"equivariance.sizes": (5, 8, 12), "equivariance.p_equivariance": 0.5, "training.accumulate": 2,
                       "equivariance.p_low_resolution": 0.0},
    "eq_vqgan:smoke": {},
    "dit:smoke": {},
    "sit:smoke": {"mesh.fsdp": 8, "mesh.min_shard_size": 256},
    "repa:smoke": {"alignment.encoder": "dinov2:S"},
    "maskgit:smoke": {"training.accumulate": 2},
    "fashion_classifier:smoke": {},
}
QUICK = "fashion_classifier:smoke"  # the one that is compiled with XLA's least effort


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    """{config: its plan}, and of two small programs the collectives, from one process with eight devices."""
    output = tmp_path_factory.mktemp("plans") / "plans.json"
    environment = os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8"}
    code = f"import runpy; runpy.run_path({__file__!r})['plan_all']({str(output)!r})"
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(output.read_text())


def test_a_quick_plan_says_so(plans):
    said = [name for name in PLANNED if "compiled with XLA's least effort" in plans[name]["text"]]
    assert said == [QUICK]


def plan_all(output):
    """Run by the fixture above."""
    import runpy

    import jax

    jax.config.update("jax_default_prng_impl", "rbg")  # XLA takes most of the time to compile threefry for CPUs
    found = {"programs": small_programs()}
    for name, changes in PLANNED.items():
        file, _, variant = name.partition(":")
        config = runpy.run_path(str(ROOT / "configs" / f"{file}.py"))["get_config"](variant)
        config.update_from_flattened_dict(changes)
        latents = "" if config.task != "generator" else "4x4:16" if file == "maskgit" else "4x4x4"
        found[name] = plan.plan(config, "here", latents=latents, classes=10, sizes=2, quick=name == QUICK)
        found[name]["text"] = plan_text(found[name])
    assert not jax.live_arrays() or max(array.nbytes for array in jax.live_arrays()) < 2**16   # nothing was computed
    pathlib.Path(output).write_text(json.dumps(found))


def plan_text(numbers):
    from eqvae_jax.planning.document import as_text

    return as_text(numbers)


def small_programs():
    """Collectives and loops of programs of which they are known: 1 MiB gathered, and five all-reduces in a loop."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from eqvae_jax.planning.rehearsal import Rehearsal

    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec("fsdp"), PartitionSpec()))
    rehearsal = Rehearsal()
    weight = rehearsal.values(jax.ShapeDtypeStruct((512, 512), jnp.float32, sharding=split))
    held = rehearsal.held()
    gathered = rehearsal(jax.jit(lambda a: a * 2, out_shardings=whole), weight)

    def loop(a):
        return jax.lax.fori_loop(0, 5, lambda i, total: jnp.sin((a * total).sum(0)), jnp.ones(512))

    rehearsal(jax.jit(loop, out_shardings=whole), weight)
    return {"held": held, "gathered": rehearsal.held() - held, "shape": gathered.shape,
            "collectives": [list(map(list, one.program.traffic.collectives)) for one in rehearsal.calls]}


def test_collectives_of_known_sizes(plans):
    found = plans["programs"]
    assert (found["held"], found["gathered"]) == (2**20 // 8, 2**20)
    gather, loop = found["collectives"]
    assert gather == [["all-gather", 2**20, 8, 1]]
    assert loop == [["all-reduce", 512 * 4, 8, 5]]


@pytest.mark.parametrize("name", PLANNED)
def test_every_config_is_planned(plans, name):
    found = plans[name]
    assert found["devices"] == 8 and found["memory"]["peak"] > found["memory"]["state"] / 8 > 0
    assert found["memory"]["fits"] is None and "roofline" not in found and "no roofline" in found["text"]
    assert found["flops"]["computed_per_example"] > 0 and found["unknown_loops"] == 0
    model = found["flops"]["model_per_example"]
    extra = {"repa:smoke": 1.0, "fashion_classifier:smoke": None}.get(name, 0.03)  # the encoder's; none is counted
    if extra is None:
        assert model is None and "an unknown number" in found["text"]
    elif extra < 1:
        assert found["flops"]["computed_per_example"] == pytest.approx(model, rel=extra)
    else:
        assert found["flops"]["computed_per_example"] > model


def test_the_batch_is_the_configs_where_it_divides(plans):
    assert (plans["eq_sdvae:smoke"]["batch"], plans["eq_sdvae:smoke"]["per_device_batch"]) == (2 * 8 * 2, 2)
    assert (plans["dit:smoke"]["batch"], plans["dit:smoke"]["per_device_batch"]) == (8, 1)
    assert "batch of 4 does not divide over 8 devices" in plans["dit:smoke"]["text"]


def test_gradients_are_reduced_once_and_split_parameters_gathered(plans):
    whole, split = plans["dit:smoke"], plans["sit:smoke"]
    gradients = whole["memory"]["state"] / 4  # parameters, two moments, an average
    assert whole["collectives"]["all-reduce"]["bytes"] == pytest.approx(gradients, rel=0.02)
    assert set(whole["collectives"]) == {"all-reduce"} and "all-gather" in split["collectives"]
    assert split["memory"]["state"] < whole["memory"]["state"] / 2


def test_an_autoencoders_step_is_the_mean_over_tau(plans):
    found = plans["eq_sdvae:smoke"]
    shares = {variant["name"]: variant["share"] for variant in found["variants"]}
    assert sum(shares.values()) == pytest.approx(1) and len(shares) == 1 + 3
    assert shares["full size"] == pytest.approx(0.5, abs=0.03)
    assert [v["name"] for v in found["variants"] if not v["compiled"]] == ["latent 16 x 16"]
    flops = {name: step["flops"] for name, step in found["steps"].items()}
    assert flops["latent 10 x 10"] < flops["latent 24 x 24"] < flops["full size"]
    assert min(flops.values()) < found["flops"]["computed_per_example"] * found["batch"] / 8 < flops["full size"]
    programs = [program["name"] for program in found["programs"]]
    assert programs.count("update") == programs.count("take") == 1 and programs.count("decode") == 3
    assert found["memory"]["beside"] > 0 and "4 kinds of steps, 3 compiled" in found["text"]


@pytest.mark.parametrize("name, message", [
    ("v5e", "a colon and the sides of the slice: v5e:4x4"), ("v9:4x4", "v4, v5e, v5p, v6e"),
    ("v5e:4x4x4", "have 2 sides"), ("v4:4x4", "have 3 sides, such as 2x2x1"),
    ("v5e:4", "it must be a chip"), ("", "it must be a chip"),
])
def test_a_topology_that_is_none_is_refused_with_examples(name, message):
    with pytest.raises(ValueError, match=message):
        topology.check(name)


def test_without_its_compiler_a_slice_is_refused_with_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install libtpu"):
        topology.check("v5e:4x4")
    topology.check("here")


@pytest.mark.parametrize("text, shape, tokens", [("32x32x4", (32, 32, 4), False), ("16x16:1024", (16, 16), True)])
def test_latents_are_read(text, shape, tokens):
    found = parse_latents(text, 10)
    assert (found.shape, found.is_tokens, found.manifest["classes"]) == (shape, tokens, 10)


@pytest.mark.parametrize("text", ["32x32", "32", "a", "16x16:1024:3", "32x32x4x4"])
def test_latents_that_are_none_are_refused(text):
    with pytest.raises(ValueError, match="32x32x4"):
        parse_latents(text, 10)


@pytest.mark.parametrize("arguments, message", [
    (["--topology=v9:2x2"], "topology is 'v9:2x2'"), (["--topology=here", "--sizes=0"], "--sizes=0"),
    (["--topology=here", "--json=nowhere/plan.json"], "there is no directory"),
    (["--topology=here", "--config.model.pressed=3"], "pressed"),
])
def test_what_cannot_be_is_refused_before_anything_is_compiled(arguments, message):
    command = [sys.executable, "-m", "eqvae_jax.plan", "--config=configs/dit.py:smoke", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert ended.returncode == 1 and message in ended.stderr and "compiling" not in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, the TPU's compiler")
def test_a_slice_that_is_not_there(tmp_path):
    output = tmp_path / "plan.json"
    command = [sys.executable, "-m", "eqvae_jax.plan", "--config=configs/dit.py:smoke", "--topology=v5e:2x2",
               "--latents=4x4x4", f"--json={output}"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads(output.read_text())
    assert (found["device"], found["devices"], found["memory"]["fits"]) == ("TPU v5 lite", 4, True)
    assert found["roofline"]["step"] > 0 and "all-reduce" in found["collectives"] and "dominates" in ended.stdout
