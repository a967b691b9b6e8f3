"""Hooks of one LightningModule, with something done before or after them.

Some moments have no hook of a callback: before a checkpoint is loaded, after the module has built its layers, in
checkpoints of weights alone. The module's own hooks are called then.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule


class Extended:
    """A hook of a module that calls others before and after it, by who asked for them."""

    def __init__(self, module: LightningModule, name: str) -> None:
        self.name, self.given = name, module.__dict__.get(name)
        self.own = getattr(module, name)
        self.__wrapped__ = self.own  # Lightning looks through it, at whether the module overrides the hook
        self.before: dict[object, Callable[..., None]] = {}
        self.after: dict[object, Callable[..., None]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call all of them."""
        for function in list(self.before.values()):
            function(*args, **kwargs)
        result = self.own(*args, **kwargs)
        for function in list(self.after.values()):
            function(*args, **kwargs)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """The hook alone, of the copied module."""
        return copy.deepcopy(self.own, memo)

    def __reduce__(self) -> Any:
        """The hook alone."""
        return getattr, (self.own.__self__, self.name)


def extend(
    module: LightningModule,
    name: str,
    owner: object,
    *,
    before: Callable[..., None] | None = None,
    after: Callable[..., None] | None = None,
) -> None:
    """Do something before or after a hook of a module, until the owner takes it back by `release`."""
    hook = module.__dict__.get(name)
    if not isinstance(hook, Extended):
        hook = module.__dict__[name] = Extended(module, name)
    if before is not None:
        hook.before[owner] = before
    if after is not None:
        hook.after[owner] = after


def release(module: LightningModule, owner: object) -> None:
    """Take back everything that an owner added; the module is as it was when nobody is left."""
    for name, hook in [(n, h) for n, h in module.__dict__.items() if isinstance(h, Extended)]:
        hook.before.pop(owner, None)
        hook.after.pop(owner, None)
        if hook.before or hook.after:
            continue
        if hook.given is None:
            del module.__dict__[name]
        else:
            module.__dict__[name] = hook.given


def own(module: LightningModule, name: str) -> Callable[..., Any]:
    """The module's own hook, without what was added."""
    hook = getattr(module, name)
    return hook.own if isinstance(hook, Extended) else hook  # type: ignore[no-any-return]
