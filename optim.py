"""What an update does to the weights: Muon and AdamW, the learning rate of each step, and which weights are frozen."""

import torch
from torch import Tensor, nn

from config import TrainConfig


class Muon(torch.optim.Optimizer):
    """Momentum that makes each update matrix nearly orthogonal (Jordan et al. 2024), like `torch.optim.Muon`.

    torch's always iterates in bf16, ours in `dtype`: in bf16, a CPU without bf16 instructions is 40 times slower.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, weight_decay: float, dtype: torch.dtype):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay))
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        """One update of every matrix that has a gradient, those of a shape together: few large products for a GPU."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)).lerp_(p.grad, 0.05)
                    shapes.setdefault(p.shape, []).append(p)
            for shape, params in shapes.items():
                moved = [p.grad.lerp(self.state[p]["momentum_buffer"], 0.95) for p in params]  # Nesterov momentum
                updates = orthogonal(torch.stack(moved).to(self.dtype))
                for p, update in zip(params, updates):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-group["lr"] * max(1, shape[0] / shape[1]) ** 0.5)


def orthogonal(x: Tensor) -> Tensor:  # [B, N, M] -> [B, N, M]
    """Five Newton-Schulz steps with the coefficients of Jordan et al.: all singular values move to 0.7 ... 1.2."""
    wide = x if x.shape[1] <= x.shape[2] else x.mT
    wide = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = wide @ wide.mT
        wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315), wide, beta=3.4445)
    return wide if x.shape[1] <= x.shape[2] else wide.mT


def make_optimizers(model: nn.Module, cfg: TrainConfig, muon_dtype: torch.dtype) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the matrices of the blocks and AdamW for the rest.

    They hold all parameters from step 0: a frozen one has no gradient and is skipped. Only matrices decay. The
    embedding has its own rate: few tokens of a batch give a gradient to any of its rows. AlexaTM 20B: Adam, weight
    decay 0.1; betas, eps, clipping and rates are ours.
    """
    muon = {n: p for n, p in model.named_parameters() if cfg.optimizer == "muon" and ".blocks." in n and p.ndim == 2}
    rest = {n: p for n, p in model.named_parameters() if n not in muon and n != "embed.weight"}
    groups = [
        {"params": [model.embed.weight], "lr": cfg.embed_lr, "weight_decay": cfg.weight_decay},
        {"params": [p for p in rest.values() if p.ndim >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in rest.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, cfg.lr, (0.9, 0.98), eps=1e-6, fused=True)]
    if muon:
        optimizers.append(Muon(list(muon.values()), cfg.muon_lr, cfg.weight_decay, muon_dtype))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def rate(step: int, cfg: TrainConfig) -> float:
    """Learning rate of a step as a share of its peak: a linear rise, later a linear fall to 5 % at the last step.

    The fall begins at 80 % of the steps (wsd: warmup, stable, decay; Hu et al. 2024), or at once (linear).
    """
    rise = cfg.warmup * cfg.begun_steps
    if step < rise:
        return (step + 1) / (rise + 1)
    fall = max(rise, 0.8 * cfg.steps) if cfg.schedule == "wsd" else rise
    return 1 - 0.95 * max(0, step - fall) / max(1, cfg.steps - 1 - fall)


def freeze_encoder(model: nn.Module, frozen: bool) -> None:
    """Freezes or thaws encoder and shared embedding. Frozen, they get no gradient and no dropout."""
    for part in (model.embed, model.encoder):
        part.requires_grad_(not frozen)
        part.train(not frozen)
