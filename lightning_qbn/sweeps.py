"""What happens around the jobs of a multirun: a failed one leaves its error, done ones are not run again, a summary."""

from __future__ import annotations

import atexit
import json
import logging
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    from lightning_qbn.collecting import FinishedRun

_log = logging.getLogger(__name__)


class SweepSummary(Callback):
    """Print a table over the jobs of a multirun at its end, write ``sweep.csv`` and ``sweep.png`` into its folder.

    A job that fails leaves its traceback in ``error.txt`` in its own folder. The summary comes also where jobs failed,
    or where the sweep was interrupted.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called before any job."""
        # Where a job fails, Hydra raises at the end, and calls no callback.
        self._folder = Path(config.hydra.sweep.dir).absolute()
        atexit.register(self._summarize)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Called after all jobs, none of which failed."""
        atexit.unregister(self._summarize)
        self._summarize()

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Called after a job, in its own process."""
        folder = Path(config.hydra.runtime.output_dir)
        error = folder / "error.txt"
        error.unlink(missing_ok=True)  # of an earlier try
        if job_return.status is not JobStatus.FAILED or HydraConfig.get().mode is not RunMode.MULTIRUN:
            return
        try:
            _ = job_return.return_value  # raises what the job raised
        except (Exception, SystemExit) as failure:  # noqa: BLE001  whatever that is
            said = _said(failure)
            error.write_text("".join([said, "\n\n", *traceback.format_exception(failure)]))
            _log.error("Job %s failed: %s", config.hydra.job.num, said)

    def _summarize(self) -> None:
        from lightning_qbn.errors import ConfigurationError

        with suppress(ConfigurationError):  # commands that train nothing can be swept as well: there is no run
            summarize([self._folder], self._folder)


def _said(failure: BaseException) -> str:
    """One line of what went wrong at first: Hydra wraps what it is told while it builds objects."""
    while failure.__cause__ is not None:
        failure = failure.__cause__
    return f"{type(failure).__name__}: {' '.join(str(failure).split())}"


def summarize(folders: list[Path], target: Path) -> list[FinishedRun]:
    """Print the table over all runs in folders, and write the CSV file and the picture."""
    from rich.console import Console

    from lightning_qbn import collecting

    runs, broken = collecting.read_runs(folders)
    console = Console()
    console.print(collecting.to_table(runs, broken))
    for path in collecting.write(runs, target) if runs else []:
        console.print(f"wrote {path}", highlight=False, soft_wrap=True, markup=False)
    return runs


def _essence(config: dict[str, Any]) -> dict[str, str]:
    """What of a configuration changes the result, wherever its folder lies."""
    from lightning_qbn.collecting import flat
    from lightning_qbn.float_key import COSMETIC

    folder = config["paths"]["output_dir"]
    left_out = ("paths.", "logger.", "threads", *(f"trainer.{name}" for name in COSMETIC - {"max_epochs"}))
    return {key: str(value).replace(folder, "") for key, value in flat(config) if not key.startswith(left_out)}


def done_before(cfg: DictConfig) -> dict[str, Any] | None:
    """The report of this job of a multirun, where an earlier try of the sweep has finished it.

    Raises:
        ConfigurationError: its folder holds another run.
    """
    if not HydraConfig.initialized() or HydraConfig.get().mode is not RunMode.MULTIRUN:
        return None
    path = Path(cfg.paths.output_dir) / "report.json"
    if not path.is_file():
        return None
    from lightning_qbn.errors import ConfigurationError

    report: dict[str, Any] = json.loads(path.read_text())
    if _essence(report["config"]) != _essence(json.loads(json.dumps(OmegaConf.to_container(cfg, resolve=True)))):
        raise ConfigurationError(
            f"{path.parent} holds another run. Continue a sweep with the overrides that it was started with, or give "
            f"it another hydra.sweep.dir."
        )
    return report
