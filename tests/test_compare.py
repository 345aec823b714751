"""Two runs side by side: noise told from change, and what grew where, against known truths."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import remat
from remat.planner.policies import AllBlocks
from remat.runs.comparison import Comparison, compare
from remat.runs.growth import describe_growth, peak_shares, plan_id
from remat.runs.noise import compare_times, rank_sum_p
from remat.runs.records import StepTimes, VariantKind
from remat.units import MIB
from sample_runs import sample_plan, sample_run, sample_variant


def times(seconds):
    low, median, high = np.percentile(seconds, (25, 50, 75))
    return StepTimes(
        seconds=tuple(map(float, seconds)),
        median_seconds=float(median),
        iqr_seconds=float(high - low),
        warmup_rounds=0,
    )


@pytest.mark.parametrize(("new", "old"), [(1, 1), (2, 3), (3, 3), (4, 2)])
def test_rank_sum_chance_is_that_of_all_orders(new, old):
    """The chance equals the share of all orderings, counted one by one."""
    counts = [0] * (new * old + 1)
    for places in itertools.combinations(range(new + old), new):
        rest = [place for place in range(new + old) if place not in places]
        counts[sum(a > b for a in places for b in rest)] += 1
    for above in range(new * old + 1):
        expected = sum(counts[above:]) / sum(counts)
        assert rank_sum_p(above, new, old) == pytest.approx(expected, rel=1e-12)


def test_rank_sum_chance_agrees_with_scipy():
    """Exact below 400 pairs, and by the normal approximation above, as SciPy has it."""
    stats = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(0)
    for count, method in ((9, "exact"), (30, "asymptotic")):
        old, new = random.normal(0, 1, count), random.normal(0.5, 1, count)
        found = stats.mannwhitneyu(new, old, alternative="greater", method=method)
        above = int((new[:, None] > old[None, :]).sum())
        assert rank_sum_p(above, count, count) == pytest.approx(found.pvalue, rel=1e-6)


@pytest.mark.parametrize("scale", [0.01, 0.05, 0.2])
@pytest.mark.parametrize("kind", ["normal", "heavy"])
def test_equal_code_is_called_slower_in_no_more_than_one_case_of_a_hundred(scale, kind):
    """Six comparisons with themselves over 200 pairs of runs: at most 1 % show any as slower."""
    random = np.random.default_rng(5)

    def steps():
        noise = random.normal(0, scale, 7)
        tail = random.exponential(1, 7) * (random.random(7) < 0.15) if kind == "heavy" else 0
        return times(0.1 * np.exp(noise + tail))

    flagged = sum(
        any(compare_times(steps(), steps(), tolerance=0.1).is_slower for _ in range(6))
        for _ in range(200)
    )
    assert flagged <= 2


@pytest.mark.parametrize("rounds", [5, 7, 15])
def test_steps_a_third_longer_are_always_found_at_low_noise(rounds):
    """Times of 1.3 with noise of 2 % are slower by more than 10 %; of 1.05 they are not."""
    random = np.random.default_rng(5)
    for _ in range(100):
        old, new = (np.exp(random.normal(0, 0.02, rounds)) for _ in range(2))
        assert compare_times(times(old), times(1.3 * new), tolerance=0.1).is_slower
        assert not compare_times(times(old), times(1.05 * new), tolerance=0.1).is_slower


def test_slow_machine_is_told_from_slow_code_by_the_yardstick():
    """Where the fixed work took as much longer, the code did not; without it nobody can know."""
    random = np.random.default_rng(5)
    old, new, first, second = (np.exp(random.normal(0, 0.02, 7)) for _ in range(4))
    before, after = times(old), times(1.5 * new)
    rulers = (times(first), times(1.5 * second))
    assert compare_times(before, after, tolerance=0.1).is_slower
    found = compare_times(before, after, tolerance=0.1, yardsticks=rulers)
    assert not found.is_slower
    assert found.machine_ratio == pytest.approx(1.5, rel=0.05)
    assert abs(found.growth) < 0.05
    slower = times(1.5 * 1.3 * new)
    assert compare_times(before, slower, tolerance=0.1, yardsticks=rulers).is_slower


def test_fewer_than_five_rounds_say_nothing():
    """Too few times to tell noise from change are no comparison."""
    assert compare_times(times([1.0] * 4), times([2.0] * 7), tolerance=0.1) is None


def grown(peak_mib, modules):
    return sample_variant(
        peak_mib=peak_mib, peak_by_module={name: mib * MIB for name, mib in modules.items()}
    )


def test_growth_says_what_grew_where_and_since_which_plan():
    """The largest shares of the change are named, and the plan that it is compared with."""
    before = grown(100, {"blocks.7.mlp": 10, "blocks.6.mlp": 10, "(optimizer)": 80})
    after = grown(312, {"blocks.7.mlp": 200, "blocks.6.mlp": 10, "(optimizer)": 102})
    assert describe_growth(before, after) == (
        "+212.0 MiB, 190.0 MiB of it in `blocks.7.mlp` and 22.0 MiB in `(optimizer)`, "
        f"since plan {plan_id(before.plan)[:4]}"
    )
    shares = peak_shares(before, after)
    assert [(share.where, share.grown_bytes // MIB) for share in shares] == [
        ("blocks.7.mlp", 190),
        ("(optimizer)", 22),
    ]


def test_runs_without_bytes_by_module_are_compared_by_kind():
    """Older runs have memory curves only: the kinds at their highest moment are compared."""
    before, after = sample_variant(peak_mib=100), sample_variant(peak_mib=150)
    assert {share.where for share in peak_shares(before, after)} == {"(activations)"}
    bare = sample_variant(timeline=())
    assert peak_shares(bare, after) == ()


def test_plan_id_is_that_of_the_decisions_alone():
    """Times and predictions do not count, decisions and the budget do."""
    plan = sample_plan()
    same = plan.model_copy(update={"plan_seconds": 9.0, "predicted_peak_bytes": 1, "notes": ("x",)})
    fewer = plan.model_copy(update={"regions": plan.regions[1:]})
    assert plan_id(plan) == plan_id(same)
    other = plan.model_copy(update={"budget_bytes": 1})
    assert len({plan_id(one) for one in (plan, fewer, other)}) == 3


def test_comparison_names_variants_settings_and_plans_that_differ():
    """What is in one run only, what was set otherwise, and which regions came or went."""
    before = sample_run(sample_variant("no plan", VariantKind.REFERENCE), sample_variant())
    lighter = sample_variant(peak_mib=110, plan=sample_plan(110, num_regions=7))
    after = sample_run(lighter, sample_variant("plan 80%"), id="other", seed=3)
    found = compare(before, after)
    by_label = {variant.label: variant for variant in found.variants}
    assert by_label["no plan"].only_in == before.id
    assert by_label["plan 80%"].only_in == "other"
    assert by_label["plan 60%"].plan_changes == ("kept `blocks.5.mlp`, `blocks.6.mlp`",)
    assert by_label["plan 60%"].growth.startswith("-8.0 MiB")
    assert ("seed", "0", "3") in [(one.name, one.before, one.after) for one in found.settings]
    assert Comparison.model_validate_json(found.model_dump_json()) == found


def test_run_compared_with_itself_differs_in_nothing():
    """No growth, no change of plan, no clear difference of time."""
    found = compare(sample_run(), sample_run())
    assert found.settings == ()
    for variant in found.variants:
        assert (variant.growth, variant.plan_changes, variant.shares) == ("", (), ())
        assert not variant.is_time_clear


class Mlp(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.up, self.down = nn.Linear(32, hidden), nn.Linear(hidden, 32)

    def forward(self, x):
        return x + self.down(torch.nn.functional.gelu(self.up(x)))


def simulated(hidden, plan=None):
    model = nn.Sequential(Mlp(64), Mlp(hidden), nn.Linear(32, 4))
    batch = (torch.randn(64, 32), torch.randint(0, 4, (64,)))

    def loss(model, batch):
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])

    if plan is not None:
        from remat.fit import Fit

        plan = Fit(model, batch, loss=loss).policy(plan)
    return remat.simulate(model, batch, plan, loss=loss, optimizer=None)


@pytest.mark.parametrize("policy", [None, AllBlocks()])
def test_simulated_peak_is_shared_out_whole_among_modules(policy):
    """The shares add up to the peak, and parameters of a module are among its share."""
    found = simulated(64, policy)
    assert sum(found.by_module.values()) == found.peak_bytes
    assert found.by_module["0.up"] >= (32 + 1) * 64 * 4


def test_growth_of_a_real_model_is_found_in_the_module_that_grew():
    """Of a model whose second block got wider, that block holds the growth, the first none."""
    small, large = simulated(64), simulated(640)
    grown_bytes = {
        name: large.by_module.get(name, 0) - small.by_module.get(name, 0)
        for name in large.by_module
    }
    assert max(grown_bytes, key=grown_bytes.get).startswith("1")
    assert grown_bytes["0.up"] == 0
    # activations of the wide layer: 64 rows of 576 more float32, beside its weights
    assert grown_bytes["1.up"] >= 64 * 576 * 4 + 33 * 576 * 4


def test_cli_compares_as_table_json_and_markdown(tmp_path, run_cli):
    """One command, three forms; a run that is not there is one line of error."""
    before = grown(100, {"blocks.7.mlp": 10, "(optimizer)": 90})
    after = grown(312, {"blocks.7.mlp": 200, "(optimizer)": 112})
    sample_run(before, id="a").save(tmp_path / "a" / "run.json")
    sample_run(after, id="b", seed=4).save(tmp_path / "b" / "run.json")
    page = tmp_path / "difference.md"
    done = run_cli("compare", "a", "b", "--root", tmp_path, "--markdown", page)
    assert done.code == 0
    assert "190.0 MiB of it in `blocks.7.mlp`" in " ".join(done.out.split())
    text = page.read_text(encoding="utf-8")
    assert "100.0 MiB → 312.0 MiB" in text
    assert "- seed: 0 → 4" in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1
    found = json.loads(run_cli("compare", "a", "b", "--root", tmp_path, "--json").out)
    assert found["variants"][0]["shares"][0]["where"] == "blocks.7.mlp"
    assert math.isclose(found["variants"][0]["time_growth"], 0.0)
    assert run_cli("compare", "a", "nowhere", "--root", tmp_path).code == 2
