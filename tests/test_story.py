"""The story of a step: its bytes are the simulation's, and its acts are those of the plan."""

import pytest
import torch
from torch import nn

import remat
from models import Block, square_mean
from remat.planner.records import Region
from remat.prove.records import Act
from remat.prove.simulate import simulate
from remat.prove.story import LOSS, MOST_BLOCKS, MOST_MOMENTS
from remat.prove.story_blocks import story_blocks
from remat.trace.capture import capture
from zoo import ALL

WIDTH, ROWS = 32, 64


class Linears(nn.Module):
    """Squares after linear layers, so that what each block keeps follows from the shapes."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Sigmoid()) for _ in range(depth)
        )

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def story_of(model, batch, plan=None, loss=square_mean):
    blocks = story_blocks(capture(model, batch, loss=loss))
    simulation = simulate(model, batch, plan, loss=loss, blocks=blocks)
    assert simulation.story is not None
    return simulation, simulation.story


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_story_of_any_model_has_its_peak_and_order(name):
    """The highest moment is the simulated peak; forward is told in order, and nothing is left."""
    case = ALL[name].build(dropout=0.1)
    simulation, story = story_of(case.model, case.batch, loss=case.loss)
    totals = [sum(moment.bytes_by_kind.values()) for moment in story.moments]
    assert max(totals) == simulation.peak_bytes
    assert story.blocks[-1] == LOSS
    assert len(story.blocks) <= MOST_BLOCKS + 1
    assert len(story.moments) <= MOST_MOMENTS
    acts = [moment.act for moment in story.moments if moment.act is not Act.AGAIN]
    order = [Act.FORWARD, Act.BACKWARD, Act.UPDATE]
    assert acts == sorted(acts, key=order.index)
    assert all(len(moment.held_bytes) == len(story.blocks) for moment in story.moments)
    assert all(size >= 0 for moment in story.moments for size in moment.held_bytes)


def test_blocks_hold_what_backward_needs_and_no_more():
    """A linear layer with a sigmoid keeps one result of its shape: the sigmoid's."""
    model, batch = Linears(4), torch.randn(ROWS, WIDTH)
    _, story = story_of(model, batch)
    size = ROWS * WIDTH * 4
    assert story.blocks == ("layers.0", "layers.1", "layers.2", "layers.3", LOSS)
    turn = max(at for at, moment in enumerate(story.moments) if moment.act is Act.FORWARD)
    assert story.moments[turn].held_bytes[:4] == (size,) * 4
    after = [moment for moment in story.moments if moment.act is Act.BACKWARD]
    assert [moment.block for moment in after] == [4, 3, 2, 1, 0]
    assert [sum(moment.held_bytes[:4]) for moment in after[1:]] == [
        size * 3, size * 2, size, 0,
    ]  # fmt: skip


@pytest.mark.slow
def test_story_runs_again_what_the_plan_recomputes_and_nothing_else():
    """Under a plan, the blocks told to run again are those that hold a region."""
    model, batch = nn.Sequential(*(Block(WIDTH) for _ in range(5))), torch.randn(ROWS, WIDTH)
    for budget in ("95%", "85%", "75%"):
        plan = remat.plan(model, batch, budget, loss=square_mean)
        simulation, story = story_of(model, batch, plan)
        again = [story.blocks[m.block] for m in story.moments if m.act is Act.AGAIN]
        planned = {r.module.split(".")[0] for r in plan.regions} | {
            name.split(".")[0] for r in plan.regions for name in r.followers
        }
        assert set(again) == planned
        for block in planned:  # again before its backward
            at = [m.act for m in story.moments if story.blocks[m.block] == block]
            assert at.index(Act.AGAIN) < len(at) - 1 - at[::-1].index(Act.BACKWARD)
        assert simulation.peak_bytes == plan.predicted_peak_bytes
    _, plain = story_of(model, batch)
    assert not [moment for moment in plain.moments if moment.act is Act.AGAIN]


def test_single_layer_that_runs_again_is_told_of():
    """One function that runs again shows, although no call of its module is seen then."""
    model, batch = nn.Sequential(*(Block(WIDTH) for _ in range(4))), torch.randn(ROWS, WIDTH)
    plan = remat.plan(model, batch, "100%", loss=square_mean)
    plan = plan.model_copy(
        update={"regions": (Region(module="1.body.1", followers=("1.body.2",)),)}
    )
    _, story = story_of(model, batch, plan)
    again = [moment for moment in story.moments if moment.act is Act.AGAIN]
    assert [story.blocks[moment.block] for moment in again] == ["1"]


def test_many_blocks_are_put_together_in_order():
    """Thirty blocks become at most 24 names, each a range, and the peak is still exact."""
    model = nn.Sequential(nn.Sequential(*(Block(8) for _ in range(30))))
    simulation, story = story_of(model, torch.randn(4, 8))
    assert len(story.blocks) <= MOST_BLOCKS + 1
    assert story.blocks[0] == "0.0 … 1"
    assert story.blocks[-2] == "0.28 … 29"
    peak = max(sum(moment.bytes_by_kind.values()) for moment in story.moments)
    assert peak == simulation.peak_bytes


def test_backward_goes_the_way_of_forward_in_reverse():
    """Tied weights and an embedding do not confuse whose turn it is."""
    case = ALL["tied_weights"].build(dropout=0.0)
    _, story = story_of(case.model, case.batch, loss=case.loss)
    forward = [moment.block for moment in story.moments if moment.act is Act.FORWARD]
    backward = [moment.block for moment in story.moments if moment.act is Act.BACKWARD]
    assert len(story.blocks) > 4
    assert backward == forward[::-1]


def test_blocks_are_few_alike_and_cover_the_forward():
    """A stack of blocks is told by its blocks; one module that does all itself by its own name."""
    model = nn.Sequential(nn.Sequential(*(Block(WIDTH) for _ in range(12))), nn.Linear(WIDTH, 1))
    trace = capture(model, torch.randn(4, WIDTH), loss=square_mean)
    assert story_blocks(trace) == (*(f"0.{i}" for i in range(12)), "1")
    single = capture(nn.Linear(WIDTH, 1), torch.randn(4, WIDTH), loss=square_mean)
    assert story_blocks(single) == ("",)


def test_simulation_has_no_story_unless_asked():
    """What plans many times over pays nothing for it."""
    assert simulate(Linears(2), torch.randn(4, WIDTH), loss=square_mean).story is None
