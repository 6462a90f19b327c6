"""Trains the demo model: `python -m benchmarks.demo_model.train OUT.pt [--steps N] [--resume]`.

One thread, a fixed seed and a schedule by steps. Muon for the matrices of attention and
experts, AdamW for the rest; MXFP4 rounding of the experts in the last fifth.
"""

import argparse
import math
import os
import time
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F

from benchmarks.demo_model import render
from benchmarks.demo_model.dialogues import draw_dialogue, draw_setting
from benchmarks.demo_model.model import Batch, DemoModel

SEED = 20261121
PREFIXES, DIALOGUES = 24, 64  # drawn at a time; dialogues are counted per prefix
CHUNK, CHUNKS = 8, 3  # a batch is CHUNKS groups of CHUNK dialogues of similar length
PEAK_RATE, WARM_UP, FLAT, LAST_RATE = 5e-3, 60, 0.3, 0.01
QUANTISE_FROM = 0.8
BALANCE = 0.01  # weight of the loss that keeps all experts in use
MUON = ("q", "k", "v", "o", "gate", "up", "down")


class Batches:
    """An endless stream of batches, the same for the same seed."""

    def __init__(self, vocabulary: list[int], seed: int):
        self.rng = Random(seed)
        self.index = {token: i for i, token in enumerate(vocabulary)}
        self.pool: list[tuple[list[int], list[tuple[list[int], list[bool]]]]] = []

    def compact(self, ids: list[int]) -> list[int]:
        """Rows of the tokens; the unknown row is the last."""
        return [self.index.get(token, len(self.index)) for token in ids]

    def refill(self) -> None:
        """Draws groups of dialogues that share a prefix, and shuffles groups of like length."""
        groups = []
        for _ in range(PREFIXES):
            setting = draw_setting(self.rng)
            prefix = self.compact(render.prefix_ids(setting))
            drawn = []
            for _ in range(DIALOGUES):
                ids, learned = render.dialogue_ids(draw_dialogue(self.rng, setting), self.rng)
                drawn.append((self.compact(ids), learned))
            drawn.sort(key=lambda pair: len(pair[0]))
            groups += [(prefix, drawn[i : i + CHUNK]) for i in range(0, DIALOGUES, CHUNK)]
        groups.sort(key=lambda group: len(group[1][-1][0]))
        batches = [groups[i : i + CHUNKS] for i in range(0, len(groups), CHUNKS)]
        self.rng.shuffle(batches)
        self.pool = batches

    def next(self) -> Batch:
        """The next batch."""
        if not self.pool:
            self.refill()
        return make_batch(self.pool.pop())


def make_batch(groups: list[tuple[list[int], list[tuple[list[int], list[bool]]]]]) -> Batch:
    """Pads prefixes and dialogues into tensors; labels are shifted by one."""
    rows = [pair for _, dialogues in groups for pair in dialogues]
    prefix_of = [i for i, (_, dialogues) in enumerate(groups) for _ in dialogues]
    width = round_up(max(len(p) for p, _ in groups), 32)
    length = round_up(max(len(ids) for ids, _ in rows), 8)
    labels = torch.full((len(rows), length), -1)
    for row, (ids, learned) in enumerate(rows):
        targets = [token if wanted else -1 for token, wanted in zip(ids, learned, strict=True)][1:]
        labels[row, : len(targets)] = torch.tensor(targets)
    return Batch(
        prefixes=torch.tensor([p + [0] * (width - len(p)) for p, _ in groups]),
        prefix_lengths=torch.tensor([len(p) for p, _ in groups]),
        tokens=torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in rows]),
        lengths=torch.tensor([len(ids) for ids, _ in rows]),
        prefix_of=torch.tensor(prefix_of),
        labels=labels,
    )


def round_up(length: int, multiple: int) -> int:
    """Few different shapes: the library compiles a kernel for each new one."""
    return -(-length // multiple) * multiple


class Muon:
    """Momentum made orthogonal by five Newton-Schulz steps (Jordan et al., 2024)."""

    def __init__(self, parameters: list[torch.nn.Parameter]):
        self.momentum = {p: torch.zeros_like(p) for p in parameters}
        self.groups: dict[tuple[int, int], list[torch.nn.Parameter]] = {}
        for p in parameters:
            rows, columns = p.shape[-2:]
            self.groups.setdefault((min(rows, columns), max(rows, columns)), []).append(p)

    @torch.no_grad()
    def step(self, rate: float, *, beta: float = 0.95, decay: float = 0.05) -> None:
        """Updates every matrix; matrices of one shape are orthogonalised together."""
        for (small, large), parameters in self.groups.items():
            updates = []
            for p in parameters:
                momentum = self.momentum[p].lerp_(p.grad, 1 - beta)
                update = p.grad.lerp(momentum, beta).reshape(-1, *p.shape[-2:])
                updates.append(update if p.shape[-2] == small else update.mT)
            whole = orthogonal(torch.cat(updates))
            for p, update in zip(parameters, whole.split([len(u) for u in updates]), strict=True):
                update = update if p.shape[-2] == small else update.mT
                p.mul_(1 - rate * decay)
                p.add_(update.reshape(p.shape), alpha=-rate * 0.2 * large**0.5)
                p.grad = None


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """Nearest semi-orthogonal matrices (N, rows <= columns), roughly, in bfloat16."""
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-9)).bfloat16()
    for _ in range(5):
        a = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.float()


def rate_at(step: int, steps: int) -> float:
    """Learning rate: warm-up, flat, then a cosine down to LAST_RATE of the peak."""
    done = max(0.0, (step / steps - FLAT) / (1 - FLAT))
    cosine = LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * done))
    return PEAK_RATE * min(1.0, (step + 1) / WARM_UP) * cosine


class Trainer:
    """The model, its optimisers and the number of steps done: all that a resumed run needs."""

    def __init__(self, vocabulary: list[int]):
        self.vocabulary = vocabulary
        self.model = DemoModel(len(vocabulary))
        named = dict(self.model.named_parameters())
        matrices = [p for name, p in named.items() if name.split(".")[-1] in MUON]
        rest = [p for name, p in named.items() if name.split(".")[-1] not in MUON]
        self.muon = Muon(matrices)
        self.adam = torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
        self.done = 0

    @classmethod
    def load(cls, path: Path) -> "Trainer":
        """Go on from a saved file."""
        saved = torch.load(path)
        trainer = cls(saved["vocabulary"])
        trainer.model.load_state_dict(saved["model"])
        trainer.adam.load_state_dict(saved["adam"])
        trainer.muon.momentum = dict(zip(trainer.muon.momentum, saved["muon"], strict=True))
        trainer.done = saved["step"]
        return trainer

    def save(self, path: Path) -> None:
        """Write everything, whole or not at all."""
        state = {
            "model": self.model.state_dict(),
            "adam": self.adam.state_dict(),
            "muon": list(self.muon.momentum.values()),
            "vocabulary": self.vocabulary,
            "step": self.done,
        }
        torch.save(state, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    def step(self, batch: Batch, steps: int) -> tuple[float, float]:
        """One update; returns the loss and the share of learned tokens predicted right."""
        rate = rate_at(self.done, steps)
        self.adam.param_groups[0]["lr"] = rate
        self.model.quantise = self.done >= QUANTISE_FROM * steps
        balance: list[torch.Tensor] = []
        hidden = self.model(batch, balance)
        learned = batch.labels >= 0
        logits, labels = self.model.logits(hidden[learned]), batch.labels[learned]
        loss = F.cross_entropy(logits, labels)
        (loss + BALANCE * sum(balance)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.muon.step(rate)
        self.adam.step()
        self.adam.zero_grad()
        self.done += 1
        return loss.item(), (logits.argmax(-1) == labels).float().mean().item()


def train(out: Path, steps: int, *, resume: bool) -> None:
    """Trains up to `steps` steps; saves every 200, prints every 50."""
    torch.manual_seed(SEED)
    trainer = Trainer.load(out) if resume else Trainer(render.trained_vocabulary())
    first = trainer.done
    batches = Batches(trainer.vocabulary, SEED + first)
    began, cpu, history = time.time(), time.process_time(), []
    while trainer.done < steps:
        history.append(trainer.step(batches.next(), steps))
        done = trainer.done
        if done % 50 == 0:
            loss, right = (sum(column) / len(history) for column in zip(*history, strict=True))
            used = (time.process_time() - cpu) / (done - first)
            print(
                f"{done} {time.time() - began:.0f} s, {used:.3f} cpu s a step, "
                f"loss {loss:.4f}, right {right:.4f}",
                flush=True,
            )
            history = []
        if done % 200 == 0 or done == steps:
            trainer.save(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    train(arguments.out, arguments.steps, resume=arguments.resume)
