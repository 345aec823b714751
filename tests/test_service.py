"""The last stage of an evaluation: serving and expense in the run, once, and gaps for the rest."""

import pytest
import torch

import remat
from remat.evaluation.book import Book
from remat.evaluation.pricing import Pricing
from remat.evaluation.service import serve_and_price
from remat.evaluation.weights import WEIGHTS_FILE, load_weights, save_weights
from remat.runs import load_run
from remat.runs.records import VariantStatus
from remat.workloads import build_model
from tests.test_evaluation import evaluate, make_workload

QUICK = remat.ServingOptions(
    seconds=0.5, update_seconds=0.02, batch_sizes=(1, 2), exports=False, target_p95_seconds=1.0
)
PRICED = remat.ExpenseOptions(devices=("L4", "Apple-M3-Max"))
SMALL = {"budgets": ["70%"], "policies": [], "peers": [], "front_points": 0}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One evaluation with serving and prices, and its folder."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    workload = make_workload(slices={"first is high": lambda batch: batch[0][:, 0] > 1})
    return evaluate(workload, folder, serving=QUICK, expenses=PRICED, **SMALL), folder


def gaps_of(run):
    return [gap for gap in run.gaps if gap.section in ("serving", "expense")]


def test_run_holds_serving_of_the_planned_model(finished):
    """The first plan's trained model is served, and its quality is that of the training."""
    run, folder = finished
    assert load_run(folder) == run
    assert run.serving.variant == "plan 70%"
    trained = next(variant for variant in run.variants if variant.label == "plan 70%")
    for form in run.serving.forms:
        assert form.metrics["loss"] == pytest.approx(trained.quality[-1].metrics["loss"], rel=1e-6)
        assert form.metrics["accuracy"] == trained.quality[-1].metrics["accuracy"]
    assert run.serving.target_p95_seconds == 1.0
    assert run.serving.recommended_batch_size in (1, 2)


def test_expenses_hold_every_trained_variant_on_every_device(finished):
    """Each of two variants on this machine and on both devices; times scale from one step."""
    run, _ = finished
    trained = [v for v in run.variants if v.status is VariantStatus.FINISHED]
    assert {(row.variant, row.device) for row in run.expenses} == {
        (v.label, device) for v in trained for device in ("cpu", "L4", "Apple-M3-Max")
    }
    for row in run.expenses:
        variant = next(v for v in trained if v.label == row.variant)
        assert row.is_measured == (row.device == "cpu")
        if row.is_measured:
            assert row.step_seconds == variant.step_times.median_seconds
        assert row.run_seconds == pytest.approx(row.step_seconds * len(variant.losses))
        assert row.run_usd >= row.epoch_usd > 0
        assert row.needed_bytes > 0
    assert sum(row.is_cheapest for row in run.expenses) == len(trained)
    assert not gaps_of(run)


def test_quality_of_forms_is_there_by_slice(finished):
    """Each class, and each slice that the workload names, against counting by hand."""
    run, _ = finished
    data = make_workload().eval_data
    for form in run.serving.forms:
        by_name = {one.name: one for one in form.slices}
        assert list(by_name) == ["label = 0", "label = 1", "label = 2", "first is high"]
        for label in range(3):
            count = int((data.tensors[1] == label).sum())
            assert by_name[f"label = {label}"].num_examples == count
        share = sum(by_name[f"label = {k}"].quality.value * int((data.tensors[1] == k).sum())
                    for k in range(3)) / 100  # fmt: skip
        assert share == pytest.approx(form.metrics["accuracy"])
        high = int((data.tensors[0][:, 0] > 1).sum())
        assert by_name["first is high"].num_examples == high


def test_time_to_target_is_epochs_until_the_reference_s_last_loss(finished):
    """The first epoch whose validation loss is within 1 % of that at the reference's end."""
    run, _ = finished
    quality = run.variants[0].quality
    limit = quality[-1].metrics["loss"] * 1.01
    epochs = next(q.epoch + 1 for q in quality if q.metrics["loss"] <= limit)
    for row in run.expenses:
        assert row.target_seconds == pytest.approx(epochs * row.epoch_seconds)


def test_time_to_a_named_target_is_in_steps(tmp_path):
    """An accuracy that one step reaches takes as long as one step, on every device."""
    run = evaluate(make_workload(targets={"accuracy": 0.01}), tmp_path / "a", expenses=PRICED,
                   check_every=1, **SMALL)  # fmt: skip
    assert all(row.target_seconds == pytest.approx(row.step_seconds) for row in run.expenses)
    assert "accuracy >= 0.01 after 1 steps" in run.expenses[0].arithmetic


def test_run_killed_before_serving_serves_the_trained_weights_when_resumed(tmp_path):
    """The weights wait in the folder, are those of the variant, and are gone once they served."""
    from remat.evaluation.identity import weights_sha256

    def interrupt(stage, _done, _total):
        if stage == "serve and price":
            raise KeyboardInterrupt

    workload = make_workload()
    with pytest.raises(KeyboardInterrupt):
        evaluate(workload, tmp_path / "a", serving=QUICK, progress=interrupt, **SMALL)
    trained = next(v for v in load_run(tmp_path / "a").variants if v.label == "plan 70%")
    model = build_model(workload)
    load_weights(model, tmp_path / "a")
    assert weights_sha256(model) == trained.weights_sha256
    run = evaluate(workload, None, resume=tmp_path / "a", serving=QUICK, **SMALL)
    assert run.serving.forms[0].metrics["loss"] == pytest.approx(
        trained.quality[-1].metrics["loss"]
    )
    assert not (tmp_path / "a" / WEIGHTS_FILE).exists()


def test_stage_does_nothing_a_second_time(finished):
    """A run that is resumed keeps what was measured; no figure is made anew."""
    run, folder = finished

    def progress(*_):
        raise AssertionError("something was done")

    before = (folder / "run.json").read_bytes()
    book = Book(folder, run, progress)
    serve_and_price(book, None, QUICK, Pricing(devices=(), table=None))
    assert book.run == run
    assert (folder / "run.json").read_bytes() == before


def test_model_that_cannot_be_served_is_a_gap(tmp_path):
    """A prediction that goes past the model: the run stands, with the reason in its gaps."""
    workload = make_workload(
        predict=lambda model, batch: (model[1:](model[0](batch[0])).softmax(-1), batch[1]), epochs=1
    )
    run = evaluate(workload, tmp_path / "a", serving=QUICK, **SMALL)
    assert run.passed, run.summary
    assert run.serving is None
    (gap,) = gaps_of(run)
    assert (gap.section, gap.variant) == ("serving", "plan 70%")
    assert "does not call the model itself" in gap.reason


def test_model_that_does_not_answer_in_eval_mode_is_a_gap(tmp_path):
    """What the user's code raises when it is only to answer is the gap's reason."""

    def loss(model, batch):
        if not model.training and not torch.is_grad_enabled():
            raise RuntimeError("no loss in eval mode")
        return model(batch[0]).square().mean()

    workload = make_workload(loss=loss, eval_data=None, predict=None, epochs=1)
    run = evaluate(workload, tmp_path / "a", serving=QUICK, **SMALL)
    assert run.serving is None
    assert "no loss in eval mode" in gaps_of(run)[0].reason


def test_broken_price_table_is_told_before_training(tmp_path):
    """Nothing is traced, no folder is made."""
    broken = tmp_path / "prices.toml"
    broken.write_text("schema_version = 1\n[price.T4]\nusd_per_hour = -1\n")
    with pytest.raises(remat.DeviceError, match=r"prices\.toml: price\.T4\.source is missing"):
        evaluate(make_workload(), tmp_path / "a", expenses=remat.ExpenseOptions(prices=broken))
    with pytest.raises(remat.DeviceError, match="'T5' is not in the device table"):
        evaluate(make_workload(), tmp_path / "a", expenses=remat.ExpenseOptions(devices=("T5",)))
    with pytest.raises(remat.DeviceError, match="must list at least one name"):
        evaluate(make_workload(), tmp_path / "a", expenses=remat.ExpenseOptions(devices=()))
    assert [path.name for path in tmp_path.iterdir()] == ["prices.toml"]


def test_weights_of_another_model_are_refused(tmp_path):
    """A missing file, a damaged one and another model's are told apart from a fault of ours."""
    model = torch.nn.Linear(2, 2)
    with pytest.raises(remat.RunError, match="cannot be read"):
        load_weights(model, tmp_path)
    save_weights(torch.nn.Linear(3, 2), tmp_path)
    with pytest.raises(remat.RunError, match="those of another model"):
        load_weights(model, tmp_path)
    (tmp_path / WEIGHTS_FILE).write_bytes(b"damaged")
    with pytest.raises(remat.RunError, match="cannot be read"):
        load_weights(model, tmp_path)


def test_tied_and_unsaved_tensors_come_back(tmp_path):
    """Weights under two names, and buffers that a state_dict leaves out, are bit for bit back."""

    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one = torch.nn.Linear(3, 3, bias=False)
            self.two = torch.nn.Linear(3, 3, bias=False)
            self.two.weight = self.one.weight
            self.register_buffer("seen", torch.randn(2, 3).t(), persistent=False)

    model, other = Tied(), Tied()
    save_weights(model, tmp_path)
    load_weights(other, tmp_path)
    assert torch.equal(other.one.weight, model.one.weight)
    assert other.two.weight is other.one.weight
    assert torch.equal(other.seen, model.seen)


@pytest.mark.slow
def test_evaluate_serves_and_prices_on_the_line(run_cli, write_workload, tmp_path):
    """The terminal recommends a form within the target, and names the cheapest device."""
    done = run_cli(
        "evaluate", write_workload(), "-b", "90%", "--out", tmp_path / "run", "--max-steps", 2,
        "--latency-target", "10s", "--devices", "L4,t4",
    )  # fmt: skip
    assert done.code == 0, done.err
    said = " ".join(done.out.split())
    assert "the most that gives 95 of 100 answers within 10.00 s" in said
    assert "cost plan 90%: < $0.01 a run on" in said
    run = load_run(tmp_path / "run")
    assert run.serving.target_p95_seconds == 10
    assert {row.device for row in run.expenses} == {"cpu", "L4", "T4"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--latency-target", "20"], "expected a number above 0 and a unit"),
        (["--no-serving", "--latency-target", "20ms"], "leave out --no-serving"),
        (["--devices", "T5"], "'T5' is not in the device table"),
        (["--devices", ","], "--devices names none"),
        (["--prices", "nowhere.toml"], "cannot be read"),
    ],
)
def test_evaluate_refuses_bad_serving_and_price_options(run_cli, write_workload, options, message):
    """Each is told in one line before training, with exit code 2."""
    done = run_cli("evaluate", write_workload(), *options)
    assert done.code == 2
    assert message in " ".join(done.err.split())


def test_page_shows_what_the_plan_costs_a_request(finished):
    """Ops and ratio of every form, and each form's quality on each slice, as in the run."""
    from remat.report.evidence import evidence_sections

    run, _ = finished
    (section,) = [one for one in evidence_sections(run) if one.key == "serving"]
    tables = {one.title: one for one in section.tables}
    forms = tables["Forms of the model"]
    by_form = {row[0]: dict(zip(forms.columns, row, strict=True)) for row in forms.rows}
    assert by_form["plan attached"]["Ops"] == by_form["as trained"]["Ops"]
    assert by_form["plan attached"]["Largest difference"] == "0"
    assert "[" in by_form["plan attached"]["Latency against as trained"]
    slices = tables["Quality of each form by slice"]
    assert [row[0] for row in slices.rows] == [s.name for s in run.serving.forms[0].slices]
    assert len({row[3:] for row in slices.rows}) > 1
    assert all(len(set(row[3:])) == 1 for row in slices.rows)  # the same model three times
