"""Feature taps: what modules receive and give during a forward pass, without touching the model's code.

The hooks are gone when the block ends, however it ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..errors import InputError

__all__ = ["tapped", "watching"]

Look = Callable[[str, tuple[Any, ...], dict[str, Any], Any], Any]


class _Stop(Exception):  # noqa: N818
    pass


def _submodules(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    modules, names = dict(model.named_modules()), list(names)
    if missing := [name for name in names if name not in modules]:
        raise InputError(f"the model has no module {missing[0]!r}; see named_modules()")
    return {name: modules[name] for name in names}


@contextmanager
def watching(model: nn.Module, names: Iterable[str], look: Look, *, stop: bool = False) -> Iterator[None]:
    """Call `look` after each forward pass of some submodules; what it returns, if not `None`, replaces the output.

    Args:
        model: any module.
        names: submodules, as in `named_modules()`.
        look: `(name, arguments, keywords, output)` of that call.
        stop: end the block at the first call that was seen: the rest of the forward pass is not paid for.

    Raises:
        InputError: for a name that the model lacks.
    """

    def hook(name: str) -> Callable:
        def called(module: nn.Module, arguments: tuple, keywords: dict[str, Any], output: Any) -> Any:
            found = look(name, arguments, keywords, output)
            if stop:
                raise _Stop
            return found

        return called

    handles = [
        module.register_forward_hook(hook(name), with_kwargs=True) for name, module in _submodules(model, names).items()
    ]
    try:
        yield
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def tapped(
    model: nn.Module, names: Iterable[str], *, inputs: bool = False, outputs: bool = True
) -> Iterator[dict[str, Any]]:
    """A dict that holds, after each forward pass, what the named modules received or gave.

    Args:
        model: any module.
        names: submodules, as in `named_modules()`.
        inputs: keep the first argument of each module.
        outputs: keep its output. With both, values are pairs (input, output).

    Returns:
        name -> the value of its latest call. Values keep their graph: gradients flow through them.

    Raises:
        InputError: for a name that the model lacks.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    >>> with tapped(net, ["0"]) as seen:
    ...     out = net(torch.ones(1, 2))
    >>> torch.equal(seen["0"].relu(), out)
    True
    """
    seen: dict[str, Any] = {}

    def look(name: str, arguments: tuple, keywords: dict[str, Any], output: Any) -> None:
        first = next(iter([*arguments, *keywords.values()]), None)
        seen[name] = (first, output) if inputs and outputs else first if inputs else output

    with watching(model, names, look):
        yield seen
