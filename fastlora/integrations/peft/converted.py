"""What the classes have in common that take the place of a model's own: they are made at run time, and go again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def while_converted(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a converted class, for as long as a module has that class.

    A wrapper on an instance, accelerate's for one, keeps the forward that it found and calls it when the module has its
    own class again: then the forward of that one runs.
    """

    @functools.wraps(forward)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        if hasattr(type(self), "stock"):
            return forward(self, *args, **kwargs)
        return type(self).forward(self, *args, **kwargs)

    return checked


class Converted:
    """A class that `make_class` made. Stands before the class whose place it takes."""

    stock: type
    """The class whose place it takes, which a module gets back."""
    made: tuple[Any, ...]
    """The function that made it, and its arguments."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A copy or a pickle names what its class is made of.
        return _empty, self.made, self.__dict__.copy()


def _empty(make: Callable[..., Any], *args: Any) -> Any:
    kind = make(*args)
    return kind.__new__(kind)


def make_class(base: type[Converted], stock: type, made: tuple[Any, ...], **fields: Any) -> type:
    """A subclass of ``base`` and ``stock`` with more ``fields``, for the function in ``made``, which keeps it.

    It has the name of ``stock``: trainers and wrapping policies look modules up by it.
    """
    names = {"__module__": stock.__module__, "__qualname__": stock.__qualname__}
    return type(stock.__name__, (base, stock), {**names, "stock": stock, "made": made, **fields})
