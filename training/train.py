"""Train the demo model; the same command resumes from the saved state.

    OMP_WAIT_POLICY=PASSIVE ONEDNN_PRIMITIVE_CACHE_CAPACITY=8192 \\
        python -m training.train --data DIR --state DIR --steps 3000

The state (weights, optimiser, step, random state) is written every `--save-minutes` and on SIGTERM or SIGINT. The
learning rate is constant after the warm-up and falls linearly to zero over the last `--decay` part of the steps; a
number written into `STATE/steps` while training runs replaces `--steps`, so that the decay can be moved.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from training.config import CONTEXT, MODEL_CONFIG
from training.model import Model
from training.texts import DOMAINS

GATE_LR = 0.3  # the router's part of the learning rate: a slower router lets the balancing bias follow


def orthogonalise(update: Tensor, iterations: int = 5) -> Tensor:
    """Newton-Schulz iteration of Muon in BF16 for stacked matrices [G, M, N] with M <= N (Jordan et al., 2024)."""
    x = update.to(torch.bfloat16)
    x = x / (x.float().norm(dim=(1, 2), keepdim=True) + 1e-7).to(torch.bfloat16)
    for _ in range(iterations):
        square = torch.bmm(x, x.mT)
        inner = torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, inner, x, beta=3.4445)
    return x


class Muon:
    """Muon for hidden matrices, with Moonlight's update size 0.2 * sqrt(max(M, N)) (arXiv:2502.16982)."""

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float, momentum: float = 0.95) -> None:
        self.parameters, self.decay, self.momentum = parameters, decay, momentum
        self.buffers = {name: torch.zeros_like(value) for name, value in parameters.items()}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One step; matrices of one shape are orthogonalised together."""
        groups: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for name, parameter in self.parameters.items():
            assert parameter.grad is not None
            buffer = self.buffers[name].lerp_(parameter.grad, 1 - self.momentum)
            update = parameter.grad.lerp(buffer, self.momentum)
            rows, columns = parameter.shape[-2:]
            if name.endswith("gate_up"):
                rows //= 2
            value, update = parameter.view(-1, rows, columns), update.view(-1, rows, columns)
            if rows > columns:
                value, update = value.mT, update.mT
            groups[(value.shape[1], value.shape[2])].append((value, update))
        for (_, larger), members in groups.items():
            updates = orthogonalise(torch.cat([update for _, update in members])).float()
            start = 0
            for value, update in members:
                value.mul_(1 - lr * self.decay)
                value.sub_(updates[start : start + len(update)], alpha=lr * 0.2 * math.sqrt(larger))
                start += len(update)


class Schedule:
    """Warm-up, constant, linear decay."""

    def __init__(self, warmup: int, decay: float) -> None:
        self.warmup, self.decay = warmup, decay

    def factor(self, step: int, steps: int) -> float:
        """Part of the peak learning rate at this step."""
        return min(1.0, (step + 1) / self.warmup, (steps - step) / max(self.decay * steps, 1))

    def decaying(self, step: int, steps: int) -> bool:
        """True within the final decay."""
        return steps - step < self.decay * steps


def batch_of(rows: np.ndarray, step: int, size: int, seed: int) -> Tensor:
    """Rows [B, CONTEXT + 2] of a step; every epoch permutes triples, so that the domains stay balanced."""
    triples, per_step = len(rows) // len(DOMAINS), size // len(DOMAINS)
    steps = triples // per_step
    order = np.random.default_rng(seed + step // steps).permutation(triples)
    chosen = order[(step % steps) * per_step :][:per_step]
    index = (chosen[:, None] * len(DOMAINS) + np.arange(len(DOMAINS))).reshape(-1)
    return torch.from_numpy(rows[index].astype(np.int64))


@torch.no_grad()
def evaluate(model: Model, data: Path, rows: int) -> dict[str, list[float]]:
    """Held-out [main, MTP] loss per domain on the first rows."""
    result: dict[str, list[float]] = {}
    loads = [layer.load.clone() for layer in model.moe_layers()]
    for name in DOMAINS:
        stream = np.load(data / f"heldout-{name}.npy").astype(np.int64)
        stream = stream[: (min(rows, (len(stream) - 2) // CONTEXT)) * CONTEXT + 2]
        packed = torch.from_numpy(stream).unfold(0, CONTEXT + 2, CONTEXT)
        result[name] = [round(value.item(), 4) for value in model.losses(packed)]
    for layer, load in zip(model.moe_layers(), loads, strict=True):
        layer.load.copy_(load)
    return result


def save_state(path: Path, content: dict[str, Any]) -> None:
    """Write beside and rename."""
    torch.save(content, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument(
        "--rows", type=int, default=12, help=f"rows of {CONTEXT} tokens per step, a multiple of 3"
    )
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument(
        "--decay", type=float, default=0.4, help="part of the steps with falling learning rate"
    )
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--bias-rate", type=float, default=1e-3, help="step of the routing bias per batch")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save-minutes", type=float, default=10)
    parser.add_argument("--eval-minutes", type=float, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(args.seed)
    args.state.mkdir(parents=True, exist_ok=True)
    rows = np.load(args.data / "train.npy", mmap_mode="r")
    model = Model(MODEL_CONFIG)
    named = dict(model.named_parameters())
    adam_names = [name for name, value in named.items() if value.dim() == 1 or "gate.weight" in name]
    adam_names += ["embed_tokens", "lm_head"]
    muon = Muon({name: value for name, value in named.items() if name not in adam_names}, args.weight_decay)
    groups = [
        {"params": [named["embed_tokens"], named["lm_head"]], "weight_decay": args.weight_decay},
        {"params": [named[name] for name in adam_names if named[name].dim() == 1], "weight_decay": 0.0},
    ]
    groups += [{"params": [named[name] for name in adam_names if "gate.weight" in name], "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
    schedule = Schedule(args.warmup, args.decay)
    state_file, step = args.state / "state.pt", 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        adam.load_state_dict(state["adam"])
        muon.buffers = state["muon"]
        torch.set_rng_state(state["rng"])
        step = state["step"]
    stop: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _frame: stop.append(received))

    def save() -> None:
        content = {"model": model.state_dict(), "adam": adam.state_dict(), "muon": muon.buffers, "step": step}
        save_state(
            state_file, {**content, "rng": torch.get_rng_state(), "tokens": step * args.rows * CONTEXT}
        )

    log = (args.state / "log.jsonl").open("a", encoding="utf-8")
    saved = evaluated = time.monotonic()
    while True:
        planned = args.state / "steps"
        steps = int(planned.read_text()) if planned.exists() else args.steps
        if step >= steps or stop:
            break
        began = time.monotonic()
        lr = args.lr * schedule.factor(step, steps)
        main_loss, mtp_loss = model.losses(batch_of(rows, step, args.rows, args.seed))
        (main_loss + (0.1 if schedule.decaying(step, steps) else 0.3) * mtp_loss).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group, scale in zip(adam.param_groups, (1.0, 1.0, GATE_LR), strict=True):
            group["lr"] = lr * scale
        adam.step()
        between = time.monotonic()
        muon.step(lr)
        muon_seconds = time.monotonic() - between
        model.zero_grad(set_to_none=True)
        bias_rate = args.bias_rate * max(1.0, 20 * (1 - step / 500))  # faster while the router forms
        skew = []
        for layer in model.moe_layers():
            mean = layer.load.mean()
            skew.append(round((layer.load.max() / mean).item(), 2))
            layer.gate.bias += bias_rate * torch.sign(mean - layer.load)
            layer.load.zero_()
        step += 1
        seconds = time.monotonic() - began
        record: dict[str, Any] = {
            "step": step,
            "loss": round(main_loss.item(), 4),
            "mtp": round(mtp_loss.item(), 4),
        }
        record |= {
            "lr": round(lr, 6),
            "norm": round(norm.item(), 3),
            "tok_s": round(args.rows * CONTEXT / seconds),
        }
        record |= {"muon_s": round(muon_seconds, 3), "skew": skew, "time": round(time.time())}
        if time.monotonic() - evaluated > 60 * args.eval_minutes:
            record["heldout"], evaluated = evaluate(model, args.data, 12), time.monotonic()
        log.write(json.dumps(record) + "\n")
        log.flush()
        if time.monotonic() - saved > 60 * args.save_minutes:
            save()
            saved = time.monotonic()
    save()
    print(f"step {step}", flush=True)


if __name__ == "__main__":
    main()
