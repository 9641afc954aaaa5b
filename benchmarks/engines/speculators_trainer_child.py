"""speculators' trainer on conversations it is handed, in its own environment: it answers a line of JSON at a time.

    VENV/bin/python speculators_trainer_child.py FOLDER TARGET UNROLL CHOSEN

FOLDER is what `our_trainer.hand_over` wrote. Imports nothing of eyas; and speculators only once the standard output is kept for answers.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import sys
import warnings
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from turns import THREADS, Clock, Turn, Variant


class Theirs:
    """speculators on the conversations of a folder, one line of JSON asked and answered at a time."""

    def __init__(self, folder: Path, directory: str, unroll: int, chosen: int) -> None:
        from datasets import Dataset, disable_progress_bars

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


def serve(folder: Path, directory: str, unroll: int, chosen: int) -> None:
    """Answer questions from the standard input; whatever libraries print goes to the standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(THREADS)
    warnings.filterwarnings("ignore")
    theirs = Theirs(folder, directory, unroll, chosen)
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            told = getattr(theirs, asked.pop("do"))(**asked)
        except Exception as error:  # what it cannot do here is a finding
            told = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        print(json.dumps(told), file=answers, flush=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
