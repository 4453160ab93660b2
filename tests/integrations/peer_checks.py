"""What the tests of all adapters share: an adapter against the library that it stands in for."""

import inspect

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastcl import testing


def assert_same_signature(ours, theirs, *methods):
    """The same names in the same order, with the same defaults; of the call and of ``methods``."""

    def described(function):
        parameters = inspect.signature(function).parameters.values()
        return [(p.name, p.kind, p.default) for p in parameters]

    assert issubclass(ours, theirs)
    assert ours.__name__ == theirs.__name__
    assert described(ours) == described(theirs)
    for name in methods:
        assert described(getattr(ours, name)) == described(getattr(theirs, name)), name


def assert_same(ours, theirs, inputs, rtol=1e-9):
    """The same value, in the same dtype, and the same gradients for all ``inputs``."""
    got, exact = (testing.value_and_grads(loss, inputs) for loss in (ours, theirs))
    torch.testing.assert_close(got, exact, rtol=rtol, atol=rtol / 10)


class Watch(TorchDispatchMode):
    """Records which of fastcl's ops run, and the sizes of the tensors that any op makes."""

    def __init__(self):
        super().__init__()
        self.ops, self.sizes, self.mask_sizes = set(), [0], [0]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if function.namespace == "fastcl":
            self.ops.add(str(function))
        for x in tree_leaves(made):
            if isinstance(x, torch.Tensor):
                (self.mask_sizes if x.dtype == torch.bool else self.sizes).append(x.numel())
        return made


def assert_fused(loss, inputs, below, mask_below=None):
    """The loss and its gradients come of one of fastcl's ops, and no tensor has ``below`` elements."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    with Watch() as watch:
        loss(*leaves).backward()
    assert watch.ops
    assert max(x.numel() for x in leaves) <= max(watch.sizes) < below
    assert max(watch.mask_sizes) < (mask_below or below)


def assert_not_fused(loss, inputs):
    """The library's own code runs, and none of fastcl's ops."""
    with Watch() as watch:
        loss(*inputs)
    assert not watch.ops
