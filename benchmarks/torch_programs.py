"""What PyTorch does of the benchmarks, in .venv-bench; see processes.py.

The layer runs on a GPU if there is one. On a CPU, PyTorch is at its best: denormal numbers are
flushed (its backward pass is many times slower without), padded batches (packed sequences are
slower), Adam fused, tables by sparse gradients.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.processes import answer_requests, peak_megabytes

torch.set_flush_denormal(True)
BASE_MEGABYTES = peak_megabytes()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _wait() -> None:
    """Waits until a GPU has computed what was asked of it."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


class Layer:
    """`torch.nn.LSTM` on weights and inputs from a file."""

    def load(self, path: str) -> str:
        held = np.load(path)
        self._inputs = torch.tensor(held["inputs"], device=DEVICE, requires_grad=True)
        units = held["recurrent"].shape[0]
        self._lstm = torch.nn.LSTM(self._inputs.shape[2], units, batch_first=True, device=DEVICE)
        with torch.no_grad():
            self._lstm.weight_ih_l0.copy_(torch.tensor(held["kernel"].T))
            self._lstm.weight_hh_l0.copy_(torch.tensor(held["recurrent"].T))
            self._lstm.bias_ih_l0.copy_(torch.tensor(held["bias"]))
            self._lstm.bias_hh_l0.zero_()
        return torch.__version__

    def device(self) -> str:
        return DEVICE

    def _step(self) -> list[torch.Tensor]:
        outputs, _ = self._lstm(self._inputs)
        (outputs * outputs).sum().backward()
        gradients = [
            self._inputs.grad,
            self._lstm.weight_ih_l0.grad.T,
            self._lstm.weight_hh_l0.grad.T,
            self._lstm.bias_ih_l0.grad,
        ]
        self._lstm.zero_grad(set_to_none=True)
        self._inputs.grad = None
        return [outputs.detach(), *gradients]

    def results(self, path: str) -> None:
        np.savez(path, *(tensor.cpu().numpy() for tensor in self._step()))

    def seconds(self) -> float:
        began = time.perf_counter()
        self._step()
        _wait()
        return time.perf_counter() - began

    def inference_seconds(self) -> float:
        began = time.perf_counter()
        with torch.inference_mode():
            self._lstm(self._inputs)
        _wait()
        return time.perf_counter() - began


class Autoencoder(torch.nn.Module):
    """The sequence autoencoder with a sampled softmax, and its training step."""

    def __init__(self, vocab: int, dim: int, units: int, sampled: int, clip: float):
        super().__init__()
        self.embed = torch.nn.Embedding(vocab, dim, sparse=True)
        self.lstm = torch.nn.LSTM(dim, units, batch_first=True)
        self.kernel = torch.nn.Embedding(vocab, units, sparse=True)
        self.bias = torch.nn.Embedding(vocab, 1, sparse=True)
        with torch.no_grad():
            self.bias.weight.zero_()
            self.kernel.weight.mul_(0.02)
        self.sampled, self.clip = sampled, clip
        ids = torch.arange(vocab, dtype=torch.float64)
        self._probability = torch.log1p(1 / (ids + 1)) / np.log(vocab + 1)
        self._log_expected = torch.log(self._probability * sampled).float()
        tables = [self.embed.weight, self.kernel.weight, self.bias.weight]
        self._tables = tables
        self._dense = list(self.lstm.parameters())
        self._optimizers = [
            torch.optim.SparseAdam(tables, lr=1e-3),
            torch.optim.Adam(self._dense, lr=1e-3, fused=True),
        ]

    def loss(self, tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        embedded = self.embed(tokens)
        mask = torch.arange(tokens.shape[1])[None] < lengths[:, None]
        # The state is the one after the padding: PyTorch has no cheap way to the one before it, and
        # so pays nothing for what the others do right.
        _, (h, c) = self.lstm(embedded)
        written, _ = self.lstm(embedded[:, :-1], (h, c))
        last = h[0]
        outputs = torch.cat([last[:, None], written], 1)[mask]
        targets = tokens[mask]
        uniform = torch.rand(self.sampled, dtype=torch.float64)
        vocab = self.embed.num_embeddings
        candidates = (torch.exp(uniform * np.log(vocab + 1)) - 1).long().clamp(max=vocab - 1)
        target = (outputs * self.kernel(targets)).sum(1) + self.bias(targets)[:, 0]
        logits = outputs @ self.kernel(candidates).T + self.bias(candidates)[:, 0]
        logits = logits - self._log_expected[candidates]
        logits = logits.masked_fill(targets[:, None] == candidates, -1e30)
        logits = torch.cat([target[:, None], logits], 1)
        return (torch.logsumexp(logits, 1) - target).mean()

    def step(self, tokens: torch.Tensor, lengths: torch.Tensor) -> float:
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss = self.loss(tokens, lengths)
        loss.backward()
        for table in self._tables:
            table.grad = table.grad.coalesce()
        values = [t.grad._values() for t in self._tables] + [p.grad for p in self._dense]
        norm = torch.sqrt(sum((v * v).sum() for v in values))
        scale = torch.clamp(self.clip / norm, max=1.0)
        for value in values:
            value.mul_(scale)
        for optimizer in self._optimizers:
            optimizer.step()
        return float(loss.detach())


class TrainStep:
    """Steps of `Autoencoder` on batches from a file."""

    def load(self, path: str, vocab: int, dim: int, units: int, sampled: int) -> str:
        held = np.load(path)
        count = len(held.files) // 2
        self._batches = [
            (torch.tensor(held[f"tokens_{i}"]).long(), torch.tensor(held[f"lengths_{i}"]).long())
            for i in range(count)
        ]
        self._model = Autoencoder(vocab, dim, units, sampled, clip=1.0)
        self._next = 0
        return torch.__version__

    def step(self) -> list[float]:
        """Returns the seconds of a step, its real tokens and its loss."""
        tokens, lengths = self._batches[self._next % len(self._batches)]
        self._next += 1
        began = time.perf_counter()
        loss = self._model.step(tokens, lengths)
        return [time.perf_counter() - began, int(lengths.sum()), loss]

    def memory(self) -> float:
        return peak_megabytes()

    def base_memory(self) -> float:
        return BASE_MEGABYTES


if __name__ == "__main__":
    assert Path("benchmarks").is_dir(), "run it from the repository's root"
    served = {"layer": Layer, "train_step": TrainStep}[sys.argv[1]]()
    names = [name for name in dir(served) if not name.startswith("_")]
    answer_requests({name: getattr(served, name) for name in names})
