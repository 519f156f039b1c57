"""The text task: Python's own sources, split by whole files, and a causal host."""

import math
import sysconfig
from pathlib import Path

import pytest
import torch
from torch import nn

from esper.tasks import TaskDataError
from esper.tasks.text.data import (
    CONTEXT_BYTES,
    WindowBatches,
    corpus_files,
    held_out_windows,
    load_splits,
    split_of,
    windows,
)
from esper.tasks.text.host import TextHost
from esper.tasks.text.task import (
    LARGE,
    SMALL,
    XL,
    TextScale,
    build,
    mean_loss,
    window_losses,
)


def training_batches(data: torch.Tensor, *, random_seed: int) -> WindowBatches:
    return WindowBatches(
        data, random_seed=random_seed, context=CONTEXT_BYTES, batch_windows=4, epoch_batches=100
    )


STDLIB = Path(sysconfig.get_paths()["stdlib"])


def test_every_file_is_in_one_split_as_a_whole() -> None:
    files = corpus_files(STDLIB)
    assert len(files) > 300
    splits = load_splits()
    for name in ("train", "validation", "test"):
        mine = [f for f in files if split_of(f.relative_to(STDLIB).as_posix()) == name]
        together = b"".join(path.read_bytes() for path in mine)
        assert bytes(getattr(splits, name).tolist()) == together
    sizes = [len(split) for split in (splits.train, splits.validation, splits.test)]
    assert sum(sizes) == sum(path.stat().st_size for path in files)
    assert 0.7 < sizes[0] / sum(sizes) < 0.9
    assert min(sizes) > 100_000


@pytest.mark.parametrize(
    ("path", "split"),
    [("abc.py", "train"), ("ssl.py", "validation"), ("queue.py", "test"), ("string.py", "test")],
)
def test_split_of_a_file_is_the_same_in_every_process(path: str, split: str) -> None:
    assert split_of(path) == split


def test_corpus_leaves_out_what_depends_on_the_installation(tmp_path: Path) -> None:
    kept = ["abc.py", "json/decoder.py", "contest.py"]
    left_out = [
        "site-packages/torch.py",
        "dist-packages/apt.py",
        "test/test_abc.py",
        "unittest/test/support.py",
        "_sysconfigdata__linux.py",
        "notes.txt",
    ]
    for name in (*reversed(kept), *left_out):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("pass\n", encoding="utf-8")
    assert [f.relative_to(tmp_path).as_posix() for f in corpus_files(tmp_path)] == sorted(kept)


def test_python_without_sources_is_named_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    load_splits.cache_clear()
    with pytest.raises(TaskDataError, match="folder:PATH"):
        load_splits()


def test_targets_are_the_inputs_shifted_by_one_byte() -> None:
    data = torch.arange(1000) % 251
    inputs, targets = windows(data, torch.tensor([0, 7, 1000 - CONTEXT_BYTES - 1]), CONTEXT_BYTES)
    assert inputs.shape == targets.shape == (3, CONTEXT_BYTES)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal(inputs[:, 0], torch.tensor([0, 7, 871 % 251]))
    assert targets[2, -1] == data[-1]


def test_batches_reach_the_last_byte_and_never_beyond() -> None:
    data = torch.arange(CONTEXT_BYTES + 3).to(torch.uint8)
    seen = torch.cat([targets for _, targets in training_batches(data, random_seed=0)])
    assert set(seen[:, -1].tolist()) == {CONTEXT_BYTES, CONTEXT_BYTES + 1, CONTEXT_BYTES + 2}


def test_batches_of_an_epoch_differ_and_follow_the_random_seed() -> None:
    data = torch.arange(50_000) % 251
    first, same, other = (training_batches(data, random_seed=seed) for seed in (1, 1, 2))
    epoch = [inputs for inputs, _ in first]
    assert len(epoch) == len(first)
    assert all(torch.equal(x, y[0]) for x, y in zip(epoch, same, strict=True))
    assert not torch.equal(epoch[0], next(iter(other))[0])
    assert not torch.equal(epoch[0], epoch[1])
    assert not torch.equal(epoch[0], next(iter(first))[0])  # the next epoch is another one


@pytest.mark.parametrize("length", [CONTEXT_BYTES + 1, 5000, 3_000_000])
def test_held_out_windows_share_no_byte_and_spread_over_the_split(length: int) -> None:
    data = torch.arange(length)
    batches = held_out_windows(data, 256, CONTEXT_BYTES)
    taken = torch.cat([torch.cat([inputs, targets[:, -1:]], dim=1) for inputs, targets in batches])
    assert len(taken.unique()) == taken.numel()
    assert taken.shape[0] == min(256, length // (CONTEXT_BYTES + 1))
    assert taken.max() > 0.9 * length - CONTEXT_BYTES - 1
    again = held_out_windows(data, 256, CONTEXT_BYTES)
    assert all(torch.equal(one[0], two[0]) for one, two in zip(batches, again, strict=True))


def test_held_out_text_of_less_than_a_window_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 129 bytes"):
        held_out_windows(torch.zeros(CONTEXT_BYTES, dtype=torch.uint8), 256, CONTEXT_BYTES)


@pytest.mark.parametrize("scale", [SMALL, LARGE, XL], ids=["small", "large", "xl"])
def test_fresh_host_needs_about_eight_bits_per_byte(scale: TextScale) -> None:
    setup = build(0, scale)
    if scale is XL:  # its 4,096 windows are many seconds on a CPU
        setup.validation.batches = setup.validation.batches[:1]
    metrics = setup.validation()
    assert 7.9 < metrics["bits_per_byte"] < 8.1
    assert metrics["bits_per_byte"] == pytest.approx(metrics["loss"] / math.log(2), rel=1e-6)


def test_loss_per_window_is_the_mean_over_its_bytes() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 256, generator=generator)
    targets = torch.randint(0, 256, (3, 5), generator=generator)
    by_hand = -torch.stack(
        [logits[b].log_softmax(-1)[range(5), targets[b]].mean() for b in range(3)]
    )
    torch.testing.assert_close(window_losses(logits, targets), by_hand)
    torch.testing.assert_close(mean_loss(logits, targets), by_hand.mean())


def _trained_looking_host() -> TextHost:
    """Return a host whose blocks do something; those of a fresh one are the identity."""
    torch.manual_seed(0)
    host = TextHost(context=16).eval()
    for module in host.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.2)
    return host


def test_no_byte_changes_what_is_predicted_before_it() -> None:
    host = _trained_looking_host()
    tokens = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(1))
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 256
    with torch.no_grad():
        before, after = host(tokens), host(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert (before[:, 9:] - after[:, 9:]).abs().amax(dim=-1).gt(1e-4).all()


def test_host_tells_positions_apart() -> None:
    host = _trained_looking_host()
    with torch.no_grad():
        logits = host(torch.full((1, 8), 65))
    assert (logits[0, 1:] - logits[0, :-1]).abs().amax(dim=-1).gt(1e-4).all()


@pytest.mark.parametrize("num_bytes", [0, CONTEXT_BYTES])
def test_text_shorter_than_a_window_is_refused(num_bytes: int) -> None:
    short = torch.zeros(num_bytes, dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"training text must have at least {CONTEXT_BYTES + 1}"):
        training_batches(short, random_seed=0)
    with pytest.raises(ValueError, match=f"held-out text must have at least {CONTEXT_BYTES + 1}"):
        held_out_windows(short, 9, CONTEXT_BYTES)
    enough = training_batches(torch.zeros(CONTEXT_BYTES + 1, dtype=torch.uint8), random_seed=0)
    assert len(next(iter(enough))) == 2
