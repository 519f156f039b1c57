"""Any data set of images or text: from the Hugging Face Hub, or from a folder."""

from esper.tasks.collection.address import SCHEMES
from esper.tasks.collection.task import collection_task

__all__ = ["SCHEMES", "collection_task"]
