"""What a result says: numbers beside the paper's, verdicts, where they came from; the paper's recipe as a script."""

import argparse
import json
import re
import subprocess

import pytest

from eqvae_jax import recipes
from eqvae_jax.reproduce import FIGURES, TABLES
from eqvae_jax.reproduction import document, estimates, provenance, recipe
from eqvae_jax.reproduction.bench import Bench, Measure
from eqvae_jax.reproduction.claims import Claim
from eqvae_jax.reproduction.experiment import Column, Experiment
from eqvae_jax.reproduction.scales import SCALES
from eqvae_jax.reproduction.stages import DOORS, Stage, in_order

COLUMNS = (Column("gFID", 1), Column("PSNR", 2, "higher"))
EXPERIMENT = Experiment(
    "A table", "What it compares.", COLUMNS, ("plain", "EQ", "other"),
    {("plain", "gFID"): 43.8, ("EQ", "gFID"): 34.1, ("other", "PSNR"): 25.0}, lambda bench: {},
    (Claim("EQ lowers gFID", ("EQ", "gFID"), ("plain", "gFID")),
     Claim("of nothing", ("other", "gFID"), ("EQ", "gFID"))))
NUMBERS = {0: {("plain", "gFID"): 12.0, ("EQ", "gFID"): 10.0, ("EQ", "PSNR"): 20.125},
           1: {("plain", "gFID"): 14.0, ("EQ", "gFID"): 12.2, ("EQ", "PSNR"): None}}


@pytest.fixture
def found():
    return document.document(EXPERIMENT, NUMBERS, {"command": "python -m x <y>", "commit": "abc"})


def test_markdown_has_both_numbers_and_the_verdict(found):
    lines = document.as_markdown(EXPERIMENT, found).splitlines()
    assert "|  | gFID ↓, paper | ours | PSNR ↑, paper | ours |" in lines
    assert "| plain | 43.8 | 13.0 ± 1.0 | – | – |" in lines
    assert "| EQ | 34.1 | 11.1 ± 1.1 | – | no number |" in lines
    assert "| other | – | – | 25 | – |" in lines
    claims = [line for line in lines if "EQ lowers gFID" in line]
    assert len(claims) == 1 and "**holds**" in claims[0] and "difference +1.9, interval +0.629 to +3.17" in claims[0]
    assert not any("of nothing" in line for line in lines)  # what this scale cannot measure is not judged
    assert "- commit: abc" in lines


def test_columns_without_numbers_of_the_papers_have_no_place_for_them():
    found = document.document(EXPERIMENT._replace(paper={("EQ", "PSNR"): 25.0}), NUMBERS, {})
    lines = document.as_markdown(EXPERIMENT._replace(paper={("EQ", "PSNR"): 25.0}), found).splitlines()
    assert "|  | gFID ↓ | PSNR ↑, paper | ours |" in lines and "| plain | 13.0 ± 1.0 | – | – |" in lines


def test_the_page_needs_nothing_else_and_escapes(found):
    text = document.as_html(EXPERIMENT, found)
    assert "python -m x &lt;y&gt;" in text and "13.0 ± 1.0" in text and "holds" in text
    assert not re.search(r"(src|href)=.http", text) and "<script" not in text


def test_numbers_are_read_without_the_networks_name(tmp_path):
    stage = Stage("a", "evaluate", ("generation",))
    stage.folder(tmp_path).mkdir(parents=True)
    results = {"model": {"fid(fashion-cnn)": 3.5, "rfid(fashion-cnn)_R": 2.5, "R": None}}
    (stage.folder(tmp_path) / "metrics.json").write_text(json.dumps({"results": results}))
    measured = {("r", name): Measure(stage, key) for name, key in (("a", "fid"), ("b", "rfid_R"), ("c", "R"))}
    experiment = EXPERIMENT._replace(measured=lambda bench: measured)
    assert document.collect(experiment, [Bench(SCALES["smoke"], 4)], tmp_path) == {
        4: {("r", "a"): 3.5, ("r", "b"): 2.5, ("r", "c"): None}}
    measured[("r", "f")] = Measure(Stage("failed", "evaluate", ("latents",)), "R")
    assert document.collect(experiment, [Bench(SCALES["smoke"], 4)], tmp_path)[4]["r", "f"] is None
    with pytest.raises(ValueError, match="has no psnr, only R, fid, rfid_R"):
        measured[("r", "d")] = Measure(stage, "psnr")
        document.collect(experiment, [Bench(SCALES["smoke"], 4)], tmp_path)


AUTOENCODERS_ONLY = {"1", "7", "12", "beyond"}  # tables of which photographs measure something


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", TABLES)
def test_tables_are_whole(name, scale):
    """Rows and columns are the same everywhere, and every claim that can be made is about numbers that are measured."""
    experiment, bench = TABLES[name](), Bench(SCALES[scale])
    if scale == "photos" and name in {"3", "4"}:
        with pytest.raises(ValueError, match="no generators"):
            experiment.measured(bench)
        return
    measured = experiment.measured(bench)
    cells = {(row, column.name) for row in experiment.rows for column in experiment.columns}
    assert set(experiment.paper) <= cells and set(measured) <= cells
    claimed = {cell for claim in experiment.claims for cell in (claim.less, claim.more)}
    if scale == "photos":
        assert bool(measured) == (name in AUTOENCODERS_ONLY) and not {"gFID", "rFID", "ID"} & {c for _, c in measured}
        return
    assert claimed <= set(measured)
    papers = {claim.text: experiment.paper[claim.more] - experiment.paper[claim.less] for claim in experiment.claims
              if claim.less in experiment.paper and claim.more in experiment.paper}
    assert all(difference >= 0 for difference in papers.values()), papers  # each claim is the paper's own


def visited(stages):
    """These stages and all they need, as often as they are needed."""
    for stage in stages:
        yield stage
        yield from visited(stage.inputs)


@pytest.mark.parametrize("scale", SCALES)
def test_every_command_parses(scale):
    """Of every experiment, each kind of command once: flags exist, configs resolve, and names of folders are plain."""
    benches, whole = [Bench(SCALES[scale], seed) for seed in (0, 1)], scale != "photos"
    wanted = [measure.stage for bench in benches for name, table in TABLES.items() if whole or name in AUTOENCODERS_ONLY
              for measure in table().measured(bench).values()]
    wanted += [stage for name, figure in FIGURES.items() if whole or name == "2"
               for stage, _, _ in figure().pictures(benches[0])]
    stages = in_order(wanted)
    names = {(stage.key, stage.name) for stage in visited(wanted)}
    assert len(names) == len({key for key, _ in names}) == len({name for _, name in names})  # a name for a key
    for stage in stages:
        assert re.fullmatch(r"[a-z0-9.-]+", stage.folder("").name) and stage.door in DOORS
        if stage.door == "main":
            recipe.resolved(stage)  # raises where a flag names no field, or a value of another type
        else:
            module = __import__(f"eqvae_jax.{stage.door}", fromlist=["_parser"])
            module._parser().parse_args(stage.command("root")[3:])


def test_the_papers_scale_is_a_script_with_configs_and_costs(tmp_path, monkeypatch):
    flops = lambda reference, latents="", flags=(): 2e12 if ("equivariance.p_equivariance", "0.0") in flags else 1e12
    monkeypatch.setattr(recipe, "flops_of", flops)
    stages = in_order([m.stage for m in TABLES["7"]().measured(Bench(SCALES["paper"])).values()])
    recipe.write(TABLES["7"](), stages, tmp_path, say=lambda line: None)
    script = tmp_path / "commands.sh"
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    environment = {"RUNS": "/r uns", "IMAGENET": "/i", "OPENIMAGES": "/o", "LAUNCH": "echo", "PATH": "/usr/bin:/bin"}
    printed = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, check=True).stdout
    assert len(printed.splitlines()) == len(stages)
    done = {stage for stage in stages if stage.door != "main"}
    for stage in done:
        folder = stage.folder(tmp_path / "done")
        folder.mkdir(parents=True)
        (folder / DOORS[stage.door][2]).touch()
    again = subprocess.run(["bash", script], env=environment | {"RUNS": str(tmp_path / "done")}, capture_output=True,
                           text=True, check=True).stdout
    assert len(again.splitlines()) == len(stages) - len(done)
    assert "python -m eqvae_jax.main --config=configs/eq_sdvae.py --config.data.train=folder:/o" in printed
    assert subprocess.run(["bash", script], env={"PATH": "/usr/bin:/bin"}, capture_output=True).returncode  # no RUNS

    paths = (tmp_path / "configs").iterdir()
    configs = {path.name.rpartition("-seed")[0]: json.loads(path.read_text()) for path in paths}
    assert configs["sdvae-explicit"]["equivariance"]["objective"] == "explicit"
    assert configs["sdvae-control"]["equivariance"]["p_equivariance"] == 0.0
    assert configs["dit-on-sdvae-eq"]["training"]["steps"] == recipes.load("dit:B_2").training.steps
    hours = 1e12 * 160 * 50_000 / (197e12 * 0.4) / 3600
    text = (tmp_path / "README.md").read_text()
    assert f"| sdvae eq seed 0 | 50,000 | 160 | 1,000.0 | 8.0 | {hours:,.0f} |" in text
    assert f"| sdvae control seed 0 | 50,000 | 160 | 2,000.0 | 16.0 | {2 * hours:,.0f} |" in text


def test_the_cost_is_that_of_the_arm():
    flops = lambda *flags: recipe.flops_of("eq_sdvae:smoke", flags=flags)
    sizes = ("equivariance.sizes", "(4,)")
    assert flops(("equivariance.p_equivariance", "0.0")) > flops(sizes) > 0  # decoding a quarter of the latent is less


@pytest.mark.parametrize(("flag", "value", "then"), [
    ("equivariance.sizes", "(8,)", (8,)), ("training.steps", "7", 7), ("equivariance.anisotropic", "True", True),
    ("init", "workdir:a", "workdir:a")])
def test_flags_become_values_of_their_type(flag, value, then):
    config = recipes.load("eq_sdvae:smoke")
    recipe.override(config, flag, value)
    section, _, field = flag.rpartition(".")
    assert (config[section] if section else config)[field] == then


def test_costs_are_of_the_latents_that_a_generator_gets():
    bench = Bench(SCALES["paper"])
    shapes = {kind: recipe.latents_of(bench.generator("dit", "eq", kind)) for kind in ("sdvae", "sd3vae", "sdvae16")}
    assert shapes == {"sdvae": "32x32x4", "sd3vae": "32x32x16", "sdvae16": "16x16x16"}
    assert recipe.latents_of(bench.generator("maskgit", "before", "vqgan")) == "16x16:1024"
    assert recipe.latents_of(bench.autoencoder("sdvae", "eq")) == ""


def test_latents_without_a_published_scale_are_measured_at_the_papers_scale():
    flags = lambda kind, scale="paper": Bench(SCALES[scale]).generator("dit", "eq", kind).arguments
    assert "--config.data.scale=measured" in flags("sdvae16")
    assert "--config.data.scale=measured" not in [*flags("sdvae"), *flags("sd3vae")]


def test_a_share_of_the_steps_has_that_share_of_the_warm_up():
    whole, part = (Bench(SCALES["tiny"]).generator("dit", "eq", "sdvae", share).arguments for share in (1.0, 0.3))
    assert "--config.training.steps=300" in part and "--config.optimizer.warmup_steps=30" in part
    assert not any("warmup" in str(word) for word in whole)


def test_provenance_says_what_was_measured_and_no_more():
    options = argparse.Namespace(table="12", figure=None, scale="tiny", jobs=2, images="idx:/here")
    bench, record = Bench(SCALES["tiny"]), {"commit": "abc, def", "seconds": 60.0, "attempts": 1}
    stages = in_order([measure.stage for measure in TABLES["12"]().measured(bench).values()])
    found = provenance.how(options, bench.scale, [0, 1], stages, [record] * (len(stages) - 1))
    assert found["command"].endswith("--workdir=DIR --images=idx:DIR") and "control" in found["baseline"]
    assert found["steps"] == ("sdvae 1,200 or 800 steps; sdvae EQ 800 steps; vqgan 1,200 or 800 steps; "
                              "vqgan EQ 800 steps")
    assert found["measured"] == ("reconstruction of 5,000 test images, Fréchet distances in the features of "
                                 "configs/fashion_classifier.py:tiny")
    assert found["commit"] == "abc, def (the stages are of several); of 1 stages it is not known"
    assert found["time"].startswith("at least ")
    known = provenance.how(options, bench.scale, [0], stages, [record | {"commit": "None"}] * len(stages))
    assert known["commit"].startswith("version ") and not known["time"].startswith("at least")
    stages = in_order([measure.stage for measure in TABLES["8"]().measured(bench).values()])
    assert "generation of 5,000 samples against the test set" in provenance.measured(stages, bench.scale)
    photos = Bench(SCALES["photos"])
    stages = in_order([measure.stage for measure in TABLES["12"]().measured(photos).values()])
    assert provenance.measured(stages, photos.scale) == ["reconstruction of 3 test images"]
    assert "intervals say nothing of other images" in provenance.how(options, photos.scale, [0], stages, [])["images"]


def test_estimates_are_what_was_measured_last_and_a_guess_before():
    stage = Stage("a", "main", (), ("dit step", 100))
    assert estimates.seconds(stage) == estimates.START + 100 * estimates.GUESSES["dit step"]
    records = [{"work": ["dit step", 10], "seconds": estimates.START + 90}, {"work": ["dit step", 10],
                                                                           "seconds": estimates.START + 20}]
    records += [{"work": ["dit step", 10], "seconds": 1.0, "attempts": 2}]  # of which most was done before
    assert estimates.seconds(stage, estimates.rates(records)) == estimates.START + 200
    assert estimates.seconds(stage._replace(work=("unheard of", 1))) is None


def test_a_damaged_record_is_named(tmp_path):
    stage = Stage("a", "evaluate", ("latents",))
    stage.record(tmp_path).parent.mkdir()
    stage.record(tmp_path).write_text("{")
    with pytest.raises(ValueError, match=str(stage.record(tmp_path))):
        document.records([stage], tmp_path)
