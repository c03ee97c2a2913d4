"""A run is a pure function of its config and its data: killed, split, cached or not."""

import signal

import pytest
import torch

from launched import ENVIRONMENT, digests, finish, logged, losses, start, steps, wait_for
from runs import train, tree


@pytest.fixture(autouse=True)
def _own_cache(own_cache, monkeypatch):
    monkeypatch.setitem(ENVIRONMENT, "LDM_CACHE", str(own_cache))


@pytest.fixture(autouse=True)
def _one_thread():
    """As the processes that are started have."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_killed_three_times_the_run_ends_in_the_same_bits(tmp_path):
    settings = dict(
        duration="14 steps",
        batch_size=8,
        checkpoints={"every": "3 steps", "keep": 2},
        train=["unet", "text_encoder"],
    )
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(whole, **settings)  # in a process whose hashes are others than the server's
    config, checkpoints = tree(broken, **settings), broken / "checkpoints"

    def staging() -> bool:
        # Inside the write: some files of the staging folder are there, its manifest is not.
        for folder in checkpoints.glob(".staging-*"):
            if (folder / "unet").exists() and not (folder / "manifest.json").exists():
                return True
        return False

    inside = 0
    for moment in (
        lambda: steps(broken) >= 2,
        lambda: steps(broken) >= 5 and staging(),
        lambda: steps(broken) >= 9,
    ):
        process = start(config, tmp_path / "b")
        wait_for(moment, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
        inside += any(checkpoints.glob(".staging-*"))
        process.stdout.close()
    assert inside >= 1, "no kill fell inside a checkpoint write"
    output = finish(start(config, tmp_path / "b"))
    assert "going on from" in output
    last = "checkpoints/images-000000000112"
    assert digests(whole / last) == digests(broken / last)
    assert losses(whole) == losses(broken)
    assert len(losses(broken)) == 14
    assert not list(checkpoints.glob(".staging-*"))


def test_how_often_it_saves_does_not_change_the_run(tmp_path):
    train(tmp_path / "often", duration="4 steps", checkpoints={"every": "1 steps"})
    train(tmp_path / "seldom", duration="4 steps", checkpoints={"every": "100 steps"})
    assert losses(tmp_path / "often") == losses(tmp_path / "seldom")
    assert len(list((tmp_path / "often" / "checkpoints").iterdir())) == 2


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """The same 5 steps by one process, by two, and in micro-batches of 4."""
    root = tmp_path_factory.mktemp("recorded")
    settings = dict(duration="5 steps", optimizer={"lr": 1e-4})
    runs = {
        "one": (dict(), 1),
        "two": (dict(), 2),
        "micro": (dict(micro_batch_size=4), 1),
    }
    found = {}
    for name, (changes, processes) in runs.items():
        run = root / name
        config, record = tree(run, **settings, **changes), root / f"{name}-record"
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(ENVIRONMENT, "LDM_CACHE", str(root / "cache"))
            finish(start(config, record, processes=processes))
        ranks = [torch.load(f) for f in sorted(record.glob("*.pt"))]
        assert len(ranks) == processes
        per_step = len(ranks[0]) // 5
        whole = {
            key: torch.cat(
                [
                    torch.cat([r[step * per_step + part][key] for part in range(per_step)])
                    for step in range(5)
                    for r in ranks
                ]
            )
            for key in ranks[0][0]
        }
        found[name] = (whole, losses(run), logged(run, "gradient_norm"))
    return found


@pytest.mark.parametrize("other", ["two", "micro"])
def test_world_size_and_micro_batch_change_no_draw(recorded, other):
    one, mine = recorded["one"][0], recorded[other][0]
    assert one["position"].tolist() == list(range(80))
    for name in one:
        assert torch.equal(one[name], mine[name]), name


@pytest.mark.parametrize("other", ["two", "micro"])
def test_world_size_and_micro_batch_leave_the_losses(recorded, other):
    # AdamW hides the scale of a gradient from the losses; its norm does not.
    for logged_as, tolerance in ((1, 1e-5), (2, 1e-4)):
        one, mine = (torch.tensor(recorded[name][logged_as]) for name in ("one", other))
        assert len(one) == 5
        assert ((mine - one) / one).abs().max() < tolerance


def test_cached_and_uncached_runs_agree(tmp_path):
    train(tmp_path / "cached", duration="4 steps")
    train(tmp_path / "straight", duration="4 steps", cache_latents=False, cache_text=False)
    cached, straight = (torch.tensor(losses(tmp_path / n)) for n in ("cached", "straight"))
    assert ((cached - straight) / cached).abs().max() < 1e-5


def test_another_seed_is_another_run(tmp_path):
    train(tmp_path / "a", duration="2 steps", seed=1)
    train(tmp_path / "b", duration="2 steps", seed=2)
    assert losses(tmp_path / "a") != losses(tmp_path / "b")
