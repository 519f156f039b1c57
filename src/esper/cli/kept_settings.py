"""The settings that a run's folder has kept."""

from pydantic import ValidationError

from esper.cli.command_line import command_line
from esper.experiments.config import RunConfig
from esper.experiments.settings import SettingsError, explain
from esper.telemetry.run_kind import training_settings
from esper.telemetry.run_reader import RunReader


def kept_settings(reader: RunReader) -> RunConfig:
    """Return the settings of a run that a network was grown in.

    Raises:
        RunFolderError: They cannot be read.
        SettingsError: The folder holds the training of a policy, a run in a loop of one's own, or
            settings of another version.
    """
    kept = reader.config()
    if training_settings(kept) is not None:
        raise SettingsError(
            f"{reader.folder} holds the training of a policy, and no run of a network; go on with "
            f"it by: {command_line('policy', 'train', '--out', reader.folder)}"
        )
    if "trainer" not in kept:
        raise SettingsError(
            f"{reader.folder} was written by a loop of your own, not by esper grow, and only that "
            "can go on with it: start your script again (docs/checkpoints.md)"
        )
    try:
        return RunConfig.model_validate(kept)
    except ValidationError as error:
        raise SettingsError(
            f"{reader.folder} holds no settings that this version of esper reads: "
            f"{explain(error, RunConfig)}"
        ) from error
