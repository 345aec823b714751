"""Runs and nested regions on real models: the same bits, the predicted bytes, hooks once each."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import remat
from remat.fit import Fit
from tests.models import Block, square_mean
from tests.test_chains import Loop, PassesOthers

CRUMBS = 1024
WIDTH = 16
STEP = {"loss": square_mean, "optimizer": None}


def normed():
    return nn.Sequential(*(Block(WIDTH, norm=nn.BatchNorm1d(WIDTH)) for _ in range(6)))


class InPlace(nn.Module):
    """Layers of which some write to what they are given, as VGG's do."""

    def __init__(self):
        super().__init__()
        layers = [(nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True), nn.Dropout(0.2))] * 4
        self.layers = nn.Sequential(*(copy.deepcopy(layer) for three in layers for layer in three))

    def forward(self, x):
        return self.layers(x)


class Stages(nn.Module):
    """Chains inside the members of a chain."""

    def __init__(self):
        super().__init__()
        self.stages = nn.Sequential(
            *(nn.Sequential(*(Block(WIDTH) for _ in range(4))) for _ in range(4))
        )

    def forward(self, x):
        return self.stages(x).relu()


MODELS = {
    "dropout": lambda: nn.Sequential(*(Block(WIDTH) for _ in range(8))),
    "batch norm": normed,
    "other arguments": lambda: PassesOthers(6),
    "in place": InPlace,
    "stages": Stages,
}


def plans_of(model, batch):
    """Every plan of runs and nested regions for a model, with its peak by the timeline."""
    fit = Fit(model, batch, **STEP)
    program = fit.plain
    base = fit.plan("100%")
    for chosen in program._known:
        regions = program.regions(chosen)
        if any(region.followers for region in regions):
            peak = program.simulate(chosen).peak_bytes
            plan = base.model_copy(
                update={
                    "regions": regions, "predicted_peak_bytes": peak,
                    "budget_bytes": peak + CRUMBS,
                }
            )  # fmt: skip
            yield plan, program.timeline.curve(chosen).peak_bytes


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_runs_and_nested_regions_change_no_bit_and_take_what_was_predicted(name):
    """Loss, gradients, buffers, random state and hook counts are equal, and peaks to the byte."""
    model, batch = MODELS[name](), torch.randn(256, WIDTH)
    plans = list(plans_of(model, batch))
    nested = [plan for plan, _ in plans if any(region.is_nested for region in plan.regions)]
    assert len(nested) >= 2
    for plan, by_timeline in plans:
        assert abs(by_timeline - plan.predicted_peak_bytes) <= 256
        proof = remat.verify(model, batch, plan, **STEP)
        assert proof.identical, proof.differences
        assert abs(proof.measured_peak_bytes - plan.predicted_peak_bytes) <= CRUMBS


def nested_plan(model, batch):
    """The plan with the most nested regions."""
    plans = (plan for plan, _ in plans_of(model, batch))
    return max(plans, key=lambda plan: sum(region.is_nested for region in plan.regions))


class Watch:
    """User hooks on every module: what each was given and gave, with a result that some change."""

    def __init__(self, model, changing=()):
        self.seen = []
        for name, module in model.named_modules():
            module.register_forward_pre_hook(self._before(name))
            module.register_forward_hook(self._after(name))
            if name in changing:
                module.register_forward_hook(lambda _m, _a, _k, out: out * 1.5, with_kwargs=True)

    def _before(self, name):
        return lambda _module, args: self.seen.append((name, "in", args[0].detach().sum().item()))

    def _after(self, name):
        return lambda _module, _args, out: self.seen.append(
            (name, "out", out.detach().sum().item())
        )


def gradients(model, batch):
    torch.manual_seed(1)
    model.zero_grad()
    square_mean(model, batch).backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("changing", [(), ("1", "2.body", "4")])
def test_user_hooks_see_each_call_once_with_its_own_values(changing):
    """Hooks inside, and on the members of, nested runs fire as often and with what they did."""
    model, batch = MODELS["dropout"](), torch.randn(256, WIDTH)
    plan = nested_plan(model, batch)
    watch = Watch(model, changing)
    expected = gradients(model, batch)
    unplanned, watch.seen = sorted(watch.seen), []
    with remat.apply(model, plan):
        for _ in range(2):
            watch.seen = []
            found = gradients(model, batch)
            assert sorted(watch.seen) == unplanned
            assert all(map(torch.equal, expected, found))
    watch.seen = []
    gradients(model, batch)
    assert sorted(watch.seen) == unplanned


def test_the_plan_survives_copies_and_comes_off_whole():
    """A copied or pickled model keeps its runs, and `remove` leaves no trace on any."""
    model, batch = MODELS["dropout"](), torch.randn(256, WIDTH)
    before = [dict(m.__dict__) for m in model.modules()]
    expected = gradients(model, batch)
    handle = remat.apply(model, nested_plan(model, batch))
    stream = io.BytesIO()
    pickle.dump(model, stream)
    stream.seek(0)
    for other in (copy.deepcopy(model), pickle.load(stream)):
        assert all(map(torch.equal, expected, gradients(other, batch)))
    handle.remove()
    assert [m.__dict__.keys() for m in model.modules()] == [b.keys() for b in before]
    assert all(map(torch.equal, expected, gradients(model, batch)))


def test_without_gradients_the_members_run_by_themselves():
    """Under `no_grad` and in the step after it, results are those of the model."""
    model, batch = MODELS["dropout"]().eval(), torch.randn(256, WIDTH)
    expected = model(batch)
    with remat.apply(model, nested_plan(model.train(), batch)):
        with torch.no_grad():
            assert torch.equal(model.eval()(batch), expected)
        assert torch.equal(model(batch), expected)
        assert torch.equal(model[3](batch), copy.deepcopy(model[3])(batch))


def test_a_step_that_broke_off_leaves_nothing_behind():
    """After an exception in the middle of a run, the next step is as if it had not been."""
    model, batch = MODELS["dropout"](), torch.randn(256, WIDTH)
    expected = gradients(model, batch)
    with remat.apply(model, nested_plan(model, batch)):

        def fail(*_):
            raise KeyError("planted")

        hook = model[5].body.register_forward_pre_hook(fail)
        with pytest.raises(KeyError):
            gradients(model, batch)
        hook.remove()
        assert all(map(torch.equal, expected, gradients(model, batch)))


class MayAdd(Loop):
    """Does something between its blocks once `adds` is set."""

    adds = False

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
            x = x + 1 if self.adds else x
        return x


def test_another_flow_than_when_planned_is_refused():
    """A caller that no longer passes results on gets an error, never another result."""
    model, batch = MayAdd(6), torch.randn(256, WIDTH)
    with remat.apply(model, nested_plan(model, batch)):
        model.adds = True
        with pytest.raises(remat.ApplyError, match="make the plan again"):
            gradients(model, batch)
        model.adds = False
        gradients(model, batch)


def test_backward_hooks_on_members_are_refused():
    """A run would call them twice: none is planned, and applying one is refused whole."""
    model, batch = MODELS["dropout"](), torch.randn(256, WIDTH)
    plan = nested_plan(model, batch)
    hook = model[2].register_full_backward_hook(lambda *_: None)
    runs = [r for made, _ in plans_of(model, batch) for r in made.regions if r.followers]
    assert not any("2" in (run.module, *run.followers) for run in runs)
    with pytest.raises(remat.ApplyError, match="backward hooks"):
        remat.apply(model, plan)
    hook.remove()
    remat.apply(model, plan).remove()
