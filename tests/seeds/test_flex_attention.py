"""Flex attention: the same parameters and values as SDPA, and a bounded cache of block masks."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from esper.seeds import Family, Seed, attention, blueprints
from esper.seeds.block_masks import MAX_BLOCK_MASKS, BlockMasks, block_masks

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_masks_before_or_after() -> Iterator[None]:
    block_masks.clear()
    yield
    block_masks.clear()


def grown_pair(dim: int = 32, heads: int = 2) -> tuple[Seed, Seed]:
    """Return an attention and a flex attention seed with the same parameters."""
    torch.manual_seed(0)
    plain = blueprints.create(Family.TRANSFORMER, "attention", dim, heads=heads)
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    flexible = blueprints.create(Family.TRANSFORMER, "flex_attention", dim, heads=heads)
    flexible.load_state_dict(plain.state_dict())
    return plain, flexible


def gradients(seed: Seed, features: Tensor) -> list[Tensor]:
    source = features.clone().requires_grad_()
    seed.increment(source).square().sum().backward()
    return [source.grad, *(parameter.grad for parameter in seed.parameters())]


def test_on_a_cpu_it_is_causal_attention_with_the_same_parameters():
    plain, flexible = grown_pair()
    features = torch.randn(2, 9, 32)
    assert torch.equal(flexible.increment(features), plain.increment(features))
    assert all(map(torch.equal, gradients(flexible, features), gradients(plain, features)))
    assert len(block_masks) == 0


def test_both_paths_agree_in_one_graph_where_a_mask_was_prepared(monkeypatch: pytest.MonkeyPatch):
    plain, flexible = grown_pair()
    monkeypatch.setattr(attention, "_FLEX_DEVICES", frozenset({"cpu"}))
    calls: list[int] = []
    run = attention.attend_flex

    def counted(query: Tensor, *rest: object) -> Tensor:
        calls.append(query.shape[2])
        return run(query, *rest)

    monkeypatch.setattr(attention, "attend_flex", counted)
    torch.compiler.reset()
    compiled = torch.compile(flexible.increment, fullgraph=True, backend="aot_eager")
    flexible.prepare((2, 9, 32), CPU)
    with torch.no_grad():  # the CPU has no backward of flex attention
        for tokens, takes_flex in ((9, True), (5, False)):
            calls.clear()
            features = torch.randn(2, tokens, 32)
            torch.testing.assert_close(compiled(features), plain.increment(features))
            assert bool(calls) == takes_flex
    assert len(block_masks) == 1  # a traced forward builds none


def test_heads_too_small_for_flex_attention_run_the_other_path(monkeypatch: pytest.MonkeyPatch):
    plain, flexible = grown_pair(dim=32, heads=4)
    monkeypatch.setattr(attention, "_FLEX_DEVICES", frozenset({"cpu"}))
    monkeypatch.setattr(attention, "_compiled_flex_attention", lambda: pytest.fail("was called"))
    flexible.prepare((2, 9, 32), CPU)
    assert len(block_masks) == 0
    features = torch.randn(2, 9, 32)
    assert torch.equal(flexible.increment(features), plain.increment(features))


def test_the_mask_cache_drops_the_least_recently_used():
    masks = BlockMasks()
    first = masks.get_or_make(1, CPU)
    for tokens in range(2, MAX_BLOCK_MASKS + 1):
        masks.get_or_make(tokens, CPU)
    assert masks.get_or_make(1, CPU) is first
    masks.get_or_make(100, CPU)
    assert len(masks) == MAX_BLOCK_MASKS
    assert masks.get(1, CPU) is first
    assert masks.get(2, CPU) is None
    assert (masks.hits, masks.misses) == (1, MAX_BLOCK_MASKS + 1)
    allowed = first.mask_mod
    positions = torch.arange(3)
    seen = allowed(None, None, positions[:, None], positions[None, :])
    assert torch.equal(seen, torch.ones(3, 3, dtype=torch.bool).tril())


def test_a_mask_made_in_an_evaluation_serves_training():
    with torch.inference_mode():
        mask = BlockMasks().get_or_make(4, CPU)
    assert not mask.kv_num_blocks.is_inference()


@pytest.mark.parametrize("move", [lambda seed: seed.double(), lambda seed: seed.to("meta")])
def test_moving_a_seed_to_another_device_or_dtype_drops_the_masks(move):
    _, flexible = grown_pair()
    block_masks.get_or_make(4, CPU)
    move(flexible)
    assert len(block_masks) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("default")  # the compiler warns of what it does itself
@pytest.mark.parametrize("compiled", [False, True])
def test_both_paths_agree_on_a_gpu(compiled: bool):
    plain, flexible = (seed.cuda() for seed in grown_pair(dim=128, heads=4))
    features = torch.randn(2, 256, 128, device="cuda")
    torch.compiler.reset()
    flexible.prepare(tuple(features.shape), features.device)
    run = copy.deepcopy(flexible)
    if compiled:
        run.increment = torch.compile(run.increment, fullgraph=True)  # type: ignore[method-assign]
    torch.testing.assert_close(
        run.increment(features), plain.increment(features), rtol=1e-2, atol=1e-3
    )
    torch.testing.assert_close(
        gradients(run, features), gradients(plain, features), rtol=2e-2, atol=1e-2
    )
    assert 0 < len(block_masks) <= MAX_BLOCK_MASKS
