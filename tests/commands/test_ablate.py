"""`eyas ablate`: variants are trained alike on one text and compared with the base, conversation by conversation."""

from __future__ import annotations

import json

import pytest
import torch

from eyas.train.ablate import difference, tau_of
from eyas.train.acceptance import Simulation
from eyas.train.features import States, TapsOf

COMMON = ["--common", "draft_vocab_size=200", "--common", "unroll_steps=3", "--workers", "1"]


def words(models, data, *more) -> list:
    return ["ablate", "--target", models / "target", "--data", data, "--taps", "1,2,4", "--steps", "2", *COMMON, *more]


def test_each_set_is_a_variant_and_each_variant_may_change_several_things(models, run, data, tmp_path):
    out = tmp_path / "r.json"
    more = ["--set", "loss=lk-alpha", "--variant", "draft_layers=2 taps=0,1,2,3", "--set", "taps=4", "--seeds", "2", "--out", out]
    status, said, err = run(*words(models, data, *more))
    assert status == 0, err
    told = json.loads(out.read_text())
    names = ["base", "loss=lk-alpha", "taps=4", "draft_layers=2 taps=0,1,2,3"]
    assert list(told["variants"]) == names and all(name in said for name in names)
    base, loss, one, several = told["variants"].values()
    assert base["settings"] == {} and "interval" not in base
    assert loss["settings"] == {"loss": "lk-alpha"} and one["settings"] == {"taps": [4]}
    assert several["settings"] == {"draft_layers": 2, "taps": [0, 1, 2, 3]}
    for each in (loss, one, several):
        assert each["interval"][0] <= each["more_than_base"] <= each["interval"][1]
        assert each["more_than_base"] == pytest.approx(each["tau"] - base["tau"], abs=2e-4)
        assert (each["steps"], each["slots"], len(each["by_seed"])) == (2, base["slots"], 2)
    assert told["conditions"]["taps_are_inputs_of_layers"] == [0, 1, 2, 3, 4], "one text holds what every variant reads"
    assert told["conditions"]["conversations"] + told["conditions"]["held_out"] == 12


def test_a_variant_that_changes_nothing_is_the_base(models, run, data, tmp_path):
    """Same text, same seeds, same held-out conversations: what differs is what the variant says and nothing else."""
    out = tmp_path / "r.json"
    assert run(*words(models, data, "--set", "loss=soft", "--out", out))[0] == 0
    base, same = json.loads(out.read_text())["variants"].values()
    assert same["more_than_base"] == 0 and same["interval"] == [0, 0] and same["acceptance"] == base["acceptance"]


def test_one_text_serves_drafts_that_read_different_layers():
    """A variant's features are, of those that are kept, the columns of its own taps, in their order."""

    class Kept:
        def states(self, examples) -> States:
            return States(torch.tensor([[0, 1, 20, 21, 30, 31, 60, 61]]), torch.zeros(1, 2), torch.zeros(1))

    chosen = TapsOf(Kept(), (0, 2, 3, 6), (0, 3, 6)).states([])
    assert chosen.features.tolist() == [[0, 1, 30, 31, 60, 61]] and chosen.hidden.shape == (1, 2)


def test_shards_must_hold_what_every_variant_reads(models, refused, tmp_path):
    (tmp_path / "key.json").write_text(json.dumps({"taps": [1, 2, 4]}))
    more = ["--taps", "1,2,4", "--steps", "2", "--common", "draft_vocab_size=200", "--set", "taps=1,3"]
    line = refused("ablate", "--target", models / "target", "--shards", tmp_path, *more)
    assert line == f"{tmp_path} holds features of layers 1, 2, 4, not of 3; leave --shards out"


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ([], "nothing to compare; name what a variant changes with --set NAME=VALUE or --variant 'NAME=VALUE NAME=VALUE'"),
        (["--set", "clip=2", "--variant", "clip=2"], "variant 'clip=2' is asked for twice"),
        (["--set", "speed=9"], "--set speed=9: there is no setting 'speed'; there are unroll_steps, "),
        (["--set", "token_left_out=true"], "--set token_left_out is for method eagle1, not for eagle3"),
        (["--set", "seed=3"], "--set seed=..: every variant is trained with the same seeds; say how many with --seeds"),
        (["--set", "draft_vocab_size=999"], "a draft vocabulary of 999 is larger than the target's 263; ask for less"),
        (["--set", "taps=1,9"], "taps must be different layers in ascending order between 0 and 4, not (1, 2, 4, 9)"),
        (["--set", "clip=2", "--seeds", "0"], "--seeds must be at least 1, not 0"),
        (["--set", "clip=2", "--self-play", "9"], "--data brings conversations, --shards and --self-play are about text the target writes"),
    ],
)
def test_what_cannot_be_compared_is_one_line(models, refused, data, more, line):
    assert refused(*words(models, data, *more)).startswith(line)


def test_the_interval_of_a_difference_is_paired():
    """Conversations that differ much from each other and drafts that differ by a little, always: the interval knows the little."""
    draw = torch.Generator().manual_seed(0)
    slots = torch.full((40,), 100.0, dtype=torch.float64)
    base = 300 * torch.rand(40, generator=draw, dtype=torch.float64)
    more = 10 + torch.rand(40, generator=draw, dtype=torch.float64)

    def of(right) -> Simulation:
        return Simulation(slots, slots[:, None], slots[:, None], right[:, None], right[:, None])

    found, low, high = difference([of(base + more)], [of(base)])
    assert found == pytest.approx(float(more.mean()) / 100) and 0.1 < low < found < high < 0.11
    assert float(tau_of([of(base), of(base + 2 * more)])) == pytest.approx(1 + float((base + more).mean()) / 100), "seeds together"
    low, high = of(base).interval()
    assert high - low > 0.3, "one alone is known much less well"
