"""Slices: quality against scikit-learn's, planted bad slices found, false ones rare."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics

import remat
from made_predictions import collected, right_or_wrong
from remat.evaluation.finding import find_slices
from remat.evaluation.grouping import MISSING, OTHER, group
from remat.evaluation.slices import slice_quality, worst_slice
from remat.evaluation.tally import tally
from remat.runs.evidence import SliceOrigin


def test_accuracy_of_a_slice_has_its_rest_interval_and_exact_test():
    """Figures of a share follow from four counts."""
    right = np.array([1] * 30 + [0] * 10 + [1] * 58 + [0] * 2, dtype=bool)
    (found,) = slice_quality(right_or_wrong(right), {"first": np.arange(100) < 40})
    assert (found.metric, found.num_examples, found.origin) == ("accuracy", 40, SliceOrigin.NAMED)
    assert found.quality.value == 0.75
    assert found.rest == pytest.approx(58 / 60)
    from scipy.stats import hypergeom

    chance = hypergeom(100, 12, 40).sf(9)  # ten or more of the twelve wrong ones
    assert found.p_value == pytest.approx(chance, abs=1e-12)
    assert found.is_worse


def test_perplexity_of_a_slice_is_that_of_its_tokens():
    """Tokens are weighted alike, texts are drawn whole."""
    scores, labels = torch.rand(12, 7, 5).softmax(dim=-1), torch.randint(0, 5, (12, 7))
    labels[3, 4:] = -100  # padding does not count
    mask = np.arange(12) % 3 == 0
    (found,) = slice_quality(collected((scores, labels)), {"third": mask})
    kept = labels[mask].flatten() >= 0
    expected = metrics.log_loss(
        labels[mask].flatten()[kept],
        (scores.double() / scores.double().sum(-1, keepdim=True))[mask].flatten(0, 1)[kept],
        labels=range(5),
    )
    assert found.metric == "perplexity"
    assert found.quality.value == pytest.approx(math.exp(expected), abs=1e-9)
    assert found.quality.low < found.quality.value < found.quality.high


def test_mean_iou_and_rmse_of_slices_are_those_of_scikit_learn():
    """Segmentation and regression agree to 1e-9 on the slice's own examples."""
    scores, labels = torch.rand(6, 3, 4, 5).softmax(dim=1), torch.randint(0, 3, (6, 4, 5))
    mask = np.array([1, 0, 1, 1, 0, 0], dtype=bool)
    (found,) = slice_quality(collected((scores, labels)), {"some": mask})
    expected = metrics.jaccard_score(
        labels[mask].flatten(), scores.argmax(dim=1)[mask].flatten(), average="macro"
    )
    assert found.metric == "mean_iou"
    assert found.quality.value == pytest.approx(expected, abs=1e-9)
    values, targets = torch.rand(6).double(), torch.rand(6).double()
    (found,) = slice_quality(collected((values, targets)), {"some": mask})
    expected = metrics.root_mean_squared_error(targets[mask], values[mask])
    assert (found.metric, found.quality.value) == ("rmse", pytest.approx(expected, abs=1e-9))


def test_empty_slice_has_no_figure_and_is_not_worse():
    """Nothing is made up of no example, and the other slices are as without it."""
    predictions = right_or_wrong(np.arange(40) % 4 > 0)
    empty, some = slice_quality(
        predictions, {"empty": np.zeros(40, dtype=bool), "some": np.arange(40) < 20}
    )
    assert (empty.num_examples, empty.quality, empty.p_value, empty.is_worse) == (
        0, None, None, False,
    )  # fmt: skip
    assert empty.rest == 0.75
    assert some.adjusted_p_value == some.p_value


def test_slice_of_all_examples_has_no_rest():
    """There is nothing to be worse than."""
    (found,) = slice_quality(right_or_wrong(np.ones(9, bool)), {"all": np.ones(9, dtype=bool)})
    assert (found.rest, found.p_value, found.is_worse) == (None, None, False)


def test_mask_of_another_length_is_refused():
    """A mask is one value for each example."""
    with pytest.raises(remat.WorkloadError, match=r"'odd' has a mask of shape \[3\].*for 9 examp"):
        slice_quality(right_or_wrong(np.ones(9, bool)), {"odd": np.ones(3, dtype=bool)})


def test_worst_slice_follows_the_sense_of_the_metric():
    """Least accuracy, or most error."""
    predictions = right_or_wrong(np.arange(40) >= 10)
    slices = slice_quality(predictions, {"a": np.arange(40) < 20, "b": np.arange(40) >= 20})
    assert worst_slice(slices, higher_is_better=True).name == "a"
    assert worst_slice(slices, higher_is_better=False).name == "b"
    assert worst_slice([], higher_is_better=True) is None


@given(st.integers(0, 2**32), st.integers(2, 30))
def test_sums_of_parts_make_the_whole(seed, count):
    """A metric on all examples equals that of the sums of any two parts together."""
    generator = np.random.default_rng(seed)
    figures = tally(right_or_wrong(generator.random(count) < 0.7))
    mask = generator.random(count) < 0.5
    both = figures.sums[mask].sum(axis=0) + figures.sums[~mask].sum(axis=0)
    assert figures.figure(both) == pytest.approx(figures.of(np.ones(count, dtype=bool)))


def made(seed, wrong_share, count=2000):
    """Five features of customers; where red goods are sold in shop 3, errors are planted."""
    generator = np.random.default_rng(seed)
    features = {
        "colour": generator.choice(["red", "green", "blue"], count),
        "size": generator.normal(size=count),
        "is old": generator.random(count) < 0.4,
        "shop": generator.integers(0, 6, count),
        "age": generator.integers(18, 90, count),
    }
    planted = (features["colour"] == "red") & (features["shop"] == 3)
    wrong = generator.random(count) < np.where(planted, wrong_share, 0.1)
    return right_or_wrong(~wrong), features, planted


def test_planted_slices_are_found_first_ten_times_of_ten():
    """The combination that is bad is named exactly, and shown worse; next to no other is."""
    others = 0
    for seed in range(10):
        predictions, features, planted = made(seed, wrong_share=0.5)
        proposed = find_slices(predictions, features, seed=seed)
        first, *rest = slice_quality(predictions, {}, proposed)
        others += sum(one.is_worse for one in rest)
        assert first.name == "colour = red and shop = 3"
        assert first.is_worse
        assert first.origin is SliceOrigin.FOUND
        assert (proposed[0].examples == planted).all()
        assert first.num_examples == (planted & proposed[0].unseen).sum()
        assert first.quality.low < 0.5 < first.quality.high + 0.1
    assert others <= 1


def test_no_more_than_one_search_of_twenty_finds_what_is_not_there():
    """Where errors fall anywhere, a slice is called worse in at most 5 % of the data sets."""
    false = 0
    for seed in range(100):
        predictions, features, _ = made(seed + 100, wrong_share=0.1)
        proposed = find_slices(predictions, features, seed=seed)
        false += any(one.is_worse for one in slice_quality(predictions, {}, proposed))
    assert false <= 5


def test_slices_of_errors_that_are_no_shares_are_found_too():
    """Squared errors of a regression: the planted group comes first."""
    generator = np.random.default_rng(3)
    features = {"kind": generator.choice(["a", "b", "c"], 600), "x": generator.normal(size=600)}
    noise = generator.normal(size=600) * np.where(features["kind"] == "b", 3, 1)
    predictions = collected((torch.zeros(600), torch.from_numpy(noise)))
    first, *_ = slice_quality(predictions, {}, find_slices(predictions, features))
    assert (first.name, first.metric, first.is_worse) == ("kind = b", "rmse", True)


def test_nothing_is_searched_where_nothing_can_be_found():
    """No error, no feature, or a handful of examples: no slice, and no failure."""
    features = {"x": np.arange(200)}
    assert find_slices(right_or_wrong(np.ones(200, bool)), features) == ()
    assert find_slices(right_or_wrong(np.arange(200) > 9), {}) == ()
    assert find_slices(right_or_wrong(np.arange(20) > 9), {"x": np.arange(20)}) == ()


@given(
    st.one_of(
        st.lists(st.floats(allow_infinity=False, width=32), min_size=1, max_size=60),
        st.lists(st.integers(-5, 5), min_size=1, max_size=60),
        st.lists(st.text("abcdefghijklmnop", max_size=1), min_size=1, max_size=60),
        st.lists(st.booleans(), min_size=1, max_size=60),
    )
)
def test_every_value_has_one_group_with_a_name(values):
    """Groups cover whatever a column holds, and what is not a number is said to be missing."""
    column = np.asarray(values)
    grouping = group("f", column)
    codes = grouping.codes(column)
    assert ((codes >= 0) & (codes < len(grouping.labels))).all()
    assert len(set(grouping.labels)) == len(grouping.labels)
    for value, code in zip(values, codes, strict=True):
        is_nan = isinstance(value, float) and math.isnan(value)
        assert (grouping.labels[code] == MISSING) == is_nan
        if grouping.labels[code] == OTHER:
            assert len(set(values)) > 12


def test_shares_of_few_values_are_ranges_and_no_categories():
    """Whole numbers and a handful of fractions are groups; more fractions are cut at quartiles."""
    assert group("digit", np.arange(10.0)).labels[:2] == ("0", "1")
    assert group("dose", np.array([0.5, 1.5, 0.5])).labels[:2] == ("0.5", "1.5")
    mostly_none = np.array([0.0] * 80 + [1 / 128, 2 / 128, 5 / 128, 7 / 128, 9 / 128])
    assert group("digits", mostly_none).labels[:2] == ("below 0.007812", "0.007812 and above")
    assert list(np.bincount(group("digits", mostly_none).codes(mostly_none))) == [80, 5]


def test_numbers_are_cut_at_their_quartiles():
    """A quarter of the values is in each bin, and the bins say where they end."""
    grouping = group("age", np.arange(100))
    assert grouping.labels[:4] == ("below 24.75", "24.75 to 49.5", "49.5 to 74.25",
                                   "74.25 and above")  # fmt: skip
    assert list(np.bincount(grouping.codes(np.arange(100)))) == [25, 25, 25, 25]
    assert grouping.describe(0) == "age below 24.75"
    assert group("kind", np.array(["a", "b"])).describe(1) == "kind = b"
