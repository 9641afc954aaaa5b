"""The training loop: batches, gradients in parallel single-thread workers, AdamW, held-out acceptance, checkpoints that survive.

Two workers of one thread beat one worker of two threads on a laptop: OpenMP's threads stall at every barrier as soon as anything else
runs. Knows examples, a network and a budget; knows nothing of how examples came to be.
"""

from __future__ import annotations

import json
import math
import pickle
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eyas.config import EyasError, TrainSettings
from eyas.files.disk import atomic_directory
from eyas.kernels.linear import cpu_multiplies_bfloat16
from eyas.kernels.lowered import Matrices, Part, lowered
from eyas.methods import METHODS
from eyas.model.draft import DraftNetwork
from eyas.model.protocols import DraftModule
from eyas.model.vocab import DraftVocab
from eyas.train.acceptance import rank_accuracies, simulate
from eyas.train.batches import make_batch, numbered_answers, split_evenly
from eyas.train.features import Example, StateSource
from eyas.train.losses import choose_columns
from eyas.train.memory import StepMemory
from eyas.train.parallel import ALONE, Ranks
from eyas.train.split import SplitStates
from eyas.train.teacher import Teacher
from eyas.train.unroll import Supervision, loss_anchors

CHECKPOINT = "checkpoint"
MEASURED = 7  # steps of the chain that is measured, for a draft that trains one step
EXPLODED = 10  # a loss this many times that of a draft that knows nothing ends the run
LIKELIEST = 8  # the likeliest tokens of each distribution are always among a batch's columns: this many
CLEARLY = 0.05  # a measurement whose accepted drafts lie this share under the best counts as over-fitting
COMPARED = 1.0  # seconds for which a step's gradients are taken in either number format, in turn, to choose between them
GAIN = 0.95  # bfloat16 is chosen where it takes less than this share of float32's time
LARGE = 1 << 20  # parameters of a draft below which products are too small for the choice to matter: float32, unmeasured
FILES = ("model.safetensors", "config.json", "training.json", CHECKPOINT)  # the files a run writes into its directory
MAY_CHANGE = ("checkpoint_minutes", "products", "induction")  # settings in which a run and its resumption may differ
SAME_FACTS = {  # facts that a run and its resumption must share -> how a difference is told
    "method": "another method",
    "target_sha256": "another target",
    "target_read_sha256": "another config or tokenizer of the target",
    "taps_are_inputs_of_layers": "other taps",
    "chat_template_kwargs": "other chat-template-kwargs",
}


@dataclass
class Budget:
    """When training ends: when the first of these limits is reached; None sets no limit."""

    steps: int | None = None
    tokens: int | None = None  # anchors trained at step 0
    minutes: float | None = None

    def told(self) -> str:
        """The limits in words."""
        parts = ((self.steps, "steps"), (self.tokens, "answer tokens"), (self.minutes, "minutes"))
        return " or ".join(f"{limit:,g} {what}" for limit, what in parts if limit)

    def spent(self, progress: Progress) -> float:
        """The share of the budget that is used: 0 to 1, and beyond."""
        pairs = ((progress.steps, self.steps), (progress.slots, self.tokens), (progress.minutes, self.minutes))
        return max((done / limit for done, limit in pairs if limit), default=1.0)


@dataclass
class Progress:
    """How far a run is, and its learning curve."""

    steps: int = 0
    slots: int = 0  # anchors of step 0; training.json has this name for them
    unrolled: int = 0  # anchors of all steps together
    minutes: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)

    def best(self) -> float:
        return max((point["tau"] for point in self.curve), default=0.0)

    def overfits(self, patience: int) -> bool:
        """Whether the last `patience` measurements all lie clearly under the best."""
        least = 1 + (1 - CLEARLY) * (self.best() - 1)
        return 0 < patience <= len(self.curve) and all(point["tau"] < least for point in self.curve[-patience:])


@dataclass
class Run:
    """What is trained, on what, how, and where it goes."""

    network: DraftModule
    vocab: DraftVocab
    teacher: Teacher
    examples: Sequence[Example]
    held_out: Sequence[Example]
    source: StateSource
    settings: TrainSettings
    out: Path | None  # None: nothing is saved
    facts: dict[str, Any]  # what is known of data, target and machine, for training.json
    target_layers: int
    workers: int = 1
    ranks: Ranks = ALONE
    tree_tau: Callable[[DraftModule], float] | None = None
    method: str = "eagle3"


class Trainer:
    """Trains a run's network on its examples until the budget is spent, writing checkpoints and the draft to its `out`."""

    def __init__(self, run: Run) -> None:
        settings, workers = run.settings, run.workers
        self.method, self.teaching = run.method, METHODS[run.method].training()
        self.network, self.vocab, self.teacher, self.source = run.network, run.vocab, run.teacher, run.source
        self.examples, self.held_out, self.settings, self.out, self.facts = run.examples, run.held_out, settings, run.out, run.facts
        self.target_layers, self.workers, self.ranks = run.target_layers, workers, run.ranks
        self.parameters = [parameter for parameter in run.network.parameters() if parameter.requires_grad]
        self.optimiser = torch.optim.AdamW(
            self.parameters, lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
        )
        self.matrices = Matrices()  # in bfloat16, of the step under way
        self.progress = Progress()
        self.tree_tau = run.tree_tau
        self.memory = StepMemory(run.network.device)
        self.best: dict[str, Tensor] = {}  # the weights with the highest held-out tau so far, once measured
        self.pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) if workers > 1 else None

    # ---- one step ----

    def batches(self, epoch: int) -> Iterator[list[Example]]:
        """Shuffled batches of about `tokens_per_batch` tokens, each of documents of similar length; a function of (seed, epoch, workers).

        A batch has as many documents for every worker: with three long documents for two workers, one would wait half of the time.
        """
        rng = random.Random(f"{self.settings.seed}-{epoch}")
        order = sorted(self.examples, key=lambda example: len(example.tokens) + rng.uniform(0, 40))
        found: list[list[Example]] = [[]]
        together = min(self.workers * self.ranks.count, 4)  # more than four workers wait for each other at times: batches would grow
        for start in range(0, len(order), together):
            dealt = order[start : start + together]
            if found[-1] and sum(len(example.tokens) for example in found[-1] + dealt) > self.settings.tokens_per_batch:
                found.append([])
            found[-1] += dealt
        rng.shuffle(found)
        yield from found

    def depths(self, examples: list[Example], seed: str) -> Tensor:
        """For how many steps each anchor [N] of these examples counts: to its answer's end, or until it is dropped by chance. It goes on
        from a step to the next with the chance `step_keep`."""
        _, counted = loss_anchors(numbered_answers(examples), [len(example.tokens) for example in examples])
        if self.settings.step_keep >= 1:
            return counted
        generator = torch.Generator().manual_seed(random.Random(seed).getrandbits(62))
        drops = torch.rand(len(counted), generator=generator).clamp_min(1e-30).log() / math.log(self.settings.step_keep or 1e-9)
        return torch.minimum(counted, 1 + drops.floor().long())

    def gradients(
        self, examples: list[Example], depths: Tensor, counts: list[int], rule: str, seed: int
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The share that these examples, one worker's part of a batch, have in its gradients and in its losses by step. Workers run at
        once, so none writes to `.grad`."""
        device, settings = self.network.device, self.settings
        with device, self.products() as part:  # new tensors are made where the draft is
            batch, states = make_batch(examples, self.source, self.network)
            taught, teacher_of = batch.taught()
            distribution = self.teacher.distribution(states.hidden[taught], states.target_argmax[taught])
            drawn = settings.sampled_columns
            columns = choose_columns(distribution, LIKELIEST, drawn, self.progress.steps) if drawn else None
            within = self.teacher.within(states.target_argmax)
            steps = (settings.unroll_steps, settings.step_decay, depths, counts)
            loss, losses = self.teaching.loss(
                self.network, batch, Supervision(distribution, teacher_of, within, *steps, rule, columns, seed)
            )
        if part is not None:
            return part.gradients(loss, self.parameters), losses
        return list(torch.autograd.grad(loss, self.parameters, materialize_grads=True)), losses

    @contextmanager
    def products(self) -> Iterator[Part | None]:
        """Within the block this thread's products are computed as the settings say. On a CPU in bfloat16 they belong to a part, which then
        gives the gradients."""
        low, device = self.settings.products == "bf16", self.network.device.type
        if low and device == "cpu":
            with lowered(self.matrices) as part:
                yield part
        else:
            with torch.autocast(device, torch.bfloat16, enabled=low):
                yield None

    def settle(self, gradients: Callable[[], object]) -> None:
        """Choose what products are computed in, where that is left open. `gradients` takes those of the batch at hand."""
        device = self.network.device
        low = device.type == "cuda"
        if device.type == "cpu" and cpu_multiplies_bfloat16() and sum(each.numel() for each in self.parameters) >= LARGE:
            taken: dict[str, list[float]] = {"fp32": [], "bf16": []}
            started = time.monotonic()
            while len(taken["bf16"]) < 2 or time.monotonic() - started < COMPARED:
                for products, seconds in taken.items():
                    self.settings, before = replace(self.settings, products=products), time.monotonic()
                    gradients()
                    seconds.append(time.monotonic() - before)
            least = {products: round(min(seconds), 4) for products, seconds in taken.items()}
            self.facts["products_seconds"] = least
            low = least["bf16"] < GAIN * least["fp32"]
        low = self.ranks.agree(low, device) > 0
        self.settings = replace(self.settings, products="bf16" if low else "fp32")

    def step(self, examples: list[Example], spent: float = 0.0) -> list[float]:
        """One step of the optimiser on a batch; `spent`: the share of the budget that is used. Returns the mean loss of each unroll step,
        then the gradients' norm. Raises `EyasError` where the loss exploded, or memory does not hold the batch."""
        with self.memory.step(sum(len(example.tokens) for example in examples)):
            return self.stepped(examples, spent)

    def stepped(self, examples: list[Example], spent: float) -> list[float]:
        rule = self.settings.loss if spent >= self.settings.loss_from else "soft"
        parts = [part for part in split_evenly(examples, self.workers * self.ranks.count) if part]
        seeds = [f"{self.settings.seed}-{self.progress.steps}-{number}" for number in range(len(parts))]
        depths = [self.depths(part, seed) for part, seed in zip(parts, seeds, strict=True)]
        numbers = [random.Random(f"{seed}-chance").getrandbits(62) for seed in seeds]
        counts = [sum(int((depth > step).sum()) for depth in depths) for step in range(self.settings.unroll_steps)]
        own = slice(self.ranks.rank, None, self.ranks.count)  # this process's parts of the batch
        each = (parts[own], depths[own], repeat(counts), repeat(rule), numbers[own])

        def gradients() -> list[tuple[list[Tensor], list[Tensor]]]:
            return list((self.pool.map if self.pool else map)(self.gradients, *each))

        with self.source.step(parts) if isinstance(self.source, SplitStates) else nullcontext():
            if self.settings.products == "auto":
                self.settle(gradients)
            results = gradients()
        zero = torch.zeros((), device=self.network.device)
        losses = [sum((found[step] for _, found in results), zero) for step in range(self.settings.unroll_steps)]
        for index, parameter in enumerate(self.parameters):
            shares = [gradients[index] for gradients, _ in results]
            parameter.grad = sum(shares[1:], shares[0]) if shares else torch.zeros_like(parameter)
        self.ranks.sum([*losses, *(parameter.grad for parameter in self.parameters if parameter.grad is not None)])
        if self.settings.top_layer_only:  # these columns begin at 0 and stay there
            network = self.network
            assert isinstance(network, DraftNetwork) and network.fc.weight.grad is not None, "of an EAGLE-3 draft, which has just learned"
            network.fc.weight.grad[:, : -network.config.target_hidden_size] = 0
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.clip)
        told = torch.stack([*losses, norm]).tolist()  # at once: on CUDA each reading waits
        if not math.isfinite(told[-1]) or told[0] > EXPLODED * math.log(len(self.vocab) + 1):
            raise EyasError(self.explosion(examples))
        with undisturbed():
            self.optimiser.step()
            self.matrices.clear()
            self.progress.steps += 1
            self.progress.slots += counts[0]
            self.progress.unrolled += sum(counts)
        return told

    def explosion(self, examples: list[Example]) -> str:
        saved = self.out is not None and (self.out / CHECKPOINT).exists()
        kept = "its last checkpoint is untouched" if saved else "nothing was saved yet"
        where = (
            f"step {self.progress.steps + 1} of {self.out or 'the run'}, in a batch of {len(examples)} that begins with {examples[0].key}"
        )
        return f"the loss exploded at {where} ({kept}); train anew with a lower --learning-rate"

    def learning_rate(self, spent: float) -> float:
        """Linear warm-up, then a cosine from `learning_rate` to `final_learning_rate` over the budget."""
        s = self.settings
        warm = min(1.0, (self.progress.steps + 1) / max(s.warmup_steps, 1))
        return warm * (s.final_learning_rate + (s.learning_rate - s.final_learning_rate) * 0.5 * (1 + math.cos(math.pi * min(1.0, spent))))

    # ---- the run ----

    def run(self, budget: Budget, report: Callable[[Progress, list[float], float], None]) -> None:
        """Train until the budget is spent or the draft over-fits. `report` is called after each step with the progress, what `step`
        returned and the share of the budget that is used. Ctrl-C saves a checkpoint, then raises `KeyboardInterrupt`."""
        started, before = time.monotonic(), self.progress.minutes
        saved = time.monotonic()
        try:
            for batch in self.remaining():
                if self.progress.steps and self.progress.steps % self.settings.measure_steps == 0:
                    self.measure()  # before the step: a run stopped while it measures then measures first when it is resumed
                if self.progress.overfits(self.settings.patience):
                    break
                spent = self.ranks.agree(budget.spent(self.progress), self.network.device)
                if spent >= 1:
                    break
                for group in self.optimiser.param_groups:
                    group["lr"] = self.learning_rate(spent)
                losses = self.step(batch, spent)
                self.progress.minutes = before + (time.monotonic() - started) / 60
                report(self.progress, losses, spent)
                if time.monotonic() - saved > self.settings.checkpoint_minutes * 60:
                    self.save()
                    saved = time.monotonic()
            self.measure()
            self.rank()
            self.save()
        except KeyboardInterrupt:
            self.save()
            raise

    def remaining(self) -> Iterator[list[Example]]:
        """The batches that come next, epoch after epoch, without those that the run has trained on."""
        skipped, epoch = self.progress.steps, 0
        while True:
            for batch in self.batches(epoch):
                if skipped:
                    skipped -= 1
                else:
                    yield batch
            epoch += 1

    @torch.no_grad()
    def measure(self) -> None:
        """Add the simulated tau on held-out text, and acceptance by step, to the curve; at most once after a step. Keeps the weights where
        this tau is the highest so far."""
        if self.progress.curve and self.progress.curve[-1]["step"] == self.progress.steps:
            return
        with self.network.device:
            told = (self.network, self.vocab, self.held_out, self.source, self.measured_steps)
            found = simulate(*told, unroll=self.teaching.unroll)
        point = {
            "step": self.progress.steps,
            "slots": self.progress.slots,
            "minutes": round(self.progress.minutes, 2),
            "tau": round(found.tau(), 4),
        }
        point |= {f"accept_{i + 1}": round(value, 4) for i, value in enumerate(found.acceptance())}
        every = self.settings.tree_every
        if self.tree_tau and every and (len(self.progress.curve) + 1) % every == 0:
            point["tree_tau"] = round(self.tree_tau(self.network), 4)
        with undisturbed():
            highest = self.progress.best()
            self.progress.curve.append(point)
            if point["tau"] > highest:
                self.best = {name: value.clone() for name, value in self.network.state_dict().items()}

    @contextmanager
    def best_weights(self) -> Iterator[None]:
        """The network with the weights that are kept; after that again with those of the last step."""
        now = {name: value.clone() for name, value in self.network.state_dict().items()}
        self.network.load_state_dict(self.best)
        try:
            with torch.no_grad():
                yield
        finally:
            self.network.load_state_dict(now)

    def rank(self) -> None:
        """For a method with a static tree: measure how often each of the best weights' guesses is right. The tree's shape is made of
        that."""
        if METHODS[self.method].static:
            with self.best_weights(), self.network.device:
                told = (self.network, self.vocab, self.held_out, self.source, self.measured_steps, self.teaching.unroll)
                self.facts["accuracies"] = rank_accuracies(*told)

    def own_tau(self) -> float | None:
        """Tau of the weights that are kept, in real rounds with trees: on what the target itself answers to held-out questions. None where
        the trainer was given nothing to run them with."""
        if self.tree_tau is None:
            return None
        with self.best_weights():
            return self.tree_tau(self.network)

    @property
    def measured_steps(self) -> int:
        """How many steps the chain has whose acceptance is simulated: as many as the draft can guess; where it can guess on and on, as
        many as are trained, or MEASURED where only one is."""
        trained = self.settings.unroll_steps
        return self.network.levels or (trained if trained > 1 else MEASURED)

    # ---- saving ----

    def save(self) -> None:
        """Write the draft with its best weights, and what a resumed run needs: all files or none."""
        if self.out is None or not self.ranks.first:
            return
        with undisturbed(), atomic_directory(self.out, FILES) as work:
            METHODS[self.method].decoding().save(work, self.network, self.vocab, self.target_layers, self.best, self.facts)
            told = {**self.facts, "hours": round(self.progress.minutes / 60, 3), **asdict(self.progress), "settings": asdict(self.settings)}
            (work / "training.json").write_text(json.dumps(told, indent=1))
            state = {
                "weights": self.network.state_dict(),
                "best": self.best,
                "optimiser": self.optimiser.state_dict(),
                "progress": asdict(self.progress),
                "settings": asdict(self.settings),
                "vocab": self.vocab.ids,
                "facts": json.loads(json.dumps(self.facts)),  # plain values only: a checkpoint is read back with weights_only
            }
            try:
                torch.save(state, work / CHECKPOINT)
            except RuntimeError as error:  # how torch reports a full disk
                raise OSError("the checkpoint could not be written whole (is the disk full?)") from error

    def resume(self, state: dict[str, Any] | None = None) -> None:
        """Go on from the checkpoint in `out`, or from `state`, where the checkpoint has been read already. Raises `EyasError` where
        settings, method, target, taps or vocabulary differ, and names the differences.

        With as many workers, the same budget and the same products this equals a run that never stopped, to the last bit, unless the budget
        counts minutes. Where products are left open, they stay as they were chosen. A run that spent its budget may go on to a larger one;
        its learning rate then rises again.
        """
        if not state:
            assert self.out is not None, "a run that saves nothing has no checkpoint"
            state = read_checkpoint(self.out)
        ours, theirs, usual = asdict(self.settings), state["settings"], asdict(TrainSettings())
        before = theirs.get("products") or ("bf16" if theirs.get("autocast") else "fp32")  # earlier runs had autocast, on CUDA
        told = [
            f"{key} {theirs.get(key, usual[key])} there, {ours[key]} here"
            for key in ours
            if theirs.get(key, usual[key]) != ours[key] and key not in MAY_CHANGE
        ]
        told += [what for key, what in SAME_FACTS.items() if state["facts"].get(key, self.facts.get(key)) != self.facts.get(key)]
        if not told and not torch.equal(state["vocab"], self.vocab.ids):  # the head's rows would stand for other tokens
            told = ["the data, and with it the draft vocabulary"]
        if told:
            raise EyasError(f"{self.out} was trained otherwise ({'; '.join(told)}); resume with the same or choose another --out")
        self.network.load_state_dict(state["weights"])
        if self.settings.products == "auto":  # what was chosen stays, whatever a second would find now
            self.settings = replace(self.settings, products=before)
            self.facts |= {key: value for key, value in state["facts"].items() if key == "products_seconds"}
        self.best = state["best"]
        self.optimiser.load_state_dict(state["optimiser"])
        self.progress = Progress(**state["progress"])


def read_checkpoint(out: Path | None) -> dict[str, Any]:
    if out is None or not (out / CHECKPOINT).exists():
        raise EyasError(f"{out} holds no checkpoint to resume from; train without --resume, or give the directory of an earlier run")
    try:
        return torch.load(out / CHECKPOINT, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, LookupError):
        raise EyasError(f"{out / CHECKPOINT} is damaged or cut short; train anew into another --out") from None


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ctrl-C waits for the end of the block: weights and progress change together or not at all."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # only the main thread can set handlers; and where Ctrl-C is ignored or handled already, that stays
        return
    held: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if held:
        raise KeyboardInterrupt
