"""Bad input: one clear error of the right class, which says what was expected and what to do."""

from __future__ import annotations

import builtins
import copy
import inspect
import json
import pickle
import random

import numpy as np
import pytest
import torch
from torch import nn

import remat
import remat.errors
from remat.regions.apply import is_applied
from remat.trace.standin import random_states
from tests.models import Block, square_mean, tightest


def plan(model, batch, **step):
    return remat.plan(model, batch, "1000%", **step)


def measure(model, batch, **step):
    return remat.measure(model, batch, steps=1, **step)


VERBS = pytest.mark.parametrize("verb", [plan, measure, remat.simulate])


def blocks():
    return nn.Sequential(*(Block(16) for _ in range(3)))


@pytest.fixture
def model():
    return blocks()


@pytest.fixture
def batch():
    return torch.randn(8, 16)


@pytest.fixture
def made(model, batch):
    """A plan that recomputes something."""
    plan = tightest(model, batch, loss=square_mean)
    assert plan.regions
    return plan


# -- losses, batches, models, optimizers ----------------------------------------------------------


def without_gradients(model, batch):
    with torch.no_grad():
        return square_mean(model, batch)


@VERBS
@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (without_gradients, r"requires no gradient.*torch\.no_grad"),
        (lambda m, b: m(b), r"shape \(8, 16\), expected a scalar.*\.mean\(\)"),
        (lambda m, b: 3.0, "returned float, expected a scalar tensor"),
        (lambda m, b: None, "returned NoneType, expected a scalar tensor"),
        (None, r"returned Tensor of shape \(8, 16\).*pass loss="),
        (3, r"loss must be a function \(model, batch\).*got int"),
        (lambda output: output, r"failed in forward: TypeError.*loss= fits"),
        (lambda m, b: 1 / 0, "failed in forward.*ZeroDivisionError"),
        (lambda m, b: m(b).sum().to(torch.complex64), "failed in backward.*complex64"),
    ],
)
def test_losses_that_are_none(verb, model, batch, loss, message):
    """What is no loss is named, with what was expected."""
    with pytest.raises(remat.WorkloadError, match=message):
        verb(model, batch, loss=loss)


@VERBS
@pytest.mark.parametrize("optimizer", [None, torch.optim.AdamW])
def test_frozen_model(verb, model, batch, optimizer):
    """A model without any trainable parameter says that nothing is to be trained."""
    model.requires_grad_(False)
    with pytest.raises(remat.WorkloadError, match=r"requires? (no|a) gradient"):
        verb(model, batch, loss=square_mean, optimizer=optimizer)


@VERBS
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.randn(8, 17), r"failed in forward.*\[16\].*accepts this batch"),
        ({"wrong": torch.randn(8, 16)}, "unexpected keyword argument 'wrong'"),
        ((torch.randn(8, 16),) * 3, "positional arguments"),
        (None, "NoneType"),
        ("text", "str"),
    ],
)
def test_batches_that_the_model_rejects(verb, model, given, message):
    """The model's own complaint is passed on, with the phase and what to check."""
    with pytest.raises(remat.WorkloadError, match=message) as caught:
        verb(model, given)
    assert caught.value.__cause__ is not None


def test_failing_module_is_named(model):
    """While tracing, the error names the module in which forward failed."""
    model[2].body[0] = nn.Linear(15, 16)
    with pytest.raises(remat.WorkloadError, match=r"in module '2\.body\.0'"):
        remat.plan(model, torch.randn(8, 16), "50%", loss=square_mean)


@VERBS
@pytest.mark.parametrize("given", [lambda x: x, nn.Linear, None, 3])
def test_what_is_no_module(verb, batch, given):
    """A function, a class, nothing: the error says that a module was expected."""
    with pytest.raises(remat.WorkloadError, match=r"must be a torch\.nn\.Module, got"):
        verb(given, batch, loss=square_mean)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@VERBS
@pytest.mark.parametrize("nested", [False, True])
def test_torchscript_is_refused(verb, batch, nested):
    """A scripted model, or a scripted part, is named."""
    scripted = torch.jit.script(nn.Linear(16, 16))
    given = nn.Sequential(nn.ReLU(), scripted) if nested else scripted
    where = "its part '1'" if nested else "the model"
    with pytest.raises(remat.WorkloadError, match=f"{where} is a TorchScript module"):
        verb(given, batch, loss=square_mean)


@VERBS
@pytest.mark.parametrize("lazy", [lambda: nn.LazyLinear(3), lambda: nn.LazyBatchNorm1d()])
def test_lazy_modules_are_refused(verb, batch, lazy):
    """Parameters without a shape: run one forward first."""
    with pytest.raises(remat.WorkloadError, match=r"its part '0' has lazy.*run one forward"):
        verb(nn.Sequential(lazy()), batch, loss=square_mean)


@VERBS
@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (lambda m: 3, "must be a function.*got int"),
        (lambda m: "adamw", "must be a function.*got str"),
        (lambda m: lambda ps: 3, "returned int, expected a torch.optim.Optimizer"),
        (lambda m: lambda: None, r"optimizer\(parameters\) failed: TypeError"),
        (
            lambda m: torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1),
            "SGD given as optimizer holds none of this model's parameters",
        ),
        (lambda m: torch.optim.LBFGS(m.parameters()), "failed in the optimizer's step.*closure"),
        (lambda m: torch.optim.SparseAdam, "failed in the optimizer's step.*dense"),
    ],
)
def test_optimizers_that_are_none(verb, model, batch, optimizer, message):
    """What neither is nor builds an optimizer over the model's parameters is named."""
    with pytest.raises(remat.WorkloadError, match=message):
        verb(model, batch, loss=square_mean, optimizer=optimizer(model))


class Breaks(nn.Module):
    """Draws, changes its state, hooks and mode, and raises in its n-th forward or in backward."""

    def __init__(self, where):
        super().__init__()
        self.block, self.where, self.cache = Block(16, norm=nn.BatchNorm1d(16)), where, {"a": []}

    def forward(self, x):
        y = self.block(x) + random.random() + float(np.random.rand()) + torch.rand(())  # noqa: NPY002
        self.cache["a"].append(y)
        self.new = y
        self.block.eval()
        self.block.register_forward_hook(lambda *_: None)
        if self.where == "forward":
            raise KeyError("mine")
        y.register_hook(self.backward_hook)
        return y

    def backward_hook(self, _):
        raise KeyError("mine")


@pytest.mark.parametrize("where", ["forward", "backward"])
@VERBS
def test_model_is_left_as_found_when_it_raises(verb, where, batch):
    """Attributes, parameters, buffers, gradients, mode, hooks and random state are as before."""
    model = nn.Sequential(Block(16), Breaks(where))
    square_mean(model[0], batch).backward()
    attributes = [dict(m.__dict__) for m in model.modules()]
    tables = [{k: dict(v) for k, v in a.items() if isinstance(v, dict)} for a in attributes]
    values = [t.detach().clone() for t in (*model.parameters(), *model.buffers())]
    gradients = [(p.grad, p.grad.clone()) for p in model[0].parameters()]
    generators = random_states()
    with pytest.raises(remat.WorkloadError, match=f"failed in {where}.*KeyError: 'mine'"):
        verb(model, batch, loss=square_mean)
    for module, before, inner in zip(model.modules(), attributes, tables, strict=True):
        assert module.__dict__.keys() == before.keys()
        assert all(module.__dict__[k] is v for k, v in before.items())
        for name, content in inner.items():
            if name != "cache":
                now = module.__dict__[name]
                assert now.keys() == content.keys()
                assert all(now[k] is v for k, v in content.items())
    assert model[1].cache == {"a": []}
    now = [*model.parameters(), *model.buffers()]
    assert all(torch.equal(a, b) for a, b in zip(now, values, strict=True))
    for parameter, (gradient, value) in zip(model[0].parameters(), gradients, strict=True):
        assert parameter.grad is gradient
        assert torch.equal(gradient, value)
    after = random_states()
    assert after["python"] == generators["python"]
    assert torch.equal(after["torch"], generators["torch"])
    assert (after["numpy"][1] == generators["numpy"][1]).all()
    assert after["numpy"][2:] == generators["numpy"][2:]


# -- budgets --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "budget",
    ["8 gigs", 0, -1, "0%", "-5%", "", "%", "nan", "inf", "1e9", "0.0001", True, None, 3.5,
     float("nan"), [1]],
)  # fmt: skip
def test_budgets_that_cannot_be_read(model, batch, budget):
    """The budget is repeated, and readable ones are shown."""
    with pytest.raises(remat.BudgetFormatError, match="expected a positive number of bytes") as e:
        remat.plan(model, batch, budget, loss=square_mean)
    assert repr(budget) in str(e.value)


@pytest.mark.parametrize("budget", ["1TiB", "1000%", 10**15])
def test_budget_above_everything_recomputes_nothing(model, batch, budget):
    """Nothing is recomputed, and a note and the summary say so."""
    made = remat.plan(model, batch, budget, loss=square_mean)
    assert made.regions == ()
    assert made.recompute_seconds == 0
    assert any("nothing is recomputed" in note for note in made.notes)
    assert made.summary().startswith("Nothing is recomputed")


def test_budget_error_says_what_would_do(model, batch):
    """It has the budget, the least peak and what fills it, pickles, and its minimum holds."""
    with pytest.raises(remat.BudgetError) as caught:
        remat.plan(model, batch, 1000, loss=square_mean)
    error = caught.value
    assert error.budget_bytes == 1000
    assert error.minimum_bytes > 1000
    assert sum(error.blame.values()) == pytest.approx(error.minimum_bytes, rel=0.06)
    assert error.blame["parameters"] == sum(p.nbytes for p in model.parameters())
    for part in ("1000 B", f"{error.minimum_bytes} bytes", "parameters", "would help"):
        assert part in str(error)
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(twin) is remat.BudgetError
        assert str(twin) == str(error)
        assert (twin.budget_bytes, twin.minimum_bytes, twin.blame) == (
            error.budget_bytes, error.minimum_bytes, error.blame,
        )  # fmt: skip
    made = remat.plan(model, batch, error.minimum_bytes, loss=square_mean)
    assert made.predicted_peak_bytes <= error.minimum_bytes
    with pytest.raises(remat.BudgetError):
        remat.plan(model, batch, error.minimum_bytes - 1, loss=square_mean)


# -- plans for something else ---------------------------------------------------------------------


@pytest.mark.parametrize("what", ["torch_version", "remat_version"])
def test_plan_of_another_version(model, made, what):
    """Both versions are named."""
    name = what.removesuffix("_version")
    mark = made.fingerprint.model_copy(update={what: "0.0.9"})
    with pytest.raises(remat.PlanMismatchError, match=rf"made with {name} 0\.0\.9, this is {name}"):
        remat.apply(model, made.model_copy(update={"fingerprint": mark}))


def test_plan_of_another_device(model, made):
    """Both devices are named."""
    mark = made.fingerprint.model_copy(update={"device_type": "cuda"})
    with pytest.raises(remat.PlanMismatchError, match="'cuda', this one is on 'cpu'"):
        remat.apply(model, made.model_copy(update={"fingerprint": mark}))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.randn(9, 16), r"batch \[8, 16\] float32, here it is batch \[9, 16\]"),
        (torch.randn(8, 16).double(), "float64"),
        ((torch.randn(8, 16),), r"batch\[0\]"),
        ({"x": torch.randn(8, 16)}, r"batch\.x"),
        (None, "the plan has one more entry, batch"),
    ],
)
def test_plan_of_another_batch(model, made, given, message):
    """The first entry that differs is named with both shapes."""
    with pytest.raises(remat.PlanMismatchError, match=message):
        remat.verify(model, given, made, loss=square_mean)


@pytest.mark.parametrize("given", ["plan.json", None, {"regions": []}])
def test_what_is_no_plan(model, batch, given):
    """A path, nothing or a mapping in place of a plan: the error says how to get one."""
    for verb in (
        lambda: remat.apply(model, given),
        lambda: remat.verify(model, batch, given, loss=square_mean),
    ):
        with pytest.raises(remat.ApplyError, match=r"must be a remat\.Plan.*remat\.Plan\.load"):
            verb()


def test_plan_on_what_is_no_module(made):
    """A plan is applied to modules only."""
    with pytest.raises(remat.WorkloadError, match="got int"):
        remat.apply(3, made)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"module": "blocks.9"}, "module 'blocks.9', which the model has not"),
        ({"call": 7}, "call 7 of"),
        ({"mutated_buffers": ("gone",)}, "buffer 'gone'"),
    ],
)
def test_regions_that_do_not_fit(model, made, change, message):
    """A region that names what is not there is refused before anything is changed."""
    region = made.regions[0].model_copy(update=change)
    with pytest.raises(remat.PlanMismatchError, match=message):
        remat.apply(model, made.model_copy(update={"regions": (*made.regions, region)}))
    assert not is_applied(model)


@pytest.mark.parametrize("budget", ["1000%", None])
def test_planned_model_is_not_planned_again(model, batch, made, budget):
    """With a plan on, also one that recomputes nothing, all but the handle's remove is refused."""
    if budget is not None:
        made = remat.plan(model, batch, budget, loss=square_mean)
    with remat.apply(model, made):
        for verb in (
            lambda: remat.apply(model, made),
            lambda: remat.plan(model, batch, "90%", loss=square_mean),
            lambda: remat.frontier(model, batch, loss=square_mean),
            lambda: remat.auto_checkpoint(model, batch, "90%", loss=square_mean),
            lambda: remat.verify(model, batch, made, loss=square_mean),
        ):
            with pytest.raises(remat.ApplyError, match=r"plan is on this model.*handle\.remove"):
                verb()
        assert is_applied(model)
    assert not is_applied(model)
    assert all("forward" not in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("meta", ["model", "batch"])
def test_real_steps_need_values(model, batch, made, meta):
    """Measure and verify say why they cannot run a meta model or batch."""
    model = model.to("meta") if meta == "model" else model
    batch = batch.to("meta") if meta == "batch" else batch
    for verb in (
        lambda: remat.measure(model, batch, loss=square_mean),
        lambda: remat.verify(model, batch, made, loss=square_mean),
    ):
        with pytest.raises(remat.WorkloadError, match=r"meta or fake.*need real tensors"):
            verb()


@pytest.mark.parametrize("steps", [0, -1, True, 1.5, None, "3"])
def test_measure_needs_steps(model, batch, steps):
    """Anything but a positive integer is repeated."""
    with pytest.raises(remat.WorkloadError, match="steps must be an integer >= 1") as caught:
        remat.measure(model, batch, loss=square_mean, steps=steps)
    assert repr(steps) in str(caught.value)


# -- plan files -----------------------------------------------------------------------------------


def changed(**fields):
    return lambda data: json.dumps({**data, **fields})


def in_region(**fields):
    return lambda data: json.dumps(
        {**data, "regions": [{**data["regions"][0], **fields}, *data["regions"][1:]]}
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: json.dumps(data)[:300], "damaged: not JSON"),
        (lambda data: "", "damaged: not JSON"),
        (lambda data: "\x00\x01", "damaged: not JSON"),
        (lambda data: "[]", "not valid at the top level"),
        (lambda data: "3", "not valid at the top level"),
        (changed(schema_version=99), "schema_version 99; this remat reads 1"),
        (changed(schema_version=None), "schema_version None"),
        (changed(unknown=1), "not valid at unknown"),
        (in_region(unknown=1), r"not valid at regions\.0\.unknown"),
        (in_region(call="first"), r"not valid at regions\.0\.call"),
        (in_region(call=-1), r"not valid at regions\.0\.call.*greater than or equal to 0"),
        (changed(fingerprint=None), "not valid at fingerprint"),
    ],
)
def test_damaged_plan_files(made, tmp_path, damage, message):
    """The file is named, and where in it the damage is."""
    path = made.save(tmp_path / "plan.json")
    assert remat.Plan.load(path) == made
    path.write_text(damage(json.loads(path.read_text())))
    with pytest.raises(remat.PlanFileError, match=message) as caught:
        remat.Plan.load(path)
    assert str(path) in str(caught.value)


def test_missing_plan_files(tmp_path):
    """A missing file, a folder and bytes that are no text cannot be read."""
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "missing.json", tmp_path, tmp_path / "bytes"):
        with pytest.raises(remat.PlanFileError, match="cannot be read") as caught:
            remat.Plan.load(path)
        assert str(path) in str(caught.value)


def test_missing_field_is_named(made, tmp_path):
    """A plan without its budget says which field is required."""
    data = json.loads(made.model_dump_json())
    del data["budget_bytes"]
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    with pytest.raises(remat.PlanFileError, match="not valid at budget_bytes: Field required"):
        remat.Plan.load(path)


# -- the tree of errors ---------------------------------------------------------------------------


def test_every_error_is_a_builtin_one_too():
    """Each subclass of the root is also the fitting builtin, public, and documented."""
    found = [
        value
        for value in vars(remat.errors).values()
        if inspect.isclass(value)
        and issubclass(value, remat.RematError)
        and value is not remat.RematError
    ]
    assert len(found) >= 10
    for error in found:
        parents = [
            base
            for base in error.__mro__
            if base.__module__ == builtins.__name__
            and base not in (Exception, BaseException, object)
        ]
        assert parents, error
        assert error.__doc__
        assert getattr(remat, error.__name__) is error


class DeepSpeedEngine(nn.Module):
    """Named as the engine that `deepspeed.initialize` returns, which is not installed here."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


def test_wrappers_that_run_replicas_or_partition_are_refused():
    """DataParallel and DeepSpeed, its engine or its partitioned parameters: said at planning."""
    model, batch = nn.Sequential(nn.Linear(8, 8), nn.ReLU()), torch.randn(4, 8)
    with pytest.raises(remat.CaptureError, match=r"DataParallel.*\(\.module\).*Distributed"):
        remat.plan(nn.DataParallel(model), batch, "80%", loss=square_mean)
    with pytest.raises(remat.CaptureError, match=r"belongs to DeepSpeed.*fully_shard"):
        remat.plan(DeepSpeedEngine(model), batch, "80%", loss=square_mean)
    model[0].weight.ds_id = 0
    with pytest.raises(remat.CaptureError, match=r"^0 belongs to DeepSpeed"):
        remat.plan(model, batch, "80%", loss=square_mean)
