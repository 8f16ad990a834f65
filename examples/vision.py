"""LoRA on small vision nets: train on digits, freeze, adapt to changed digits. ``python examples/vision.py --net cnn``

mlp   scikit-learn's 8 x 8 digits; then the same turned by 90 degrees
cnn   those digits in colour, 32 x 32 x 3; then inverted on patches of scikit-learn's two photographs

LoRA learns on every linear layer but the last, fused by fastlora, and on convolutions, which stay PEFT's own Conv2d
layers; the last layer is frozen. No network. pip install 'fastlora-kernels[demo]'
"""

from __future__ import annotations

import argparse
import copy
import sys
from typing import Any

import numpy as np
import torch
from torch import nn

import fastlora
from fastlora import parameters

SEED = 7
TEST = 360
"""Digits held out."""


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, 1, 8, 8). Scores of the digits (batch, 10)."""
        return self.head(self.body(x))


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(4),
            nn.Flatten(),
        )
        self.body = nn.Sequential(nn.Linear(512, 64), nn.ReLU())
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, 3, 32, 32). Scores of the digits (batch, 10)."""
        return self.head(self.body(self.features(x)))


TARGETS = {"mlp": ["body.1", "body.3"], "cnn": ["features.0", "features.3", "body.0"]}
NETS = {"mlp": Mlp, "cnn": Cnn}


def digits() -> tuple[np.ndarray[Any, Any], torch.Tensor]:
    """Images (1797, 8, 8) from 0 to 1, in a fixed order without meaning, and their labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(SEED).permutation(len(data.target))
    return (data.images[order] / 16).astype(np.float32), torch.from_numpy(data.target[order])


def in_colour(images: np.ndarray[Any, Any], photos: bool) -> torch.Tensor:
    """The digits as (n, 3, 32, 32): coloured on black, or what is under them inverted in patches of photographs."""
    draw = np.random.default_rng(SEED)
    large = np.kron(images, np.ones((1, 4, 4), dtype=np.float32))[:, None]
    if not photos:
        return torch.from_numpy((large * draw.uniform(0.4, 1.0, (len(images), 3, 1, 1))).astype(np.float32))
    from sklearn.datasets import load_sample_images

    pictures = load_sample_images().images
    patches = []
    for i in range(len(images)):
        picture = pictures[i % len(pictures)]
        top, left = draw.integers(picture.shape[0] - 32), draw.integers(picture.shape[1] - 32)
        patches.append(picture[top : top + 32, left : left + 32].transpose(2, 0, 1) / 255)
    return torch.from_numpy(np.abs(np.stack(patches) - large).astype(np.float32))


def tasks(net: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images of the first task and of the shifted one, and the labels of both."""
    images, labels = digits()
    if net == "cnn":
        return in_colour(images, photos=False), in_colour(images, photos=True), labels
    turned = np.ascontiguousarray(np.rot90(images, axes=(1, 2)))
    return torch.from_numpy(images)[:, None], torch.from_numpy(turned)[:, None], labels


def fit(model: nn.Module, x: torch.Tensor, y: torch.Tensor, epochs: int, lr: float) -> None:
    """Trains what learns in ``model`` on all but the last `TEST` images."""
    torch.manual_seed(SEED)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    count = len(x) - TEST
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(count).split(64):
            optimizer.zero_grad(set_to_none=True)
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """On the last `TEST` images."""
    return (model.eval()(x[-TEST:]).argmax(-1) == y[-TEST:]).float().mean().item()


def run(net: str, *, epochs: int = 15, r: int = 8, show: bool = True) -> dict[str, float]:
    """Pretrains, adapts and compares; accuracies and parameters."""
    from peft import LoraConfig, get_peft_model

    first, shifted, labels = tasks(net)
    torch.manual_seed(SEED)
    model = NETS[net]()
    fit(model, first, labels, epochs, 2e-3)
    found = {"first task": accuracy(model, first, labels), "shifted, before": accuracy(model, shifted, labels)}

    probe = copy.deepcopy(model).requires_grad_(False)
    probe.head.requires_grad_(True)
    fit(probe, shifted, labels, epochs, 5e-3)
    found["shifted, linear probe"] = accuracy(probe, shifted, labels)

    adapted: Any = get_peft_model(model, LoraConfig(r=r, lora_alpha=2 * r, target_modules=TARGETS[net]))
    report = fastlora.accelerate(adapted)
    fit(adapted, shifted, labels, epochs, 5e-3)
    found["shifted, LoRA"] = accuracy(adapted, shifted, labels)
    with adapted.disable_adapter():
        found["first task, adapter off"] = accuracy(adapted, first, labels)
    counted = parameters.lines(adapted)
    found["trainable share"] = sum(line.trainable for line in counted) / sum(line.parameters for line in counted)
    if show:
        print(report)
        print(parameters.table(adapted, first[:1]))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=NETS, default="mlp")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--r", type=int, default=8, help="rank of the adapter")
    arguments = parser.parse_args()
    for name, value in run(arguments.net, epochs=arguments.epochs, r=arguments.r).items():
        print(f"{name:<24} {value:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
