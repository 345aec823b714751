"""What fits where: sizes against traces of their own, prices, shards, and the command."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch
from torch import nn

import remat
from remat.cost.devices import load_devices
from remat.fit import Fit
from remat.sizing.prices import load_prices
from remat.sizing.records import Mode, Survey
from remat.sizing.scaling import ScaledTraces, num_examples, with_examples
from remat.sizing.search import largest_fitting
from remat.sizing.sharding import gathered_bytes, shard
from remat.sizing.subjects import batch_subject, depth_subject, image_subject, sequence_subject
from remat.sizing.survey import Sizer, Subject, survey
from remat.trace.capture import capture

MIB = 1024**2
A100 = load_devices()["A100-80GB"]


class Block(nn.Module):
    """A perceptron with a residual connection."""

    def __init__(self, width=64):
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.down(torch.nn.functional.gelu(self.up(x)))


def model(depth=4, width=64):
    return nn.Sequential(*[Block(width) for _ in range(depth)])


def batch(number, width=64):
    return torch.empty(number, 128, width, device="meta")


def loss(network, x):
    return network(x).square().mean()


def subject(**more):
    return Subject(
        name="perceptron", model=model(), make_batch=batch, asked=8, loss=loss, **more
    )  # fmt: skip


def device(mebibytes, name="small"):
    """An A100 of another size."""
    return dataclasses.replace(
        A100, name=name, usable_bytes=mebibytes * MIB, context_bytes=10 * MIB
    )  # fmt: skip


def test_scaled_trace_is_the_trace_of_that_size():
    """Bytes, FLOPs and traffic of 37 examples follow from 2 and 4, op by op, exactly."""
    traces = {n: capture(model(), batch(n), loss=loss) for n in (2, 4, 37)}
    scaled = ScaledTraces(traces[2], traces[4], 2, 4).at(37)
    real = traces[37]
    assert [s.size_bytes for s in scaled.storages] == [s.size_bytes for s in real.storages]
    assert [(o.flops, o.moved_bytes) for o in scaled.ops] == [
        (o.flops, o.moved_bytes) for o in real.ops
    ]


def test_traces_of_other_ops_are_not_mixed():
    """Where more examples take another path, that is said."""

    class Forked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def forward(self, x):
            return self.layer(x) if x.shape[0] < 3 else self.layer(x).tanh()

    first, second = (capture(Forked(), batch(n), loss=loss) for n in (2, 4))
    with pytest.raises(remat.CaptureError, match="other ops for 4 examples than for 2"):
        ScaledTraces(first, second, 2, 4)


def test_estimate_equals_the_simulation_where_nothing_is_recomputed():
    """Reserved bytes from the timeline are those of a simulated step."""
    fit = Fit(model(), batch(8), loss=loss, device=A100)
    assert fit.plain.estimated(()) == fit.keep_all_peak_bytes


@pytest.mark.parametrize("most", [1, 2, 3, 10, 999, 1000])
@pytest.mark.parametrize("available", [50, 99, 100, 109, 110, 5_000, 10_090, 10**9])
def test_search_finds_the_last_size_that_fits(most, available):
    """The secant ends where counting up would, also where what is needed has a bend."""

    def needed(size):
        return max(90 + 10 * size, 50 * size - 400)

    counted = max((n for n in range(1, most + 1) if needed(n) <= available), default=0)
    assert largest_fitting(needed, available, most=most) == counted
    assert largest_fitting(needed, available, empty=90, most=most) == counted
    for known in range(1, counted + 1, max(1, counted // 7)):
        assert largest_fitting(needed, available, at_least=known, most=most) == counted


def test_search_asks_for_few_sizes():
    """An affine need is settled in a few questions, however large the answer."""
    asked = []

    def needed(size):
        asked.append(size)
        return 1000 + 7 * size

    assert largest_fitting(needed, 1000 + 7 * 54_321, empty=1000) == 54_321
    assert asked == [1, 64, 4096, 54_321, 54_322]
    asked.clear()
    assert largest_fitting(needed, 1000 + 7 * 54_321) == 54_321
    assert len(asked) <= 12


@pytest.mark.parametrize("mode", list(Mode))
def test_largest_size_fits_and_one_more_does_not(mode):
    """Simulated by itself, the largest size keeps the device's memory; the next does not."""
    small = device(128)
    sizer = Sizer(subject(), small, small.available_bytes)
    largest = sizer.largest(mode)
    assert largest > 1
    if mode is Mode.PLANNED:
        return  # one more may fit by another choice; see the test of largest_batch

    def needed(size):
        fit = Fit(model(), batch(size), loss=loss, device=small)
        return fit.plain.estimated(fit.plain.blocks if mode is Mode.ALL_BLOCKS else ())

    assert needed(largest) <= small.available_bytes < needed(largest + 1)


def test_search_goes_on_as_far_as_memory_does():
    """A model of four parameters: thousands of millions of examples fit an A100, and no more."""
    tiny = nn.Sequential(nn.Linear(1, 1), nn.GELU(), nn.Linear(1, 1))

    def examples(number):
        return torch.empty(number, 1, device="meta")

    made = Subject(name="tiny", model=tiny, make_batch=examples, asked=8, loss=loss)
    largest = Sizer(made, A100, A100.available_bytes).largest(Mode.NOTHING)
    assert largest > 2**30

    def needed(number):
        return Fit(tiny, examples(number), loss=loss, device=A100).keep_all_peak_bytes

    assert needed(largest) <= A100.available_bytes < needed(largest + 1)


def test_batches_that_do_not_grow_are_refused():
    """A function that ignores how many examples it is asked for has no largest batch."""
    made = Subject(
        name="stuck", model=model(1), make_batch=lambda _n: batch(2), asked=2, loss=loss
    )  # fmt: skip
    with pytest.raises(remat.WorkloadError, match="as many examples as it is asked for"):
        survey(made, [A100])


def test_survey_orders_modes_and_names_the_cheapest():
    """Recomputation never makes the batch smaller; price is per epoch where it is known."""
    prices = {
        "one": remat_price(2.0), "two": remat_price(0.5), "tight": remat_price(0.01)
    }  # fmt: skip
    found = survey(
        subject(), [device(128, "one"), device(128, "two"), device(24, "tight")],
        prices=prices, examples_per_epoch=10_000,
    )  # fmt: skip
    for row in found.devices:
        nothing, blocks, planned = (size.largest for size in row.sizes)
        assert nothing <= planned
        assert blocks <= planned
        for size in row.sizes:
            if size.largest:
                assert size.needed_bytes <= row.available_bytes
                assert size.epoch_seconds == pytest.approx(10_000 / size.samples_per_second)
                usd = size.epoch_seconds / 3600 * row.usd_per_hour
                assert size.epoch_usd == pytest.approx(usd)
    assert max(size.largest for size in found.devices[2].sizes) < 8  # what was asked for
    assert found.cheapest == "two"
    assert Survey.model_validate_json(found.model_dump_json()) == found


def remat_price(usd):
    from remat.sizing.offers import Price

    return Price(usd_per_hour=usd, source="a test", date="2026-11")


def test_survey_says_what_is_missing_where_nothing_fits():
    """Not one example on the largest device: bytes missing, what fills it, what would help."""
    with pytest.raises(remat.BudgetError, match=r"not even a batch of 1 fits on larger .* MiB are "
                       r"missing.*--shards N") as caught:  # fmt: skip
        survey(subject(), [device(16, "tiny"), device(18, "larger")])
    assert {"parameters", "optimizer", "gradients"} <= set(caught.value.blame)


def test_bytes_that_grow_with_the_square_are_traced_again():
    """A loss over all pairs of rows: the largest batch is that of a trace of its own size."""

    def pairs(network, x):
        flat = network(x).flatten(0, 1)
        return (flat @ flat.T).logsumexp(dim=1).mean()

    made = Subject(name="pairs", model=model(2), make_batch=batch, asked=8, loss=pairs)
    small = device(200)
    found = survey(made, [small])
    assert any("faster than the batch" in note for note in found.notes)
    nothing = found.devices[0].sizes[0]
    fit = Fit(model(2), batch(nothing.largest), loss=pairs, device=small)
    assert fit.keep_all_peak_bytes <= small.available_bytes


def test_shards_divide_state_and_gather_blocks():
    """One of four devices holds a quarter of the state, and the parameters of two blocks whole."""
    trace = capture(model(4), batch(2), loss=loss)
    block = 4 * (64 * 256 + 256 + 256 * 64 + 64)
    assert gathered_bytes(trace) == 3 * block  # two blocks' parameters, one's gradients
    parts = shard(trace, 4)
    for kind in ("parameters", "gradients", "optimizer"):
        whole, part = (sum(s.size_bytes for s in t.storages if s.kind == kind)
                       for t in (trace, parts))  # fmt: skip
        assert whole / 4 <= part <= whole / 4 + len(trace.storages)
    assert shard(trace, 1) is trace
    with pytest.raises(remat.WorkloadError, match="shards must be a whole number"):
        shard(trace, 0)


def test_shards_let_larger_batches_fit():
    """A model of many parameters fits more examples on each of eight devices."""
    wide = {"model": model(6, 256), "make_batch": lambda n: batch(n, 256)}
    base = {"name": "wide", "asked": 8, "loss": loss}
    small = device(128)
    alone, many = (
        survey(Subject(**base, **wide, shards=n), [small]).devices[0].sizes[0] for n in (1, 8)
    )
    assert many.largest > alone.largest
    assert many.samples_per_second > 4 * alone.samples_per_second


def test_batches_are_resized_by_their_first_dimension():
    """Tensors that count examples grow; others, and small integers' values, stay."""
    given = {"x": torch.randn(4, 3), "y": torch.arange(4), "weights": torch.ones(5), "n": 7}
    made = with_examples(given, 6)
    assert num_examples(given) == 4
    assert made["x"].shape == (6, 3)
    assert made["y"].tolist() == [0, 1, 2, 3, 0, 1]
    assert made["weights"] is given["weights"]
    assert made["n"] == 7
    with pytest.raises(remat.WorkloadError, match="no tensor whose first dimension"):
        num_examples({"scale": torch.tensor(3.0)})


def test_largest_batch_is_planned_and_confirmed():
    """The plan is for that batch, keeps the budget on the machine, and a real step agrees."""
    network = model(3)
    found = remat.largest_batch(network, lambda n: torch.randn(n, 128, 64), "24MiB", loss=loss)
    assert found.batch_size > 2
    assert found.plan.budget_bytes == 24 * MIB
    assert found.plan.fingerprint.batch[0].shape[0] == found.batch_size
    assert found.measurement is not None
    assert found.measurement.peak_bytes <= 24 * MIB
    assert found.measurement.peak_bytes == pytest.approx(found.plan.predicted_peak_bytes, rel=0.01)
    twice = Fit(network, batch(found.batch_size * 2), loss=loss, chunks=False)
    with pytest.raises(remat.BudgetError):
        twice.plan("24MiB")
    with pytest.raises(remat.BudgetError):
        remat.largest_batch(network, batch, "1MiB", loss=loss)
    elsewhere = remat.largest_batch(network, batch, "2GiB", loss=loss, device="T4")
    assert elsewhere.measurement is None


def test_sequences_grow_up_to_the_models_positions():
    """Tokens are made many instead of sequences, as far as the model has positions."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=1, n_embd=32, n_head=2, vocab_size=64, n_positions=256, use_cache=False
    )
    with torch.device("meta"):
        network = transformers.GPT2LMHeadModel(config).train()
    tokens = torch.zeros(2, 64, dtype=torch.int64, device="meta")
    made = sequence_subject("gpt2", network, {"input_ids": tokens, "labels": tokens})
    assert made.make_batch(128)["labels"].shape == (2, 128)
    found = survey(made, [A100])
    assert [size.largest for size in found.devices[0].sizes] == [256] * 3
    assert found.notes == ("No sequence above 256 was tried: the model has no more positions.",)
    with pytest.raises(remat.WorkloadError, match="holds no sequences"):
        sequence_subject("perceptron", model(), batch(2))


def needs(made: Subject, size: int) -> int:
    """Trace one size by itself and return what it needs with nothing recomputed."""
    fit = Fit(
        made.model_of(size), made.make_batch(size), loss=made.loss, optimizer=made.optimizer,
        device=device(10_000), chunks=False,
    )  # fmt: skip
    return fit.plain.estimated(())


@pytest.mark.parametrize(
    ("make", "unit"),
    [
        (
            lambda: image_subject(
                "convolutions",
                nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 3)),
                torch.empty(2, 3, 48, 48, device="meta"),
                loss=loss,
            ),
            16,
        ),
        (lambda: depth_subject("perceptron", model, batch(64), asked=4, loss=loss), 1),
    ],
    ids=["image size", "depth"],
)
def test_images_and_depth_grow_to_the_last_that_fits(make, unit):
    """The largest size with nothing recomputed fits, and one more unit of it does not."""
    made = make()
    assert made.unit == unit
    wanted = 3 * made.asked
    small = device(needs(made, wanted) // MIB + 1)
    found = survey(made, [small])
    assert found.dimension == made.dimension
    nothing, _, planned = found.devices[0].sizes
    assert nothing.largest % unit == 0
    assert nothing.largest >= wanted
    assert needs(made, nothing.largest) <= small.available_bytes
    assert needs(made, nothing.largest + unit) > small.available_bytes
    assert planned.largest >= nothing.largest


def test_a_config_is_made_deeper_and_for_larger_images(tmp_path):
    """Layers and image size of a configuration are replaced, kinds of layers repeated."""
    pytest.importorskip("transformers")
    from remat.architectures import depth_of, load_architecture

    config = tmp_path / "config.json"
    config.write_text(
        '{"model_type": "vit", "hidden_size": 32, "num_hidden_layers": 1, "image_size": 32, '
        '"num_attention_heads": 2, "intermediate_size": 32, "patch_size": 16}'
    )
    made = load_architecture(config, "2x3x64x64", depth=3, image_size=64).model
    assert depth_of(made) == 3
    assert made.vit.embeddings.position_embeddings.shape[1] == 1 + (64 // 16) ** 2
    with pytest.raises(remat.WorkloadError, match="states no number of hidden layers"):
        depth_of(model())
    with pytest.raises(remat.WorkloadError, match="holds no square images"):
        image_subject("perceptron", model(), batch(2))


def test_batch_subject_asks_for_the_batch_given():
    """The workload's own batch is what the cheapest device is asked to hold."""
    assert batch_subject("perceptron", model(), batch(8), loss=loss).asked == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('schema_version = 2', "schema_version 2; this remat reads 1"),
        ('schema_version = 1\n[price.T4]\nusd_per_hour = -1\nsource = "me"\ndate = "x"',
         "price.T4.usd_per_hour is -1, expected a number above 0"),
        ('schema_version = 1\n[price.T4]\nusd_per_hour = 1\ndate = "x"', "T4.source is missing"),
        ('schema_version = 1\n[price.T4]\neur = 1', "price.T4.eur is not a known field"),
        ('schema_version = 1\n[prices]', "prices is not a known field"),
        ('schema_version = ', "is damaged: not TOML"),
    ],
)  # fmt: skip
def test_bad_price_files_are_refused(tmp_path, text, message):
    """A price file with a missing or absurd figure is refused with its path and field."""
    path = tmp_path / "prices.toml"
    path.write_text(text)
    with pytest.raises(remat.DeviceError, match=re.escape(message)):
        load_prices(path)


def test_every_price_is_of_a_device_with_source_and_date():
    """The package's prices name devices of the table, and say whence and when."""
    assert set(load_prices()) <= set(load_devices())
    assert all(re.match(r"20\d\d-\d\d", price.date) for price in load_prices().values())


def test_cli_fit_prints_a_table_json_and_a_page(run_cli, write_workload, tmp_path):
    """Table, JSON by its schema, and a page with a picture and no outside reference."""
    page, prices = tmp_path / "fit.html", tmp_path / "prices.toml"
    prices.write_text(
        'schema_version = 1\n[price.T4]\nusd_per_hour = 9.0\nsource = "me"\ndate = "2026-11"\n'
        "verified = false\n"
    )
    line = ("fit", write_workload(), "--devices", "T4,l4", "--prices", prices)
    done = run_cli(*line, "--page", page)
    assert done.code == 0, done.err
    assert "L4" in done.out
    assert "Cheapest for the batch of 128 asked for: L4" in done.out
    assert re.search(r"\n\* T4: \$9\.00 an hour, me, 2026-11; not verified", done.out)
    assert re.search(r"\nL4: \$0\.80 an hour, Amazon EC2", done.out)
    assert re.search(r"\nT4 .*\$0\.01 \*", done.out)
    text = page.read_text()
    assert "<svg" in text
    assert "<script" not in text
    assert "0.01 *</td>" in text
    assert "* T4: $9.00 an hour; me, 2026-11; <strong>not verified</strong>" in text
    found = Survey.from_data(json.loads(run_cli(*line, "--json").out), "stdout")
    assert [row.device for row in found.devices] == ["T4", "L4"]
    assert [row.is_price_verified for row in found.devices] == [False, True]
    assert found.examples_per_epoch == 256


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--devices", "H10"), 2, "Did you mean"),
        (("--devices", ","), 2, "names none"),
        (("--device-file", "nowhere.toml"), 2, "cannot be read"),
        (("--prices", "nowhere.toml"), 2, "cannot be read"),
        (("--shards", "0"), 2, "--shards"),
        (("--devices", "T4", "--sequence"), 2, "holds no sequences"),
        (("--devices", "T4", "--sequence", "--depth"), 2, "give one of them"),
        (("--devices", "T4", "--depth"), 2, "--depth needs --hf-config"),
        (("--devices", "T4", "--image-size"), 2, "holds no square images"),
        (("--batch", "4x"), 2, "take the place of WORKLOAD"),
    ],
)
def test_cli_fit_refuses_bad_input(run_cli, write_workload, words, code, message):
    """Each bad input is one line that names it, and exit code 2."""
    done = run_cli("fit", write_workload(), *words)
    assert done.code == code
    assert message in done.err.replace("\n", " ")


def test_cli_fit_says_what_is_missing(run_cli, write_workload, tmp_path):
    """A device too small for one example: exit code 3, with what is missing."""
    table = tmp_path / "devices.toml"
    table.write_text(
        "schema_version = 1\n[device.T4]\nusable_bytes = 600_000_000\ncontext_bytes = 599_000_000\n"
    )
    done = run_cli("fit", write_workload(), "--devices", "T4", "--device-file", table, "--json")
    assert done.code == 3
    facts = json.loads(done.out)
    assert "are missing" in facts["message"]
    assert "offloading" in facts["message"]
    assert facts["minimum_bytes"] > facts["budget_bytes"] == 600_000_000
    assert facts["blame"]["context"] == 599_000_000
    assert sum(facts["blame"].values()) == facts["minimum_bytes"]
