"""The file in which Optuna keeps a search."""

from pathlib import Path
from typing import TYPE_CHECKING

from refilled.errors import RunError
from refilled.files import damaged
from refilled.tuning.search_space import import_optuna

if TYPE_CHECKING:
    from optuna.study import Study


def open_study(file: Path, name: str) -> "Study":
    """Open the search that a file keeps, or begin it.

    Raises:
        RunError: The file cannot be read, or holds something else.
    """
    optuna = import_optuna()
    try:
        backend = optuna.storages.journal.JournalFileBackend(str(file))
        study: Study = optuna.create_study(
            storage=optuna.storages.JournalStorage(backend),
            study_name=name,
            direction="maximize",
            load_if_exists=True,
        )
    except OSError as error:
        if file.is_dir():
            raise RunError(damaged(file, "it is a folder")) from error
        raise  # the disk is full, or may not be written
    except Exception as error:  # a damaged line makes Optuna raise many types
        raise RunError(
            damaged(file, f"it holds no search of Optuna ({type(error).__name__}: {error!s:.100})")
        ) from error
    return study
