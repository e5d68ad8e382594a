"""metrics.csv in the run directory, and the table of loggers that main.py builds from."""

from __future__ import annotations

import csv
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter


class _AppendingWriter(ExperimentWriter):
    """Lightning's writer deletes the rows of an earlier run; a resumed run must keep them."""

    def _check_log_dir_exists(self) -> None:
        path = Path(self.metrics_file_path)
        if path.is_file():
            with path.open(newline="") as f:
                self.metrics_keys = next(csv.reader(f), [])


class MetricsCSV(CSVLogger):
    """`<run>/metrics.csv`: one row a logging step, one column a metric."""

    def __init__(self, save_dir: str | Path, flush_logs_every_n_steps: int = 50) -> None:
        super().__init__(save_dir, name="", version="", flush_logs_every_n_steps=flush_logs_every_n_steps)

    @property
    def experiment(self) -> ExperimentWriter:
        if self._experiment is None:
            Path(self.root_dir).mkdir(parents=True, exist_ok=True)
            self._experiment = _AppendingWriter(log_dir=str(self.root_dir))
        return self._experiment
