"""AdamW with decoupled decay on fp32 masters; the arithmetic is PyTorch's own fused optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from core.config import OptimConfig
from core.params import ParamSpec
from pt_reference.model import to_numpy, to_tensor


class AdamW:
    """Owns the masters, their gradients and m, v.

    Where the model's weights already have the master dtype they *are* the masters; otherwise (bf16, fp16) the model
    holds rounded copies that ``step`` refreshes.
    """

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        specs: Mapping[str, ParamSpec],
        config: OptimConfig,
        dtype: torch.dtype,
    ) -> None:
        self.weights = dict(weights)
        self.masters = {
            name: w if w.dtype == dtype else nn.Parameter(w.detach().to(dtype)) for name, w in weights.items()
        }
        self.gradients: dict[str, Tensor] = {}
        decayed = [name for name in weights if specs[name].decays]
        plain = [name for name in weights if not specs[name].decays]
        groups = [
            {"params": [self.masters[n] for n in decayed], "weight_decay": config.weight_decay},
            {"params": [self.masters[n] for n in plain], "weight_decay": 0.0},
        ]
        betas = (config.beta1, config.beta2)
        self._adamw = torch.optim.AdamW([g for g in groups if g["params"]], betas=betas, eps=config.eps, fused=True)
        self._fresh_state(0)

    @property
    def step_count(self) -> int:
        """Updates made so far; Adam's bias correction depends on it."""
        return int(next(iter(self._adamw.state.values()))["step"].item())

    def accumulate(self) -> None:
        """Move the gradients of the last backward pass into the master-dtype accumulators."""
        for name, weight in self.weights.items():
            if weight.grad is None:
                raise RuntimeError(f"{name} received no gradient")
            grad = weight.grad.to(self.masters[name].dtype)
            held = self.gradients.get(name)
            self.gradients[name] = grad if held is None else held.add_(grad)
            weight.grad = None

    def grad_norm(self) -> float:
        """L2 norm over all accumulated gradients; the parts are summed in float64, each parameter once."""
        squares = [torch.linalg.vector_norm(g).double().square() for g in self.gradients.values()]
        return torch.stack(squares).sum().sqrt().item()

    def step(self, lr: float, grad_scale: float) -> None:
        """One update with gradients times ``grad_scale``; the accumulators are empty afterwards."""
        for group in self._adamw.param_groups:
            group["lr"] = lr
        for name, master in self.masters.items():
            master.grad = self.gradients[name].mul_(grad_scale)
        self._adamw.step()
        for master in self.masters.values():
            master.grad = None
        self.discard()
        self._refresh()

    def discard(self) -> None:
        self.gradients = {}

    def load_masters(self, get: Callable[[str], np.ndarray]) -> None:
        """Masters from ``get(name)``, and from them the weights of the model."""
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(to_tensor(get(name)))
        self._refresh()

    def load_state(self, get: Callable[[str], np.ndarray], step_count: int) -> None:
        """m and v from ``get("m.<name>")`` and ``get("v.<name>")``."""
        self._fresh_state(step_count)
        for name, master in self.masters.items():
            state = self._adamw.state[master]
            state["exp_avg"].copy_(to_tensor(get(f"m.{name}")))
            state["exp_avg_sq"].copy_(to_tensor(get(f"v.{name}")))

    def export_masters(self) -> Iterator[tuple[str, np.ndarray]]:
        for name, master in self.masters.items():
            yield name, to_numpy(master)

    def export_state(self) -> Iterator[tuple[str, np.ndarray]]:
        for letter, key in (("m", "exp_avg"), ("v", "exp_avg_sq")):
            for name, master in self.masters.items():
                yield f"{letter}.{name}", to_numpy(self._adamw.state[master][key])

    def _fresh_state(self, step_count: int) -> None:
        for master in self.masters.values():
            self._adamw.state[master] = {
                "step": torch.tensor(float(step_count), device=master.device),  # where the fused kernel wants it
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
            }

    def _refresh(self) -> None:
        with torch.no_grad():
            for name, master in self.masters.items():
                if master is not self.weights[name]:
                    self.weights[name].copy_(master)
