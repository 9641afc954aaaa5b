"""Trained answer tokens a second: eyas' trainer against speculators' EAGLE-3 trainer, the same model, data, unroll and threads, in turns.

    python benchmarks/against_speculators.py --shards DIR --python VENV/bin/python [--conversations 48] [--rounds 2]

speculators pins its own dependencies, so it has a venv of its own and runs as a child with the interpreter `--python`:

    python -m venv VENV
    VENV/bin/pip install torch==2.13.0 torchvision torchaudio --index-url https://download.pytorch.org/whl/cpu
    VENV/bin/pip install speculators==0.9.0

Some conversations of self-written shards are handed to both. Theirs are converted into what speculators trains on and pass its own dataset,
collator, sampler, model, optimisers and `Trainer.train_epoch`. First the child tries what it offers (precisions, attentions, optimisers,
lengths of a packed row) and keeps the fastest, plain and, where that works, compiled; then all train on every conversation once a turn, in
turns. Ours runs three times a turn: as `eyas train` does by default, with every slot at every step, and with every token of the draft
vocabulary in the loss besides. The last does what theirs does. With our weights in their network, the mean loss of every unroll step is
compared on one conversation.

Prints one JSON object; `differs` names what is not the same. Slots are places of an answer that count at step 0, slot-steps their sum
over steps. What goes on is told on the standard error. Other work on the machine slows both, not always alike: `load_averages` and the
slots a second of processor time say how far to trust a run.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

if TYPE_CHECKING:  # each side lives in an environment of its own, so neither is imported at the top
    from eyas.config import TrainSettings
    from eyas.train.features import Example
    from eyas.train.trainer import Trainer

THREADS = 2
TOLERANCE = 2e-3  # of a step's mean loss, relative: shards hold bfloat16, and products are summed in other orders
DIFFERS = (
    "speculators' Trainer cannot run without an accelerator (it moves the model to device 0): a subclass sets its device to the CPU, "
    "its train_epoch runs unchanged",
    "speculators compiles its forward pass only where there is CUDA: on a CPU it is plain PyTorch; compiled by hand is tried as well",
    "speculators' default optimiser is Muon, whose bfloat16 products are slow on a CPU without them: timed is the faster of it and AdamW",
    "speculators' default flex attention has no backward pass on a CPU and its default fused losses need Triton: timed are its sdpa or "
    "eager attention (a dense mask [T, 7T]) and its eager loss, both its own options",
    "speculators keeps the draft's head frozen at the target's, we train it: two products of the head a row there, three here",
    "speculators packs conversations into a row of fixed length and pads it; we lay them end to end for each of two "
    "workers. Where longer rows than our batches are faster there, they are taken: fewer steps of the optimiser for as many slots",
    "speculators passes every token of a row, prompts and padding included, through every step and the head; we only slots that count",
    "at step i speculators counts slot j if t_{j+1+i} counts, so also slots that begin before the answer; we count it only if t_{j+1} and "
    "t_{j+2+i} lie in one answer. The mask it is given makes step 0 the same on both sides",
    "loss: speculators' default is KL(target | draft) over the draft vocabulary, ours its cross-entropy: they differ by the target's "
    "entropy, a constant; ours adds nothing where the target's favourite is outside the draft vocabulary; steps weigh 1 there, 0.55^i here",
    "speculators normalises the target's last hidden state itself; shards hold it normalised, so it is divided by the norm's weight first",
    "speculators' defaults norm_before_residual, norm_before_fc, norm_output and its sliding window are off: the network is the paper's, "
    "as ours is",
    "timed steps of speculators begin with batches in memory; ours read their shards",
    "speculators' steps compute accuracies as well (its trainer always does)",
)


@dataclass
class Turn:
    """One pass over the conversations."""

    seconds: float
    cpu_seconds: float  # of all threads, waiting in a spin included
    slots: int
    slot_steps: int
    steps: int


@dataclass(frozen=True)
class Variant:
    """What speculators lets one choose, and what changes its speed here."""

    dtype: str = "float32"
    attention: str = "sdpa"
    optimizer: str = "adamw"
    row: int = 640  # tokens of a packed row
    compiled: bool = False  # as its decorator does where there is CUDA

    @property
    def name(self) -> str:
        compiled = ", compiled" if self.compiled else ""
        return f"{self.dtype}, {self.attention} attention, {self.optimizer}, rows of {self.row}{compiled}"


class Clock:
    def __init__(self) -> None:
        self.started = time.perf_counter(), time.process_time()

    def passed(self) -> tuple[float, float]:
        """Seconds, and seconds of this process on all cores."""
        return time.perf_counter() - self.started[0], time.process_time() - self.started[1]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ---- ours ----


class Ours:
    """eyas' own trainer on some examples, as `eyas train` makes it but for what is held out."""

    def __init__(self, directory: Path, examples: list[Example], vocabulary_from: list[Example], settings: TrainSettings) -> None:
        from eyas.config import default_taps
        from eyas.files.target import load_target, target_config
        from eyas.train.build import new_draft
        from eyas.train.features import ShardStates
        from eyas.train.teacher import Teacher
        from eyas.train.trainer import Run, Trainer

        config, target = target_config(directory), load_target(directory, "fp32")
        network, vocab = new_draft(target, default_taps(config.num_hidden_layers), vocabulary_from, settings)
        self.norm = target.model.norm.weight.detach().float().clone()
        teacher = Teacher.of(target, vocab, torch.float32)
        layers = config.num_hidden_layers
        self.trainer: Trainer = Trainer(
            Run(network, vocab, teacher, examples, [], ShardStates(), settings, Path("nowhere"), {}, layers, THREADS)
        )
        self.batches = list(self.trainer.batches(0))
        self.step(self.batches[0])  # warms up

    def step(self, batch: list[Example]) -> Turn:
        from eyas.train.batches import split_evenly

        trainer = self.trainer
        parts = [part for part in split_evenly(batch, trainer.workers) if part]
        seeds = [f"{trainer.settings.seed}-{trainer.progress.steps}-{number}" for number in range(len(parts))]
        depths = torch.cat([trainer.depths(part, seed) for part, seed in zip(parts, seeds)])
        slot_steps = int(depths.clamp_max(trainer.settings.unroll_steps).sum())
        for group in trainer.optimiser.param_groups:
            group["lr"] = trainer.learning_rate(0.0)
        before, clock = trainer.progress.slots, Clock()
        trainer.step(batch)
        return Turn(*clock.passed(), trainer.progress.slots - before, slot_steps, 1)

    def turn(self) -> Turn:
        done = [self.step(batch) for batch in self.batches]
        return Turn(*(sum(values) for values in zip(*(asdict(turn).values() for turn in done))))

    def losses(self, example: Example) -> tuple[list[float], Tensor, Tensor, float]:
        """Mean KL(target | draft) of each step over our slots, those slots as marks [steps, M] of the token read last, slots a step, and
        the share of slots whose favourite is outside the draft vocabulary."""
        from eyas.train.batches import make_batch
        from eyas.train.unroll import Supervision, unrolled_loss

        trainer, steps = self.trainer, self.trainer.settings.unroll_steps
        batch, states = make_batch([example], trainer.source, trainer.network)
        taught, teacher_of = batch.taught()
        law = trainer.teacher.law(states.hidden[taught])
        all_count = torch.ones(len(batch.tokens), dtype=torch.bool)
        with torch.no_grad():
            _, means = unrolled_loss(trainer.network, batch, Supervision(law, teacher_of, all_count, steps, 1.0))
        slots, counted = batch.slots()
        entropy = torch.special.entr(law).sum(-1)
        found, marks = [], torch.zeros(steps, len(batch.tokens), dtype=torch.bool)
        for step in range(steps):
            rows = slots[counted > step] + 1 + step
            found.append(float(means[step] - entropy[teacher_of[rows]].mean()))
            marks[step, rows] = True
        outside = 1 - float(trainer.teacher.within(states.favourites[slots + 1]).float().mean())
        return found, marks, marks.sum(1), outside


def hand_over(folder: Path, ours: Ours, examples: Sequence[Example], chosen: Example) -> None:
    """Conversations, vocabulary and weights as files that the child can read without eyas."""
    trainer, tensors = ours.trainer, {}
    for number, example in enumerate(examples):
        states = trainer.source.states([example])
        answers = torch.tensor(example.answers)
        tensors[f"{number}.tokens"] = torch.tensor(example.tokens)
        tensors[f"{number}.mask"] = torch.cat([(answers[:-1] >= 0) & (answers[:-1] == answers[1:]), torch.tensor([False])])
        hidden = states.hidden.float() / ours.norm  # their norm makes of this what it was before
        tensors[f"{number}.states"] = torch.cat([states.features.float(), hidden], -1).unflatten(-1, (4, -1)).contiguous()
    save_file(tensors, folder / "conversations.safetensors")
    save_file(trainer.vocab.as_tensors(), folder / "vocab.safetensors")
    save_file({key: value.detach().clone() for key, value in trainer.network.named_parameters()}, folder / "weights.safetensors")
    save_file({"marks": ours.losses(chosen)[1]}, folder / "marks.safetensors")


# ---- theirs, in the child ----


class Theirs:
    """speculators on the conversations of a folder, one line of JSON asked and answered at a time."""

    def __init__(self, folder: Path, directory: str, unroll: int, chosen: int) -> None:
        from datasets import Dataset, disable_progress_bars

        import_module("speculators.train.trainer")  # here, so that a venv without it ends with the reason
        disable_progress_bars()
        self.folder, self.directory, self.unroll, self.chosen = folder, directory, unroll, chosen
        self.held: dict[str, tuple[Any, list[Any]]] = {}
        self.vocab, self.weights = load_file(folder / "vocab.safetensors"), load_file(folder / "weights.safetensors")
        tensors = load_file(folder / "conversations.safetensors")
        count = len(tensors) // 3
        rows = [(tensors[f"{number}.tokens"].tolist(), tensors[f"{number}.mask"].long().tolist()) for number in range(count)]
        data = Dataset.from_dict(
            {
                "input_ids": [tokens for tokens, _ in rows],
                "loss_mask": [mask for _, mask in rows],
                "seq_len": [len(tokens) for tokens, _ in rows],
            }
        )
        data.set_format("torch")
        data.save_to_disk(folder / "data")
        (folder / "data" / "hidden_states").mkdir()
        for number in range(count):
            held = {"hidden_states": tensors[f"{number}.states"], "token_ids": tensors[f"{number}.tokens"]}
            save_file(held, folder / "data" / "hidden_states" / f"hs_{number}.safetensors")

    def make(self, variant: Variant) -> tuple[Any, dict[str, Any]]:
        """Their model with our weights, and their settings: defaults but for what must be the same or cannot run here."""
        from speculators.models.eagle3 import Eagle3DraftModel
        from speculators.train.cli import create_transformer_layer_config
        from speculators.train.config import TrainConfig

        chosen = {
            "verifier_name_or_path": self.directory,
            "draft_vocab_size": len(self.vocab["d2t"]),
            "ttt_steps": self.unroll,
            "norm_before_residual": False,
            "norm_before_fc": False,
            "norm_output": False,
            "full_attention_indices": [0],
            "draft_attn_impl": variant.attention,
            "hidden_states_dtype": variant.dtype,
            "optimizer": variant.optimizer,
            "total_seq_len": variant.row,
            "loss_implementation": "eager",
        }
        settings = {**TrainConfig.from_flat(chosen).flatten(), **chosen}
        shape = create_transformer_layer_config(
            self.directory,
            settings["num_layers"],
            settings["draft_arch"],
            settings["draft_hidden_act"],
            settings["sliding_window"],
            settings["full_attention_indices"],
        )
        model = Eagle3DraftModel.from_training_args(shape, self.vocab["t2d"], self.vocab["d2t"], **settings)
        own = {name.replace("midlayer.", "layers.0."): value for name, value in self.weights.items()}
        unknown = model.load_state_dict(own, strict=False).unexpected_keys
        if unknown:
            raise ValueError(f"their network lacks {unknown}")
        return model, settings

    def trainer(self, variant: Variant) -> tuple[Any, list[Any]]:
        """Their Trainer, and an epoch of batches from their own dataset, sampler and collator."""
        from speculators.models.eagle3.data import shift_batch
        from speculators.train import trainer as training
        from speculators.train.data import ArrowDataset, CollateFn
        from speculators.train.distributed_batch_sampler import MultipackDistributedBatchSamplerV2

        training.tqdm = lambda batches, **_: batches  # no bars

        class OnCpu(training.Trainer):
            def setup_trainer(self) -> None:
                super().setup_trainer()
                self.local_rank = self.device_type = "cpu"
                self.global_step = 1  # so that no step is profiled: that asks for an accelerator

        model, settings = self.make(variant)
        if variant.compiled:
            model.forward = torch.compile(model.forward)
        dtype = getattr(torch, variant.dtype)
        data = ArrowDataset(variant.row, self.folder / "data", on_missing="raise", hidden_states_dtype=dtype)
        collate = CollateFn(variant.row, model.hidden_size, dtype=dtype, preprocess=shift_batch)
        sampler = MultipackDistributedBatchSamplerV2(variant.row, data.approx_lengths, num_replicas=1, rank=0)
        batches = Held(collate([data[int(index)] for index in indices]) for indices in sampler)
        call = model.get_trainer_kwargs(**settings)[0]
        keys = [
            key for key in settings if key in training.TrainerConfig._fields and key not in ("save_path", "hidden_states_dtype", "log_freq")
        ]
        config = training.TrainerConfig(
            **{key: settings[key] for key in keys},
            num_epochs=settings["epochs"],
            save_path=str(self.folder / "nowhere"),
            train_call_kwargs=call,
            hidden_states_dtype=dtype,
            log_freq=1_000_000,
        )
        return OnCpu(model, config, batches), batches

    def epoch(self, trainer: Any, batches: list[Any]) -> Turn:
        """Some batches through their train_epoch."""
        trainer.train_loader = Held(batches)
        clock = Clock()
        trainer.train_epoch(0)
        passed = clock.passed()
        marks = [batch["loss_mask"] for batch in batches]
        steps = sum(int(mask[:, step:].sum()) for mask in marks for step in range(self.unroll))
        return Turn(*passed, sum(int(mask.sum()) for mask in marks), steps, len(batches))

    # ---- what can be asked ----

    def probe(self, variant: dict[str, Any], hopeless: float) -> dict[str, Any]:
        """Slots a second of two steps after one to warm up; of the first where that is hopelessly slow."""
        gc.collect()
        torch.compiler.reset()
        trainer, batches = self.trainer(Variant(**variant))
        turn = self.epoch(trainer, batches[:1])
        if variant["compiled"] or turn.slots / turn.seconds > hopeless:
            turn = self.epoch(trainer, batches[1:3] or batches[:1])
        return {"slots_per_second": turn.slots / turn.seconds}

    def choose(self, variant: dict[str, Any]) -> dict[str, Any]:
        """Keep a trainer ready for turns."""
        trainer, batches = self.held[Variant(**variant).name] = self.trainer(Variant(**variant))
        self.epoch(trainer, batches[:1])
        rows = sum(batch["loss_mask"].shape[1] for batch in batches)
        trained = [name for name, value in trainer.model.named_parameters() if value.requires_grad]
        return {"padding": sum(int((batch["document_ids"] < 0).sum()) for batch in batches) / rows, "trained": trained}

    def turn(self, name: str) -> dict[str, Any]:
        return asdict(self.epoch(*self.held[name]))

    @torch.no_grad()
    def check(self) -> dict[str, Any]:
        """Mean loss of each step on the chosen conversation with our slots as its mask, and with the mask that it is trained with."""
        from speculators.models.eagle3.data import shift_batch
        from speculators.train.data import ArrowDataset, CollateFn

        model, settings = self.make(Variant())
        call = model.get_trainer_kwargs(**settings)[0]
        data = ArrowDataset(8192, self.folder / "data", on_missing="raise", hidden_states_dtype=torch.float32)
        item = data[self.chosen]
        marks = load_file(self.folder / "marks.safetensors")["marks"]
        collate = CollateFn(len(item["input_ids"]) - 1, model.hidden_size, dtype=torch.float32, preprocess=shift_batch)

        def losses(mask: Tensor) -> list[float]:
            batch = collate([{**item, "loss_mask": mask.long()}])
            metrics = model(**batch, **call)[2]
            return [float(metrics[f"loss_{step}_sum"]) for step in range(self.unroll)]

        own = item["loss_mask"]
        return {
            "our_slots": [losses(mask)[step] for step, mask in enumerate(marks)],
            "own_slots": losses(own),
            "own_slots_by_step": [int(own[1 + step :].sum()) for step in range(self.unroll)],
        }

    def versions(self) -> dict[str, str]:
        return {name: version(name) for name in ("speculators", "torch", "transformers")} | {"python": platform.python_version()}


class Held(list):
    """Batches in memory where their Trainer wants a loader."""

    batch_sampler = None


def hide_what_cannot_load() -> None:
    """torchvision and torchaudio, where built for another torch: transformers imports what it finds, speculators needs neither."""
    for name in ("torchvision", "torchaudio"):
        try:
            import_module(name)
        except (ImportError, OSError, RuntimeError):
            for part in [part for part in sys.modules if part.split(".")[0] == name]:
                del sys.modules[part]
            sys.modules[name] = None  # type: ignore[assignment]  # how Python is told that there is none


def serve(folder: Path, directory: str, unroll: int, chosen: int) -> None:
    """Answer questions from the standard input; whatever libraries print goes to the standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(THREADS)
    warnings.filterwarnings("ignore")
    hide_what_cannot_load()
    theirs = Theirs(folder, directory, unroll, chosen)
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            told = getattr(theirs, asked.pop("do"))(**asked)
        except Exception as error:  # what it cannot do here is a finding
            told = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        print(json.dumps(told), file=answers, flush=True)


# ---- the two together ----


class Child:
    """The other interpreter, waiting for questions."""

    def __init__(self, python: str, *arguments: str) -> None:
        environment = {**os.environ, "LOGURU_LEVEL": "ERROR", "OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1"}
        command = [python, __file__, "--theirs", *arguments]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def ask(self, do: str, **given: Any) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"do": do, **given}) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            recipe = "\n".join(line for line in (__doc__ or "").splitlines() if "VENV" in line and "--shards" not in line)
            raise SystemExit(f"speculators' side ended, its message is above; to make a venv for it:\n{recipe}")
        return json.loads(line)

    def must(self, do: str, **given: Any) -> dict[str, Any]:
        told = self.ask(do, **given)
        if "error" in told:
            raise SystemExit(f"speculators' side failed to {do}: {told['error']}")
        return told

    def end(self) -> None:
        with suppress(BrokenPipeError):
            self.process.communicate()


def fastest(child: Child, rows: Sequence[int]) -> tuple[list[Variant], dict[str, Any]]:
    """Of what speculators offers, what is fastest here, one choice after the other; the same compiled, where that works."""
    tried: dict[str, Any] = {}

    def rate(variant: Variant) -> float:
        if variant.name not in tried:
            so_far = max((rate for rate in tried.values() if isinstance(rate, float)), default=0.0)
            told = child.ask("probe", variant=asdict(variant), hopeless=so_far / 3)
            tried[variant.name] = told.get("error") or round(told["slots_per_second"], 2)
            say(f"speculators, {variant.name}: {tried[variant.name]}")
        return tried[variant.name] if isinstance(tried[variant.name], float) else 0.0

    best = Variant(row=rows[0])
    for name, values in {
        "attention": ("sdpa", "eager", "simple_flex_attention"),
        "row": rows,
        "optimizer": ("adamw", "muon"),
        "dtype": ("float32", "bfloat16"),
    }.items():
        best = max((replace(best, **{name: value}) for value in values), key=rate)
    if rate(best) == 0:
        raise SystemExit("speculators could not train in any of these ways")
    compiled = replace(best, compiled=True)
    return [best, compiled] if rate(compiled) else [best], tried


def compare(ours: Ours, child: Child, chosen: Example) -> dict[str, Any]:
    """Mean losses by step on one conversation, theirs with our weights."""
    found, _, counted, outside = ours.losses(chosen)
    told = child.must("check")
    apart = max(abs(one - other) / abs(one) for one, other in zip(found, told["our_slots"]))
    return {
        "kl_by_step_ours": rounded(found),
        "kl_by_step_theirs_on_our_slots": rounded(told["our_slots"]),
        "largest_relative_difference": apart,
        "same": apart < TOLERANCE,
        "kl_by_step_theirs_on_its_slots": rounded(told["own_slots"]),
        "slots_by_step_ours": counted.tolist(),
        "slots_by_step_theirs": told["own_slots_by_step"],
        "slots_that_add_nothing_in_ours": outside,
    }


def rounded(values: Sequence[float], digits: int = 4) -> list[float]:
    return [round(value, digits) for value in values]


def summary(turns: Sequence[Turn]) -> dict[str, Any]:
    return {
        "slots_per_second": rounded([turn.slots / turn.seconds for turn in turns], 1),
        "slot_steps_per_second": rounded([turn.slot_steps / turn.seconds for turn in turns], 1),
        "slots_per_cpu_second": rounded([turn.slots / turn.cpu_seconds for turn in turns], 1),
        "seconds": rounded([turn.seconds for turn in turns], 1),
        "slots": turns[0].slots,
        "slot_steps": turns[0].slot_steps,
        "optimiser_steps": turns[0].steps,
    }


def ratios(ours: Sequence[Turn], theirs: Sequence[Turn], counted: Callable[[Turn], int]) -> dict[str, Any]:
    """Ours over theirs, of all turns and turn by turn."""

    def rate(turns: Sequence[Turn]) -> float:
        return sum(map(counted, turns)) / sum(turn.seconds for turn in turns)

    return {"all": round(rate(ours) / rate(theirs), 2), "by_turn": rounded([rate([a]) / rate([b]) for a, b in zip(ours, theirs)], 2)}


def against(turns: dict[str, list[Turn]], theirs: dict[str, list[Turn]], counted: Callable[[Turn], int]) -> dict[str, Any]:
    return {other: {name: ratios(held, held_there, counted) for name, held in turns.items()} for other, held_there in theirs.items()}


def settings_to_try(settings: TrainSettings) -> dict[str, TrainSettings]:
    every = replace(settings, step_keep=1.0)
    return {"default": settings, "step_keep=1": every, "step_keep=1, sampled_columns=0": replace(every, sampled_columns=0)}


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--python", required=True, help="interpreter of a venv with speculators")
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--target")
    parser.add_argument("--conversations", type=int, default=48)
    parser.add_argument("--longest", type=int, default=512, help="tokens of a conversation")
    parser.add_argument("--rows", type=int, nargs="+", default=[640, 1280], help="lengths of speculators' packed rows to try")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    from eyas import __version__
    from eyas.config import TrainSettings
    from eyas.files.target import target_directory
    from eyas.train.features import shard_examples
    from eyas.train.shards import PATTERN

    torch.set_num_threads(THREADS)
    load = [os.getloadavg()]
    directory = target_directory(options.target)
    settings = replace(TrainSettings(), max_length=options.longest)
    everything = shard_examples(sorted(options.shards.expanduser().glob(PATTERN)), options.longest)
    examples = everything[: options.conversations]
    chosen = next((number for number, example in enumerate(examples) if len(example.tokens) >= 200), 0)
    sides = {name: Ours(directory, examples, everything, one) for name, one in settings_to_try(settings).items()}
    plain = sides["step_keep=1, sampled_columns=0"]
    with tempfile.TemporaryDirectory() as folder:
        hand_over(Path(folder), plain, examples, examples[chosen])
        child = Child(options.python, folder, str(directory), str(settings.unroll_steps), str(chosen))
        try:
            versions = child.must("versions")
            check = compare(plain, child, examples[chosen])
            say(f"losses by step agree within {check['largest_relative_difference']:.1e}")
            variants, tried = fastest(child, options.rows)
            told = {variant.name: child.must("choose", variant=asdict(variant)) for variant in variants}
            turns: dict[str, list[Turn]] = {name: [] for name in [*sides, *told]}
            for number in range(options.rounds):
                for name in turns:
                    turn = sides[name].turn() if name in sides else Turn(**child.must("turn", name=name))
                    turns[name].append(turn)
                    say(f"turn {number + 1}, {name}: {turn.slots / turn.seconds:.1f} slots/s, load {os.getloadavg()[0]:.1f}")
                load.append(os.getloadavg())
        finally:
            child.end()
    if len({turn.slots for held in turns.values() for turn in held}) > 1:
        raise SystemExit("the two did not train the same slots")
    theirs = {name: turns.pop(name) for name in told}
    found = {
        "conversations": len(examples),
        "tokens": sum(len(example.tokens) for example in examples),
        "longest": max(len(example.tokens) for example in examples),
        "unroll_steps": settings.unroll_steps,
        "draft_vocab_size": settings.draft_vocab_size,
        "tokens_per_batch": settings.tokens_per_batch,
        "sampled_columns": settings.sampled_columns,
        "threads": THREADS,
        "ours": {name: summary(held) for name, held in turns.items()},
        "theirs": {name: summary(held) | told[name] for name, held in theirs.items()},
        "times_the_slots": against(turns, theirs, lambda turn: turn.slots),
        "times_the_slot_steps": against(turns, theirs, lambda turn: turn.slot_steps),
        "check": check,
        "tried": tried,
        "versions": {"eyas": __version__, "torch": torch.__version__, "python": platform.python_version(), "theirs": versions},
        "cpu": {"cores": os.cpu_count(), "capability": torch.backends.cpu.get_cpu_capability(), "load_averages": load},
        "differs": DIFFERS,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--theirs"]:
        serve(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
    else:
        main()
