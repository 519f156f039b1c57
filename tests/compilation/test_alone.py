"""A slot without a host, beside one in the middle of a host."""

import torch

import esper
from esper.compilation import CompiledHost
from esper.compilation.alone import seed_alone
from esper.compilation.compile_job import CompileJob
from esper.compilation.compiled_host import seed_options
from esper.compilation.feature_guards import FeatureGuards
from esper.lifecycle.actions import Germinate
from esper.tasks.digits import DIGITS


class Notes:
    """Stands in for a service that would compile, and notes what it is asked for."""

    version = 0

    def __init__(self) -> None:
        self.asked: list[CompileJob] = []

    def ask(self, job: CompileJob, *, ahead: bool) -> bool:
        self.asked.append(job)
        return ahead


def test_the_request_is_that_of_a_run_of_a_bundled_task() -> None:
    setup, notes = DIGITS.build(0), Notes()
    slots = esper.attach(setup.model, setup.targets, example=setup.example, config=DIGITS.slot)
    compiled = CompiledHost(slots, service=notes)  # type: ignore[arg-type]
    images, _ = next(iter(setup.batches))
    with torch.compiler.set_stance("force_eager"):
        setup.model.train()(images)
    compiled.foresee(Germinate(slot=path, blueprint="conv_light") for path in slots)
    assert len(notes.asked) == len(setup.targets)
    for job in notes.asked:
        shape = job.request.features.shape
        features = FeatureGuards.of(torch.empty(shape, requires_grad=True))
        alone = CompileJob.of(seed_alone("conv_light", features), features, seed_options())
        assert alone.request.digest == job.request.digest
