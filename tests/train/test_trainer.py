"""Claims about the training loop: it resumes to the last bit, its workers add up, it learns, and a failure loses nothing."""

from __future__ import annotations

import errno
import json
import resource
import signal
from dataclasses import asdict, replace
from functools import cache

import pytest
import torch
from safetensors import SafetensorError
from torch.testing import assert_close

from eyas import reference
from eyas.config import PLAIN, EyasError, Sampling, TrainSettings, TreeShape
from eyas.decode.generate import Decoder
from eyas.drafters.eagle3 import Eagle3Drafter
from eyas.engine import load_target
from eyas.model import weights
from eyas.model.draft import DraftNetwork, draft_config, load_draft
from eyas.model.vocab import DraftVocab
from eyas.model.weights import read_tensors
from eyas.train import trainer as training
from eyas.train.batches import make_batch, split_evenly
from eyas.train.features import Example, TargetStates
from eyas.train.initialise import initialise
from eyas.train.measure import Simulation, TreeTau, simulate
from eyas.train.teacher import Teacher
from eyas.train.trainer import Budget, Trainer
from eyas.train.unroll import unrolled_loss
from tests.tiny import reference_weights, save_tiny_target, tiny_target

TAPS = (1, 2, 4)
SETTINGS = TrainSettings(unroll_steps=4, draft_vocab_size=40, tokens_per_batch=160, warmup_steps=4, learning_rate=3e-3, max_length=64)
FACTS = {
    "target_sha256": "abc",
    "taps_are_inputs_of_layers": list(TAPS),
    "data": {"kind": "tiny"},
    "versions": {"torch": torch.__version__},
}


@cache
def target():
    return tiny_target()


@cache
def examples() -> tuple[Example, ...]:
    """Twenty prompts with what the target itself answers, one in three with a second answer behind it; greedy for a third."""
    draw = torch.Generator().manual_seed(7)
    sizes = [(int(n), int(m)) for n, m in zip(torch.randint(3, 9, (20,), generator=draw), torch.randint(6, 30, (20,), generator=draw))]
    prompts = [torch.randint(0, 53, (size,), generator=draw).tolist() for size, _ in sizes]
    found = []
    for number, (prompt, (_, length)) in enumerate(zip(prompts, sizes)):
        tokens, answers = prompt, [-1] * len(prompt)
        for turn in range(1 + (number % 3 == 0)):
            if turn:
                tokens, answers = [*tokens, 5, 7], [*answers, -1, -1]
            before = len(tokens)
            tokens = written(tokens, length, Sampling(0.0 if number % 3 else 0.8), number)
            answers += [turn] * (len(tokens) - before)
        found.append(Example(tokens, answers, number % 3 != 0))
    return tuple(found)


def written(prompt: list[int], length: int, sampling: Sampling, seed: int) -> list[int]:
    texts = []
    for texts in Decoder(target()).run([prompt], PLAIN, sampling, [seed], length):  # noqa: B007
        pass
    return texts[0].tokens


def make_trainer(out, settings=SETTINGS, workers=1, dtype=torch.float64, **changes) -> Trainer:
    loose = tiny_target(prepare=False)
    vocab = DraftVocab(changes.pop("ids", range(settings.draft_vocab_size)), 53)
    network = DraftNetwork(draft_config(loose.config, len(vocab), TAPS), loose.model.embed_tokens.weight.detach()).to(dtype)
    initialise(network, loose, vocab, settings.seed)
    teacher = Teacher.of(loose, vocab, dtype)
    source, facts = TargetStates(target(), TAPS), changes.pop("facts", FACTS)
    return Trainer(network, vocab, teacher, examples()[4:], examples()[:4], source, settings, out, facts, 5, workers, **changes)


def simulation(tau: float) -> Simulation:
    """Of one example, whose first steps alone were right."""
    ones = torch.ones(1, 1, dtype=torch.float64)
    return Simulation(ones[0], ones, ones, (tau - 1) * ones, (tau - 1) * ones)


def silent(progress, losses, spent) -> None:
    pass


def interrupt_at(step: int):
    def report(progress, losses, spent):
        if progress.steps == step:
            raise KeyboardInterrupt

    return report


def state_of(trainer: Trainer) -> dict:
    state = torch.load(trainer.out / training.CHECKPOINT, weights_only=True)
    for point in (state["progress"], *state["progress"]["curve"]):
        del point["minutes"]
    return state


def assert_identical(one, other, place="") -> None:
    assert type(one) is type(other), place
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), place
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key in one:
            assert_identical(one[key], other[key], f"{place}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), place
        for index, (a, b) in enumerate(zip(one, other)):
            assert_identical(a, b, f"{place}[{index}]")
    else:
        assert one == other, place


def one_line(caught) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- resuming ----


@pytest.mark.parametrize(
    ("workers", "step_keep", "budget"),
    [(1, 0.5, Budget(steps=7)), (2, 0.5, Budget(steps=7)), (1, 1.0, Budget(tokens=500)), (2, 1.0, Budget(steps=7))],
    ids=str,
)
def test_a_run_that_was_stopped_twice_equals_one_that_was_not(tmp_path, workers, step_keep, budget):
    """Weights, optimiser and curve to the last bit; the batches of its second epoch too (an epoch has four)."""
    settings = replace(SETTINGS, step_keep=step_keep)
    whole = make_trainer(tmp_path / "whole", settings, workers, torch.float32)
    whole.run(budget, silent)
    for stop in (2, 5):
        parts = make_trainer(tmp_path / "parts", settings, workers, torch.float32)
        if stop > 2:
            parts.resume()
        with pytest.raises(KeyboardInterrupt):
            parts.run(budget, interrupt_at(stop))
    parts = make_trainer(tmp_path / "parts", settings, workers, torch.float32)
    parts.resume()
    assert parts.progress.steps == 5
    parts.run(budget, silent)
    assert parts.progress.steps > 5
    assert_identical(state_of(parts), state_of(whole))
    assert_identical(read_tensors(parts.out), read_tensors(whole.out))


def test_a_finished_run_goes_on_to_a_larger_budget(tmp_path):
    """The schedule is the budget's: what a run of 4 steps wrote is where one of 9 begins, not what one of 9 had after 4."""
    first = make_trainer(tmp_path)
    first.run(Budget(steps=4), silent)
    rates = []
    second = make_trainer(tmp_path)
    second.resume()
    assert_identical(second.network.state_dict(), first.network.state_dict())
    second.run(Budget(steps=9), lambda progress, losses, spent: rates.append(second.optimiser.param_groups[0]["lr"]))
    assert rates == [second.learning_rate(step / 9) for step in range(4, 9)]
    assert [point["step"] for point in second.progress.curve] == [4, 9]


def test_resuming_a_spent_budget_changes_nothing(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.run(Budget(steps=3), silent)
    before = state_of(trainer)
    again = make_trainer(tmp_path)
    again.resume()
    again.run(Budget(steps=3), silent)
    assert_identical(state_of(again), before)


def test_batches_are_a_function_of_seed_and_epoch_and_lose_no_document(tmp_path):
    one, other = make_trainer(tmp_path), make_trainer(tmp_path)
    for epoch in range(2):
        batches = list(one.batches(epoch))
        assert batches == list(other.batches(epoch)) and len(batches) > 2
        assert sorted(map(id, (example for batch in batches for example in batch))) == sorted(map(id, examples()[4:]))
        assert all(sum(len(example.tokens) for example in batch) <= SETTINGS.tokens_per_batch for batch in batches)
    assert list(one.batches(0)) != list(one.batches(1))


@pytest.mark.parametrize(
    ("settings", "changes", "reason"),
    [
        ({"learning_rate": 1e-4}, {}, "learning_rate 0.003 there, 0.0001 here"),
        ({"unroll_steps": 3, "seed": 5}, {}, "unroll_steps 4 there, 3 here; seed 0 there, 5 here"),
        ({}, {"facts": {**FACTS, "target_sha256": "def"}}, "another target"),
        ({}, {"facts": {**FACTS, "taps_are_inputs_of_layers": [0, 1, 2]}}, "other taps"),
        ({}, {"ids": range(1, 41)}, "the data, and with it the draft vocabulary"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_with_the_difference(tmp_path, settings, changes, reason):
    make_trainer(tmp_path).run(Budget(steps=1), silent)
    other = make_trainer(tmp_path, replace(SETTINGS, **settings), **changes)
    before = {name: value.clone() for name, value in other.network.state_dict().items()}
    with pytest.raises(EyasError, match=reason) as caught:
        other.resume()
    assert "choose another --out" in one_line(caught)
    assert_identical(dict(other.network.state_dict()), before)


def test_how_often_checkpoints_are_written_may_change(tmp_path):
    make_trainer(tmp_path).run(Budget(steps=1), silent)
    later = make_trainer(tmp_path, replace(SETTINGS, checkpoint_minutes=1.0))
    later.resume()
    assert later.progress.steps == 1


def test_no_checkpoint_or_a_damaged_one_is_one_line(tmp_path):
    trainer = make_trainer(tmp_path / "draft")
    with pytest.raises(EyasError, match="holds no checkpoint to resume from") as caught:
        trainer.resume()
    one_line(caught)
    trainer.run(Budget(steps=1), silent)
    file = trainer.out / training.CHECKPOINT
    data = file.read_bytes()
    for kept in (0, 10, len(data) // 2, len(data) - 30):
        file.write_bytes(data[:kept])
        with pytest.raises(EyasError, match="checkpoint is damaged or cut short") as caught:
            trainer.resume()
        one_line(caught)


# ---- gradients ----


def test_two_workers_give_the_gradient_of_one(tmp_path):
    """Every step's mean is over the slots of the whole batch, though the parts' answers end at different depths."""
    settings = replace(SETTINGS, step_keep=1.0, clip=1e9, tokens_per_batch=400)
    one, two, three = (make_trainer(tmp_path, settings, workers) for workers in (1, 2, 3))
    batch = sorted(next(one.batches(0)), key=lambda example: sum(number >= 0 for number in example.answers))[:7]
    losses = [trainer.step(batch) for trainer in (one, two, three)]
    assert_close(torch.tensor(losses[1:]), torch.tensor(losses[:1] * 2))
    assert one.progress.slots == two.progress.slots == three.progress.slots > 0
    for parameter, second, third in zip(one.parameters, two.parameters, three.parameters):
        assert_close(second.grad, parameter.grad, rtol=1e-9, atol=1e-12)
        assert_close(third.grad, parameter.grad, rtol=1e-9, atol=1e-12)


def test_one_step_is_the_gradient_of_the_unrolled_loss(tmp_path):
    trainer = make_trainer(tmp_path, replace(SETTINGS, step_keep=1.0, clip=1e9))
    documents = list(examples()[4:8])
    batch, states = make_batch(documents, trainer.source, trainer.network)
    law, within = trainer.teacher.law(states.hidden), trainer.teacher.within(states.favourites)
    loss, losses = unrolled_loss(trainer.network, batch, law, torch.arange(len(law)), within, 4, SETTINGS.step_decay)
    expected = torch.autograd.grad(loss, trainer.parameters)
    *found, norm = trainer.step(documents)
    assert_close(torch.tensor(found), torch.stack(losses).float())
    assert trainer.progress.slots == len(batch.slots()[0])
    assert norm == pytest.approx(float(torch.stack([gradient.norm() for gradient in expected]).norm()))
    for parameter, gradient in zip(trainer.parameters, expected):
        assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)


def test_gradients_reach_every_parameter_and_only_those(tmp_path):
    trainer = make_trainer(tmp_path)
    embedding = trainer.network.embedding[0].clone()
    trainer.step(list(examples()[4:]))
    for name, parameter in trainer.network.named_parameters():
        assert parameter.grad is not None and bool((parameter.grad != 0).any()), name
    assert torch.equal(trainer.network.embedding[0], embedding)


def test_step_keep_drops_slots_with_its_chance_and_never_before_the_first_step(tmp_path):
    trainer = make_trainer(tmp_path, replace(SETTINGS, step_keep=0.5))
    long = [Example(list(range(3)) * 700, [-1] + [0] * 2099)]
    depths = torch.cat([trainer.depths(long, f"{seed}") for seed in range(4)])
    counts = [int((depths > step).sum()) for step in range(4)]
    assert counts[0] == len(depths)
    for step in range(3):
        assert counts[step + 1] / counts[step] == pytest.approx(0.5, abs=0.04)


def test_parts_have_about_equal_tokens_and_lose_nothing():
    for parts in (1, 2, 3, 40):
        split = split_evenly(examples(), parts)
        assert sorted(map(id, (example for part in split for example in part))) == sorted(map(id, examples()))
        sizes = [sum(len(example.tokens) for example in part) for part in split]
        assert parts == 40 or max(sizes) - min(sizes) <= max(len(example.tokens) for example in examples())


# ---- learning and measuring ----


def held_out_loss(trainer: Trainer) -> float:
    batch, states = make_batch(trainer.held_out, trainer.source, trainer.network)
    law, within = trainer.teacher.law(states.hidden), trainer.teacher.within(states.favourites)
    with torch.no_grad():
        return float(unrolled_loss(trainer.network, batch, law, torch.arange(len(law)), within, 4, SETTINGS.step_decay)[0])


def test_sixty_steps_lower_the_held_out_loss(tmp_path):
    trainer = make_trainer(tmp_path, replace(SETTINGS, tokens_per_batch=300))
    before, losses = held_out_loss(trainer), []
    trainer.run(Budget(steps=60), lambda progress, now, spent: losses.append(now[0]))
    assert held_out_loss(trainer) < before - 0.3  # the larger part of it is the teacher's own entropy
    assert sum(losses[-5:]) < sum(losses[:5]) - 1.5


@pytest.mark.parametrize("settings", [{}, {"norm_output": True, "fc_norm": True}])
def test_held_out_tau_is_the_references(settings):
    """1 + the mean number of leading steps right, over all slots of all documents; and P(step k right | the steps before right)."""
    loose = tiny_target(prepare=False)
    vocab = DraftVocab([token for token in range(53) if token % 4], 53)
    network = DraftNetwork(draft_config(loose.config, len(vocab), TAPS, **settings), loose.model.embed_tokens.weight.detach()).double()
    initialise(network, loose, vocab, 0)
    source, steps, documents = TargetStates(target(), TAPS), 5, examples()[:11]  # more than one batch of eight
    found = simulate(network, vocab, documents, source, steps)
    weights_ = reference_weights(network)
    leading, slots = 0.0, 0
    alive, right, forced, reached = ([0] * steps for _ in range(4))
    for example in documents:
        tokens, answers = torch.tensor(example.tokens), torch.tensor(example.answers)
        states = source.states([example])
        logits = states.hidden @ loose.lm_head.weight.T
        accepted = reference.draft_accepts(weights_, network.config, tokens, states.features, logits, answers, vocab.ids, steps)
        count = int(reference.loss_slots(answers, 0).sum())
        leading += (reference.simulated_tau(accepted, answers) - 1) * count
        slots += count
        good = torch.ones(len(tokens), dtype=torch.bool)
        for step in range(steps):
            forced[step] += int((accepted[step] & reference.loss_slots(answers, step)).sum())
            reached[step] += int(reference.loss_slots(answers, step).sum())
            counted = reference.loss_slots(answers, step) & good
            alive[step] += int(counted.sum())
            right[step] += int((accepted[step] & counted).sum())
            good = accepted[step] & counted
    assert found.tau() == pytest.approx(1 + leading / slots, abs=1e-12) and found.tau() > 1
    assert found.acceptance() == pytest.approx([hits / max(count, 1) for hits, count in zip(right, alive)])
    assert found.accuracy() == pytest.approx([hits / count for hits, count in zip(forced, reached)])
    low, high = found.interval()
    assert low < found.tau() < high
    alone = simulate(network, vocab, documents, source, steps, together=1)
    assert all(torch.equal(one, other) for one, other in zip(found, alone))


def test_learning_rate_warms_up_and_falls_to_its_final_value(tmp_path):
    trainer = make_trainer(tmp_path)
    rates = []
    for step in range(41):
        trainer.progress.steps = step
        rates.append(trainer.learning_rate(step / 40))
    assert (
        rates[0] == pytest.approx(SETTINGS.learning_rate / SETTINGS.warmup_steps) and rates.index(max(rates)) == SETTINGS.warmup_steps - 1
    )
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] == pytest.approx(SETTINGS.final_learning_rate)


# ---- what is written, and failures ----


def test_training_json_tells_how_the_draft_came_about(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.run(Budget(steps=2), silent)
    told = json.loads((tmp_path / "training.json").read_text())
    assert {key: told[key] for key in FACTS} == FACTS
    assert told["settings"] == json.loads(json.dumps(asdict(SETTINGS)))
    assert told["steps"] == 2 and told["slots"] == trainer.progress.slots and told["hours"] == round(told["minutes"] / 60, 3)
    (point,) = told["curve"]
    assert point.keys() == {"step", "slots", "minutes", "tau", "accept_1", "accept_2", "accept_3", "accept_4"} and point["tau"] >= 1


def test_what_is_written_is_the_trained_draft(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.run(Budget(steps=2), silent)
    network, vocab = load_draft(tmp_path, trainer.network.embedding[0], torch.float64)
    assert torch.equal(vocab.ids, trainer.vocab.ids) and network.config == trainer.network.config
    for name, parameter in trainer.network.named_parameters():
        assert torch.equal(network.get_parameter(name), parameter.bfloat16().double()), name


def contents(directory) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def full_for_safetensors(*_, **__):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("module", "name", "failure"), [(weights, "save_file", full_for_safetensors), (weights, "save_file", full), (torch, "save", full)]
)
def test_a_full_disk_leaves_the_older_draft(tmp_path, monkeypatch, module, name, failure):
    out = tmp_path / "draft"
    trainer = make_trainer(out)
    trainer.run(Budget(steps=1), silent)
    before = contents(out)
    monkeypatch.setattr(module, name, failure)
    with pytest.raises(EyasError, match=r"cannot write .*draft: .*No space left on device.*; what was there before is untouched") as caught:
        trainer.run(Budget(steps=2), silent)
    one_line(caught)
    assert contents(out) == before and [file.name for file in tmp_path.iterdir()] == ["draft"]
    monkeypatch.undo()
    make_trainer(out).resume()
    load_draft(out, trainer.network.embedding[0], torch.float32)


@pytest.mark.parametrize("largest", [3_000, 60_000])  # bytes: fails in the weights, in the checkpoint
def test_a_file_that_may_not_grow_leaves_the_older_draft(tmp_path, largest):
    """The system's own refusal rather than a simulated one."""
    out = tmp_path / "draft"
    trainer = make_trainer(out)
    trainer.run(Budget(steps=1), silent)
    before = contents(out)
    assert len(before["model.safetensors"]) < 60_000 < len(before[training.CHECKPOINT])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, hard))
        with pytest.raises(EyasError, match=r"cannot write .*draft: .*; what was there before is untouched") as caught:
            trainer.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    one_line(caught)
    assert contents(out) == before and [file.name for file in tmp_path.iterdir()] == ["draft"]


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(EyasError, match="cannot write") as caught:
        make_trainer(tmp_path / "file" / "draft").run(Budget(steps=1), silent)
    one_line(caught)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_loss_that_is_not_a_number_stops_with_the_step_and_spoils_nothing(tmp_path):
    trainer = make_trainer(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        trainer.run(Budget(steps=9), interrupt_at(2))
    before = contents(tmp_path)

    def poison(progress, losses, spent):
        if progress.steps == 4:
            trainer.teacher.head_DH.fill_(float("nan"))

    with pytest.raises(EyasError, match=r"the loss exploded at step 5 .*its last checkpoint is untouched.*lower --learning-rate") as caught:
        trainer.run(Budget(steps=9), poison)
    one_line(caught)
    assert contents(tmp_path) == before
    assert all(bool(parameter.isfinite().all()) for parameter in trainer.parameters)


def test_ctrl_c_waits_for_the_end_of_a_step(tmp_path, monkeypatch):
    """A signal that comes while the weights change is acted on once the step is counted, so no batch is trained twice."""
    trainer = make_trainer(tmp_path)
    update = trainer.optimiser.step

    def interrupted_update():
        if trainer.progress.steps == 2:
            signal.raise_signal(signal.SIGINT)
        return update()

    monkeypatch.setattr(trainer.optimiser, "step", interrupted_update)
    with pytest.raises(KeyboardInterrupt):
        trainer.run(Budget(steps=9), silent)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    whole = make_trainer(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        whole.run(Budget(steps=9), interrupt_at(3))
    assert trainer.progress.steps == 3
    assert_identical(state_of(trainer), state_of(whole))


def test_ctrl_c_while_the_end_is_measured_saves_too(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "simulate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path).run(Budget(steps=2), silent)
    again = make_trainer(tmp_path)
    again.resume()
    assert again.progress.steps == 2


def test_a_saved_tiny_target_is_the_target_in_memory(tmp_path):
    config = load_target(save_tiny_target(tmp_path), "fp32").config
    assert config.vocab_size == 263 and config.eos_token_ids == (257,) and config.num_hidden_layers == 5
    loaded, made = load_target(tmp_path, "fp32"), tiny_target(dtype=torch.float32, prepare=False, vocab_size=263)
    assert_identical(dict(loaded.state_dict()), dict(made.state_dict()))


def test_the_weights_that_accepted_most_are_the_draft(tmp_path, monkeypatch):
    """Held-out tau rises, then falls: what is saved is the peak, what is resumed is the end."""
    trainer = make_trainer(tmp_path / "draft", replace(SETTINGS, measure_steps=2))
    taus, seen = iter([1.1, 1.5, 1.3]), {}

    def told(network, *_):
        tau = next(taus)
        seen[tau] = {name: value.clone() for name, value in network.state_dict().items()}
        return simulation(tau)

    monkeypatch.setattr(training, "simulate", told)
    trainer.run(Budget(steps=6), silent)
    assert [(point["step"], point["tau"]) for point in trainer.progress.curve] == [(2, 1.1), (4, 1.5), (6, 1.3)]
    saved = read_tensors(trainer.out)
    assert torch.equal(saved["fc.weight"], seen[1.5]["fc.weight"].bfloat16())
    assert not torch.equal(saved["fc.weight"], seen[1.3]["fc.weight"].bfloat16())
    again = make_trainer(tmp_path / "draft", replace(SETTINGS, measure_steps=2))
    again.resume()
    assert_identical(dict(again.network.state_dict()), seen[1.3])
    assert_identical(again.best, seen[1.5])


def test_tau_with_trees_is_that_of_real_rounds_and_leaves_the_draft_as_it_was(tmp_path):
    trainer = make_trainer(tmp_path, dtype=torch.float64)
    prompts = [list(example.tokens[:5]) for example in examples()[:3]]
    shape, before = TreeShape.parse("8x2x3"), {name: value.clone() for name, value in trainer.network.state_dict().items()}
    found = TreeTau(target(), trainer.vocab, prompts, shape, 20)(trainer.network)
    own = DraftNetwork(trainer.network.config, target().embedding.detach()).double()
    own.load_state_dict(before)
    own.prepare()
    committed = rounds = 0
    for prompt in prompts:
        *_, (text,) = Decoder(target(), Eagle3Drafter(own, trainer.vocab)).run([prompt], shape, Sampling(), [0], 20)
        committed, rounds = committed + len(text.tokens) - text.prompt_length - 1, rounds + text.rounds
    assert found == pytest.approx(committed / rounds) and found > 1
    assert all(torch.equal(value, before[name]) for name, value in trainer.network.state_dict().items())


def test_tau_with_trees_is_measured_now_and_then(tmp_path):
    trainer = make_trainer(tmp_path, replace(SETTINGS, measure_steps=2, tree_every=2), tree_tau=lambda network: 1.5)
    trainer.run(Budget(steps=8), silent)
    assert [point.get("tree_tau") for point in trainer.progress.curve] == [None, 1.5, None, 1.5]


def test_training_ends_where_acceptance_has_fallen_for_good(tmp_path, monkeypatch):
    """Three measurements in a row clearly under the best end it; near the best, or with patience 0, they do not."""
    taus = iter([1.2, 1.6, 1.58, 1.5, 1.4, 1.3, 1.2])
    monkeypatch.setattr(training, "simulate", lambda *_: simulation(next(taus)))
    trainer = make_trainer(tmp_path, replace(SETTINGS, measure_steps=1, patience=3))
    trainer.run(Budget(steps=50), silent)
    assert [point["tau"] for point in trainer.progress.curve] == [1.2, 1.6, 1.58, 1.5, 1.4, 1.3]
    assert trainer.progress.overfits(3) and not trainer.progress.overfits(0) and not trainer.progress.overfits(4)
