"""The rules one by one: each looks at a variant in both runs, and says what it found.

NOTE [ Noise ]
A gate that fails by chance is switched off by those it wakes. So nothing fails on growth that
chance may show: step times by NOTE [ Slower ]; latencies where medians and tails both grew over
half of the batch sizes, the machine's own change taken off; quality, calibration and slices exactly
where training is reproducible, which each run shows by its own variants, and by the confidence
interval of the metric where it is not. Peaks, parity and prediction errors carry no noise.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from remat.operate.gate.records import Gate, GateCheck, Outcome
from remat.runs.evidence import CalibrationEvidence, Latency, SliceQuality
from remat.runs.growth import describe_growth
from remat.runs.noise import LEAST_ROUNDS, compare_times
from remat.runs.reading import final_quality, format_value, metric_name
from remat.runs.records import Run, Variant, VariantKind
from remat.units import format_bytes, format_seconds, parse_budget

# Metrics between 0 and 1, the more the better; of all others less is better.
SHARES = frozenset({"accuracy", "r2", "f1", "iou", "mean_iou", "auroc", "precision", "recall"})
# Two-sided quantiles of the normal distribution: 99% and 95%.
_Z99, _Z95 = 2.576, 1.960
_DEFAULT_ERROR = {"cpu": 0.01}
_ERROR_ELSEWHERE = 0.02
# Scalars below the dispatcher, which a prediction counts as a constant: 1% of a tiny model.
_CRUMBS_BYTES = 1024
# Less than this is the dispatch of a few ops, which differs from process to process.
_LEAST_LATENCY_SECONDS = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One variant in the run and in its baseline."""

    run: Run
    baseline: Run
    new: Variant
    old: Variant

    @property
    def is_reproducible(self) -> bool:
        """Whether both runs show that the same training gives the same bits."""
        return all(_is_reproducible(run) for run in (self.run, self.baseline))


Check = Callable[[Pair, Gate], Iterator[GateCheck]]


def check_peak(pair: Pair, rules: Gate) -> Iterator[GateCheck]:
    """Measured peak against the baseline's, and the absolute limit; says what grew and where."""
    rule, make = rules.peak, _maker("peak", pair)
    new, old = pair.new.measured_peak_bytes, pair.old.measured_peak_bytes
    if new is None:
        yield make(Outcome.NOT_COMPARED, "its peak was not measured")
        return
    if rule.max is not None:
        limit = parse_budget(rule.max)
        text = f"peak {format_bytes(new)}, allowed {format_bytes(limit)}"
        yield make(_kept(new <= limit), text, subject="limit", found=new, allowed=limit)
    if rule.max_growth is None:
        return
    if old is None:
        yield make(Outcome.NOT_COMPARED, "the baseline has no measured peak", found=new)
        return
    allowed = old * (1 + rule.max_growth)
    text = f"peak {format_bytes(new)}, as before"
    if new != old:
        text = f"peak {describe_growth(pair.old, pair.new)} ({new / old - 1:+.1%})"
    yield make(_kept(new <= allowed), text, baseline=old, found=new, allowed=allowed)


def check_step_time(pair: Pair, rules: Gate) -> Iterator[GateCheck]:
    """Step times against the baseline's, beyond the noise of both; see NOTE [ Slower ]."""
    rule, make = rules.step_time, _maker("step_time", pair)
    new, old = pair.new.step_times, pair.old.step_times
    if new is None:
        yield make(Outcome.NOT_COMPARED, "its steps were not timed")
        return
    if rule.max_seconds is not None:
        median = new.median_seconds
        text = f"step {format_seconds(median)}, allowed {format_seconds(rule.max_seconds)}"
        is_kept = median <= rule.max_seconds
        yield make(_kept(is_kept), text, subject="limit", found=median, allowed=rule.max_seconds)
    if rule.max_growth is None:
        return
    reason = _time_gap(pair)
    if old is None or reason:
        yield make(Outcome.NOT_COMPARED, reason or "the baseline was not timed")
        return
    change = compare_times(
        old,
        new,
        tolerance=rule.max_growth,
        yardsticks=(pair.baseline.yardstick, pair.run.yardstick),
    )
    if change is None:
        text = f"fewer than {LEAST_ROUNDS} timed rounds cannot tell noise from change"
        yield make(Outcome.NOT_COMPARED, text)
        return
    text = (
        f"step {change.growth:+.1%} ({format_seconds(change.before_seconds)} to "
        f"{format_seconds(change.after_seconds)}), noise {change.noise:.1%}"
    )
    if change.machine_ratio is not None:
        text += f", the machine itself {change.machine_ratio - 1:+.0%}"
    yield make(
        _kept(not change.is_slower),
        text,
        baseline=change.before_seconds,
        found=change.after_seconds,
        allowed=change.before_seconds * (1 + rule.max_growth) * (1 + change.noise),
        noise=change.noise,
    )


def check_quality(pair: Pair, rules: Gate) -> Iterator[GateCheck]:
    """The metric that stands for the run, or the one named, at the end of training."""
    rule, make = rules.quality, _maker("quality", pair)
    named = final_quality(pair.new) or final_quality(pair.old)
    metric = rule.metric or (named[0] if named else "")
    new, old = _final(pair.new, metric), _final(pair.old, metric)
    if new is None:
        what = metric_name(metric) if metric else "validation quality"
        yield make(Outcome.NOT_COMPARED, f"it has no {what} at the end of training")
        return
    shown = f"{metric_name(metric)} {format_value(metric, new)}"
    for limit, is_kept in ((rule.min, new >= (rule.min or 0)), (rule.max, new <= (rule.max or 0))):
        if limit is not None:
            text = f"{shown}, allowed {format_value(metric, limit)}"
            yield make(_kept(is_kept), text, subject=f"{metric} limit", found=new, allowed=limit)
    if old is None:
        yield make(Outcome.NOT_COMPARED, f"the baseline has no {metric_name(metric)}", metric)
        return
    bound = rule.max_drop if metric in SHARES else rule.max_growth
    if bound is None:
        return
    noise = 0.0 if pair.is_reproducible else _metric_noise(pair, metric, old)
    yield _worse_by(make, metric, old, new, bound, noise)


def check_calibration(pair: Pair, rules: Gate) -> Iterator[GateCheck]:
    """Expected calibration error as trained, in points."""
    rule, make = rules.calibration, _maker("calibration", pair)
    new, old = _calibration_error(pair.new), _calibration_error(pair.old)
    if new is None:
        yield make(Outcome.NOT_COMPARED, "it has no calibration")
        return
    shown = f"calibration error {new:.3f}"
    if rule.max is not None:
        text = f"{shown}, allowed {rule.max:.3f}"
        yield make(_kept(new <= rule.max), text, subject="limit", found=new, allowed=rule.max)
    if rule.max_growth is None:
        return
    if old is None:
        yield make(Outcome.NOT_COMPARED, "the baseline has no calibration", found=new)
        return
    noise = 0.0
    if not pair.is_reproducible:
        noise = _Z99 * math.hypot(*(_bins_error(v.calibration) for v in (pair.new, pair.old)))
    allowed = old + rule.max_growth + noise
    text = f"{shown} instead of {old:.3f}"
    yield make(_kept(new <= allowed), text, baseline=old, found=new, allowed=allowed, noise=noise)


def check_slices(pair: Pair, rules: Gate) -> Iterator[GateCheck]:
    """Every slice that both runs measured by the same metric."""
    rule, make = rules.slice, _maker("slice", pair)
    before = {(one.name, one.metric): one for one in pair.old.slices}
    if not pair.new.slices:
        yield make(Outcome.NOT_COMPARED, "it has no slices")
        return
    for one in pair.new.slices:
        old = before.get((one.name, one.metric))
        if one.quality is None:
            yield make(Outcome.NOT_COMPARED, "the slice is empty", one.name)
            continue
        new_value = one.quality.value
        if rule.min is not None and one.metric in SHARES:
            text = f"{metric_name(one.metric)} {format_value(one.metric, new_value)}"
            text += f", allowed {format_value(one.metric, rule.min)}"
            yield make(
                _kept(new_value >= rule.min),
                text,
                subject=f"{one.name} limit",
                found=new_value,
                allowed=rule.min,
            )
        if old is None or old.quality is None:
            yield make(Outcome.NOT_COMPARED, "the baseline has no such slice", one.name)
        elif rule.max_drop is not None:
            noise = 0.0
            if not pair.is_reproducible:
                noise = math.hypot(_half_width(one), _half_width(old))
            found = _worse_by(make, one.metric, old.quality.value, new_value, rule.max_drop, noise)
            yield found.model_copy(update={"subject": one.name})


def check_latency(pair: Pair, rules: Gate) -> Iterator[GateCheck]:
    """The served variant's time to answer, form by form over the batch sizes of both runs."""
    rule, make = rules.latency, _maker("latency", pair)
    new, old = pair.run.serving, pair.baseline.serving
    if new is None or new.variant != pair.new.label:
        return  # told once for the run, not for each variant
    before = {(one.form, one.batch_size): one for one in (old.latencies if old else ())}
    for form in dict.fromkeys(one.form for one in new.latencies):
        found = [one for one in new.latencies if one.form == form]
        slowest = max(found, key=lambda one: one.p95_seconds)
        if rule.max_p95_seconds is not None:
            p95, limit = slowest.p95_seconds, rule.max_p95_seconds
            text = f"95% answered in {format_seconds(p95)} (batch of {slowest.batch_size}), "
            text += f"allowed {format_seconds(limit)}"
            yield make(_kept(p95 <= limit), text, f"{form} limit", found=p95, allowed=limit)
        pairs = [(before[key], one) for one in found if (key := (form, one.batch_size)) in before]
        if rule.max_growth is None:
            continue
        if not pairs:
            yield make(Outcome.NOT_COMPARED, "the baseline has no such latencies", form)
            continue
        yield _latency_growth(make, form, pairs, rule.max_growth, _machine_ratio(pair))


def _latency_growth(
    make: Callable[..., GateCheck],
    form: str,
    pairs: list[tuple[Latency, Latency]],
    bound: float,
    machine: float,
) -> GateCheck:
    """Check the growth that half of the batch sizes exceed, of medians and of tails alike."""
    medians = statistics.median(new.p50_seconds / old.p50_seconds for old, new in pairs)
    tails = statistics.median(new.p95_seconds / old.p95_seconds for old, new in pairs)
    added = statistics.median(new.p50_seconds - old.p50_seconds for old, new in pairs)
    # a machine that got faster excuses nothing, one that got slower does
    allowed = (1 + bound) * max(machine, 1.0)
    is_slower = min(medians, tails) > allowed and added > _LEAST_LATENCY_SECONDS
    sizes = ", ".join(str(new.batch_size) for _, new in pairs)
    text = f"half answered {medians - 1:+.0%}, 95% {tails - 1:+.0%}, over batches of {sizes}"
    return make(_kept(not is_slower), text, form, found=tails - 1, allowed=allowed - 1)


def _machine_ratio(pair: Pair) -> float:
    """How much slower the machine itself was, by the yardsticks; 1 where one is missing."""
    new, old = pair.run.yardstick, pair.baseline.yardstick
    return new.median_seconds / old.median_seconds if new is not None and old is not None else 1.0


def check_prediction(pair: Pair, rules: Gate) -> Iterator[GateCheck]:
    """The measured peak of a plan against its prediction, and the budget."""
    variant, make = pair.new, _maker("prediction_error", pair)
    if variant.kind is VariantKind.REFERENCE:
        return
    new, predicted = variant.measured_peak_bytes, variant.predicted_peak_bytes
    if new is None or not predicted:
        yield make(Outcome.NOT_COMPARED, "its peak was not predicted, or not measured")
        return
    allowed = rules.prediction_error.max
    if allowed is None:
        allowed = _DEFAULT_ERROR.get(pair.run.environment.device, _ERROR_ELSEWHERE)
    kept_free = variant.plan.margin_bytes if variant.plan is not None else 0
    margin = (kept_free + _CRUMBS_BYTES) / predicted
    error = new / predicted - 1
    side = "above" if error > 0 else "below"
    text = f"measured peak {abs(error):.2%} {side} the prediction, allowed {allowed + margin:.2%}"
    is_kept = abs(error) <= allowed + margin
    yield make(_kept(is_kept), text, found=error, allowed=allowed + margin)


def check_parity(pair: Pair, rules: Gate) -> Iterator[GateCheck]:
    """Gradients, losses and weights as without the plan, as far as the plan promises it."""
    del rules
    variant, make = pair.new, _maker("gradient_parity", pair)
    if variant.kind is VariantKind.REFERENCE:
        return
    proof = variant.verification
    if proof is None:
        yield make(Outcome.NOT_COMPARED, "its gradients were not verified")
        return
    problems = []
    if not proof.passed:
        named = ", ".join(difference.name for difference in proof.differences[:3])
        problems.append(f"a step differs from one without the plan ({named or 'see its notes'})")
    if proof.identical:
        problems += ["its losses differ"] if variant.losses_identical is False else []
        problems += ["its weights differ"] if variant.weights_identical is False else []
    kept = "gradients equal bit for bit" if proof.identical else "gradients as close as promised"
    yield make(_kept(not problems), "; ".join(problems) or kept)


def _worse_by(
    make: Callable[..., GateCheck],
    metric: str,
    old: float,
    new: float,
    bound: float,
    noise: float,
) -> GateCheck:
    """Check a metric against the baseline's: points of a share, relative for anything else."""
    if metric in SHARES:
        allowed = old - bound - noise
        is_kept = new >= allowed
    else:
        allowed = old + bound * abs(old) + noise
        is_kept = new <= allowed
    text = f"{metric_name(metric)} {format_value(metric, new)}"
    text += f" instead of {format_value(metric, old)}" if new != old else ", as before"
    if math.isnan(new):
        is_kept = math.isnan(old)
    return make(_kept(is_kept), text, metric, baseline=old, found=new, allowed=allowed, noise=noise)


def _maker(rule: str, pair: Pair) -> Callable[..., GateCheck]:
    """Return what makes a check of one rule on one variant."""

    def make(
        outcome: Outcome, message: str, subject: str = "", **figures: float | None
    ) -> GateCheck:
        return GateCheck(
            rule=rule,
            variant=pair.new.label,
            subject=subject,
            outcome=outcome,
            message=message,
            **figures,
        )

    return make


def _kept(is_kept: bool) -> Outcome:
    return Outcome.PASSED if is_kept else Outcome.FAILED


def _time_gap(pair: Pair) -> str:
    """Say why step times cannot be compared; empty where they can."""
    here, there = pair.run.environment, pair.baseline.environment
    if here.device != there.device:
        return f"other device: {there.device} before, {here.device} now"
    if here.num_threads != there.num_threads:
        return f"other number of threads: {there.num_threads} before, {here.num_threads} now"
    has_yardsticks = pair.run.yardstick is not None and pair.baseline.yardstick is not None
    if here.processor != there.processor and not has_yardsticks:
        return f"other processor: {there.processor} before, {here.processor} now"
    return ""


def _is_reproducible(run: Run) -> bool:
    """Whether variants that should give the bits of training without a plan all did."""
    compared = [
        variant
        for variant in run.variants
        if variant.losses_identical is not None
        and not (variant.plan is not None and variant.plan.rewrites)
    ]
    return bool(compared) and all(v.losses_identical and v.weights_identical for v in compared)


def _final(variant: Variant, metric: str) -> float | None:
    return variant.quality[-1].metrics.get(metric) if variant.quality else None


def _metric_noise(pair: Pair, metric: str, value: float) -> float:
    """Half of the interval that chance alone explains, at 99%: from seeds, or from examples."""
    spreads = [_seed_error(variant, metric) for variant in (pair.new, pair.old)]
    known = [spread for spread in spreads if spread is not None]
    if len(known) == 2:
        return _Z99 * math.hypot(*known)
    counts = [v.quality[-1].num_examples for v in (pair.new, pair.old) if v.quality]
    if metric in SHARES and 0 <= value <= 1 and all(counts):
        return _Z99 * math.sqrt(value * (1 - value) * sum(1 / count for count in counts))
    return 0.05 * abs(value)


def _seed_error(variant: Variant, metric: str) -> float | None:
    """Standard deviation of a metric over the seeds; `None` with fewer than three."""
    values = [one.metrics[metric] for one in variant.repeats if metric in one.metrics]
    final = _final(variant, metric)
    values += [] if final is None else [final]
    if len(values) < 3:
        return None
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def _calibration_error(variant: Variant) -> float | None:
    if variant.calibration is not None:
        return variant.calibration.before.expected_error
    return _final(variant, "calibration_error")


def _bins_error(found: CalibrationEvidence | None) -> float:
    """Standard error of the expected calibration error, from the accuracy of each bin."""
    if found is None or not found.before.num_examples:
        return 0.05
    variance = 0.0
    for part in found.before.bins:
        if part.accuracy is not None:
            weight = part.num_examples / found.before.num_examples
            variance += weight**2 * part.accuracy * (1 - part.accuracy) / max(part.num_examples, 1)
    return math.sqrt(variance)


def _half_width(one: SliceQuality) -> float:
    """Half of a slice's interval, widened from its 95% to 99%."""
    assert one.quality is not None
    return (one.quality.high - one.quality.low) / 2 * _Z99 / _Z95
