"""What the report adds up: exact to what it promises, the same in any order, and never larger than it promises."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from raysal.report import places, tally
from raysal.report.places import COARSER, Groups, class_map
from raysal.report.tally import BINS, Extremes, Histogram, Kinds, Shares, kind_of

NUMBERS = st.lists(st.floats(-1e9, 1e9) | st.floats(0, 1) | st.sampled_from([math.nan, math.inf, 0.0, 1.0]), max_size=60)


def histogram(*parts: list[float]) -> Histogram:
    made = Histogram()
    for part in parts:
        made.add(np.array(part, np.float64))
    return made


@settings(deadline=None)
@given(values=NUMBERS, cut=st.integers(0, 60), seed=st.integers(0, 99))
def test_a_histogram_is_the_same_in_any_order_and_counts_every_number(values: list[float], cut: int, seed: int) -> None:
    shuffled = np.random.default_rng(seed).permutation(values).tolist()
    whole, parts = histogram(values), histogram(shuffled[:cut], shuffled[cut:])
    edges, counts = whole.bars(20)
    for a, b in zip((edges, counts), parts.bars(20), strict=True):
        assert np.array_equal(a, b)
    finite = np.array([v for v in values if math.isfinite(v)])
    assert whole.n == counts.sum() == len(finite)
    assert len(whole._counts) <= BINS + 1 and len(counts) <= 20
    if len(finite):
        assert np.array_equal(np.histogram(finite, edges)[0], counts)
        assert (whole.low, whole.high) == (finite.min(), finite.max())


@settings(deadline=None)
@given(values=st.lists(st.floats(0, 1), min_size=1, max_size=200), q=st.floats(0.01, 0.99))
def test_a_quantile_is_right_to_the_width_of_a_bin(values: list[float], q: float) -> None:
    exact = float(np.quantile(values, q, method="inverted_cdf"))
    assert histogram(values).quantile(q) == pytest.approx(exact, abs=2 / BINS)
    assert histogram(values).mean == pytest.approx(np.mean(values))


def test_numbers_beyond_all_reason_make_a_histogram_too() -> None:
    made = histogram([1e308, -1e308, 0.5, 5e-324])
    assert made.bars(10)[1].sum() == 4
    assert histogram([1e300] * 3).bars(10)[1].tolist() == [3]
    assert not len(histogram([math.nan]).bars(10)[1]) and math.isnan(histogram().quantile(0.5))


@settings(deadline=None)
@given(values=st.lists(st.integers(0, 9) | st.none(), max_size=80), cut=st.integers(0, 80), highest=st.booleans())
def test_the_extremes_are_those_of_a_sort_and_of_equals_the_first(values: list[int | None], cut: int, highest: bool) -> None:
    kept, made = np.array([math.nan if v is None else v for v in values], np.float64), []
    found = Extremes(5, highest)

    def add(start: int, part: np.ndarray) -> None:
        found.add(part, lambda i: made.append(start + i) or start + i)

    add(0, kept[:cut])
    add(cut, kept[cut:])
    order = sorted((i for i, v in enumerate(values) if v is not None), key=lambda i: -kept[i] if highest else kept[i])
    assert found.rows == order[:5]
    assert len(made) <= 10, "rows are made for those only that are kept for now"


def test_shares_are_binned_by_how_much_a_class_covers() -> None:
    made = Shares(2)
    made.add(np.array([[0.0, 1.0], [0.3, 0.7], [0.0005, 0.9995]]))
    assert made.bins.tolist() == [[2, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 3]]
    assert made.mean == pytest.approx([0.3005 / 3, 2.6995 / 3])


# --- places -----------------------------------------------------------------------------------------------------------

KEYS = {
    "sol": st.integers(0, 5000),
    "site and drive": st.tuples(st.integers(0, 90), st.integers(0, 3000)),
    "folder": st.lists(st.sampled_from("abcdef"), max_size=5).map("/".join),
    "group": st.text("abc", max_size=70),
}


@pytest.mark.parametrize("kind", COARSER)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_places_stay_few_and_the_same_in_any_order(kind: str, data: st.DataObject) -> None:
    keys = data.draw(st.lists(KEYS[kind] | st.none(), min_size=1, max_size=60))
    order = data.draw(st.permutations(range(len(keys))))
    fractions = np.random.default_rng(0).dirichlet([1, 1, 1], len(keys))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(places, "MOST_PLACES", 8)
        at_once, one_by_one = Groups(kind, 3), Groups(kind, 3)
        at_once.add(np.arange(len(keys)), keys, fractions)
        for i in order:
            one_by_one.add(np.array([0]), [keys[i]], fractions[i : i + 1])
    assert at_once.sums.keys() == one_by_one.sums.keys()
    assert len(at_once.sums) <= 8
    for key, (count, row) in at_once.sums.items():
        assert count == one_by_one.sums[key][0]
        assert row == pytest.approx(one_by_one.sums[key][1])
    assert sum(row.sum() for _, row in at_once.sums.values()) == pytest.approx(len(keys))


@settings(deadline=None, max_examples=30)
@given(sols=st.lists(st.integers(0, 6000), min_size=1, max_size=300))
def test_many_sols_become_columns_of_equal_width_that_lose_no_image(sols: list[int]) -> None:
    groups = Groups("sol", 2)
    groups.add(np.arange(len(sols)), sols, np.tile([0.25, 0.75], (len(sols), 1)))
    found = class_map(groups)
    assert found is not None
    assert found.counts.sum() == len(sols) and len(found.labels) <= places.MOST_COLUMNS
    assert found.places == len(set(sols))
    assert found.shares[found.counts > 0] == pytest.approx(np.tile([0.25, 0.75], ((found.counts > 0).sum(), 1)))
    for label, count in zip(found.labels, found.counts, strict=True):
        low, _, high = label.partition("–")
        assert count == sum(int(low) <= sol <= int(high or low) for sol in sols)


def test_of_many_folders_those_with_most_images_have_columns_and_the_rest_share_one() -> None:
    groups = Groups("folder", 1)
    for i in range(100):
        groups.add(np.zeros(i + 1, int), [f"s3://bucket/archive/part_{i:03d}"], np.ones((i + 1, 1)))
    found = class_map(groups)
    assert found is not None
    assert len(found.labels) == places.MOST_COLUMNS
    assert found.labels[0] == "part_053" and found.labels[-2:] == ("part_099", "53 others")
    assert found.counts.sum() == sum(range(101))


def test_long_names_of_places_are_cut_at_the_front_and_stay_apart() -> None:
    names = ["/archive/" + "x" * 40 + "/same_end_of_a_long_name", "/archive/" + "y" * 40 + "/same_end_of_a_long_name", "/archive/z"]
    found = places._short(names)
    assert len(set(found)) == 3 and all(len(name) <= places.LONGEST_NAME + 4 for name in found)
    assert found[2] == "z"


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "a", "b"),
    [
        ("fetch", "/a/1.png: FileNotFoundError: [Errno 2] No such file or directory: '/a/1.png'", "No such file or directory"),
        ("fetch", "s3://b/x/2.jpg: ClientError: 403 Forbidden, request 5F2A9C0011B2E3D4", "403 Forbidden"),
        ("decode", "/a/7.png: not a JPEG, PNG or TIFF image (it starts with b'\\x00\\xff garb'); convert it first", "not a JPEG"),
        ("limit", "/a/7.png: 5120 x 3840 is more than 100 pixels; cut it", "is more than"),
    ],
)
def test_reasons_that_differ_in_names_and_numbers_are_one_kind(status: str, a: str, b: str) -> None:
    uri = a.split(": ")[0]
    other = "/quite/another place/99.tif"
    same = a.replace(uri, other).replace("5120", "77").replace("5F2A9C0011B2E3D4", "00FF00FF00FF00F1").replace("garb", "rage")
    assert kind_of(status, uri, a) == kind_of(status, other, same)
    assert b in kind_of(status, uri, a) and uri not in kind_of(status, uri, a)


def test_an_answer_of_a_server_keeps_its_number() -> None:
    assert kind_of("fetch", "u", "u: HTTPError: 404") != kind_of("fetch", "u", "u: HTTPError: 503")
    assert kind_of("fetch", "u", "u: An error occurred (403)") != kind_of("fetch", "u", "u: An error occurred (429)")
    assert kind_of("fetch", "u", "u: no answer in 404 s") == kind_of("fetch", "u", "u: no answer in 503 s")
    assert kind_of("limit", "u", "u: 404 pixels") == kind_of("limit", "u", "u: 503 pixels")


def test_failures_are_counted_by_status_and_kind_with_the_first_few() -> None:
    kinds = Kinds()
    for i in range(30):
        kinds.add("fetch", f"/a/{i}.png", f"/a/{i}.png: gone")
    kinds.add("decode", "/b.png", "")
    assert kinds.counts() == {"fetch": 30, "decode": 1}
    first, second = kinds.all
    assert (first.status, first.words, first.count) == ("fetch", "gone", 30)
    assert first.examples == [(f"/a/{i}.png", f"/a/{i}.png: gone") for i in range(tally.EXAMPLES)]
    assert second.words == "no reason given"


def test_kinds_of_failure_without_end_stay_few() -> None:
    kinds = Kinds()
    for i in range(3 * tally.MOST_KINDS):
        word = "".join(chr(97 + int(c)) for c in f"{i:06d}")
        kinds.add(word, "/a", f"{word} " * 1000)
    assert len(kinds.all) == tally.MOST_KINDS + 1
    assert sum(kinds.counts().values()) == 3 * tally.MOST_KINDS
    assert max(len(message) for kind in kinds.all for _, message in kind.examples) <= tally.LONGEST
