"""A step on more rows than the encoder's activations leave room for: GradCache.

Gao et al. 2021, https://arxiv.org/abs/2101.06983.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel

from fastcl.similarity.numerics import without_autocast

RandomState = tuple[Tensor, list[Tensor]]


class Scaler(Protocol):
    """What a :class:`torch.amp.GradScaler` is here."""

    def scale(self, outputs: Tensor) -> Tensor:
        """The loss, times the factor that keeps half-precision gradients from underflow."""


def cached_step(
    encoder: Callable[[Any], Any],
    chunks: Iterable[Any],
    loss: Callable[[Any], Tensor],
    *,
    scaler: Scaler | None = None,
) -> Tensor:
    """Gradients of ``loss`` of all chunks' embeddings, with one chunk's activations in memory at a time.

    GradCache, Gao et al. 2021, https://arxiv.org/abs/2101.06983. Each chunk is encoded without a graph; the
    loss of all embeddings is differentiated down to them; each chunk is encoded again, with the same
    random numbers (CPU and CUDA), and their gradient taken down to the parameters. This is a step's
    forward *and* backward: zero the gradients before it, step the optimizer after it.

    Networks that treat rows apart (group, layer or no normalization) get the whole batch's gradients. Batch
    normalization sees each chunk as its batch; buffers are as one pass over the chunks leaves them.
    Under :class:`~torch.nn.parallel.DistributedDataParallel` gradients are synchronized once, with the
    last chunk; give ``loss`` its ``group=`` to contrast the rows of all ranks. A parameter that only
    ``loss`` uses is then not synchronized: return it from the encoder, a value per row.

    Args:
        encoder: a module, whose output for one chunk is a tensor (n, ...), a tuple or a mapping of such. Any
            other function is called alike; the modules that it calls are treated as a module's are.
        chunks: the encoder's inputs, one argument each, such as ``images.split(64)``; of any sizes.
        loss: called once with the embeddings of all chunks, concatenated along their first dimension, in
            the encoder's structure; returns one number. Its own parameters receive gradients too.
        scaler: a :class:`torch.amp.GradScaler`. Its scaled loss is differentiated, the plain one returned;
            call its ``step`` and ``update`` as usual. Autocast, if wanted, is the caller's around this call.

    Returns:
        The loss, detached. Gradients are added to the parameters' ``grad``.

    Raises:
        TypeError: chunks in one tensor; an encoder's output or a loss of another type.
        ValueError: no chunks; outputs without a first dimension, or not alike for all chunks; a loss of
            more than one number.
    """
    inputs = _checked_chunks(chunks)
    before, starts, outputs = _Buffers(), [], []
    with torch.no_grad(), before.watching(encoder):
        for chunk in inputs:
            starts.append(_random_state())
            outputs.append(_Output(encoder(chunk)))
    torch.clear_autocast_cache()  # in some versions of torch the weights it holds are now without gradient
    embeddings = outputs[0].concatenated(outputs)
    value = _checked_loss(loss(outputs[0].rebuilt(embeddings)))
    with without_autocast(value.device):
        (value if scaler is None else scaler.scale(value)).backward()

    grads = [_split(x.grad, [len(output.tensors[i]) for output in outputs]) for i, x in enumerate(embeddings)]
    synchronized = [m for m in before.modules if isinstance(m, DistributedDataParallel)]
    after, end = before.again(), _random_state()
    before.restore()
    try:
        for i, (chunk, start) in enumerate(zip(inputs, starts, strict=True)):
            _set_random_state(start)
            with contextlib.ExitStack() as stack:
                for module in synchronized if i + 1 < len(inputs) else ():
                    stack.enter_context(module.no_sync())
                _Output(encoder(chunk)).backward([grad[i] for grad in grads])
    finally:
        after.restore()
        _set_random_state(end)
    return value.detach()


class _Output:
    """What the encoder returned for one chunk: its tensors, and the structure they came in."""

    def __init__(self, output: Any) -> None:
        self.names: tuple[Any, ...] | None = None
        self.kind = type(output)
        values = [output] if isinstance(output, Tensor) else output
        if isinstance(output, Mapping):
            self.names, values = tuple(output), list(output.values())
        if not isinstance(values, Sequence) or not all(isinstance(x, Tensor) for x in values):
            got = self._described(values)
            raise TypeError(f"encoder must return a tensor, or a tuple or mapping of tensors, got {got}")
        for x in values:
            if x.dim() == 0:
                raise ValueError("encoder must return a row per sample, got a tensor without dimensions")
        self.tensors: list[Tensor] = list(values)

    def _described(self, values: Any) -> str:
        inside = [type(x).__name__ for x in values] if isinstance(values, Sequence) else ()
        return f"{self.kind.__name__} of {', '.join(inside)}" if inside else self.kind.__name__

    def concatenated(self, outputs: Sequence[_Output]) -> list[Tensor]:
        """The tensors of all chunks, each a leaf."""
        for i, output in enumerate(outputs):
            shapes = [[x.shape[1:] for x in o.tensors] for o in (self, output)]
            if output.names != self.names or shapes[0] != shapes[1]:
                raise ValueError(
                    "encoder must return the same structure and widths for all chunks, got "
                    f"{self._layout()} for the first and {output._layout()} for chunk {i}"
                )
        columns = zip(*(output.tensors for output in outputs), strict=True)
        leaves = [torch.cat(column).detach() for column in columns]
        return [x.requires_grad_() if x.is_floating_point() else x for x in leaves]

    def _layout(self) -> str:
        shapes = [("n", *x.shape[1:]) for x in self.tensors]
        return str(shapes if self.names is None else dict(zip(self.names, shapes, strict=True)))

    def rebuilt(self, tensors: list[Tensor]) -> Any:
        """``tensors`` in this output's structure."""
        if self.names is not None:
            return dict(zip(self.names, tensors, strict=True))
        if issubclass(self.kind, Tensor):
            return tensors[0]
        return self.kind(*tensors) if hasattr(self.kind, "_fields") else self.kind(tensors)

    def backward(self, grads: Sequence[Tensor | None]) -> None:
        """Down to the parameters, from each tensor's gradient."""
        live = [
            (x, grad)
            for x, grad in zip(self.tensors, grads, strict=True)
            if x.requires_grad and grad is not None
        ]
        if live:
            with without_autocast(live[0][0].device):
                torch.autograd.backward([x for x, _ in live], [grad for _, grad in live])


class _Buffers:
    """The buffers of modules as they are now, to be put back."""

    def __init__(self) -> None:
        self.modules: dict[nn.Module, list[tuple[str, Tensor, Tensor]]] = {}

    def save(self, module: nn.Module, _inputs: object = None) -> None:
        """Remember the buffers of ``module`` and of those inside it, unless they are known."""
        for part in module.modules():
            if part not in self.modules:
                buffers = part.named_buffers(recurse=False)
                self.modules[part] = [(name, x, x.detach().clone()) for name, x in buffers]

    @contextlib.contextmanager
    def watching(self, encoder: Callable[[Any], Any]) -> Iterator[None]:
        """Save what ``encoder`` is or, of a function, every module that it calls, before its first call."""
        if isinstance(encoder, nn.Module):
            self.save(encoder)
            yield
            return
        handle = register_module_forward_pre_hook(self.save)
        try:
            yield
        finally:
            handle.remove()

    def again(self) -> _Buffers:
        """The same modules' buffers as they are now."""
        now = _Buffers()
        for module in self.modules:
            now.save(module)
        return now

    @torch.no_grad()
    def restore(self) -> None:
        """Put the buffers back: the same tensors, with the values they had."""
        for module, buffers in self.modules.items():
            for name, buffer, value in buffers:
                buffer.copy_(value)
                setattr(module, name, buffer)


def _checked_chunks(chunks: Iterable[Any]) -> list[Any]:
    if isinstance(chunks, Tensor):
        raise TypeError(
            "chunks must be a sequence of the encoder's inputs, such as images.split(64), "
            f"got a tensor of shape {tuple(chunks.shape)}"
        )
    inputs = list(chunks)
    if not inputs:
        raise ValueError("chunks must hold at least one of the encoder's inputs, got none")
    return inputs


def _checked_loss(value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"loss must return a tensor, got {type(value).__name__}")
    if value.numel() != 1:
        raise ValueError(f"loss must return one number, got shape {tuple(value.shape)}")
    return value


def _split(grad: Tensor | None, counts: Sequence[int]) -> Sequence[Tensor | None]:
    return [None] * len(counts) if grad is None else grad.split(list(counts))


def _random_state() -> RandomState:
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return torch.get_rng_state(), on_gpus


def _set_random_state(state: RandomState) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])
