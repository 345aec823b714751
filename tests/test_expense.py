"""Expense: money, energy and CO2 against hand-computed rows; price tables and counters."""

import dataclasses
import re

import pytest

import remat
from remat.cost.devices import load_devices
from remat.evaluation.energy import NvmlMeter, find_meter
from remat.evaluation.expense import Costed, Need, Schedule, price_sources, price_variants
from remat.sizing.offers import Offer, Price, PriceTable, Purchase, Rate, Terms
from remat.sizing.prices import load_price_table, load_prices

GIB = 1024**3
DEVICES = load_devices()
HERE, L4, A100 = (DEVICES[name] for name in ("cpu", "L4", "A100-40GB"))


def price(usd):
    return Price(usd_per_hour=usd, source="a test", date="2026-11")


def rate(value):
    return Rate(value=value, source="a test", date="2026-11")


OWNED = Purchase(purchase_usd=8760, life_years=2, utilization=0.5, usd_per_kwh=0.2, watts=500)
TABLE = PriceTable(
    prices={"L4": price(0.6), "A100-40GB": price(2.0)},
    others={
        "A100-40GB": (
            Offer(device="A100-40GB", name="reclaimed", terms=Terms.SPOT, price=price(1.0)),
            Offer(
                device="A100-40GB", name="bought", terms=Terms.OWNED, purchase=OWNED,
                price=price(OWNED.usd_per_hour),
            ),
        )
    },
    watts={"L4": rate(72), "A100-40GB": rate(400)},
    carbon=rate(0.5),
    storage=rate(0.02),
    transfer=rate(0.08),
)  # fmt: skip
SCHEDULE = Schedule(steps_per_epoch=1000, epochs=3, stored_bytes=5 * 10**9)


def costed(variant="no plan", *, needs=None, **more):
    """A step of 2 s here whose roofline is 1 s; half of that on an L4, a tenth on an A100."""
    roofline = {"L4": 0.5, "A100-40GB": 0.1}
    needed = needs or {"L4": 30 * GIB, "A100-40GB": 30 * GIB}
    settings = {
        "variant": variant,
        "is_reference": variant == "no plan",
        "step_seconds": 2.0,
        "roofline_seconds": 1.0,
        "needs": {
            name: Need(roofline_seconds=roofline[name], needed_bytes=size)
            for name, size in needed.items()
        },
    }
    return Costed(**(settings | more))


def priced(*variants, **more):
    settings = {"here": HERE} | more
    return price_variants(variants, [L4, A100], TABLE, SCHEDULE, **settings)


def find(rows, variant, device, offer=""):
    (row,) = [
        r for r in rows if (r.variant, r.device) == (variant, device) and offer in r.offer
    ]  # fmt: skip
    return row


def test_money_and_time_follow_by_hand():
    """Step 2 s x 0.1, 1,000 steps, 3 epochs, 2 USD an hour; 5 GB stored and moved out."""
    row = find(priced(costed(target_steps=2000)), "no plan", "A100-40GB", "on demand")
    assert not row.is_measured
    assert row.step_seconds == pytest.approx(0.2)
    assert row.epoch_seconds == pytest.approx(200)
    assert row.run_seconds == pytest.approx(600)
    assert row.target_seconds == pytest.approx(400)
    assert row.epoch_usd == pytest.approx(200 / 3600 * 2)
    assert row.target_usd == pytest.approx(400 / 3600 * 2)
    assert row.storage_usd == pytest.approx(0.1)
    assert row.transfer_usd == pytest.approx(0.4)
    assert row.run_usd == pytest.approx(600 / 3600 * 2 + 0.5)
    assert (row.price_source, row.price_date) == ("a test", "2026-11")
    assert "x 0.1 (roofline of A100-40GB over that of cpu)" in row.arithmetic


def test_spot_is_dearer_by_nothing_and_owned_pays_no_storage():
    """8,760 USD over 2 x 8,760 h half used is 1 USD, and 0.5 kW x 0.2 USD is 0.1 USD an hour."""
    rows = priced(costed())
    spot, owned = (find(rows, "no plan", "A100-40GB", name) for name in ("reclaimed", "bought"))
    assert spot.run_usd == pytest.approx(600 / 3600 * 1.0 + 0.5)
    assert owned.usd_per_hour == pytest.approx(1.1)
    assert owned.run_usd == pytest.approx(600 / 3600 * 1.1)
    assert owned.storage_usd is owned.transfer_usd is None
    assert "8,760 USD / (2 years x 8,760 h x 50% in use) + 500 W x 0.2 USD/kWh" in owned.arithmetic


def test_energy_is_power_times_time_and_marked_as_an_estimate():
    """400 W for 600 s are 0.0667 kWh, at 0.5 kg each; the source of the watts is named."""
    row = find(priced(costed()), "no plan", "A100-40GB", "on demand")
    assert row.kilowatt_hours == pytest.approx(0.4 * 600 / 3600)
    assert row.kilograms_co2 == pytest.approx(0.5 * 0.4 * 600 / 3600)
    assert not row.is_energy_measured
    assert row.energy_source == "estimated from 400 W (a test, 2026-11)"


def test_energy_that_a_counter_saw_is_marked_as_measured():
    """36 J a step for 3,000 steps are 0.03 kWh, on this machine only."""
    rows = priced(costed(joules_per_step=36.0), counter="a counter")
    here = find(rows, "no plan", "cpu")
    assert here.is_measured
    assert here.is_energy_measured
    assert here.kilowatt_hours == pytest.approx(0.03)
    assert here.run_seconds == pytest.approx(6000)
    assert not find(rows, "no plan", "L4").is_energy_measured


def test_variant_that_does_not_fit_has_no_figures():
    """30 GiB do not fit a card of 24 GB: the row says so, and costs nothing."""
    row = find(priced(costed()), "no plan", "L4")
    assert not row.fits
    assert row.run_usd is row.step_seconds is None
    assert row.arithmetic.startswith("does not fit: needs 30.00 GiB of 21.68 GiB")


def test_cheapest_device_of_a_plan_is_compared_with_that_without_one():
    """A plan of 20 GiB fits the 24 GB card; the price of the run is set against the other's."""
    small = {"L4": 20 * GIB, "A100-40GB": 20 * GIB}
    planned = costed("plan", needs=small, step_seconds=2.2, roofline_seconds=1.1)
    cheap = dataclasses.replace(
        TABLE, prices={**TABLE.prices, "L4": price(0.24)}, others={}, storage=None, transfer=None
    )
    rows = price_variants([costed(), planned], [L4, A100], cheap, SCHEDULE, here=HERE)
    best = [row for row in rows if row.is_cheapest]
    assert [(row.variant, row.device) for row in best] == [("no plan", "A100-40GB"), ("plan", "L4")]
    assert best[0].run_usd == pytest.approx(0.2 * 3000 / 3600 * 2.0)
    assert best[1].run_usd == pytest.approx(1.0 * 3000 / 3600 * 0.24)
    assert best[1].arithmetic.endswith(
        "The same run fits L4 (24 GB) at 0.60 of the price: 0.2 USD / 0.333 USD on A100-40GB "
        "without a plan."
    )


def test_plan_that_is_cheaper_nowhere_says_so():
    """A step that is a tenth longer on the same device costs a tenth more."""
    without = dataclasses.replace(TABLE, others={}, storage=None, transfer=None)
    rows = price_variants(
        [costed(), costed("plan", step_seconds=2.2)], [L4, A100], without, SCHEDULE, here=HERE
    )
    (row,) = [row for row in rows if row.is_cheapest and row.variant == "plan"]
    assert row.arithmetic.endswith(
        "Under this plan the run fits A100-40GB (40 GB) at 1.10 of the price: 0.367 USD / 0.333 "
        "USD on A100-40GB without a plan, so it saves no money."
    )


def test_plan_that_alone_fits_says_so():
    """Where nothing fits without a plan, there is no price to compare with."""
    huge = {"L4": 90 * GIB, "A100-40GB": 90 * GIB}
    rows = priced(costed(needs=huge), costed("plan"))
    (row,) = [row for row in rows if row.is_cheapest]
    assert row.variant == "plan"
    assert row.arithmetic.endswith("USD a run; without a plan, none of the devices.")


def test_device_without_a_price_keeps_its_times():
    """Time and energy stand, money is missing and said to be."""
    bare = dataclasses.replace(TABLE, prices={}, others={})
    rows = price_variants([costed()], [A100], bare, SCHEDULE, here=HERE)
    row = find(rows, "no plan", "A100-40GB")
    assert row.run_usd is None
    assert row.run_seconds == pytest.approx(600)
    assert "no price of A100-40GB is in the table" in row.arithmetic
    assert not any(row.is_cheapest for row in rows)


# -- the table ------------------------------------------------------------------------------------

SOURCED = 'source = "mine"\ndate = "2026-11"\n'
BOUGHT = (
    '[[offer.T4]]\nname = "mine"\nterms = "owned"\npurchase_usd = 100\nlife_years = 1\n'
    "utilization = 0.5\nusd_per_kwh = 0.1\nwatts = 70\n" + SOURCED
)


def table_of(tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_text(f"schema_version = 1\n{text}", encoding="utf-8")
    return load_price_table(path)


def test_every_row_of_the_table_has_a_source_and_a_date():
    """The package's rows name devices of the table, and say whence and when."""
    table = load_price_table()
    named = {*table.prices, *table.others, *table.watts}
    assert named <= set(DEVICES)
    assert set(table.watts) == set(DEVICES)
    offers = [offer for device in named for offer in table.offers(device)]
    assert {offer.terms for offer in offers} == set(Terms)
    rates = [*table.watts.values(), table.carbon, table.storage, table.transfer]
    for row in (*(offer.price for offer in offers), *rates):
        was_found = re.search(r"as read by|as in |the same |\w\.ai/", row.source)
        assert was_found or not row.is_verified, row.source
        assert row.is_verified == ("not found again" not in row.source)
        assert re.fullmatch(r"20\d\d-\d\d(-\d\d)?", row.date)


def test_offers_of_a_file_are_added_and_replace_those_of_their_name(tmp_path):
    """A user's price, offer, power and carbon stand over the package's; the rest stays."""
    table = table_of(
        tmp_path,
        BOUGHT
        + BOUGHT.replace("T4", "H100-80GB").replace('= "mine"\nt', '= "RunPod, interruptible"\nt')
        + "[price.T4]\nusd_per_hour = 9\n" + SOURCED
        + "[power.T4]\nwatts = 60\n" + SOURCED
        + "[carbon]\nkilograms_per_kwh = 0.05\n" + SOURCED,
    )  # fmt: skip
    assert [offer.label for offer in table.offers("T4")] == ["cloud: on demand", "owned: mine"]
    assert table.offers("T4")[0].price.usd_per_hour == 9
    assert table.offers("T4")[1].price.usd_per_hour == pytest.approx(100 / 4380 + 0.007)
    assert [offer.terms for offer in table.offers("H100-80GB")] == [Terms.CLOUD, Terms.OWNED]
    assert table.watts["T4"].value == 60
    assert table.carbon.value == 0.05
    assert table.storage == load_price_table().storage
    assert load_prices(tmp_path / "mine.toml")["T4"].usd_per_hour == 9


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOUGHT.replace("= 0.5", "= 1.5"), r"offer\.T4\[1\]\.utilization is 1\.5"),
        (BOUGHT.replace("owned", "lent"), r"offer\.T4\[1\]\.terms is 'lent', expected one of"),
        (BOUGHT.replace("watts = 70\n", ""), r"offer\.T4\[1\]\.watts is missing"),
        (BOUGHT + "watt = 3\n", r"offer\.T4\[1\]\.watt is not a known field"),
        (BOUGHT.replace('"owned"', '"spot"'), r"offer\.T4\[1\]\.purchase_usd is not a known"),
        ("[offer.T4]\nname = 3\n", r"offer must be lists by device"),
        ("offer = 3\n", r"offer must be lists by device"),
        ("[power.T4]\nwatts = 0\n" + SOURCED, r"power\.T4\.watts is 0, expected a number above 0"),
        ("[power]\nT4 = 3\n", "power must be a table of devices"),
        ("carbon = 3\n", "carbon must be a table"),
        ("[storage]\nusd_per_gb_month = 0.1\nsource = 'x'\n", r"storage\.date is missing"),
        (BOUGHT + "verified = 'no'\n", r"offer\.T4\[1\]\.verified is 'no', expected true or false"),
    ],
)
def test_broken_price_row_names_file_row_and_field(tmp_path, text, message):
    """One error before anything runs, with where to look."""
    with pytest.raises(remat.DeviceError, match=rf"mine\.toml: {message}"):
        table_of(tmp_path, text)


def test_figures_without_a_verified_source_are_marked_and_listed(tmp_path):
    """A row that says so marks what follows from it, and no other; each source is listed once."""
    mine = "[price.L4]\nusd_per_hour = 1\nverified = false\n" + SOURCED
    mine += "[power.A100-40GB]\nwatts = 400\nverified = false\n" + SOURCED
    table = dataclasses.replace(table_of(tmp_path, mine), others={})
    one = costed(needs={"L4": GIB, "A100-40GB": GIB})
    rows = price_variants([one], [L4, A100], table, SCHEDULE, here=HERE)
    marked = {row.device: (row.is_price_verified, row.is_energy_verified) for row in rows}
    assert marked == {"cpu": (True, True), "L4": (False, True), "A100-40GB": (True, False)}
    sources = price_sources(rows, table)
    assert {one.name for one in sources if not one.is_verified} == {
        "L4, cloud: on demand", "A100-40GB, highest power"
    }  # fmt: skip
    assert len({one.name for one in sources}) == len(sources) == 9
    assert all(one.source and one.date for one in sources)


# -- counters -------------------------------------------------------------------------------------


def make_zones(folder, values, span=1000):
    for name, value in values.items():
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "energy_uj").write_text(f"{value}\n")
        (folder / name / "max_energy_range_uj").write_text(f"{span}\n")


def test_rapl_packages_are_summed_and_carried_over(tmp_path):
    """Two packages, one of which runs over its range; parts of a package are not counted twice."""
    make_zones(tmp_path, {"intel-rapl:0": 100, "intel-rapl:1": 900, "intel-rapl:0:0": 50})
    meter = find_meter("cpu", tmp_path)
    before = meter.joules()
    make_zones(tmp_path, {"intel-rapl:0": 300, "intel-rapl:1": 200, "intel-rapl:0:0": 99})
    assert meter.joules() - before == pytest.approx((200 + 300) / 1e6)


def test_no_counter_is_no_meter(tmp_path):
    """Without counters, or with broken ones, energy is not measured."""
    assert find_meter("cpu", tmp_path) is None
    make_zones(tmp_path, {"intel-rapl:0": "broken"})
    assert find_meter("cpu", tmp_path) is None


def test_nvml_counts_millijoules():
    """The driver counts in thousandths."""
    assert NvmlMeter(millijoules=lambda: 2500).joules() == 2.5
