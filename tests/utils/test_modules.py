"""Modules that are borrowed come back as they were, whoever else has borrowed them meanwhile."""

import threading

import pytest
import torch
from torch import nn

from capt_peft import PGD, ThreatModel, evaluate
from capt_peft.utils.modules import buffers_kept, eval_mode


class Normed(nn.Module):
    """A model with batch norm and dropout that notes the modes that it is run in, and can be made to wait."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop, self.line = nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Linear(192, 4)
        self.modes, self.gate = set(), None
        self.train()
        self.drop.eval()

    def forward(self, pixels):
        if self.gate is not None:
            self.gate(pixels)
        self.modes.add((self.training, self.norm.training, self.line.weight.requires_grad))
        return self.line(self.drop(self.norm(pixels)).flatten(1))


def state(model):
    modes = [module.training for module in model.modules()]
    return modes, [p.requires_grad for p in model.parameters()], {k: v.clone() for k, v in model.state_dict().items()}


def same(model, before):
    now = state(model)
    return now[:2] == before[:2] and all(torch.equal(now[2][name], value) for name, value in before[2].items())


def test_the_first_borrower_that_ends_does_not_put_the_mode_back_while_another_runs():
    """Two evaluations of one model in two threads: the first ends in the middle of the second."""
    model = Normed()
    before = state(model)
    first_is_done, second_runs = threading.Event(), threading.Event()

    def gate(pixels):
        if threading.current_thread().name == "second":
            second_runs.set()
            assert first_is_done.wait(30)
        else:
            assert second_runs.wait(30)

    model.gate = gate
    data = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 4
    results = {}

    def run(name):
        results[name] = evaluate(model, data, PGD(ThreatModel("linf", "4/255"), steps=2), signs=False, progress=False)

    threads = [threading.Thread(target=run, args=(name,), name=name) for name in ("first", "second")]
    for thread in threads:
        thread.start()
    threads[0].join()
    first_is_done.set()
    threads[1].join()
    assert model.modes == {(False, False, False)}
    assert results["first"] == results["second"]
    assert same(model, before)


def test_wrappers_of_one_model_borrow_the_same_modules():
    model = Normed()
    before = state(model)
    one, other = nn.Sequential(model), nn.ModuleList([model])
    first, second = eval_mode(one), eval_mode(other, gradients=False)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not model.training and not model.line.weight.requires_grad
    second.__exit__(None, None, None)
    assert same(model, before) and one.training


def test_a_block_that_raises_gives_everything_back():
    model = Normed()
    before = state(model)
    with pytest.raises(KeyError), eval_mode(model, gradients=False), buffers_kept([model]), eval_mode(model):
        model.norm.running_mean += 1
        raise KeyError
    assert same(model, before)


def test_a_buffer_that_is_replaced_or_written_to_in_any_way_comes_back():
    model = nn.Module()
    for name in "abcd":
        model.register_buffer(name, torch.zeros(3))
    model.register_buffer("none", None)
    buffers = dict(model.named_buffers())
    with buffers_kept([model]):
        model.a = torch.ones(2)
        model.b.data.fill_(torch.nan)
        model.c.resize_(7).fill_(2)
        model.none = torch.ones(1)
    assert all(value is buffers[name] and torch.equal(value, torch.zeros(3)) for name, value in model.named_buffers())
    assert model.none is None
