"""What has become of a run's seeds, without all else that it has told."""

from esper.report.story import RunStory, tell
from esper.telemetry.run_reader import RunReader

_TELL_OF_SEEDS = (
    *("run_started", "seed_germinated", "gate_evaluated", "seed_committed", "seed_pruned"),
    *("run_went_back", "run_finished"),
)


def seed_story(reader: RunReader) -> RunStory:
    """Return a run's story as far as it is of seeds, without what a way back has undone.

    Raises:
        EventSchemaError: An event was written by another version.
    """
    return tell([row.record for row in reader.event_rows(types=_TELL_OF_SEEDS)])
