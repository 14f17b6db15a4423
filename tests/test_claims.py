"""The verdicts on the paper's claims, on runs written by hand."""

import pytest

from benchmarks import claims


def a_run(seed, updates, accuracy, lin=None, *, damping=None, cka=0.5, alignment=(0.2, 0.2)):
    finite = accuracy is not None
    return {
        "seed": seed,
        "steps": 100,
        "feature_updates": updates,
        "damping": damping,
        "train_accuracy_f": 100.0 if finite else None,
        "test_accuracy_f": accuracy,
        "test_accuracy_f_lin": accuracy if lin is None else lin,
        "cka": cka if finite else None,
        "target_alignment_start": alignment[0],
        "target_alignment": alignment[1],
        "finite": finite,
    }


@pytest.mark.parametrize(
    ("sparse", "passed", "measured"),
    [
        ([88.5, 87.5], True, "2.00 ± 0.00 points"),
        ([88.5, 87.0], False, "2.25 ± 0.25 points"),
        ([99.0, 99.0], True, "-9.00 ± 0.50 points"),
        ([88.5, None], False, "not finite"),
        ([88.5], None, "1 of 2 seeds lack"),
    ],
)
def test_on_par_is_the_mean_over_the_seeds(sparse, passed, measured):
    dense = [a_run(0, 100, 90.5), a_run(1, 100, 89.5)]
    others = [a_run(seed, 10, accuracy) for seed, accuracy in enumerate(sparse)]
    found = claims.on_par([*others, a_run(0, 5, 0.0), *dense])
    assert found.passed is passed
    assert found.measured.startswith(measured)


@pytest.mark.parametrize(("lin", "passed"), [(85.0, True), (85.1, False), (20.0, True)])
def test_the_lazy_run_is_judged_by_its_better_evaluator(lin, passed):
    assert claims.lazy_is_worse([a_run(0, 100, 90.0), a_run(0, 1, 26.0, lin)]).passed is passed
    assert claims.lazy_is_worse([a_run(0, 100, 90.0), a_run(0, 1, lin, 26.0)]).passed is passed


def test_the_kernel_changes_by_its_turn_or_its_alignment():
    def found(**columns):
        return claims.kernel_changes([a_run(0, 100, 90.0, **columns), a_run(0, 1, 90.0, cka=0.0)])

    assert found(cka=0.85).passed is True
    assert found(cka=0.95).passed is False
    assert found(cka=0.95, alignment=(0.2, 0.35)).passed is True
    assert found(cka=0.95, alignment=(0.35, 0.2)).passed is False
    assert claims.kernel_changes([a_run(0, 100, None)]).passed is None


def dampings(accuracies, ckas):
    runs = enumerate(zip(accuracies, ckas, strict=True))
    return [a_run(0, 10, accuracy, damping=0.1 * 3**n, cka=cka) for n, (accuracy, cka) in runs]


@pytest.mark.parametrize(
    ("accuracies", "ckas", "passed"),
    [
        ([90.0, 91.0, 92.0, 93.0], [0.1, 0.2, 0.3, 0.4], True),
        ([93.0, 92.0, 91.0, 90.0], [0.1, 0.2, 0.3, 0.4], True),  # either way
        ([90.0, 93.0, 90.5, 92.0], [0.1, 0.2, 0.3, 0.4], False),
        ([90.0, 91.0, 92.0, 93.0], [0.4, 0.1, 0.3, 0.2], False),
        ([90.0, 90.0, 90.0, 90.0], [0.1, 0.2, 0.3, 0.4], False),
        ([90.0, 91.0, 92.0, None], [0.1, 0.2, 0.3, 0.4], None),
    ],
)
def test_damping_rules_by_rank(accuracies, ckas, passed):
    assert claims.damping_rules(dampings(accuracies, ckas)).passed is passed


def test_damping_is_not_judged_by_runs_that_do_not_fit():
    rows = dampings([90.0, 91.0, 92.0, 93.0], [0.1, 0.2, 0.3, 0.4])
    measured = claims.damping_rules(rows).measured
    assert "correlation -1.00 with 1 - CKA, +1.00 with" in measured
    assert measured.endswith("means: 1 - CKA 0.600 to 0.900, accuracy 90.00 to 93.00")
    rows[0]["train_accuracy_f"] = 94.0
    assert claims.damping_rules(rows).passed is None
    assert claims.damping_rules([]).passed is None
