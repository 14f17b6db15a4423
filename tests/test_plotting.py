"""What the figures show: the data drawn against numbers worked out by hand, words on the axes, bad input."""

import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

import gn_linear as gnl
from tests.support import assert_close

plotting, filters = gnl.plotting, gnl.filters


@pytest.fixture(autouse=True)
def no_display(monkeypatch):
    """No window is opened, no setting is changed, and figures are closed."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    monkeypatch.setattr(plt, "show", lambda: pytest.fail("a figure was shown"))
    before = dict(mpl.rcParams)
    yield
    assert dict(mpl.rcParams) == before
    plt.close("all")


def run(f, f_lin=None, *, seed=0, updates=1, period=10, **columns):
    """A row of runs with accuracies."""
    row = {"experiment": "sweep", "method": "iterative linearisation", "steps": 100}
    row |= {"period": period, "rule": "never" if period is None else f"every {period}"}
    row |= {"feature_updates": updates, "damping": 1.0, "learning_rate": 0.1, "seed": seed, "finite": True}
    return row | {"test_accuracy_f": f, "test_accuracy_f_lin": f_lin, "note": "text", "train_loss_f": None} | columns


def sweep(**columns):
    """Three seeds at 1 update, two at 10 and at 100; the mean is 4, 20, 30."""
    return [
        *(run(f, f + 1, seed=seed, updates=100, period=1, **columns) for seed, f in [(0, 29), (1, 31)]),
        *(run(f, f + 1, seed=seed, updates=1, period=None, **columns) for seed, f in enumerate([1, 3, 8])),
        *(run(f, f + 1, seed=seed, updates=10, **columns) for seed, f in enumerate([15, 25])),
    ]


def lines(axes):
    """The lines of the legend by their labels."""
    return {line.get_label(): line for line in axes.get_lines() if not line.get_label().startswith("_")}


def look(line):
    """What tells a line from others without its colour."""
    return line.get_linestyle(), line.get_marker(), to_hex(line.get_markerfacecolor()) == "#ffffff"


def band(collection):
    """The least and the greatest of a band at each of its places."""
    corners = collection.get_paths()[0].vertices
    places = np.unique(corners[:, 0])
    return np.array(
        [(x, np.min(corners[corners[:, 0] == x, 1]), np.max(corners[corners[:, 0] == x, 1])) for x in places]
    )


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def draw(figure):
    """Draw in earnest: what cannot be drawn raises, and so does a warning."""
    figure.canvas.draw()


# --- feature updates --------------------------------------------------------------------------------------------------


def test_feature_updates_draws_means_and_ranges():
    axes = plotting.feature_updates(sweep())
    drawn = lines(axes)
    name = "iterative linearisation, T = 100"
    assert list(drawn) == [f"{name}: f", f"{name}: f_lin"]
    assert_close(drawn[f"{name}: f"].get_xydata(), np.array([[1.0, 4.0], [10.0, 20.0], [100.0, 30.0]]))
    assert_close(drawn[f"{name}: f_lin"].get_xydata(), np.array([[1.0, 5.0], [10.0, 21.0], [100.0, 31.0]]))
    assert_close(band(axes.collections[0]), np.array([[1.0, 1.0, 8.0], [10.0, 15.0, 25.0], [100.0, 29.0, 31.0]]))
    assert_close(band(axes.collections[1]), np.array([[1.0, 2.0, 9.0], [10.0, 16.0, 26.0], [100.0, 30.0, 32.0]]))
    assert drawn[f"{name}: f"].get_linestyle() == "-"
    assert drawn[f"{name}: f_lin"].get_linestyle() == "--"
    assert axes.get_xscale() == "log"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("feature updates T/K", "test accuracy (%)")
    assert axes.get_legend().get_title().get_text() == "mean and range over 3 seeds"
    draw(axes.figure)


def test_curves_are_split_by_what_tells_runs_apart_and_differ_in_more_than_colour():
    runs = [*sweep(), *sweep(steps=1000), *sweep(method="prox-linear"), *sweep(learning_rate=0.5)]
    runs += [run(50, 51, updates=7 + seed, seed=seed, period=None, rule="early then sparse") for seed in range(2)]
    runs += [run(60, 61, updates=10, rule="uniform")]
    drawn = lines(plotting.feature_updates(runs))
    base = [name.removesuffix(": f") for name in drawn if name.endswith(": f")]
    assert base == [
        "iterative linearisation, T = 100, learning rate 0.1",
        "iterative linearisation, T = 1,000, learning rate 0.1",
        "prox-linear, T = 100, learning rate 0.1",
        "iterative linearisation, T = 100, learning rate 0.5",
        "iterative linearisation, T = 100, early then sparse, learning rate 0.1",
        "iterative linearisation, T = 100, uniform, learning rate 0.1",
    ]
    assert len({look(line) for line in drawn.values()}) == len(drawn) == 12
    triggered = drawn[f"{base[-2]}: f"].get_xydata()
    assert_close(triggered, np.array([[7.5, 50.0]]))  # seeds of one rule are one point


def test_runs_that_are_not_finite_are_marked_and_not_in_means():
    runs = [*sweep(), run(99, 99, seed=2, updates=10, finite=False), run(math.nan, 1.0, seed=3, updates=10)]
    runs += [run(None, None, seed=2, updates=100, period=1, finite=False)]
    axes = plotting.feature_updates(runs)
    drawn = lines(axes)
    name = "iterative linearisation, T = 100"
    assert_close(drawn[f"{name}: f"].get_ydata(), np.array([4.0, 20.0, 30.0]))
    assert_close(drawn[f"{name}: f_lin"].get_ydata(), np.array([5.0, 21.0, 31.0]))
    marks = drawn[f"{name}: 3 of 10 not finite"]
    assert marks.get_marker() == "x"
    assert marks.get_xdata().tolist() == [10.0, 100.0]
    # In sight, whatever the limits of the axis are.
    heights = axes.transAxes.inverted().transform(marks.get_transform().transform(marks.get_xydata()))[:, 1]
    assert np.all((heights > 0) & (heights < 0.1))
    draw(axes.figure)


def test_a_cell_without_finite_runs_breaks_the_line():
    runs = [run(1.0, 2.0), run(5.0, 6.0, updates=10, period=5, finite=False), run(3.0, 4.0, updates=100, period=1)]
    axes = plotting.feature_updates(runs)
    drawn = lines(axes)
    heights = drawn["iterative linearisation, T = 100: f"].get_ydata()
    assert np.isnan(heights).tolist() == [False, True, False]
    assert "iterative linearisation, T = 100: 1 of 3 not finite" in legend(axes)
    draw(axes.figure)


@pytest.mark.parametrize("metric", ["test_accuracy", "train_loss"])
def test_runs_none_of_which_is_finite_are_marks_alone(metric):
    runs = [run(None, None, finite=False), run(None, None, updates=10, period=5, finite=False)]
    axes = plotting.feature_updates(runs, metric)
    (marks,) = axes.get_lines()
    assert marks.get_label() == "iterative linearisation, T = 100: 2 of 2 not finite"
    assert marks.get_xdata().tolist() == [1.0, 10.0]
    assert axes.get_xscale() == "log"
    draw(axes.figure)


def test_what_was_not_measured_is_neither_drawn_nor_marked():
    runs = [run(1.0, None), run(2.0, None, updates=10, period=5), run(None, None, updates=5, period=20)]
    drawn = lines(plotting.feature_updates(runs))
    assert list(drawn) == ["iterative linearisation, T = 100: f"]
    assert_close(drawn["iterative linearisation, T = 100: f"].get_xydata(), np.array([[1.0, 1.0], [10.0, 2.0]]))


def test_losses_have_a_logarithmic_axis():
    runs = [{"method": "m", "steps": 9, "feature_updates": u, "train_loss_f": f} for u, f in [(1, 0.5), (10, 0.01)]]
    axes = plotting.feature_updates(runs, metric="train_loss")
    (line,) = axes.get_lines()
    assert_close(line.get_xydata(), np.array([[1.0, 0.5], [10.0, 0.01]]))  # without a rule, each number is a point
    assert (axes.get_yscale(), axes.get_ylabel()) == ("log", "train loss")
    assert axes.get_legend().get_title().get_text() == ""  # one seed, so neither mean nor range


def test_axes_given_are_drawn_on():
    axes = Figure().subplots(1, 2)
    assert plotting.feature_updates(sweep(), axes=axes[1]) is axes[1]
    assert not axes[0].get_lines()
    assert len(axes[1].get_lines()) == 2


# --- phase diagram ----------------------------------------------------------------------------------------------------


def grid():
    """Two T and three K; one cell with a seed that broke, one all broken, one missing; and the rule never."""
    return [
        *(run(f, seed=seed, steps=100, period=1) for seed, f in enumerate([90, 94])),
        run(80, steps=100, period=50),
        run(70, seed=1, steps=100, period=50, finite=False),
        run(60, steps=1000, period=1),
        run(None, steps=1000, period=50, finite=False),
        run(30, steps=1000, period=7),
        run(20, steps=1000, period=None),
    ]


def test_phase_diagram_shows_means_and_what_is_missing():
    axes = plotting.phase_diagram(grid())
    (image,) = axes.get_images()
    nan = np.nan
    expected = np.array([[92.0, nan, 80.0, nan], [60.0, 30.0, nan, 20.0]])
    assert np.array_equal(np.ma.filled(image.get_array(), nan), expected, equal_nan=True)
    written = {text.get_position(): text.get_text() for text in axes.texts}
    assert written == {(0, 0): "92", (2, 0): "80*", (0, 1): "60", (1, 1): "30", (3, 1): "20"}
    hatched = {tuple(np.add(p.get_xy(), 0.5)): (p.get_hatch(), p.get_label()) for p in axes.patches}
    assert hatched == {
        (1.0, 0.0): ("//", "not measured"),
        (3.0, 0.0): ("//", "not measured"),
        (2.0, 1.0): ("xxx", "not finite"),
    }
    assert sorted(legend(axes)) == ["not finite", "not measured", "some not finite"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "7", "50", "never"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["100", "1,000"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("period K (steps per feature update)", "steps T")
    assert image.colorbar.ax.get_ylabel() == "test accuracy of f (%)"
    draw(axes.figure)


def test_cells_are_written_in_ink_that_stands_out():
    axes = plotting.phase_diagram(grid())
    (image,) = axes.get_images()
    for text in axes.texts:
        column, row = text.get_position()
        light = np.dot(image.cmap(image.norm(image.get_array()[row, column]))[:3], [0.299, 0.587, 0.114])
        ink = {"black": 0.0, "white": 1.0}[text.get_color()]
        assert abs(light - ink) >= 0.5


def test_phase_diagram_of_a_loss_is_logarithmic_and_of_nothing_finite_is_drawn():
    runs = [run(0, period=k, train_loss_f=loss) for k, loss in [(1, 1e-3), (10, 0.1)]]
    axes = plotting.phase_diagram(runs, metric="train_loss_f")
    assert_close(axes.get_images()[0].norm([1e-3, 1e-2, 1e-1]), np.array([0.0, 0.5, 1.0]))
    broken = plotting.phase_diagram([run(50, finite=False)])
    assert [patch.get_label() for patch in broken.patches] == ["not finite"]
    draw(broken.figure)


# --- kernel measures --------------------------------------------------------------------------------------------------


def measurement(rule, step, seed=0, **measures):
    return {"method": "iterative linearisation", "rule": rule, "steps": 100, "step": step, "seed": seed, **measures}


def test_kernel_measures_draws_a_panel_each_and_a_curve_for_each_rule():
    rows = [
        measurement(rule, step, seed, cka=1 - scale * step * (1 + seed), kernel_velocity=scale if step else None)
        for rule, scale in [("every 10", 0.01), ("never", 0.001)]
        for seed in range(2)
        for step in (0, 10, 20)
    ]
    axes = plotting.kernel_measures(rows, measures=("cka", "kernel_velocity"))
    assert axes.shape == (2,)
    first, second = (lines(panel) for panel in axes)
    assert list(first) == list(second) == ["every 10", "never"]
    assert_close(first["every 10"].get_xydata(), np.array([[0, 1.0], [10, 0.85], [20, 0.7]]))
    assert_close(first["never"].get_ydata(), np.array([1.0, 0.985, 0.97]))
    assert_close(band(axes[0].collections[0]), np.array([[0, 1.0, 1.0], [10, 0.8, 0.9], [20, 0.6, 0.8]]))
    # The velocity is not known at the start: nothing is drawn there and nothing marked.
    assert second["every 10"].get_xdata().tolist() == [10, 20]
    assert look(first["every 10"]) != look(first["never"])
    assert [panel.get_xscale() for panel in axes] == ["symlog", "symlog"]  # since there is a step 0
    assert [panel.get_xlabel() for panel in axes] == ["step", "step"]
    assert axes[1].get_ylabel() == "kernel velocity (1 / step)"
    draw(axes[0].figure)


def test_seeds_measured_at_different_steps_are_drawn_each_by_itself():
    rows = [measurement("kernel drifts", step, seed, cka=step / 100) for seed in range(2) for step in (0, 5 + seed, 20)]
    (panel,) = plotting.kernel_measures(rows, measures="cka")
    assert [line.get_xdata().tolist() for line in panel.get_lines()] == [[0, 5, 20], [0, 6, 20]]
    assert legend(panel) == ["kernel drifts, each seed"]
    assert not panel.collections


def test_a_measure_that_a_run_has_lost_is_marked():
    rows = [
        measurement("every 1", step, seed, cka=None if seed == 1 and step > 5 else 0.5 + seed / 4)
        for seed in range(2)
        for step in (1, 10, 100)
    ]
    rows = [{**row, "train_loss_f": 1.0} for row in rows]
    panel, losses = plotting.kernel_measures(rows, measures=["cka", "train_loss_f"], axes=Figure().subplots(1, 2))
    assert (panel.get_yscale(), losses.get_yscale()) == ("linear", "log")
    drawn = lines(panel)
    assert_close(drawn["every 1"].get_ydata(), np.array([0.625, 0.5, 0.5]))
    assert drawn["every 1: 2 of 6 not finite"].get_xdata().tolist() == [10, 100]
    assert panel.get_xscale() == "log"


# --- side by side -----------------------------------------------------------------------------------------------------


def test_side_by_side_shares_the_axis_of_damping():
    rows = [
        {"method": method, "damping": mu, "learning_rate": rate, "steps": 10, "seed": seed, "train_loss_f": mu * scale}
        for method, rate, scale in [("gauss-newton", None, 1.0), ("iterative linearisation", 0.1, 2.0)]
        for mu in (0.1, 10.0, 1.0)
        for seed in range(2)
    ]
    rows += [{"method": "gauss-newton", "damping": 0.0, "learning_rate": None, "seed": 0, "train_loss_f": 0.5}]
    rows += [{**rows[0], "seed": 5, "train_loss_f": math.inf}]
    axes = plotting.side_by_side(rows)
    drawn = lines(axes)
    assert_close(drawn["gauss-newton"].get_xydata(), np.array([[0.1, 0.1], [1.0, 1.0], [10.0, 10.0]]))
    second = drawn["iterative linearisation, learning rate 0.1"]
    assert_close(second.get_xydata(), np.array([[0.1, 0.2], [1.0, 2.0], [10.0, 20.0]]))
    assert look(drawn["gauss-newton"]) != look(second)
    assert drawn["gauss-newton, without damping"].get_ydata() == [0.5, 0.5]
    assert drawn["gauss-newton: 1 of 7 not finite"].get_xdata().tolist() == [0.1]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert (axes.get_xlabel(), axes.get_ylabel()) == (r"damping $\mu = 1 / (\eta K)$", "train loss of f")
    draw(axes.figure)


@pytest.mark.parametrize("shared", [False, True])
def test_numbers_of_steps_are_curves_of_their_own_only_where_they_share_a_damping(shared):
    """Iterative linearisation takes more steps at less damping; that is one curve."""
    rows = [
        {"method": "m", "damping": 1 / steps if not shared else 0.1, "steps": steps, "test_loss_f_lin": 1.0}
        for steps in (10, 100)
    ]
    axes = plotting.side_by_side(rows, metric="test_loss_f_lin")
    assert list(lines(axes)) == (["m, T = 10", "m, T = 100"] if shared else ["m"])
    assert axes.get_ylabel() == "test loss of f_lin"


# --- spectrum, filters, training --------------------------------------------------------------------------------------


def spectrum_of(values, rank, key=0):
    """The spectrum of a diagonal matrix."""
    x = jnp.diag(jnp.sqrt(len(values) * jnp.asarray(values)))
    start = jnp.zeros(len(values))
    return gnl.diagnostics.spectrum(lambda p, x: x @ p, start, x, rank=rank, key=jax.random.key(key), probes=3)


def test_spectrum_draws_the_density_and_marks_the_largest_eigenvalues():
    values = [3.0, 1.0, 0.5]
    axes = plotting.spectrum(spectrum_of(values, 3))
    density, marks = axes.get_lines()
    points = density.get_xdata()
    width = 0.02 * 3.0
    bumps = np.exp(-0.5 * ((points[:, None] - values) / width) ** 2) / (width * np.sqrt(2 * np.pi))
    assert_close(density.get_ydata(), np.mean(bumps, axis=1), condition=1e3)
    assert abs(np.trapezoid(density.get_ydata(), points) - 1) < 1e-3
    assert_close(np.sort(marks.get_xdata()), np.sort(values), condition=1e3)
    assert legend(axes) == ["density from 3 probes, width 0.06", "3 largest eigenvalues"]
    peak = 1 / (3 * width * np.sqrt(2 * np.pi))
    assert_close(np.array(axes.get_ylim()), np.array([peak / 10, 2 * np.max(density.get_ydata())]))
    assert axes.get_yscale() == "log"
    assert (axes.get_xlabel(), axes.get_ylabel()) == (
        "eigenvalue of the Gauss-Newton matrix",
        "density (1 / eigenvalue)",
    )
    draw(axes.figure)


def test_spectrum_marks_only_eigenvalues_that_are_known():
    values = np.concatenate([[10.0, 5.0], np.linspace(1.0, 1.1, 28)])
    found = spectrum_of(values, 6)
    points = np.array([1.0, 5.0])
    axes = plotting.spectrum(found, points, 0.5, axes=Figure().subplots())
    density, marks = axes.get_lines()
    assert density.get_xdata().tolist() == points.tolist()
    assert_close(density.get_ydata(), found.density(points, 0.5))
    assert 2 <= len(marks.get_xdata()) < 6
    assert_close(marks.get_xdata()[:2], values[:2], condition=1e3)


def test_spectrum_without_curvature_is_drawn():
    draw(plotting.spectrum(spectrum_of([0.0, 0.0], 2)).figure)


def test_filters_draws_shares_and_leaves_out_what_is_unstable():
    at = np.array([4.0, 0.5, 1.0, 3.0])
    named = {"damped": filters.Tikhonov(1.0), "steps": filters.GradientDescent(0.6, 2), "none": filters.MinimumNorm()}
    axes = plotting.filters(named, at)
    at = np.sort(at)
    damped, steps, undamped = axes.get_lines()
    assert_close(damped.get_xydata(), np.stack([at, at / (at + 1)], 1))
    assert_close(steps.get_ydata()[:3], 1 - (1 - 0.6 * at[:3]) ** 2)
    assert np.isnan(steps.get_ydata()[3])
    assert_close(undamped.get_ydata(), np.ones(4))
    assert legend(axes) == ["damped", "steps (unstable from 4)", "none"]
    assert len({look(line) for line in axes.get_lines()}) == 3
    assert axes.get_xscale() == "log"
    draw(axes.figure)


def test_filters_in_a_list_are_named_by_their_settings():
    axes = plotting.filters([filters.GradientDescent(0.5, 2), filters.GradientFlow(jnp.asarray(2.0))], jnp.ones(1))
    assert legend(axes) == ["GradientDescent(learning_rate=0.5, steps=2)", "GradientFlow(time=2)"]


def test_training_draws_histories_and_marks_what_is_not_finite():
    axes = plotting.training({"Adam": [4.0, 2.0, 1.0], "Gauss-Newton": jnp.array([4.0, jnp.nan, 0.5, jnp.inf])})
    adam, newton, marks = axes.get_lines()
    assert_close(adam.get_xydata(), np.array([[0, 4.0], [1, 2.0], [2, 1.0]]))
    assert np.array_equal(newton.get_ydata(), [4.0, np.nan, 0.5, np.nan], equal_nan=True)
    assert marks.get_xdata().tolist() == [1, 3]
    assert legend(axes) == ["Adam", "Gauss-Newton", "Gauss-Newton: not finite"]
    assert look(adam) != look(newton)
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_yscale()) == ("step", "loss", "log")
    draw(axes.figure)


def test_a_history_without_a_finite_value_is_crosses_alone():
    axes = plotting.training({"a": [math.nan, math.inf]})
    assert axes.get_lines()[1].get_xdata().tolist() == [0, 1]
    draw(axes.figure)


def test_a_loss_of_zero_stays_on_the_axis():
    axes = plotting.training({"a": [1.0, 0.01, 0.0]})
    assert axes.get_yscale() == "symlog"
    assert axes.transData.transform([(2, 0.0)])[0, 1] < axes.transData.transform([(1, 0.01)])[0, 1]
    draw(axes.figure)


@pytest.mark.parametrize("stacked", [False, True])
def test_training_reads_damping_and_gain_ratio_of_gauss_newton(stacked):
    zeros = gnl.info(gnl.gauss_newton(lambda p, x: p * x, gnl.losses.squared_error).init(jnp.array(1.0)))
    infos = [
        zeros._replace(damping=jnp.asarray(mu), gain_ratio=jnp.asarray(rho)) for mu, rho in [(1.0, 0.5), (0.1, -7.0)]
    ]
    history = jax.tree.map(lambda *leaves: jnp.stack(leaves), *infos) if stacked else infos
    axes = plotting.training({"run": history}, quantity="damping")
    assert_close(axes.get_lines()[0].get_ydata(), np.array([1.0, 0.1]))
    assert (axes.get_yscale(), axes.get_ylabel()) == ("log", "damping")
    axes = plotting.training({"run": history}, quantity="gain_ratio")
    assert_close(lines(axes)["run"].get_ydata(), np.array([0.5, -7.0]))
    assert (axes.get_yscale(), axes.get_ylabel()) == ("symlog", "gain ratio")


# --- style, import and bad input --------------------------------------------------------------------------------------


def test_styles_differ_in_line_or_marker_for_many_curves():
    styles = [plotting.curve_style(number) for number in range(280)]
    assert len({tuple(style.values()) for style in styles}) == 280
    assert len({(style["linestyle"], style["marker"]) for style in styles[:40]}) == 40


def test_import_leaves_matplotlib_alone():
    script = "import sys, gn_linear; gn_linear.plotting; print('matplotlib' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout.strip()) == (0, "False"), result.stderr


def test_missing_matplotlib_says_how_to_install_it(monkeypatch):
    for name in ("matplotlib", "matplotlib.axes", "matplotlib.pyplot"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install 'gn_linear\[plot\]'"):
        plotting.training({"a": [1.0]})


def test_unknown_metric_names_those_that_there_are():
    with pytest.raises(ValueError, match=r"'accuracy'.*rows have test_accuracy\."):
        plotting.feature_updates(sweep(), metric="accuracy")
    known = r"rows have feature_updates, test_accuracy_f, test_accuracy_f_lin\."
    for draw_runs in (plotting.phase_diagram, plotting.side_by_side):
        with pytest.raises(ValueError, match=known):
            draw_runs([run(1.0, 2.0)], metric="test_accuracy")
    with pytest.raises(ValueError, match=r"measures must name .*'ckaa'.*rows have cka\."):
        plotting.kernel_measures([measurement("never", 0, cka=1.0, kernel_velocity=None)], measures=["cka", "ckaa"])


@pytest.mark.parametrize("name", ["feature_updates", "phase_diagram", "kernel_measures", "side_by_side"])
def test_no_rows_are_an_error(name):
    with pytest.raises(ValueError, match="at least one row"):
        getattr(plotting, name)([])


def test_runs_of_two_methods_are_no_phase_diagram():
    with pytest.raises(ValueError, match="gauss-newton"):
        plotting.phase_diagram([run(1.0), run(1.0, method="gauss-newton")])
