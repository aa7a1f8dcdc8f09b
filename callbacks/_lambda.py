"""A callback from functions."""

from __future__ import annotations

from typing import Any

from jaxlightning._callback import Callback
from jaxlightning._nearest import nearest

_NOT_HOOKS = {"outermost", "state_key", "state_dict", "load_state_dict", "take_back"}
_HOOKS = [name for name in vars(Callback) if not name.startswith("_") and name not in _NOT_HOOKS]


class LambdaCallback(Callback):
    """Functions as hooks, for what is too short for a class.

        LambdaCallback(on_log=lambda trainer, metrics, step: print(step, metrics))

    Each argument is the name of a hook of [`Callback`][], with a function of what that hook gets.
    """

    def __new__(cls, **hooks: Any) -> LambdaCallback:
        for name, function in hooks.items():
            if name not in _HOOKS:
                raise TypeError(
                    f"`LambdaCallback({name}=...)` is no hook.{nearest(name, _HOOKS)} There are "
                    f"{', '.join(_HOOKS)}."
                )
            if not callable(function):
                raise TypeError(
                    f"`LambdaCallback({name}=...)` got a `{type(function).__name__}`. Pass a "
                    f"function of what `Callback.{name}` gets: `lambda trainer, *args: ...`."
                )
        # The bus looks at classes for what is overridden, so each set of functions is one.
        methods = {name: staticmethod(function) for name, function in hooks.items()}
        names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
        return super().__new__(type(cls.__name__, (cls,), methods | names))
