"""Sliced loss heads: loss and gradients are those of the plain head, whatever lies between."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from remat.errors import ApplyError, PlanMismatchError
from remat.planner.records import Rewrite
from remat.regions.apply import install, is_applied, remove

CLASSES, WIDTH, SLICES = 29, 8, 4
EXACT = 1e-12  # float64: sums of some hundred terms, relative to the largest value


class Tagger(nn.Module):
    """A head over hidden states; `tied` reads its weight as an embedding too."""

    def __init__(self, *, bias=False, tied=False, dtype=torch.float64):
        super().__init__()
        self.embed = nn.Embedding(CLASSES, WIDTH, dtype=dtype)
        self.body = nn.Linear(WIDTH, WIDTH, dtype=dtype)
        self.head = nn.Linear(WIDTH, CLASSES, bias=bias, dtype=dtype)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.body(self.embed(tokens))))


@pytest.fixture
def tokens():
    found = torch.randint(0, CLASSES, (3, 17))
    found[0, :5] = 1
    return found


def labels_of(tokens):
    """The next token of each, with some that are ignored."""
    return tokens[:, 1:].masked_fill(tokens[:, 1:] == 1, -100)


def shifted(logits, tokens, **options):
    """A language model's loss as libraries write it."""
    logits = logits.float() if logits.dtype == torch.bfloat16 else logits
    logits = logits[..., :-1, :].contiguous()
    return F.cross_entropy(logits.view(-1, logits.size(-1)), labels_of(tokens).view(-1), **options)


def sliced(model, num_slices=SLICES, name="head"):
    install(model, (), (Rewrite(module=name, num_slices=num_slices),))
    return model


def step(model, tokens, loss=shifted):
    """Loss and gradients by name of one step."""
    model.zero_grad(set_to_none=True)
    value = loss(model(tokens), tokens)
    value.backward()
    return {"loss": value.detach(), **{n: p.grad for n, p in model.named_parameters()}}


def assert_close(expected, found, tolerance=EXACT):
    assert expected.keys() == found.keys()
    for name, one in expected.items():
        other = found[name]
        assert (one is None) == (other is None), name
        if one is not None:
            assert one.dtype == other.dtype
            assert one.shape == other.shape
            assert (one - other).abs().max() <= tolerance * one.abs().max(), name


def both(model, tokens, loss=shifted):
    """The same step plain and sliced."""
    plain = step(model, tokens, loss)
    sliced(model)
    found = step(model, tokens, loss)
    remove(model)
    assert not is_applied(model)
    return plain, found


@pytest.fixture
def stays_lazy(caplog):
    """Fail where the whole logits were computed."""
    with caplog.at_level(logging.WARNING, "remat"):
        yield
    assert not caplog.records


# -- in slices ------------------------------------------------------------------------------------

LOSSES = {
    "shifted": shifted,
    "sum": lambda x, t: shifted(x, t, reduction="sum"),
    "another index ignored": lambda x, t: shifted(x, t.clamp(min=2), ignore_index=7),
    "smoothed": lambda x, t: shifted(x, t, label_smoothing=0.1),
    "weighted": lambda x, t: shifted(x, t, weight=torch.linspace(0, 2, CLASSES, dtype=x.dtype)),
    "weighted and smoothed": lambda x, t: shifted(
        x, t, weight=torch.linspace(0, 2, CLASSES, dtype=x.dtype), label_smoothing=0.2,
        reduction="sum",
    ),
    "scaled": lambda x, t: 65536.0 * shifted(x, t) + 1,
    "module": lambda x, t: nn.CrossEntropyLoss()(x.flatten(0, 1), t.flatten()),
    "classes second": lambda x, t: F.cross_entropy(x.transpose(1, 2), t),
    "permuted": lambda x, t: F.cross_entropy(x.permute(0, 2, 1).contiguous(), t),
    "transposed twice": lambda x, t: shifted(x.transpose(1, 2).transpose(-1, -2), t),
    "selected": lambda x, t: F.cross_entropy(x[t != 1], t[t != 1]),
    "first tokens": lambda x, t: F.cross_entropy(x[:, 0], t[:, 0]),
    "reshaped": lambda x, t: F.cross_entropy(torch.reshape(x, (-1, CLASSES)), t.reshape(-1)),
    "last size left open": lambda x, t: F.cross_entropy(x.reshape(t.numel(), -1), t.reshape(-1)),
    "cast down and up": lambda x, t: shifted(x.to(torch.float32).to(t.device).double(), t),
    "twice": lambda x, t: shifted(x, t) + F.cross_entropy(x.view(-1, CLASSES), t.view(-1)),
}  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_sliced_gradients_are_the_plain_ones(tokens, name, tied, stays_lazy):
    """Float64 loss and gradients equal to 1e-12, without whole logits, also with tied weights."""
    tolerance = 1e-6 if "cast down" in name else EXACT
    assert_close(*both(Tagger(tied=tied, bias=not tied), tokens, LOSSES[name]), tolerance)


@pytest.mark.parametrize("slices", [2, 3, 8, 51, 100])
def test_any_number_of_slices_gives_the_same(tokens, slices, stays_lazy):
    """Slices that do not divide the rows, and more slices than rows, are the plain head too."""
    model = Tagger()
    plain = step(model, tokens)
    assert_close(plain, step(sliced(model, slices), tokens))


def test_nothing_to_learn_from_is_the_plain_nan(tokens):
    """Where every label is ignored, the mean is NaN and the gradients 0, as without slices."""
    loss = lambda x, t: F.cross_entropy(x.view(-1, CLASSES), torch.full_like(t, -100).view(-1))  # noqa: E731
    plain, found = both(Tagger(), tokens, loss)
    assert plain.pop("loss").isnan()
    assert found.pop("loss").isnan()
    assert all(not g.any() for g in (*plain.values(), *found.values()))


@pytest.mark.parametrize("frozen", ["head", "body"])
def test_frozen_parts_get_no_gradient(tokens, frozen, stays_lazy):
    """A frozen head passes gradients on; a head on frozen layers learns alone."""
    model = Tagger(bias=True)
    parts = [model.head] if frozen == "head" else [model.embed, model.body]
    for part in parts:
        part.requires_grad_(requires_grad=False)
    plain, found = both(model, tokens)
    assert_close(plain, found)
    assert all(p.grad is None for part in parts for p in part.parameters())


def test_autocast_stays_within_its_rounding(tokens, stays_lazy):
    """Under autocast to bfloat16, with the loss in float32, gradients differ in rounding alone."""
    model = Tagger(dtype=torch.float32, bias=True)

    def run():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return step(model, tokens)

    plain = run()
    assert_close(plain, (sliced(model), run())[1], tolerance=4 * 2**-8)


def test_loss_outside_of_autocast_reads_the_head_inside(tokens, stays_lazy):
    """Logits made under autocast keep its type, and the loss that of where it is computed."""
    model = Tagger(dtype=torch.float32)

    def loss_of(tokens):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(tokens)
        assert logits.dtype == torch.bfloat16
        return F.cross_entropy(logits.float().view(-1, CLASSES), tokens.view(-1))

    plain = loss_of(tokens).detach()
    sliced(model)
    assert torch.allclose(loss_of(tokens).detach(), plain, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_stays_within_its_rounding(tokens, dtype, stays_lazy):
    """A model in float32 or bfloat16 differs by a few of its own roundings."""
    plain, found = both(Tagger(dtype=dtype), tokens)
    assert_close(plain, found, tolerance=16 * torch.finfo(dtype).eps)


def test_graph_may_be_kept_and_used_twice(tokens):
    """Two backwards through one kept graph add up to twice the gradient."""
    model = sliced(Tagger())
    once = step(model, tokens)["head.weight"].clone()
    model.zero_grad(set_to_none=True)
    value = shifted(model(tokens), tokens)
    value.backward(retain_graph=True)
    value.backward()
    assert torch.allclose(model.head.weight.grad, 2 * once, rtol=1e-12)


def test_second_derivatives_are_refused(tokens):
    """Differentiating a sliced loss twice is an error, never a wrong number."""
    model = sliced(Tagger())
    loss = shifted(model(tokens), tokens)
    with pytest.raises(ApplyError, match="cannot be differentiated again"):
        torch.autograd.grad(loss, [model.body.weight], create_graph=True)


def test_without_gradients_the_module_runs_as_it_is(tokens):
    """Under no_grad, the same bits and an ordinary tensor."""
    model = Tagger().eval()
    with torch.no_grad():
        plain = model(tokens)
        found = sliced(model)(tokens)
    assert type(found) is torch.Tensor
    assert torch.equal(plain, found)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_the_model_keep_the_slices(tokens, again, stays_lazy):
    """A deep or pickled copy with the plan on has its own sliced head, which comes off again."""
    model = Tagger()
    plain = step(model, tokens)
    other = again(sliced(model))
    remove(model)
    assert is_applied(other)
    assert_close(plain, step(other, tokens))
    assert all(p.grad is not model.get_parameter(n).grad for n, p in other.named_parameters())
    remove(other)
    assert "forward" not in other.head.__dict__


# -- whole after all ------------------------------------------------------------------------------


class Squares(torch.autograd.Function):
    """The sum of squares, below torch's Python functions."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square().sum()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


def in_place(logits, tokens):
    rows = logits.view(-1, CLASSES)
    logits /= 2  # a view made before sees this
    return F.cross_entropy(rows, tokens.view(-1))


def in_place_after_cast(logits, tokens):
    rows = logits.to(torch.float32)
    logits.mul_(0)  # a copy made before does not
    return F.cross_entropy(rows.view(-1, CLASSES), tokens.view(-1)).double()


def with_metric(logits, tokens):
    with torch.no_grad():
        assert 0 <= (logits.argmax(-1) == tokens).double().mean() <= 1
    return shifted(logits, tokens)


WHOLE = {
    "tempered": lambda x, t: shifted(x / 2, t),
    "per row": lambda x, t: shifted(x, t, reduction="none").square().mean(),
    "log softmax": lambda x, t: F.nll_loss(x.log_softmax(-1).view(-1, CLASSES), t.view(-1)),
    "probabilities": lambda x, t: F.cross_entropy(x, torch.softmax(x.detach() + t[..., None], 1)),
    "classes at another place": lambda x, t: F.cross_entropy(x, t[:, :CLASSES] % 17),
    "some classes": lambda x, t: F.cross_entropy(x[..., :20].reshape(-1, 20), t.view(-1) % 20),
    "custom function": lambda x, _: Squares.apply(x.transpose(1, 2)),
    "with a penalty": lambda x, t: shifted(x, t) + 1e-2 * x.logsumexp(-1).square().mean(),
    "in place": in_place,
    "in place after a cast": in_place_after_cast,
    "metric first": with_metric,
    "iterated": lambda x, t: sum(F.cross_entropy(row, y) for row, y in zip(x, t, strict=True)),
    "stacked": lambda x, t: shifted(torch.cat([x, x]), torch.cat([t, t])),
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_logits_give_the_plain_result(tokens, name, caplog):
    """What needs the logits gets them: right gradients, and one warning that says why."""
    if name == "classes at another place":
        tokens = torch.randint(0, CLASSES, (3, CLASSES))
    tolerance = 1e-6 if "cast" in name else EXACT
    with caplog.at_level(logging.WARNING, "remat"):
        assert_close(*both(Tagger(), tokens, WHOLE[name]), tolerance)
    said = [r for r in caplog.records if "computed whole" in r.getMessage()]
    assert len(said) == 1


def test_hooks_and_gradients_of_logits_are_those_of_real_ones(tokens):
    """A forward hook may replace the logits, and a hook on them sees their gradient."""
    model = sliced(Tagger())
    seen = []
    handle = model.head.register_forward_hook(lambda _m, _a, out: out * 3)
    found = step(model, tokens)
    handle.remove()
    remove(model)
    assert_close(step(model, tokens, lambda x, t: shifted(x * 3, t)), found)
    logits = sliced(model)(tokens)
    logits.register_hook(seen.append)
    shifted(logits, tokens).backward()
    assert seen[0].shape == (3, 17, CLASSES)


def test_queries_do_not_compute_the_logits(tokens, stays_lazy):
    """Shape, type, place and gradient of the lazy logits are those of the real ones."""
    model = sliced(Tagger())
    logits = model(tokens)
    assert isinstance(logits, torch.Tensor)
    assert logits.shape == (3, 17, CLASSES) == logits.size()
    assert (logits.dtype, logits.device.type, logits.dim()) == (torch.float64, "cpu", 3)
    assert logits.requires_grad
    assert not logits.is_leaf
    assert logits.grad_fn is not None
    assert (len(logits), logits.numel()) == (3, 3 * 17 * CLASSES)


def test_half_precision_is_computed_whole(tokens, caplog):
    """Gradients in float16 would be rounded before a scaler's factor: the plain head runs."""
    model = Tagger(dtype=torch.float16)
    with caplog.at_level(logging.WARNING, "remat"):
        plain, found = both(model, tokens, lambda x, t: shifted(x.float(), t))
    assert all(torch.equal(plain[name], found[name]) for name in plain)
    assert "cross_entropy" in caplog.text


# -- refused --------------------------------------------------------------------------------------


def test_logits_after_the_optimizer_step_are_refused(tokens):
    """Logits of weights that are no more cannot be computed: an error says what to do."""
    model = sliced(Tagger())
    logits = model(tokens)
    shifted(logits, tokens).backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    with pytest.raises(ApplyError, match="read them earlier, or plan with chunks=False"):
        logits.argmax(-1)


def test_labels_out_of_range_are_an_error_as_before(tokens):
    """A label that is no class is refused by torch, in slices too."""
    model = sliced(Tagger())
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        F.cross_entropy(model(tokens).view(-1, CLASSES), tokens.view(-1) + CLASSES)


class Doubled(nn.Linear):
    """A linear layer that is not torch's."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("name", "message"),
    [("nowhere", "which the model has not"), ("embed", "Embedding"), ("head", "Doubled")],
)
def test_a_plan_for_another_head_is_refused(name, message):
    """Only a plain linear layer can be sliced; the model is left as it was."""
    model = Tagger()
    if name == "head":
        model.head = Doubled(WIDTH, CLASSES)
    with pytest.raises(PlanMismatchError, match=message):
        sliced(model, name=name)
    assert not is_applied(model)
