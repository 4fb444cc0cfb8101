import json
import subprocess
import sys

import pytest

from eqvae_jax.evaluation import provenance, tables

KEYS = ("psnr", "ssim", "R/90", "R", "S/0.5", "S", "pixel_l1/90", "pixel_l1/R")
RESULTS = {
    "before": dict(zip(KEYS, (24.0, 0.7, 0.8, 0.8, 0.4, 0.4, 0.3, 0.3), strict=True)),
    "control": dict(zip(KEYS, (25.0, 0.7, 0.9, 0.9, 0.0, 0.0, 0.32, 0.32), strict=True)),
    "EQ": dict(zip(KEYS, (24.5, 0.7, 0.3, 0.3, 0.1, None, 0.1, 0.1), strict=True)),
}
DOCUMENT = {
    "results": RESULTS,
    "baseline": "control",
    "images": {"count": 12, "image_size": 64, "reference": "photos:test"},
}


def line(text, label):
    return next(line.split() for line in text.splitlines() if line.strip().startswith(label))


def test_a_line_holds_values_changes_from_the_control_and_one_star():
    text = tables.format_table(DOCUMENT)
    assert line(text, "PSNR") == ["PSNR,", "dB", "higher", "24.00", "(-1.00)", "25.00*", "24.50", "(-0.50)"]
    assert line(text, "R, mean")[-6:] == ["lower", "0.8000", "(-11%)", "0.9000", "0.3000*", "(-67%)"]
    assert line(text, "SSIM").count("0.7000") == 3 and "*" not in " ".join(line(text, "SSIM"))


def test_missing_values_and_zero_baselines_have_no_change():
    text = tables.format_table(DOCUMENT)
    assert line(text, "S, mean")[-4:] == ["lower", "0.4000", "0.0000*", "n/a"]
    assert line(text, "scale 0.5")[-3:] == ["0.4000", "0.0000*", "0.1000"]


def test_columns_are_aligned_and_plain_ascii():
    text = tables.format_table(DOCUMENT)
    assert text.isascii()
    ends = {row.index("24.00") + len("24.00") for row in text.splitlines() if "24.00" in row}
    ends |= {row.index("0.8000") + len("0.8000") for row in text.splitlines() if "0.8000" in row}
    assert len(ends) == 1
    assert "12 images of 64 x 64 pixels from photos:test" in text and "change from control" in text


def test_one_column_has_neither_stars_nor_changes():
    text = tables.format_table(DOCUMENT | {"results": {"EQ": RESULTS["EQ"]}, "baseline": "EQ"})
    assert "*" not in text and "(" not in text.replace("D(", "").replace("E(", "")
    assert tables.verdict(DOCUMENT | {"results": {"EQ": RESULTS["EQ"]}, "baseline": "EQ"}) == ""


def test_codebooks_and_what_is_above_the_floor_have_groups_of_their_own():
    keys = ("codebook_usage", "codebook_perplexity", "floor_l1/R", "excess_l1/R")
    results = {
        "KL": {"floor_l1/R": 0.1, "excess_l1/R": 0.05},
        "VQ": dict(zip(keys, (0.5, 100.04, 0.2, 0.01), strict=True)),
        "EQ": dict(zip(keys, (0.75, 120.0, 0.15, -0.02), strict=True)),
    }
    text = tables.format_table(DOCUMENT | {"results": results, "baseline": "VQ"})
    assert line(text, "share of the codes") == "share of the codes in use higher n/a 0.5000 0.7500* (+0.2500)".split()
    assert line(text, "perplexity")[-4:] == ["n/a", "100.0", "120.0*", "(+20.0)"]
    above = text.split("Above the floor")[1]  # differences: the numbers are around zero
    assert line(above, "mean of the turns")[4:] == "lower 0.0500 (+0.0400) 0.0100 -0.0200* (-0.0300)".split()
    assert "%" not in above
    assert "Codebook" not in tables.format_table(DOCUMENT)
    assert tables.cell(tables.Row("", "", "lower", 4, "difference"), -1e-6) == "0.0000"  # without a sign


def test_what_has_no_better_has_neither_star_nor_change_and_warnings_stand_below():
    results = {"before": {"latent_std": 2.0, "intrinsic_points": 1000.0, "intrinsic_dimension": 62.2},
               "EQ": {"latent_std": 3.0, "intrinsic_points": 1000.0, "intrinsic_dimension": 39.4}}  # fmt: skip
    text = tables.format_table(DOCUMENT | {"results": results, "baseline": "before", "warnings": ["too few", "x"]})
    assert line(text, "standard deviation")[2:] == ["2.000", "3.000"]
    assert line(text, "points it rests")[4:] == ["1000", "1000"]
    assert line(text, "intrinsic dimension")[-4:] == ["lower", "62.2", "39.4*", "(-37%)"]
    assert text.endswith("photos:test\nnote: too few\nnote: x")


def test_rfid_is_printed_with_its_features():
    keys = ("rfid(fashion-cnn)", "rfid(fashion-cnn)/90", "rfid(fashion-cnn)_R", "R/90")
    results = {name: dict(zip(keys, values, strict=True))
               for name, values in {"before": (4.0, 80.0, 80.0, 1), "EQ": (5.0, 10.0, 10.0, 1)}.items()}  # fmt: skip
    document = DOCUMENT | {"results": results, "baseline": "before"}
    text = tables.format_table(document)
    assert line(text, "rFID(fashion-cnn)  ") == ["rFID(fashion-cnn)", "lower", "4.00*", "5.00", "(+25%)"]
    under = text.split("rFID(fashion-cnn) of D(tau E(x)) against tau x")[1]
    assert line(under, "90 degrees") == ["90", "degrees", "lower", "80.00", "10.00*", "(-88%)"]


def test_the_verdict_states_factors_either_way():
    expected = "EQ against control: R 3.00x lower, pixel error under turns 3.20x lower, PSNR 0.50 dB lower."
    assert tables.verdict(DOCUMENT) == expected
    worse = DOCUMENT | {"results": {"EQ": RESULTS["EQ"], "late": RESULTS["before"]}, "baseline": "EQ"}
    assert tables.verdict(worse).startswith("late against EQ: R 2.67x higher")


def test_the_baseline_is_the_control_or_the_first():
    assert tables.baseline(["before", "control", "EQ"]) == "control"
    assert tables.baseline(["a", "b"]) == "a"


def test_json_has_no_nan_and_is_written_whole(tmp_path):
    path = tmp_path / "deep" / "metrics.json"
    provenance.write_json(path, {"a": [float("nan"), 1.5], "b": {"c": float("inf")}, 3: "ü"})
    loaded = json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert loaded == {"a": [None, 1.5], "b": {"c": None}, "3": "ü"}
    with pytest.raises(TypeError):
        provenance.write_json(path, {"a": object()})
    with pytest.raises(KeyboardInterrupt), provenance.whole(path) as partial:
        partial.write_text("half a")
        raise KeyboardInterrupt
    assert json.loads(path.read_text(encoding="utf-8")) == loaded
    assert [file.name for file in path.parent.iterdir()] == ["metrics.json"]


def test_software_names_versions_devices_and_commit():
    software = provenance.software()
    assert software["python"] == ".".join(map(str, sys.version_info[:3])) and software["jax"]
    assert "cpu" in software["devices"]
    commit = provenance.commit()
    assert commit is None or len(commit.removesuffix("-dirty")) == 40


def test_the_commit_of_another_checkout_is_not_claimed(tmp_path, monkeypatch):
    author = ["-c", "user.name=A", "-c", "user.email=a@b"]
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    subprocess.run(["git", *author, "commit", "-q", "--allow-empty", "-m", "x"], cwd=tmp_path, check=True)
    package = tmp_path / "site-packages" / "eqvae_jax" / "evaluation"
    package.mkdir(parents=True)
    monkeypatch.setattr(provenance, "__file__", str(package / "provenance.py"))
    assert provenance.commit() is None
