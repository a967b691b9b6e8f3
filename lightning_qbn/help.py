"""What ``lightning-qbn --help`` prints."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_qbn.reference import Choice, choices

_USAGE = """[bold]lightning-qbn[/] [COMMAND] [GROUP=CHOICE ...] [KEY=VALUE ...]

Train a float network, quantize it, train on, re-estimate its batch-norms, fold, export, report.

  lightning-qbn                                     the demonstration, by the recipe
  lightning-qbn quantization.weight_bits=4 seed=1   other values
  lightning-qbn -m qat.epochs=1,2,5,10              a sweep, with a table and a picture at its end
  lightning-qbn export ckpt_path=...                export a finished run again
  lightning-qbn evaluate path=model.onnx            measure an exported file
  lightning-qbn collect dir=logs/multiruns/...      finished runs side by side
  lightning-qbn --cfg job                           what a command would run with

Tab completion: eval "$(lightning-qbn -sc install=bash)" (zsh, fish too). Options of Hydra: lightning-qbn --hydra-help
"""


def print_help() -> None:
    """Usage, the choices of each group, and every key with its value and meaning."""
    console = Console(highlight=False)
    console.print(_USAGE)
    known = choices()
    console.print(_of_groups(known))
    console.print(_of_keys(known))


def _of_groups(known: list[Choice]) -> Table:
    table = Table("group", "choice", "", title="Groups: GROUP=CHOICE", title_justify="left", box=None)
    for choice in known[1:]:
        if choice.group not in ("hydra", "paths"):
            table.add_row(choice.group, choice.name, escape(choice.about))
    return table


def _of_keys(known: list[Choice]) -> Table:
    """Of the main file, and of the first choice of each group that has the key."""
    table = Table(title="Keys: KEY=VALUE", title_justify="left", box=None)
    table.add_column("key", no_wrap=True, overflow="ignore")  # to be typed as it stands
    for column in ("value", ""):
        table.add_column(column, overflow="fold")
    seen = set()
    order = sorted(known[1:], key=lambda choice: choice.name != "default")
    for choice in (known[0], *order):
        if choice.group in ("hydra", "paths", "callbacks", "experiment", "debug", "launcher", "hparams_search"):
            continue
        for key in choice.keys:
            if key.name not in seen and (key.value or key.comment):
                seen.add(key.name)
                table.add_row(key.name, escape(key.value), escape(key.comment))
    return table
