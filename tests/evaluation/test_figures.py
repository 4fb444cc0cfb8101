import io
import json
import re

import matplotlib.figure
import numpy as np
import pytest
from PIL import Image

from eqvae_jax.evaluation import charts, figures


def smooth(rng, *shape):
    """Smooth random fields in [-1, 1], which unlike noise have an orientation."""
    array = np.cumsum(np.cumsum(rng.normal(size=shape), axis=-3), axis=-2)
    return (2 * (array - array.min()) / np.ptp(array) - 1).astype(np.float32)


def test_pca_recovers_independent_components_in_order_and_agrees_with_the_image(rng):
    sources = smooth(rng, 8, 8, 3).reshape(64, 3).astype(np.float64)
    sources -= sources.mean(0)
    basis = np.linalg.qr(sources)[0] * [9.0, 4.0, 1.0]  # uncorrelated, strongest first
    mixing = np.linalg.qr(rng.normal(size=(5, 3)))[0]
    latent = (basis @ mixing.T + rng.normal(size=5)).reshape(8, 8, 5)
    image = np.kron(basis[:, :1].reshape(8, 8, 1), np.ones((4, 4, 3)))  # brightness is the first component
    rgb = figures.pca_rgb(latent, image).reshape(64, 3)
    assert rgb.min() == 0 and rgb.max() == 1  # one range for all three channels
    for channel, component in ((2, 0), (1, 1), (0, 2)):  # blue is the first
        assert abs(np.corrcoef(rgb[:, channel], basis[:, component])[0, 1]) == pytest.approx(1)
    assert np.corrcoef(rgb[:, 2], basis[:, 0])[0, 1] > 0
    flipped = figures.pca_rgb(-latent, image).reshape(64, 3)
    np.testing.assert_allclose(flipped[:, 2] - flipped[:, 2].mean(), rgb[:, 2] - rgb[:, 2].mean(), atol=1e-9)


def test_pca_of_few_channels_or_of_nothing_is_a_picture(rng):
    one = figures.pca_rgb(smooth(rng, 4, 4, 1))
    assert one.shape == (4, 4, 3) and np.ptp(one[..., 2]) == pytest.approx(1) and np.ptp(one[..., 0]) == 0
    assert np.isfinite(figures.pca_rgb(np.full((4, 4, 4), 2.5))).all()


def texts(figure):
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_text()]


def test_the_tau_grid_prints_each_error_and_marks_the_smallest(rng):
    target = {"90": smooth(rng, 16, 16, 3) / 2, "0.5": smooth(rng, 8, 8, 3) / 2}
    moved = {
        "control": {label: image + 0.25 for label, image in target.items()},
        r"$\frac$": {label: image + 0.125 for label, image in target.items()},  # must not become mathematics
    }
    figure = figures.tau_grid(target, moved)
    found = texts(figure)
    assert found.count("error 0.250") == 2 and found.count("error 0.125") == 2
    assert any("90°\n16 × 16" in text for text in found) and any("scale 0.5\n8 × 8" in text for text in found)
    bold = [text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_fontweight() == "bold"]
    assert bold == ["error 0.125", "error 0.125"]
    figure.savefig(io.BytesIO())  # draws every text


def test_with_both_orders_the_plain_reconstruction_stands_before_each_decode_of_a_moved_latent(rng):
    target = {"90": smooth(rng, 16, 16, 3) / 2}
    decodes = lambda error: {"90": target["90"] + error}
    moved = {"control": decodes(0.25), "EQ-VAE with a long name": decodes(0.125)}
    first = {"control": decodes(0.0625), "EQ-VAE with a long name": decodes(0.5)}
    figure = figures.tau_grid(target, moved, first)
    captions = [axis.get_xlabel() for axis in figure.axes]
    assert captions == ["", "error 0.062", "error 0.250", "error 0.500", "error 0.125"]
    bold = [text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_fontweight() == "bold"]
    assert bold == ["error 0.125"]  # among the moved
    titles = [axis.get_title() for axis in figure.axes]
    assert titles[1] == "control\n" + r"$D(E(\tau x))$" and titles[2] == "control\n" + r"$D(\tau E(x))$"
    shown = [np.asarray(axis.images[0].get_array()) for axis in figure.axes]
    np.testing.assert_allclose(shown[1] - shown[0], 0.0625 / 2, atol=1e-6)
    narrow = figures.tau_grid(target, moved, first, width=figures.COLUMN)
    assert narrow.get_size_inches()[0] <= figures.COLUMN + 1e-6
    assert [axis.get_xlabel() for axis in narrow.axes][1] == "0.062"
    assert narrow.axes[3].get_title().count("\n") > 1  # a long name is broken into lines


def test_samples_stand_in_rows_with_white_between_and_behind_them(rng):
    images = rng.integers(0, 250, (5, 8, 12, 3), np.uint8)
    figure = figures.sample_grid(images, columns=3, width=4)
    mosaic = np.asarray(figure.axes[0].images[0].get_array())
    assert mosaic.shape == (17, 38, 3) and figure.get_size_inches() == pytest.approx([4, 4 * 17 / 38])
    np.testing.assert_allclose(mosaic[9:, 13:25], images[4] / 255, atol=1e-6)
    assert (mosaic[8] == 1).all() and (mosaic[:, 12] == 1).all() and (mosaic[9:, 26:] == 1).all()
    floats = figures.sample_grid(images / np.float32(127.5) - 1, columns=3).axes[0].images[0].get_array()
    np.testing.assert_allclose(floats, mosaic, atol=1e-6)
    tall = figures.sample_grid(images, columns=1)
    assert tall.get_size_inches()[1] == pytest.approx(figures.HEIGHT)
    assert figures.sample_grid(images).axes[0].images[0].get_array().shape == (17, 38, 3)  # 3 x 2 is about square


@pytest.mark.parametrize("images, says", [
    (np.zeros((0, 8, 8, 3), np.uint8), "at least one image"), (np.zeros((8, 8, 3), np.uint8), "(N, H, W, 3)"),
    (np.zeros((1, 8, 8, 3), np.int32), "not int32"),
])  # fmt: skip
def test_what_is_no_set_of_samples_is_refused(images, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        figures.sample_grid(images)


def test_what_is_not_finite_is_drawn_grey(rng):
    latent = smooth(rng, 4, 4, 4)
    latent[1, 1, 0] = np.nan
    assert (figures.pca_rgb(latent) == 0.5).all()
    image = smooth(rng, 1, 8, 8, 3)
    figure = figures.reconstruction_grid(image, {"diverged": image * np.nan})
    assert (np.asarray(figure.axes[1].images[0].get_array()) == 0.5).all()


def test_figures_are_written_as_png_and_pdf_at_paper_width(rng, tmp_path):
    images = smooth(rng, 2, 16, 16, 3)
    latents = {"before": smooth(rng, 2, 4, 4, 4), "EQ": smooth(rng, 2, 4, 4, 4)}
    before = dict(matplotlib.rcParams)
    for name, figure in {
        "latent": figures.latent_pca(images, latents),
        "reconstruction": figures.reconstruction_grid(images, {"EQ": images * 0.9, "exact": images}),
    }.items():
        png, pdf = figures.save(figure, tmp_path / "figures" / name)
        assert Image.open(png).width / 200 <= figures.WIDTH + 0.1
        assert pdf.read_bytes().startswith(b"%PDF")
    assert dict(matplotlib.rcParams) == before
    assert "inf dB" in texts(figures.reconstruction_grid(images, {"exact": images}))


def test_bars_stand_for_the_numbers_and_leave_out_what_was_not_measured():
    results = {"control": {"R/90": 0.5, "R": 0.5}, "EQ": {"R/90": 0.125, "R": None}}
    figure = charts.bars(results)
    (axis,) = [axis for axis in figure.axes if axis.get_visible()]
    heights = [[bar.get_height() for bar in container] for container in axis.containers]
    assert heights == [[0.5, 0.5], [0.125, 0.0]]
    found = texts(figure)
    assert ".50" in found and ".12" in found and "n/a" in found and "90°" in found
    figure.savefig(io.BytesIO())  # draws every text


def test_titles_say_which_way_is_better_where_there_is_one():
    titles = {("train", "codebook_usage"): "higher", ("eval", "codebook_perplexity"): "higher", ("train", "kl"): "",
              ("train", "l1"): "lower", ("eval", "rotation_error_90"): "lower", ("eval", "ssim"): "higher"}
    for (split, key), way in titles.items():
        assert charts._title(split, key).split("\n")[1] == (f"{way} is better" if way else "")


def test_a_line_across_the_bar_of_a_pixel_error_is_its_floor():
    shared = {"R/90": 0.5, "R": 0.5, "pixel_l1/90": 0.3, "pixel_l1/R": 0.3}
    floors = {"control": (0.1, 0.2), "EQ": (None, 0.25)}
    results = {name: shared | {"floor_l1/90": turn, "floor_l1/R": mean} for name, (turn, mean) in floors.items()}
    latent, pixels = [axis for axis in charts.bars(results).axes if axis.get_visible()]
    lines = [[path.vertices for path in collection.get_paths()] for collection in pixels.collections]
    assert [[path[0, 1] for path in paths] for paths in lines] == [[0.1, 0.2], [0.25]] and not latent.collections
    for path, bar in zip(lines[0] + lines[1], [*pixels.containers[0], pixels.containers[1][1]], strict=True):
        assert path[:, 0] == pytest.approx([bar.get_x(), bar.get_x() + bar.get_width()])


def test_an_interrupted_figure_leaves_nothing(monkeypatch, tmp_path):
    def interrupted(self, path, **options):
        open(path, "wb").write(b"half a picture")
        raise KeyboardInterrupt

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", interrupted)
    with pytest.raises(KeyboardInterrupt):
        figures.save(matplotlib.figure.Figure(), tmp_path / "figures" / "one")
    assert list(tmp_path.glob("figures/*")) == []


def test_short_numbers():
    expected = {1.254: "1.25", 0.304: ".30", 0.0671: ".067", 0.002: ".002", 0.0001: "0", 12.0: "12.0", 107.4: "107"}
    assert {value: charts._short(value) for value in expected} == expected


def test_rows_are_read_without_lines_cut_short(tmp_path):
    assert charts.read_rows(tmp_path) == []
    rows = [{"step": 1, "split": "train", "nll": 2.0}, {"step": 2, "split": "train", "nll": None}]
    lines = [json.dumps(row) for row in rows] + ["[1, 2]", '{"split": "train"}', '{"step": 3, "spl']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert charts.read_rows(tmp_path) == rows


def test_curves_draw_what_changes_and_skip_what_is_not_a_number():
    train = [
        {"step": s, "split": "train", "gradient_norm": s % 3, "kl": s % 4, "nll": 10.0 / s, "constant": 1.0,
         "images_per_second": s, "compile_seconds": 1 / s, "input_wait": 0.1 / s, "goodput": 1 - 0.1 / s, "mfu": s / 99}
        for s in range(1, 21)
    ]  # fmt: skip
    evaluation = [{"step": s, "split": "eval", "psnr": 20.0 + s} for s in (0, 10, 20)]
    runs = {"plain": train + evaluation, "broken": [{"step": 5, "split": "eval", "psnr": None}], "empty": []}
    assert charts.curve_keys(runs) == [
        ("eval", "psnr"), ("train", "nll"), ("train", "kl"), ("train", "gradient_norm"),
    ]  # fmt: skip
    figure = charts.curves(runs, charts.curve_keys(runs, limit=2))
    psnr, nll = [axis for axis in figure.axes if axis.get_visible()]
    np.testing.assert_array_equal(psnr.lines[0].get_xydata(), [[0, 20], [10, 30], [20, 40]])
    assert psnr.get_title(loc="left") == "psnr, dB (eval)\nhigher is better"
    raw, average = nll.lines
    np.testing.assert_allclose(raw.get_ydata(), 10.0 / np.arange(1, 21))
    np.testing.assert_allclose(average.get_ydata()[:3], [10, 7.5, (5 + 10 / 3) / 2])
    figure.savefig(io.BytesIO())  # draws every text
