import io

import numpy as np
import pytest
from test_figures import texts

from eqvae_jax.evaluation import charts, figures

SCALES = {"S/0.25": 0.4, "S/0.5": 0.2, "R/90": 0.3, "R": 0.3, "S": 0.3}
PIXELS = {"pixel_l1/0.25": 0.3, "pixel_l1/0.5": 0.2, "pixel_l1/R": 0.1, "pixel_l1/90": 0.1}


def heights(figure):
    (axis,) = figure.axes
    return [[bar.get_height() for bar in container] for container in axis.containers]


def test_transform_bars_show_rfid_from_the_mildest_scale_to_the_mean_of_the_turns():
    distances = {"rfid": 9.0, "rfid/0.25": 107.4, "rfid/0.5": 83.0, "rfid/90": 70.0, "rfid_R": 78.0, "rfid_S": 95.0}
    results = {"SD-VAE": SCALES | PIXELS | distances, "+ EQ": SCALES | PIXELS | distances | {"rfid/0.5": None}}
    figure = charts.transform_bars(results)
    assert heights(figure) == [[83.0, 107.4, 78.0], [0.0, 107.4, 78.0]]
    found = texts(figure)
    assert "rFID" in found and "107" in found and "83.0" in found and "n/a" in found
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()][:2] == ["scale\n0.5", "scale\n0.25"]
    figure.savefig(io.BytesIO())  # draws every text
    renamed = {name: {key.replace("rfid", "rfid(fashion-cnn)"): value for key, value in column.items()}
               for name, column in results.items()}  # fmt: skip
    figure = charts.transform_bars(renamed)
    assert heights(figure)[0] == [83.0, 107.4, 78.0] and "rFID(fashion-cnn)" in texts(figure)


def test_transform_bars_fall_back_on_pixel_errors_and_say_so():
    figure = charts.transform_bars({"EQ": SCALES | PIXELS | {"rfid": 3.0}})  # the plain one is of another question
    assert heights(figure) == [[0.2, 0.3, 0.1]] and "mean |difference| of [-1, 1]" in texts(figure)


def spectrum(energy):
    return {"spectrum": {"frequency": [0.0, 0.5, 1.0], "energy": energy, "coefficients": [1, 4, 11]}}


def test_spectra_are_relative_to_white_noise_whatever_mean_and_scale():
    details = {"noise": spectrum([50.0, 2.0, 2.0]), "smooth": spectrum([0.0, 30.0, 0.0]), "flat": spectrum([1.0, 0, 0])}
    (axis,) = charts.spectra(details).axes
    noise, smooth = axis.lines[:2]
    np.testing.assert_allclose(noise.get_xydata(), [[0.5, 1], [1, 1]])
    np.testing.assert_allclose(smooth.get_xydata(), [[0.5, 15 / 4], [1, 0]])
    assert axis.get_legend_handles_labels()[1] == ["noise", "smooth"]  # what does not vary has no curve


def test_points_are_those_of_one_metric_and_split_in_order():
    rows = [{"step": 4, "split": "eval", "fid": 2.0}, {"step": 2, "split": "eval", "fid": 5.0},
            {"step": 3, "split": "train", "fid": 9.0}, {"step": 5, "split": "eval", "fid": None}]  # fmt: skip
    assert charts.points(rows, "fid") == [(2, 5.0), (4, 2.0)]
    assert charts.points(rows, "fid", "train") == [(3, 9.0)]


def test_the_step_that_reaches_a_value_lies_on_the_line_between_two():
    series = [(100, 50.0), (200, 30.0), (400, 20.0)]
    assert charts.steps_to_reach(series, 25.0) == 300
    assert charts.steps_to_reach(series, 60.0) == 100
    assert charts.steps_to_reach(series, 20.0) == 400
    assert charts.steps_to_reach(series, 19.9) is None


def test_convergence_says_how_much_sooner_the_baselines_end_is_reached():
    runs = {"SD-VAE": [(100, 50.0), (400, 25.0)], "+ EQ": [(100, 30.0), (200, 20.0)], "worse": [(100, 90.0)]}
    figure = charts.convergence(runs, "gFID", baseline="SD-VAE")
    (axis,) = figure.axes
    labels = axis.get_legend_handles_labels()[1]
    assert labels == ["SD-VAE", "+ EQ (2.7× faster)", "worse"]  # 25 at step 150
    assert [150, 25.0] in [line.get_xydata()[0].tolist() for line in axis.lines]
    assert axis.get_ylabel() == "gFID\nlower is better" and axis.get_yscale() == "log"
    figure.savefig(io.BytesIO())  # draws every text
    assert not [text for text in texts(charts.convergence(runs, "gFID")) if "faster" in text]


@pytest.mark.parametrize("width", [figures.COLUMN, figures.WIDTH])
def test_charts_are_as_wide_as_asked(width):
    for figure in (charts.transform_bars({"EQ": SCALES | PIXELS}, width), charts.spectra({}, width),
                   charts.convergence({"a": [(1, 2.0)]}, "FID", width=width)):  # fmt: skip
        assert figure.get_size_inches()[0] == width
