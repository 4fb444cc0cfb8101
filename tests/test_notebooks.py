"""The notebooks of colab/: how they are stored, and that every cell works, in a tiny setting."""

import ast
import copy
import gzip
import importlib.util
import pathlib
import struct
import subprocess
import sys
import types

import numpy as np
import pytest

from eqvae_jax.data.sources import open_source

ROOT = pathlib.Path(__file__).resolve().parents[1]
NAMES = ("quickstart", "generate", "tpu")
# Presses the notebook's stop button, and saves when it is told to end.
STOPPED = """trap 'echo "waited, saved"; exit' TERM; sleep 0.5; kill -INT $PPID; while true; do sleep 0.1; done"""
nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")


def read(name):
    return nbformat.read(ROOT / "colab" / f"{name}.ipynb", as_version=4)


def cell_of(notebook, cell_id):
    return next(cell for cell in notebook.cells if cell.id == cell_id)


def with_settings(notebook, **values):
    """A copy whose cell of settings assigns these values instead; all must be settings of it."""
    notebook = copy.deepcopy(notebook)
    (cell,) = [cell for cell in notebook.cells if "settings" in cell.metadata.get("tags", ())]
    lines = cell.source.splitlines()
    for name, value in values.items():
        (place,) = [number for number, line in enumerate(lines) if line.startswith(f"{name} = ")]
        lines[place] = f"{name} = {value!r}"
    cell.source = "\n".join(lines)
    return notebook


def execute(notebook, directory, **options):
    """Runs every cell in a kernel that starts in `directory`; raises at the first cell that fails."""
    # As tests/conftest.py says: a CPU build of torch may be beside a torchvision that it cannot run.
    hide = nbformat.v4.new_code_cell("import sys\nsys.modules['torchvision'] = None", id="hide")
    notebook.cells.insert(0, hide)
    where = {"metadata": {"path": str(directory)}}
    nbclient.NotebookClient(notebook, timeout=1200, resources=where, **options).execute()  # a cell, on a busy host
    return notebook


@pytest.fixture
def runtime(tmp_path):
    """A directory like Colab's, with the checkout where the set-up cell clones it."""
    (tmp_path / "eqvae_jax").symlink_to(ROOT)
    return tmp_path


def printed(cell):
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def pictures(notebook):
    """{cell's id: how many pictures it shows}; each must be a PNG that can be decoded, and not of one colour."""
    import base64
    import io

    from PIL import Image

    found = {}
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if "image/png" in output.get("data", {}):
                image = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"])))
                assert np.asarray(image.convert("RGB")).std() > 1, cell.id
                found[cell.id] = found.get(cell.id, 0) + 1
    return found


@pytest.mark.parametrize("name", NAMES)
def test_what_is_stored_is_source_alone_in_one_form(name):
    notebook, text = read(name), (ROOT / "colab" / f"{name}.ipynb").read_text()
    nbformat.validate(notebook)
    assert nbformat.writes(notebook) + "\n" == text
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert set(notebook.metadata.kernelspec) == {"display_name", "language", "name"}
    assert [cell.id for cell in notebook.cells[:2]] == ["title", "setup"]
    assert cell_of(notebook, "setup").source == cell_of(read("quickstart"), "setup").source
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"cellView", "tags"}, cell.id
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None, cell.id
            ast.parse(cell.source)  # plain Python: a command after ! or %% would go on after a failure


@pytest.mark.parametrize("name", NAMES)
def test_every_command_is_one_of_the_project(name):
    commands = []
    for cell in read(name).cells:
        for node in ast.walk(ast.parse(cell.source)) if cell.cell_type == "code" else ():
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "run":
                commands.append(ast.unparse(node.args[0]).strip("f'\"").split())
    modules = [words[2] for words in commands if words[:2] == ["python", "-m"] and words[2] != "pip"]
    scripts = [word for words in commands for word in words if word.startswith("launch/")]
    assert modules and all(importlib.util.find_spec(module.format(measure="evaluate")) for module in modules)
    assert scripts and all((ROOT / script).is_file() for script in scripts)


def test_set_up_clones_installs_and_stops_where_a_command_fails(tmp_path):
    origin = tmp_path / "origin"
    (origin / "launch").mkdir(parents=True)
    (origin / "launch/colab.sh").write_text("echo one more install; touch installed\n")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(origin)]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "a"]):
        subprocess.run([*git, *arguments], check=True)
    setup = cell_of(read("quickstart"), "setup").source
    assert 'REPOSITORY = ""' in setup
    cells = [setup, setup.replace('REPOSITORY = ""', f"REPOSITORY = {str(origin)!r}"),
             "run('echo', 'two words'); print(Path.cwd())", "run('test -e', 'no such file')",
             f"run('bash -c', {STOPPED!r})"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    (tmp_path / "work").mkdir()
    execute(notebook, tmp_path / "work", allow_errors=True)
    lost, found, echo, failed, stopped = notebook.cells[1:]
    assert lost.outputs[-1].ename == "RuntimeError" and "fill in REPOSITORY" in lost.outputs[-1].evalue
    assert "one more install" in printed(found) and (tmp_path / "work/eqvae_jax/installed").is_file()
    assert "two words" in printed(echo) and printed(echo).endswith("work/eqvae_jax\n")
    assert failed.outputs[-1].ename == "RuntimeError" and "ended with 1" in failed.outputs[-1].evalue
    assert "$ test -e 'no such file'" in printed(failed)
    assert stopped.outputs[-1].ename == "KeyboardInterrupt" and printed(stopped).endswith("waited, saved\n")


def test_quickstart(runtime):
    notebook = with_settings(read("quickstart"), TINY=True, SIZE=32, RUNS=str(runtime / "runs"))
    execute(notebook, runtime)
    diffusers = bool(importlib.util.find_spec("diffusers") and importlib.util.find_spec("torch"))
    assert pictures(notebook) == {name: 1 for name in ("photographs", "tau", "errors", "latents", "reconstruction",
                                                       "own")} | ({"compared": 1} if diffusers else {})
    assert "== eq (3 of 3)" in printed(cell_of(notebook, "train"))
    assert "verified" in printed(cell_of(notebook, "export"))
    assert ("differ by at most" in printed(cell_of(notebook, "compared"))) == diffusers
    assert (runtime / "runs/report.html").is_file()


def test_quickstart_from_published_weights(tmp_path, monkeypatch):
    """The other branch: its commands, which doors of the project read as they stand; training itself is the same."""
    monkeypatch.syspath_prepend(str(ROOT / "tests/documentation"))
    from doors import parse

    ran = []
    settings = {"WEIGHTS": "init:smoke", "IMAGES": "photos:train", "HELD_OUT": "photos:test", "LPIPS": "", "SIZE": 32,
                "STEPS": 1, "TINY": False, "RUNS": tmp_path,
                "run": lambda command, *words: ran.append([*command.split(), *map(str, words)])}
    exec(cell_of(read("quickstart"), "train").source, settings)
    for words in ran:
        parse(words[2].removeprefix("eqvae_jax."), words[3:])
    train, *measures = (words[3:] for words in ran)
    assert {"--config.init=init:smoke", "--config.equivariance.sizes=(1, 2, 3, 4)"} < set(train)
    assert [words[0] for words in measures] == ["equivariance", "latents", "reconstruction"]
    assert settings["models"] == {"before": "init:smoke", "eq": f"workdir:{tmp_path / 'eq'}"}


def test_upload_holds_photographs_back(tmp_path, monkeypatch):
    """The cell of the photographs, with a stand-in for Colab's file dialog."""
    source = cell_of(read("quickstart"), "photographs").source
    settings = {"IMAGES": "upload", "HELD_OUT": "photos:test", "SIZE": 32, "RUNS": str(tmp_path / "runs"),
                "Path": pathlib.Path, "Image": lambda *arguments, **options: None}
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError, match="IMAGES = 'folder:DIR'"):
        exec(source, dict(settings))

    def upload():
        for k in range(5):
            pixels = np.random.default_rng(k).integers(0, 256, (40, 40, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"photograph {k}.png")
        return {f"photograph {k}.png": b"" for k in range(5)}

    from PIL import Image

    colab = types.SimpleNamespace(files=types.SimpleNamespace(upload=upload))
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    exec(source, settings)
    named = lambda reference: [source.name(i) for source in [open_source(reference)] for i in range(len(source))]
    assert named(settings["HELD_OUT"]) == ["photograph 0.png", "photograph 4.png"]
    assert named(settings["IMAGES"]) == ["photograph 1.png", "photograph 2.png", "photograph 3.png"]


@pytest.fixture
def idx(tmp_path):
    """Files like Fashion-MNIST's, of noise, with every class."""
    directory = tmp_path / "idx"
    directory.mkdir()
    for seed, stem in enumerate(("train", "t10k")):
        images = np.random.default_rng(seed).integers(0, 256, (20, 28, 28), np.uint8)
        for what, array in (("images-idx3", images), ("labels-idx1", np.arange(20, dtype=np.uint8) % 10)):
            header = struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape)
            (directory / f"{stem}-{what}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
    return directory


def test_generate(runtime, idx):
    notebook = with_settings(read("generate"), IMAGES=f"idx:{idx}", TINY=True, LATENTS=12, SAMPLES=20,
                             RUNS=str(runtime / "runs"))
    execute(notebook, runtime)
    assert pictures(notebook) == {"images": 1, "autoencoders": 1, "latents": 1, "curves": 1, "previews": 2,
                                  "samples": 1, "one": 1}
    assert "12 latents" in printed(cell_of(notebook, "encode"))
    assert "FID(fashion-cnn)" in printed(cell_of(notebook, "samples"))


def test_tpu(runtime):
    notebook = with_settings(read("tpu"), CONFIG="configs/sit.py:smoke", FLAGS="", TOPOLOGIES="here",
                             DATA="'--config.data.latents=/mnt/runs/my latents'", RUNS=str(runtime / "runs"))
    execute(notebook, runtime)
    assert pictures(notebook) == {"memory": 1} and '"step": 2' in printed(cell_of(notebook, "smoke"))
    table = cell_of(notebook, "compare").outputs[0].data["text/markdown"]
    assert table.startswith("|  | here |\n| --- | --- |\n| chips | 1 |") and "| fits | unknown |" in table
    launched = printed(cell_of(notebook, "launch"))
    assert "tpu-vm ssh" in launched and "queued-resources create dit" in launched and "delete dit" in launched
    assert "--config.data.latents=/mnt/runs/my" in launched and "SUSPENDED" in printed(cell_of(notebook, "watch"))
