import html.parser
import json
import re

import pytest
import toy_autoencoder as toys

from eqvae_jax import report, weights
from eqvae_jax.evaluation import figures
from eqvae_jax.training import checkpoint

HOSTILE = "<script>alert('$x_1$')</script>&\"quoted\" tau"


class Checker(html.parser.HTMLParser):
    """Fails on elements that are not closed in order; collects text, images and everything that could fetch."""

    VOID = {"meta", "img", "br"}

    def __init__(self):
        super().__init__()
        self.open, self.text, self.images, self.fetching, self.tags = [], [], [], [], set()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        attributes = dict(attributes)
        if tag == "img":
            assert attributes["alt"]
            self.images.append(attributes["src"])
        self.fetching += [attributes[k] for k in ("href", "src", "srcset", "action", "data") if k in attributes]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parse(path):
    checker = Checker()
    checker.feed(path.read_text(encoding="utf-8"))
    checker.close()
    assert not checker.open
    return checker


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    """Three finished runs whose last path component is the toy's tilt."""
    root, runs = tmp_path_factory.mktemp("runs"), {"before": "1.0", "control": "0.5", HOSTILE: "0.0"}
    for i, tilt in enumerate(runs.values()):
        path = root / tilt
        path.mkdir()
        config = {"data": {"image_size": 32}, "equivariance": {"p_equivariance": 0.5 * i}, "note": "</pre><b>"}
        (path / "config.json").write_text(json.dumps(config))
        rows = [{"step": s, "split": "train", "nll": 5.0 / s} for s in range(1, 30)]
        rows += [{"step": s, "split": "eval", "psnr": 20.0 + s} for s in (10, 20)]
        (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "load_autoencoder", toys.load)
        patch.setattr(checkpoint, "saved_steps", lambda workdir: [20, 28])  # a kill lost the checkpoint of step 29
        yield {name: root / tilt for name, tilt in runs.items()}


@pytest.fixture(scope="module")
def compared(workdirs, tmp_path_factory):
    """(what report.compare returns, the folder it wrote)."""
    output = tmp_path_factory.mktemp("report")
    return report.compare(workdirs, images="photos:test", output=output, batch_size=2, limit=2), output


def test_a_comparison_leaves_numbers_and_figures(workdirs, compared):
    document, output = compared
    assert list(document["results"]) == list(workdirs) and document["baseline"] == "control"
    column = document["results"][HOSTILE]
    assert column["R"] == pytest.approx(0, abs=1e-8) and {"psnr", "ssim", "S", "pixel_l1/R"} <= set(column)
    assert document["runs"]["control"]["step"] == 28 and document["images"]["image_size"] == 32
    assert column["intrinsic_dimension"] is None and len(document["warnings"]) == 3  # two images are too few for TwoNN
    assert json.loads((output / "metrics.json").read_text(), parse_constant=pytest.fail) == document
    stems = {path.stem for path in output.glob("*.png")}
    assert stems == {"tau_1", "tau_2", "latent_pca", "spectrum", "reconstruction", "errors", "transforms", "curves"}
    assert stems == {path.stem for path in output.glob("*.pdf")}
    assert HOSTILE in report.format_table(document) and "against control" in report.verdict(document)


def test_the_page_is_well_formed_and_needs_nothing_else(compared):
    path = compared[1] / "report.html"
    page = parse(path)
    assert len(page.images) == 8 and all(source.startswith("data:image/png;base64,") for source in page.fetching)
    assert not page.tags & {"script", "link", "iframe", "object", "form", "a"}
    text = "".join(page.text)
    assert HOSTILE in text and "</pre><b>" in text  # there to be read, not to be run
    assert "control: no intrinsic dimension: TwoNN has 2 different points of 2" in text
    assert "equivariance.p_equivariance" in text and "weights 0123456789abcdef" in text
    assert not re.search(r"https?://|url\(|@import|<script", path.read_text(encoding="utf-8"))


def test_the_page_marks_the_best_and_shows_changes(compared):
    raw = (compared[1] / "report.html").read_text(encoding="utf-8")
    row = next(line for line in raw.splitlines() if "R, mean of the turns" in line)
    cells = re.findall(r'<td class="number">(.*?)</td>', row)
    assert len(cells) == 3 and cells[2].startswith("<b>0.0000</b>") and "−100%" in cells[2]
    assert "<b>" not in cells[0] + cells[1] and "small" not in cells[1]


def test_one_run_has_no_comparison(workdirs, compared, tmp_path, capsys, monkeypatch):
    some = compared[1] / "errors.png"  # drawing is tested above
    monkeypatch.setattr(figures, "save", lambda figure, path: (some, None))
    arguments = ["--batch_size=2", "--limit=1", f"--output={tmp_path / 'one'}"]
    code = report.main([f"--workdir={workdirs['control']}", *arguments])
    out = capsys.readouterr().out
    assert code == 0 and "report.html" in out and "0.5" in out
    page = parse(tmp_path / "one" / "report.html")
    assert "against" not in "".join(page.text).split("Numbers")[0] and "change from" not in "".join(page.text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--runs", "a=/nowhere"], "/nowhere is not the workdir of a run"),
        (["--runs", "nowhere"], "nowhere is not the workdir of a run"),
        (["--runs", "a=CONTROL", "a=CONTROL"], "two columns are called 'a'"),
        (["--workdir=CONTROL", "--crops=2", "--max_crop=0"], "max_crop=0"),
        (["--workdir=CONTROL", "--images=nonsense"], "nonsense"),
        (["--workdir=CONTROL", "--image_size=33"], "take 32 or 36"),
    ],
)
def test_what_cannot_work_is_refused(workdirs, tmp_path, capsys, arguments, message):
    arguments = [text.replace("CONTROL", str(workdirs["control"])) for text in arguments]
    assert report.main([*arguments, f"--output={tmp_path / 'out'}"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "report.html").exists()


def generator_run(root, name, distances, task="generator"):
    """A workdir as far as a report of generators looks at it."""
    workdir = root / name
    (workdir / "previews").mkdir(parents=True)
    rows = [{"step": step, "split": "eval", "loss": 1.0 / step, "FID(toy)_of_5": value} for step, value in distances]
    rows += [{"step": step, "split": "train", "loss": 2.0 / step, "learning_rate": 0.1} for step in range(1, 9)]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (workdir / "config.json").write_text(json.dumps({"task": task, "data": {"latents": name}, "seed": 0}))
    return f"{name}={workdir}"


def test_generators_are_compared_by_how_fast_they_learn(tmp_path, capsys):
    runs = [generator_run(tmp_path, "control", [(4, 20.0), (8, 10.0)]),
            generator_run(tmp_path, "eq", [(4, 12.0), (8, 4.0)])]
    assert report.main(["--runs", *runs, f"--output={tmp_path / 'report'}"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"step +8 +8\n", printed) and re.search(r"FID\(toy\)_of_5 +10 +4\n", printed)
    assert re.search(r"steps until FID\(toy\)_of_5 is control's last +5\n", printed)  # 12 at 4, 10 at 5, 4 at 8
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        "metrics.json", "report.html", "convergence_0.png", "convergence_0.pdf", "curves.png", "curves.pdf"}
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "data.latents" in page
    assert report.main(["--runs", runs[0], generator_run(tmp_path, "other", [(1, 1.0)], task="autoencoder"),
                        f"--output={tmp_path / 'x'}"]) == 2
    assert "control: of generators, and the other runs are not" in capsys.readouterr().err
