"""The order of training tokens: nothing twice, nothing lost, the same on any number of ranks."""

import json
import tempfile
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data.loader
from common import UserError
from data.loader import LOADERS, LoaderSettings, make_loader, segment_starts
from data.shards import write_shard
from durable.seals import write_sealed

VOCAB_SIZE = 100_000  # above uint16, so the shards are version 2 and every token of a test can be its place
BOS = 7
WINDOW_KINDS = ("shuffled", "coprime")
PROPERTY = settings(deadline=None, max_examples=30)

kinds = st.sampled_from(sorted(LOADERS))
window_kinds = st.sampled_from(WINDOW_KINDS)
shard_sizes = st.lists(st.integers(0, 60), min_size=1, max_size=5).map(lambda sizes: [*sizes, 40])
row_lens = st.integers(1, 8)
seeds = st.integers(-(2**31), 2**63)


@contextmanager
def shards(sizes: list[int]):
    """Write shards whose token ids count up through all of them; yields their pattern."""
    with tempfile.TemporaryDirectory() as folder:
        for i, (first, end) in enumerate(pairwise(np.cumsum([0, *sizes]))):
            write_shard(Path(folder) / f"fineweb_train_{i:06d}.bin", np.arange(first, end), VOCAB_SIZE)
        yield Path(folder) / "fineweb_train_*.bin"


def open_loader(pattern, kind="sequential", seed=0):
    return make_loader(pattern, LoaderSettings(kind, VOCAB_SIZE, BOS, seed))


def take_global(pattern, kind, plan, world_size):
    """Take the micro-batches of a plan [(row_len, num_tokens)] with a loader a rank; four of each."""
    loaders = [open_loader(pattern, kind) for _ in range(world_size)]
    batches = []
    for row_len, num_tokens in plan:
        for _ in range(4 // world_size):
            batches += [
                loader.take(row_len, num_tokens, rank, world_size) for rank, loader in enumerate(loaders)
            ]
    states = [loader.state_dict() for loader in loaders]
    assert all(state == states[0] for state in states)
    return batches, states[0]


def take_epoch(loader, row_len: int) -> np.ndarray:
    """Take the rows of a window loader's epoch one by one: (rows, row_len + 1) ids."""
    epoch, rows = loader.state_dict()["epoch"], []
    while loader.state_dict()["epoch"] == epoch:
        batch = loader.take(row_len, row_len, 0, 1)
        rows.append(np.append(batch.tokens[0], batch.targets[0, -1]))
        assert np.array_equal(batch.tokens[0, 1:], batch.targets[0, :-1])
    return np.array(rows)


# All loaders


@PROPERTY
@given(kinds, shard_sizes, st.lists(st.tuples(row_lens, st.integers(1, 4)), min_size=1, max_size=5))
def test_any_number_of_ranks_sees_the_same_global_order(kind, sizes, plan):
    """A run on one GPU must train on the batches of a run on four, through epochs and curriculum stages."""
    plan = [(row_len, row_len * num_rows) for row_len, num_rows in plan]
    with shards(sizes) as pattern:
        expected, expected_state = take_global(pattern, kind, plan, 1)
        for world_size in (2, 4):
            ours, state = take_global(pattern, kind, plan, world_size)
            assert state == expected_state
            for our, want in zip(ours, expected, strict=True):
                assert all(np.array_equal(a, b) for a, b in zip(our, want))


@PROPERTY
@given(kinds, shard_sizes, st.lists(row_lens, min_size=2, max_size=12), st.data())
def test_a_restored_loader_goes_on_bit_for_bit(kind, sizes, plan, data):
    """A resumed run is the run; the state goes through a file, so it is JSON."""
    stop = data.draw(st.integers(0, len(plan) - 1))
    with shards(sizes) as pattern:
        loader, restored = open_loader(pattern, kind), open_loader(pattern, kind)
        restored.take(3, 6, 0, 1)  # its own past must not matter
        for row_len in plan[:stop]:
            loader.take(row_len, 3 * row_len, 1, 2)
        restored.load_state_dict(json.loads(json.dumps(loader.state_dict())))
        for row_len in plan[stop:]:
            ours, want = (one.take(row_len, 3 * row_len, 1, 2) for one in (restored, loader))
            assert all(np.array_equal(a, b) for a, b in zip(ours, want))
        assert restored.state_dict() == loader.state_dict()


@pytest.mark.parametrize("kind", LOADERS)
def test_a_rank_reads_its_own_rows_and_no_others(kind, monkeypatch):
    """Eight ranks that each read the global batch need eight times the memory and bandwidth."""
    with shards([1000, 1000]) as pattern:
        loader, counts = open_loader(pattern, kind), []
        read = loader.read
        monkeypatch.setattr(loader, "read", lambda *place: counts.append(read(*place).size) or read(*place))
        loader.take(10, 50, 2, 8)
        assert sum(counts) == (5 * 11 if kind in WINDOW_KINDS else 51)


@pytest.mark.parametrize("kind", LOADERS)
def test_ids_of_another_tokenizer_stop_the_run_and_name_the_file(kind, monkeypatch):
    """An id beyond the embedding is a crash without a name on a GPU, also deep in a shard."""
    monkeypatch.setattr(data.loader, "EDGE_TOKENS", 10)
    with shards([50, 50]) as pattern:
        loader = make_loader(pattern, LoaderSettings(kind, 60, BOS, 0))
        with pytest.raises(UserError, match=r"fineweb_train_000001\.bin: token id .* vocabulary size 60"):
            loader.take(10, 90, 0, 1)


@pytest.mark.parametrize("kind", LOADERS)
def test_shards_without_tokens_are_refused(kind):
    """Going round an empty epoch never ends."""
    with shards([0, 0]) as pattern, pytest.raises(UserError, match="no tokens"):
        open_loader(pattern, kind)


@pytest.mark.parametrize(
    ("kind", "enough"), [(kind, 24) for kind in WINDOW_KINDS] + [("sequential", 32), ("packed", 32)]
)
def test_data_smaller_than_a_step_is_refused_before_training(kind, enough):
    """Such a step would repeat text within itself; only whole rows count."""
    with shards([16, 24, 0]) as pattern:
        loader = open_loader(pattern, kind)
        loader.check_step(8, enough)
        with pytest.raises(UserError, match=rf"expected at least {enough + 8}.* found {enough}"):
            loader.check_step(8, enough + 8)


@pytest.mark.parametrize("kind", LOADERS)
def test_a_checkpoint_of_other_data_is_refused(kind):
    """Its position may lie behind the end of these shards."""
    with shards([1000]) as longer, shards([50]) as shorter:
        before, after = open_loader(longer, kind), open_loader(shorter, kind)
        before.take(4, 400, 0, 2)
        with pytest.raises(UserError, match="other data"):
            after.load_state_dict(before.state_dict())


# The stream


@PROPERTY
@given(shard_sizes, st.lists(st.tuples(row_lens, st.integers(1, 30)), min_size=1, max_size=8))
def test_the_stream_is_the_shards_in_order_for_ever(sizes, plan):
    """Every token once an epoch, across the ends of shards and epochs; the obvious way is one long array."""
    spans = [row_len * num_rows + 1 for row_len, num_rows in plan]
    endless = np.resize(np.arange(sum(sizes)), sum(spans))
    with shards(sizes) as pattern:
        loader = open_loader(pattern)
        for (row_len, _), want in zip(plan, np.split(endless, np.cumsum(spans)[:-1]), strict=True):
            tokens, targets, starts = loader.take(row_len, want.size - 1, 0, 1)
            assert tokens.dtype == targets.dtype == np.int64
            assert np.array_equal(tokens, want[:-1].reshape(-1, row_len))
            assert np.array_equal(targets, want[1:].reshape(-1, row_len))
            assert np.array_equal(starts, tokens == BOS)
        epoch, position = divmod(sum(spans), sum(sizes))
        assert loader.state_dict() == {"epoch": epoch, "position": position}


# Packed documents


@PROPERTY
@given(st.lists(st.booleans(), min_size=1, max_size=60), st.integers(1, 12))
def test_segments_start_at_documents_and_are_cut_at_the_longest(starts_doc, longest):
    """The obvious way counts the tokens of the open segment."""
    expected, length = [], longest
    for starts in starts_doc:
        length = 1 if starts or length == longest else length + 1
        expected.append(length == 1)
    assert segment_starts(np.array([starts_doc]), longest).tolist() == [expected]


def test_a_packed_micro_batch_is_the_stream_as_one_row_of_segments():
    """Packing changes what a token may look at, never the tokens."""
    with shards([30, 30]) as pattern:
        stream, packed = open_loader(pattern), open_loader(pattern, "packed")
        for _ in range(5):
            (tokens, targets, _), ours = stream.take(4, 20, 0, 1), packed.take(6, 20, 0, 1)
            assert np.array_equal(ours.tokens, tokens.reshape(1, 20))
            assert np.array_equal(ours.targets, targets.reshape(1, 20))
        packed.load_state_dict({"epoch": 0, "position": 0})
        starts = packed.take(6, 20, 0, 1).starts_segment
        assert np.flatnonzero(starts).tolist() == [
            0,
            6,
            BOS,
            BOS + 6,
            BOS + 12,
        ]  # the id at a place is the place


# Windows


@PROPERTY
@given(window_kinds, shard_sizes, row_lens, seeds)
def test_an_epoch_holds_every_window_once_and_less_than_two_rows_of_a_shard_are_left_out(
    kind, sizes, row_len, seed
):
    """Sorted, a shard's windows touch each other; a window never crosses into another shard."""
    with shards(sizes) as pattern:
        loader = open_loader(pattern, kind, seed)
        for _ in range(2):
            rows = take_epoch(loader, row_len)
            assert (np.diff(rows, axis=1) == 1).all()
            for first, end in pairwise(np.cumsum([0, *sizes])):
                mine = np.sort(rows[(rows[:, 0] >= first) & (rows[:, 0] < end), 0])
                assert (np.diff(mine) == row_len).all()
                assert (mine.size > 0) == (end - first > row_len)
                if mine.size:
                    assert mine[-1] + row_len < end
                    assert end - first - 1 - mine.size * row_len < 2 * row_len


@pytest.mark.parametrize("kind", WINDOW_KINDS)
def test_epochs_and_seeds_have_orders_and_windows_of_their_own(kind):
    """A second reading in the same order, or a seed that changes nothing, is worth less."""
    with shards([1000, 1500]) as pattern:
        loader, again, other = (open_loader(pattern, kind, seed) for seed in (1, 1, 2))
        first, second = take_epoch(loader, 10), take_epoch(loader, 10)
        assert np.array_equal(take_epoch(again, 10), first)
        for rows in (second, take_epoch(other, 10)):
            assert not np.array_equal(rows[:100], first[:100])
            assert set(rows[:, 0]) != set(first[:, 0])


@pytest.mark.parametrize("kind", WINDOW_KINDS)
def test_a_batch_mixes_the_shards_and_not_neighbouring_windows(kind):
    """Consecutive rows that continue each other are one text: a batch of them is a biased gradient."""
    with shards([6000] * 6) as pattern:
        rows = take_epoch(open_loader(pattern, kind), 10)[:, 0]
    for batch in np.split(rows[:3200], 50):  # 64 rows each
        shares = np.bincount(batch // 6000, minlength=6)
        assert shares.min() >= 1
        assert kind != "coprime" or (shares.min() >= 9 and shares.max() <= 12)  # of 10.7
    assert np.mean(np.abs(np.diff(rows)) == 10) < 0.01


def test_coprime_strides_differ_between_shards_and_epochs():
    """With one stride every epoch would be the same walk from another start."""
    with shards([6000] * 2) as pattern:
        loader = open_loader(pattern, "coprime")
        epochs = [take_epoch(loader, 10)[:, 0] for _ in range(2)]
    walks = [rows[rows // 6000 == shard] // 10 for rows in epochs for shard in range(2)]
    assert len({frozenset(np.diff(walk[:100]) % walk.size) for walk in walks}) == 4


@PROPERTY
@given(window_kinds, st.lists(row_lens, min_size=1, max_size=20))
def test_no_epoch_repeats_a_target_when_the_row_length_changes(kind, plan):
    """A curriculum lengthens rows within a run; a change ends an epoch of which something was read."""
    with shards([50, 30]) as pattern:
        loader, seen, row_len_before = open_loader(pattern, kind), {}, 0
        for row_len in plan:
            before = loader.state_dict()
            batch = loader.take(row_len, row_len, 0, 1)
            epoch = before["epoch"] + (row_len != row_len_before and before["position"] > 0)
            after = loader.state_dict()
            assert after["epoch"] - epoch in (0, 1)
            if after["epoch"] == epoch:
                assert (
                    after["position"] == len(seen.get(epoch, set())) // row_len + 1
                )  # no row is passed over
            targets = set(batch.targets.flatten().tolist())
            assert not targets & seen.setdefault(epoch, set())
            seen[epoch] |= targets
            row_len_before = row_len


@pytest.mark.parametrize("kind", WINDOW_KINDS)
def test_a_row_longer_than_every_shard_is_refused(kind):
    """There is no window to read, in this epoch or any other."""
    with shards([8, 5]) as pattern:
        loader = open_loader(pattern, kind)
        assert loader.take(7, 7, 0, 1).tokens.tolist() == [list(range(7))]
        with pytest.raises(UserError, match=r"at least 9 tokens.* at most 8"):
            loader.take(8, 8, 0, 1)


def test_document_starts_are_marked_in_windows():
    """Gates that look back one token are closed there."""
    with shards([40]) as pattern:
        loader = open_loader(pattern, "shuffled")
        batches = [loader.take(5, 5, 0, 1) for _ in range(7)]
    assert all(np.array_equal(batch.starts_segment, batch.tokens == BOS) for batch in batches)
    assert sum(batch.starts_segment.sum() for batch in batches) == 1


def test_a_wrong_dataset_is_refused_before_the_first_step():
    """Other ids, or other shards than the manifest's, an hour into a run cost that hour."""
    with shards([40, 40]) as pattern:
        settings = LoaderSettings("sequential", 79, BOS, 0)
        with pytest.raises(UserError, match="token id 79 at position 39 is not below"):
            make_loader(pattern, settings)
        entries = [{"file": path.name, "bytes": path.stat().st_size} for path in pattern.parent.glob("*.bin")]
        write_sealed(pattern.parent / "manifest.json", {"train": {"shards": entries[:1]}})
        with pytest.raises(UserError, match="none by the manifest"):
            open_loader(pattern)
