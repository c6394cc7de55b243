"""The pretend device is as strict as a real one: what two devices share is refused, what the host waits for counted."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.pretend_device import Pretend, PretendTensor, TwoDevicesError, pretend_device

pytestmark = pytest.mark.apart

ids = torch.tensor([2, 0])
REFUSED: dict[str, Callable[[Tensor, Tensor], object]] = {
    "a sum": lambda x, y: x + y,
    "in place": lambda x, y: y.add_(x),
    "a product": lambda x, y: nn.functional.linear(x, y),
    "index_add_ with an index on the CPU": lambda x, y: x.index_add_(0, ids, x[:2].clone()),
    "index_add_ of values on the CPU": lambda x, y: x.index_add_(0, ids.to(x.device), y[:2]),
    "index_select": lambda x, y: x.index_select(0, ids),
    "index_fill": lambda x, y: x.index_fill(0, ids, 0.0),
    "gather": lambda x, y: y.gather(0, ids[None].to(x.device)),
    "where": lambda x, y: torch.where(y > 0, x, 0.0),
    "cat": lambda x, y: torch.cat([x, y]),
    "a mask of another device": lambda x, y: y.masked_fill(x > 0, 0.0),
    "a number of the device with the CPU": lambda x, y: y * x.sum(),
    "an index of the device into the CPU": lambda x, y: y.index_select(0, ids.to(x.device)),
    "a generator of the CPU": lambda x, y: torch.randn(2, generator=torch.Generator(), device=x.device),
    "a generator of the device": lambda x, y: torch.randn(2, generator=torch.Generator(x.device)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_two_devices_are_refused(pretend: Pretend, what: str) -> None:
    y = torch.randn(3, 4)
    with pytest.raises(TwoDevicesError, match=r"was given tensors of cpu, pretend:0"):
        REFUSED[what](torch.randn(3, 4).to(pretend.first), y)


def test_so_are_two_accelerators(pretend: Pretend) -> None:
    x = torch.ones(3, device=pretend.first)
    with pytest.raises(TwoDevicesError, match="of pretend:0, pretend:1"):
        x + x.to(pretend.second)


ALLOWED: dict[str, Callable[[Tensor], Tensor]] = {
    "a number of the CPU": lambda x: x * torch.tensor(2.0),
    "an index of the CPU": lambda x: x[torch.tensor([1, 1])],
    "a copy": lambda x: torch.zeros_like(x).copy_(torch.ones(3, 4)),
    "a new tensor": lambda x: x + torch.tensor([1.0, 2.0, 3.0, 4.0], device=x.device),
    "new_zeros": lambda x: x + x.new_zeros(3, 4),
    "random numbers": lambda x: torch.rand(3, 4, generator=torch.Generator(x.device), device=x.device),
}


@pytest.mark.parametrize("what", ALLOWED)
def test_what_a_real_device_takes_is_taken(pretend: Pretend, what: str) -> None:
    assert ALLOWED[what](torch.ones(3, 4).to(pretend.second)).device == pretend.second


def test_values_are_those_of_the_cpu(pretend: Pretend) -> None:
    x = torch.randn(5, 7)
    there = x.to(pretend.first)
    assert isinstance(there, PretendTensor)
    assert torch.equal(there.softmax(-1).cpu(), x.softmax(-1))
    view = there[1:3]
    view.zero_()
    assert not there[1:3].any()
    assert bool(x.any(1).all()), "a copy, not the same memory"


def test_what_the_host_waits_for_is_counted(pretend: Pretend) -> None:
    x = torch.ones(3, 4).to(pretend.first)
    x.add_(1).sum()
    assert not pretend.syncs
    float(x.sum())
    bool((x > 0).any())
    x.cpu()
    x.nonzero()
    x[x > 0]
    assert pretend.syncs == {"_local_scalar_dense": 2, "_to_copy": 1, "nonzero": 1, "index.Tensor": 1}
    with pytest.raises(TypeError, match="can't convert pretend:0 device type tensor to numpy"):
        x.numpy()


def test_a_module_keeps_its_parameters_and_learns_there(pretend: Pretend) -> None:
    module = nn.Linear(4, 5)
    weight, wanted = module.weight, copy.deepcopy(module)
    module.to(pretend.first)
    assert module.weight is weight
    assert (weight.device, isinstance(weight, nn.Parameter)) == (pretend.first, True)
    x = torch.randn(3, 4)
    for each in (module, wanted):
        optimizer = torch.optim.AdamW(each.parameters(), lr=0.1)
        each(x.to(each.weight.device)).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(module.weight.cpu(), wanted.weight)
    twin = copy.deepcopy(module)
    twin.weight.data = torch.zeros(5, 4, device=pretend.first)
    assert not twin.weight.any()
    assert module.weight.any()
    with pytest.raises(TwoDevicesError):
        twin.weight.data = torch.zeros(5, 4)
    module.to("cpu")
    assert type(module.weight.data) is Tensor


def test_afterwards_there_is_nothing_left_of_it() -> None:
    with pretend_device():
        pass
    assert torch.Generator().device == torch.device("cpu")
    module = nn.Linear(2, 3)
    assert torch.equal(module(torch.ones(1, 2)), nn.functional.linear(torch.ones(1, 2), module.weight, module.bias))
    assert not torch.__future__.get_swap_module_params_on_conversion()
