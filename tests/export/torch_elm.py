"""The reference's model put together in PyTorch, from a state dict with its names: for comparison with ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

State = dict[str, torch.Tensor]
HEAD_DIM = 64


class LinearProjection(torch.nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.projection = torch.nn.Linear(inputs, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.projection(x)


class MlpProjection(torch.nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        layers = torch.nn.Linear(inputs, outputs), torch.nn.GELU(), torch.nn.Linear(outputs, outputs)
        self.projection = torch.nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.projection(x)


class PatchProjection(LinearProjection):
    """Signals (B, C, L) as N patches in time, flattened lead by lead."""

    def __init__(self, inputs: int, outputs: int, tokens: int) -> None:
        super().__init__(inputs, outputs)
        self.tokens = tokens

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(patches(x, self.tokens).flatten(2))


class ConvProjection(torch.nn.Module):
    def __init__(self, leads: int, outputs: int, tokens: int) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv1d(leads, 64, 3, padding=1)
        self.conv2 = torch.nn.Conv1d(64, 128, 7, padding=3)
        self.fc, self.tokens = torch.nn.Linear(128, outputs), tokens

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        each = patches(x, self.tokens)
        y = F.relu(self.conv2(F.relu(self.conv1(each.flatten(0, 1)))))
        return self.fc(y.mean(-1)).reshape(*each.shape[:2], -1)


def patches(x: torch.Tensor, tokens: int) -> torch.Tensor:
    """(B, C, L) -> (B, N, C, P)."""
    return x.reshape(x.shape[0], x.shape[1], tokens, -1).transpose(1, 2)


def st_mem(state: State, x: torch.Tensor, heads: int, tokens: int) -> torch.Tensor:
    """ST-MEM's embeddings (B, N, D) of signals (B, C, L), from the encoder's part of a state dict."""

    def norm(name: str, y: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(y, y.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    def linear(name: str, y: torch.Tensor) -> torch.Tensor:
        return F.linear(y, state[f"{name}.weight"], state[f"{name}.bias"])

    size = state["encoder.to_patch_embedding.1.weight"].shape[0]
    y = norm("encoder.to_patch_embedding.1", x.unflatten(-1, (-1, size)))
    y = norm("encoder.to_patch_embedding.3", linear("encoder.to_patch_embedding.2", y))
    positions, (rows, leads) = state["encoder.pos_embedding"], y.shape[:2]
    y = y + positions[:, None, 1:-1]
    separator = state["encoder.sep_embedding"].expand(rows, leads, 1, -1)
    y = torch.cat([separator + positions[:, None, :1], y, separator + positions[:, None, -1:]], 2)
    names = torch.stack([state[f"encoder.lead_embeddings.{lead}"] for lead in range(leads)])
    y = (y + names[None, :, None]).flatten(1, 2)
    block = 0
    while f"encoder.block{block}.attn.norm.weight" in state:
        name = f"encoder.block{block}"
        fused = linear(f"{name}.attn.fn.to_qkv", norm(f"{name}.attn.norm", y))
        q, k, v = (part.unflatten(-1, (heads, HEAD_DIM)).transpose(1, 2) for part in fused.chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        y = y + linear(f"{name}.attn.fn.to_out.0", attended)
        inner = F.gelu(linear(f"{name}.ff.fn.net.0", norm(f"{name}.ff.norm", y)))
        y = y + linear(f"{name}.ff.fn.net.3", inner)
        block += 1
    y = norm("encoder.norm", y).unflatten(1, (leads, -1))[:, :, 1:-1].flatten(1, 2)
    return F.adaptive_avg_pool1d(y.transpose(1, 2), tokens).transpose(1, 2)


class TorchElm:
    """A model of `state` (as in elm.pt) around the LLM of a Hugging Face configuration."""

    def __init__(self, folder: Path, elm: str, state: State, tokens: int, heads: int) -> None:
        self.elm, self.tokens, self.heads = elm, tokens, heads
        prefix = "llm." if elm == "ecg_byte" else "llm.llm."
        llm = {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}
        config = AutoConfig.from_pretrained(folder / "config.json")
        config.vocab_size = llm["lm_head.weight"].shape[0]
        self.llm = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        self.llm.load_state_dict(llm, strict=True)
        self.encoder = {n.removeprefix("encoder."): x for n, x in state.items() if n.startswith("encoder.")}
        self.connector = self._connector(state)
        left = {n for n in state if not n.startswith((prefix, "encoder.", "projection.", "project_layer."))}
        assert not left, left

    def _connector(self, state: State) -> torch.nn.Module | None:
        own = {n.split(".", 1)[1]: x for n, x in state.items() if n.startswith(("projection.", "project_layer."))}
        width = self.llm.config.hidden_size
        if self.elm == "ecg_byte":
            assert not own
            return None
        if self.elm == "conv_elf":
            module: torch.nn.Module = ConvProjection(own["conv1.weight"].shape[1], width, self.tokens)
        elif self.elm in ("base_elf", "patch_elf"):
            module = PatchProjection(own["projection.weight"].shape[1], width, self.tokens)
        elif self.elm == "mlp_llava":
            module = MlpProjection(own["projection.0.weight"].shape[1], width)
        else:
            module = LinearProjection(own["projection.weight"].shape[1], width)
        module.load_state_dict(own, strict=True)
        return module

    @torch.no_grad()
    def inputs(self, ids: np.ndarray, places: np.ndarray | None, signals: np.ndarray | None) -> torch.Tensor:
        """Embeddings (B, T, D) of the ids, with the signal's where `places` (B, N) says."""
        x = self.llm.get_input_embeddings()(torch.from_numpy(ids))
        if self.connector is None or places is None or signals is None:
            return x
        ecg = torch.from_numpy(np.asarray(signals, np.float32))
        features = st_mem(self.encoder, ecg, self.heads, self.tokens) if self.encoder else ecg
        return x.scatter(1, torch.from_numpy(places)[..., None].expand(-1, -1, x.shape[-1]), self.connector(features))

    @torch.no_grad()
    def loss(self, inputs: torch.Tensor, mask: np.ndarray, labels: np.ndarray) -> float:
        return float(self.llm(inputs_embeds=inputs, attention_mask=torch.from_numpy(mask),
                              labels=torch.from_numpy(labels)).loss)  # fmt: skip

    @torch.no_grad()
    def greedy(self, inputs: torch.Tensor, count: int) -> list[int]:
        """The tokens that follow one row (1, T, D), none of them an end."""
        found: list[int] = []
        for _ in range(count):
            logits: Any = self.llm(inputs_embeds=inputs).logits
            found.append(int(logits[0, -1].argmax()))
            following = self.llm.get_input_embeddings()(torch.tensor([found[-1:]]))
            inputs = torch.cat([inputs, following], 1)
        return found
