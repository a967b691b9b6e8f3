"""Hooks of one module with something before and after them, taken back in any order."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_qbn.callbacks.hooks import extend, own, release

from .conftest import Direct


class Noting(Direct):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint.setdefault("calls", []).append("own")


def calls(module: Direct) -> list[str]:
    checkpoint: dict[str, Any] = {}
    module.on_save_checkpoint(checkpoint)
    return checkpoint.get("calls", [])


def noting(name: str) -> Any:
    return lambda checkpoint: checkpoint.setdefault("calls", []).append(name)


@pytest.mark.parametrize("first", [0, 1])
def test_two_owners_come_and_go(first):
    module, owners = Noting(), [object(), object()]
    extend(module, "on_save_checkpoint", owners[0], before=noting("a"), after=noting("b"))
    extend(module, "on_save_checkpoint", owners[1], after=noting("c"))
    extend(module, "on_load_checkpoint", owners[1], before=noting("d"))
    assert calls(module) == ["a", "own", "b", "c"]
    release(module, owners[first])
    assert calls(module) == (["own", "c"] if first == 0 else ["a", "own", "b"])
    release(module, owners[1 - first])
    assert calls(module) == ["own"]
    assert not {"on_save_checkpoint", "on_load_checkpoint"} & set(vars(module))
    release(module, owners[0])


def test_hook_that_the_user_put_on_the_object_comes_back():
    module, owner = Direct(), object()
    module.on_save_checkpoint = given = noting("given")
    extend(module, "on_save_checkpoint", owner, before=noting("a"))
    assert calls(module) == ["a", "given"]
    assert own(module, "on_save_checkpoint") is given
    release(module, owner)
    assert module.on_save_checkpoint is given


def test_lightning_sees_whether_the_module_overrides_it():
    for module, overrides in ((Noting(), True), (Direct(), False)):
        extend(module, "on_save_checkpoint", object(), after=noting("a"))
        assert is_overridden("on_save_checkpoint", module) is overrides


@pytest.mark.parametrize("make", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_has_its_own_hook_alone(make):
    module = Noting()
    extend(module, "on_save_checkpoint", object(), after=noting("a"))
    copied = make(module)
    assert calls(copied) == ["own"]
    assert copied.on_save_checkpoint.__self__ is copied
    assert calls(module) == ["own", "a"]
